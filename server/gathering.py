"""Who takes part in a job: proposals, refusals, the quorum, and for whom the coordinator waits.

Under secure aggregation the roster of a job is frozen when it is first proposed, which is when everyone that is waited
for is online and the roster's version is signed; its chain goes into every proposal, and who enrols later waits for the
next job. In clear nothing rests on it: lenders are asked for their signatures, and not waited for.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Final

from fedfin.errors import ConfigError, JobOverError, LinkError, QuorumError
from fedfin.plan import JobPlan
from fedfin.roster import Roster
from fedfin.roster_chain import RosterChain
from fedfin.server.exchange import Answers, Exchange
from fedfin.server.jobs import SILENT_S, Say, Waiting
from fedfin.server.roster import FederationStore
from fedfin.server.roster_signing import RosterSigning
from fedfin.strategies.sums import largest_weight
from fedfin.update import Accepted, Message, Propose, Refused

__all__ = ["ASK_AGAIN_S", "PROPOSE_S", "WAIT_S", "Gathering"]

WAIT_S: Final = 0.2
"""A waiting coordinator looks again after this long."""

ASK_AGAIN_S: Final = {"approval": 5.0, "hours": 60.0}
"""A lender that waits for its people, or for its hours, is asked again after so many seconds."""

PROPOSE_S: Final = 120.0
"""What a proposal waits: a lender reads its table and calibrates its noise before it answers."""


class Gathering:
    """The lenders of one job: asked, accepted, refused, away."""

    def __init__(
        self,
        exchange: Exchange,
        store: FederationStore,
        job_id: str,
        plan: JobPlan,
        schema_fingerprint: str,
        *,
        signing: RosterSigning,
        settle: Callable[[Collection[str]], None],
        say: Say,
    ) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            store: Where answers and the roster are kept.
            job_id: The job's id.
            plan: Its plan.
            schema_fingerprint: Of the federation's schema.
            signing: The roster's versions, and the way to their signatures.
            settle: Tells lenders how earlier jobs ended; called before they are asked for this one.
            say: Told of every step.
        """
        self._exchange = exchange
        self._store = store
        self._job_id = job_id
        self._plan = plan
        self._schema_fingerprint = schema_fingerprint
        self._signing = signing
        self._settle = settle
        self._say = say
        # who was left out stays out, whatever was restarted; who refused by itself is asked again
        self._refused = store.left_out(job_id)
        self._ask_again_at: dict[str, float] = {}
        self._waits: dict[str, str] = {}  # lenders that may agree later, with their reason
        self._told_newcomers: set[str] = set()
        self._chain = _kept_chain(store, job_id)
        self._roster = None if self._chain is None else self._chain.last.roster()
        self._waiting = Waiting(say)
        self._began = any(job.job_id == job_id and job.began_at for job in store.jobs())

    @property
    def roster(self) -> Roster:
        """The job's frozen roster; there is one once `gather` has returned, under secure aggregation."""
        assert self._roster is not None  # noqa: S101  (our own order of steps)
        return self._roster

    @property
    def accepted(self) -> frozenset[str]:
        """Lenders that take part and did not refuse to go on."""
        return frozenset(self._store.weights(self._job_id))

    def refuse(self, name: str, reason: str) -> None:
        """Record that a lender refused, at the proposal or later: its part in the job ends."""
        self._refused[name] = reason
        self._store.save_answer(self._job_id, name, weight=None, reason=reason)
        self._say({"event": "refused", "lender": name, "reason": reason})

    def wait(self, name: str, reply: Refused) -> None:
        """Leave a lender alone that says not yet, at the proposal or later; it is asked again by itself."""
        pause_s = ASK_AGAIN_S.get(reply.waits, SILENT_S)
        self._ask_again_at[name] = time.monotonic() + pause_s
        if self._waits.get(name) != reply.reason:
            self._waits[name] = reply.reason
            self._say({"event": "held", "lender": name, "reason": reply.reason})

    def mend(self, otherwise: str) -> str:
        """Return what to do, for people: `otherwise`, unless lenders were left out; they stay out of this job."""
        left_out = self._store.left_out(self._job_id)
        if not left_out:
            return otherwise
        why = "; ".join(f"{name} was left out, since {reason}" for name, reason in left_out.items())
        removals = ", ".join(f"`fedfin server remove {name}`" for name in left_out)
        return (
            f"{why}. Run {removals}, then `fedfin server --new-job`, which spends the lenders' budgets again"
        )

    def gather(self) -> None:
        """Propose the job until enough lenders take part: all that are waited for, or the quorum after a while.

        Raises:
            QuorumError: So many lenders refused that the quorum cannot be met; a `JobOverError` where nothing was
                asked of anybody yet, so that another job costs no more, or where too many were left out.
        """
        cohort = self._plan.cohort
        started = time.monotonic()
        while True:
            members = self._members()
            late = time.monotonic() - started > cohort.start_timeout_s
            if self._plan.aggregation == "plain":
                self._signing.ask(members & self._exchange.online())
            elif self._roster is None:
                if not self._settle_roster(late=late):
                    time.sleep(WAIT_S)
                    continue
                members = self._members()
            self.propose()
            here = members & self.accepted & self._ready()
            invited = self._invited()
            self._check_quorum(members, invited)
            # A refusal is an answer: nobody waits for a lender that has said no. Who is invited is waited for.
            wanted = (cohort.wait_for or len(members) + len(invited)) - len(self._refused)
            wanted = max(wanted, cohort.min_lenders)
            resumed = self._store.checkpoint(self._job_id) is not None
            if len(here) >= wanted or (len(here) >= cohort.min_lenders and (late or resumed)):
                self._store.begin_job(self._job_id)
                self._say({"event": "cohort", "lenders": sorted(here), "refused": self._refused})
                return
            self._waiting.report(here, members - here - set(self._refused), wanted, invited)
            time.sleep(WAIT_S)

    def propose(self, deadline_s: float = PROPOSE_S) -> None:
        """Propose the job to every member that is online and has not answered yet."""
        answered = self.accepted | set(self._refused)
        new = sorted((self._members() - answered) & self._ready())
        if not new:
            return
        self._settle(new)  # first: what an abandoned job holds could not be reserved for this one
        answers = self._exchange.ask(self._proposals(new), Accepted, deadline_s=deadline_s)
        for name, reply in sorted(answers.replies.items()):
            self._take(name, reply, answers)
        for name in new:
            refused = answers.replies.get(name)
            held = isinstance(refused, Refused) and refused.waits != ""
            if name in answers.failures and name not in self._refused and not held:
                self._ask_again_at[name] = time.monotonic() + SILENT_S
                self._say({"event": "unanswered", "lender": name, "reason": answers.failures[name]})

    def quorum(self) -> tuple[str, ...]:
        """Return the lenders that are online and take part, sorted, once they are a quorum; newcomers are asked.

        Raises:
            QuorumError: So many lenders refused that the quorum cannot be met; a `JobOverError` where too many of them
                were left out.
        """
        # A newcomer that hangs holds a round up no longer than a lender that does.
        self.propose(self._plan.cohort.round_deadline_s)
        quorum = self._plan.cohort.min_lenders
        while True:
            here = self.accepted & self._ready()
            if len(here) >= quorum:
                return tuple(sorted(here))
            self.propose()
            if len(self.accepted | (self._members() - set(self._refused))) < quorum:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._refused.items()))
                is_over, mend = self._is_over(), "mend it with them, then start again"
                msg = f"too many lenders refused to go on ({reasons}); {self.mend(mend) if is_over else mend}"
                raise (JobOverError if is_over else QuorumError)(msg)
            self._waiting.report(set(here), set(self.accepted - here), quorum)
            time.sleep(WAIT_S)

    def here(self, bound: Collection[str] | None = None) -> tuple[str, ...]:
        """Return the lenders that are online now and take part, sorted; of a bound cohort all of it, or nobody."""
        here = self.accepted & self._ready()
        if bound is None:
            return tuple(sorted(here))
        return tuple(sorted(bound)) if set(bound) <= here else ()

    def exactly(self, names: Collection[str], why: str) -> tuple[str, ...]:
        """Return these lenders, sorted, once all of them are online.

        Args:
            names: Who must be there.
            why: What happened that nobody else may take their place, for people.

        Raises:
            QuorumError: One of them refused, or they were not all online within `cohort.start_timeout_s`; a
                `JobOverError` where one of them was left out.
        """
        until = time.monotonic() + self._plan.cohort.start_timeout_s
        while True:
            here = set(names) & self.accepted & self._ready()
            if here == set(names):
                return tuple(sorted(here))
            gone = sorted(set(names) - self.accepted)
            if gone or time.monotonic() > until:
                missing = ", ".join(gone or sorted(set(names) - here))
                what = (
                    "takes no part any more" if gone else "did not come back in time (cohort.start_timeout_s)"
                )
                is_over = not self._store.left_out(self._job_id).keys().isdisjoint(gone)
                mend = (
                    "Bring them back and start again, or run `fedfin server --new-job`, which spends the lenders'"
                    " budgets again"
                )
                msg = (
                    f"{why}; the same model may be asked about again of the identical cohort only, and {missing}"
                    f" {what}. {self.mend(mend) if is_over else mend}"
                )
                raise (JobOverError if is_over else QuorumError)(msg)
            self._waiting.report(here, set(names) - here, len(names))
            time.sleep(WAIT_S)

    def _ready(self) -> frozenset[str]:
        """Return who is online and was not asked in vain a moment ago."""
        now = time.monotonic()
        return frozenset(name for name in self._exchange.online() if self._ask_again_at.get(name, 0.0) <= now)

    def _settle_roster(self, *, late: bool) -> bool:
        """Freeze the job's roster if it is signed and enough of its members are online; else say what is waited for.

        The first version is asked for once everyone that is waited for is online, since it is signed by all. A later
        one is asked for and not waited for: the last complete version serves, unless it is too small for the job.
        """
        cohort = self._plan.cohort
        enrolled = {member.name: member.identity_key for member in self._store.members()}
        chain, invited = self._signing.chain(), self._invited()
        if chain is None:
            members = set(enrolled)
        else:
            keys = chain.last.roster().keys
            members, invited = {name for name, key in enrolled.items() if keys.get(name) == key}, []
        online = members & self._exchange.online()
        wanted = max(cohort.wait_for or len(members) + len(invited), cohort.min_lenders)
        enough = len(online) >= wanted or (late and len(online) >= cohort.min_lenders)
        if chain is not None or enough:
            self._signing.ask(set(enrolled) & self._exchange.online())
            if (signed := self._signing.chain()) != chain:
                return signed is not None and self._settle_roster(late=late)
        if chain is not None and enough:
            self._chain = RosterChain.from_json(self._store.freeze_roster(self._job_id, chain.to_json()))
            self._roster = self._chain.last.roster()
            return True
        self._waiting.report(online, members - online, wanted, invited, approvals=self._signing.waits_for())
        return False

    def _proposals(self, names: Collection[str]) -> dict[str, Message]:
        """Return the proposal to each lender; in clear the roster goes to those who are in it with their keys."""
        signed = self._chain if self._plan.aggregation == "secure" else self._signing.chain()
        keys = {} if signed is None else signed.last.roster().keys
        enrolled = {member.name: member.identity_key for member in self._store.members()}
        plan = self._plan.model_dump_json()
        bare = Propose(self._job_id, plan, self._schema_fingerprint)
        full = bare if signed is None else dataclasses.replace(bare, roster=signed.to_json())
        return {name: full if keys.get(name) == enrolled.get(name) else bare for name in names}

    def _members(self) -> set[str]:
        """Return who may take part; under secure aggregation the frozen roster's members, with the keys it states."""
        enrolled = {member.name: member.identity_key for member in self._store.members()}
        if self._roster is None:
            return set(enrolled)
        members = {name for name, key in enrolled.items() if self._roster.keys.get(name) == key}
        for name in sorted(set(enrolled) - members - self._told_newcomers):
            self._told_newcomers.add(name)
            self._say({"event": "next_job", "lender": name})
        return members

    def _invited(self) -> list[str]:
        """Return whose answer to an invitation could still change the cohort."""
        return [] if self._roster is not None else [name for name, _ in self._store.pending_invitations()]

    def _check_quorum(self, members: Collection[str], invited: Collection[str]) -> None:
        quorum = self._plan.cohort.min_lenders
        left = len(set(members) - set(self._refused))
        more_may_come = self._roster is None and (bool(invited) or len(members) < quorum)
        if left >= quorum or more_may_come:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._refused.items()))
        is_over, mend = self._is_over(), "Mend the plan, then start again"
        msg = (
            f"cohort.min_lenders is {quorum}, and only {len(members) - len(self._refused)} of {len(members)} lenders"
            f" can take part. Refused: {reasons}. {self.mend(mend) if is_over else mend}"
        )
        raise (JobOverError if is_over or not self._began else QuorumError)(msg)

    def _is_over(self) -> bool:
        """Tell whether so many were left out that the quorum is gone, whatever those who refused mend."""
        staying = self._members() - self._store.left_out(self._job_id).keys()
        return len(staying) < self._plan.cohort.min_lenders and bool(self._store.left_out(self._job_id))

    def _take(self, name: str, reply: Message, answers: Answers) -> None:
        secure = self._plan.aggregation == "secure"
        largest = largest_weight(self._plan.training)
        if isinstance(reply, Refused):
            answers.failures[name] = reply.reason
            if reply.waits:
                self.wait(name, reply)
            else:
                self.refuse(name, reply.reason)
        elif not isinstance(reply, Accepted):
            answers.failures[name] = "it answered another question"
        elif secure and reply.weight != 0.0:
            answers.failures[name] = "it states its weight, which must not leave it under secure aggregation"
        elif not secure and not 0 < reply.weight <= largest:
            answers.failures[name] = f"its weight is not one of the plan's: above 0, at most {largest:g}"
        else:
            self._store.save_answer(self._job_id, name, weight=reply.weight, reason=None)
            self._waits.pop(name, None)
            self._say({"event": "accepted", "lender": name})


def _kept_chain(store: FederationStore, job_id: str) -> RosterChain | None:
    """Return the roster that a job was frozen with, or None before.

    Raises:
        ConfigError: It was frozen by a release whose rosters nobody signed.
    """
    kept = store.roster(job_id)
    try:
        return None if kept is None else RosterChain.from_json(kept)
    except LinkError as error:
        msg = (
            f"job {job_id} was started by a release whose rosters were not signed ({error}); run `fedfin server"
            " --new-job`, which abandons it"
        )
        raise ConfigError(msg) from error

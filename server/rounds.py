"""The job: propose, bins, rounds, release; with a quorum, deadlines, and a checkpoint after every round.

No Flower here: the way to the lenders is an `Exchange`, so the loop is tested without a network. A job goes on
from its last checkpoint whatever was killed; lenders answer a repeated question with the answer they gave
before, so no round is charged twice.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfin.credit.binning import bins_from_histogram, histogram_sensitivity, histogram_size
from fedfin.credit.drift import Reference, num_cells
from fedfin.credit.models import architecture_of, initial_weights, model_fingerprint
from fedfin.credit.schema import Schema
from fedfin.errors import DataError, FedfinError, QuorumError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import calibrate
from fedfin.server.jobs import SILENT_S, Say, Waiting
from fedfin.server.roster import Checkpoint, FederationStore, Job
from fedfin.strategies.fedavg import fedavg
from fedfin.strategies.strategy import CohortSum, ModelState, lender_weight
from fedfin.update import (
    Accepted,
    AskHistogram,
    Done,
    Finish,
    Histogram,
    Message,
    Propose,
    Refused,
    Train,
    Update,
)

__all__ = ["Answers", "Exchange", "run_job"]

_WAIT_S: Final = 0.2
_PROPOSE_S: Final = 120.0  # a lender reads its table and calibrates its noise before it answers


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back: replies by lender, and failures by lender with the reason, in words."""

    replies: dict[str, Message] = field(repr=False)
    failures: dict[str, str]


class Exchange(Protocol):
    """The way to the lenders."""

    def online(self) -> frozenset[str]:
        """Return the names of the enrolled lenders that are connected now."""
        ...

    def ask(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        *,
        deadline_s: float,
        on_reply: Callable[[str], None] | None = None,
    ) -> Answers:
        """Send a request to each lender named; return when all have answered, or at the deadline."""
        ...


def run_job(
    exchange: Exchange,
    store: FederationStore,
    job: Job,
    plan: JobPlan,
    schema: Schema,
    *,
    release: Callable[[Checkpoint], None],
    say: Say,
) -> Checkpoint:
    """Run a job to its end and send every lender the model.

    Args:
        exchange: The way to the lenders.
        store: The durable state; a checkpoint is written after the bins and after every round.
        job: The job, new or unfinished.
        plan: Its plan.
        schema: The federation's schema.
        release: Keeps the model at the coordinator; called before the job counts as completed, and again with
            the same model where the coordinator was killed in between.
        say: Told of every step.

    Returns:
        The last checkpoint: the released model.

    Raises:
        QuorumError: So many lenders refused that the quorum cannot be met.
    """
    runner = _Runner(exchange, store, job, plan, schema, say)
    if job.status == "running":
        runner.settle(exchange.online())
        runner.gather()
        checkpoint = store.checkpoint(job.job_id) or runner.make_bins()
        while checkpoint.round < plan.training.rounds:
            checkpoint = runner.round(checkpoint)
        release(checkpoint)
        store.end_job(job.job_id, "completed")
    else:
        checkpoint = store.checkpoint(job.job_id) or _lost(job)
    runner.deliver(checkpoint)
    return checkpoint


class _Runner:
    """One job's loop; holds what the steps share."""

    def __init__(
        self, exchange: Exchange, store: FederationStore, job: Job, plan: JobPlan, schema: Schema, say: Say
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._job_id = job.job_id
        self._plan = plan
        self._schema = schema
        self._say = say
        self._refused: dict[str, str] = {}
        self._ask_again_at: dict[str, float] = {}
        self._ended = {
            earlier.job_id: earlier
            for earlier in store.jobs()
            if earlier.status != "running" and earlier.job_id != job.job_id
        }

    def settle(self, names: Collection[str]) -> None:
        """Tell these lenders how earlier jobs ended, where they were away: what they had reserved is free again."""
        for job in list(self._ended.values()):
            away = set(self._store.undelivered(job.job_id))
            if not away:
                del self._ended[job.job_id]
            elif away & set(names):
                last = self._store.checkpoint(job.job_id) if job.status == "completed" else None
                self._end(_finish(job.job_id, last), away & set(names))

    def gather(self) -> None:
        """Propose the job until enough lenders take part: all that are waited for, or the quorum after a while."""
        cohort = self._plan.cohort
        started = time.monotonic()
        waiting = Waiting(self._say)
        while True:
            members = {member.name for member in self._store.members()}
            self._propose(members)
            accepted = set(self._store.weights(self._job_id)) & members
            here = accepted & self._exchange.online()
            invited = [name for name, _ in self._store.pending_invitations()]
            if not invited and len(members - set(self._refused)) < cohort.min_lenders <= len(members):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._refused.items()))
                msg = (
                    f"cohort.min_lenders is {cohort.min_lenders}, and only {len(members) - len(self._refused)} of"
                    f" {len(members)} lenders can take part. Refused: {reasons}. Mend the plan, then start again"
                )
                raise QuorumError(msg)
            # A refusal is an answer: nobody waits for a lender that has said no. Who is invited is waited for.
            wanted = (cohort.wait_for or len(members) + len(invited)) - len(self._refused)
            wanted = max(wanted, cohort.min_lenders)
            resumed = self._store.checkpoint(self._job_id) is not None
            late = time.monotonic() - started > cohort.start_timeout_s
            if len(here) >= wanted or (len(here) >= cohort.min_lenders and (late or resumed)):
                self._say({"event": "cohort", "lenders": sorted(here), "refused": self._refused})
                return
            waiting.report(here, members - here - set(self._refused), wanted, invited)
            time.sleep(_WAIT_S)

    def make_bins(self) -> Checkpoint:
        """Sum the lenders' histograms, place the bins, and make the first checkpoint."""
        noise = self._bins_noise()
        while True:
            here = self._wait_for_quorum()
            answers = self._exchange.ask(
                dict.fromkeys(sorted(here), AskHistogram(self._job_id)),
                Histogram,
                deadline_s=self._plan.cohort.round_deadline_s,
            )
            cells = histogram_size(self._schema)
            counts: list[NDArray[np.float64]] = []
            for name, reply in self._sorted_out(answers):
                if not isinstance(reply, Histogram) or reply.counts.shape != (cells,):
                    answers.failures[name] = f"its histogram does not have the schema's {cells} cells"
                elif (problem := self._implausible(reply.counts, noise)) is not None:
                    answers.failures[name] = problem
                else:
                    counts.append(self._capped(reply.counts))
            enough = len(counts) >= self._plan.cohort.min_lenders
            event = "bins" if enough else "bins_short"
            self._say({"event": event, "lenders": len(counts), "missing": answers.failures})
            if enough:
                break
            time.sleep(_WAIT_S)
        total = np.sum(counts, axis=0)
        total_noise = noise * len(counts) ** 0.5
        bins = bins_from_histogram(total, self._schema, self._plan.model.max_bins)
        arch = architecture_of(self._plan.model, self._schema, bins)
        checkpoint = Checkpoint(
            round=0,
            bins=bins.to_json(),
            fingerprint=model_fingerprint(self._schema.fingerprint(), bins.fingerprint(), arch),
            weights=initial_weights(arch, self._plan.model.seed),
            reference=_reference(total, self._schema, total_noise),
        )
        self._store.save_checkpoint(self._job_id, checkpoint)
        return checkpoint

    def _bins_noise(self) -> float:
        """Return the standard deviation of one lender's noise in one cell, in loans."""
        privacy, training = self._plan.privacy, self._plan.training
        if privacy.mode == "none":
            return 0.0
        calibrated = calibrate(privacy, sample_rate=training.sample_rate, num_steps=self._plan.num_steps)
        return calibrated.bins_noise_multiplier * histogram_sensitivity(self._schema)

    def _implausible(self, counts: NDArray[np.float64], noise: float) -> str | None:
        """Return why a lender's histogram cannot be one: every loan is once in every column, noise apart."""
        totals = self._totals(counts)
        spread = 8.0 * noise * max(num_cells(column) for column in self._schema.features) ** 0.5 + 0.5
        if not np.isfinite(totals).all() or np.ptp(totals) > 2 * spread:
            return "the columns of its histogram do not count the same loans"
        if counts.min(initial=0.0) < -8.0 * noise - 0.5:
            return "its histogram has cells further below zero than noise puts them"
        return None

    def _capped(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scale a histogram down to the weight cap, so that no lender alone places the bins."""
        total = float(np.mean(self._totals(counts)))
        return counts * min(1.0, self._plan.training.weight_cap / max(total, 1.0))

    def _totals(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        ends = np.cumsum([num_cells(column) for column in self._schema.features])
        with np.errstate(over="ignore", invalid="ignore"):  # absurd counts become what is refused
            return np.array([part.sum() for part in np.split(counts, ends[:-1])])

    def round(self, before: Checkpoint) -> Checkpoint:
        """Run the next round until it has a quorum of updates; return the checkpoint after it."""
        number = before.round + 1
        while True:
            # A newcomer that hangs holds a round up no longer than a lender that does.
            self._propose(
                {member.name for member in self._store.members()}, self._plan.cohort.round_deadline_s
            )
            here = self._wait_for_quorum()
            started = time.monotonic()
            self._say(
                {"event": "round", "round": number, "of": self._plan.training.rounds, "lenders": sorted(here)}
            )
            answers = self._exchange.ask(
                dict.fromkeys(
                    sorted(here), Train(self._job_id, number, before.bins, before.fingerprint, before.weights)
                ),
                Update,
                deadline_s=self._plan.cohort.round_deadline_s,
                on_reply=lambda name: self._say({"event": "answer", "round": number, "lender": name}),
            )
            updates = self._updates(answers, before, number)
            report = {
                "event": "round_done",
                "round": number,
                "of": self._plan.training.rounds,
                "cohort": sorted(updates),
                "missing": answers.failures,
                "seconds": round(time.monotonic() - started, 4),
            }
            if len(updates) >= self._plan.cohort.min_lenders:
                break
            self._say({**report, "event": "round_short"})
            time.sleep(_WAIT_S)
        weights = self._store.weights(self._job_id)
        total = CohortSum(
            values=np.sum(
                [weights[name] * delta.astype(np.float64) for name, delta in updates.items()], axis=0
            ),
            weight=sum(weights[name] for name in updates),
            num_lenders=len(updates),
        )
        state = fedavg(ModelState(weights=before.weights, round=before.round), total)
        after = replace(before, round=number, weights=state.weights)
        self._store.save_checkpoint(self._job_id, after)
        self._say(report)
        return after

    def deliver(self, checkpoint: Checkpoint) -> None:
        """Send the model to every lender that took part; those away get it when the coordinator runs again."""
        finish = _finish(self._job_id, checkpoint)
        not_kept: dict[str, str] = {}
        until = time.monotonic() + self._plan.cohort.round_deadline_s
        told = False
        while True:
            away = set(self._store.undelivered(self._job_id))
            here = (away & self._exchange.online()) - set(not_kept)
            if here:
                not_kept |= self._end(finish, here)
                away = set(self._store.undelivered(self._job_id))
            if not away - set(not_kept) or time.monotonic() > until:
                self._say({"event": "delivered", "missing": sorted(away), "not_kept": not_kept})
                return
            if not told:
                left = max(0.0, until - time.monotonic())
                self._say({"event": "delivering", "for": sorted(away - set(not_kept)), "seconds": left})
                told = True
            time.sleep(_WAIT_S)

    def _end(self, finish: Finish, names: set[str]) -> dict[str, str]:
        """Send a job's end; return the lenders that answered but could not keep it, with the reason."""
        answers = self._exchange.ask(dict.fromkeys(sorted(names), finish), Done, deadline_s=_PROPOSE_S)
        not_kept: dict[str, str] = {}
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, Done):
                self._store.mark_delivered(finish.job_id, name)
            else:
                not_kept[name] = (
                    reply.reason if isinstance(reply, Refused) else "it answered another question"
                )
        return not_kept

    def _propose(self, members: set[str], deadline_s: float = _PROPOSE_S) -> None:
        answered = set(self._store.weights(self._job_id)) | set(self._refused)
        soon = {name for name, at in self._ask_again_at.items() if time.monotonic() < at}
        new = sorted(((members - answered) & self._exchange.online()) - soon)
        if not new:
            return
        self.settle(new)  # first: what an abandoned job holds could not be reserved for this one
        largest = lender_weight(self._plan.training.weight_cap, self._plan.training)
        proposal = Propose(self._job_id, self._plan.model_dump_json(), self._schema.fingerprint())
        answers = self._exchange.ask(dict.fromkeys(new, proposal), Accepted, deadline_s=deadline_s)
        for name, reply in self._sorted_out(answers):
            if not isinstance(reply, Accepted):
                answers.failures[name] = "it answered another question"
            elif not 0 < reply.weight <= largest:
                answers.failures[name] = f"its weight is not one of the plan's: above 0, at most {largest:g}"
            else:
                self._store.save_answer(self._job_id, name, weight=reply.weight, reason=None)
                self._say({"event": "accepted", "lender": name})
        for name in new:
            if name in answers.failures and name not in self._refused:
                self._ask_again_at[name] = time.monotonic() + SILENT_S
                self._say({"event": "unanswered", "lender": name, "reason": answers.failures[name]})

    def _sorted_out(self, answers: Answers) -> list[tuple[str, Message]]:
        """Return the replies that are no refusals; a refusal ends that lender's part in the job."""
        kept: list[tuple[str, Message]] = []
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, Refused):
                self._refused[name] = reply.reason
                answers.failures[name] = reply.reason
                self._store.save_answer(self._job_id, name, weight=None, reason=reply.reason)
                self._say({"event": "refused", "lender": name, "reason": reply.reason})
            else:
                kept.append((name, reply))
        return kept

    def _updates(self, answers: Answers, before: Checkpoint, number: int) -> dict[str, NDArray[np.float32]]:
        updates: dict[str, NDArray[np.float32]] = {}
        for name, reply in self._sorted_out(answers):
            if not isinstance(reply, Update) or reply.round != number:
                answers.failures[name] = "it answered another question"
            elif reply.fingerprint != before.fingerprint or reply.delta.shape != before.weights.shape:
                answers.failures[name] = "its update is for another schema or architecture"
            elif np.abs(reply.delta).max(initial=0.0) > _reach(self._plan, before.weights):
                answers.failures[name] = "its update is further away than the plan's steps can reach"
            else:
                updates[name] = reply.delta
        return updates

    def _wait_for_quorum(self) -> set[str]:
        waiting = Waiting(self._say)
        quorum = self._plan.cohort.min_lenders
        while True:
            accepted = set(self._store.weights(self._job_id))
            here = accepted & self._exchange.online()
            if len(here) >= quorum:
                return here
            self._propose({member.name for member in self._store.members()})
            if len(accepted | ({m.name for m in self._store.members()} - set(self._refused))) < quorum:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._refused.items()))
                msg = f"too many lenders refused to go on ({reasons}); mend it with them, then start again"
                raise QuorumError(msg)
            waiting.report(here, accepted - here, quorum)
            time.sleep(_WAIT_S)


def _reference(total: NDArray[np.float64], schema: Schema, noise_stddev: float) -> str:
    try:
        return Reference.from_histogram(total, schema, noise_stddev=noise_stddev).to_json()
    except DataError:
        return ""  # noise left a column without loans: there is nothing to compare with, and no harm


def _reach(plan: JobPlan, weights: NDArray[np.float32]) -> float:
    """Return how far one weight can move in a round: what an update exceeds was not made by the plan's AdamW.

    Source: Kingma & Ba 2015, section 2.1: a step is at most lr * (1 - beta1) / sqrt(1 - beta2), 3.17 lr here.
    """
    training = plan.training
    decay = training.weight_decay * (float(np.abs(weights).max(initial=0.0)) + 1.0)
    return training.local_steps * training.learning_rate * (4.0 + decay)


def _finish(job_id: str, last: Checkpoint | None) -> Finish:
    """Return the message that ends a job: completed with its model, or abandoned."""
    if last is None:
        return Finish(job_id, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32))
    return Finish(job_id, "completed", last.round, last.bins, last.fingerprint, last.weights, last.reference)


def _lost(job: Job) -> Checkpoint:
    msg = f"job {job.job_id} is completed but its checkpoint is gone; restore federation.db from its backup"
    raise FedfinError(msg)

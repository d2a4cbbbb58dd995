"""The job: propose, bins, rounds, evaluations, release; with a quorum, deadlines, and a checkpoint after every round.

No Flower here: the way to the lenders is an `Exchange`, so the loop is tested without a network; and no word on how
sums are made: that is a `Summing`, in clear or under secure aggregation. A job goes on from its last checkpoint
whatever was killed. In clear lenders answer a repeated question with the answer they gave before. Under secure
aggregation a stage whose masked vectors were asked for is used up: a lost round's number is not taken again, and the
job has one aggregated round fewer. Either way no round is charged twice.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from fedfin.coordinator_key import CoordinatorIdentity
from fedfin.credit.schema import Schema
from fedfin.errors import FedfinError, JobOverError, QuorumError
from fedfin.plan import JobPlan
from fedfin.server.delivery import Delivery
from fedfin.server.evaluation import evaluation_rounds
from fedfin.server.exchange import Exchange
from fedfin.server.gathering import WAIT_S, Gathering
from fedfin.server.jobs import Say
from fedfin.server.plain_sums import PlainSums
from fedfin.server.roster import Checkpoint, FederationStore, Job
from fedfin.server.roster_signing import RosterBook, RosterSigning
from fedfin.server.stages import JobStages, digest_of
from fedfin.server.summing import CohortSums, Stage, SumLostError, Summing, SumShortError, Upcoming
from fedfin.server.transcripts import Transcripts
from fedfin.server.unmasking import JobContext, SecureSums

__all__ = ["run_job"]

_MOST_REFUSALS: Final = 3  # of one stage, by a lender that is asked again and again
_EVALUATION_TRIES: Final = 3
_EVALUATION_PAUSE_S: Final = 2.0
_NUMBERED: Final = re.compile(r"(round|evaluation) (\d+)")


def run_job(
    exchange: Exchange,
    store: FederationStore,
    job: Job,
    plan: JobPlan,
    schema: Schema,
    *,
    identity: CoordinatorIdentity,
    release: Callable[[Checkpoint], None],
    judged: Callable[[Mapping[str, Any]], None],
    say: Say,
    transcripts: Transcripts | None = None,
) -> Checkpoint:
    """Run a job to its end and send every lender the model.

    Args:
        exchange: The way to the lenders.
        store: The durable state; a checkpoint is written after the bins and after every round.
        job: The job, new or unfinished.
        plan: Its plan.
        schema: The federation's schema.
        identity: The coordinator's identity key, with what the authority states of it.
        release: Keeps the model at the coordinator; called before the job counts as completed, and again with
            the same model where the coordinator was killed in between.
        judged: Keeps the figures of an evaluation, of sums only; JSON.
        say: Told of every step.
        transcripts: Where secure sums are kept so that they can be done again; None keeps none.

    Returns:
        The last checkpoint: the released model.

    Raises:
        QuorumError: So many lenders refused that the quorum cannot be met, or a sum was lost and the cohort that alone
            may be asked again did not come back. The job goes on when the coordinator is started again.
        JobOverError: Neither does it then: the job failed, or had before. Its lenders are told, so that what they had
            reserved and not spent is free again; who is away is told when the coordinator runs again.
    """
    runner = _Runner(exchange, store, job, plan, schema, identity, judged, say, transcripts)
    if job.status == "failed":
        runner.delivery.give_up(plan.cohort.round_deadline_s)
        msg = f"job {job.job_id} failed: {job.reason}"
        raise JobOverError(msg)
    if job.status == "running":
        store.stop_job(job.job_id, "")
        try:
            checkpoint = runner.train()
            release(checkpoint)
        except JobOverError as error:
            # first: a coordinator that was killed while it tells the lenders must not go on with them
            store.end_job(job.job_id, "failed", str(error))
            say({"event": "job_failed", "job": job.job_id, "reason": str(error)})
            runner.delivery.give_up()
            raise
        except FedfinError as error:
            with contextlib.suppress(FedfinError):  # the store itself may have failed; that is the error then
                store.stop_job(job.job_id, str(error))
                say({"event": "job_stopped", "job": job.job_id, "reason": str(error)})
            raise
        store.end_job(job.job_id, "completed")
    else:
        checkpoint = store.checkpoint(job.job_id) or _lost(job)
    runner.delivery.deliver(checkpoint)
    return checkpoint


class _Runner:
    """One job's loop; holds what the steps share."""

    def __init__(
        self,
        exchange: Exchange,
        store: FederationStore,
        job: Job,
        plan: JobPlan,
        schema: Schema,
        identity: CoordinatorIdentity,
        judged: Callable[[Mapping[str, Any]], None],
        say: Say,
        transcripts: Transcripts | None,
    ) -> None:
        self._transcripts = transcripts
        self._exchange = exchange
        self._store = store
        self._job_id = job.job_id
        self._plan = plan
        self._schema = schema
        self._federation = identity.statement.federation
        self._judged = judged
        self._say = say
        self.delivery = Delivery(
            exchange, store, job.job_id, say=say, patience_s=plan.cohort.round_deadline_s
        )
        signing = RosterSigning(exchange, RosterBook(store, identity), job.job_id, say)
        self._gathering = Gathering(
            exchange,
            store,
            job.job_id,
            plan,
            schema.fingerprint(),
            signing=signing,
            settle=self.delivery.settle,
            say=say,
        )

    def train(self) -> Checkpoint:
        """Run the job's bins, rounds and evaluations, from where its last checkpoint stands."""
        self.delivery.settle(self._exchange.online())
        self._gathering.gather()
        summing = self._summing()
        weights = self._store.weights
        stages = JobStages(
            self._job_id,
            self._plan,
            self._schema,
            num_members=len(self._gathering.roster.keys) if self._plan.aggregation == "secure" else 0,
            weight=lambda name: weights(self._job_id)[name],
        )
        checkpoint = self._store.checkpoint(self._job_id) or self._bins(summing, stages)
        rounds, due = self._plan.training.rounds, evaluation_rounds(self._plan)
        number = max(self._used("round"), checkpoint.round)
        while True:
            if number in due and checkpoint.round > 0:
                self._evaluate(summing, stages, due.index(number) + 1, checkpoint, number)
            if number >= rounds:
                return checkpoint if checkpoint.round > 0 else self._nothing_learned(rounds)
            number += 1
            checkpoint = self._round(summing, stages, number, checkpoint)

    # Stages

    def _bins(self, summing: Summing, stages: JobStages) -> Checkpoint:
        """Sum the lenders' histograms, place the bins, and keep the first checkpoint."""
        stage = stages.bins()
        while True:
            if self._plan.privacy.mode != "none" and summing.bound_to(stage) is not None:
                mend = self._gathering.mend("start another job with `fedfin server --new-job`")
                msg = (
                    f"the sum of the histograms of job {self._job_id} was lost after the lenders had been charged for"
                    f" it, and they answer it once; {mend}"
                )
                raise JobOverError(msg)
            sums = self._sum(summing, stage, {})
            if sums is not None:
                break
        checkpoint = stages.first(sums)
        said = {
            "event": "bins",
            "lenders": len(sums.survivors),
            "missing": dict(sums.missing),
            "model": digest_of(checkpoint),
        }
        self._store.save_checkpoint(self._job_id, checkpoint, said)
        self._say(said)
        return checkpoint

    def _round(self, summing: Summing, stages: JobStages, number: int, before: Checkpoint) -> Checkpoint:
        """Run the round until it has a quorum of updates, or is lost; return the checkpoint after it."""
        stage = stages.round(number, before)
        about = {"round": number, "of": self._plan.training.rounds}
        sums = self._sum(summing, stage, about, following=self._following(stages, number, before))
        if sums is None:
            return before
        after = stages.after(before, sums)
        digests = {"model_before": digest_of(before), "model": digest_of(after)}
        said = {"event": "round_done", **about, **_report(sums), **digests}
        self._store.save_checkpoint(self._job_id, after, said)
        self._say(said)
        return after

    def _evaluate(
        self, summing: Summing, stages: JobStages, number: int, model: Checkpoint, after: int
    ) -> None:
        """Have the model judged on all lenders' held-out loans; one that is lost or short of lenders is not made."""
        stage = stages.evaluation(number, model)
        if number <= self._used("evaluation"):
            return  # it was made, or lost, before the coordinator was started again
        about = {"evaluation": number, "after": after}
        following = None
        if after < self._plan.training.rounds:
            following = stages.upcoming_round(after + 1, model)
        declined: set[str] = set()
        tries, until = 0, time.monotonic() + self._plan.cohort.round_deadline_s
        while True:
            names = tuple(
                name for name in self._gathering.here(summing.bound_to(stage)) if name not in declined
            )
            if len(names) >= self._plan.cohort.min_lenders:
                found = self._try(summing, stage, names, about, following)
                if isinstance(found, SumLostError):
                    return
                if isinstance(found, CohortSums):
                    figures = stages.judged(number, found)
                    said = {
                        "event": "evaluated",
                        **about,
                        "figures": figures["figures"],
                        "model": digest_of(model),
                        **_report(found),
                    }
                    self._store.keep_said(self._job_id, said)
                    self._judged(figures)
                    self._say(said)
                    return
                tries += 1
                declined |= found.refused
            if tries >= _EVALUATION_TRIES or time.monotonic() > until:
                # No model waits for its figures: lenders that declined, or went away, will not come back for them.
                self._say({"event": "evaluation_skipped", **about, "lenders": list(names)})
                return
            time.sleep(min(_EVALUATION_PAUSE_S, self._plan.cohort.round_deadline_s))

    def _sum(
        self, summing: Summing, stage: Stage, about: Mapping[str, Any], *, following: Upcoming | None = None
    ) -> CohortSums | None:
        """Ask for a stage until it has a sum; None where it is used up without one.

        A lender that refuses it again and again is left out of it.

        Raises:
            QuorumError: So many lenders refuse it again and again that the quorum cannot be met.
        """
        refusals: Counter[str] = Counter()
        reasons: dict[str, str] = {}
        while True:
            bound = summing.bound_to(stage)
            if bound is None:
                names = self._gathering.quorum()
            else:
                names = self._gathering.exactly(bound, f"an earlier sum like {stage.name} was lost")
            willing = tuple(name for name in names if refusals[name] < _MOST_REFUSALS)
            if bound is not None and willing != names:
                willing = ()  # nobody else may take their place
            if len(willing) < self._plan.cohort.min_lenders:
                raise self._unwilling(stage, refusals, reasons)
            found = self._try(summing, stage, willing, about, following)
            if isinstance(found, CohortSums):
                return found
            if isinstance(found, SumLostError):
                return None
            refusals.update(found.refused)
            reasons |= found.missing
            time.sleep(WAIT_S)

    @staticmethod
    def _unwilling(stage: Stage, refusals: Counter[str], reasons: Mapping[str, str]) -> QuorumError:
        unwilling = sorted(name for name, times in refusals.items() if times >= _MOST_REFUSALS)
        why = "; ".join(f"{name}: {reasons.get(name, 'it refused')}" for name in unwilling)
        msg = (
            f"too many lenders refuse {stage.name} each time they are asked ({why}); their logs name the rule. Mend it"
            " with them, then start again"
        )
        return QuorumError(msg)

    def _try(
        self,
        summing: Summing,
        stage: Stage,
        names: Sequence[str],
        about: Mapping[str, Any],
        following: Upcoming | None,
    ) -> CohortSums | SumShortError | SumLostError:
        """Ask for a stage once; return its sum, or why there is none."""
        kind = stage.name.partition(" ")[0]
        if about:
            self._say({"event": kind, **about, "lenders": list(names)})
        started = time.monotonic()
        try:
            return summing.sum(
                stage,
                names,
                following=following,
                on_reply=lambda name: self._say({"event": "answer", **about, "lender": name}),
            )
        except (SumShortError, SumLostError) as error:
            lost = isinstance(error, SumLostError)
            self._say(
                {
                    "event": f"{kind}_lost" if lost else f"{kind}_short",
                    **about,
                    "cohort": [name for name in names if name not in error.missing],
                    "missing": error.missing,
                    "seconds": round(time.monotonic() - started, 4),
                    **({"reason": str(error)} if lost else {}),
                }
            )
            return error

    def _following(self, stages: JobStages, number: int, model: Checkpoint) -> Upcoming | None:
        """Return what is summed after a round, as far as it is known."""
        due = evaluation_rounds(self._plan)
        if number in due:
            return stages.upcoming_evaluation(due.index(number) + 1)
        return stages.upcoming_round(number + 1, model) if number < self._plan.training.rounds else None

    def _used(self, kind: str) -> int:
        """Return the highest number of this kind of stage whose masked vectors were asked for; 0 in clear."""
        found = [_NUMBERED.fullmatch(asked.stage) for asked in self._store.asked_sums(self._job_id)]
        return max((int(match[2]) for match in found if match is not None and match[1] == kind), default=0)

    def _nothing_learned(self, rounds: int) -> Checkpoint:
        mend = self._gathering.mend(
            "find out why they drop out (rounds.jsonl names them), then run `fedfin server --new-job`"
        )
        msg = f"all {rounds} rounds of job {self._job_id} were lost: too few lenders went on to the end of any; {mend}"
        raise JobOverError(msg)

    def _summing(self) -> Summing:
        deadline_s = self._plan.cohort.round_deadline_s
        if self._plan.aggregation == "plain":
            return PlainSums(
                self._exchange,
                deadline_s=deadline_s,
                refuse=self._gathering.refuse,
                wait=self._gathering.wait,
            )
        context = JobContext(
            federation=self._federation,
            job_id=self._job_id,
            plan_digest=self._plan.digest(),
            roster=self._gathering.roster.public_keys(),
            deadline_s=deadline_s,
        )
        return SecureSums(
            self._exchange,
            self._store,
            context,
            say=self._say,
            refuse=self._gathering.refuse,
            wait=self._gathering.wait,
            transcripts=self._transcripts,
        )


def _report(sums: CohortSums) -> dict[str, Any]:
    """Return what is told of a sum: who was in it and who failed, and nothing of one lender beyond that."""
    report: dict[str, Any] = {
        "cohort": list(sums.survivors),
        "missing": dict(sums.missing),
        "seconds": round(sums.seconds, 4),
    }
    if sums.transcript is not None:
        report["transcript"] = sums.transcript
    if sums.answer_bytes:
        report |= {
            "failed_after": dict(sums.failed_after),
            "exchanges": sums.exchanges,
            "answer_bytes": sums.answer_bytes,
        }
    return report


def _lost(job: Job) -> Checkpoint:
    msg = f"job {job.job_id} is completed but its checkpoint is gone; restore federation.db from its backup"
    raise FedfinError(msg)

"""What a job's loop says becomes entries of the federation's log: one place that knows both.

Nothing of one lender's size or performance is in what is said, and the events have no field for it. Entries are noted
as things are said, and written when a stage is over: before the next one's questions leave.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedfin.audit.events import (
    Candidate,
    Clock,
    Consent,
    Event,
    Exchange,
    Failure,
    Incident,
    JobEnded,
    PlanProposed,
    Policy,
    Release,
    RosterVersion,
    RoundLost,
    Service,
    bounded,
    real,
)
from fedfin.plan import JobPlan
from fedfin.server.journal import Journal
from fedfin.server.reconciling import logged_of, missing_of, result_of
from fedfin.server.roster import FederationStore, Job

__all__ = ["Recorder"]

_UNSETTLED: Final = 2  # a job that runs, and the one that it was started in the place of

_ENDS_STAGE: Final = frozenset(
    {
        "accepted",
        "bins",
        "cohort",
        "completed",
        "delivered",
        "evaluated",
        "roster_complete",
        "roster_proposed",
        "evaluation_lost",
        "bins_lost",
        "job_failed",
        "job_stopped",
        "released",
        "round_done",
        "round_lost",
    }
)


class Recorder:
    """Takes what one job's loop says; see `server.jobs.Say`."""

    def __init__(self, journal: Journal, configuration: str) -> None:
        """Log that the coordinator starts.

        Args:
            journal: The federation's log.
            configuration: SHA-256 of federation.yaml, hex.

        Raises:
            AuditError: It cannot be logged.
        """
        self._journal = journal
        self._accepted: set[str] = set()
        self._before: Sequence[Event] = ()
        self._job = ""
        self._plan = ""
        release = importlib.metadata.version("fedfin")
        journal.write(
            Service(action="started", release=release), Policy(digest=configuration), Clock(source="system")
        )

    def reconcile(self, store: FederationStore) -> None:
        """Log late what happened before the coordinator was killed and is not in the log; see `reconciling`.

        Raises:
            AuditError: The log cannot be read or written.
        """
        for job in store.jobs()[-_UNSETTLED:]:
            missing = missing_of(logged_of(self._journal.log, job.job_id), job, store.said(job.job_id))
            if missing:
                reason = f"the coordinator ended before it logged this; {len(missing)} entries follow late"
                self._journal.note(
                    Incident(kind="availability", reason=reason, job=job.job_id),
                    *missing,
                )
        self._journal.flush()

    def abandon(self, job_id: str) -> None:
        """Log that an unfinished job is given up."""
        self._journal.note(JobEnded(job=job_id, status="abandoned"))

    def begin(self, job: Job, plan: JobPlan, accepted: Mapping[str, float]) -> None:
        """Log the plan of a job, once; say whose consent is there already.

        Raises:
            AuditError: The log cannot be read or written.
        """
        self._job, self._plan, self._accepted = job.job_id, plan.digest(), set(accepted)
        self._before = logged_of(self._journal.log, job.job_id)
        if not self._before:
            private = plan.privacy.mode != "none"
            self._journal.note(
                PlanProposed(
                    job=job.job_id,
                    digest=plan.digest(),
                    model=plan.model.kind,
                    strategy=plan.training.strategy,
                    aggregation=plan.aggregation,
                    mode=plan.privacy.mode,
                    epsilon=real(plan.privacy.epsilon) if private else None,
                    delta=real(plan.privacy.delta) if private else None,
                    rounds=plan.training.rounds,
                    least_cohort=plan.cohort.min_lenders,
                )
            )
        self._journal.flush()

    def take(self, event: Mapping[str, Any]) -> None:
        """Note what was said; write it where a stage is over.

        Raises:
            AuditError: It cannot be logged: the job must not go on.
        """
        self._note(event)
        if event["event"] in _ENDS_STAGE:
            self._journal.flush()

    def _note(self, event: Mapping[str, Any]) -> None:  # noqa: PLR0912  (one case for each event)
        note, job = self._journal.note, self._job
        if (result := result_of(job, event)) is not None:
            note(result)
            return
        match event["event"]:
            case "accepted":
                self._accepted.add(event["lender"])
            case "refused" if event["lender"] in self._accepted:
                self._accepted.discard(event["lender"])
                note(
                    Consent(
                        job=job,
                        member=event["lender"],
                        plan=self._plan,
                        decision="withdrawn",
                        reason=bounded(event["reason"]),
                    )
                )
            case "exchange":
                note(
                    Exchange(
                        job=job,
                        stage=event["stage"],
                        attempt=event["attempt"] + 1,
                        step=event["step"],
                        cohort_size=event["cohort_size"],
                        context=event["context"],
                        digest=event["digest"],
                    )
                )
            case "round_lost":
                cohort, dropped = tuple(event["cohort"]), tuple(sorted(event["missing"]))
                note(
                    RoundLost(
                        job=job,
                        round=event["round"],
                        cohort=cohort,
                        dropped=dropped,
                        reason=bounded(event["reason"]),
                    )
                )
            case "bins_lost" | "evaluation_lost" | "sum_refused":
                self._failed(event)
            case "sum_liars":
                for name in event["lenders"]:
                    what = f"{name} gave shares in {event['stage']} that do not hold"
                    note(Incident(kind="security", reason=what, job=job, member=name))
            case "roster_proposed" | "roster_complete":
                note(_roster(event))
            case "released" if not self._has(
                Release
            ):  # else it was killed before the job counted as completed
                note(
                    Candidate(job=job, model=event["model"], rounds=event["rounds"]),
                    Release(job=job, model=event["model"], num_lenders=len(self._accepted)),
                )
            case "job_failed" | "job_stopped":
                note(Failure(stage="job", reason=bounded(event["reason"]), job=job))
                if event["event"] == "job_failed":
                    note(JobEnded(job=job, status="failed"))
            case "completed":
                if not self._has(JobEnded):
                    note(JobEnded(job=job, status="completed"))
                note(Service(action="stopped", release=importlib.metadata.version("fedfin")))
            case _:
                pass

    def _failed(self, event: Mapping[str, Any]) -> None:
        by = f"{event['lender']}: " if "lender" in event else ""
        number = f" {event['evaluation']}" if "evaluation" in event else ""
        stage = event.get("stage", f"{event['event'].partition('_')[0]}{number}")
        self._journal.note(Failure(stage=stage, reason=bounded(f"{by}{event['reason']}"), job=self._job))

    def _has(self, kind: type[Event]) -> bool:
        """Tell whether the log had such an entry of this job when the coordinator started."""
        return any(isinstance(event, kind) for event in self._before)


def _roster(event: Mapping[str, Any]) -> RosterVersion:
    return RosterVersion(
        action="signed" if event["event"] == "roster_complete" else "proposed",
        number=event["number"],
        digest=event["digest"],
        previous=event["previous"] or None,
        num_members=len(event["members"]),
        signed_by=tuple(event["signed_by"]),
        added=tuple(event["added"]),
        removed=tuple(event["removed"]),
        changed=tuple(event["changed"]),
    )

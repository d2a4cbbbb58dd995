"""What a job's loop says becomes entries of the federation's log: one place that knows both.

Nothing of one lender's size or performance is in what is said, and the events have no field for it. Entries are noted
as things are said, and written when a stage is over: before the next one's questions leave.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, Final

from fedfin.audit.events import (
    LEAST_COHORT,
    Candidate,
    Clock,
    Consent,
    Evaluation,
    Exchange,
    Failure,
    Incident,
    JobEnded,
    PlanProposed,
    Policy,
    Release,
    RosterVersion,
    RoundCompleted,
    RoundLost,
    Service,
    bounded,
    real,
)
from fedfin.plan import JobPlan
from fedfin.server.journal import Journal
from fedfin.server.roster import Job

__all__ = ["Recorder"]

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
        self._job = ""
        self._plan = ""
        release = importlib.metadata.version("fedfin")
        journal.write(
            Service(action="started", release=release), Policy(digest=configuration), Clock(source="system")
        )

    def abandon(self, job_id: str) -> None:
        """Log that an unfinished job is given up."""
        self._journal.note(JobEnded(job=job_id, status="abandoned"))

    def begin(self, job: Job, plan: JobPlan, accepted: Mapping[str, float]) -> None:
        """Log the plan of a job, once; say whose consent is there already.

        Raises:
            AuditError: The log cannot be read or written.
        """
        self._job, self._plan, self._accepted = job.job_id, plan.digest(), set(accepted)
        if not self._knows(job.job_id):
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
            case "bins":
                note(
                    Exchange(
                        job=job,
                        stage="bins",
                        step="released",
                        cohort_size=event["lenders"],
                        digest=event["model"],
                    )
                )
            case "round_done":
                note(_completed(job, event))
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
            case "evaluated":
                note(_evaluation(job, event))
            case "bins_lost" | "evaluation_lost" | "sum_refused":
                self._failed(event)
            case "sum_liars":
                for name in event["lenders"]:
                    what = f"{name} gave shares in {event['stage']} that do not hold"
                    note(Incident(kind="security", reason=what, job=job, member=name))
            case "roster_proposed" | "roster_complete":
                note(_roster(event))
            case "released":
                note(
                    Candidate(job=job, model=event["model"], rounds=event["rounds"]),
                    Release(job=job, model=event["model"], num_lenders=len(self._accepted)),
                )
            case "completed":
                release = importlib.metadata.version("fedfin")
                note(JobEnded(job=job, status="completed"), Service(action="stopped", release=release))
            case _:
                pass

    def _failed(self, event: Mapping[str, Any]) -> None:
        by = f"{event['lender']}: " if "lender" in event else ""
        number = f" {event['evaluation']}" if "evaluation" in event else ""
        stage = event.get("stage", f"{event['event'].partition('_')[0]}{number}")
        self._journal.note(Failure(stage=stage, reason=bounded(f"{by}{event['reason']}"), job=self._job))

    def _knows(self, job_id: str) -> bool:
        """Tell whether the plan of a job is logged; of a job that is gone on with it is near the end."""
        log = self._journal.log
        for index in reversed(range(log.size)):
            entry = log.entry(index)
            if entry is not None and isinstance(entry.event, PlanProposed):
                return entry.event.job == job_id
        return False


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


def _completed(job: str, event: Mapping[str, Any]) -> RoundCompleted:
    return RoundCompleted(
        job=job,
        round=event["round"],
        cohort=tuple(event["cohort"]),
        dropped=tuple(sorted(event["missing"])),
        seconds=real(event["seconds"]),
        model_before=event["model_before"],
        model_after=event["model"],
        transcript=event.get("transcript"),
    )


def _evaluation(job: str, event: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation's entry: figures of the cohort's sums; of a cohort of two their digest alone."""
    figures, size = event["figures"], len(event["cohort"])

    def known(name: str) -> str | None:
        return real(figures[name]["value"]) if name in figures and size >= LEAST_COHORT else None

    digest = hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()
    return Evaluation(
        job=job,
        model=event["model"],
        cohort_size=size,
        after_round=event["after"],
        auroc=known("auroc"),
        brier=known("brier"),
        calibration=known("calibration_ratio"),
        digest=digest,
    )

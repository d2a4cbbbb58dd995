"""What a job's state says and the log does not: a coordinator was killed after it kept the one and before the other.

The event that tells of a bins stage, a round or an evaluation is kept in federation.db with its result, in one
transaction, and logged before the next question leaves. So at most the last one of a job is missing at the next start,
and that is known word for word. The end of a job follows from its status.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedfin.audit.events import (
    LEAST_COHORT,
    Evaluation,
    Event,
    Exchange,
    Failure,
    JobEnded,
    PlanProposed,
    RoundCompleted,
    bounded,
    real,
)
from fedfin.audit.reading import LogReader
from fedfin.server.roster import Job

__all__ = ["logged_of", "missing_of", "result_of"]


def logged_of(log: LogReader, job_id: str) -> tuple[Event, ...]:
    """Return the entries of a job from its plan on, newest first; none where its plan is not logged.

    A job that is gone on with is near the end of the log: only of a new job all of it is read.

    Raises:
        AuditError: The log cannot be read.
    """
    found: list[Event] = []
    for index in reversed(range(log.size)):
        entry = log.entry(index)
        if entry is None or getattr(entry.event, "job", None) != job_id:
            continue
        found.append(entry.event)
        if isinstance(entry.event, PlanProposed):
            return tuple(found)
    return ()


def missing_of(logged: Sequence[Event], job: Job, said: Mapping[str, Any] | None) -> tuple[Event, ...]:
    """Return the entries that a job lacks, in their order.

    Args:
        logged: Its entries; of a job without any nobody was asked for anything, and nothing is missing.
        job: Its state.
        said: The event that was kept with its last result, or None.
    """
    if not logged:
        return ()
    missing: list[Event] = []
    result = None if said is None else result_of(job.job_id, said)
    if result is not None and result not in logged:
        missing.append(result)
    if job.status != "running" and not any(isinstance(event, JobEnded) for event in logged):
        if job.status == "failed":
            missing.append(Failure(stage="job", reason=bounded(job.reason), job=job.job_id))
        missing.append(JobEnded(job=job.job_id, status=job.status))
    return tuple(missing)


def result_of(job: str, event: Mapping[str, Any]) -> Event | None:
    """Return the entry of what a stage gave, from what is said of it; None where it is of something else."""
    match event["event"]:
        case "bins":
            size, digest = event["lenders"], event["model"]
            return Exchange(job=job, stage="bins", step="released", cohort_size=size, digest=digest)
        case "round_done":
            return _completed(job, event)
        case "evaluated":
            return _evaluation(job, event)
        case _:
            return None


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

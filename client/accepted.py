"""A job as this lender accepted it, read back from its folder for every question."""

import json
from dataclasses import dataclass, field
from typing import Any

from fedfin.client.folder import JobFolder, LenderFolder
from fedfin.errors import ConfigError, LinkError, PolicyRefusalError
from fedfin.plan import JobPlan
from fedfin.roster import Roster
from fedfin.roster_chain import RosterChain

__all__ = ["AcceptedJob", "require_accepted"]


@dataclass(frozen=True, slots=True)
class AcceptedJob:
    """What was agreed to at the proposal.

    Attributes:
        job_id: The job's id.
        plan: Its plan.
        roster: The members it was accepted with; None for plain aggregation.
        snapshot: Digest of the loans that its budget is reserved for.
        counted: Digest of the held-out loans that its evaluations count; empty where this lender takes no part in them.
        folder: Where what leaves is kept.
    """

    job_id: str
    plan: JobPlan
    roster: Roster | None
    snapshot: str
    counted: str
    folder: JobFolder = field(repr=False)

    @property
    def is_private(self) -> bool:
        """Whether what leaves is charged."""
        return self.plan.privacy.mode != "none"

    @property
    def num_members(self) -> int:
        """Members of the roster; 0 for plain aggregation."""
        return 0 if self.roster is None else len(self.roster.keys)


def require_accepted(folder: LenderFolder, job_id: str, snapshot: str | None) -> AcceptedJob:
    """Return a job that this lender accepted.

    Args:
        folder: The lender's.
        job_id: The job.
        snapshot: Digest of the present loans: the job must be open and theirs. None takes a job that is over too.

    Raises:
        PolicyRefusalError: The job was not accepted, is over, or was accepted for other loans.
        ConfigError: What was kept of it is damaged.
    """
    job = folder.job(job_id)
    accepted = job.accepted()
    if accepted is None:
        msg = f"this lender did not accept job {job_id}; propose it first"
        raise PolicyRefusalError(msg)
    if snapshot is not None and job.is_over():
        msg = f"job {job_id} is over at this lender; start a new job"
        raise PolicyRefusalError(msg)
    if snapshot is not None and accepted["snapshot"] != snapshot:
        msg = (
            f"the loans changed since job {job_id} was accepted, and its budget is reserved for the earlier ones;"
            " restore the table and restart, or wait for the next job"
        )
        raise PolicyRefusalError(msg)
    return AcceptedJob(
        job_id=job_id,
        plan=JobPlan.model_validate_json(accepted["plan"]),
        roster=_roster_of(job, accepted),
        snapshot=accepted["snapshot"],
        counted=accepted.get("counted", ""),
        folder=job,
    )


def _roster_of(job: JobFolder, accepted: dict[str, Any]) -> Roster | None:
    text = accepted.get("roster", "")
    # in clear nothing rests on the roster
    secure = json.loads(accepted["plan"])["aggregation"] == "secure"
    try:
        return RosterChain.from_json(text).last.roster() if secure else None
    except LinkError as error:
        msg = f"{job.path / 'job.json'} is damaged ({error}); restore it from the backup"
        raise ConfigError(msg) from error

"""`fedfin server status`: how far each job is, how it ended, who refused and who waits; read from federation.db alone.

No process is asked, so a job that was stopped by hand is shown as it stood.
"""

import json
from typing import Any

from fedfin.server.roster import FederationStore, Job

__all__ = ["status_of"]


def status_of(store: FederationStore) -> dict[str, Any]:
    """Return a document with every job, oldest first.

    Of a job: `state` is `waiting` (its lenders were not together yet), `running`, `finished`, `failed` or `abandoned`
    (another one was started in its place); `reason` says why it failed, and `goes_on` whether it is taken up again when
    the coordinator is started. `refused` has each lender's reason as it was told to the coordinator.

    Raises:
        LinkError: The database cannot be read.
    """
    return {"jobs": [_status_of(store, job) for job in store.jobs()]}


def _status_of(store: FederationStore, job: Job) -> dict[str, Any]:
    checkpoint = store.checkpoint(job.job_id)
    return {
        "job": job.job_id,
        "state": _state_of(job),
        "reason": job.reason,
        "goes_on": job.status == "running",
        "round": checkpoint.round if checkpoint else None,
        "of": json.loads(job.plan)["training"]["rounds"],
        "lenders": sorted(store.weights(job.job_id)),
        "refused": store.refusals(job.job_id),
        "undelivered": list(store.undelivered(job.job_id)) if job.status != "running" else [],
        "created": job.created_at,
    }


def _state_of(job: Job) -> str:
    if job.status == "running":
        if job.reason:
            return "failed"
        return "running" if job.began_at else "waiting"
    return "finished" if job.status == "completed" else job.status

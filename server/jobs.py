"""Which job a coordinator runs, and how it says for whom it waits."""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from fedfin.errors import ConfigError
from fedfin.plan import JobPlan
from fedfin.server.roster import FederationStore, Job
from fedfin.strategies.registry import check_strategy

__all__ = ["SILENT_S", "Say", "Waiting", "check_runnable", "choose_job"]

SILENT_S: Final = 30.0
"""Who failed to answer a proposal gets it again after this long."""

_SAY_AGAIN_S: Final = 60.0

Say = Callable[[Mapping[str, Any]], None]
"""Reports an event to people: a mapping with `event` and what belongs to it; no metric of one lender."""


def check_runnable(plan: JobPlan) -> None:
    """Refuse a plan that no federation of this release may run.

    Raises:
        ConfigError: Its strategy needs single updates, and aggregation is secure.
    """
    check_strategy(plan)


def choose_job(store: FederationStore, plan: JobPlan, *, new_job: bool, say: Say) -> Job:
    """Return the job to run: the unfinished one of this plan, or a new one.

    A job of this plan that failed after lenders were charged for it is returned too: it is not made again unless a new
    job is asked for, and who was away is told that it is over.

    Raises:
        ConfigError: An unfinished job has another plan, or this plan was trained already; both need
            `--new-job`, since a repeated job spends the lenders' budgets again. Or the plan cannot be run at all.
    """
    check_runnable(plan)
    jobs = store.jobs()
    running = next((job for job in jobs if job.status == "running"), None)
    if running is not None and running.digest != plan.digest() and not store.weights(running.job_id):
        new_job = True  # nobody took part in it: another plan costs nobody anything
    if running is not None and not new_job:
        if running.digest != plan.digest():
            msg = (
                f"job {running.job_id} is unfinished and federation.yaml now states another plan; restore the plan to"
                " go on with it, or run `fedfin server --new-job` to abandon it and start this one"
            )
            raise ConfigError(msg)
        say({"event": "resumed", "job": running.job_id})
        return running
    if running is not None:
        store.end_job(running.job_id, "abandoned")
        say({"event": "abandoned", "job": running.job_id})
    last = jobs[-1] if jobs else None
    has_failed = last is not None and last.status == "failed" and last.began_at is not None
    if last is not None and has_failed and last.digest == plan.digest() and not new_job:
        return last
    done = next(
        (job for job in reversed(jobs) if job.status == "completed" and job.digest == plan.digest()), None
    )
    if done is not None and not new_job:
        if store.undelivered(done.job_id):
            return done
        msg = (
            f"this plan was trained already, as job {done.job_id}; its model is in runs/{done.job_id}/model. To train"
            " it again, which spends the lenders' budgets again, run `fedfin server --new-job`"
        )
        raise ConfigError(msg)
    job_id = f"{plan.name}-{secrets.token_hex(4)}"
    store.start_job(job_id, plan.model_dump_json(), plan.digest())
    say({"event": "started", "job": job_id})
    return next(job for job in store.jobs() if job.job_id == job_id)


class Waiting:
    """Says for whom the coordinator waits: when that changes, and once a minute; one for all waits of a job."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._last = ""
        self._at = 0.0

    def report(
        self,
        here: set[str],
        away: set[str],
        wanted: int,
        invited: Sequence[str] = (),
        approvals: Sequence[str] = (),
    ) -> None:
        """Say who is online, who is away, how many are wanted and whose approval of the roster is waited for.

        Nothing is said that was said less than a minute ago.
        """
        text = json.dumps([sorted(here), sorted(away), wanted, list(invited), list(approvals)])
        if text != self._last or time.monotonic() - self._at > _SAY_AGAIN_S:
            self._say(
                {
                    "event": "waiting",
                    "online": sorted(here),
                    "for": sorted(away),
                    "invited": list(invited),
                    "wanted": wanted,
                    "approvals": list(approvals),
                }
            )
            self._last, self._at = text, time.monotonic()

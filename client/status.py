"""`fedfin client status`: what this lender did, spent and got; read from its own folder, nothing is sent."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fedfin.audit.events import Budget, JobEnded
from fedfin.audit.reading import open_log
from fedfin.client.budgeting import budget_to_json
from fedfin.client.evaluation import EVALUATION_FILE
from fedfin.client.folder import LenderFolder
from fedfin.client.job_approval import approvers_of, held_jobs
from fedfin.client.pinning import pending, pinned
from fedfin.client.spending import is_held_out
from fedfin.client.witnessing import last_cosigned, open_forks
from fedfin.config import LenderPolicy
from fedfin.errors import BudgetSpentError, ConfigError
from fedfin.identity import fingerprint_of
from fedfin.privacy.accounting import borrower_epsilons
from fedfin.privacy.evaluation_noise import evaluation_job
from fedfin.privacy.ledger import Ledger, Spent

__all__ = ["release_job", "status_of"]


def status_of(config_path: Path) -> dict[str, Any]:
    """Return a document with the lender's budget per snapshot, its models and its roster.

    Where a key of the policy or of the held-out loans is wrong, all is shown but what depends on the limit, which is
    None then, and `config_error` names the key. What was spent is stated at the default delta.

    Raises:
        ConfigError: Another section of bank.yaml does not hold, or a kept file is damaged.
        LedgerError: The ledger cannot be read.
    """
    folder, fault = _opened(config_path)
    policy = folder.config.policy
    delta = policy.max_delta
    snapshots: list[dict[str, Any]] = []
    if folder.has_ledger():  # looking makes nothing
        with folder.ledger() as ledger:
            for snapshot in ledger.snapshots():
                spent, held = ledger.spent(snapshot, delta), ledger.held(snapshot, delta)
                snapshots.append(
                    {
                        "snapshot": snapshot,
                        "held_out": is_held_out(ledger, snapshot),
                        "delta": delta,
                        "relation": "add_or_remove_one",
                        "epsilon_rdp": spent.epsilon_rdp,
                        "epsilon_pld": spent.epsilon_pld,
                        "reserved_rdp": ledger.reserved(snapshot, delta).epsilon_rdp,
                        "together_rdp": held.epsilon_rdp,
                        "together_pld": held.epsilon_pld,
                        "borrower_pld": borrower_epsilons(spent.events, delta),
                        "filter": None if fault else _filter_of(ledger, snapshot, spent, policy),
                    }
                )
    models: list[dict[str, Any]] = []
    for path in sorted(folder.models_path.glob("*/model.json")):
        evaluation = path.parent / EVALUATION_FILE
        models.append(
            {"model": path.parent.name, **(json.loads(evaluation.read_text()) if evaluation.exists() else {})}
        )
    jobs: list[dict[str, Any]] = []
    for accepted in folder.accepted_jobs():
        plan = json.loads(accepted["plan"])
        jobs.append(
            {
                "job": accepted["job"],
                "mode": plan["privacy"]["mode"],
                "open": not folder.job(accepted["job"]).is_over(),
            }
        )
    return {
        "config_error": fault,
        "jobs": jobs,
        "held": _held(folder),
        "name": folder.config.name,
        "federation": folder.config.federation,
        "coordinator": folder.config.coordinator,
        "epsilon_limit": None if fault else policy.epsilon_limit,
        "snapshots": snapshots,
        "models": models,
        "trust": _trust_of(folder),
        "roster": _roster_of(folder),
        "log": _log_of(folder),
    }


def _held(folder: LenderFolder) -> list[dict[str, Any]]:
    """Return the jobs that wait for approval."""
    return [
        {
            "job": job.job,
            "plan": job.plan.digest(),
            "since": job.since,
            "given": len(approvers_of(folder, job.job, job.plan.digest(), job.schema)),
            "needed": folder.config.policy.approvals_needed,
        }
        for job in held_jobs(folder)
    ]


def _log_of(folder: LenderFolder) -> dict[str, Any]:
    """Return the size of this lender's log, what it cosigned last of the coordinator's, and forks that wait."""
    entries, cosigned = 0, None
    if folder.journal.path.exists():
        with open_log(folder.journal.path) as log:
            entries, cosigned = log.size, last_cosigned(log)
    return {
        "entries": entries,
        "cosigned": cosigned,
        "forks": [str(path) for path in open_forks(folder)],
    }


def _opened(config_path: Path) -> tuple[LenderFolder, str]:
    """Return the folder, and what is wrong with bank.yaml that a look can do without; empty where nothing is."""
    try:
        return LenderFolder(config_path), ""
    except ConfigError as error:
        with contextlib.suppress(ConfigError):
            return LenderFolder(config_path, without=("policy", "holdout")), str(error)
        raise


def _trust_of(folder: LenderFolder) -> dict[str, str | None]:
    """Return the fingerprints that `fedfin audit verify --trust` takes, None where the folder is without the file."""
    statement = folder.coordinator()
    return {
        "root": fingerprint_of(folder.root()) if folder.root_path.exists() else None,
        "coordinator": None if statement is None else statement.fingerprint,
    }


def _roster_of(folder: LenderFolder) -> dict[str, Any]:
    """Return the pinned roster and the one that waits for approval, each None where there is none."""
    own, change = pinned(folder), pending(folder)
    members = {} if own is None else {name: row.fingerprint for name, row in own.members.items()}
    return {
        "pinned": None if own is None else {"number": own.number, "digest": own.digest(), "members": members},
        "pending": None if change is None else change.to_json(),
    }


def _filter_of(ledger: Ledger, snapshot: str, spent: Spent, policy: LenderPolicy) -> dict[str, Any] | None:
    """Return how the limit stands for a snapshot's loans; None where it admits nothing at any order."""
    try:
        budget = ledger.budget(snapshot, epsilon_limit=policy.epsilon_limit, max_delta=policy.max_delta)
    except BudgetSpentError:
        return None
    nothing = None if budget.capacity > 0.0 else budget.why_nothing(spent.epsilon_rdp, spent.epsilon_pld)
    return {**budget_to_json(budget), "why_nothing": nothing}


def release_job(config_path: Path, job_id: str) -> None:
    """Free what is reserved for a job whose coordinator will not come back; the job cannot go on here after that.

    What was spent stays spent.

    Raises:
        ConfigError: This lender did not accept the job, or it is served at this moment.
        LedgerError: The ledger cannot record.
    """
    folder = LenderFolder(config_path)
    job = folder.job(job_id)
    accepted = job.accepted()
    if accepted is None:
        msg = f"this lender accepted no job {job_id}; `fedfin client status` lists its jobs"
        raise ConfigError(msg)
    with folder.lock():
        with folder.ledger() as ledger:
            ledger.release(job_id)
            ledger.release(evaluation_job(job_id))
        folder.journal.write(
            Budget(action="release", job=job_id, snapshot=accepted["snapshot"], by_hand=True),
            JobEnded(job=job_id, status="released by hand"),
        )
        job.close()
        folder.journal.close()

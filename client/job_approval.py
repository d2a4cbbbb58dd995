"""A new job that waits for people: kept as it was proposed, shown, signed by approvers, counted.

`jobs/ID/proposed.json` is the newest proposal that passed every other rule; nothing is reserved for it, and no loan was
looked at. `jobs/ID/approvals/` holds one signature of each approver (`fedfin.approver`). Signatures are checked against
the keys in bank.yaml whenever they are counted: one that does not hold, or is of another plan, counts for nothing.
"""

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.approver import Subject, public_key_of, public_line, sign, verifies
from fedfin.audit.events import Approval
from fedfin.client.folder import JobFolder, LenderFolder
from fedfin.errors import ConfigError, NotYetError
from fedfin.files import write_public
from fedfin.identity import key_fingerprint
from fedfin.lender_policy import Approver
from fedfin.plan import JobPlan
from fedfin.update import Propose

__all__ = [
    "HeldJob",
    "approve",
    "approvers_of",
    "drop_held",
    "held_job",
    "held_jobs",
    "require_approved",
    "require_approver",
]

_MOST_HELD: Final = 20  # a coordinator that proposes without end fills no disk


@dataclass(frozen=True, slots=True)
class HeldJob:
    """A job that waits for its approval.

    Attributes:
        job: Its id.
        plan: Its plan.
        schema: Fingerprint of the schema that it was proposed for.
        num_members: Members of its roster; 0 for plain aggregation.
        since: When this plan was first proposed under this id, UTC.
    """

    job: str
    plan: JobPlan
    schema: str
    num_members: int
    since: str


def require_approved(
    folder: LenderFolder, question: Propose, plan: JobPlan, num_members: int
) -> tuple[str, ...]:
    """Let a proposal pass once enough approvers have signed it, and keep it waiting until then.

    Args:
        folder: The lender's.
        question: The proposal, which passed every other rule.
        plan: Its plan.
        num_members: Members of its roster; 0 for plain aggregation.

    Returns:
        Fingerprints of the approvers' keys; empty where the policy needs none.

    Raises:
        NotYetError: Approvals are lacking (waits for `approval`); the proposal is kept.
        ConfigError: It cannot be kept.
    """
    needed = folder.config.policy.approvals_needed
    if needed == 0:
        return ()
    found = approvers_of(folder, question.job_id, plan.digest(), question.schema_fingerprint)
    if len(found) >= needed:
        return tuple(key_fingerprint(public_key_of(approver.key)) for approver in found)
    _keep(folder, question, plan, num_members)
    msg = f"job {question.job_id} waits for its approval at this lender (`fedfin client approve-job`)"
    raise NotYetError("approval", msg)


def approvers_of(folder: LenderFolder, job_id: str, plan_digest: str, schema: str) -> tuple[Approver, ...]:
    """Return who of the policy's approvers has signed this very job, plan and schema."""
    subject = _subject(folder, job_id, plan_digest, schema)
    return tuple(
        approver
        for approver in folder.config.policy.approvers
        if (signature := _signature(folder.job(job_id), approver)) is not None
        and verifies(signature, subject, public_key_of(approver.key))
    )


def held_jobs(folder: LenderFolder) -> tuple[HeldJob, ...]:
    """Return the jobs that wait for approval, by their ids in order.

    Raises:
        ConfigError: A kept proposal is damaged.
    """
    found = [path.parent for path in sorted(folder.jobs_path.glob("*/proposed.json"))]
    return tuple(_read(path / "proposed.json") for path in found if not (path / "job.json").exists())


def held_job(folder: LenderFolder, job_id: str) -> HeldJob:
    """Return a job that waits for approval.

    Raises:
        ConfigError: None of this id does, or its kept proposal is damaged.
    """
    held = {job.job: job for job in held_jobs(folder)}
    if job_id not in held:
        listed = f"waiting are {', '.join(held)}" if held else "none is"
        msg = (
            f"no job {job_id} waits for approval at {folder.config.name} ({listed}); a job is approved after it was"
            " proposed and before it is accepted: `fedfin client status` lists both"
        )
        raise ConfigError(msg)
    return held[job_id]


def drop_held(folder: LenderFolder, job_id: str) -> None:
    """Forget a kept proposal, of a job that was accepted or is over; its approvals stay."""
    _proposed(folder, job_id).unlink(missing_ok=True)


def approve(folder: LenderFolder, job: HeldJob, name: str, key: Ed25519PrivateKey) -> int:
    """Sign a job in an approver's name: the very plan that they were shown.

    A second signature of the same approver replaces their first.

    Args:
        folder: The lender's.
        job: What was shown.
        name: The approver, as bank.yaml names them.
        key: Their key.

    Returns:
        How many different approvers have signed this plan now.

    Raises:
        ConfigError: bank.yaml names no such approver or another key, or nothing can be written.
    """
    approver = require_approver(folder, name, key)
    digest = job.plan.digest()
    signature = sign(_subject(folder, job.job, digest, job.schema), key)
    path = _signature_path(folder.job(job.job), approver)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.journal.write(
        Approval(subject="job", job=job.job, digest=digest, approver=key_fingerprint(key.public_key()))
    )
    body = {"plan": digest, "schema": job.schema, "signature": signature.hex()}
    write_public(path, (json.dumps(body, indent=1) + "\n").encode(), mode=0o600)
    return len(approvers_of(folder, job.job, digest, job.schema))


def require_approver(folder: LenderFolder, name: str, key: Ed25519PrivateKey) -> Approver:
    """Return the approver of a name whose key this is.

    Raises:
        ConfigError: bank.yaml names no such approver, or another key for them.
    """
    approver = next((one for one in folder.config.policy.approvers if one.name == name), None)
    if approver is None:
        known = ", ".join(one.name for one in folder.config.policy.approvers) or "nobody"
        msg = f"{name} is no approver: policy.approvers of {folder.config_path} names {known}"
        raise ConfigError(msg)
    if public_line(key.public_key()) != approver.key:
        msg = (
            f"the key given is not the one that policy.approvers of {folder.config_path} states for {name}; give"
            " their own key with --key"
        )
        raise ConfigError(msg)
    return approver


def _subject(folder: LenderFolder, job_id: str, plan_digest: str, schema: str) -> Subject:
    return Subject(folder.config.federation, folder.config.name, job_id, plan_digest, schema)


def _signature(job: JobFolder, approver: Approver) -> bytes | None:
    """Return the signature that is kept in an approver's name; None where there is none that can be read."""
    try:
        body = json.loads(_signature_path(job, approver).read_text(encoding="utf-8"))
        return bytes.fromhex(body["signature"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # counts for nothing; signing again replaces it


def _signature_path(job: JobFolder, approver: Approver) -> Path:
    # by the key and not the name: a name that passes to another person passes on no signature
    return job.path / "approvals" / f"{key_fingerprint(public_key_of(approver.key))[:32]}.json"


def _proposed(folder: LenderFolder, job_id: str) -> Path:
    return folder.job(job_id).path / "proposed.json"


def _keep(folder: LenderFolder, question: Propose, plan: JobPlan, num_members: int) -> None:
    path = _proposed(folder, question.job_id)
    since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        before = _read(path)
    except ConfigError:
        before = None  # not there, or damaged: this proposal takes its place
    if before is not None and before.plan == plan:
        since = before.since
    body = {
        "job": question.job_id,
        "plan": question.plan,
        "schema": question.schema_fingerprint,
        "members": num_members,
        "since": since,
    }
    text = json.dumps(body, indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_public(path, text.encode(), mode=0o600)
    held = sorted(folder.jobs_path.glob("*/proposed.json"), key=lambda found: found.stat().st_mtime_ns)
    for old in held[:-_MOST_HELD]:
        old.unlink()


def _read(path: Path) -> HeldJob:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        plan = JobPlan.model_validate_json(body["plan"])
        return HeldJob(str(body["job"]), plan, str(body["schema"]), int(body["members"]), str(body["since"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} is damaged; remove it: the coordinator proposes the job again by itself"
        raise ConfigError(msg) from error

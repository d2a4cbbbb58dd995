"""A finished run as its directory holds it, read once into types: what the evidence pack tells of.

Sums and names of institutions only: the directory is the coordinator's, and holds nothing of one lender's figures.
Events that this release does not know are passed over; a file that does not parse is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedfin.errors import AuditError
from fedfin.plan import JobPlan

__all__ = ["ModelFile", "Round", "RunRecord", "read_run"]


@dataclass(frozen=True, slots=True)
class Round:
    """A round as it ended.

    Attributes:
        number: From 1.
        attempt: From 1; a round that was lost is tried again.
        cohort: Who is in the sum; of a lost round, who was asked or answered.
        missing: Who was not, with the reason.
        seconds: Of the whole round.
        reason: Why it was lost; None where it gave a model.
    """

    number: int
    attempt: int
    cohort: tuple[str, ...]
    missing: Mapping[str, str]
    seconds: float
    reason: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether nothing of it was published."""
        return self.reason is not None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The released model.

    Attributes:
        digest: Of the model, as the log and the lenders name it.
        fingerprint: Of schema, bins and architecture.
        schema: The federation's columns, YAML.
        weights: SHA-256 of model.safetensors.
        num_bytes: Of model.safetensors.
    """

    digest: str
    fingerprint: str
    schema: str
    weights: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that a run directory says, but for the log.

    Attributes:
        path: The directory.
        created: ISO 8601.
        completed: ISO 8601; None where the run did not end.
        schema_fingerprint: Of the columns.
        root_fingerprint: Of the federation's root certificate.
        versions: Of the software at the coordinator.
        accepted: Lenders that took part in the job.
        refused: Lenders that did not, with the reason.
        rounds: In their order, lost ones too.
        evaluations: As metrics.json holds them: sums over the lenders.
        not_delivered: Lenders that did not confirm the model at the end.
        model: None where none was released.
    """

    path: Path
    job: str
    federation: str
    created: str
    completed: str | None
    plan: JobPlan
    plan_digest: str
    schema_fingerprint: str
    root_fingerprint: str
    versions: Mapping[str, str]
    accepted: tuple[str, ...]
    refused: Mapping[str, str]
    rounds: tuple[Round, ...]
    evaluations: tuple[Mapping[str, Any], ...]
    not_delivered: tuple[str, ...]
    model: ModelFile | None

    @property
    def completed_rounds(self) -> tuple[Round, ...]:
        """Those that gave a model."""
        return tuple(found for found in self.rounds if not found.is_lost)


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        AuditError: It is none, or a file of it is missing, does not parse, or contradicts another.
    """
    run = _json(path / "run.json")
    try:
        plan = JobPlan.model_validate(run["plan"])
        events = [json.loads(line) for line in _text(path / "rounds.jsonl").splitlines()]
        record = RunRecord(
            path=path,
            job=str(run["job"]),
            federation=str(run["federation"]),
            created=str(run["created"]),
            completed=run.get("completed"),
            plan=plan,
            plan_digest=str(run["plan_digest"]),
            schema_fingerprint=str(run["schema_fingerprint"]),
            root_fingerprint=str(run["root_fingerprint"]),
            versions={str(name): str(version) for name, version in run["versions"].items()},
            accepted=_accepted(events),
            refused={
                str(event["lender"]): str(event["reason"]) for event in events if event["event"] == "refused"
            },
            rounds=_rounds(events),
            evaluations=_evaluations(path / "metrics.json"),
            not_delivered=_not_delivered(events),
            model=_model(path / "model", run.get("model")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        where = "run.json, rounds.jsonl or metrics.json"
        msg = f"{path}: {where} does not parse ({type(error).__name__}); restore the run directory from its backup"
        raise AuditError(msg) from error
    if plan.digest() != record.plan_digest:
        msg = (
            f"{path / 'run.json'}: the plan's digest is {plan.digest()}, and the file says {record.plan_digest}: the"
            " plan was changed after the run; restore the directory from its backup"
        )
        raise AuditError(msg)
    return record


def _accepted(events: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted({str(event["lender"]) for event in events if event["event"] == "accepted"}))


def _rounds(events: list[dict[str, Any]]) -> tuple[Round, ...]:
    attempts: dict[int, int] = {}
    found: list[Round] = []
    for event in events:
        if event["event"] not in {"round_done", "round_short", "round_lost"}:
            continue
        number = int(event["round"])
        attempts[number] = attempts.get(number, 0) + 1
        done = event["event"] == "round_done"
        missing = event.get("missing") or {}
        found.append(
            Round(
                number=number,
                attempt=attempts[number],
                cohort=tuple(event.get("cohort") or ()),
                missing=(
                    {str(name): str(why) for name, why in missing.items()}
                    if isinstance(missing, dict)
                    else {str(name): "" for name in missing}
                ),
                seconds=float(event.get("seconds", 0.0)),
                reason=None if done else str(event.get("reason", "too few lenders answered")),
            )
        )
    return tuple(found)


def _evaluations(path: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(_json(path)["evaluations"]) if path.exists() else ()


def _not_delivered(events: list[dict[str, Any]]) -> tuple[str, ...]:
    last = next((event for event in reversed(events) if event["event"] == "delivered"), None)
    return () if last is None else tuple(sorted({*last["missing"], *last.get("not_kept", {})}))


def _model(folder: Path, digest: str | None) -> ModelFile | None:
    if digest is None:
        return None
    found = _json(folder / "model.json")
    if found["digest"] != digest:
        msg = (
            f"{folder / 'model.json'} is of the model {found['digest']}, and run.json names {digest}; restore the run"
            " directory from its backup"
        )
        raise AuditError(msg)
    weights = folder / "model.safetensors"
    try:
        content = weights.read_bytes()
    except OSError as error:
        msg = f"{weights} cannot be read ({error.strerror}); restore the run directory from its backup"
        raise AuditError(msg) from error
    return ModelFile(
        digest=digest,
        fingerprint=str(found["fingerprint"]),
        schema=str(found["schema"]),
        weights=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        msg = f"{path} is no JSON; restore the run directory from its backup"
        raise AuditError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} is no JSON object; restore the run directory from its backup"
        raise AuditError(msg)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read ({error}); name the directory of a run, such as runs/credit-1a2b3c4d"
        raise AuditError(msg) from error

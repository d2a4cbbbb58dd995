"""Holds what a run's files say against what the federation's log says, and the lenders' signatures in the log.

The files of a run tell a reader what happened; only the log is signed entry by entry and cosigned. So each figure that
stands in both must be the same, the models of the rounds must follow one on the other, and who consented must have
signed with an identity key of the roster.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.consents import Answer, verify_answer
from fedfin.audit.events import Candidate, Consent, Event, PlanProposed, Receipt, Release, RoundCompleted
from fedfin.audit.findings import FoundError
from fedfin.audit.membership import Membership
from fedfin.audit.reading import open_log
from fedfin.audit.run_record import RunRecord
from fedfin.audit.verifying import Check
from fedfin.errors import AuditError

__all__ = ["check_run"]


_DISAGREE: Final = "a file of the run was changed after the run: rely on none of it, and ask for it again"
_EXCHANGED: Final = "the coordinator exchanged the model between two rounds: ask it why, and rely on neither"
_UNSEEN: Final = (
    "the coordinator alone vouches for them: believe none of them, and ask for the run again when a later job has had"
    " the log cosigned"
)
_INVENTED: Final = "a lender was invented, or its answer: ask that lender"


@dataclass(slots=True)
class _Told:
    """What the log says of one job."""

    plan: str = ""
    rounds: dict[int, RoundCompleted] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict[int, int])  # of the rounds' entries in the log
    consented: set[str] = field(default_factory=set)
    num_answers: int = 0


def check_run(record: RunRecord, path: Path, membership: Membership | None) -> list[Check]:
    """Check a run's files against its log, which has been verified.

    Args:
        record: Of the files.
        path: The log.
        membership: Whose signatures stand under the lenders' answers; None where there is no roster.

    Raises:
        FoundError: They disagree, or an answer is not signed by the lender that it is of.
    """
    told = _Told()
    with open_log(path) as log:
        origin = log.origin
        final = None if membership is None else log.final_checkpoint(membership.quorum)
        for index, entry in log.entries():
            if entry is not None:
                _take(entry.event, index, record, told)
                _check_answer(entry.event, index, record, membership, origin, told)
    if not told.plan:
        what = f"the log names no plan of the job {record.job}"
        raise FoundError(None, what, "it is the log of another run: ask for the right one")
    if told.plan != record.plan_digest:
        what = f"run.json states the plan {record.plan_digest[:16]}, and the log {told.plan[:16]}"
        raise FoundError(None, what, _DISAGREE)
    _check_rounds(record, membership, told)
    if membership is not None and record.plan.aggregation == "secure":
        _check_covered(told, 0 if final is None else parse_checkpoint(final).size)
    checked = [Check("run", f"plan, {len(told.rounds)} rounds and model are those that the log names")]
    if told.num_answers:
        checked.append(
            Check(
                "answers",
                f"{told.num_answers} consents and receipts are signed by the lenders that gave them",
            )
        )
    return checked


def _take(event: Event, index: int, record: RunRecord, told: _Told) -> None:
    match event:
        case PlanProposed(job=job, digest=digest) if job == record.job:
            told.plan = digest
        case RoundCompleted(job=job, round=number) as done if job == record.job:
            before = told.rounds.get(number - 1)
            if before is not None and before.model_after != done.model_before:
                what = f"round {number} did not begin with the model that round {number - 1} ended with"
                raise FoundError(index, what, _EXCHANGED)
            told.rounds[number], told.places[number] = done, index
        case Candidate(job=job, model=model) | Release(job=job, model=model) if job == record.job:
            _check_model(record, model, index)
        case Receipt(job=job, model=str(model)) if job == record.job:
            _check_model(record, model, index)
        case _:
            pass


def _check_model(record: RunRecord, model: str, index: int) -> None:
    if record.model is not None and model != record.model.digest:
        what = f"run.json names the model {record.model.digest[:16]}, and the log {model[:16]}"
        raise FoundError(index, what, _DISAGREE)


def _check_answer(
    event: Event, index: int, record: RunRecord, membership: Membership | None, origin: str, told: _Told
) -> None:
    """Check that an answer is signed by the member that it is of; what the coordinator says itself is not signed."""
    if membership is None or not isinstance(event, Consent | Receipt):
        return
    if isinstance(event, Consent) and event.decision not in {"accepted", "refused"}:
        return
    keys = membership.identities.get(event.member)
    if keys is None:
        # a log holds other jobs and refusals of those who were no members; only who takes part must be one
        if event.job == record.job and not _is_refusal(event) and record.plan.aggregation == "secure":
            what = f"{event.member} answered job {event.job}, and is in no version of the roster"
            raise FoundError(index, what, _INVENTED)
        return
    if not any(_holds(event, key, origin) for key in keys):
        what = f"the {event.type} of {event.member} to job {event.job} is not signed by its identity key"
        raise FoundError(index, what, _INVENTED)
    told.num_answers += 1
    if event.job == record.job and isinstance(event, Consent) and event.decision == "accepted":
        if event.plan != record.plan_digest:
            what = f"{event.member} accepted the plan {event.plan[:16]}, and run.json states {record.plan_digest[:16]}"
            raise FoundError(index, what, _DISAGREE)
        told.consented.add(event.member)


def _is_refusal(event: Answer) -> bool:
    return isinstance(event, Consent) and event.decision == "refused"


def _holds(event: Answer, key: Ed25519PublicKey, origin: str) -> bool:
    try:
        verify_answer(event, key, origin)
    except AuditError:
        return False
    return True


def _check_rounds(record: RunRecord, membership: Membership | None, told: _Told) -> None:
    stated = {one.number: one for one in record.completed_rounds}
    for number in sorted(stated.keys() ^ told.rounds.keys()):
        has, lacks = ("rounds.jsonl", "the log") if number in stated else ("the log", "rounds.jsonl")
        raise FoundError(None, f"{has} has round {number}, which {lacks} has not", _DISAGREE)
    for number, done in sorted(told.rounds.items()):
        one = stated[number]
        if (sorted(one.cohort), sorted(one.missing)) != (sorted(done.cohort), sorted(done.dropped)):
            what = f"rounds.jsonl and the log name different lenders in round {number}, or others that were missing"
            raise FoundError(None, what, _DISAGREE)
        if membership is None or record.plan.aggregation != "secure":
            continue  # a job in clear waits for no roster
        for name in sorted({*done.cohort} - told.consented):
            what = f"{name} is in the sum of round {number}, and the log holds no consent that its identity key signed"
            raise FoundError(None, what, _INVENTED)


def _check_covered(told: _Told, covered: int) -> None:
    """Check that a quorum cosigned every round but the last, which is shown to lenders with the job's end."""
    unseen = [number for number, place in sorted(told.places.items())[:-1] if place >= covered]
    if unseen:
        rounds = ", ".join(map(str, unseen[:10])) + (" and more" if len(unseen) > 10 else "")
        what = f"no checkpoint that a quorum of the members cosigned covers round {rounds}"
        raise FoundError(told.places[unseen[0]], what, _UNSEEN)

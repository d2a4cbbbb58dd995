"""What a lender signs of weight, whatever carries it: that it takes part or not, and that it received a job's end.

It signs the very entry that the coordinator then logs, so that whoever reads the log checks the lender's word with the
identity key of the roster, and needs the word of nobody else.
"""

import hashlib
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.audit.entry import canonical_json
from fedfin.audit.events import Consent, Receipt, bounded
from fedfin.errors import AuditError
from fedfin.plan import JobPlan
from fedfin.update import Accepted, Done, Finish, Message, Propose, Refused

__all__ = ["Answer", "answer_of", "sign_answer", "verify_answer"]

Answer: TypeAlias = Consent | Receipt
"""Entries of the coordinator's log that carry a lender's own signature."""

_LABEL: Final = b"fedfin answer 1\n"


def answer_of(member: str, question: Message, reply: Message, *, model: str | None) -> Answer | None:
    """Return the entry that a lender's answer is logged as, unsigned; None where it is none of weight.

    Args:
        member: The lender.
        question: What it was asked.
        reply: Its answer.
        model: Digest of the model that came with the end of a completed job, or None.
    """
    match question, reply:
        case Propose(), Accepted():
            return Consent(job=question.job_id, member=member, plan=_digest(question), decision="accepted")
        case Propose(), Refused() if not reply.waits:
            plan, reason = _digest(question), bounded(reply.reason)
            return Consent(job=question.job_id, member=member, plan=plan, decision="refused", reason=reason)
        case Finish(status="completed"), Done():
            return Receipt(job=question.job_id, member=member, status="completed", model=model)
        case Finish(), Done():
            return Receipt(job=question.job_id, member=member, status="abandoned")
        case _:
            return None


def sign_answer(answer: Answer, key: Ed25519PrivateKey, origin: str) -> str:
    """Return a lender's signature, hex.

    Args:
        answer: The entry as the coordinator will log it; its own signature does not count.
        key: The lender's identity key.
        origin: Of the coordinator's log: the federation, by name and root.
    """
    return key.sign(_message(answer, origin)).hex()


def verify_answer(answer: Answer, key: Ed25519PublicKey, origin: str) -> None:
    """Check the signature of an entry; arguments as `sign_answer`.

    Raises:
        AuditError: It has none, or the key did not sign it.
    """
    try:
        key.verify(bytes.fromhex(answer.signature or ""), _message(answer, origin))
    except InvalidSignature as error:
        msg = (
            f"the {answer.type} of {answer.member} to job {answer.job} is not signed by its identity key: it was"
            " altered, or another made it; ask that lender, and do not rely on it"
        )
        raise AuditError(msg) from error


def _digest(question: Propose) -> str:
    """Return the digest of what was proposed: of the plan's text where it is no plan of this release."""
    try:
        return JobPlan.model_validate_json(question.plan).digest()
    except ValueError:
        return hashlib.sha256(question.plan.encode()).hexdigest()


def _message(answer: Answer, origin: str) -> bytes:
    body = answer.model_dump(exclude_none=True, exclude={"signature"})
    return _LABEL + origin.encode() + b"\n" + canonical_json(body)

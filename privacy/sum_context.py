"""What a secure sum is about: the context that binds every signature, key and share of it.

The context has two halves. What is known before any key is made (federation, job, plan, stage, attempt, cohort,
roster, layout, threshold) is a `SumContext`; its digest is in every advert and every sealed share. The model is not
known that early, because adverts travel with the round before. It is bound at the mask exchange: the digest of the
context, the question's bytes and the sharers' adverts is in every mask's key and every confirmation. A lender that is
shown another model has masks that cancel nobody's, and its confirmation matches nobody's.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017), figure 4
with the underlined steps (malicious server), complete graph.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.privacy.sum_rules import refusal

__all__ = [
    "MIN_LENDERS",
    "SumContext",
    "asked_digest",
    "check_context",
    "framed",
    "roster_digest",
    "threshold_of",
]

MIN_LENDERS: Final = 3
"""No sum has fewer lenders, whatever a policy says: of two, each would learn the other's vector."""

MAX_LENDERS: Final = 1000
"""The complete graph's work grows with the square of the cohort; a context beyond this is refused."""

_LABEL: Final = b"fedfin secure sum 1 "
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TEXT: Final = re.compile(
    r"[ -~]{1,200}"
)  # printable ASCII: federations, jobs, stages and lenders are named so
_MAX_BYTES: Final = 400_000


@dataclass(frozen=True, slots=True)
class SumContext:
    """One sum of one cohort, known before any key is made; public.

    Whether the cohort is large enough and the threshold right is the lenders' to judge, not this type's.

    Attributes:
        federation: The federation's name.
        job_id: The job's id.
        plan: SHA-256 of the plan, hex.
        stage: What is summed: `bins`, `round 3`, `evaluation 1`.
        attempt: 0, and one more each time the same stage is tried again before masks.
        cohort: Names of the lenders that are asked, sorted, without repeats; 3 to 1000.
        roster: `roster_digest` of the whole pinned roster, hex.
        layout: Digest of the vector's layout, hex.
        threshold: Lenders that must go on to the end; `threshold_of(len(cohort))`, or it will be refused.

    Raises:
        ProtocolRefusalError: A value does not have the form above (rule `malformed`).
    """

    federation: str
    job_id: str
    plan: str
    stage: str
    attempt: int
    cohort: tuple[str, ...]
    roster: str
    layout: str
    threshold: int

    def __post_init__(self) -> None:
        texts = (self.federation, self.job_id, self.stage, *self.cohort)
        if not all(_is(text, _TEXT) for text in texts):
            raise refusal(
                "malformed", "a name in the sum's context is not 1 to 200 printable ASCII characters"
            )
        if not all(_is(digest, _DIGEST) for digest in (self.plan, self.roster, self.layout)):
            raise refusal("malformed", "a digest in the sum's context is not 64 hexadecimal digits")
        # bool is an int that JSON writes as true
        if type(self.attempt) is not int or not 0 <= self.attempt < 2**31:
            raise refusal("malformed", "the sum's attempt is not a count")
        if type(self.threshold) is not int or not 1 <= self.threshold <= len(self.cohort):
            raise refusal("malformed", "the sum's threshold is not within its cohort")
        if list(self.cohort) != sorted(set(self.cohort)) or len(self.cohort) > MAX_LENDERS:
            raise refusal(
                "malformed", f"the cohort is not a sorted list of at most {MAX_LENDERS} different names"
            )

    @property
    def num_lenders(self) -> int:
        """Lenders of the cohort, n."""
        return len(self.cohort)

    def index_of(self, name: str) -> int:
        """Return where the lender's shares lie on the polynomials: its place in the cohort, from 1."""
        return self.cohort.index(name) + 1

    def to_bytes(self) -> bytes:
        """Return the canonical JSON that travels and that `digest` is taken of."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> "SumContext":
        """Return the context that `to_bytes` wrote; nothing else is accepted.

        Raises:
            ProtocolRefusalError: The bytes are not what `to_bytes` writes of any context (rule `malformed`).
        """
        if len(data) > _MAX_BYTES:
            raise refusal("malformed", f"the sum's context has {len(data)} bytes")
        try:
            body: Any = json.loads(data)
        except (ValueError, RecursionError):
            raise refusal("malformed", "the sum's context is not JSON") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(body, dict) or set(body) != names or not isinstance(body["cohort"], list):
            raise refusal("malformed", "the sum's context does not have the keys that it must have")
        values: dict[str, Any] = {**body, "cohort": tuple(body["cohort"])}
        context = cls(**values)
        if context.to_bytes() != data:
            raise refusal("malformed", "the sum's context is not written canonically")
        return context

    def digest(self) -> bytes:
        """Return the SHA-256 that is in every signature, key derivation and associated data of the sum."""
        return hashlib.sha256(framed("context", self.to_bytes())).digest()


def threshold_of(num_lenders: int) -> int:
    """Return how many of a cohort must go on: floor(2n/3) + 1.

    Two sets of so many lenders have more than n/3 in common, so with fewer than n/3 colluders an honest lender is in
    both: it signs one survivor set only, and a coordinator cannot have two confirmed.

    Args:
        num_lenders: Size of the cohort; >= 3.

    Source: Bonawitz et al. 2017, theorem 6.5.
    """
    return 2 * num_lenders // 3 + 1


def check_context(
    context: SumContext,
    name: str,
    identity: Ed25519PublicKey,
    roster: Mapping[str, Ed25519PublicKey],
    min_cohort: int,
) -> None:
    """Check that a lender may take part in such a sum.

    Args:
        context: As the coordinator sent it.
        name: The lender.
        identity: Its own identity key.
        roster: The identity key of every member, as the lender pinned it.
        min_cohort: Fewest lenders of a sum that its policy allows.

    Raises:
        ProtocolRefusalError: It may not: rules `membership`, `roster`, `cohort_size`, `threshold`.
    """
    if name not in context.cohort or roster.get(name) != identity:
        raise refusal("membership", f"{name} is not in the cohort, or not in the roster with its own key")
    if context.roster != roster_digest(roster) or not set(context.cohort) <= set(roster):
        raise refusal("roster", "the sum rests on another roster than the pinned one")
    if context.num_lenders < min_cohort:
        raise refusal("cohort_size", f"the cohort has {context.num_lenders} lenders, not {min_cohort}")
    if context.threshold != threshold_of(context.num_lenders):
        what = f"the threshold is {context.threshold}, not {threshold_of(context.num_lenders)}"
        raise refusal("threshold", what)


def roster_digest(roster: Mapping[str, Ed25519PublicKey]) -> str:
    """Return the SHA-256 of the roster's names and raw identity keys in the order of names, hex."""
    parts = [part for name in sorted(roster) for part in (name.encode(), roster[name].public_bytes_raw())]
    return hashlib.sha256(framed("roster", *parts)).hexdigest()


def asked_digest(context: bytes, question: bytes, adverts: Mapping[str, bytes]) -> bytes:
    """Return the whole context: what the sum is about, what is asked, and who shared with which keys.

    Args:
        context: Digest of the `SumContext`.
        question: Bytes of the message that the lenders answer, with the model in it.
        adverts: Signed adverts of the sharers, by name: whoever shows two lenders two adverts is found out as well.
    """
    parts = [part for name in sorted(adverts) for part in (name.encode(), adverts[name])]
    return hashlib.sha256(framed("asked", context, hashlib.sha256(question).digest(), *parts)).digest()


def framed(label: str, *parts: bytes) -> bytes:
    """Return the parts as one value that no other label or parts give: for hashing and signing."""
    pieces = [_LABEL, label.encode(), b"\n"]
    for part in parts:  # a loop takes half a comprehension's time, and a sum frames n**2 shares
        pieces.append(len(part).to_bytes(8, "big"))
        pieces.append(part)
    return b"".join(pieces)


def _is(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None

"""The words that events of a log are made of: what a field may hold, and whose log an event belongs to.

Names of institutions, digests, counts, decimal numbers as text, and bounded reasons: there is no field for a person.
"""

import hashlib
import hmac
import math
import re
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fedfin.invitation import LENDER_NAME_PATTERN

__all__ = [
    "BOTH",
    "COORDINATOR",
    "LARGEST_COUNT",
    "LEAST_COHORT",
    "LENDER",
    "Count",
    "Digest",
    "Event",
    "JobId",
    "Label",
    "Name",
    "Names",
    "NoteText",
    "Number",
    "PublicKeyHex",
    "Ranges",
    "Real",
    "Reason",
    "Side",
    "SignatureHex",
    "bounded",
    "real",
    "salted_digest",
]

Side = Literal["coordinator", "lender"]

LEAST_COHORT: Final = 3
"""Fewer lenders than this have no common metric that is not nearly one lender's own."""

_REASON_LENGTH: Final = 500
_MOST_MEMBERS: Final = 1000
LARGEST_COUNT: Final = 2**53 - 1  # what every reader of JSON holds exactly (RFC 8785)

Name = Annotated[str, StringConstraints(pattern=LENDER_NAME_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PublicKeyHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SignatureHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,120}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.:/+-]{0,79}$")]
Reason = Annotated[str, StringConstraints(pattern=rf"^[^\x00-\x1f\x7f]{{1,{_REASON_LENGTH}}}$")]
Real = Annotated[
    str, StringConstraints(pattern=r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][0-9]{2,3})?$", max_length=40)
]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Number = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Names = Annotated[tuple[Name, ...], Field(max_length=_MOST_MEMBERS)]
NoteText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x09\x0b-\x1f\x7f]+$", max_length=8192)]
Ranges = Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1, max_length=1000)]

BOTH: Final[frozenset[Side]] = frozenset({"coordinator", "lender"})
COORDINATOR: Final[frozenset[Side]] = frozenset({"coordinator"})
LENDER: Final[frozenset[Side]] = frozenset({"lender"})


class Event(BaseModel, frozen=True):
    """Something that happened; unknown fields are refused, values never change.

    Attributes:
        sides: Whose log may hold it.
        type: The event's fixed name.
        version: Of the event's fields; a later release that changes them counts it up.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    sides: ClassVar[frozenset[Side]] = BOTH
    type: str
    version: int = 1


def salted_digest(salt: bytes, content: bytes) -> str:
    """Return the HMAC-SHA256 of `content` under `salt`, hex: without the salt nobody can confirm a guess.

    Args:
        salt: 16 bytes and more, secret; erase it to erase what the digest stands for.
        content: What the digest stands for.

    Raises:
        ValueError: The salt is too short to keep a guess from being tried.
    """
    if len(salt) < 16:
        msg = f"a salt of {len(salt)} bytes can be guessed; use 16 and more from `secrets`"
        raise ValueError(msg)
    return hmac.new(salt, content, hashlib.sha256).hexdigest()


def real(value: float) -> str:
    """Return a finite number as the text an event holds: the shortest that gives the same float64 again.

    Raises:
        ValueError: The number is not finite.
    """
    if not math.isfinite(value):
        msg = f"{value} cannot be logged; log numbers that are finite"
        raise ValueError(msg)
    text = repr(float(value))
    return text.removesuffix(".0")


def bounded(text: str) -> str:
    """Return a reason as an event may hold it: one line, at most 500 characters, the rest cut with an ellipsis."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", text).split()) or "not said"
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 1] + "\u2026"

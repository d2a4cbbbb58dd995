"""What checking a log finds: the first thing that is wrong, where, and what it means."""

from dataclasses import dataclass
from typing import Final

__all__ = ["CHANGED", "CUT", "REWRITTEN", "FoundError", "Wrong"]

CHANGED: Final = (
    "the log was changed after it was written: rely on none of it, and compare it with a copy held elsewhere"
)
REWRITTEN: Final = (
    "the log was rewritten, or its owner shows different parties different histories: keep the file and the"
    " checkpoint, together they are the proof"
)
CUT: Final = (
    "the log was cut short or restored from an older copy: ask its owner for the entries that are gone"
)


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first thing that is wrong.

    Attributes:
        index: Of the entry; None where it is not about one.
        what: What was seen.
        meaning: What that means and what to do.
    """

    index: int | None
    what: str
    meaning: str


class FoundError(Exception):
    """Carries the first thing that is wrong to where it is reported; no error of a user's doing."""

    def __init__(self, index: int | None, what: str, meaning: str) -> None:
        super().__init__(what)
        self.wrong = Wrong(index, what, meaning)

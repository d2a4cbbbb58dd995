"""The way to the lenders, as the job's loop sees it: questions by name, answers by name, failures in words.

Flower's part stands in `server/app`; a test's lenders in memory are another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedfin.update import Message

__all__ = ["Answers", "Exchange"]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back: replies by lender, and failures by lender with the reason, in words."""

    replies: dict[str, Message] = field(repr=False)
    failures: dict[str, str]


class Exchange(Protocol):
    """The way to the lenders."""

    def online(self) -> frozenset[str]:
        """Return the names of the enrolled lenders that are connected now."""
        ...

    def ask(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        *,
        deadline_s: float,
        on_reply: Callable[[str], None] | None = None,
        fold: Callable[[str, Message], None] | None = None,
        enough: int | None = None,
    ) -> Answers:
        """Send a request to each lender named; return when all have answered, or at the deadline.

        Args:
            requests: By lender.
            expected: The answer's type; a `Refused` may come in its place.
            deadline_s: Lenders that have not answered by then have failed.
            on_reply: Told of each lender that has answered.
            fold: Takes each answer of the expected type as it arrives; it is then dropped, and not among the replies.
                A FedfinError that it raises is that lender's failure.
            enough: With so many answers of the expected type, the others are waited for a few seconds only.
        """
        ...

"""A sum over a cohort, however it is made: the one interface of summing in clear and under secure aggregation.

The job's loop states what is to be summed, a `Stage`, and gets a `CohortSums`. Which of the two ways it runs on, it
does not know; what differs is what may be asked again when a sum fails, and two errors say that.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import FedfinError
from fedfin.privacy.encoding import Layout
from fedfin.update import Message

__all__ = [
    "AnswerError",
    "CohortSums",
    "Parts",
    "Stage",
    "SumLostError",
    "SumShortError",
    "Summing",
    "Upcoming",
]

Parts: TypeAlias = Mapping[str, NDArray[np.float64]]
"""Values by the name of the layout's segment."""


class AnswerError(FedfinError):
    """A single lender's answer cannot be what was asked for: it is left out of the sum."""


class SumShortError(FedfinError):
    """Too few lenders answered, and nothing is used up: the same stage may be asked again.

    Args:
        missing: Who did not answer, with the reason.
        refused: Who of them refused.
    """

    def __init__(self, missing: Mapping[str, str], refused: Collection[str] = ()) -> None:
        super().__init__(f"too few lenders answered; missing: {', '.join(sorted(missing)) or 'nobody'}")
        self.missing = dict(missing)
        self.refused = frozenset(refused)


class SumLostError(FedfinError):
    """A sum failed after masked vectors were asked for: the stage is used up, and charged at the lenders.

    Args:
        why: What happened, for people.
        missing: Who did not answer, with the reason.
    """

    def __init__(self, why: str, missing: Mapping[str, str]) -> None:
        super().__init__(why)
        self.missing = dict(missing)


@dataclass(frozen=True, slots=True)
class Upcoming:
    """What of a stage is known before its question is.

    Attributes:
        name: `bins`, `round 3`, `evaluation 1`; each once in a job.
        layout: The vector's layout, from the number of lenders in the cohort.
    """

    name: str
    layout: Callable[[int], Layout]


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing to be summed over a cohort.

    Attributes:
        upcoming: Its name and layout.
        question: What every lender is asked.
        base: Rounds aggregated in the model that the question is about; 0 for the bins.
        min_survivors: Fewest lenders whose sum is of use, from the number of lenders in the cohort.
        answer: In clear: what a lender answers.
        read: In clear: checks one lender's answer and returns its parts; raises `AnswerError`.
        ends_part: Whether a lender that refuses the question has no more part in the job; an evaluation's refusal
            says nothing of its training.
        keeps_single: Whether the single answers' parts are wanted beside the sum; in clear only.
    """

    upcoming: Upcoming
    question: Message = field(repr=False)
    base: int
    min_survivors: Callable[[int], int]
    answer: type[Message]
    read: Callable[[str, Message], Parts]
    ends_part: bool = True
    keeps_single: bool = False

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.upcoming.name


@dataclass(frozen=True, slots=True)
class CohortSums:
    """What a cohort's answers add up to.

    Attributes:
        parts: The sums, by segment.
        survivors: Lenders in the sum, sorted.
        num_lenders: Lenders of the cohort that was asked, n; at least the survivors.
        missing: Lenders of the cohort that are not in the sum, with the reason.
        failed_after: Survivors that failed later, while the sum was unmasked; their answers are in it.
        seconds: From the first question to the sum.
        exchanges: Questions that each lender was asked for this sum alone.
        answer_bytes: Length of one lender's packed vector; 0 in clear.
        transcript: SHA-256 of what was kept of a secure sum; None where nothing was.
        singles: The lenders' own parts, where the stage wanted them.
    """

    parts: Parts = field(repr=False)
    survivors: tuple[str, ...]
    num_lenders: int
    missing: Mapping[str, str]
    failed_after: Mapping[str, str]
    seconds: float
    exchanges: int
    answer_bytes: int = 0
    transcript: str | None = None
    singles: Mapping[str, Parts] = field(default_factory=dict[str, Parts], repr=False)


class Summing(Protocol):
    """A way to sum."""

    def bound_to(self, stage: Stage) -> frozenset[str] | None:
        """Return the only cohort that may answer this stage, where an earlier sum of the same model binds it."""
        ...

    def sum(
        self,
        stage: Stage,
        names: Sequence[str],
        *,
        following: Upcoming | None = None,
        on_reply: Callable[[str], None] | None = None,
    ) -> CohortSums:
        """Ask these lenders and return the sum of their answers.

        Args:
            stage: What is summed.
            names: The cohort, sorted.
            following: What will be summed next, as far as it is known: it may be prepared along the way.
            on_reply: Told of each lender whose answer has arrived.

        Raises:
            SumShortError: Too few answered; the stage may be asked again.
            SumLostError: Too few went on to the end; the stage is used up.
        """
        ...

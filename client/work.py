"""One stage of a job at a lender: its name, the question it answers, and what it does and costs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedfin.privacy.encoding import Layout
from fedfin.privacy.evaluation_noise import evaluation_job
from fedfin.privacy.events import Event
from fedfin.update import AskHistogram, Evaluate, Train

__all__ = ["Question", "ResultT", "Work", "account_of", "stage_of"]

Question: TypeAlias = AskHistogram | Train | Evaluate
"""What a stage answers."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Work(Generic[ResultT]):
    """One stage, known before a loan is looked at.

    Attributes:
        stage: `bins`, `round 3`, `evaluation 1`.
        run: Looks at the loans and returns what may leave: an answer, or a vector for a sum.
        events: What it is charged; none without privacy.
        charged_to: The job in the ledger that reserved it.
        weights: The question's, shape (d,); none for the bins.
        layout: The vector's; None for an answer that is seen by itself.
    """

    stage: str
    run: Callable[[], ResultT]
    events: tuple[Event, ...]
    charged_to: str
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    layout: Layout | None = None


def stage_of(question: Question) -> str:
    """Return the stage that a question is about."""
    match question:
        case AskHistogram():
            return "bins"
        case Train():
            return f"round {question.round}"
        case Evaluate():
            return f"evaluation {question.number}"


def account_of(job_id: str, stage: str) -> str:
    """Return the job in the ledger that a stage is charged to: evaluations have a reservation of their own."""
    return evaluation_job(job_id) if stage.startswith("evaluation ") else job_id

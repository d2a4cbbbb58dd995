"""What a strategy is: a pure function from the model's state and a cohort's sum to the next state.

The coordinator sees sums only. A lender sends its update times its weight, and the weight beside it; what arrives
here is the two sums, whether they were added in clear or under secure aggregation.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedfin.errors import TrainingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.plan import TrainingPlan

__all__ = ["CohortSum", "ModelState", "Strategy", "lender_weight", "public_size", "weight_of"]


@dataclass(frozen=True, slots=True)
class ModelState:
    """The global model after some rounds.

    Attributes:
        weights: Flat vector, shape (d,), finite.
        round: Rounds done; 0 for the initial weights.
        moments: What a strategy keeps between rounds, vectors of shape (d,); made of published sums only.
    """

    weights: "NDArray[np.float32]"
    round: int
    moments: "tuple[NDArray[np.float64], ...]" = ()


@dataclass(frozen=True, slots=True)
class CohortSum:
    """What a round's cohort contributed, summed.

    Attributes:
        values: Sum over lenders of weight times update, shape (d,).
        weight: Sum of the lenders' weights; > 0.
        num_lenders: Lenders in the sum; >= 1.
    """

    values: "NDArray[np.float64]"
    weight: float
    num_lenders: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0) or self.num_lenders < 1:
            msg = (
                f"the cohort's sum has weight {self.weight} from {self.num_lenders} lenders; both must be positive:"
                " run the round again with a quorum"
            )
            raise TrainingError(msg)
        if self.values.ndim != 1 or not np.isfinite(self.values).all():
            msg = (
                f"the cohort's sum has shape {self.values.shape} or values that are not finite; the round is void:"
                " find the lender that sent them before running it again"
            )
            raise TrainingError(msg)


class Strategy(Protocol):
    """Turns one round's sum into the next global model; changes neither argument."""

    def __call__(self, state: ModelState, cohort_sum: CohortSum) -> ModelState:
        """Return the state after the round."""
        ...


def public_size(num_loans: int, training: "TrainingPlan") -> int:
    """Return the number of loans rounded down to a multiple of `weight_bucket`, but not below one bucket."""
    return max(training.weight_bucket, num_loans // training.weight_bucket * training.weight_bucket)


def lender_weight(num_loans: int, training: "TrainingPlan") -> float:
    """Return a lender's weight in the average, in loans, their square root, or 1.

    The number of loans is capped at `weight_cap` and then rounded down to a multiple of `weight_bucket`, but not
    below one bucket: the weight says no more about the lender's size than its bucket.

    Args:
        num_loans: The lender's training loans; >= 1.
        training: States weighting, cap and bucket.

    Raises:
        TrainingError: The lender has no loans.
    """
    if num_loans < 1:
        msg = f"a lender with {num_loans} training loans has no weight; leave it out of the round"
        raise TrainingError(msg)
    return weight_of(public_size(min(num_loans, training.weight_cap), training), training)


def weight_of(size: int, training: "TrainingPlan") -> float:
    """Return the weight of a lender whose loans, capped and bucketed, are `size`; >= 1."""
    match training.weighting:
        case "size":
            return float(size)
        case "sqrt":
            return math.sqrt(size)
        case "equal":
            return 1.0

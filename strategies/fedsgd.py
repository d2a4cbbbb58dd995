"""Federated SGD: one AdamW step of the coordinator on the cohort's summed gradient, once a round.

The strategy of mode `shared`, where lenders take no steps of their own: what they send is one sum of clipped
gradients, and the noise of the cohort's sum is there once. The moments live at the coordinator, over all rounds; they
are made of published sums, so they cost no privacy.

Source: McMahan et al. 2017, section 2 (FedSGD); Loshchilov & Hutter, "Decoupled Weight Decay Regularization"
(ICLR 2019), algorithm 2; Reddi et al., "Adaptive Federated Optimization" (ICLR 2021) for Adam at the server.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.errors import TrainingError
from fedfin.strategies.strategy import CohortSum, ModelState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.plan import TrainingPlan

__all__ = ["FedSgdState", "fedsgd", "start_fedsgd"]

_FIRST_DECAY: Final = 0.9
_SECOND_DECAY: Final = 0.999
_STABILITY: Final = 1e-8


@dataclass(frozen=True, slots=True)
class FedSgdState:
    """The model and the coordinator's optimizer after some rounds.

    Attributes:
        model: Weights of shape (d,) and the rounds done.
        first_moment: Running mean of the gradient, shape (d,).
        second_moment: Running mean of its square, shape (d,).
    """

    model: ModelState
    first_moment: "NDArray[np.float64]"
    second_moment: "NDArray[np.float64]"


def start_fedsgd(weights: "NDArray[np.float32]") -> FedSgdState:
    """Return the state before round 1, from the initial weights, shape (d,)."""
    return FedSgdState(ModelState(weights, 0), np.zeros(len(weights)), np.zeros(len(weights)))


def fedsgd(state: FedSgdState, cohort_sum: CohortSum, training: "TrainingPlan") -> FedSgdState:
    """Return the state after one round; changes no argument.

    Args:
        state: The state before it.
        cohort_sum: The sum of the loss gradients, shape (d,), and as weight the expected number of loans in it.
        training: Learning rate and weight decay.

    Raises:
        TrainingError: The shapes differ, or the new weights are not finite.
    """
    if cohort_sum.values.shape != state.model.weights.shape:
        msg = (
            f"the cohort's sum has shape {cohort_sum.values.shape}, the model {state.model.weights.shape};"
            " a lender trains another model: compare the fingerprints"
        )
        raise TrainingError(msg)
    step = state.model.round + 1
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        gradient = cohort_sum.values / cohort_sum.weight
        first = _FIRST_DECAY * state.first_moment + (1.0 - _FIRST_DECAY) * gradient
        second = _SECOND_DECAY * state.second_moment + (1.0 - _SECOND_DECAY) * gradient**2
        scaled = first / (1.0 - _FIRST_DECAY**step)
        scaled /= np.sqrt(second / (1.0 - _SECOND_DECAY**step)) + _STABILITY
        kept = (1.0 - training.learning_rate * training.weight_decay) * state.model.weights.astype(np.float64)
        weights = (kept - training.learning_rate * scaled).astype(np.float32)
    if not np.isfinite(weights).all():
        msg = f"round {step} gave weights that are not finite; lower training.learning_rate"
        raise TrainingError(msg)
    return FedSgdState(ModelState(weights, step), first, second)

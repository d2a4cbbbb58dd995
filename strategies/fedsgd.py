"""Federated SGD: one AdamW step of the coordinator on the cohort's summed gradient, once a round.

The strategy of mode `shared`, where lenders take no steps of their own: what they send is one sum of clipped
gradients, and the noise of the cohort's sum is there once. The moments live at the coordinator, over all rounds; they
are made of published sums, so they cost no privacy.

Source: McMahan et al. 2017, section 2 (FedSGD); Loshchilov & Hutter, "Decoupled Weight Decay Regularization"
(ICLR 2019), algorithm 2; Reddi et al., "Adaptive Federated Optimization" (ICLR 2021) for Adam at the server.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.errors import TrainingError
from fedfin.strategies.strategy import CohortSum, ModelState

if TYPE_CHECKING:
    from fedfin.plan import TrainingPlan

__all__ = ["fedsgd"]

_FIRST_DECAY: Final = 0.9
_SECOND_DECAY: Final = 0.999
_STABILITY: Final = 1e-8


def fedsgd(state: ModelState, cohort_sum: CohortSum, training: "TrainingPlan") -> ModelState:
    """Return the state after one round; changes no argument.

    Args:
        state: The state before it; its moments are the running means of the gradient and of its square, or none
            before round 1.
        cohort_sum: The sum of the loss gradients, shape (d,), and as weight the expected number of loans in it.
        training: Learning rate and weight decay.

    Raises:
        TrainingError: The shapes differ, or the new weights are not finite.
    """
    if cohort_sum.values.shape != state.weights.shape:
        msg = (
            f"the cohort's sum has shape {cohort_sum.values.shape}, the model {state.weights.shape};"
            " a lender trains another model: compare the fingerprints"
        )
        raise TrainingError(msg)
    step = state.round + 1
    before = state.moments or (np.zeros(len(state.weights)), np.zeros(len(state.weights)))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        gradient = cohort_sum.values / cohort_sum.weight
        first = _FIRST_DECAY * before[0] + (1.0 - _FIRST_DECAY) * gradient
        second = _SECOND_DECAY * before[1] + (1.0 - _SECOND_DECAY) * gradient**2
        scaled = first / (1.0 - _FIRST_DECAY**step)
        scaled /= np.sqrt(second / (1.0 - _SECOND_DECAY**step)) + _STABILITY
        kept = (1.0 - training.learning_rate * training.weight_decay) * state.weights.astype(np.float64)
        weights = (kept - training.learning_rate * scaled).astype(np.float32)
    if not np.isfinite(weights).all():
        msg = f"round {step} gave weights that are not finite; lower training.learning_rate"
        raise TrainingError(msg)
    return ModelState(weights, step, (first, second))

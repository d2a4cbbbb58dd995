"""Federated averaging: the new model is the old one plus the weighted mean of the lenders' updates.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(AISTATS 2017), algorithm 1, with updates instead of models: the two are equal since the weights sum to one.
"""

import numpy as np

from fedfin.errors import TrainingError
from fedfin.strategies.strategy import CohortSum, ModelState

__all__ = ["fedavg"]


def fedavg(state: ModelState, cohort_sum: CohortSum) -> ModelState:
    """Return the state after one round; changes neither argument.

    Args:
        state: Weights of shape (d,).
        cohort_sum: The round's weighted updates, shape (d,), and the weights' sum.

    Raises:
        TrainingError: The shapes differ, or the new weights are not finite.
    """
    if cohort_sum.values.shape != state.weights.shape:
        msg = (
            f"the cohort's sum has shape {cohort_sum.values.shape}, the model {state.weights.shape};"
            " a lender trains another model: compare the fingerprints"
        )
        raise TrainingError(msg)
    with np.errstate(over="ignore"):  # an overflow is refused below
        weights = (state.weights + cohort_sum.values / cohort_sum.weight).astype(np.float32)
    if not np.isfinite(weights).all():
        msg = f"round {state.round + 1} gave weights that are not finite; lower training.learning_rate"
        raise TrainingError(msg)
    return ModelState(weights, state.round + 1)

"""The median of each coordinate: the new model is the old one plus the median of the lenders' updates.

A lender that sends nonsense moves no coordinate past its honest neighbours, as long as it and its like are fewer than
half. Every lender counts once, whatever its size. The median needs each update by itself, so it cannot run where the
coordinator sees sums only.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (ICML 2018), algorithm 1,
with updates of several local steps in the place of gradients.
"""

from typing import TYPE_CHECKING

import numpy as np

from fedfin.errors import TrainingError
from fedfin.strategies.strategy import ModelState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["median"]


def median(state: ModelState, updates: "Sequence[NDArray[np.float32]]") -> ModelState:
    """Return the state after one round; changes neither argument.

    Args:
        state: Weights of shape (d,).
        updates: One for each lender, shape (d,), finite; at least one.

    Raises:
        TrainingError: There is no update, or one has another shape or values that are not finite.
    """
    if not updates:
        msg = f"round {state.round + 1} has no update to take the median of; run it again with a quorum"
        raise TrainingError(msg)
    for update in updates:
        if update.shape != state.weights.shape or not np.isfinite(update).all():
            msg = (
                f"an update has shape {update.shape}, the model {state.weights.shape}, or it is not finite; a lender"
                " trains another model: compare the fingerprints"
            )
            raise TrainingError(msg)
    middle = np.median(np.stack(updates).astype(np.float64), axis=0)
    return ModelState((state.weights + middle).astype(np.float32), state.round + 1)

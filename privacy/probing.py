"""A look at a model with made-up loans, before it sees real ones: are the loans' gradients really apart?

A layer's kind says whether its gradients can be told apart; the code between the layers does not. A module that
subtracts the batch's mean, draws random masks, or uses a parameter past its layer gives per-loan gradients that are
wrong in silence, and clipping them protects nobody. Nothing here depends on a loan, so a refusal tells nothing.
Code that does it only for certain values or sizes of a batch is not found: a look is no proof.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fedfin.errors import TrainingError

__all__ = ["NO_BOUND", "require_loans_apart"]

Gradients: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]
ClippedSum: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int64], float], NDArray[np.float64]]

NO_BOUND: Final = 1e100
"""A clipping bound that no gradient reaches."""

_NUM_LOANS: Final = 8
_TOLERANCE: Final = 1e-3  # far above float32's rounding, far below what one loan adds to another
_SMALLEST_SHARE: Final = 1e-3
# A unit of a ReLU so near to its kink that rounding decides differs between a batch and a loan alone, by more than the
# tolerance: once in some ten thousand looks. It does so for one set of loans, code that mixes loans for each.
_LOOKS: Final = 3
_DRAWS: Final = (
    "the model draws from torch's generator, which can be seeded: who knows the seed sees one loan shift the others'"
    " draws; remove dropout and the like (the noise regularises)"
)
_MIXES: Final = (
    "the gradient of one loan depends on the other loans of the batch; the model or the loss mixes them: compute every"
    " logit and every loss from its own loan"
)
_ESCAPES: Final = (
    "Opacus' hooks do not see the whole gradient: a parameter acts outside of its layer, or the layer is not supported;"
    " call layers themselves, and put a proximal term into training.proximal"
)


def require_loans_apart(summed: ClippedSum, whole: Gradients | None, num_columns: int) -> bool:
    """Refuse a model whose per-loan gradients depend on the other loans, on chance, or are not all of the gradient.

    Args:
        summed: From loans, labels and clipping bound to the sum of the clipped per-loan gradients, shape (d,).
        whole: To the gradient of the summed loss as autograd has it, shape (d,); None where another way makes sure
            that the per-loan gradients are all of it.
        num_columns: Columns of a loan, p.

    Returns:
        Whether there was anything to compare: gradients that overflow or are all zero show nothing, and the model
        must be looked at again when its weights have changed.

    Raises:
        TrainingError: The gradients are not apart, and why.
    """
    wrong = ""
    for look in range(_LOOKS):
        wrong, seen = _look(summed, whole, num_columns, look)
        if not wrong:
            return seen
    raise TrainingError(wrong)


def _look(summed: ClippedSum, whole: Gradients | None, num_columns: int, look: int) -> tuple[str, bool]:
    """Return what is wrong with the gradients of one set of loans, if anything, and whether there was any to see."""
    values = np.sin(np.arange(1.0, _NUM_LOANS * num_columns + 1) + look).astype(np.float32)
    loans, labels = values.reshape(_NUM_LOANS, num_columns), np.arange(_NUM_LOANS) % 2
    before = torch.get_rng_state()
    together = summed(loans, labels, NO_BOUND)
    if not torch.equal(torch.get_rng_state(), before):
        return _DRAWS, True
    apart = np.array(
        [summed(loans[position, None], labels[position, None], NO_BOUND) for position in range(_NUM_LOANS)]
    )
    norms = np.linalg.norm(apart, axis=1)
    scale, seen = float(norms.sum()), bool(np.isfinite(norms).all() and norms.any())
    mixed = _differ(together, apart.sum(axis=0), scale)
    if seen:
        # Clipped too: code that puts the loans into another order between two layers leaves the plain sum as it is.
        # A loan that is all but saturated has a gradient of float32's last bits, which would be no bound to compare at.
        bound = 0.5 * float(norms[norms > _SMALLEST_SHARE * norms.max()].min())
        expected = (bound / np.maximum(norms, bound)) @ apart
        mixed = mixed or _differ(summed(loans, labels, bound), expected, _NUM_LOANS * bound)
    if mixed:
        return _MIXES, seen
    if whole is not None and _differ(together, whole(loans, labels), scale):
        return _ESCAPES, seen
    return "", seen


def _differ(one: NDArray[np.float64], other: NDArray[np.float64], scale: float) -> bool:
    # where weights overflow there is nothing to compare, and such loans will count zero
    difference = float(np.linalg.norm(one - other))
    return bool(np.isfinite([difference, scale]).all()) and difference > _TOLERANCE * scale

"""A look at a model with made-up loans, before it sees real ones: are the loans' gradients really apart?

A layer's kind says whether its gradients can be told apart; the code between the layers does not. A module that
subtracts the batch's mean, draws random masks, or uses a parameter past its layer gives per-loan gradients that are
wrong in silence, and clipping them protects nobody. Nothing here depends on a loan, so a refusal tells nothing.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fedfin.errors import TrainingError

__all__ = ["require_loans_apart"]

Gradients: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]

_TOLERANCE: Final = 1e-3  # far above float32's rounding, far below what one loan adds to another


def require_loans_apart(summed: Gradients, whole: Gradients | None, num_columns: int) -> None:
    """Refuse a model whose per-loan gradients depend on the other loans, on chance, or are not all of the gradient.

    Args:
        summed: From loans and labels to the sum of the per-loan gradients, unclipped, shape (d,).
        whole: To the gradient of the summed loss as autograd has it, shape (d,); None where another way makes sure
            that the per-loan gradients are all of it.
        num_columns: Columns of a loan, p.

    Raises:
        TrainingError: The gradients are not apart, and why.
    """
    loans = np.sin(np.arange(1.0, 2 * num_columns + 1)).astype(np.float32).reshape(2, num_columns)
    labels = np.array([0, 1])
    before = torch.get_rng_state()
    together = summed(loans, labels)
    if not torch.equal(torch.get_rng_state(), before):
        msg = (
            "the model draws from torch's generator, which can be seeded: who knows the seed sees one loan shift the"
            " others' draws; remove dropout and the like (the noise regularises)"
        )
        raise TrainingError(msg)
    apart = [summed(loans[position, None], labels[position, None]) for position in range(2)]
    scale = sum(float(np.linalg.norm(gradient)) for gradient in apart)
    if _differ(together, apart[0] + apart[1], scale):
        msg = (
            "the gradient of one loan depends on the other loans of the batch; the model or the loss mixes them:"
            " compute every logit and every loss from its own loan"
        )
        raise TrainingError(msg)
    if whole is not None and _differ(together, whole(loans, labels), scale):
        msg = (
            "Opacus' hooks do not see the whole gradient: a parameter acts outside of its layer, or the layer is not"
            " supported; call layers themselves, and put a proximal term into training.proximal"
        )
        raise TrainingError(msg)


def _differ(one: NDArray[np.float64], other: NDArray[np.float64], scale: float) -> bool:
    # where weights overflow there is nothing to compare, and such loans will count zero
    difference = float(np.linalg.norm(one - other))
    return bool(np.isfinite([difference, scale]).all()) and difference > _TOLERANCE * scale

"""Per-loan gradients of any layer, by Opacus' hooks: right, but every one of them is made and kept.

Source: Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch" (2021, arXiv:2109.12298).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedfin.errors import TrainingError
from fedfin.privacy.bookkeeping import Blocks, Book
from fedfin.privacy.layers import spans_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Hooked", "SlowGradientWarning"]


class SlowGradientWarning(UserWarning):
    """A module's gradients come from Opacus' hooks, which are right but slow."""


class Hooked:
    """A module with Opacus' hooks on it.

    The invariant: the module has these hooks exactly once, keeps no per-loan gradient between calls, and its
    parameters' `grad` is left as it was.

    Attributes:
        last_gradient: The last batch's summed gradient as autograd has it, shape (d,).
    """

    def __init__(self, module: nn.Module, layers: list[str]) -> None:
        """Put hooks on a module, and say so.

        Args:
            module: The caller's; its parameters may change between calls.
            layers: The class names of the layers for whose sake.

        Raises:
            TrainingError: The module has such hooks already, or Opacus cannot take it.
        """
        with warnings.catch_warnings():
            # Opacus and what it imports warn of their own deprecations at import; nothing we call is meant
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleModule  # noqa: PLC0415  (slow: seconds)

            try:
                self._hooked = GradSampleModule(module, loss_reduction="sum", strict=True)
            except (NotImplementedError, ValueError) as error:
                msg = (
                    f"per-loan gradients of this model are not possible ({type(error).__name__}); use layers"
                    " without buffers (no BatchNorm) and a freshly built module for each training"
                )
                raise TrainingError(msg) from error
        self._spans = spans_of(module)
        self.last_gradient: NDArray[np.float64] = np.zeros(0)
        warnings.warn(
            f"per-loan gradients of {', '.join(layers)} come from Opacus' hooks, ten times slower and more; build the"
            " model of Linear, LayerNorm, Embedding, Conv1d and GroupNorm for the fast step",
            SlowGradientWarning,
            stacklevel=4,
        )

    def books(
        self,
        loans: Tensor,
        output_gradients: Callable[[Tensor], Tensor],
        require_unused: Callable[[tuple[Tensor | None, ...]], None],  # noqa: ARG002  # hooks cannot tell
    ) -> list[Book]:
        """Run one batch forward and back; arguments as `fedfin.privacy.recording.Recorder.books`."""
        kept = [(parameter, parameter.grad) for parameter in self._spans]
        for parameter in self._spans:
            parameter.grad = None
        with warnings.catch_warnings(), torch.enable_grad():
            # torch remarks that the inputs need no gradient; only the parameters' gradients are wanted
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            # a copy: the module may overwrite what it gets, and the loans may be the lender's own table
            logits = self._hooked(loans.clone())
            logits.backward(output_gradients(logits))
        self.last_gradient = np.zeros(sum(parameter.numel() for parameter in self._spans))
        for parameter, span in self._spans.items():
            if parameter.grad is not None:
                self.last_gradient[span] = parameter.grad.reshape(-1).numpy()
        blocks = [
            (span, parameter.grad_sample.reshape(len(loans), -1))  # type: ignore[attr-defined]  # set by Opacus' hooks
            for parameter, span in self._spans.items()
            if getattr(parameter, "grad_sample", None) is not None
        ]
        for parameter, gradient in kept:
            parameter.grad = gradient
            parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own, would accumulate
        return [Blocks(tuple(blocks))]

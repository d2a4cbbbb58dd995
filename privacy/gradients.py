"""The private step: clip every loan's gradient, sum, add Gaussian noise, divide by the expected batch.

Per-loan gradients come from Opacus' hooks (Yousefpour et al. 2021, arXiv:2109.12298); the step is DP-SGD of
Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), algorithm 1, for Poisson-sampled batches.
Opacus' own optimizer, loader and engine are not used: they replace the sampler silently, take the sample rate
from the number of batches and draw their noise from torch's generator. Here rate, batch and noise are arguments.

Adding or removing one loan changes a clipped sum by at most the clipping bound (L2), so noise of standard
deviation `noise_multiplier * clipping_bound` makes the sum a Gaussian mechanism of that noise multiplier.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedfin.errors import PrivacyParameterError, TrainingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.privacy.noise import NoiseSource

__all__ = ["PerLoanGradients", "private_gradient"]


class PerLoanGradients:
    """A module with Opacus' hooks on it, which gives clipped sums of per-loan gradients.

    The invariant: the module has these hooks exactly once and keeps no per-loan gradient between calls.
    """

    def __init__(self, module: nn.Module) -> None:
        """Put hooks on a module; it stays the caller's, and its parameters may change between calls.

        Args:
            module: Maps (n, p) float32 loans to n logits, shape (n,) or (n, 1). No BatchNorm.

        Raises:
            TrainingError: The module mixes loans, or has such hooks already.
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
        self._parameters = list(module.parameters())

    def clipped_sum(
        self, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", clipping_bound: float
    ) -> "NDArray[np.float64]":
        """Return the sum of the loans' loss gradients, each clipped to the bound; one that is not finite counts 0.

        The loss is binary cross-entropy, per loan. Norms, clipping and the sum are in float64.

        Args:
            loans: Encoded loans, shape (n, p); n may be 0 (an empty Poisson draw).
            labels: 1 = bad, shape (n,).
            clipping_bound: Largest L2 norm of one loan's gradient over all parameters, in gradient units; > 0.

        Returns:
            Shape (d,), in the order of the module's parameters.

        Raises:
            PrivacyParameterError: The bound is not positive and finite.
            TrainingError: A loan or label is not finite, or shapes do not fit.
        """
        if not (np.isfinite(clipping_bound) and clipping_bound > 0):
            msg = f"privacy.clipping_bound is {clipping_bound}; it must be a positive number"
            raise PrivacyParameterError(msg)
        _require_finite(loans, labels)
        total = np.zeros(sum(parameter.numel() for parameter in self._parameters))
        if len(loans) == 0:
            return total
        gradients = self._per_loan(loans, labels)
        norms = np.sqrt(sum(np.einsum("np,np->n", block, block) for block in gradients))
        broken = ~np.isfinite(norms)
        if broken.any():
            # Never an error: whether there was one would tell, without noise, that a certain loan is in the table
            # (crafted weights make chosen loans overflow). Such a loan contributes nothing.
            norms = np.where(broken, 0.0, norms)
            for block in gradients:
                block[broken] = 0.0
        factors = np.minimum(1.0, clipping_bound / np.maximum(norms, np.finfo(np.float64).tiny))
        return np.concatenate([factors @ block for block in gradients])

    def _per_loan(
        self, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]"
    ) -> "list[NDArray[np.float64]]":
        """Return one (n, size) block of per-loan gradients for each parameter, and clear the module's."""
        targets = torch.from_numpy(np.asarray(labels, dtype=np.float32))
        with warnings.catch_warnings():
            # torch remarks that the inputs need no gradient; only the parameters' gradients are wanted
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            logits = self._hooked(torch.from_numpy(np.ascontiguousarray(loans, dtype=np.float32)))
            # an (n, 1) loss against (n,) labels broadcasts to (n, n) and silently ruins the clipping
            logits = logits.reshape(len(loans)) if logits.shape == (len(loans), 1) else logits
            if logits.shape != targets.shape:
                msg = f"the model gave logits of shape {tuple(logits.shape)} for {len(loans)} loans; one each is needed"
                raise TrainingError(msg)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        blocks = [
            parameter.grad_sample.reshape(len(loans), -1).numpy().astype(np.float64)  # type: ignore[attr-defined]  # set by Opacus' hooks
            for parameter in self._parameters
        ]
        for parameter in self._parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own, would accumulate
        return blocks


def private_gradient(
    per_loan: PerLoanGradients,
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    *,
    clipping_bound: float,
    noise_multiplier: float,
    expected_batch_size: float,
    noise: "NoiseSource",
) -> "NDArray[np.float64]":
    """Return one noisy mean gradient; an empty batch gives noise alone.

    Args:
        per_loan: The hooked model.
        loans: The batch, shape (n, p).
        labels: 1 = bad, shape (n,).
        clipping_bound: L2 bound of one loan's gradient; > 0.
        noise_multiplier: Standard deviation of the sum's noise over the bound; > 0.
        expected_batch_size: Sample rate times the lender's loans; the divisor, so that the batch's true size
            does not show; > 0.
        noise: Where the Gaussian noise comes from.

    Returns:
        Shape (d,), float64.

    Raises:
        PrivacyParameterError: A parameter is not positive and finite.
        TrainingError: As `PerLoanGradients.clipped_sum`.
    """
    for name, value in (("noise multiplier", noise_multiplier), ("expected batch size", expected_batch_size)):
        if not (np.isfinite(value) and value > 0):
            msg = f"the {name} is {value}; it must be a positive number, or the step would give no protection"
            raise PrivacyParameterError(msg)
    total = per_loan.clipped_sum(loans, labels, clipping_bound)
    noisy = total + noise.normal(len(total), noise_multiplier * clipping_bound)
    return noisy / expected_batch_size


def _require_finite(loans: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> None:
    if loans.ndim != 2 or labels.shape != (len(loans),):
        msg = f"loans have shape {loans.shape} and labels {labels.shape}; give (n, p) and (n,)"
        raise TrainingError(msg)
    if not (np.isfinite(loans).all() and np.isfinite(labels).all()):
        msg = "the encoded loans hold a value that is not finite; one would make every parameter NaN: check the table"
        raise TrainingError(msg)

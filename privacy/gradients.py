"""The private step: clip every loan's gradient, sum, add Gaussian noise, divide by the expected batch.

The step is DP-SGD of Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), algorithm 1, for
Poisson-sampled batches. Norms and clipped sums come in closed form from `fedfin.privacy.bookkeeping`; a module with
any other layer that has parameters gets Opacus' hooks instead (Yousefpour et al. 2021, arXiv:2109.12298), which
are slower by an order of magnitude, and a `SlowGradientWarning` says so. Opacus' own engine, optimizer and loader
are not used: they replace the sampler silently, take the sample rate from the number of batches and draw their noise
from torch's generator. Here rate, batch and noise are arguments, and an Opacus accountant's hook can be attached.

Adding or removing one loan changes a clipped sum by at most the clipping bound (L2), so noise of standard
deviation `noise_multiplier * clipping_bound` makes the sum a Gaussian mechanism of that noise multiplier. Layers
compute in float32, so what one loan changes may pass the bound by rounding; `rounding_share` makes the noise larger.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedfin.errors import PrivacyParameterError, TrainingError
from fedfin.privacy.bookkeeping import add_clipped
from fedfin.privacy.hooks import Hooked, SlowGradientWarning
from fedfin.privacy.layers import spans_of, unrecorded_layers
from fedfin.privacy.probing import NO_BOUND, require_loans_apart
from fedfin.privacy.recording import Recorder
from fedfin.privacy.rounding import LOANS_AT_ONCE, rounding_share

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.privacy.noise import NoiseSource

__all__ = [
    "Loss",
    "PerLoanGradients",
    "PrivateEngine",
    "SlowGradientWarning",
    "binary_cross_entropy",
]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From the logits, as the module gives them but in float64, and the labels in the logits' shape (or (n,), where a
loan has several logits), float64, to one loss for each loan: shape (n,) or (n, 1)."""

_MIXING: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_RANDOM: Final = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Loans of one pass. A plain sequence of layers keeps little of a loan; where there may be tokens, smaller passes stay
# in the caches: the attention model at batch 2048 took 1.14 of plain SGD's time by 1024 loans, and 1.16 by 512.
_LOANS_AT_ONCE_OTHERWISE: Final = 1024


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each loan's negative log-likelihood of its label; logits and labels have shape (n,) or (n, 1)."""
    _require_one_logit_each(logits, labels)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


class PerLoanGradients:
    """Clipped sums of per-loan gradients of a module.

    The invariant: it keeps no loan's gradient between calls, and leaves the parameters' `grad` as it found it.
    """

    def __init__(self, module: nn.Module, loss: Loss = binary_cross_entropy) -> None:
        """Take a module; it stays the caller's, and its parameters may change between calls.

        Args:
            module: Maps (n, p) float32 loans to n logits, shape (n,) or (n, 1), each from its own loan alone.
            loss: From logits and labels to one loss a loan.

        Raises:
            TrainingError: The module mixes loans, draws at random, shares a parameter between layers, or has a
                layer that neither this module nor Opacus can take.
        """
        _require_separable(module)
        self._loss = loss
        self._spans = spans_of(module)
        self._size = sum(parameter.numel() for parameter in self._spans)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        others = unrecorded_layers(module)
        self._backend: Recorder | Hooked = Hooked(module, others) if others else Recorder(module)
        is_plain = isinstance(self._backend, Recorder) and self._backend.is_plain_sequence
        self._loans_at_once = LOANS_AT_ONCE if is_plain else _LOANS_AT_ONCE_OTHERWISE
        # a loss of the caller's may mix loans too, by weighing them against the batch's rate of bad ones
        self._is_known = is_plain and loss is binary_cross_entropy

    @property
    def size(self) -> int:
        """Number of trainable parameters, d."""
        return self._size

    def clipped_sum(
        self, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", clipping_bound: float
    ) -> "NDArray[np.float64]":
        """Return the sum of the loans' loss gradients, each clipped to the bound; one that is not finite counts 0.

        Args:
            loans: Encoded loans, shape (n, p); n may be 0 (an empty Poisson draw).
            labels: 1 = bad, shape (n,).
            clipping_bound: Largest L2 norm of one loan's gradient over all parameters, in gradient units; > 0.

        Returns:
            Shape (d,), in the order of the module's parameters that require a gradient.

        Raises:
            PrivacyParameterError: The bound is not positive and finite.
            TrainingError: A loan or label is not finite, shapes do not fit, the losses are not one for each loan,
                or a parameter acts outside of the layers (a proximal term in the loss, a functional use).
        """
        _require_positive("privacy.clipping_bound", clipping_bound)
        _require_finite(loans, labels)
        if not self._is_known:
            self._is_known = require_loans_apart(self._sum, self._whole_gradient(), loans.shape[1])
        return self._sum(loans, labels, clipping_bound)

    def _sum(
        self, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", clipping_bound: float
    ) -> "NDArray[np.float64]":
        """Return the clipped sum, a part of the batch at a time: memory stays bounded, and the caches warm."""
        total = np.zeros(self._size)
        for start in range(0, len(loans), self._loans_at_once):
            part = slice(start, start + self._loans_at_once)
            inputs = torch.from_numpy(np.ascontiguousarray(loans[part], dtype=np.float32))
            targets = torch.from_numpy(np.asarray(labels[part], dtype=np.float64))
            books = self._backend.books(
                inputs, partial(self._output_gradients, targets), self._require_unused
            )
            # a loan may overflow without a word, see add_clipped
            with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
                add_clipped(books, len(inputs), clipping_bound, total)
        return total

    def _whole_gradient(
        self,
    ) -> "Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]] | None":
        """Return the gradient that Opacus' hooks must see whole; the recorder makes sure of that in every batch."""
        backend = self._backend
        if isinstance(backend, Recorder):
            return None

        def whole(loans: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> "NDArray[np.float64]":
            self._sum(loans, labels, NO_BOUND)
            return backend.last_gradient

        return whole

    def _output_gradients(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient of each loan's loss by its logits, in float64 until the last: sigmoids saturate."""
        if self._loss is binary_cross_entropy:
            _require_one_logit_each(logits, labels)
            return (logits.detach().double().sigmoid_() - labels.view(logits.shape)).to(logits.dtype)
        leaf = logits.detach().double().requires_grad_()
        losses = self._loss(leaf, labels.view(leaf.shape) if leaf.numel() == len(labels) else labels)
        if losses.shape not in ((len(labels),), (len(labels), 1)):
            # a loss of (n, 1) against labels of (n,) is (n, n): every loan's gradient would hold the others'
            msg = (
                f"the loss has shape {tuple(losses.shape)} for {len(labels)} loans; give one loss for each, unreduced:"
                " shape (n,) or (n, 1)"
            )
            raise TrainingError(msg)
        if not losses.requires_grad:
            msg = "the loss does not depend on the logits; give one that does"
            raise TrainingError(msg)
        found = torch.autograd.grad(losses.sum(), [leaf, *self._spans], allow_unused=True)
        self._require_unused(found[1:])
        return found[0].to(logits.dtype)

    def _require_unused(self, gradients: "tuple[Tensor | None, ...]") -> None:
        """Refuse a gradient that reached a parameter past its layer: it would be lost, or not clipped."""
        for parameter, gradient in zip(self._spans, gradients, strict=True):
            if gradient is not None:
                msg = (
                    f"parameter {self._names[parameter]} acts outside of its layer, where a loan's share of its"
                    " gradient cannot be clipped; call the layer itself, and put a proximal term into"
                    " training.proximal, which applies it after the noise"
                )
                raise TrainingError(msg)


class PrivateEngine:
    """DP-SGD's step over one module: noisy mean gradients for any optimizer, and the hook of Opacus' accountants.

    Attributes:
        noise_multiplier: Standard deviation of the sum's noise over the clipping bound; > 0.
        max_grad_norm: The clipping bound, under Opacus' name.
        expected_batch_size: Sample rate times the lender's loans, the divisor; > 0.
        accumulated_iterations: 1: every gradient is a step of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        noise_multiplier: float,
        clipping_bound: float,
        expected_batch_size: float,
        noise: "NoiseSource",
        loss: Loss = binary_cross_entropy,
    ) -> None:
        """Take a module and the step's privacy.

        Args:
            module: As `PerLoanGradients`.
            noise_multiplier: Standard deviation of the sum's noise over the bound; > 0.
            clipping_bound: L2 bound of one loan's gradient; > 0.
            expected_batch_size: The divisor. The true size of a batch is secret and divides nothing; > 0.
            noise: Where the Gaussian noise comes from.
            loss: As `PerLoanGradients`.

        Raises:
            PrivacyParameterError: A parameter is not positive and finite.
            TrainingError: As `PerLoanGradients`.
        """
        _require_positive("the noise multiplier", noise_multiplier)
        _require_positive("privacy.clipping_bound", clipping_bound)
        _require_positive("the expected batch size", expected_batch_size)
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = clipping_bound
        self.expected_batch_size = expected_batch_size
        self.accumulated_iterations = 1
        self._noise = noise
        self._per_loan = PerLoanGradients(module, loss)
        self._step_hook: Callable[[PrivateEngine], None] | None = None

    def attach_step_hook(self, fn: "Callable[[PrivateEngine], None]") -> None:
        """Call `fn` with this engine after every gradient, an empty draw's too; an earlier hook is replaced.

        What `opacus.accountants.*.get_optimizer_hook_fn(sample_rate=q)` returns fits, with the true q.
        """
        self._step_hook = fn

    def gradient(self, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> "NDArray[np.float64]":
        """Return one noisy mean gradient; an empty batch gives noise alone.

        Args:
            loans: The Poisson-sampled batch, shape (n, p), n >= 0.
            labels: 1 = bad, shape (n,).

        Returns:
            Shape (d,), as `PerLoanGradients.clipped_sum`.

        Raises:
            TrainingError: As `PerLoanGradients.clipped_sum`.
        """
        noisy = self._per_loan.clipped_sum(loans, labels, self.max_grad_norm)
        stddev = self.noise_multiplier * self.max_grad_norm * (1.0 + rounding_share(self.expected_batch_size))
        noisy += self._noise.normal(self._per_loan.size, stddev)
        noisy /= self.expected_batch_size
        if self._step_hook is not None:
            self._step_hook(self)
        return noisy


def _require_separable(module: nn.Module) -> None:
    """Refuse what can be seen to mix loans, to draw at random, or to share a parameter."""
    owners: dict[nn.Parameter, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _MIXING):
            msg = (
                f"layer {name or type(layer).__name__} normalises over the batch, so no loan has a gradient of its own;"
                " use LayerNorm or GroupNorm (no BatchNorm)"
            )
            raise TrainingError(msg)
        if isinstance(layer, _RANDOM) and layer.p > 0:
            msg = (
                f"layer {name or type(layer).__name__} drops units by torch's generator, which can be seeded: who knows"
                " the seed sees one loan shift the others' masks; set p to 0 (the noise regularises)"
            )
            raise TrainingError(msg)
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            msg = (
                f"layer {name or type(layer).__name__} shrinks the rows that are looked up to max_norm, without noise:"
                " its weights would tell which ones the loans hold; leave max_norm out"
            )
            raise TrainingError(msg)
        for own, parameter in layer.named_parameters(name, recurse=False):
            if owners.setdefault(parameter, own) != own:
                msg = f"parameter {own} is also {owners[parameter]}; tied layers are not supported, use one layer twice"
                raise TrainingError(msg)


def _require_one_logit_each(logits: Tensor, labels: Tensor) -> None:
    if logits.shape not in ((len(labels),), (len(labels), 1)):
        msg = f"the model gave logits of shape {tuple(logits.shape)} for {len(labels)} loans; one each is needed"
        raise TrainingError(msg)


def _require_positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        msg = f"{name} is {value}; it must be a positive number, or the step would give no protection"
        raise PrivacyParameterError(msg)


def _require_finite(loans: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> None:
    if loans.ndim != 2 or labels.shape != (len(loans),):
        msg = f"loans have shape {loans.shape} and labels {labels.shape}; give (n, p) and (n,)"
        raise TrainingError(msg)
    if not (np.isfinite(loans).all() and np.isfinite(labels).all()):
        msg = "the encoded loans hold a value that is not finite; one would make every parameter NaN: check the table"
        raise TrainingError(msg)

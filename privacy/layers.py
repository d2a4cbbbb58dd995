"""The kinds of layer whose per-loan gradients have a closed form: each one's two passes, and the book it leaves.

Every kind computes what torch's own layer would and keeps its activation; in the backward pass it returns the gradient
by its input alone, having noted its output gradient.

Source: book-keeping, Bu et al., arXiv:2210.00038, section 3.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedfin.privacy.bookkeeping import Blocks, Book, Products, Rows, Sequences, row_norms

__all__ = [
    "KINDS",
    "Kind",
    "Notes",
    "Rectifier",
    "Saved",
    "Spans",
    "has_own_gradient",
    "spans_of",
    "unrecorded_layers",
]

Saved: TypeAlias = tuple[Tensor, ...]
Spans: TypeAlias = dict[Tensor, slice]
aten: Final = torch.ops.aten


class Notes(Protocol):
    """Where the kinds of one module write."""

    owns_gradients: bool
    """Whether an output gradient is nobody else's, so that it may be overwritten."""

    def span(self, parameter: Tensor | None) -> slice | None:
        """Return the parameter's place in the flat vector; None if it is absent or not trained."""
        ...

    def note(self, layer: nn.Module, book: Book) -> None:
        """Keep a layer's book."""
        ...

    def require_loans(self, layer: nn.Module, inputs: Tensor, least_dimensions: int) -> None:
        """Refuse inputs whose first dimension is not the batch."""
        ...


class Kind(Protocol):
    """A layer's two passes."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        """Return the output, and what `backward` needs."""
        ...

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        """Note the book and return the gradient by the input, if it is wanted and there is one."""
        ...


def spans_of(module: nn.Module) -> Spans:
    """Return each trainable parameter's place in the flat vector, in the module's own order."""
    spans: Spans = {}
    start = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            spans[parameter] = slice(start, start + parameter.numel())
            start += parameter.numel()
    return spans


def unrecorded_layers(module: nn.Module) -> list[str]:
    """Return the class names of the layers with trainable parameters of their own that a `Recorder` cannot record."""
    layers = (layer for layer in module.modules() if has_own_gradient(layer))
    return sorted({type(layer).__name__ for layer in layers if not _is_recordable(layer)})


class Rectifier:
    """A rectifier within a chain, where it may overwrite what nobody else reads."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        """See `Kind`; overwrites the inputs."""
        output = inputs.clamp_min_(0.0)
        return output, (output,)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:  # noqa: ARG002
        """See `Kind`; overwrites the gradients."""
        before: Tensor = aten.threshold_backward.grad_input(gradients, saved[0], 0, grad_input=gradients)
        return before


class _Linear:
    def __init__(self, layer: nn.Linear, notes: Notes) -> None:
        self._layer, self._notes = layer, notes
        self._weight, self._bias = notes.span(layer.weight), notes.span(layer.bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        self._notes.require_loans(self._layer, inputs, 2)
        # the norms now, while the inputs are in the cache
        saved = (inputs, row_norms(inputs)) if inputs.dim() == 2 else (inputs,)
        return functional.linear(inputs, self._layer.weight, self._layer.bias), saved

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        self._notes.note(self._layer, self._book(saved, gradients))
        return gradients @ self._layer.weight if wanted else None

    def _book(self, saved: Saved, gradients: Tensor) -> Book:
        inputs = saved[0]
        if len(saved) == 2:
            owned = self._notes.owns_gradients
            return Products(inputs, gradients, self._weight, self._bias, saved[1], owned)
        book = Sequences(inputs.flatten(1, -2), gradients.flatten(1, -2), self._weight, self._bias)
        # the gradients themselves, where they take no more memory than what they are made of
        room = book.activations[0].numel() + book.gradients[0].numel()
        return book.as_blocks() if self._layer.weight.numel() <= room else book


class _LayerNorm:
    def __init__(self, layer: nn.LayerNorm, notes: Notes) -> None:
        self._layer, self._notes = layer, notes
        self._weight, self._bias = notes.span(layer.weight), notes.span(layer.bias)
        self._shape = list(layer.normalized_shape)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._notes.require_loans(layer, inputs, len(self._shape) + 1)
        output, mean, inverse = torch.native_layer_norm(
            inputs, self._shape, layer.weight, layer.bias, layer.eps
        )
        return output, (inputs, mean, inverse)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        inputs, mean, inverse = saved
        layer, blocks = self._layer, []
        if self._weight is not None:
            scaled = (inputs - mean).mul_(inverse).mul_(gradients)
            blocks.append((self._weight, self._by_loan(scaled)))
        if self._bias is not None:
            blocks.append((self._bias, self._by_loan(gradients)))
        self._notes.note(layer, Blocks(tuple(blocks)))
        if not wanted:
            return None
        before: Tensor = aten.native_layer_norm_backward(
            gradients, inputs, self._shape, mean, inverse, layer.weight, layer.bias, [True, False, False]
        )[0]
        return before

    def _by_loan(self, values: Tensor) -> Tensor:
        """Sum (n, ..., *shape) over what is between: (n, size)."""
        between = values.dim() - len(self._shape)
        return (values if between == 1 else values.flatten(1, between - 1).sum(1)).flatten(1)


class _GroupNorm:
    def __init__(self, layer: nn.GroupNorm, notes: Notes) -> None:
        self._layer, self._notes = layer, notes
        self._weight, self._bias = notes.span(layer.weight), notes.span(layer.bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._notes.require_loans(layer, inputs, 2)
        inputs = inputs.contiguous()
        sizes = self._sizes(inputs)
        output, mean, inverse = torch.native_group_norm(inputs, layer.weight, layer.bias, *sizes, layer.eps)
        return output, (inputs, mean, inverse)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        inputs, mean, inverse = saved
        gradients, blocks = gradients.contiguous(), []
        if self._weight is not None:
            grouped = inputs.view(*mean.shape, -1)
            scaled = ((grouped - mean[..., None]) * inverse[..., None]).view(inputs.shape).mul_(gradients)
            blocks.append((self._weight, scaled.flatten(2).sum(2) if scaled.dim() > 2 else scaled))
        if self._bias is not None:
            blocks.append((self._bias, gradients.flatten(2).sum(2) if gradients.dim() > 2 else gradients))
        self._notes.note(self._layer, Blocks(tuple(blocks)))
        if not wanted:
            return None
        before: Tensor = aten.native_group_norm_backward(
            gradients, inputs, mean, inverse, self._layer.weight, *self._sizes(inputs), [True, False, False]
        )[0]
        return before

    def _sizes(self, inputs: Tensor) -> tuple[int, int, int, int]:
        return inputs.shape[0], inputs.shape[1], inputs[0, 0].numel(), self._layer.num_groups


class _Conv1d:
    def __init__(self, layer: nn.Conv1d, notes: Notes) -> None:
        self._layer, self._notes = layer, notes
        self._weight, self._bias = notes.span(layer.weight), notes.span(layer.bias)
        self._left, self._right = _paddings(layer)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._notes.require_loans(layer, inputs, 3)
        if self._left or self._right:
            inputs = functional.pad(inputs, (self._left, self._right))
        output = functional.conv1d(
            inputs, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
        )
        return output, (inputs,)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        layer, (inputs,), blocks = self._layer, saved, []
        if self._weight is not None:
            windows = functional.unfold(
                inputs[:, :, None],
                (1, layer.kernel_size[0]),
                dilation=(1, layer.dilation[0]),
                stride=(1, layer.stride[0]),
            )
            of_windows = windows.view(len(inputs), layer.groups, -1, windows.shape[2])
            of_gradients = gradients.reshape(len(inputs), layer.groups, -1, windows.shape[2])
            blocks.append((self._weight, (of_gradients @ of_windows.mT).flatten(1)))
        if self._bias is not None:
            blocks.append((self._bias, gradients.sum(2)))
        self._notes.note(layer, Blocks(tuple(blocks)))
        if not wanted:
            return None
        settings = (layer.stride, [0], layer.dilation, False, [0], layer.groups)
        before: Tensor = aten.convolution_backward(
            gradients, inputs, layer.weight, None, *settings, [True, False, False]
        )[0]
        return before[:, :, self._left : before.shape[2] - self._right]


class _Embedding:
    def __init__(self, layer: nn.Embedding, notes: Notes) -> None:
        self._layer, self._notes = layer, notes
        self._weight = notes.span(layer.weight)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        self._notes.require_loans(self._layer, inputs, 1)
        return functional.embedding(inputs, self._layer.weight), (inputs,)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:  # noqa: ARG002
        (indices,), padding = saved, self._layer.padding_idx
        if padding is not None:
            gradients = gradients.masked_fill((indices == padding)[..., None], 0.0)
        if self._weight is not None:
            num_loans, width = len(indices), gradients.shape[-1]
            book = Rows(indices.reshape(num_loans, -1), gradients.reshape(num_loans, -1, width), self._weight)
            self._notes.note(self._layer, book)
        return None


KINDS: Final[dict[type[nn.Module], Callable[[Any, Notes], Kind]]] = {
    nn.Linear: _Linear,
    nn.LayerNorm: _LayerNorm,
    nn.GroupNorm: _GroupNorm,
    nn.Conv1d: _Conv1d,
    nn.Embedding: _Embedding,
}


def has_own_gradient(layer: nn.Module) -> bool:
    """Whether the layer has trainable parameters that are its own and not a sublayer's."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _is_recordable(layer: nn.Module) -> bool:
    # exact types: a subclass may compute something else; other parameter names mean a reparametrised layer
    named = {name for name, _ in layer.named_parameters(recurse=False)}
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return False
    if isinstance(layer, nn.Conv1d) and layer.padding_mode != "zeros":
        return False
    return type(layer) in KINDS and "forward" not in layer.__dict__ and named <= {"weight", "bias"}


def _paddings(layer: nn.Conv1d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[0] * (layer.kernel_size[0] - 1)
        return total // 2, total - total // 2
    return int(layer.padding[0]), int(layer.padding[0])

"""Per-loan gradients in closed form: one forward pass, one backward pass to the activations, and no more.

A layer's gradient for one loan is a product of what went into the layer (its activation) and what came back to its
output (its output gradient). A `Recorder` notes the two for every layer while torch goes forward and back as usual;
the weights' own gradients are not computed there. From its `Book` a layer then gives the squared norm of each loan's
gradient and, once the clipping factors are known, the weighted sum: one matrix product, the one that plain training
would have done.

Source: Bu, Wang, Zha & Karypis, "Differentially Private Optimization on Large Model at Small Cost" (ICML 2023,
arXiv:2210.00038), section 3. For a Linear layer on (n, i) the norm is |activation| * |output gradient| (Goodfellow,
"Efficient Per-Example Gradient Computations", arXiv:1510.01799). Over sequences a loan's gradient is a sum whose
terms may cancel, so there its norm is taken from the sum itself and not from Gram matrices, which lose the
difference of large numbers: a norm that came out too small would let a loan pass the clipping bound.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from fedfin.errors import TrainingError

__all__ = ["Blocks", "Book", "Recorder", "spans_of", "unrecorded_layers"]

Spans: TypeAlias = dict[nn.Parameter, slice]

_CHUNK: Final = 1 << 20  # values of per-loan gradients that exist at a time where they are only measured
# squares of float32 values below 1e-19 vanish, which only matters beside factors as large as this
_LARGEST_SQUARE: Final = 1e12


class Book(Protocol):
    """One layer's part in the gradients of a batch of n loans."""

    def squared_norms(self) -> Tensor:
        """Return each loan's squared L2 norm, shape (n,); infinite or NaN where it must be taken in float64."""
        ...

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """Add the sum of the loans' gradients, each times its factor, to the flat vector `total`, shape (d,)."""
        ...

    def take(self, loans: Tensor) -> "Book":
        """Return the book of these loans alone, in float64; `loans` is a mask of shape (n,)."""
        ...

    def without(self, loans: Tensor) -> "Book":
        """Return the book with these loans' gradients set to zero."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """Per-loan gradients as they are: for each parameter its place in the flat vector and a block (n, size)."""

    blocks: tuple[tuple[slice, Tensor], ...]

    def squared_norms(self) -> Tensor:
        """See `Book`."""
        return torch.stack([_squares(block) for _, block in self.blocks]).sum(0)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """See `Book`."""
        for span, block in self.blocks:
            total[span] += factors @ block

    def take(self, loans: Tensor) -> "Blocks":
        """See `Book`."""
        return Blocks(tuple((span, block[loans].double()) for span, block in self.blocks))

    def without(self, loans: Tensor) -> "Blocks":
        """See `Book`."""
        return Blocks(tuple((span, _zeroed(block, loans)) for span, block in self.blocks))

    def plus(self, other: "Blocks") -> "Blocks":
        """Return the gradients of a layer that was used twice: the sum of both uses'."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Blocks(tuple((span, mine + theirs) for (span, mine), (_, theirs) in pairs))


@dataclass(frozen=True, slots=True)
class _Products:
    """A Linear layer's book: activations (n, t, i) and output gradients (n, t, o), t = 1 without a sequence."""

    activations: Tensor
    gradients: Tensor
    weight: slice | None
    bias: slice | None

    def squared_norms(self) -> Tensor:
        activations, gradients = self.activations, self.gradients
        if activations.shape[1] > 1:
            return torch.cat([self._squared_norms_of(part) for part in self._chunks()])
        of_activations, of_gradients = _squares(activations[:, 0]), _squares(gradients[:, 0])
        if self.weight is None:
            return of_gradients
        norms = of_gradients * (of_activations + 1.0 if self.bias is not None else of_activations)
        if activations.dtype == torch.float32:
            norms = torch.where(of_activations < _LARGEST_SQUARE, norms, math.inf)
        return norms

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        weighted = self.gradients * factors[:, None, None]
        if self.weight is not None:
            shape = (weighted.shape[2], self.activations.shape[2])
            total[self.weight].view(shape).addmm_(weighted.flatten(0, 1).t(), self.activations.flatten(0, 1))
        if self.bias is not None:
            total[self.bias] += weighted.sum((0, 1))

    def take(self, loans: Tensor) -> "_Products":
        return _Products(
            self.activations[loans].double(), self.gradients[loans].double(), self.weight, self.bias
        )

    def without(self, loans: Tensor) -> "_Products":
        activations, gradients = _zeroed(self.activations, loans), _zeroed(self.gradients, loans)
        return _Products(activations, gradients, self.weight, self.bias)

    def as_blocks(self) -> Blocks:
        """Return the gradients themselves."""
        blocks: list[tuple[slice, Tensor]] = []
        if self.weight is not None:
            blocks.append((self.weight, torch.bmm(self.gradients.mT, self.activations).flatten(1)))
        if self.bias is not None:
            blocks.append((self.bias, self.gradients.sum(1)))
        return Blocks(tuple(blocks))

    def _chunks(self) -> "Iterator[_Products]":
        size = max(1, _CHUNK // (self.activations.shape[2] * self.gradients.shape[2]))
        pairs = zip(self.activations.split(size), self.gradients.split(size), strict=True)
        return (_Products(activations, gradients, self.weight, self.bias) for activations, gradients in pairs)

    @staticmethod
    def _squared_norms_of(part: "_Products") -> Tensor:
        return part.as_blocks().squared_norms()


@dataclass(frozen=True, slots=True)
class _Rows:
    """An Embedding's book: which rows each loan looked up, (n, t), and the gradients of what it got, (n, t, width)."""

    indices: Tensor
    gradients: Tensor
    weight: slice

    def squared_norms(self) -> Tensor:
        if self.indices.shape[1] == 1:
            return _squares(self.gradients[:, 0])
        # rows looked up twice by one loan add up; in float64, for the sums may cancel
        gradients = self.gradients.double()
        same = self.indices[:, :, None] == self.indices[:, None, :]
        products = (torch.bmm(gradients, gradients.mT) * same).sum((1, 2))
        return products.clamp_min(0.0).to(self.gradients.dtype)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        weighted = (self.gradients * factors[:, None, None]).flatten(0, 1)
        total[self.weight].view(-1, weighted.shape[1]).index_add_(0, self.indices.flatten(), weighted)

    def take(self, loans: Tensor) -> "_Rows":
        return _Rows(self.indices[loans], self.gradients[loans].double(), self.weight)

    def without(self, loans: Tensor) -> "_Rows":
        return _Rows(self.indices, _zeroed(self.gradients, loans), self.weight)

    def as_blocks(self) -> Blocks:
        """Return the gradients themselves: the whole table for each loan."""
        num_loans, _, width = self.gradients.shape
        table = self.gradients.new_zeros(num_loans, (self.weight.stop - self.weight.start) // width, width)
        table.scatter_add_(1, self.indices[:, :, None].expand_as(self.gradients), self.gradients)
        return Blocks(((self.weight, table.flatten(1)),))


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
    layers = (layer for layer in module.modules() if _own_parameters(layer))
    return sorted({type(layer).__name__ for layer in layers if not _is_recordable(layer)})


class Recorder:
    """Notes activations and output gradients of a module's layers, for one batch at a time.

    The invariant: outside of `recording` the module is as the caller made it. Within, its layers' `forward` is
    ours, which computes the same values.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take a module of which `unrecorded_layers` names none."""
        self._spans = spans_of(module)
        self._books: dict[nn.Module, Book] = {}
        self._num_loans = 0
        self._layers = [
            (layer, _RECORDED[type(layer)](layer, self))
            for layer in module.modules()
            if _own_parameters(layer)
        ]

    @contextmanager
    def recording(self, num_loans: int) -> Iterator[dict[nn.Module, Book]]:
        """Record one forward and backward pass of `num_loans` loans; the books fill during the backward pass.

        Raises:
            TrainingError: A layer saw rows that are not one for each loan.
        """
        self._books, self._num_loans = {}, num_loans
        try:
            for layer, forward in self._layers:
                layer.forward = forward
            yield self._books
        finally:
            for layer, _ in self._layers:
                layer.__dict__.pop("forward", None)
            self._books = {}

    def span(self, parameter: nn.Parameter | None) -> slice | None:
        """Return the parameter's place in the flat vector; None if it is absent or not trained."""
        return None if parameter is None else self._spans.get(parameter)

    def note(self, layer: nn.Module, book: "_Products | _Rows | Blocks") -> None:
        """Keep a layer's book; a layer used twice has the sum of both."""
        before = self._books.get(layer)
        if before is None:
            self._books[layer] = book
        else:
            self._books[layer] = _as_blocks(before).plus(_as_blocks(book))

    def require_loans(self, layer: nn.Module, inputs: Tensor, least_dimensions: int) -> None:
        """Refuse inputs whose first dimension is not the batch.

        Raises:
            TrainingError: They are not one row for each loan.
        """
        if inputs.dim() < least_dimensions or inputs.shape[0] != self._num_loans:
            msg = (
                f"layer {type(layer).__name__} saw an input of shape {tuple(inputs.shape)} for {self._num_loans} loans;"
                " the first dimension must be the loans, or their gradients cannot be told apart"
            )
            raise TrainingError(msg)


def _linear(layer: nn.Linear, recorder: Recorder) -> Callable[[Tensor], Tensor]:
    weight, bias = recorder.span(layer.weight), recorder.span(layer.bias)

    def note(inputs: Tensor, gradients: Tensor) -> None:
        products = _Products(_as_sequence(inputs), _as_sequence(gradients), weight, bias)
        _, length, width = products.activations.shape
        # the gradients themselves, where they take no more memory than what they are made of
        small = length > 1 and layer.weight.numel() <= length * (width + gradients.shape[-1])
        recorder.note(layer, products.as_blocks() if small else products)

    def forward(inputs: Tensor) -> Tensor:
        recorder.require_loans(layer, inputs, 2)
        return _Linear.apply(inputs, layer.weight, layer.bias, note)  # type: ignore[no-any-return]

    return forward


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, note: Any) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inputs, weight)
        ctx.note = note
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        inputs, weight = ctx.saved_tensors
        ctx.note(inputs, gradients[0])
        return (gradients[0] @ weight if ctx.needs_input_grad[0] else None), None, None, None


def _layer_norm(layer: nn.LayerNorm, recorder: Recorder) -> Callable[[Tensor], Tensor]:
    weight, bias = recorder.span(layer.weight), recorder.span(layer.bias)
    num_dimensions = len(layer.normalized_shape)

    def note(scaled: Tensor, gradients: Tensor) -> None:
        blocks: list[tuple[slice, Tensor]] = []
        for span, block in ((weight, scaled), (bias, gradients)):
            if span is not None:
                between = (
                    block.flatten(1, block.dim() - num_dimensions - 1)
                    if block.dim() > num_dimensions + 1
                    else block[:, None]
                )
                blocks.append((span, between.sum(1).flatten(1)))
        recorder.note(layer, Blocks(tuple(blocks)))

    def forward(inputs: Tensor) -> Tensor:
        recorder.require_loans(layer, inputs, num_dimensions + 1)
        return _LayerNorm.apply(inputs, layer.weight, layer.bias, layer, note)  # type: ignore[no-any-return]

    return forward


class _LayerNorm(Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: nn.LayerNorm,
        note: Any,  # noqa: ANN401
    ) -> Tensor:
        shape = list(layer.normalized_shape)
        output, mean, inverse = torch.native_layer_norm(inputs, shape, weight, bias, layer.eps)
        ctx.save_for_backward(inputs, weight, bias, mean, inverse)
        ctx.shape, ctx.note = shape, note
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        inputs, weight, bias, mean, inverse = ctx.saved_tensors
        ctx.note((inputs - mean).mul_(inverse).mul_(gradients[0]), gradients[0])
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        before = torch.ops.aten.native_layer_norm_backward(
            gradients[0], inputs, ctx.shape, mean, inverse, weight, bias, [True, False, False]
        )
        return before[0], None, None, None, None


def _group_norm(layer: nn.GroupNorm, recorder: Recorder) -> Callable[[Tensor], Tensor]:
    weight, bias = recorder.span(layer.weight), recorder.span(layer.bias)

    def note(scaled: Tensor, gradients: Tensor) -> None:
        blocks = [
            (span, block.flatten(2).sum(2) if block.dim() > 2 else block)
            for span, block in ((weight, scaled), (bias, gradients))
            if span is not None
        ]
        recorder.note(layer, Blocks(tuple(blocks)))

    def forward(inputs: Tensor) -> Tensor:
        recorder.require_loans(layer, inputs, 2)
        return _GroupNorm.apply(inputs, layer.weight, layer.bias, layer, note)  # type: ignore[no-any-return]

    return forward


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, layer: nn.GroupNorm, note: Any
    ) -> Tensor:
        inputs = inputs.contiguous()
        num_loans, num_channels = inputs.shape[:2]
        sizes = (num_loans, num_channels, inputs[0, 0].numel(), layer.num_groups)
        output, mean, inverse = torch.native_group_norm(inputs, weight, bias, *sizes, layer.eps)
        ctx.save_for_backward(inputs, weight, mean, inverse)
        ctx.sizes, ctx.note = sizes, note
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        grouped = inputs.reshape(*mean.shape, -1)
        scaled = ((grouped - mean[:, :, None]) * inverse[:, :, None]).reshape(inputs.shape)
        ctx.note(scaled * gradient, gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        before = torch.ops.aten.native_group_norm_backward(
            gradient, inputs, mean, inverse, weight, *ctx.sizes, [True, False, False]
        )
        return before[0], None, None, None, None


def _conv1d(layer: nn.Conv1d, recorder: Recorder) -> Callable[[Tensor], Tensor]:
    weight, bias = recorder.span(layer.weight), recorder.span(layer.bias)
    padding = _paddings(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    def note(inputs: Tensor, gradients: Tensor) -> None:
        blocks: list[tuple[slice, Tensor]] = []
        if weight is not None:
            windows = functional.unfold(
                inputs[:, :, None],
                (1, layer.kernel_size[0]),
                dilation=(1, layer.dilation[0]),
                stride=(1, layer.stride[0]),
            )
            by_group = windows.unflatten(1, (layer.groups, -1))
            of_group = gradients.unflatten(1, (layer.groups, -1))
            blocks.append((weight, (of_group @ by_group.mT).flatten(1)))
        if bias is not None:
            blocks.append((bias, gradients.sum(2)))
        recorder.note(layer, Blocks(tuple(blocks)))

    def forward(inputs: Tensor) -> Tensor:
        recorder.require_loans(layer, inputs, 3)
        padded = functional.pad(inputs, padding, mode=mode) if any(padding) else inputs
        return _Conv1d.apply(padded, layer.weight, layer.bias, layer, note)  # type: ignore[no-any-return]

    return forward


class _Conv1d(Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv1d, note: Any
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer, ctx.note = layer, note
        return functional.conv1d(inputs, weight, bias, layer.stride, 0, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        ctx.note(inputs, gradients[0])
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        layer = ctx.layer
        before = torch.ops.aten.convolution_backward(
            gradients[0],
            inputs,
            weight,
            None,
            layer.stride,
            [0],
            layer.dilation,
            False,
            [0],
            layer.groups,
            [True, False, False],
        )
        return before[0], None, None, None, None


def _embedding(layer: nn.Embedding, recorder: Recorder) -> Callable[[Tensor], Tensor]:
    weight = recorder.span(layer.weight)

    def note(indices: Tensor, gradients: Tensor) -> None:
        if layer.padding_idx is not None:
            gradients = gradients.masked_fill((indices == layer.padding_idx)[..., None], 0.0)
        if weight is not None:
            rows = _Rows(
                indices.flatten(1) if indices.dim() > 1 else indices[:, None], _as_sequence(gradients), weight
            )
            recorder.note(layer, rows)

    def forward(indices: Tensor) -> Tensor:
        recorder.require_loans(layer, indices, 1)
        return _Embedding.apply(indices, layer.weight, note)  # type: ignore[no-any-return]

    return forward


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, note: Any) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.note = note
        return functional.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        ctx.note(indices, gradients[0])
        return None, None, None


_RECORDED: Final[dict[type[nn.Module], Callable[[Any, Recorder], Callable[[Tensor], Tensor]]]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Conv1d: _conv1d,
    nn.Embedding: _embedding,
}


def _own_parameters(layer: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that are the layer's and not a sublayer's."""
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad]


def _is_recordable(layer: nn.Module) -> bool:
    # exact types: a subclass may compute something else; other parameter names mean a reparametrised layer
    named = {name for name, _ in layer.named_parameters(recurse=False)}
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return False
    return type(layer) in _RECORDED and "forward" not in layer.__dict__ and named <= {"weight", "bias"}


def _as_blocks(book: Book) -> Blocks:
    if isinstance(book, _Products | _Rows):
        return book.as_blocks()
    assert isinstance(book, Blocks)
    return book


def _as_sequence(values: Tensor) -> Tensor:
    """Return (n, width) as (n, 1, width), and (n, ..., width) as (n, t, width)."""
    return values[:, None] if values.dim() == 2 else values.flatten(1, -2)


def _paddings(layer: nn.Conv1d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[0] * (layer.kernel_size[0] - 1)
        return total // 2, total - total // 2
    return int(layer.padding[0]), int(layer.padding[0])


def _squares(block: Tensor) -> Tensor:
    """Return the sum of squares of each row, shape (n,)."""
    return (block * block).sum(1)


def _zeroed(values: Tensor, loans: Tensor) -> Tensor:
    """Return a copy with the rows of these loans zero, also where they are not finite."""
    return values.masked_fill(loans.view(-1, *[1] * (values.dim() - 1)), 0.0)

"""One forward and one backward pass of a batch that leave a book for every layer, and no gradient of a weight.

Every kind of layer here computes what torch's own would, keeps its activation, and in the backward pass returns the
gradient by its input alone, having noted its output gradient. A plain `nn.Sequential` of such layers is run without
autograd at all, which saves what autograd costs on small batches; in any other module the layers' `forward` is ours
for the time of a pass, and autograd links them.

Source: book-keeping, Bu et al., arXiv:2210.00038, section 3.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from fedfin.errors import TrainingError
from fedfin.privacy.bookkeeping import Blocks, Book, Products, Rows, Sequences, row_norms

__all__ = ["Recorder", "spans_of", "unrecorded_layers"]

Saved: TypeAlias = tuple[Tensor, ...]
Spans: TypeAlias = dict[Tensor, slice]
aten: Final = torch.ops.aten


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
    layers = (layer for layer in module.modules() if _trainable(layer))
    return sorted({type(layer).__name__ for layer in layers if not _is_recordable(layer)})


class Recorder:
    """Runs batches through a module and returns the layers' books.

    The invariant: between calls the module is as the caller made it, and nothing of a batch is kept.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take a module of which `unrecorded_layers` names none."""
        self._module = module
        self._spans = spans_of(module)
        self._books: dict[nn.Module, Book] = {}
        self._num_loans = 0
        self.owns_gradients = (
            False  # whether an output gradient is nobody else's, so that it may be overwritten
        )
        self._kinds = {
            layer: _KINDS[type(layer)](layer, self) for layer in module.modules() if _trainable(layer)
        }
        self._chain = self._chain_of(module)

    @property
    def is_plain_sequence(self) -> bool:
        """Whether the module is nothing but a sequence of known layers, none of which can mix loans."""
        return self._chain is not None

    def books(
        self,
        loans: Tensor,
        output_gradients: Callable[[Tensor], Tensor],
        require_unused: Callable[[tuple[Tensor | None, ...]], None],
    ) -> list[Book]:
        """Run one batch forward and back.

        Args:
            loans: Shape (n, p), n >= 1.
            output_gradients: From the module's output to the gradient by it.
            require_unused: Called with what autograd found for each trainable parameter past the layers' books; any
                but None means that a part of the gradient is not in the books.

        Raises:
            TrainingError: A layer saw rows that are not one for each loan.
        """
        self._num_loans = len(loans)
        try:
            self.owns_gradients = self._chain is not None
            if self._chain is not None:
                self._run_chain(self._chain, loans, output_gradients)
            else:
                with self._layers_replaced(), torch.enable_grad():
                    output = self._module(loans)
                    gradients = output_gradients(output)
                    parameters = list(self._spans)
                    require_unused(torch.autograd.grad(output, parameters, gradients, allow_unused=True))
            return list(self._books.values())
        finally:
            self._books = {}

    def span(self, parameter: Tensor | None) -> slice | None:
        """Return the parameter's place in the flat vector; None if it is absent or not trained."""
        return None if parameter is None else self._spans.get(parameter)

    def note(self, layer: nn.Module, book: Book) -> None:
        """Keep a layer's book; a layer used twice has the sum of both."""
        before = self._books.get(layer)
        self._books[layer] = book if before is None else before.as_blocks().plus(book.as_blocks())

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

    @contextmanager
    def _layers_replaced(self) -> Generator[None]:
        try:
            for layer, kind in self._kinds.items():
                # past Module.__setattr__, which is slow
                layer.__dict__["forward"] = _through_autograd(kind, layer)
            yield
        finally:
            for layer in self._kinds:
                layer.__dict__.pop("forward", None)

    def _chain_of(self, module: nn.Module) -> "list[_Kind] | None":
        """Return the kinds of a plain sequence of layers, in order; None for any other module."""
        # an altered forward, or hooks, are heard where torch itself calls the layers
        if any(module.__dict__.get(name) for name in ("forward", "_forward_hooks", "_forward_pre_hooks")):
            return None
        if type(module) is nn.Sequential:
            chains = [self._chain_of(layer) for layer in module]
            return None if None in chains else [kind for chain in chains if chain for kind in chain]
        if type(module) is nn.ReLU:
            return [_ReLU()]
        return [self._kinds[module]] if module in self._kinds else None

    def _run_chain(
        self, chain: "list[_Kind]", loans: Tensor, output_gradients: Callable[[Tensor], Tensor]
    ) -> None:
        # Fresh memory for every intermediate costs as much as the arithmetic on it, so what nobody else reads is
        # overwritten: outputs and output gradients, but never the loans.
        values = loans.clone() if chain and isinstance(chain[0], _ReLU) else loans
        kept: list[Saved] = []
        with torch.no_grad():
            for kind in chain:
                values, saved = kind.forward(values)
                kept.append(saved)
        gradients: Tensor | None = output_gradients(values)
        with torch.no_grad():
            for position in reversed(range(len(chain))):
                assert gradients is not None  # noqa: S101  # only the first layer returns none
                gradients = chain[position].backward(kept.pop(), gradients, wanted=position > 0)


class _Kind(Protocol):
    """A layer's two passes."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        """Return the output, and what `backward` needs."""
        ...

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        """Note the book and return the gradient by the input, if it is wanted and there is one."""
        ...


class _ReLU:
    """A rectifier within a chain, where it may overwrite what nobody else reads."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        output = inputs.clamp_min_(0.0)
        return output, (output,)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:  # noqa: ARG002
        before: Tensor = aten.threshold_backward.grad_input(gradients, saved[0], 0, grad_input=gradients)
        return before


class _Linear:
    def __init__(self, layer: nn.Linear, recorder: Recorder) -> None:
        self._layer, self._recorder = layer, recorder
        self._weight, self._bias = recorder.span(layer.weight), recorder.span(layer.bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        self._recorder.require_loans(self._layer, inputs, 2)
        # the norms now, while the inputs are in the cache
        saved = (inputs, row_norms(inputs)) if inputs.dim() == 2 else (inputs,)
        return functional.linear(inputs, self._layer.weight, self._layer.bias), saved

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        self._recorder.note(self._layer, self._book(saved, gradients))
        return gradients @ self._layer.weight if wanted else None

    def _book(self, saved: Saved, gradients: Tensor) -> Book:
        inputs = saved[0]
        if len(saved) == 2:
            owned = self._recorder.owns_gradients
            return Products(inputs, gradients, self._weight, self._bias, saved[1], owned)
        book = Sequences(inputs.flatten(1, -2), gradients.flatten(1, -2), self._weight, self._bias)
        # the gradients themselves, where they take no more memory than what they are made of
        room = book.activations[0].numel() + book.gradients[0].numel()
        return book.as_blocks() if self._layer.weight.numel() <= room else book


class _LayerNorm:
    def __init__(self, layer: nn.LayerNorm, recorder: Recorder) -> None:
        self._layer, self._recorder = layer, recorder
        self._weight, self._bias = recorder.span(layer.weight), recorder.span(layer.bias)
        self._shape = list(layer.normalized_shape)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._recorder.require_loans(layer, inputs, len(self._shape) + 1)
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
        self._recorder.note(layer, Blocks(tuple(blocks)))
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
    def __init__(self, layer: nn.GroupNorm, recorder: Recorder) -> None:
        self._layer, self._recorder = layer, recorder
        self._weight, self._bias = recorder.span(layer.weight), recorder.span(layer.bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._recorder.require_loans(layer, inputs, 2)
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
        self._recorder.note(self._layer, Blocks(tuple(blocks)))
        if not wanted:
            return None
        before: Tensor = aten.native_group_norm_backward(
            gradients, inputs, mean, inverse, self._layer.weight, *self._sizes(inputs), [True, False, False]
        )[0]
        return before

    def _sizes(self, inputs: Tensor) -> tuple[int, int, int, int]:
        return inputs.shape[0], inputs.shape[1], inputs[0, 0].numel(), self._layer.num_groups


class _Conv1d:
    def __init__(self, layer: nn.Conv1d, recorder: Recorder) -> None:
        self._layer, self._recorder = layer, recorder
        self._weight, self._bias = recorder.span(layer.weight), recorder.span(layer.bias)
        self._left, self._right = _paddings(layer)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        layer = self._layer
        self._recorder.require_loans(layer, inputs, 3)
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
        self._recorder.note(layer, Blocks(tuple(blocks)))
        if not wanted:
            return None
        settings = (layer.stride, [0], layer.dilation, False, [0], layer.groups)
        before: Tensor = aten.convolution_backward(
            gradients, inputs, layer.weight, None, *settings, [True, False, False]
        )[0]
        return before[:, :, self._left : before.shape[2] - self._right]


class _Embedding:
    def __init__(self, layer: nn.Embedding, recorder: Recorder) -> None:
        self._layer, self._recorder = layer, recorder
        self._weight = recorder.span(layer.weight)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Saved]:
        self._recorder.require_loans(self._layer, inputs, 1)
        return functional.embedding(inputs, self._layer.weight), (inputs,)

    def backward(self, saved: Saved, gradients: Tensor, *, wanted: bool) -> Tensor | None:  # noqa: ARG002
        (indices,), padding = saved, self._layer.padding_idx
        if padding is not None:
            gradients = gradients.masked_fill((indices == padding)[..., None], 0.0)
        if self._weight is not None:
            num_loans, width = len(indices), gradients.shape[-1]
            book = Rows(indices.reshape(num_loans, -1), gradients.reshape(num_loans, -1, width), self._weight)
            self._recorder.note(self._layer, book)
        return None


class _Recorded(Function):
    """A kind between two of autograd's own operations; the parameters are named so that a gradient flows at all."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, inputs: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        output, saved = kind.forward(inputs)
        ctx.kind, ctx.num_parameters = kind, len(parameters)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        before = ctx.kind.backward(ctx.saved_tensors, gradients[0], wanted=ctx.needs_input_grad[1])
        return None, before, *[None] * ctx.num_parameters


def _through_autograd(kind: _Kind, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    parameters = list(layer.parameters())
    return lambda inputs: _Recorded.apply(kind, inputs, *parameters)  # type: ignore[no-untyped-call]  # torch leaves it untyped


_KINDS: Final[dict[type[nn.Module], Callable[[Any, Recorder], _Kind]]] = {
    nn.Linear: _Linear,
    nn.LayerNorm: _LayerNorm,
    nn.GroupNorm: _GroupNorm,
    nn.Conv1d: _Conv1d,
    nn.Embedding: _Embedding,
}


def _trainable(layer: nn.Module) -> bool:
    """Whether the layer has trainable parameters that are its own and not a sublayer's."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _is_recordable(layer: nn.Module) -> bool:
    # exact types: a subclass may compute something else; other parameter names mean a reparametrised layer
    named = {name for name, _ in layer.named_parameters(recurse=False)}
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return False
    if isinstance(layer, nn.Conv1d) and layer.padding_mode != "zeros":
        return False
    return type(layer) in _KINDS and "forward" not in layer.__dict__ and named <= {"weight", "bias"}


def _paddings(layer: nn.Conv1d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[0] * (layer.kernel_size[0] - 1)
        return total // 2, total - total // 2
    return int(layer.padding[0]), int(layer.padding[0])

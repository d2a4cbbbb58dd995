"""One forward and one backward pass of a batch that leave a book for every layer, and no gradient of a weight.

A plain `nn.Sequential` of the kinds in `fedfin.privacy.layers` is run without autograd at all, which saves what
autograd costs on small batches; in any other module the layers' `forward` is ours for the time of a pass, and autograd
links them.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fedfin.errors import TrainingError
from fedfin.privacy.bookkeeping import Book
from fedfin.privacy.layers import KINDS, Kind, Rectifier, Saved, has_own_gradient, spans_of

__all__ = ["Recorder"]


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
            layer: KINDS[type(layer)](layer, self) for layer in module.modules() if has_own_gradient(layer)
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
                    # a copy: the module may overwrite what it gets, and the loans may be the lender's own table
                    output = self._module(loans.clone())
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

    def _chain_of(self, module: nn.Module) -> "list[Kind] | None":
        """Return the kinds of a plain sequence of layers, in order; None for any other module."""
        # an altered forward, or hooks, are heard where torch itself calls the layers
        if any(module.__dict__.get(name) for name in ("forward", "_forward_hooks", "_forward_pre_hooks")):
            return None
        if type(module) is nn.Sequential:
            chains = [self._chain_of(layer) for layer in module]
            return None if None in chains else [kind for chain in chains if chain for kind in chain]
        if type(module) is nn.ReLU:
            return [Rectifier()]
        return [self._kinds[module]] if module in self._kinds else None

    def _run_chain(
        self, chain: "list[Kind]", loans: Tensor, output_gradients: Callable[[Tensor], Tensor]
    ) -> None:
        # Fresh memory for every intermediate costs as much as the arithmetic on it, so what nobody else reads is
        # overwritten: outputs and output gradients, but never the loans.
        values = loans.clone() if chain and isinstance(chain[0], Rectifier) else loans
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


class _Recorded(Function):
    """A kind between two of autograd's own operations; the parameters are named so that a gradient flows at all."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, inputs: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        output, saved = kind.forward(inputs)
        ctx.kind, ctx.num_parameters = kind, len(parameters)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        before = ctx.kind.backward(ctx.saved_tensors, gradients[0], wanted=ctx.needs_input_grad[1])
        return None, before, *[None] * ctx.num_parameters


def _through_autograd(kind: Kind, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    parameters = list(layer.parameters())
    return lambda inputs: _Recorded.apply(kind, inputs, *parameters)  # type: ignore[no-untyped-call]  # torch leaves it untyped

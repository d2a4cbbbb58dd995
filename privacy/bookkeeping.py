"""Books: what a layer must remember of a batch to give every loan's gradient norm, and the clipped sum.

A layer's gradient for one loan is a product of what went into the layer (its activation) and what came back to its
output (its output gradient); `fedfin.privacy.recording` notes the two. From them a book gives the squared norm of each
loan's gradient and, once the clipping factors are known, the weighted sum: one matrix product, the one that plain
training would have done.

Source: Bu, Wang, Zha & Karypis, "Differentially Private Optimization on Large Model at Small Cost" (ICML 2023,
arXiv:2210.00038), section 3. For a Linear layer on (n, i) the norm is |activation| * |output gradient| (Goodfellow,
"Efficient Per-Example Gradient Computations", arXiv:1510.01799). Over sequences a loan's gradient is a sum whose
terms may cancel, so there its norm is taken from the sum itself and not from Gram matrices, which lose the
difference of large numbers: a norm that came out too small would let a loan pass the clipping bound. Where terms
cancel to less than a sixteenth of themselves, the loan's gradient is made in float64 before anything is added to it:
in a sum over the batch, terms far above the bound would swallow what other loans added.
"""

from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Blocks", "Book", "Products", "Rows", "Sequences", "Sum", "add_clipped", "row_norms"]

Sum: TypeAlias = tuple[slice, Tensor]
"""A parameter's place in the flat vector, and a tensor of its size (of its shape, or flat)."""

_CHUNK: Final = 1 << 20  # values of per-loan gradients that exist at a time where they are only measured
# squares of float32 values below 1e-19 vanish, which only matters beside factors as large as this
_LARGEST_SQUARE: Final = 1e12
_LARGEST_SUM: Final = 1e30
_SMALLEST_BOUND: Final = 1e-8  # such squares are nothing beside the square of this
_LARGEST_CANCELLATION: Final = 16.0**2  # of the squared sum of a loan's terms over the square of its gradient
_NARROW: Final = 16  # of a matrix product that is made row after row
_ROWS_AT_ONCE: Final = 32
_COLUMNS_AT_ONCE: Final = 1024  # a float32 sum of many squares drifts: 4e-4 of a norm at a million values


class Book(Protocol):
    """One layer's part in the gradients of a batch of n loans."""

    def squared_norms(self) -> NDArray[np.float64]:
        """Return each loan's squared L2 norm, shape (n,); infinite or NaN where it must be taken in float64."""
        ...

    def sums(self, factors: Tensor) -> list[Sum]:
        """Return the sum over the loans of their gradients, each times its factor: one for each parameter."""
        ...

    def take(self, loans: Tensor) -> "Book":
        """Return the book of these loans alone, in float64; `loans` holds their positions in the batch."""
        ...

    def without(self, loans: Tensor) -> "Book":
        """Return the book with these loans' gradients set to zero; `loans` is a mask of shape (n,)."""
        ...

    def as_blocks(self) -> "Blocks":
        """Return the gradients themselves."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """Per-loan gradients as they are: for each parameter its place in the flat vector and a block (n, size)."""

    blocks: tuple[tuple[slice, Tensor], ...]

    def squared_norms(self) -> NDArray[np.float64]:
        """See `Book`."""
        squares = [_squares(block) for _, block in self.blocks]
        return squares[0] if len(squares) == 1 else np.add.reduce(squares)

    def sums(self, factors: Tensor) -> list[Sum]:
        """See `Book`."""
        return [(span, _product(factors[:, None], block)) for span, block in self.blocks]

    def take(self, loans: Tensor) -> "Blocks":
        """See `Book`."""
        return Blocks(tuple((span, block[loans].double()) for span, block in self.blocks))

    def without(self, loans: Tensor) -> "Blocks":
        """See `Book`."""
        return Blocks(tuple((span, _zeroed(block, loans)) for span, block in self.blocks))

    def as_blocks(self) -> "Blocks":
        """See `Book`."""
        return self

    def plus(self, other: "Blocks") -> "Blocks":
        """Return the gradients of a layer that was used twice: the sum of both uses'."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Blocks(tuple((span, mine + theirs) for (span, mine), (_, theirs) in pairs))


@dataclass(frozen=True, slots=True)
class Products:
    """A Linear layer's book without a sequence: activations (n, i) and output gradients (n, o)."""

    activations: Tensor
    gradients: Tensor
    weight: slice | None
    bias: slice | None
    norms: Tensor  # of the activations, (n,)
    owned: bool = False  # whether `sums`, which comes last, may overwrite the gradients

    def squared_norms(self) -> NDArray[np.float64]:
        """See `Book`."""
        of_gradients = _squares(self.gradients)
        if self.weight is None:
            return of_gradients
        of_activations = _squared(self.norms)
        norms = of_gradients * (of_activations + 1.0 if self.bias is not None else of_activations)
        # written so that one loan's NaN, the largest of all to numpy, hides no other loan
        if self.gradients.dtype == torch.float32 and not of_activations.max() <= _LARGEST_SQUARE:
            norms[~(of_activations <= _LARGEST_SQUARE)] = np.inf
        return norms

    def sums(self, factors: Tensor) -> list[Sum]:
        """See `Book`."""
        weights = factors[:, None]
        weighted = self.gradients.mul_(weights) if self.owned else self.gradients * weights
        sums: list[Sum] = []
        if self.weight is not None:
            sums.append((self.weight, _product(weighted, self.activations)))
        if self.bias is not None:
            sums.append((self.bias, _sum(weighted)))
        return sums

    def take(self, loans: Tensor) -> "Products":
        """See `Book`."""
        activations, gradients = self.activations[loans].double(), self.gradients[loans].double()
        return Products(activations, gradients, self.weight, self.bias, row_norms(activations))

    def without(self, loans: Tensor) -> "Products":
        """See `Book`."""
        activations, gradients = _zeroed(self.activations, loans), _zeroed(self.gradients, loans)
        return Products(activations, gradients, self.weight, self.bias, _zeroed(self.norms, loans))

    def as_blocks(self) -> Blocks:
        """See `Book`."""
        return Sequences(
            self.activations[:, None], self.gradients[:, None], self.weight, self.bias
        ).as_blocks()


@dataclass(frozen=True, slots=True)
class Sequences:
    """A Linear layer's book over sequences: activations (n, t, i) and output gradients (n, t, o)."""

    activations: Tensor
    gradients: Tensor
    weight: slice | None
    bias: slice | None

    def squared_norms(self) -> NDArray[np.float64]:
        """See `Book`."""
        size = max(1, _CHUNK // (self.activations.shape[2] * self.gradients.shape[2]))
        pairs = zip(torch.split(self.activations, size), torch.split(self.gradients, size), strict=True)
        parts = (Sequences(*pair, self.weight, self.bias) for pair in pairs)
        squares = np.concatenate([part.as_blocks().squared_norms() for part in parts])
        of_activations = torch.linalg.vector_norm(self.activations, dim=2).double()
        of_gradients = torch.linalg.vector_norm(self.gradients, dim=2).double()
        if self.bias is not None:
            of_activations = of_activations.square().add_(1.0).sqrt_()
        terms: NDArray[np.float64] = (of_activations * of_gradients).sum(1).numpy()
        fine = (terms * terms <= _LARGEST_CANCELLATION * squares) & (
            of_activations.max(1).values.numpy() ** 2 <= _LARGEST_SQUARE
        )
        squares[~fine] = np.inf
        return squares

    def sums(self, factors: Tensor) -> list[Sum]:
        """See `Book`."""
        weighted = (self.gradients * factors[:, None, None]).flatten(0, 1)
        sums: list[Sum] = []
        if self.weight is not None:
            sums.append((self.weight, _product(weighted, self.activations.flatten(0, 1))))
        if self.bias is not None:
            sums.append((self.bias, _sum(weighted)))
        return sums

    def take(self, loans: Tensor) -> Blocks:
        """See `Book`."""
        activations, gradients = self.activations[loans].double(), self.gradients[loans].double()
        return Sequences(activations, gradients, self.weight, self.bias).as_blocks()

    def without(self, loans: Tensor) -> "Sequences":
        """See `Book`."""
        activations, gradients = _zeroed(self.activations, loans), _zeroed(self.gradients, loans)
        return Sequences(activations, gradients, self.weight, self.bias)

    def as_blocks(self) -> Blocks:
        """See `Book`."""
        blocks: list[tuple[slice, Tensor]] = []
        if self.weight is not None:
            # by numpy: on matrices as small as these its products take half the time of torch.bmm
            products = np.matmul(self.gradients.mT.numpy(), self.activations.numpy())
            blocks.append((self.weight, torch.from_numpy(products).flatten(1)))
        if self.bias is not None:
            blocks.append((self.bias, self.gradients.sum(1)))
        return Blocks(tuple(blocks))


@dataclass(frozen=True, slots=True)
class Rows:
    """An Embedding's book: which rows each loan looked up, (n, t), and the gradients of what it got, (n, t, width)."""

    indices: Tensor
    gradients: Tensor
    weight: slice

    def squared_norms(self) -> NDArray[np.float64]:
        """See `Book`."""
        if self.indices.shape[1] == 1:
            return _squares(self.gradients[:, 0])
        # rows looked up twice by one loan add up; in float64, for the sums may cancel
        gradients = self.gradients.double()
        same = self.indices[:, :, None] == self.indices[:, None, :]
        products: NDArray[np.float64] = (torch.bmm(gradients, gradients.mT) * same).sum((1, 2)).numpy()
        terms = row_norms(gradients.flatten(0, 1)).view(gradients.shape[:2]).sum(1).numpy()
        products[~(terms * terms <= _LARGEST_CANCELLATION * products)] = np.inf
        return products

    def sums(self, factors: Tensor) -> list[Sum]:
        """See `Book`."""
        # in float64: one row may be everybody's, and index_add_ adds them one after the other
        weighted = (self.gradients * factors[:, None, None]).flatten(0, 1).double()
        width = weighted.shape[1]
        table = weighted.new_zeros((self.weight.stop - self.weight.start) // width, width)
        return [(self.weight, table.index_add_(0, self.indices.flatten(), weighted))]

    def take(self, loans: Tensor) -> Blocks:
        """See `Book`."""
        return Rows(self.indices[loans], self.gradients[loans].double(), self.weight).as_blocks()

    def without(self, loans: Tensor) -> "Rows":
        """See `Book`."""
        return Rows(self.indices, _zeroed(self.gradients, loans), self.weight)

    def as_blocks(self) -> Blocks:
        """See `Book`."""
        num_loans, _, width = self.gradients.shape
        table = self.gradients.new_zeros(num_loans, (self.weight.stop - self.weight.start) // width, width)
        table.scatter_add_(1, self.indices[:, :, None].expand_as(self.gradients), self.gradients)
        return Blocks(((self.weight, table.flatten(1)),))


def add_clipped(books: list[Book], num_loans: int, bound: float, total: NDArray[np.float64]) -> None:
    """Add the gradients in the books, each scaled to the bound at most, to `total`, shape (d,)."""
    squared = np.add.reduce([book.squared_norms() for book in books]) if books else np.zeros(num_loans)
    # float32 squares neither overflow nor vanish here; the few other loans are done again in float64
    exact = (squared < _LARGEST_SUM) & (bound >= _SMALLEST_BOUND)
    if not exact.all():
        others = torch.from_numpy(~exact)
        for part in torch.split(others.nonzero().flatten(), max(1, _CHUNK // max(1, len(total)))):
            _add_in_float64([book.take(part) for book in books], bound, total)
        books = [book.without(others) for book in books]
        squared[~exact] = 0.0
    _add(books, torch.from_numpy(_factors(squared, bound).astype(np.float32)), total)


def row_norms(block: Tensor) -> Tensor:
    """Return the L2 norm of each row of (n, size), shape (n,), in the block's type."""
    # faster than the root of (block * block).sum(1): no block of squares is written
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over the rows of their outer products, shape (columns of left, columns of right).

    A narrow product is made row after row, so that a sum near the bound times the loans is rounded as often as there
    are loans: batches can be built in which one loan then changes a quarter of a bound too much. So it is made of a
    few rows at a time, and these sums are added in float64; a wide product is made in blocks by itself.
    """
    if left.shape[1] == 1:
        return torch.cat([_sum(part * left) for part in torch.split(right, _COLUMNS_AT_ONCE, dim=1)])[None]
    if right.shape[1] == 1:
        return _product(right, left).t()
    if min(left.shape[1], right.shape[1]) >= _NARROW:
        # in this order as torch's own backward pass does: the other one takes up to twice as long
        return torch.mm(right.t(), left).t()
    whole = len(left) - len(left) % _ROWS_AT_ONCE
    of_left = left[:whole].reshape(-1, _ROWS_AT_ONCE, left.shape[1])
    of_right = right[:whole].reshape(-1, _ROWS_AT_ONCE, right.shape[1])
    return torch.bmm(of_left.mT, of_right).sum(0, dtype=torch.float64).add_(left[whole:].mT @ right[whole:])


def _sum(rows: Tensor) -> Tensor:
    """Return the sum over the rows, shape (columns,), float64; torch adds the few rows of a part pairwise."""
    whole = len(rows) - len(rows) % _ROWS_AT_ONCE
    parts = rows[:whole].reshape(-1, _ROWS_AT_ONCE, rows.shape[1]).sum(1)
    return parts.sum(0, dtype=torch.float64).add_(rows[whole:].sum(0))


def _squares(block: Tensor) -> NDArray[np.float64]:
    if block.shape[1] <= _COLUMNS_AT_ONCE:
        return _squared(row_norms(block))
    parts = [_squared(row_norms(part)) for part in torch.split(block, _COLUMNS_AT_ONCE, dim=1)]
    return np.asarray(np.add.reduce(parts), dtype=np.float64)


def _squared(norms: Tensor) -> NDArray[np.float64]:
    """Return the squares in float64, where they cannot overflow."""
    wide: NDArray[np.float64] = norms.numpy().astype(np.float64)
    return np.multiply(wide, wide, out=wide)


def _zeroed(values: Tensor, loans: Tensor) -> Tensor:
    """Return a copy with the rows of these loans zero, also where they are not finite."""
    return values.masked_fill(loans.view(-1, *[1] * (values.dim() - 1)), 0.0)


def _add_in_float64(books: list[Book], bound: float, total: NDArray[np.float64]) -> None:
    squared = np.add.reduce([book.squared_norms() for book in books])
    # Never an error: whether there was one would tell, without noise, that a certain loan is in the table (crafted
    # weights make chosen loans overflow). Such a loan contributes nothing.
    broken = ~np.isfinite(squared)
    squared[broken] = 0.0
    books = [book.without(torch.from_numpy(broken)) for book in books]
    _add(books, torch.from_numpy(_factors(squared, bound)), total)


def _add(books: list[Book], factors: Tensor, total: NDArray[np.float64]) -> None:
    for book in books:
        for span, part in book.sums(factors):
            total[span] += part.numpy().reshape(-1)


def _factors(squared: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """Return min(1, bound / norm) for each loan."""
    norms = np.sqrt(squared)
    return bound / np.maximum(norms, bound)

"""Bins that all lenders share, from the sum of their histograms, and the encoding of loans by them.

The schema gives every numeric column a public grid. A lender counts its loans per grid cell; the
coordinator sees only the sum over lenders, noisy in a private job, and puts the bin edges at the sum's
quantiles. Both encodings need nothing but the schema and the bins:

- `one_hot`: one indicator per bin, per special code, per category and for a missing value;
- `piecewise_linear`: for numeric columns the piecewise linear encoding of Gorishniy, Rubachev & Babenko,
  "On Embeddings for Numerical Features in Tabular Deep Learning" (NeurIPS 2022), section 3.2, beside the
  indicators for special codes and missing values; categories stay indicators.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedfin.credit.schema import CategoricalColumn, Column, NumericColumn, Schema
from fedfin.errors import DataError, SchemaMismatchError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Bins",
    "Encoding",
    "Input",
    "bins_from_histogram",
    "encode",
    "histogram",
    "histogram_sensitivity",
    "histogram_size",
    "inputs",
    "num_inputs",
]

Encoding = Literal["one_hot", "piecewise_linear"]


@dataclass(frozen=True, slots=True)
class Bins:
    """The bin edges of every numeric feature, the same at every lender.

    Attributes:
        edges: Per numeric feature, in the schema's order, its name and its increasing edges in the
            column's unit, the outer ones included: k + 1 edges make k >= 1 bins. A bin holds its lower
            edge; the last one holds its upper edge too.
    """

    edges: tuple[tuple[str, tuple[float, ...]], ...]

    def __post_init__(self) -> None:
        for name, edges in self.edges:
            if len(edges) < 2 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
                msg = f"bins of column {name} need two or more finite, increasing edges; found {edges}"
                raise SchemaMismatchError(msg)

    def to_json(self) -> str:
        """Return the canonical JSON, from which `from_json` gives equal bins to the last bit."""
        return json.dumps(self.edges, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Bins":
        """Return the bins that `to_json` wrote.

        Raises:
            SchemaMismatchError: The text is no JSON of bins.
        """
        try:
            edges = tuple(
                (str(name), tuple(float(edge) for edge in edges)) for name, edges in json.loads(text)
            )
        except (TypeError, ValueError) as error:
            msg = f"the bins cannot be read ({error}); ask the coordinator to send those of its run directory"
            raise SchemaMismatchError(msg) from error
        return cls(edges)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical JSON, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Input:
    """One model input: the feature column it comes from, and which value or bin of it, for people."""

    column: str
    label: str


def histogram_size(schema: Schema) -> int:
    """Return the number of cells of `histogram` under this schema."""
    return sum(_num_cells(column) for column in schema.features)


def histogram_sensitivity(schema: Schema) -> float:
    """Return the L2 sensitivity of `histogram` to adding or removing one loan.

    Source: a loan adds one to exactly one cell of each of the k feature columns: sqrt(k).
    """
    return float(np.sqrt(len(schema.features)))


def histogram(frame: "pd.DataFrame", schema: Schema) -> "NDArray[np.int64]":
    """Count a lender's loans per cell, column after column.

    A numeric column has its grid cells, then one cell per special code, then one for missing values;
    values outside the grid count in its outer cells. A categorical column has one cell per category and
    one for missing values.

    Args:
        frame: Loans as `fedfin.credit.source` checked them: numeric columns float64 with NaN for missing,
            categorical ones with None. Not changed.
        schema: The columns.

    Returns:
        Shape (histogram_size(schema),); each column's part sums to the number of loans.

    Raises:
        DataError: A column is absent, or holds an infinite value or an unknown category.
    """
    return np.concatenate(
        [
            np.bincount(_cells(frame, column, _grid(column)), minlength=_num_cells(column))
            for column in schema.features
        ]
    ).astype(np.int64)


def bins_from_histogram(counts: "ArrayLike", schema: Schema, max_bins: int) -> Bins:
    """Put every numeric feature's bin edges at the quantiles of the summed histogram.

    Noise is removed first: each column's grid cells are projected onto the non-negative counts with the
    same total (for a histogram without noise that changes nothing; clipping at zero alone would add the
    noise's positive half to the empty cells). Of edges that fall on one grid edge one remains, so a column
    with most of its mass in one cell has fewer bins than `max_bins`, and at least one.

    Args:
        counts: Sum of the lenders' histograms, shape (histogram_size(schema),); may be negative from noise.
        schema: The columns.
        max_bins: Bins per numeric column at most, special codes and missing values not counted; >= 1.

    Returns:
        The bins; the same for the same arguments on every machine.

    Raises:
        SchemaMismatchError: `counts` has the wrong shape or is not finite.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.shape != (histogram_size(schema),) or not np.isfinite(values).all():
        msg = (
            f"the summed histogram has shape {values.shape} and the schema asks for"
            f" ({histogram_size(schema)},) finite cells; all lenders need the coordinator's schema"
        )
        raise SchemaMismatchError(msg)
    edges: list[tuple[str, tuple[float, ...]]] = []
    start = 0
    for column in schema.features:
        if isinstance(column, NumericColumn):
            grid = _grid(column)
            cells = _project_to_total(values[start : start + len(grid) - 1])
            edges.append((column.name, _quantile_edges(cells, grid, max_bins)))
        start += _num_cells(column)
    return Bins(tuple(edges))


def inputs(schema: Schema, bins: Bins, kind: Encoding) -> tuple[Input, ...]:
    """Return what each column of `encode`'s result stands for, in order; the reasons are named from it."""
    described: list[Input] = []
    edges_of = _edges_by_name(schema, bins)
    for column in schema.features:
        if isinstance(column, NumericColumn):
            edges = edges_of[column.name]
            for low, high in pairwise(edges):
                label = f"{low:.6g} to {high:.6g}"
                described.append(Input(column.name, label if kind == "one_hot" else f"amount from {label}"))
            described += [Input(column.name, str(label)) for label in _special_labels(column)]
        else:
            described += [Input(column.name, category) for category in column.categories]
        described.append(Input(column.name, "missing"))
    return tuple(described)


def num_inputs(schema: Schema, bins: Bins, kind: Encoding) -> int:
    """Return p, the number of columns of `encode`'s result."""
    return len(inputs(schema, bins, kind))


def encode(frame: "pd.DataFrame", schema: Schema, bins: Bins, kind: Encoding) -> "NDArray[np.float32]":
    """Encode loans for the model.

    Args:
        frame: As for `histogram`; not changed.
        schema: The columns.
        bins: The bins of the job.
        kind: `one_hot` for the logistic model, `piecewise_linear` for the MLP.

    Returns:
        Shape (n, p), finite, every value in [0, 1]; p = num_inputs(schema, bins, kind).

    Raises:
        DataError: As `histogram`.
        SchemaMismatchError: The bins are of another schema.
    """
    edges_of = _edges_by_name(schema, bins)
    blocks: list[NDArray[np.float32]] = []
    for column in schema.features:
        if isinstance(column, NumericColumn):
            edges = edges_of[column.name]
            cells = _cells(frame, column, edges)
            block = np.eye(len(edges) + len(_special_labels(column)), dtype=np.float32)[cells]
            if kind == "piecewise_linear":
                in_a_bin = cells < len(edges) - 1
                values = frame[column.name].to_numpy(dtype=np.float64)[in_a_bin]
                block[in_a_bin, : len(edges) - 1] = _piecewise_linear(values, edges, _grid(column))
        else:
            block = np.eye(_num_cells(column), dtype=np.float32)[_cells(frame, column, _grid(column))]
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _grid(column: Column) -> "NDArray[np.float64]":
    """Return a numeric column's grid edges; a categorical column has none."""
    if isinstance(column, NumericColumn):
        return column.grid_edges()
    return np.empty(0)


def _special_labels(column: NumericColumn) -> tuple[str, ...]:
    return tuple(column.special_codes[code] for code in column.special_values)


def _num_cells(column: Column) -> int:
    if isinstance(column, NumericColumn):
        return column.grid_cells + len(column.special_codes) + 1
    return len(column.categories) + 1


def _cells(frame: "pd.DataFrame", column: Column, edges: "ArrayLike") -> "NDArray[np.int64]":
    """Return each loan's cell within the column: bins of `edges` first, then special codes, missing last."""
    if column.name not in frame.columns:
        msg = f"column {column.name} of the schema is absent; map it in the lender's configuration"
        raise DataError(msg)
    if isinstance(column, CategoricalColumn):
        return _category_cells(frame[column.name], column)
    values = frame[column.name].to_numpy(dtype=np.float64)
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        msg = f"row {row}, column {column.name}: the value is infinite; write it as missing, or drop the row"
        raise DataError(msg)
    bounds = np.asarray(edges, dtype=np.float64)
    # the outer bins also take what lies outside: every loan counts somewhere
    cells = np.clip(np.searchsorted(bounds, values, side="right") - 1, 0, len(bounds) - 2)
    for position, code in enumerate(column.special_values):
        cells[values == code] = len(bounds) - 1 + position
    cells[np.isnan(values)] = len(bounds) - 1 + len(column.special_codes)
    return cells.astype(np.int64)


def _category_cells(values: "pd.Series", column: CategoricalColumn) -> "NDArray[np.int64]":
    """Return each loan's category position; missing comes after the last category."""
    cell_of = {category: position for position, category in enumerate(column.categories)}
    missing = values.isna().to_numpy()
    positions = values.map(cell_of).to_numpy(dtype=np.float64, na_value=np.nan)
    unknown = np.isnan(positions) & ~missing
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        msg = (
            f"row {row}, column {column.name}: a category that the schema does not know;"
            f" it knows {', '.join(column.categories)}; correct the row or extend the federation's schema"
        )
        raise DataError(msg)
    return np.where(missing, len(column.categories), positions).astype(np.int64)


def _edges_by_name(schema: Schema, bins: Bins) -> dict[str, tuple[float, ...]]:
    """Return the bins' edges by column, having checked that they are this schema's."""
    expected = [column.name for column in schema.features if isinstance(column, NumericColumn)]
    found = [name for name, _ in bins.edges]
    if found != expected:
        msg = f"the bins are of columns {found}, the schema's numeric features are {expected}; use one job's files"
        raise SchemaMismatchError(msg)
    return dict(bins.edges)


def _project_to_total(noisy: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return the non-negative counts nearest to `noisy` (L2) with the same total; zeros if that is <= 0.

    Source: projection onto the simplex; Duchi et al., "Efficient Projections onto the l1-Ball for Learning
    in High Dimensions" (ICML 2008), figure 1.
    """
    total = float(noisy.sum())
    if total <= 0:
        return np.zeros_like(noisy)
    descending = np.sort(noisy)[::-1]
    shifts = (np.cumsum(descending) - total) / np.arange(1, len(noisy) + 1)
    shift = shifts[np.flatnonzero(descending > shifts)[-1]]
    projected: NDArray[np.float64] = np.maximum(noisy - shift, 0.0)
    return projected


def _quantile_edges(
    cells: "NDArray[np.float64]", grid: "NDArray[np.float64]", max_bins: int
) -> tuple[float, ...]:
    """Return the outer grid edges and between them those nearest to the quantiles, duplicates merged."""
    total = float(cells.sum())
    if total <= 0:
        return (float(grid[0]), float(grid[-1]))
    below = np.cumsum(cells)[:-1] / total
    levels = np.arange(1, max_bins) / max_bins
    nearest = np.abs(below[None, :] - levels[:, None]).argmin(axis=1)
    # an edge with nothing, or everything, below it would make an empty bin
    chosen = sorted({int(edge) for edge in nearest if 0 < below[edge] < 1})
    return (float(grid[0]), *(float(grid[edge + 1]) for edge in chosen), float(grid[-1]))


def _piecewise_linear(
    values: "NDArray[np.float64]", edges: tuple[float, ...], grid: "NDArray[np.float64]"
) -> "NDArray[np.float32]":
    """Return the share of each bin that lies below each value, shape (n, bins), in [0, 1].

    Distances are measured in grid cells, so that a column with a logarithmic grid is linear in the logarithm.
    """
    cell_positions = np.arange(len(grid), dtype=np.float64)
    positions = np.interp(values, grid, cell_positions)[:, None]
    bounds = np.interp(edges, grid, cell_positions)
    return np.clip((positions - bounds[:-1]) / np.diff(bounds), 0.0, 1.0).astype(np.float32)

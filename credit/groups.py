"""Loans of protected groups, counted by outcome and side of a cut-off: what fairness figures are made of.

A protected attribute is no input of the model (unless the schema says so in words); it is counted here. The cells of a
column are its groups, each with four: good and bad loans, each below and from the cut-off on. A loan is in exactly one
cell of every protected column, so that one loan more or less moves each column's part by one, in one cell.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.credit.schema import Column, NumericColumn, Schema
from fedfin.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["CELLS_OF_A_GROUP", "Group", "group_cells", "group_counts", "groups"]

CELLS_OF_A_GROUP: Final = 4
"""Good accepted, good rejected, bad accepted, bad rejected, in this order."""

NUM_BANDS: Final = 4
"""Bands of equal width, on the column's own grid, that the valid range of a numeric column is cut into."""


@dataclass(frozen=True, slots=True)
class Group:
    """Loans with the same value of a protected column, or in the same band of it."""

    column: str
    label: str


def groups(schema: Schema) -> tuple[Group, ...]:
    """Return the groups of all protected columns, column after column, in the order of their cells."""
    return tuple(Group(column.name, label) for column in schema.protected for label in _labels(column))


def group_cells(schema: Schema) -> int:
    """Return the number of cells of `group_counts` under this schema; 0 without protected columns."""
    return CELLS_OF_A_GROUP * len(groups(schema))


def group_counts(
    frame: "pd.DataFrame",
    labels: "NDArray[np.int64]",
    rejected: "NDArray[np.bool_]",
    schema: Schema,
) -> "NDArray[np.int64]":
    """Count loans per group, outcome and side of the cut-off.

    Args:
        frame: Checked loans, n rows; not changed.
        labels: 1 bad, 0 good, shape (n,).
        rejected: Whether each loan's probability of default reaches the cut-off, shape (n,).
        schema: The columns.

    Returns:
        Shape (group_cells(schema),); each column's part sums to n.

    Raises:
        DataError: A protected column holds what the schema does not know.
    """
    parts = [np.zeros(0, dtype=np.int64)]
    for column in schema.protected:
        cells = CELLS_OF_A_GROUP * _positions(frame[column.name], column) + 2 * labels + rejected
        parts.append(np.bincount(cells, minlength=CELLS_OF_A_GROUP * len(_labels(column))).astype(np.int64))
    return np.concatenate(parts)


def _labels(column: Column) -> tuple[str, ...]:
    missing = ("missing",) if column.nullable else ()
    if isinstance(column, NumericColumn):
        bands = tuple(f"{low:g} to {high:g}" for low, high in pairwise(_band_edges(column)))
        return bands + tuple(column.special_codes[code] for code in column.special_values) + missing
    return column.categories + missing


def _positions(values: "pd.Series", column: Column) -> "NDArray[np.int64]":
    """Return each loan's group within its column, shape (n,)."""
    if isinstance(column, NumericColumn):
        numbers = values.to_numpy(dtype=np.float64)
        edges = _band_edges(column)
        positions = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, NUM_BANDS - 1)
        for place, code in enumerate(column.special_values):
            positions[numbers == code] = NUM_BANDS + place
        missing = np.isnan(numbers)
    else:
        place_of = {category: place for place, category in enumerate(column.categories)}
        places = values.map(place_of).to_numpy(dtype=np.float64, na_value=np.nan)
        missing = values.isna().to_numpy()
        positions = np.where(missing, 0, np.nan_to_num(places, nan=-1.0)).astype(np.int64)
    if (positions < 0).any() or (missing.any() and not column.nullable):
        msg = f"column {column.name} holds values that the schema does not allow; `fedfin client check` shows the rows"
        raise DataError(msg)
    positions[missing] = len(_labels(column)) - 1
    return positions.astype(np.int64)


def _band_edges(column: NumericColumn) -> "NDArray[np.float64]":
    if column.grid == "linear":
        edges = np.linspace(column.minimum, column.maximum, NUM_BANDS + 1)
    else:
        edges = np.expm1(np.linspace(np.log1p(column.minimum), np.log1p(column.maximum), NUM_BANDS + 1))
    edges[0], edges[-1] = column.minimum, column.maximum
    return edges

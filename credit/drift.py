"""How far a lender's columns have moved from the federation's reference.

The reference is the sum of the lenders' histograms (`binning.histogram`), as the coordinator publishes it;
it holds no lender's own counts. Drift is the population stability index over at most ten bins of about
equal mass in the reference, with the usual limits: 0.1 asks for attention, 0.25 for action. A lender with
few loans differs from the reference by chance alone, so the limits are raised to what chance would give.

Source: PSI = sum((a - r) * ln(a / r)); Yurdakul & Naranjo, "Statistical properties of the population
stability index" (Journal of Risk Model Validation 14(4), 2020): without drift PSI / (1/n + 1/m) is
chi-squared with one degree of freedom less than bins.
"""

import math
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from fedfin.credit.schema import Column, NumericColumn, Schema
from fedfin.errors import DataError, SchemaMismatchError
from fedfin.plan import Section

__all__ = [
    "MIN_REFERENCE",
    "PSI_NOTE",
    "PSI_WARNING",
    "ColumnShares",
    "Reference",
    "chance_psi",
    "num_cells",
    "psi",
]

PSI_NOTE = 0.1
PSI_WARNING = 0.25

MIN_REFERENCE = 300.0
"""A reference that tells less than this many loans would, for its noise, is not compared with at all."""

_NUM_BINS = 10
_HALF_LOAN = 0.5  # added to every bin, so that an empty one has a logarithm
_CHANCE_QUANTILE = 2.326  # of the standard normal, 0.99


class ColumnShares(Section):
    """The reference of one feature column."""

    name: str = Field(description="The federation's name of the column.")
    shares: tuple[float, ...] = Field(
        min_length=2,
        description="Share of the loans per cell of `binning.histogram`: grid or categories, codes, missing.",
    )


class Reference(Section):
    """The federation's loans as each lender may know them: shares per cell, over all lenders."""

    schema_fingerprint: str = Field(description="Fingerprint of the schema whose cells these are.")
    num_loans: float = Field(gt=0, description="Loans that the reference counts, noise included.")
    noise_stddev: float = Field(
        default=0.0, ge=0, description="Standard deviation of the noise in a cell, in loans."
    )
    columns: tuple[ColumnShares, ...] = Field(description="The schema's features, in order.")

    @classmethod
    def from_histogram(cls, counts: ArrayLike, schema: Schema, *, noise_stddev: float = 0.0) -> Self:
        """Turn the summed histogram of the lenders into the reference.

        Args:
            counts: Shape (binning.histogram_size(schema),); a negative one, from noise, counts as none.
            schema: The federation's schema.
            noise_stddev: Of the noise in each cell of the sum, in loans.

        Raises:
            SchemaMismatchError: `counts` has another shape, or is not finite.
            DataError: A column has no loans.
        """
        values = np.asarray(counts, dtype=np.float64)
        sizes = [num_cells(column) for column in schema.features]
        if values.shape != (sum(sizes),) or not np.isfinite(values).all():
            msg = (
                f"the histogram has shape {values.shape}, the schema asks for ({sum(sizes)},) finite cells;"
                " take both from one job"
            )
            raise SchemaMismatchError(msg)
        columns: list[ColumnShares] = []
        for column, part in zip(schema.features, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            loans = np.maximum(part, 0)
            if loans.sum() <= 0:
                msg = f"the histogram of {column.name} counts no loans; take the reference of another job"
                raise DataError(msg)
            columns.append(ColumnShares(name=column.name, shares=tuple((loans / loans.sum()).tolist())))
        return cls(
            schema_fingerprint=schema.fingerprint(),
            num_loans=float(np.abs(values.sum()) / len(sizes)) or 1.0,
            noise_stddev=noise_stddev,
            columns=tuple(columns),
        )

    @classmethod
    def from_json(cls, text: str, schema: Schema) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SchemaMismatchError: The text is no reference, or is one of another schema.
        """
        try:
            reference = cls.model_validate_json(text)
        except ValidationError as error:
            msg = f"the reference cannot be read ({error.error_count()} faults); ask for it again"
            raise SchemaMismatchError(msg) from None
        if reference.schema_fingerprint != schema.fingerprint():
            msg = "the reference is of another schema; ask the coordinator for the one of this schema"
            raise SchemaMismatchError(msg)
        wanted = [(column.name, num_cells(column)) for column in schema.features]
        if [(column.name, len(column.shares)) for column in reference.columns] != wanted or any(
            not 0 <= share <= 1 for column in reference.columns for share in column.shares
        ):
            msg = "the reference does not have the cells of the schema; ask the coordinator for it again"
            raise SchemaMismatchError(msg)
        return reference

    def to_json(self) -> str:
        """Return the JSON that `from_json` reads."""
        return self.model_dump_json()

    def sample_size(self, column: Column) -> float:
        """Return how many loans without noise would tell as much about a bin of the column as this reference.

        The noise of the m cells of a bin with a tenth of the loans N has the variance m * s**2; a sample of n has
        p / n in shares: n = p * N**2 / (m * s**2).
        """
        if self.noise_stddev == 0:
            return self.num_loans
        cells = num_cells(column) / _NUM_BINS if isinstance(column, NumericColumn) else 1.0
        of_noise = self.num_loans**2 / (_NUM_BINS * max(cells, 1.0) * self.noise_stddev**2)
        return 1 / (1 / of_noise + 1 / self.num_loans)

    def of(self, name: str) -> NDArray[np.float64]:
        """Return the shares of one feature column, shape (cells,), summing to 1."""
        return np.array(next(column.shares for column in self.columns if column.name == name))


def num_cells(column: Column) -> int:
    """Return the cells of one column in `binning.histogram`."""
    if isinstance(column, NumericColumn):
        return column.grid_cells + len(column.special_codes) + 1
    return len(column.categories) + 1


def psi(counts: NDArray[np.int64], shares: NDArray[np.float64], column: Column) -> tuple[float, int]:
    """Return the population stability index of one column, and over how many bins it was taken.

    Args:
        counts: The lender's loans per cell, shape (num_cells(column),).
        shares: The reference's shares per cell, the same shape.
        column: The column, whose grid cells are merged into bins.
    """
    ordered = column.grid_cells if isinstance(column, NumericColumn) else 0
    bins = np.empty(len(shares), dtype=np.int64)
    # Grid cells merge into bins of about equal reference mass; categories, codes and missing stay alone.
    middles = np.cumsum(shares[:ordered]) - shares[:ordered] / 2
    mass = shares[:ordered].sum()
    bins[:ordered] = np.minimum(middles / mass * _NUM_BINS, _NUM_BINS - 1) if mass > 0 else 0
    first_alone = int(bins[:ordered].max()) + 1 if ordered else 0
    bins[ordered:] = first_alone + np.arange(len(shares) - ordered)
    _, bins = np.unique(bins, return_inverse=True)
    actual, expected = np.bincount(bins, weights=counts), np.bincount(bins, weights=shares)
    used = (actual > 0) | (expected > 0)
    mine = np.asarray(actual[used] + _HALF_LOAN, dtype=np.float64)
    theirs = np.asarray(expected[used] * counts.sum() + _HALF_LOAN, dtype=np.float64)
    mine, theirs = mine / mine.sum(), theirs / theirs.sum()
    return float(np.sum((mine - theirs) * np.log(mine / theirs))), int(used.sum())


def chance_psi(num_loans: float, num_bins: int, reference_loans: float = math.inf) -> float:
    """Return the PSI that a lender without drift exceeds once in a hundred times.

    Args:
        num_loans: The lender's loans, >= 1.
        num_bins: Bins of the PSI.
        reference_loans: Loans of the reference, as `Reference.sample_size`.

    Source: 0.99 quantile of chi-squared over n, by Wilson & Hilferty's cube (1931).
    """
    freedom = max(num_bins - 1, 1)
    spread = 2 / (9 * freedom)
    return (
        freedom
        * (1 - spread + _CHANCE_QUANTILE * math.sqrt(spread)) ** 3
        * (1 / num_loans + 1 / reference_loans)
    )

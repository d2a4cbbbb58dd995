"""What an evaluation counts: held-out loans by outcome and score, and by protected group, outcome and cut-off.

One vector of whole numbers, which a lender makes of its own loans and of which only the sum over lenders is seen. Its
parts: 64 cells of the score for the good loans, 64 for the bad ones, then four cells for each protected group
(`fedfin.credit.groups`). Every loan is in one cell of the score and in one of each protected column.

The score is cut evenly in the arcsine of the root of the probability, in which a rate of any size is known equally
well from as many loans (Anscombe, "The transformation of Poisson, binomial and negative-binomial data", Biometrika 35,
1948): the cells are 2% wide at a probability of 20% and .5% at 1%. Cells of equal probability lose .08 of the AUROC
where one loan in a hundred is bad, because nearly all loans share the first two; cells of equal log odds are often
empty, and noise in them costs a quarter to a third more (docs/decisions/0017-evaluation-in-counts.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.credit.groups import group_cells, group_counts
from fedfin.credit.schema import Schema
from fedfin.errors import SchemaMismatchError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = [
    "NUM_SCORE_CELLS",
    "ScoreCounts",
    "cell_centres",
    "cell_edges",
    "count_scores",
    "evaluation_cells",
    "evaluation_sensitivity",
    "split_counts",
]

NUM_SCORE_CELLS: Final = 64
"""Cells of the score for each outcome."""


@dataclass(frozen=True, slots=True)
class ScoreCounts:
    """The parts of an evaluation's vector, of one lender or summed; fractions and negative numbers come from noise.

    Attributes:
        good: Good loans per cell of the score, shape (NUM_SCORE_CELLS,).
        bad: Bad loans, likewise.
        groups: Loans of protected groups, shape (group_cells(schema),).
    """

    good: "NDArray[np.float64]"
    bad: "NDArray[np.float64]"
    groups: "NDArray[np.float64]"


def evaluation_cells(schema: Schema) -> int:
    """Return the length of an evaluation's vector; the same at every lender and at the coordinator."""
    return 2 * NUM_SCORE_CELLS + group_cells(schema)


def evaluation_sensitivity(schema: Schema) -> float:
    """Return the L2 sensitivity of an evaluation's vector to adding or removing one loan, in loans.

    Source: a loan adds one to exactly one cell of the score and one to exactly one cell of each of the k protected
    columns: sqrt(1 + k).
    """
    return float(np.sqrt(1.0 + len(schema.protected)))


def count_scores(
    frame: "pd.DataFrame",
    labels: "NDArray[np.int64]",
    probabilities: "NDArray[np.float64]",
    schema: Schema,
    cutoff: float,
) -> "NDArray[np.int64]":
    """Count a lender's held-out loans.

    Args:
        frame: Checked loans, n rows; not changed.
        labels: 1 bad, 0 good, shape (n,).
        probabilities: Of default, shape (n,). One that is not a number (of weights crafted to make it so) counts as
            1: an error would tell that the loan is there.
        schema: The columns.
        cutoff: Probability of default from which on a loan counts as rejected.

    Returns:
        Shape (evaluation_cells(schema),).

    Raises:
        DataError: A protected column holds what the schema does not know.
    """
    certain = np.where(np.isnan(probabilities), 1.0, probabilities)
    cells = labels * NUM_SCORE_CELLS + _score_cells(certain)
    scores = np.bincount(cells, minlength=2 * NUM_SCORE_CELLS).astype(np.int64)
    return np.concatenate([scores, group_counts(frame, labels, certain >= cutoff, schema)])


def split_counts(counts: "NDArray[np.float64]", schema: Schema) -> ScoreCounts:
    """Return the parts of an evaluation's vector.

    Raises:
        SchemaMismatchError: It is not the vector of this schema, or not finite.
    """
    if counts.shape != (evaluation_cells(schema),) or not np.isfinite(counts).all():
        msg = (
            f"the evaluation's counts have shape {counts.shape} and the schema asks for ({evaluation_cells(schema)},)"
            " finite ones; all lenders need the coordinator's schema"
        )
        raise SchemaMismatchError(msg)
    good, bad, groups = np.split(counts, [NUM_SCORE_CELLS, 2 * NUM_SCORE_CELLS])
    return ScoreCounts(good, bad, groups)


def cell_edges() -> "NDArray[np.float64]":
    """Return the probabilities that bound the cells of the score, shape (NUM_SCORE_CELLS + 1,), from 0 to 1."""
    return _probability(np.arange(NUM_SCORE_CELLS + 1, dtype=np.float64))


def cell_centres() -> "NDArray[np.float64]":
    """Return the probability that a loan of each cell is taken to have, shape (NUM_SCORE_CELLS,), in (0, 1)."""
    return _probability(np.arange(NUM_SCORE_CELLS, dtype=np.float64) + 0.5)


def _probability(places: "NDArray[np.float64]") -> "NDArray[np.float64]":
    edges: NDArray[np.float64] = np.sin(places * (np.pi / 2 / NUM_SCORE_CELLS)) ** 2
    return edges


def _score_cells(probabilities: "NDArray[np.float64]") -> "NDArray[np.int64]":
    """Return each loan's cell; a cell holds its lower edge, the last one 1 as well."""
    cells = np.searchsorted(cell_edges(), probabilities, side="right") - 1
    return np.clip(cells, 0, NUM_SCORE_CELLS - 1).astype(np.int64)

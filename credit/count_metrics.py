"""Figures of merit from counts per cell of the score, each with what noise in the counts does to it.

The counts are sums over lenders, with independent noise of the same standard deviation in every cell, or none. Within a
cell, ties count half and every loan has the probability of the cell's centre. A figure is a smooth function of the
counts (the KS distance at its largest cell), so its standard error is the root of the summed squares of its derivatives
times the noise's deviation (delta method). What the counts say at all about the population behind the loans is another
question, which no standard error here answers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.credit.score_counts import NUM_SCORE_CELLS, ScoreCounts, cell_centres, cell_edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LARGEST_ERRORS", "Decile", "Estimate", "calibration_table", "estimate_rate", "figures_of"]

LARGEST_ERRORS: Final = {
    "auroc": 0.05,
    "ks": 0.05,
    "brier": 0.02,
    "log_loss": 0.05,
    "bad_rate": 0.05,
    "calibration_ratio": 0.25,
}
"""Standard error of the noise above which a figure says nothing: it is left out."""

LARGEST_RATE_ERROR: Final = 0.1
"""The same for a rate in a part of the loans: a decile, a group."""

_FEWEST: Final = (
    4.0  # an outcome's loans, in standard errors of their own count, without which nothing is divided by it
)
_NUM_DECILES: Final = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the standard error that the noise gives it; 0.0 for exact counts."""

    value: float
    noise_error: float


@dataclass(frozen=True, slots=True)
class Decile:
    """About a tenth of the loans, those of neighbouring scores: predicted against actual bad loans.

    Attributes:
        low: Lowest probability of its cells.
        high: Highest.
        loans: How many.
        predicted: Mean probability.
        actual: Share of bad loans.
    """

    low: float
    high: float
    loans: Estimate
    predicted: float
    actual: Estimate


def figures_of(counts: ScoreCounts, noise_stddev: float) -> dict[str, Estimate]:
    """Return the figures that the noise leaves something of, by name.

    Args:
        counts: Of the whole federation.
        noise_stddev: Standard deviation of the noise in each cell, in loans; 0 for exact counts.

    Returns:
        `loans` always; of `auroc`, `ks`, `brier`, `log_loss` (nats), `bad_rate` and `calibration_ratio` (predicted over
        actual bad loans) those that are known to within `LARGEST_ERRORS`; none where one outcome may not be there.
    """
    good, bad = counts.good, counts.bad
    num_good, num_bad = float(good.sum()), float(bad.sum())
    num_loans = num_good + num_bad
    found = {"loans": Estimate(num_loans, noise_stddev * float(np.sqrt(2 * NUM_SCORE_CELLS)))}
    fewest = max(_FEWEST * noise_stddev * float(np.sqrt(NUM_SCORE_CELLS)), 0.5)
    if min(num_good, num_bad) < fewest:
        return found

    def keep(name: str, value: float, by_good: "NDArray[np.float64]", by_bad: "NDArray[np.float64]") -> None:
        error = noise_stddev * float(np.sqrt((by_good**2).sum() + (by_bad**2).sum()))
        if error <= LARGEST_ERRORS[name]:
            found[name] = Estimate(value, error)

    ones, centres = np.ones(NUM_SCORE_CELLS), cell_centres()
    goods_below = (np.cumsum(good) - good / 2) / num_good
    bads_above = (num_bad - np.cumsum(bad) + bad / 2) / num_bad
    auroc = float(bad @ goods_below) / num_bad
    keep("auroc", auroc, (bads_above - auroc) / num_good, (goods_below - auroc) / num_bad)

    share_good, share_bad = np.cumsum(good) / num_good, np.cumsum(bad) / num_bad
    widest = int(np.abs(share_good - share_bad).argmax())
    sign = float(np.sign(share_good[widest] - share_bad[widest]))
    up_to = (np.arange(NUM_SCORE_CELLS) <= widest).astype(np.float64)
    keep(
        "ks",
        float(abs(share_good[widest] - share_bad[widest])),
        sign * (up_to - share_good[widest]) / num_good,
        -sign * (up_to - share_bad[widest]) / num_bad,
    )

    for name, of_good, of_bad in (
        ("brier", centres**2, (1 - centres) ** 2),
        ("log_loss", -np.log1p(-centres), -np.log(centres)),
        ("bad_rate", 0 * ones, ones),
    ):
        mean = float(good @ of_good + bad @ of_bad) / num_loans
        keep(name, mean, (of_good - mean) / num_loans, (of_bad - mean) / num_loans)
    ratio = float((good + bad) @ centres) / num_bad
    keep("calibration_ratio", ratio, centres / num_bad, (centres - ratio) / num_bad)
    return found


def calibration_table(counts: ScoreCounts, noise_stddev: float) -> tuple[Decile, ...]:
    """Return predicted against actual bad loans in tenths of the loans, by score; those that noise hides are left out.

    A tenth is made of whole cells, so there are fewer where many loans share a cell.

    Args:
        counts: Of the whole federation.
        noise_stddev: As for `figures_of`.
    """
    loans = counts.good + counts.bad
    # Where to cut is chosen of the same noisy counts: it reveals nothing more, and hardly moves a rate.
    below = np.cumsum(np.maximum(loans, 0.0))
    if not below[-1] > 0.0:
        return ()
    tenth = np.minimum((below - np.maximum(loans, 0.0) / 2) / below[-1] * _NUM_DECILES, _NUM_DECILES - 1)
    edges, centres = cell_edges(), cell_centres()
    found: list[Decile] = []
    for number in range(_NUM_DECILES):
        cells = np.flatnonzero(tenth.astype(np.int64) == number)
        if not len(cells):
            continue
        low, high = float(edges[cells[0]]), float(edges[cells[-1] + 1])
        actual = estimate_rate(counts.bad[cells], counts.good[cells], noise_stddev)
        if actual is None:
            continue
        total = float(loans[cells].sum())
        found.append(
            Decile(
                low=low,
                high=high,
                loans=Estimate(total, noise_stddev * float(np.sqrt(2 * len(cells)))),
                predicted=float(np.clip(loans[cells] @ centres[cells] / total, low, high)),
                actual=actual,
            )
        )
    return tuple(found)


def estimate_rate(
    inside: "NDArray[np.float64]", outside: "NDArray[np.float64]", noise_stddev: float
) -> Estimate | None:
    """Return the share of the loans in some cells among those in these and others; None where noise hides it.

    Args:
        inside: Counts of the cells that are in the numerator.
        outside: Counts of those in the denominator only.
        noise_stddev: As for `figures_of`.
    """
    total = float(inside.sum() + outside.sum())
    fewest = max(_FEWEST * noise_stddev * float(np.sqrt(len(inside) + len(outside))), 0.5)
    if total < fewest:
        return None
    rate = float(inside.sum()) / total
    error = noise_stddev * float(np.sqrt(len(inside) * (1 - rate) ** 2 + len(outside) * rate**2)) / total
    return Estimate(min(max(rate, 0.0), 1.0), error) if error <= LARGEST_RATE_ERROR else None

"""Are the batches what the ledger charges for: each loan in each one by a coin of its own, new in every step?

A share of draws that is right on the average says nothing about that: batches of a fixed size, loans in the order of
an epoch, and the very same batch in every step all have it, and none of them has the guarantee of Poisson sampling.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.privacy.lower_bounds import clopper_pearson
from fedfin.privacy.noise_checks import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["DrawPairs", "again_check", "count_pairs", "size_check"]


@dataclass(frozen=True, slots=True)
class DrawPairs:
    """What disjoint pairs of neighbouring steps drew from one table.

    Attributes:
        num_loans: Of the table.
        num_pairs: Pairs of steps.
        num_again: Loans that both steps of a pair drew, over all pairs.
        num_same_size: Pairs of equally many loans.
    """

    num_loans: int
    num_pairs: int = 0
    num_again: int = 0
    num_same_size: int = 0


def count_pairs(pairs: DrawPairs, one: "NDArray[np.bool_]", other: "NDArray[np.bool_]") -> DrawPairs:
    """Return the counts with one more pair of draws, each of shape (num_loans,)."""
    return DrawPairs(
        pairs.num_loans,
        pairs.num_pairs + 1,
        pairs.num_again + int((one & other).sum()),
        pairs.num_same_size + int(one.sum() == other.sum()),
    )


def again_check(jobs: "Sequence[DrawPairs]", sample_rate: float, error: float) -> Check:
    """Check that a loan is drawn in two steps one after the other as often as by two coins.

    Args:
        jobs: Pairs of steps of each table.
        sample_rate: Planned, q: the chance is q squared.
        error: Chance that honest draws fail, in (0, 1).
    """
    again, num = sum(job.num_again for job in jobs), sum(job.num_pairs * job.num_loans for job in jobs)
    low, high = clopper_pearson(again, num, error / 2.0) if num else (0.0, 1.0)
    share, planned = again / max(1, num), sample_rate * sample_rate
    text = (
        f"loans were drawn in two steps running with a chance of {share:.4g}, by coins it is {planned:.4g}"
        " (another share means that draws depend on earlier ones)"
    )
    return Check("draws in two steps", low <= planned <= high, share, planned, text)


def size_check(jobs: "Sequence[DrawPairs]", sample_rate: float, error: float) -> Check:
    """Check that two batches have the same size no more often than by coins.

    Args:
        jobs: Pairs of steps of each table.
        sample_rate: Planned.
        error: Chance that honest draws fail, in (0, 1).
    """
    same, num = sum(job.num_same_size for job in jobs), sum(job.num_pairs for job in jobs)
    low, _ = clopper_pearson(same, num, error) if num else (0.0, 1.0)
    # tables of canaries differ in size by the coins; equal sizes are likeliest in the smallest
    allowed = max((_chance_of_same_size(job.num_loans, sample_rate) for job in jobs), default=1.0)
    share = same / max(1, num)
    text = (
        f"two batches had the same size with a chance of {share:.4g}, by coins it is {allowed:.4g} at most"
        " (more means that the size is fixed, which is no Poisson sample)"
    )
    return Check("batch sizes", low <= allowed, share, allowed, text)


def _chance_of_same_size(num_loans: int, sample_rate: float) -> float:
    """Return P[two independent Binomial(num_loans, sample_rate) are equal]."""
    if sample_rate == 1.0:
        return 1.0
    counts = range(num_loans + 1)
    logs = np.array(
        [
            math.lgamma(num_loans + 1.0)
            - math.lgamma(count + 1.0)
            - math.lgamma(num_loans - count + 1.0)
            + count * math.log(sample_rate)
            + (num_loans - count) * math.log1p(-sample_rate)
            for count in counts
        ]
    )
    return min(1.0, float(np.exp(2.0 * logs).sum()))

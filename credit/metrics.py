"""Figures of merit of predicted default probabilities, with numpy only.

In all of them a label of 1 is a bad loan and a higher score means more likely bad. AUROC is the chance that a
random bad loan scores above a random good one, ties counting half (Hanley & McNeil, Radiology 143, 1982);
KS is the largest distance between the two score distributions. Intervals are stratified paired bootstrap.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "auroc", "bootstrap_gain", "brier", "calibration_ratio", "ks", "log_loss"]

SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the bounds of its 95% confidence interval."""

    estimate: float
    low: float
    high: float


def auroc(labels: "ArrayLike", scores: "ArrayLike") -> float:
    """Return the area under the receiver operating characteristic, in [0, 1].

    Args:
        labels: 0 or 1, shape (n,).
        scores: Higher means more likely bad; any monotone scale, shape (n,).

    Raises:
        DataError: Shapes differ, a value is not finite, or labels are not both 0 and 1.
    """
    bad, values = _checked(labels, scores)
    ranked = _Ranked(bad, [values])
    return float(ranked.aurocs(np.ones((1, len(bad))), 0)[0])


def ks(labels: "ArrayLike", scores: "ArrayLike") -> float:
    """Return the Kolmogorov-Smirnov distance between bad and good scores, in [0, 1]; errors as `auroc`."""
    bad, values = _checked(labels, scores)
    order = np.argsort(values, kind="stable")
    last_of_ties = np.append(np.diff(values[order]) > 0, [True])
    share_bad = np.cumsum(bad[order]) / bad.sum()
    share_good = np.cumsum(~bad[order]) / (~bad).sum()
    return float(np.abs(share_bad - share_good)[last_of_ties].max())


def brier(labels: "ArrayLike", probabilities: "ArrayLike") -> float:
    """Return the mean squared error of the probabilities.

    Raises:
        DataError: As `auroc`, or a probability is outside [0, 1].
    """
    bad, values = _checked_probabilities(labels, probabilities)
    return float(np.mean((values - bad) ** 2))


def log_loss(labels: "ArrayLike", probabilities: "ArrayLike") -> float:
    """Return the mean negative log likelihood, in nats; errors as `brier`.

    Probabilities are kept 1e-12 away from 0 and 1, so that the loss is finite.
    """
    bad, values = _checked_probabilities(labels, probabilities)
    values = np.clip(values, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return float(-np.mean(np.where(bad, np.log(values), np.log1p(-values))))


def calibration_ratio(labels: "ArrayLike", probabilities: "ArrayLike") -> float:
    """Return predicted over actual bad loans; 1 is right, below 1 underestimates; errors as `brier`."""
    bad, values = _checked_probabilities(labels, probabilities)
    return float(values.sum() / bad.sum())


def bootstrap_gain(
    labels: "ArrayLike",
    new_scores: "ArrayLike",
    old_scores: "ArrayLike",
    rng: np.random.Generator,
    *,
    num_resamples: int = 1000,
) -> Interval:
    """Return how much AUROC the new scores gain over the old ones on the same loans.

    Loans are redrawn with replacement among the bad and among the good ones, so that no resample lacks a
    class; both scores see the same resample, so that what they share cancels. Scores may be on
    different scales.

    Args:
        labels: 0 or 1, shape (n,).
        new_scores: Shape (n,).
        old_scores: Shape (n,).
        rng: Draws the resamples.
        num_resamples: At least 100, for the percentiles to mean something.

    Returns:
        The gain on all loans and its 2.5% and 97.5% percentiles.

    Raises:
        DataError: As `auroc`, or too few resamples.
    """
    bad, new = _checked(labels, new_scores)
    _, old = _checked(labels, old_scores)
    if num_resamples < 100:
        msg = f"num_resamples is {num_resamples}; a 95% interval needs at least 100"
        raise DataError(msg)
    num_bad, num_good = int(bad.sum()), int((~bad).sum())
    # how often each loan is drawn: a weight per loan says all that a resample says
    times = np.empty((num_resamples, len(bad)))
    times[:, bad] = rng.multinomial(num_bad, np.full(num_bad, 1 / num_bad), size=num_resamples)
    times[:, ~bad] = rng.multinomial(num_good, np.full(num_good, 1 / num_good), size=num_resamples)
    ranked = _Ranked(bad, [new, old])
    gains = ranked.aurocs(times, 0) - ranked.aurocs(times, 1)
    low, high = np.quantile(gains, [0.025, 0.975])
    return Interval(auroc(labels, new_scores) - auroc(labels, old_scores), float(low), float(high))


class _Ranked:
    """Scores sorted once, so that the AUROC of many weightings of the loans is a few cumulative sums."""

    def __init__(self, bad: "NDArray[np.bool_]", scores: "list[NDArray[np.float64]]") -> None:
        self._bad = bad
        self._orders = [np.argsort(values, kind="stable") for values in scores]
        self._starts = [
            np.flatnonzero(np.append([True], np.diff(values[order]) > 0))
            for values, order in zip(scores, self._orders, strict=True)
        ]

    def aurocs(self, weights: "NDArray[np.float64]", which: int) -> "NDArray[np.float64]":
        """Return one AUROC of score `which` for each row of weights, shape (resamples, n)."""
        order, starts = self._orders[which], self._starts[which]
        ordered, bad = weights[:, order], self._bad[order]
        # one column per distinct score: ties then count half
        bads = np.add.reduceat(ordered * bad, starts, axis=1)
        goods = np.add.reduceat(ordered * ~bad, starts, axis=1)
        goods_below = np.cumsum(goods, axis=1) - goods / 2
        return np.asarray((bads * goods_below).sum(axis=1) / (bads.sum(axis=1) * goods.sum(axis=1)))


def _checked(labels: "ArrayLike", scores: "ArrayLike") -> "tuple[NDArray[np.bool_], NDArray[np.float64]]":
    """Return labels as booleans and scores as float64, or refuse."""
    actual = np.asarray(labels)
    values = np.asarray(scores, dtype=np.float64)
    if actual.ndim != 1 or actual.shape != values.shape:
        msg = (
            f"labels have shape {actual.shape} and scores {values.shape}; give one score per loan, both (n,)"
        )
        raise DataError(msg)
    if not np.isin(actual, (0, 1)).all():
        msg = "labels hold values other than 0 and 1; code the outcome as 1 = bad, 0 = good"
        raise DataError(msg)
    if not np.isfinite(values).all():
        msg = f"{int((~np.isfinite(values)).sum())} scores are not finite; score only loans that were checked"
        raise DataError(msg)
    bad = actual.astype(bool)
    if bad.all() or not bad.any():
        msg = f"all {len(bad)} loans have one outcome; a figure of merit needs both good and bad loans"
        raise DataError(msg)
    return bad, values


def _checked_probabilities(
    labels: "ArrayLike", probabilities: "ArrayLike"
) -> "tuple[NDArray[np.bool_], NDArray[np.float64]]":
    bad, values = _checked(labels, probabilities)
    if values.min() < 0 or values.max() > 1:
        msg = f"probabilities lie in [{values.min():.6g}, {values.max():.6g}]; they must lie in [0, 1]"
        raise DataError(msg)
    return bad, values

"""Columns that know the outcome: how well a single column alone ranks loans it has not seen.

A column recorded after the loan went bad (a recovery, a changed term) predicts far better than anything
known when the loan was granted, and spoils the model of every lender. Such a column need not be monotone:
in the SBA loans `Term` is a multiple of 12 for the goods and hardly ever for the bads. So each distinct
value, and each quantile bin, is scored by the bad rate of the other folds, and the better one counts.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fedfin.credit.metrics import auroc

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEAK_AUC", "MIN_CLASS_SIZE", "single_column_auc"]

LEAK_AUC = 0.95
"""Above this a single column is suspected; honest columns of real tables stay below 0.85."""

MIN_CLASS_SIZE = 10
"""Fewer bad or good loans than this, and an AUC says nothing."""

_NUM_FOLDS = 5
_NUM_BINS = 20
_PRIOR_WEIGHT = 1.0  # loans that the overall bad rate counts for in a value's rate


def single_column_auc(
    values: "NDArray[np.float64] | NDArray[np.object_]", labels: "NDArray[np.int64]"
) -> float:
    """Return the AUC that one column alone reaches on loans it was not fitted to.

    Args:
        values: Shape (n,); float64 with NaN for missing, or object with None for missing. Not changed.
        labels: Shape (n,), 1 bad, 0 good; at least `MIN_CLASS_SIZE` of each. Not changed.

    Returns:
        In [0, 1], about 0.5 for a column that knows nothing: the best of the rank of the number itself, the
        rate of its exact value, and the rate of its quantile bin, each rate taken from the other folds.
    """
    # Folds by position within each class: the same answer every time, and no fold without bads.
    folds = np.empty(len(labels), dtype=np.int64)
    for outcome in (0, 1):
        members = np.flatnonzero(labels == outcome)
        folds[members] = np.arange(len(members)) % _NUM_FOLDS
    exact = pd.factorize(pd.Series(values), use_na_sentinel=False)[0]
    aucs = [auroc(labels, _rates_of_other_folds(exact, labels, folds))]
    if values.dtype == np.float64:
        numbers = values.astype(np.float64)
        missing = np.isnan(numbers)
        aucs.append(auroc(labels, _rates_of_other_folds(_quantile_bins(numbers), labels, folds)))
        # The rank needs no folds: its direction is one bit, fitted to all. Missing ones rank in the middle.
        middle = np.median(numbers[~missing]) if not missing.all() else 0.0
        ranked = auroc(labels, np.where(missing, middle, numbers))
        aucs += [ranked, 1 - ranked]
    return max(aucs)


def _rates_of_other_folds(
    groups: "NDArray[np.intp]", labels: "NDArray[np.int64]", folds: "NDArray[np.int64]"
) -> "NDArray[np.float64]":
    """Return for each loan the bad rate of its group among the loans of the other folds."""
    rates = np.empty(len(labels))
    num_groups = int(groups.max()) + 1
    for fold in range(_NUM_FOLDS):
        held_out = folds == fold
        fitted = ~held_out
        counts = np.bincount(groups[fitted], minlength=num_groups)
        bads = np.bincount(groups[fitted], weights=labels[fitted], minlength=num_groups)
        prior = labels[fitted].mean()
        smoothed = (bads + _PRIOR_WEIGHT * prior) / (counts + _PRIOR_WEIGHT)
        rates[held_out] = smoothed[groups[held_out]]
    return rates


def _quantile_bins(numbers: "NDArray[np.float64]") -> "NDArray[np.intp]":
    """Return each number's quantile bin; missing ones have a bin of their own."""
    known = numbers[~np.isnan(numbers)]
    inner = np.quantile(known, np.arange(1, _NUM_BINS) / _NUM_BINS) if len(known) else np.empty(0)
    bins = np.searchsorted(np.unique(inner), numbers, side="right")
    bins[np.isnan(numbers)] = _NUM_BINS
    return bins

"""The look at a model with made-up loans: what mixes loans is refused, what rounding does once is not."""

import itertools

import numpy as np
import pytest

from fedfin.errors import TrainingError
from fedfin.privacy.probing import require_loans_apart


def sums_spoilt_in(deviates):
    """Return clipped sums of a model whose gradient is the loan itself, wrong for the batches of some looks."""
    batches = itertools.count()

    def summed(loans, labels, bound):
        gradients = loans.astype(np.float64)
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        total = (gradients * np.minimum(1.0, bound / norms)).sum(axis=0)
        # two batches a look: one plain, one clipped
        return total * 1.1 if len(loans) > 1 and deviates(next(batches) // 2) else total

    return summed


def test_an_accident_of_rounding_in_one_look_refuses_no_model():
    assert require_loans_apart(sums_spoilt_in(lambda look: look == 0), None, 2)


def test_what_every_look_shows_is_refused():
    with pytest.raises(TrainingError, match="depends on the other loans"):
        require_loans_apart(sums_spoilt_in(lambda look: True), None, 2)


def test_a_loan_with_next_to_no_gradient_is_no_bound_to_compare_at():
    """Its gradient is float32's last bits, which differ between a batch and a loan alone."""
    saturated = np.sin(np.arange(1.0, 4.0)).astype(np.float32)  # one loan and more of every look

    def summed(loans, labels, bound):
        gradients = loans.astype(np.float64)
        gradients[np.isin(loans[:, 0], saturated)] *= 1e-12 * np.array(
            [1.0, 1.0 if len(loans) == 1 else -1.0]
        )
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        return (gradients * np.minimum(1.0, bound / norms)).sum(axis=0)

    assert require_loans_apart(summed, None, 2)

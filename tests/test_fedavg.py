"""FedAvg adds the weighted mean of the updates; weights say no more about a lender than its bucket."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from fedfin.errors import TrainingError
from fedfin.plan import TrainingPlan
from fedfin.strategies.fedavg import fedavg
from fedfin.strategies.strategy import CohortSum, ModelState, lender_weight

STATE = ModelState(np.array([1, 2, 3], np.float32), 4)
updates = arrays(np.float32, (3, 3), elements=st.floats(-10, 10, width=32))
weights = st.lists(st.floats(1, 1000), min_size=3, max_size=3)


def summed(lender_updates, lender_weights):
    values = np.einsum("l,ld->d", np.array(lender_weights), lender_updates.astype(np.float64))
    return CohortSum(values, float(sum(lender_weights)), len(lender_weights))


@given(updates, weights)
def test_the_new_model_is_the_weighted_mean_of_the_lenders_models(lender_updates, lender_weights):
    expected = np.average(STATE.weights + lender_updates.astype(np.float64), axis=0, weights=lender_weights)
    found = fedavg(STATE, summed(lender_updates, lender_weights))
    assert_allclose(found.weights, expected, rtol=1e-6, atol=1e-5)
    assert found.weights.dtype == np.float32
    assert found.round == 5


@given(updates, weights, st.permutations(range(3)))
def test_the_order_of_the_lenders_does_not_matter(lender_updates, lender_weights, order):
    order = list(order)
    turned = summed(lender_updates[order], [lender_weights[place] for place in order])
    found = fedavg(STATE, summed(lender_updates, lender_weights))
    assert_allclose(fedavg(STATE, turned).weights, found.weights, atol=1e-5)


@given(updates)
def test_only_the_weights_proportions_matter(lender_updates):
    light, heavy = summed(lender_updates, [1, 2, 3]), summed(lender_updates, [100, 200, 300])
    assert_allclose(fedavg(STATE, light).weights, fedavg(STATE, heavy).weights, atol=1e-5)


def test_the_state_and_the_sum_are_not_changed():
    cohort_sum = summed(np.ones((3, 3), np.float32), [1, 1, 1])
    fedavg(STATE, cohort_sum)
    assert_array_equal(STATE.weights, [1, 2, 3])
    assert_array_equal(cohort_sum.values, [3, 3, 3])


@pytest.mark.parametrize(("weight", "num_lenders"), [(0.0, 3), (-1.0, 3), (np.nan, 3), (np.inf, 3), (1.0, 0)])
def test_a_sum_without_weight_is_refused(weight, num_lenders):
    with pytest.raises(TrainingError, match="run the round again with a quorum"):
        CohortSum(np.zeros(3), weight, num_lenders)


@pytest.mark.parametrize("values", [np.array([0, np.nan, 0]), np.array([0, np.inf, 0]), np.zeros((3, 1))])
def test_a_sum_that_is_not_finite_or_not_flat_is_refused(values):
    with pytest.raises(TrainingError, match="the round is void"):
        CohortSum(values, 1.0, 3)


def test_a_sum_of_another_model_is_refused():
    with pytest.raises(TrainingError, match="compare the fingerprints"):
        fedavg(STATE, CohortSum(np.zeros(4), 1.0, 3))


def test_a_model_that_overflows_is_refused():
    with pytest.raises(TrainingError, match=r"lower training\.learning_rate"):
        fedavg(STATE, CohortSum(np.full(3, 1e300), 1.0, 3))


@pytest.mark.parametrize(
    ("num_loans", "weighting", "weight"),
    [
        (149, "size", 100),
        (150, "size", 150),
        (5000, "size", 2000),
        (7, "size", 50),
        (149, "sqrt", 10),
        (149, "equal", 1),
    ],
)
def test_a_weight_is_capped_and_rounded_down_to_its_bucket_but_at_least_one_bucket(
    num_loans, weighting, weight
):
    training = TrainingPlan(weighting=weighting, weight_cap=2000, weight_bucket=50)
    assert lender_weight(num_loans, training) == weight


@given(st.integers(1, 10_000), st.integers(1, 5000), st.integers(1, 500))
def test_lenders_of_one_bucket_have_one_weight_and_larger_ones_no_smaller(num_loans, cap, bucket):
    training = TrainingPlan(weighting="size", weight_cap=cap, weight_bucket=bucket)
    weight = lender_weight(num_loans, training)
    assert math.remainder(weight, bucket) == 0
    assert 0 < weight <= max(cap, bucket)
    assert weight <= lender_weight(num_loans + 1, training)


def test_a_lender_without_loans_has_no_weight():
    with pytest.raises(TrainingError, match="leave it out of the round"):
        lender_weight(0, TrainingPlan())

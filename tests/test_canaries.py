"""From an attack's successes to a bound: never above the truth but by the stated chance, and close to it.

Also the canaries themselves, and what the checks of the noise refuse.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fedfin.credit.models import Architecture, build, load_weights, num_parameters
from fedfin.errors import PrivacyParameterError
from fedfin.privacy.accounting import GaussianEvent, epsilon_pld
from fedfin.privacy.canaries import (
    CANARY_LABEL,
    CANARY_VALUE,
    canary_trace,
    guess_balanced,
    guess_extremes,
    hostile_loans,
    log_likelihood_ratio,
    with_canaries,
)
from fedfin.privacy.lower_bounds import (
    binomial_tail,
    clopper_pearson,
    epsilon_at_least,
    mu_at_least,
    one_run_epsilon,
    one_run_p_value,
)
from fedfin.privacy.noise_checks import (
    between_check,
    lag_check,
    repeat_check,
    scale_check,
    shape_check,
    within_check,
)

DELTA = 1e-5
ERROR = 1e-4


def exact_tail(count, num, chance):
    chance = Fraction(chance)
    terms = (math.comb(num, k) * chance**k * (1 - chance) ** (num - k) for k in range(max(0, count), num + 1))
    return float(sum(terms))


@given(st.integers(0, 40), st.integers(-2, 42), st.floats(0.0, 1.0, allow_subnormal=False))
def test_the_binomial_tail_is_the_exact_one(num, count, chance):
    assert_allclose(binomial_tail(count, num, chance), exact_tail(count, num, chance), rtol=1e-9, atol=1e-300)


def test_the_binomial_tail_of_millions_keeps_its_digits():
    # the expected value is scipy's
    assert_allclose(binomial_tail(1_030_000, 2_000_000, 0.514), 0.00233558826, rtol=1e-6)


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.floats(1e-4, 0.2))
def test_each_bound_of_a_chance_is_wrong_no_more_often_than_said(num, chance, error):
    bounds = [clopper_pearson(count, num, error) for count in range(num + 1)]
    weights = [math.comb(num, k) * chance**k * (1 - chance) ** (num - k) for k in range(num + 1)]
    above = sum(weight for weight, (low, _) in zip(weights, bounds, strict=True) if low > chance)
    below = sum(weight for weight, (_, high) in zip(weights, bounds, strict=True) if high < chance)
    assert max(above, below) <= error * (1 + 1e-9)


@pytest.mark.parametrize("mu", [0.02, 0.1, 0.8, 2.0])
def test_guesses_about_a_gaussian_release_overstate_mu_no_more_often_than_said(mu):
    num, chance = 20_000, 0.5 * math.erfc(-mu / 2 / math.sqrt(2))
    least, enough = 0, num
    while least < enough:  # the smallest count whose bound passes the true mu
        middle = (least + enough) // 2
        least, enough = (least, middle) if mu_at_least(middle, num, ERROR) > mu else (middle + 1, enough)
    assert binomial_tail(least, num, chance) <= ERROR
    assert binomial_tail(least - 1, num, chance) > ERROR  # and the bound is as tight as guesses allow


def test_guesses_no_better_than_chance_show_nothing():
    assert mu_at_least(5000, 10_000, ERROR) == 0.0
    assert epsilon_at_least(0.0, 0.5, 100, DELTA) == 0.0


@pytest.mark.parametrize(
    ("mu", "rate", "steps"),
    [(1 / 12, 1.0, 100), (2.0, 1.0, 1), (1.0, 0.0128, 2343), (0.5, 0.1, 100), (2.0, 0.5, 10)],
)
def test_composed_steps_come_out_just_below_the_upper_bound_of_the_same_steps(mu, rate, steps):
    upper = epsilon_pld([GaussianEvent(1 / mu, rate, steps)], DELTA)
    assert 0.995 * upper <= epsilon_at_least(mu, rate, steps, DELTA) <= upper


def test_a_bound_without_a_meaning_is_refused():
    with pytest.raises(PrivacyParameterError, match="mu -1"):
        epsilon_at_least(-1.0, 0.5, 10, DELTA)


@given(st.integers(1, 30), st.integers(0, 30), st.floats(0.0, 5.0))
def test_without_delta_one_run_is_a_binomial_of_randomized_response(num_guesses, num_correct, epsilon):
    num_correct = min(num_correct, num_guesses)
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = one_run_p_value(100, num_guesses, num_correct, epsilon, 0.0)
    assert_allclose(found, exact_tail(num_correct, num_guesses, chance), rtol=1e-9)


def test_delta_adds_to_one_run_what_the_theorem_says():
    """The theorem's maximum over i, summed by hand."""
    canaries, guesses, correct, epsilon, delta = 50, 20, 18, 0.7, 1e-3
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    term = [math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(guesses + 1)]
    most = max(sum(term[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = sum(term[correct:]) + 2 * canaries * delta * most
    assert_allclose(one_run_p_value(canaries, guesses, correct, epsilon, delta), expected, rtol=1e-9)


def test_one_run_bounds_epsilon_where_all_guesses_are_right():
    # all of 100 right: chance**100 = error, at epsilon = log(chance / (1 - chance))
    chance = 1e-3 ** (1 / 100)
    assert_allclose(one_run_epsilon(100, 100, 100, 0.0, 1e-3), math.log(chance / (1 - chance)), rtol=1e-6)


def test_one_run_shows_nothing_where_half_of_the_guesses_are_right():
    assert one_run_epsilon(1000, 800, 400, DELTA, 1e-3) == 0.0


def test_one_run_is_not_fooled_by_randomized_response():
    """The sharpest mechanism there is: over its outcomes the bound passes its epsilon no more often than said."""
    epsilon, num, error = 1.0, 60, 0.01
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    wrong = [count for count in range(num + 1) if one_run_epsilon(num, num, count, 0.0, error) > epsilon]
    assert 0 < exact_tail(min(wrong), num, chance) <= error


def test_a_canary_stands_alone_in_its_column():
    loans, labels = np.ones((3, 2), np.float32), np.array([0, 1, 0])
    table, outcome = with_canaries(loans, labels, np.array([True, False, True]), 1)
    assert_array_equal(table[:3], np.array([[1, 0, 0, 0, 1]] * 3))
    assert_array_equal(table[3:], np.array([[0, CANARY_VALUE, 0, 0, 0], [0, 0, 0, CANARY_VALUE, 0]]))
    assert_array_equal(outcome, [0, 1, 0, CANARY_LABEL, CANARY_LABEL])


@pytest.mark.parametrize("architecture", [Architecture("logistic", 6), Architecture("mlp", 6, (4,))])
def test_a_canary_reaches_the_bound_along_the_stated_direction(architecture):
    """Against torch's own gradient of the canary's loss, clipped by hand."""
    module = build(architecture)
    weights = np.random.default_rng(0).normal(size=num_parameters(architecture)).astype(np.float32)
    height = 4 if architecture.hidden else 1
    weights[: height * 6].reshape(height, 6)[:, 5] = 0.0
    load_weights(module, weights)
    trace = canary_trace(module, 6, 5, clipping_bound=2.0)

    twin = build(architecture).double()
    load_weights(twin, weights)
    loan = torch.zeros((1, 6), dtype=torch.float64)
    loan[0, 5] = CANARY_VALUE
    loss = torch.nn.functional.softplus(twin(loan)).sum()  # the log loss of label 0
    loss.backward()
    gradient = np.concatenate([parameter.grad.numpy().ravel() for parameter in twin.parameters()])
    gradient *= min(1.0, 2.0 / np.linalg.norm(gradient))
    own = gradient[: height * 6].reshape(height, 6)[:, 5]
    assert_allclose(trace.direction * trace.reach * 2.0, own, rtol=1e-6)
    assert 0.999 < trace.reach <= 1.0


def test_a_canary_behind_a_zero_layer_leaves_no_trace():
    architecture = Architecture("mlp", 3, (2,))
    module = build(architecture)
    load_weights(module, np.zeros(num_parameters(architecture), np.float32))
    assert canary_trace(module, 3, 2, 1.0).reach == 0.0


def test_hostile_loans_are_finite_and_of_both_outcomes():
    loans, labels = hostile_loans(5)
    assert loans.shape == (14, 5)
    assert np.isfinite(loans).all()
    assert_array_equal(np.bincount(labels), [7, 7])


def test_guesses_are_about_as_many_present_as_absent_canaries():
    observed = np.array([1.0, 1.0, 1.0, 0.0, 0.9])
    present = np.array([True, True, True, False, False])
    # of the three present ones two are asked about, and all guesses but the last canary's are right
    assert guess_balanced(observed, present, 0.5, np.random.default_rng(0)) == (3, 4)


def test_extremes_are_guessed_and_the_middle_is_abstained_from():
    scores = np.array([5.0, 4.0, 0.0, -4.0, -5.0])
    assert guess_extremes(scores, np.array([True, False, True, False, False]), 4) == 3


@pytest.mark.parametrize("num_guesses", [0, 3, 6])
def test_a_number_of_guesses_that_cannot_be_halved_or_is_too_large_is_refused(num_guesses):
    with pytest.raises(PrivacyParameterError, match="must be even"):
        guess_extremes(np.zeros(4), np.ones(4, np.bool_), num_guesses)


def test_a_release_is_scored_by_its_likelihoods():
    observed, reach, sigma, rate = np.array([-1.0, 0.2, 3.0]), 0.9, 1.5, 0.3

    def density(mean):
        return np.exp(-((observed - mean) ** 2) / (2 * sigma**2))

    expected = np.log(((1 - rate) * density(0) + rate * density(reach)) / density(0))
    assert_allclose(log_likelihood_ratio(observed, reach, sigma, rate), expected)
    assert_allclose(
        log_likelihood_ratio(observed, reach, sigma, 1.0), np.log(density(reach) / density(0)), atol=1e-12
    )


def unit_noise(seed, steps=40, values=250):
    return np.random.default_rng(seed).normal(size=(steps, values))


@pytest.mark.parametrize("seed", range(5))
def test_honest_noise_passes_every_check(seed):
    one, other = unit_noise(seed), unit_noise([seed, 1])
    checks = (
        scale_check(one, ERROR),
        shape_check(one, ERROR),
        repeat_check([one, other]),
        within_check([one, other], ERROR),
        between_check(one, other, ERROR),
        lag_check([one, other], ERROR),
    )
    assert [check.text for check in checks if not check.holds] == []


@pytest.mark.parametrize("factor", [0.5, 0.95, 1.05])
def test_noise_of_another_scale_fails(factor):
    assert not scale_check(factor * unit_noise(0), ERROR).holds


def test_noise_of_the_right_scale_and_another_shape_fails():
    uniform = np.random.default_rng(0).uniform(-math.sqrt(3), math.sqrt(3), 10_000)
    assert scale_check(uniform, ERROR).holds
    assert not shape_check(uniform, ERROR).holds


def test_a_step_whose_noise_another_step_has_fails():
    one, other = unit_noise(0), unit_noise(1)
    one[30] = one[3]
    assert not repeat_check([one, other]).holds
    assert not within_check([one, other], ERROR).holds
    assert between_check(one, other, ERROR).holds


def test_a_step_that_reuses_half_of_another_steps_noise_fails():
    one = unit_noise(0)
    one[30] = (one[3] + one[30]) / math.sqrt(2)
    assert repeat_check([one]).holds
    assert not within_check([one], ERROR).holds


def test_two_lenders_with_the_same_noise_fail():
    one = unit_noise(0)
    assert not repeat_check([one, one.copy()]).holds
    assert not between_check(one, one.copy(), ERROR).holds
    assert not lag_check([one, one.copy()], ERROR).holds


def test_two_lenders_on_one_stream_some_values_apart_fail():
    stream = np.random.default_rng(0).normal(size=10_137)
    one, other = stream[:10_000].reshape(40, 250), stream[137:].reshape(40, 250)
    assert repeat_check([one, other]).holds
    assert not lag_check([one, other], ERROR).holds


def test_one_value_for_all_coordinates_of_a_step_fails():
    one = np.repeat(unit_noise(0, values=1), 250, axis=1)
    assert not lag_check([one], ERROR).holds


def test_too_little_noise_to_judge_is_refused():
    with pytest.raises(PrivacyParameterError, match="needs 100"):
        scale_check(np.zeros(99), ERROR)


def test_noise_that_is_not_finite_is_refused():
    with pytest.raises(PrivacyParameterError, match="not finite"):
        shape_check(np.full(200, np.nan), ERROR)

"""Epsilon agrees with closed forms and published figures, and calibration meets the plan."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedfin.errors import PrivacyParameterError
from fedfin.plan import PrivacyPlan
from fedfin.privacy.accounting import (
    CalibratedNoise,
    GaussianEvent,
    borrower_epsilon,
    borrower_epsilons,
    calibrate,
    epsilon_pld,
    epsilon_rdp,
    job_events,
    merge_events,
)
from fedfin.privacy.events import SharedNoiseEvent

DELTA = 1e-5
MEASURED = GaussianEvent(1.0, sample_rate=0.0128, count=2343)

events = st.builds(
    GaussianEvent,
    st.floats(1.5, 50.0),
    st.sampled_from([0.001, 0.05, 0.3, 0.5, 0.9, 1.0]),
    st.integers(1, 100),
)


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism: Balle & Wang 2018, theorem 8."""

    def excess(epsilon: float) -> float:
        half, full = 0.5 / noise_multiplier, epsilon * noise_multiplier
        return stats.norm.cdf(half - full) - math.exp(epsilon) * stats.norm.cdf(-half - full) - delta

    return optimize.brentq(excess, 0.0, 200.0, xtol=1e-12)


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize(
    ("noise_multiplier", "count"), [(0.5, 1), (1.0, 1), (4.0, 1), (40.0, 1), (30.0, 400)]
)
def test_pld_is_the_exact_gaussian_epsilon_rounded_up(noise_multiplier, count, delta):
    exact = analytic_epsilon(noise_multiplier / math.sqrt(count), delta)
    epsilon = epsilon_pld([GaussianEvent(noise_multiplier, count=count)], delta)
    assert exact - 1e-9 <= epsilon <= exact * 1.001


def test_measured_job_costs_what_was_measured():
    assert epsilon_pld([MEASURED], DELTA) == pytest.approx(3.6929, abs=5e-5)
    assert epsilon_rdp([MEASURED], DELTA) == pytest.approx(4.062, abs=5e-4)


def test_borrower_known_to_two_lenders_pays_twice():
    assert borrower_epsilon([MEASURED], DELTA, num_lenders=1) == epsilon_pld([MEASURED], DELTA)
    assert borrower_epsilon([MEASURED], DELTA, num_lenders=2) == pytest.approx(5.38, abs=5e-3)
    with pytest.raises(PrivacyParameterError, match="num_lenders is 0"):
        borrower_epsilon([MEASURED], DELTA, num_lenders=0)


SHARES = SharedNoiseEvent(1.0, 0.0128, 2343, size=100, share_stddev=10**7, num_shares=8, num_lenders=10)


def test_noise_in_shares_costs_what_continuous_noise_does_and_the_lattice():
    assert epsilon_pld([SHARES], DELTA) == pytest.approx(epsilon_pld([MEASURED], DELTA), rel=1e-6)
    assert epsilon_rdp([replace(SHARES, size=10**6, share_stddev=600, count=2000)], DELTA) == math.inf


def test_a_borrower_whose_loans_meet_in_one_sum_pays_more_than_for_separate_releases():
    assert borrower_epsilon([SHARES], DELTA, num_lenders=1) == epsilon_pld([SHARES], DELTA)
    assert borrower_epsilon([SHARES], DELTA, num_lenders=2) == pytest.approx(8.29, abs=0.01)
    # without sampling: one Gaussian release that moves twice as far
    sums = replace(SHARES, sample_rate=1.0, noise_multiplier=30.0, count=10)
    assert borrower_epsilon([sums], DELTA, num_lenders=2) == pytest.approx(
        epsilon_pld([GaussianEvent(15.0, 1.0, 10)], DELTA), rel=1e-4
    )


def test_a_borrower_known_to_one_two_and_three_lenders_of_both_modes():
    local, sums = GaussianEvent(30.0), replace(SHARES, sample_rate=1.0, noise_multiplier=30.0, count=1)
    figures = borrower_epsilons([local, sums], DELTA)
    for known, figure in enumerate(figures, start=1):
        both = [GaussianEvent(30.0, 1.0, known), GaussianEvent(30.0 / known)]
        assert figure == pytest.approx(epsilon_pld(both, DELTA), rel=1e-4)


def test_nothing_released_costs_nothing():
    assert epsilon_pld([], DELTA) == 0.0
    assert epsilon_rdp([], DELTA) == 0.0


@settings(max_examples=10, deadline=None)
@given(st.lists(events, min_size=1, max_size=2))
def test_pld_never_exceeds_rdp(job):
    assert 0.0 <= epsilon_pld(job, DELTA) <= epsilon_rdp(job, DELTA)


@settings(max_examples=10, deadline=None)
@given(events, events)
def test_more_releases_never_cost_less(first, second):
    assert epsilon_rdp([first, second], DELTA) >= epsilon_rdp([first], DELTA)
    more = GaussianEvent(first.noise_multiplier, first.sample_rate, first.count + 1)
    assert epsilon_rdp([more], DELTA) >= epsilon_rdp([first], DELTA)
    assert epsilon_pld([more], DELTA) >= epsilon_pld([first], DELTA) - 1e-9


@pytest.mark.parametrize("epsilon_of", [epsilon_pld, epsilon_rdp])
def test_epsilon_falls_with_noise_and_delta_and_rises_with_the_rate(epsilon_of):
    middle = epsilon_of([GaussianEvent(2.0, 0.1, 20)], DELTA)
    assert epsilon_of([GaussianEvent(2.5, 0.1, 20)], DELTA) < middle
    assert epsilon_of([GaussianEvent(2.0, 0.1, 20)], 1e-4) < middle
    assert epsilon_of([GaussianEvent(2.0, 0.2, 20)], DELTA) > middle
    assert epsilon_of([GaussianEvent(2.0, 1.0, 20)], DELTA) > epsilon_of(
        [GaussianEvent(2.0, 0.99, 20)], DELTA
    )


def test_equal_events_are_one_event_in_any_order():
    round_one, bins = GaussianEvent(2.0, 0.5, 5), GaussianEvent(20.0)
    merged = merge_events([round_one, bins, round_one])
    assert merged == (GaussianEvent(2.0, 0.5, 10), GaussianEvent(20.0))
    assert epsilon_rdp([round_one, bins, round_one], DELTA) == epsilon_rdp(merged, DELTA)
    assert epsilon_pld([round_one, bins, round_one], DELTA) == epsilon_pld(merged, DELTA)


def test_huge_costs_are_figures_and_not_hangs():
    # dp_accounting alone takes minutes or runs out of memory on these
    for hopeless in (GaussianEvent(0.01), GaussianEvent(0.05, 0.5, 10), GaussianEvent(1.0, count=10**8)):
        assert 1000.0 < epsilon_pld([hopeless], DELTA) <= epsilon_rdp([hopeless], DELTA) < math.inf


def test_an_event_says_what_it_is():
    assert (MEASURED.mechanism, MEASURED.sampler, MEASURED.relation) == (
        "gaussian",
        "poisson",
        "add_or_remove_one",
    )
    assert GaussianEvent(1.0).sampler == "none"


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, 0.009, 1.1e5, math.nan, math.inf])
def test_noise_that_protects_nothing_or_cannot_be_priced_is_refused(noise_multiplier):
    with pytest.raises(PrivacyParameterError, match=r"noise_multiplier is .* choose one between"):
        GaussianEvent(noise_multiplier)


def test_a_step_whose_cost_would_drown_in_rounding_is_refused():
    # dp_accounting's RDP reads epsilon 0 here
    with pytest.raises(PrivacyParameterError, match="rounding"):
        GaussianEvent(1e6, sample_rate=0.01)


@pytest.mark.parametrize("sample_rate", [0.001, 0.5, 0.999])
def test_the_faintest_event_that_is_accepted_still_costs_something(sample_rate):
    faint = GaussianEvent(sample_rate * 0.99e5, sample_rate)
    # ten million of them are about as many as one Gaussian release of the same total
    total = GaussianEvent(0.99e5 / math.sqrt(10**7))
    many = GaussianEvent(faint.noise_multiplier, sample_rate, 10**7)
    assert epsilon_rdp([many], DELTA) == pytest.approx(epsilon_rdp([total], DELTA), rel=1e-3)


@pytest.mark.parametrize("sample_rate", [0.0, -0.5, 1.5, math.nan])
def test_a_rate_outside_zero_to_one_is_refused(sample_rate):
    with pytest.raises(PrivacyParameterError, match="sample_rate is"):
        GaussianEvent(1.0, sample_rate)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_count_that_is_not_whole_and_positive_is_refused(count):
    with pytest.raises(PrivacyParameterError, match="count is"):
        GaussianEvent(1.0, 1.0, count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
@pytest.mark.parametrize("epsilon_of", [epsilon_pld, epsilon_rdp])
def test_a_delta_outside_zero_to_one_is_refused(epsilon_of, delta):
    with pytest.raises(PrivacyParameterError, match="delta is"):
        epsilon_of([MEASURED], delta)


def test_an_unknown_event_is_refused():
    with pytest.raises(PrivacyParameterError, match="type tuple cannot be accounted for"):
        epsilon_rdp([(1.0, 1.0, 1)], DELTA)


plans = st.builds(
    PrivacyPlan,
    epsilon=st.floats(0.3, 10.0),
    delta=st.sampled_from([1e-5, 1e-6]),
    bins_share=st.floats(0.03, 0.5),
)


@settings(max_examples=12, deadline=None)
@given(plans, st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(1, 2000))
def test_calibrated_noise_meets_the_plan_closely(plan, sample_rate, num_steps):
    noise = calibrate(plan, sample_rate=sample_rate, num_steps=num_steps)
    job = job_events(noise, sample_rate, num_steps)
    assert 0.995 * plan.epsilon <= epsilon_rdp(job, plan.delta) <= plan.epsilon
    bins_alone = epsilon_rdp([GaussianEvent(noise.bins_noise_multiplier)], plan.delta)
    assert 0.99 * plan.bins_share * plan.epsilon <= bins_alone <= plan.bins_share * plan.epsilon


def test_calibration_is_the_same_for_every_lender():
    plan = PrivacyPlan(epsilon=3.0)
    assert calibrate(plan, sample_rate=0.5, num_steps=100) == calibrate(plan, sample_rate=0.5, num_steps=100)


def test_a_job_is_one_histogram_release_and_its_steps():
    job = job_events(CalibratedNoise(20.0, 2.0), 0.5, 100)
    assert job == (GaussianEvent(20.0), GaussianEvent(2.0, 0.5, 100))


def test_a_plan_without_privacy_cannot_be_calibrated():
    with pytest.raises(PrivacyParameterError, match=r"privacy\.mode is none"):
        calibrate(PrivacyPlan(mode="none"), sample_rate=0.5, num_steps=100)


@pytest.mark.parametrize(
    ("sample_rate", "num_steps"), [(0.0, 10), (1.5, 10), (math.nan, 10), (0.5, 0), (0.5, -1)]
)
def test_calibration_refuses_a_rate_or_number_of_steps_without_meaning(sample_rate, num_steps):
    with pytest.raises(PrivacyParameterError, match=r"sample_rate is|count is"):
        calibrate(PrivacyPlan(), sample_rate=sample_rate, num_steps=num_steps)


def test_a_plan_that_no_noise_meets_is_refused():
    with pytest.raises(PrivacyParameterError, match=r"raise privacy\.epsilon"):
        calibrate(PrivacyPlan(epsilon=0.01, delta=1e-12), sample_rate=0.5, num_steps=10**8)


def test_an_order_left_out_is_not_a_warning_at_the_terminal(caplog):
    epsilon_rdp([GaussianEvent(3.217, 0.5)], DELTA)
    assert caplog.records == []

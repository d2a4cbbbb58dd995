"""Noise in shares: the sampler has the exact distribution, rounding never passes its sensitivity, no sum wraps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfin.errors import PrivacyParameterError, QuorumError, TrainingError
from fedfin.privacy import shares
from fedfin.privacy.discrete_gaussian import MAX_STDDEV, _below, discrete_gaussian
from fedfin.privacy.noise import SecureNoise, SimulatedNoise, require_production
from fedfin.privacy.shares import Cohort, ShareScheme, SumShape, add_share, encode_sum, make_scheme, publish

CHANCE = 1e-7  # of a false alarm, for each test of the unseeded source
SOURCES = pytest.mark.parametrize("source", [SecureNoise(), SimulatedNoise(7)], ids=["secure", "simulated"])


def exact(stddev, reach):
    """The distribution on -reach..reach, to float64's precision."""
    integers = np.arange(-reach, reach + 1)
    weights = np.exp(-(integers**2) / (2.0 * stddev**2))
    return integers, weights / weights.sum()


# The sampler


@SOURCES
@pytest.mark.parametrize("stddev", [1, 2, 3, 17])
def test_the_draws_have_the_exact_distribution(source, stddev):
    num = 400_000
    draws = discrete_gaussian(num, stddev, source)
    integers, probabilities = exact(stddev, 12 * stddev)
    common = probabilities * num >= 20
    cells = np.concatenate([[-(10**6)], integers[common], [10**6]])  # both tails as one cell each
    observed = np.array([(draws == cell).sum() for cell in integers[common]])
    below, above = (draws < cells[1]).sum(), (draws > cells[-2]).sum()
    tail = (1.0 - probabilities[common].sum()) / 2.0
    expected = num * np.concatenate([[tail], probabilities[common], [tail]])
    observed = np.concatenate([[below], observed, [above]])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert observed.sum() == num
    assert stats.chi2.sf(chi_square, len(expected) - 1) > CHANCE


@SOURCES
@pytest.mark.parametrize("stddev", [1000, 2**20, MAX_STDDEV])
def test_on_a_fine_lattice_the_draws_are_gaussian_in_shape_variance_and_tail(source, stddev):
    draws = discrete_gaussian(200_000, stddev, source) / stddev
    # the discrete cumulative distribution is within 1/stddev of the continuous one
    distance = stats.kstest(draws, "norm").statistic - 1.0 / stddev
    assert 2.0 * math.exp(-2.0 * distance**2 * len(draws)) > CHANCE
    assert draws.var() == pytest.approx(1.0, abs=5.4 * math.sqrt(2.0 / len(draws)))
    beyond_three = stats.binom(len(draws), 2.0 * stats.norm.sf(3.0))
    assert beyond_three.ppf(CHANCE) <= (np.abs(draws) > 3.0).sum() <= beyond_three.isf(CHANCE)
    assert np.abs(draws).max() < 8.0


@SOURCES
def test_calls_and_neighbours_are_independent(source):
    num = 100_000
    first, second = (discrete_gaussian(num, 1000, source) / 1000 for _ in range(2))
    for left, right in ((first, second), (first[:-1], first[1:]), (first**2 - 1, second**2 - 1)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5.4 / math.sqrt(num)


@pytest.mark.parametrize("limit", [1, 2, 3, 3 * 2**62])
def test_a_word_modulo_a_limit_is_uniform(limit):
    """Words modulo 3 * 2**62 alone would fall into its first third half the time."""
    num = 300_000
    values = _below(limit, num, SecureNoise())
    assert values.max() < limit
    if limit > 1:
        thirds = np.bincount((values // np.uint64(max(1, limit // 3))).astype(int))
        assert stats.chisquare(thirds).pvalue > CHANCE


def test_a_word_that_would_bias_the_remainder_is_drawn_again():
    class Rigged:
        def __init__(self):
            self.asked = []

        def words(self, num):
            self.asked.append(num)
            surplus = 2**64 % 10
            return np.full(num, surplus - 1 if len(self.asked) == 1 else surplus + 3, dtype=np.uint64)

    rigged = Rigged()
    assert _below(10, 2, rigged).tolist() == [9, 9]
    assert rigged.asked == [2, 2]


def test_simulated_shares_repeat_and_production_refuses_their_source():
    assert (
        discrete_gaussian(50, 90, SimulatedNoise(3)) == discrete_gaussian(50, 90, SimulatedNoise(3))
    ).all()
    assert (discrete_gaussian(50, 90, SecureNoise()) != discrete_gaussian(50, 90, SecureNoise())).any()
    with pytest.raises(PrivacyParameterError, match="pass SecureNoise"):
        require_production(SimulatedNoise(3))


def test_no_draws_are_an_empty_array():
    assert discrete_gaussian(0, 5, SecureNoise()).shape == (0,)


@pytest.mark.parametrize(("num", "stddev"), [(-1, 5), (3, 0), (3, -2), (3, 1.5), (3, MAX_STDDEV + 1)])
def test_a_draw_without_meaning_is_refused(num, stddev):
    with pytest.raises(PrivacyParameterError, match="whole standard deviation from 1 to 1073741824"):
        discrete_gaussian(num, stddev, SecureNoise())


# Rounding

cohorts = st.builds(Cohort, st.integers(20, 300), st.integers(0, 9), st.integers(0, 9))
shapes = st.builds(
    lambda size, bound, loans: SumShape(size, bound, bound * loans),
    st.integers(1, 40),
    st.floats(0.01, 100.0),
    st.floats(1.0, 3000.0),
)
schemes = st.builds(make_scheme, st.floats(0.5, 200.0), cohorts, shapes)


@settings(max_examples=200)
@given(schemes, st.integers(0, 2**32), st.floats(0.0, 3.0))
def test_one_loan_moves_the_encoded_sum_by_at_most_the_sensitivity(scheme, seed, fullness):
    rng = np.random.default_rng(seed)
    size = scheme.shape.size
    values = rng.normal(size=size)
    values *= fullness * scheme.shape.norm_bound / np.linalg.norm(values)
    loan = rng.normal(size=size) * rng.choice([1e-6, 1.0], size)
    loan *= scheme.shape.sensitivity / np.linalg.norm(loan)
    moved = encode_sum(values + loan, scheme) - encode_sum(values, scheme)
    assert np.linalg.norm(moved) <= scheme.sensitivity


def test_rounding_takes_what_the_sensitivity_adds_for_it():
    """The bound is reached: just below and just above the middle between two integers, in every coordinate."""
    scheme = ShareScheme(Cohort(2), SumShape(4, 10.0, 100.0), 1.0, 5)
    values = np.full(4, 0.4999999)
    loan = np.full(4, 5.0) + 2e-7
    moved = np.linalg.norm(encode_sum(values + loan, scheme) - encode_sum(values, scheme))
    assert moved == pytest.approx(10.0 + math.sqrt(4))
    assert moved <= scheme.sensitivity


@given(schemes)
def test_a_scheme_has_the_noise_it_was_asked_for_and_fills_the_ring_without_wrapping(scheme):
    largest = scheme.cohort.num_lenders * scheme.largest_answer
    assert largest <= 2**31 - 1
    # the share's deviation is a whole number: where that is small, the next scale is a step of 1 / stddev away
    assert largest >= (0.99 - 1.0 / scheme.share_stddev) * (2**31 - 1) or scheme.share_stddev == MAX_STDDEV
    # what the planned shares give, over the sensitivity after rounding
    noise = scheme.share_stddev * math.sqrt(scheme.cohort.num_shares) / scheme.sensitivity
    assert scheme.noise_multiplier == noise


@given(st.floats(0.5, 200.0), cohorts, shapes)
def test_the_noise_is_never_less_than_asked(noise_multiplier, cohort, shape):
    found = make_scheme(noise_multiplier, cohort, shape).noise_multiplier
    assert noise_multiplier <= found <= noise_multiplier * (1.0 + 1e-6)


@given(schemes, st.sampled_from([0.0, 1.0, 1e6]))
def test_no_lender_can_make_the_sum_wrap(scheme, fullness):
    """Not with a sum beyond all bounds, and not with a share beyond all chance."""
    values = np.zeros(scheme.shape.size)
    values[0] = fullness * scheme.shape.norm_bound
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shares, "discrete_gaussian", lambda num, stddev, source: np.full(num, 100 * scheme.share_stddev)
        )
        answer = add_share(encode_sum(values, scheme), scheme, SecureNoise())
    assert np.abs(answer).max() <= scheme.largest_answer
    assert scheme.cohort.num_lenders * int(np.abs(answer).max()) <= 2**31 - 1


# The sum

COHORT = Cohort(num_lenders=10, num_dropouts=2, num_colluders=1)
SCHEME = make_scheme(4.0, COHORT, SumShape(30_000, 2.0, 400.0))


def test_the_published_sum_is_the_sum_and_its_noise_what_the_answers_carry():
    rng = np.random.default_rng(5)
    values = rng.normal(size=(10, SCHEME.shape.size))
    values *= 300.0 / np.linalg.norm(values, axis=1, keepdims=True)
    source = SecureNoise()
    for num_answers in (8, 10):
        answers = [add_share(encode_sum(own, SCHEME), SCHEME, source) for own in values[:num_answers]]
        noise = publish(np.sum(answers, axis=0), num_answers, SCHEME) - values[:num_answers].sum(axis=0)
        # with 8 answers 7 of the shares are secret: those have the planned noise
        planned = 4.0 * SCHEME.sensitivity / SCHEME.scale
        assert noise.std() == pytest.approx(planned * math.sqrt(num_answers / 7), rel=0.025)
        assert abs(noise.mean()) < 6.0 * noise.std() / math.sqrt(len(noise))


def test_without_noise_rounding_costs_half_a_lattice_unit_a_lender():
    values = np.random.default_rng(1).normal(size=SCHEME.shape.size)
    total = 10 * encode_sum(values, SCHEME)
    assert np.abs(publish(total, 10, SCHEME) - 10 * values).max() <= 10 * 0.5 / SCHEME.scale


@pytest.mark.parametrize("num_answers", [0, 7, 11])
def test_a_sum_of_fewer_or_more_lenders_than_planned_is_not_published(num_answers):
    total = np.zeros(SCHEME.shape.size, dtype=np.int64)
    with pytest.raises(
        QuorumError,
        match=rf"^{num_answers} of 10 lenders answered, .* planned for 8 to 10; it is not published: run a new round,"
        r" .* privacy\.planned_dropouts$",
    ):
        publish(total, num_answers, SCHEME)
    assert publish(total, 8, SCHEME).shape == total.shape


def test_a_sum_that_no_answers_add_up_to_is_refused():
    total = np.zeros(SCHEME.shape.size, dtype=np.int64)
    total[3] = 8 * SCHEME.largest_answer + 1
    with pytest.raises(TrainingError, match="which no lenders' answers add up to; the round is void"):
        publish(total, 8, SCHEME)
    with pytest.raises(TrainingError, match=r"shape \(5,\)"):
        publish(total[:5], 8, SCHEME)
    total[3] -= 1
    publish(total, 8, SCHEME)


@pytest.mark.parametrize("bad", [np.full(SCHEME.shape.size, np.nan), np.zeros(3)])
def test_values_that_do_not_fit_the_scheme_are_refused(bad):
    with pytest.raises(TrainingError, match=r"the scheme is for \(30000,\) finite ones"):
        encode_sum(bad, SCHEME)


@pytest.mark.parametrize("counts", [(4, 2, 2), (4, 5, 0), (0, 0, 0), (4, -1, 0), (4, 0, -1)])
def test_a_cohort_in_which_no_share_is_sure_and_secret_is_refused(counts):
    with pytest.raises(
        PrivacyParameterError, match=r"lower privacy\.planned_dropouts or .*cohort\.min_lenders$"
    ):
        Cohort(*counts)
    assert Cohort(5, 2, 2).num_shares == 1


def test_a_lattice_too_coarse_for_the_model_is_refused_and_the_mend_helps():
    shape = SumShape(10_000, 1.0, 2000.0)
    with pytest.raises(PrivacyParameterError, match=r"lower training\.weight_cap or the number of lenders"):
        make_scheme(1.0, Cohort(5000), shape)
    mended = make_scheme(1.0, Cohort(500), shape)
    assert mended.scale * shape.sensitivity >= 5.0 * math.sqrt(10_000)
    with pytest.raises(PrivacyParameterError, match=r"has no room .* lower training\.weight_cap"):
        make_scheme(1e9, Cohort(5000), shape)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_parameters_without_meaning_are_refused(value):
    with pytest.raises(PrivacyParameterError, match=r"noise multiplier is .*; it must be a positive number"):
        make_scheme(value, COHORT, SCHEME.shape)
    for bounds in ((value, 1.0), (1.0, value)):
        with pytest.raises(PrivacyParameterError, match="give at least one value and positive bounds"):
            SumShape(3, *bounds)
    with pytest.raises(PrivacyParameterError, match="build the scheme with make_scheme"):
        ShareScheme(COHORT, SCHEME.shape, value, 5)


@pytest.mark.parametrize("share_stddev", [0, MAX_STDDEV + 1, 2**29])
def test_a_scheme_whose_sum_could_wrap_or_has_no_noise_is_refused(share_stddev):
    with pytest.raises(PrivacyParameterError, match="build the scheme with make_scheme"):
        ShareScheme(COHORT, SCHEME.shape, SCHEME.scale, share_stddev)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(PrivacyParameterError, match="a sum of 0 values"):
        SumShape(0, 1.0, 1.0)

"""Figures of merit agree with scikit-learn's, and a figure that has no meaning is refused."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from fedfin.credit.metrics import auroc, bootstrap_gain, brier, calibration_ratio, ks, log_loss
from fedfin.errors import DataError

FIGURES = [auroc, ks, brier, log_loss, calibration_ratio]


@st.composite
def scored_loans(draw):
    """Labels with both outcomes, and probabilities with many ties."""
    num_loans = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=num_loans, max_size=num_loans))
    labels[:2] = [0, 1]
    scores = draw(st.lists(st.integers(0, 10), min_size=num_loans, max_size=num_loans))
    return np.array(labels), np.array(scores) / 10


@given(scored_loans())
def test_figures_agree_with_scikit_learn(loans):
    labels, scores = loans
    false_positive, true_positive, _ = oracle.roc_curve(labels, scores, drop_intermediate=False)
    assert auroc(labels, scores) == pytest.approx(oracle.roc_auc_score(labels, scores))
    assert ks(labels, scores) == pytest.approx(np.abs(true_positive - false_positive).max())
    assert brier(labels, scores) == pytest.approx(oracle.brier_score_loss(labels, scores))
    inside = np.clip(scores, 0.01, 0.99)
    assert log_loss(labels, inside) == pytest.approx(oracle.log_loss(labels, inside))


@given(scored_loans())
def test_auroc_depends_on_the_order_of_scores_only(loans):
    labels, scores = loans
    assert auroc(labels, scores) == pytest.approx(auroc(labels, 10 * scores - 3))
    assert auroc(labels, -scores) == pytest.approx(1 - auroc(labels, scores))


def test_calibration_ratio_is_predicted_over_actual_bad_loans():
    assert calibration_ratio([0, 1, 0, 1], [0.25, 0.25, 0.5, 0.5]) == 0.75


def test_log_loss_of_a_certain_mistake_is_finite():
    assert np.isfinite(log_loss([0, 1], [1.0, 0.0]))


def test_a_better_score_gains_and_the_interval_holds_the_gain():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    good, poor = labels + rng.normal(0, 1, 400), labels + rng.normal(0, 3, 400)
    gain = bootstrap_gain(labels, good, poor, rng)
    assert gain.estimate == pytest.approx(auroc(labels, good) - auroc(labels, poor))
    assert 0 < gain.low < gain.estimate < gain.high


def test_a_score_gains_nothing_over_itself_or_its_own_order():
    labels, scores = np.array([0, 1] * 20), np.random.default_rng(0).random(40)
    gain = bootstrap_gain(labels, scores, scores * 2 + 1, np.random.default_rng(1), num_resamples=100)
    assert (gain.estimate, gain.low, gain.high) == (0, 0, 0)


def test_the_interval_covers_the_true_gain_about_as_often_as_it_says():
    # both scores are noise: the true gain is zero
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], [120, 60])
        gain = bootstrap_gain(labels, rng.random(180), rng.random(180), rng, num_resamples=200)
        covered += gain.low <= 0 <= gain.high
    assert 85 <= covered <= 100


def test_resamples_agree_with_redrawing_the_loans_one_by_one():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [40, 20])
    new, old = rng.random(60) + labels / 2, rng.random(60)
    gains = []
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(40, 40), 40 + rng.choice(20, 20)])
        gains.append(auroc(labels[drawn], new[drawn]) - auroc(labels[drawn], old[drawn]))
    interval = bootstrap_gain(labels, new, old, rng, num_resamples=2000)
    assert np.quantile(gains, [0.025, 0.975]) == pytest.approx([interval.low, interval.high], abs=0.02)


def test_a_rare_outcome_never_leaves_a_resample_with_one_class():
    labels = np.array([1] + [0] * 30)
    gain = bootstrap_gain(labels, np.arange(31) * -1.0, np.arange(31) * 1.0, np.random.default_rng(0))
    assert gain.estimate == 1
    assert np.isfinite([gain.low, gain.high]).all()


def test_a_thousand_resamples_of_the_held_out_loans_take_seconds_at_most():
    rng = np.random.default_rng(0)
    labels, started = rng.integers(0, 2, 1336), time.process_time()
    bootstrap_gain(labels, rng.random(1336), rng.random(1336), rng)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("labels", "scores", "mend"),
    [
        ([1, 1], [0.1, 0.2], "needs both good and bad loans"),
        ([0, 0], [0.1, 0.2], "needs both good and bad loans"),
        ([0, 2], [0.1, 0.2], "code the outcome as 1 = bad, 0 = good"),
        ([0, 1], [0.1, np.nan], "score only loans that were checked"),
        ([0, 1], [0.1], "give one score per loan"),
        ([], [], "needs both good and bad loans"),
    ],
)
def test_a_figure_without_meaning_is_refused(figure, labels, scores, mend):
    with pytest.raises(DataError, match=mend):
        figure(np.array(labels, dtype=np.int64), np.array(scores))


@pytest.mark.parametrize("figure", [brier, log_loss, calibration_ratio])
def test_probabilities_outside_zero_to_one_are_refused(figure):
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        figure([0, 1], [0.5, 1.5])


def test_too_few_resamples_are_refused():
    with pytest.raises(DataError, match="at least 100"):
        bootstrap_gain([0, 1], [0, 1], [1, 0], np.random.default_rng(0), num_resamples=99)

"""The black-box attack finds what an overfitted model remembers, and little in a private one."""

import json

import numpy as np
import pytest

from fedfin.client.membership import _at, attack, attack_released, train_job
from fedfin.credit.binning import bins_from_histogram, encode, histogram
from fedfin.credit.export import ReleasedModel
from fedfin.credit.models import Architecture, architecture_of
from fedfin.errors import DataError
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy.noise import SimulatedNoise
from fedfin.simulation.arms import take_rows
from fedfin.simulation.partition import demo_loans

MLP = Architecture("mlp", 10, (32,))
TRAINING = TrainingPlan(rounds=2, local_steps=40)
OVERFITTING = JobPlan(training=TRAINING, privacy=PrivacyPlan(mode="none"))
PRIVATE = JobPlan(training=TRAINING, privacy=PrivacyPlan(epsilon=1.0))


def attacked(plan, *, num_shadows=8, num_loans=120):
    """A model trained on one half of loans whose outcomes follow nothing: whatever it knows, it remembers."""
    rng = np.random.default_rng(0)
    loans = rng.normal(size=(num_loans, 10)).astype(np.float32)
    labels = rng.integers(0, 2, num_loans)
    members = np.arange(num_loans) % 2 == 0
    weights = train_job(loans[members], labels[members], MLP, plan, SimulatedNoise(1))
    return attack(
        weights, loans, labels, members, architecture=MLP, plan=plan, rng=rng, num_shadows=num_shadows
    )


def test_an_overfitted_model_is_attacked_far_above_chance():
    report = attacked(OVERFITTING)
    assert report.auroc > 0.85
    assert report.low > 0.8
    assert "remembers loans" in report.meaning


def test_a_private_model_of_the_same_loans_is_not():
    report = attacked(PRIVATE)
    assert report.low < 0.5 < report.high
    assert "no better than chance" in report.meaning


def test_the_rate_of_members_found_counts_those_above_the_allowed_false_positives():
    scores = np.concatenate([np.arange(100.0), [98.5, 99.5, 97.5, 10.0]])
    members = np.arange(104) >= 100
    found = _at(scores, members, 0.01)
    # one other of a hundred, the one at 99, may be accused: found is whoever is above 98
    assert found.true_positive_rate == 0.5
    assert found.low < 0.5 < found.high


def test_rates_that_so_few_loans_cannot_show_are_left_out():
    assert [rate.false_positive_rate for rate in attacked(PRIVATE, num_shadows=2, num_loans=220).rates] == [
        0.01
    ]
    assert attacked(PRIVATE, num_shadows=2).rates == ()


def test_too_few_loans_are_refused():
    with pytest.raises(DataError, match=r"needs 20 of each: raise holdout\.fraction"):
        attacked(PRIVATE, num_loans=38)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 3.0])
def test_a_released_model_of_the_demos_loans_is_attacked_on_its_own_terms(epsilon):
    """Some 2000 members and others; a logistic model on thousands of loans remembers little, with noise or without."""
    loans, schema = demo_loans()
    privacy = PrivacyPlan(mode="none") if epsilon is None else PrivacyPlan(epsilon=epsilon)
    plan = JobPlan(model=ModelPlan(), privacy=privacy)
    order = np.random.default_rng(0).permutation(len(loans))
    train, holdout = take_rows(loans, order[:2200]), take_rows(loans, order[2200:])
    bins = bins_from_histogram(histogram(train.frame, schema), schema, plan.model.max_bins)
    architecture = architecture_of(plan.model, schema, bins)
    inputs = encode(train.frame, schema, bins, "one_hot")
    weights = train_job(inputs, train.labels, architecture, plan, SimulatedNoise(0))
    model = ReleasedModel("job-1", 10, plan.model_dump_json(), schema, bins, "f", weights)
    seen = []
    report = attack_released(model, train, holdout, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (64, 64)
    assert (report.num_members, report.num_others) == (2000, 2000)
    assert report.auroc < 0.6
    assert [rate.false_positive_rate for rate in report.rates] == [0.01, 0.001]
    assert json.loads(json.dumps(report.to_json()))["confidence"] == 0.95

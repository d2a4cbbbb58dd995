"""What joining is worth: small lenders gain, and the federation comes near to all loans in one house."""

import numpy as np
import pytest

from fedfin.client.alone import train_alone
from fedfin.credit.metrics import auroc, calibration_ratio
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan
from fedfin.simulation.arms import compare_arms, demo_plan, federate, take_rows
from fedfin.simulation.partition import demo_loans, split_demo

LOANS, SCHEMA = demo_loans()


def lenders_and_held_out(seed):
    split = split_demo(LOANS, seed)
    return [take_rows(LOANS, lender.rows) for lender in split.lenders], take_rows(LOANS, split.held_out)


def federated_auroc(plan, seed):
    lenders, held_out = lenders_and_held_out(seed)
    return auroc(held_out.labels, federate(lenders, SCHEMA, plan, seed).predict(held_out.frame))


def test_a_small_lender_gains_by_joining_with_and_without_privacy():
    lenders, held_out = lenders_and_held_out(0)
    alone = [
        auroc(
            held_out.labels,
            train_alone(own.frame, own.labels, SCHEMA, np.random.default_rng(0)).predict(held_out.frame),
        )
        for own in lenders[3:6]
    ]
    assert federated_auroc(demo_plan(None), 0) >= np.mean(alone) + 0.06
    assert federated_auroc(demo_plan(3.0), 0) >= np.mean(alone) + 0.02


def test_a_job_is_the_same_for_the_same_seed_and_its_noise_another_for_another():
    lenders, _ = lenders_and_held_out(0)
    plan = demo_plan(3.0, rounds=2)
    first = federate(lenders, SCHEMA, plan, 0)
    assert (federate(lenders, SCHEMA, plan, 0).weights == first.weights).all()
    other = federate(lenders, SCHEMA, plan, 1)
    assert other.weights.shape != first.weights.shape or (other.weights != first.weights).any()


def test_less_epsilon_means_a_worse_model():
    strict = np.mean([federated_auroc(demo_plan(0.1), seed) for seed in range(2)])
    assert strict < federated_auroc(demo_plan(None), 0) - 0.05


def test_without_privacy_the_federated_probabilities_are_calibrated():
    lenders, held_out = lenders_and_held_out(1)
    probabilities = federate(lenders, SCHEMA, demo_plan(None), 1).predict(held_out.frame)
    assert calibration_ratio(held_out.labels, probabilities) == pytest.approx(1.0, abs=0.15)


def test_the_mlp_learns_in_the_federation_too():
    plan = JobPlan(model=ModelPlan(kind="mlp"), privacy=PrivacyPlan(mode="none"))
    assert federated_auroc(plan, 0) > 0.79


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_five_seeds_small_lenders_gain_what_the_federation_promises():
    gains, private_gains, gaps = [], [], []
    for seed in range(5):
        arms = compare_arms(LOANS, split_demo(LOANS, seed), SCHEMA, demo_plan(None), seed)
        gains.append(arms.small_lender_gain)
        gaps.append(arms.pooled - arms.federated)
        private_gains.append(arms.small_lender_gain + federated_auroc(demo_plan(3.0), seed) - arms.federated)
    assert np.mean(gains) >= 0.08
    assert np.mean(gaps) <= 0.006
    assert np.mean(private_gains) >= 0.02

"""The coordinator's step of mode shared: torch's AdamW on the mean gradient, as a pure function."""

import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from fedfin.errors import TrainingError
from fedfin.plan import TrainingPlan
from fedfin.strategies.fedsgd import fedsgd
from fedfin.strategies.strategy import CohortSum, ModelState

TRAINING = TrainingPlan(learning_rate=0.05, weight_decay=0.1)


def test_ten_rounds_are_ten_steps_of_torchs_adamw_on_the_mean_gradient():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=7).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)
    state = ModelState(weights, 0)
    for _ in range(10):
        total, num_loans = rng.normal(size=7) * 300.0, 120.0
        state = fedsgd(state, CohortSum(total, num_loans, 3), TRAINING)
        parameter.grad = torch.from_numpy(total / num_loans).float()
        optimizer.step()
    assert state.round == 10
    assert_allclose(state.weights, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_step_changes_neither_argument():
    state = fedsgd(ModelState(np.ones(3, np.float32), 0), CohortSum(np.ones(3), 1.0, 2), TRAINING)
    kept = [vector.copy() for vector in (state.weights, *state.moments)]
    total = np.arange(3.0)
    fedsgd(state, CohortSum(total, 4.0, 2), TRAINING)
    for before, after in zip(kept, (state.weights, *state.moments), strict=True):
        assert_array_equal(after, before)
    assert_array_equal(total, np.arange(3.0))


def test_a_step_goes_against_the_gradient():
    state = fedsgd(
        ModelState(np.zeros(2, np.float32), 0), CohortSum(np.array([5.0, -1.0]), 10.0, 2), TRAINING
    )
    assert_allclose(state.weights, [-0.05, 0.05], rtol=1e-4)


def test_a_sum_of_another_model_is_refused():
    with pytest.raises(TrainingError, match=re.escape("has shape (4,), the model (3,)")):
        fedsgd(ModelState(np.zeros(3, np.float32), 0), CohortSum(np.zeros(4), 1.0, 2), TRAINING)


def test_weights_that_are_not_finite_are_refused_and_the_mend_named():
    state = ModelState(np.zeros(2, np.float32), 0)
    with pytest.raises(TrainingError, match=r"round 1 gave weights .*; lower training\.learning_rate"):
        fedsgd(state, CohortSum(np.full(2, 1e308), 1e-9, 2), TRAINING)

"""The private step: clipped as written, noisy as promised, and refused where it would give no protection."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from fedfin.credit.models import Architecture, build, load_weights, num_parameters
from fedfin.errors import PrivacyParameterError, TrainingError
from fedfin.privacy.gradients import ROUNDING, PerLoanGradients, PrivateEngine
from fedfin.privacy.noise import SecureNoise, SimulatedNoise

ARCHITECTURES = [Architecture("logistic", 6), Architecture("mlp", 6, (8, 4))]
LOGISTIC = ARCHITECTURES[0]


class NoNoise:
    """Noise of nothing, to see the rest of the step."""

    def normal(self, size, stddev):
        return np.zeros(size)

    def bernoulli(self, num, rate):
        return np.ones(num, dtype=bool)


def random_module(architecture, seed=0):
    module = build(architecture)
    weights = np.random.default_rng(seed).normal(size=num_parameters(architecture))
    load_weights(module, weights.astype(np.float32))
    return module


def random_batch(num_loans, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(num_loans, 6))).astype(np.float32), rng.integers(0, 2, num_loans)


def clipped_sum_loan_by_loan(architecture, loans, labels, clipping_bound):
    """The oracle: one backward pass for each loan in float64; also the sum of the clipped norms."""
    module = random_module(architecture).double()
    total, norms = np.zeros(num_parameters(architecture)), 0.0
    for loan, label in zip(loans.astype(np.float64), labels.astype(np.float64), strict=True):
        logit = module(torch.from_numpy(loan)[None]).squeeze()
        loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor(label))
        blocks = torch.autograd.grad(loss, list(module.parameters()))
        gradient = torch.cat([block.reshape(-1) for block in blocks]).numpy()
        norm = np.linalg.norm(gradient)
        total += gradient * min(1.0, clipping_bound / norm)
        norms += min(norm, clipping_bound)
    return total, norms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("clipping_bound", [0.1, 1.0, 100.0])
def test_the_clipped_sum_is_that_of_a_float64_loop_over_the_loans(architecture, clipping_bound):
    loans, labels = random_batch(64)
    found = PerLoanGradients(random_module(architecture)).clipped_sum(loans, labels, clipping_bound)
    expected, norms = clipped_sum_loan_by_loan(architecture, loans, labels, clipping_bound)
    assert np.abs(found - expected).max() <= 1e-6 * norms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e12])
def test_one_loan_moves_the_sum_by_the_bound_at_most_however_huge_its_gradient(architecture, scale):
    loans, labels = random_batch(16, scale=scale)
    per_loan = PerLoanGradients(random_module(architecture))
    change = per_loan.clipped_sum(loans, labels, 0.5) - per_loan.clipped_sum(loans[1:], labels[1:], 0.5)
    assert np.linalg.norm(change) <= 0.5 * (1 + 1e-6)


def test_a_gradient_within_the_bound_is_not_changed():
    loans, labels = random_batch(8, scale=0.01)
    per_loan = PerLoanGradients(random_module(LOGISTIC))
    assert_allclose(
        per_loan.clipped_sum(loans, labels, 10.0), per_loan.clipped_sum(loans, labels, 1e5), rtol=1e-12
    )


def test_nothing_of_a_batch_stays_for_the_next():
    (loans, labels), per_loan = random_batch(8), PerLoanGradients(random_module(LOGISTIC))
    first = per_loan.clipped_sum(loans, labels, 1.0)
    per_loan.clipped_sum(*random_batch(5, seed=9), 1.0)
    assert_array_equal(per_loan.clipped_sum(loans, labels, 1.0), first)


def test_the_sum_follows_the_modules_weights():
    module = random_module(LOGISTIC)
    (loans, labels), per_loan = random_batch(8), PerLoanGradients(module)
    before = per_loan.clipped_sum(loans, labels, 1.0)
    load_weights(module, np.zeros(7, np.float32))
    assert (per_loan.clipped_sum(loans, labels, 1.0) != before).all()


def engine(noise, *, module=None, **changed):
    privacy = {"noise_multiplier": 3.0, "clipping_bound": 2.0, "expected_batch_size": 4.0} | changed
    return PrivateEngine(random_module(LOGISTIC) if module is None else module, noise=noise, **privacy)


def test_an_empty_draw_gives_noise_alone():
    empty = np.empty((0, 6), np.float32), np.empty(0, np.int64)
    assert_array_equal(PerLoanGradients(random_module(LOGISTIC)).clipped_sum(*empty, 1.0), np.zeros(7))
    gradient = engine(SimulatedNoise(0)).gradient(*empty)
    assert_allclose(gradient, SimulatedNoise(0).normal(7, 6.0 * (1 + ROUNDING)) / 4.0, rtol=1e-14)


@pytest.mark.parametrize("noise", [SimulatedNoise(0), SecureNoise()])
def test_the_noise_of_the_sum_is_the_noise_multiplier_times_the_bound(noise):
    loans, labels = random_batch(20)
    plain = PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 2.0)
    step = engine(noise)
    sums = 4.0 * np.array([step.gradient(loans, labels) for _ in range(300)]) - plain
    assert sums.std() == pytest.approx(6.0, rel=0.1)
    assert np.abs(sums.mean()) < 1.0


def test_the_divisor_is_the_expected_batch_and_not_the_true_one():
    loans, labels = random_batch(20)
    total = PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 2.0)
    assert_allclose(engine(NoNoise(), expected_batch_size=7.5).gradient(loans, labels), total / 7.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loan_that_is_not_finite_is_refused_before_it_spoils_every_parameter(value):
    loans, labels = random_batch(4)
    loans[2, 3] = value
    with pytest.raises(TrainingError, match="check the table"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 1.0)


def test_a_loan_whose_gradient_overflows_contributes_nothing_and_is_not_told_of():
    """Weights crafted to overflow for chosen loans must not turn their presence into an error."""
    module = random_module(LOGISTIC)
    weights = np.zeros(num_parameters(LOGISTIC), np.float32)
    weights[:2] = 3e38
    load_weights(module, weights)
    loans, labels = random_batch(4)
    loans[:, :2] = 0.0
    per_loan = PerLoanGradients(module)
    quiet = per_loan.clipped_sum(loans, labels, 1.0)
    loans[2, :2] = [1e4, -1e4]  # inf - inf
    loud = per_loan.clipped_sum(loans, labels, 1.0)
    without = per_loan.clipped_sum(np.delete(loans, 2, 0), np.delete(labels, 2), 1.0)
    assert np.isfinite(quiet).all()
    np.testing.assert_allclose(loud, without, atol=1e-12)


def test_labels_of_another_shape_are_refused():
    loans, labels = random_batch(4)
    with pytest.raises(TrainingError, match=r"give \(n, p\) and \(n,\)"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels[:, None], 1.0)


def test_more_than_one_logit_a_loan_is_refused():
    with pytest.raises(TrainingError, match="one each is needed"):
        PerLoanGradients(nn.Linear(6, 2)).clipped_sum(*random_batch(4), 1.0)


def test_a_module_that_mixes_the_loans_of_a_batch_is_refused():
    with pytest.raises(TrainingError, match="no BatchNorm"):
        PerLoanGradients(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_that_clips_nothing_is_refused(bound):
    with pytest.raises(PrivacyParameterError, match=r"privacy\.clipping_bound"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(*random_batch(4), bound)


@pytest.mark.parametrize("name", ["noise_multiplier", "clipping_bound", "expected_batch_size"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_step_without_noise_bound_or_divisor_is_refused(name, value):
    with pytest.raises(PrivacyParameterError, match=name.replace("_", ".")):
        engine(NoNoise(), **{name: value})

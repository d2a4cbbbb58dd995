"""A lender's own training: what leaves is a finite change of the weights; what it is compared with is strong."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression

from fedfin.client.alone import _fit_logistic, _folds, train_alone
from fedfin.client.training import LocalPrivacy, train_locally, train_mlp
from fedfin.credit.metrics import auroc
from fedfin.credit.models import Architecture, initial_weights, num_parameters, predict
from fedfin.errors import SchemaMismatchError, TrainingError
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy.noise import SecureNoise, SimulatedNoise
from fedfin.simulation.arms import federate, take_rows
from fedfin.simulation.partition import demo_loans, split_demo

LOGISTIC = Architecture("logistic", 4)
MLP = Architecture("mlp", 4, (8,))
ATTENTION = Architecture("attention", 4, (8,), (1, 2, 1))
PRIVACY = LocalPrivacy(noise_multiplier=1.0, clipping_bound=1.0)


def learnable_loans(num_loans=200, seed=0):
    rng = np.random.default_rng(seed)
    loans = rng.random((num_loans, 4)).astype(np.float32)
    return loans, (loans[:, 0] + 0.3 * rng.normal(size=num_loans) > 0.5).astype(np.int64)


def train(architecture, *, privacy=None, noise=None, weights=None, loans=None, **plan):
    inputs, labels = learnable_loans() if loans is None else loans
    return train_locally(
        initial_weights(architecture, 0) if weights is None else weights,
        inputs,
        labels,
        architecture=architecture,
        training=TrainingPlan(**plan),
        privacy=privacy,
        noise=SimulatedNoise(0) if noise is None else noise,
    )


@pytest.mark.parametrize("architecture", [LOGISTIC, MLP, ATTENTION])
@pytest.mark.parametrize("privacy", [None, LocalPrivacy(0.5, 1.0)])
def test_an_update_added_to_the_weights_predicts_better(architecture, privacy):
    loans, labels = learnable_loans()
    update = train(architecture, privacy=privacy, local_steps=40, learning_rate=0.1)
    assert update.dtype == np.float32
    # the first input is what the labels were drawn from: no score can be much better
    best = auroc(labels, loans[:, 0])
    assert (
        auroc(labels, predict(architecture, initial_weights(architecture, 0) + update, loans)) > best - 0.02
    )


def test_the_first_step_moves_every_weight_by_the_learning_rate_as_adamw_with_bias_correction_does():
    update = train(LOGISTIC, local_steps=1, learning_rate=0.02)
    assert_allclose(np.abs(update), 0.02, rtol=1e-3)


def test_a_full_batch_without_privacy_is_adamw_on_the_mean_loss():
    loans, labels = learnable_loans()
    weights = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        logits = torch.from_numpy(loans) @ weights[:4] + weights[4]
        targets = torch.from_numpy(labels).float()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()
    update = train(LOGISTIC, local_steps=5, learning_rate=0.05, weight_decay=0.1, sample_rate=1.0)
    assert_allclose(update, weights.detach().numpy(), atol=1e-6)


class OneHugeDraw:
    """Every loan in every batch, and noise of thousands where noise is asked for."""

    def normal(self, size, stddev):
        return np.full(size, 1e3)

    def bernoulli(self, num, rate):
        return np.ones(num, dtype=bool)


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_the_proximal_term_pulls_back_to_the_rounds_weights(privacy):
    plain = train(MLP, privacy=privacy, local_steps=30, learning_rate=0.05)
    held = train(MLP, privacy=privacy, local_steps=30, learning_rate=0.05, proximal=10.0)
    assert np.linalg.norm(held) < 0.5 * np.linalg.norm(plain)


def test_the_proximal_term_is_that_of_fedprox():
    loans, labels = learnable_loans()
    start = np.full(5, 0.3, np.float32)
    weights = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.0)
    for _ in range(6):
        optimizer.zero_grad()
        logits = torch.from_numpy(loans) @ weights[:4] + weights[4]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).float())
        (loss + 0.5 * 2.5 * ((weights - torch.from_numpy(start)) ** 2).sum()).backward()
        optimizer.step()
    update = train(LOGISTIC, weights=start, local_steps=6, learning_rate=0.05, sample_rate=1.0, proximal=2.5)
    assert_allclose(update, weights.detach().numpy() - start, atol=1e-6)


def test_the_proximal_term_comes_after_the_noise_and_is_neither_clipped_nor_watched():
    """What is released of a step is the same with it: at the round's start it is zero, and later no loan is in it."""
    steps = {}
    for proximal in (0.0, 100.0):
        seen = steps[proximal] = []
        loans, labels = learnable_loans()
        train_locally(
            initial_weights(LOGISTIC, 0),
            np.zeros_like(loans),
            labels,
            architecture=LOGISTIC,
            training=TrainingPlan(local_steps=5, proximal=proximal),
            privacy=LocalPrivacy(1.0, 1e-6),
            noise=OneHugeDraw(),
            watch=seen.append,
        )
    assert len(steps[0.0]) == 5
    assert_allclose(steps[100.0], steps[0.0], rtol=1e-9)


def test_a_round_remembers_nothing_of_an_earlier_one():
    assert_array_equal(train(MLP, noise=SimulatedNoise(1)), train(MLP, noise=SimulatedNoise(1)))


def test_the_weights_and_the_loans_are_not_changed():
    weights, (loans, labels) = initial_weights(MLP, 0), learnable_loans()
    train(MLP, privacy=PRIVACY, weights=weights, loans=(loans, labels))
    assert_array_equal(weights, initial_weights(MLP, 0))
    assert_array_equal(loans, learnable_loans()[0])


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_batches_and_noise_come_from_the_noise_source_alone(privacy):
    first = train(LOGISTIC, privacy=privacy, sample_rate=0.3, noise=SimulatedNoise(1))
    torch.randn(7)
    assert_array_equal(train(LOGISTIC, privacy=privacy, sample_rate=0.3, noise=SimulatedNoise(1)), first)
    assert (train(LOGISTIC, privacy=privacy, sample_rate=0.3, noise=SimulatedNoise(2)) != first).any()


def test_the_production_noise_never_repeats():
    assert (train(LOGISTIC, privacy=PRIVACY, noise=SecureNoise()) != train(LOGISTIC, privacy=PRIVACY)).any()


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_one_loan_and_empty_batches_are_trained_through(privacy):
    update = train(LOGISTIC, privacy=privacy, loans=learnable_loans(1), sample_rate=0.01, local_steps=20)
    assert np.isfinite(update).all()


def test_huge_values_in_a_private_job_move_no_more_than_the_learning_rate_allows():
    loans, labels = learnable_loans()
    update = train(LOGISTIC, privacy=PRIVACY, loans=(loans * 1e15, labels), local_steps=3, learning_rate=0.01)
    assert np.abs(update).max() < 0.05


def test_a_lender_without_loans_is_refused():
    with pytest.raises(TrainingError, match="no loans to train on"):
        train(LOGISTIC, loans=learnable_loans(0))


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_an_update_that_is_not_finite_does_not_leave(privacy):
    broken = np.full(num_parameters(MLP), np.nan, np.float32)
    with pytest.raises(TrainingError, match=r"lower training\.learning_rate"):
        train(MLP, privacy=privacy, weights=broken)


def test_weights_of_another_model_are_refused():
    with pytest.raises(SchemaMismatchError, match="compare model fingerprints"):
        train(LOGISTIC, weights=np.zeros(99, np.float32))


@pytest.mark.parametrize("mode", ["none", "local"])
def test_attention_trains_in_a_whole_federation(mode):
    loans, schema = demo_loans()
    lenders = [take_rows(loans, lender.rows) for lender in split_demo(loans, 0).small_lenders]
    plan = JobPlan(
        model=ModelPlan(kind="attention", hidden=(8,)),
        training=TrainingPlan(rounds=3, learning_rate=0.05),
        privacy=PrivacyPlan(mode=mode, epsilon=50.0),
    )
    model = federate(lenders, schema, plan, seed=0)
    assert auroc(loans.labels, model.predict(loans.frame)) > 0.68


# alone


def test_folds_leave_every_loan_out_once_a_repeat_and_each_holds_both_outcomes():
    labels = np.repeat([0, 1], [70, 20])
    folds = _folds(labels, np.random.default_rng(0))
    assert_array_equal(np.bincount(np.concatenate(folds)), np.full(90, 3))
    assert all(set(labels[fold]) == {0, 1} for fold in folds)


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_the_logistic_fit_is_scikit_learns(penalty):
    loans, labels = learnable_loans()
    found = _fit_logistic(
        np.hstack([loans, np.ones((200, 1))]).astype(np.float64), labels, penalty, np.zeros(5)
    )
    oracle = LogisticRegression(C=1 / penalty, tol=1e-8).fit(loans.astype(np.float64), labels)
    assert_allclose(found, [*oracle.coef_[0], *oracle.intercept_], atol=1e-3)


def test_an_mlps_snapshots_are_those_of_shorter_trainings():
    loans, labels = learnable_loans()
    rngs = [np.random.default_rng(0) for _ in range(2)]
    (epochs, early), _ = train_mlp(loans, labels, MLP, (2, 5), 32, rngs[0])
    ((_, alone),) = train_mlp(loans, labels, MLP, (2,), 32, rngs[1])
    assert epochs == 2
    assert_array_equal(early, alone)


def test_a_small_lender_alone_gets_the_better_of_two_models_and_repeats_it_from_its_seed():
    loans, schema = demo_loans()
    own = take_rows(loans, split_demo(loans, 0).small_lenders[0].rows)
    model = train_alone(own.frame, own.labels, schema, np.random.default_rng(0))
    better = "logistic" if model.logistic_auroc >= model.mlp_auroc else "mlp"
    assert model.architecture.kind == better
    assert auroc(own.labels, model.predict(own.frame)) > 0.75
    again = train_alone(own.frame, own.labels, schema, np.random.default_rng(0))
    assert_array_equal(again.weights, model.weights)


@pytest.mark.parametrize("num_bad", [0, 1, 89, 90])
def test_a_lender_with_hardly_any_loan_of_one_outcome_is_refused(num_bad):
    loans, schema = demo_loans()
    labels = np.repeat([1, 0], [num_bad, 90 - num_bad])
    with pytest.raises(TrainingError, match="two of each outcome"):
        train_alone(loans.frame.iloc[:90], labels, schema, np.random.default_rng(0))

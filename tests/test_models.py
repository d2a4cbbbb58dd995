"""A model is one flat vector; it starts in public, and no vector is used under another meaning."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from fedfin.credit.models import (
    Architecture,
    build,
    encoding_of,
    flatten,
    initial_weights,
    load_weights,
    model_fingerprint,
    num_parameters,
    predict,
    require_same_fingerprint,
)
from fedfin.errors import SchemaMismatchError

LOGISTIC = Architecture("logistic", 3)
MLP = Architecture("mlp", 3, (8, 4))
LOANS = np.random.default_rng(0).random((5, 3)).astype(np.float32)


@pytest.mark.parametrize("architecture", [LOGISTIC, MLP])
def test_a_vector_loaded_into_the_module_comes_out_as_it_was(architecture):
    weights = np.random.default_rng(1).normal(size=num_parameters(architecture)).astype(np.float32)
    module = build(architecture)
    load_weights(module, weights)
    assert_array_equal(flatten(module), weights)


@pytest.mark.parametrize("architecture", [LOGISTIC, MLP])
def test_the_initial_weights_are_the_same_for_the_same_seed_and_give_one_half_to_all(architecture):
    weights = initial_weights(architecture, 7)
    assert weights.shape == (num_parameters(architecture),)
    assert_array_equal(weights, initial_weights(architecture, 7))
    assert_array_equal(predict(architecture, weights, LOANS), np.full(5, 0.5))


def test_logistic_starts_at_zero_and_the_mlps_hidden_layers_by_the_seed():
    assert not initial_weights(LOGISTIC, 7).any()
    assert (initial_weights(MLP, 7) != initial_weights(MLP, 8)).any()


def test_logistic_predicts_by_the_logistic_function():
    weights = np.array([1, -2, 3, 0.5], dtype=np.float32)
    expected = 1 / (1 + np.exp(-(LOANS @ weights[:3] + 0.5)))
    assert_allclose(predict(LOGISTIC, weights, LOANS), expected, rtol=1e-6)


def test_a_loans_prediction_does_not_depend_on_the_other_loans():
    weights = np.random.default_rng(1).normal(size=num_parameters(MLP)).astype(np.float32)
    together = predict(MLP, weights, LOANS)
    assert_allclose([predict(MLP, weights, loan[None])[0] for loan in LOANS], together, rtol=1e-6)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in build(MLP))


def test_predictions_are_probabilities_even_far_out():
    extreme = predict(
        LOGISTIC, np.array([1e4, 0, 0, 0], np.float32), np.array([[1, 0, 0], [-1, 0, 0]], np.float32)
    )
    assert_array_equal(extreme, [1.0, 0.0])


def test_torchs_global_generator_is_not_drawn_from():
    before = torch.get_rng_state()
    predict(MLP, initial_weights(MLP, 0), LOANS)
    assert torch.equal(torch.get_rng_state(), before)


def test_logistic_takes_indicators_and_the_mlp_piecewise_linear_inputs():
    assert (encoding_of("logistic"), encoding_of("mlp")) == ("one_hot", "piecewise_linear")


def test_weights_of_another_length_are_refused():
    with pytest.raises(SchemaMismatchError, match=r"takes \(4,\); compare model fingerprints"):
        predict(LOGISTIC, np.zeros(5, np.float32), LOANS)


def test_loans_of_another_width_are_refused():
    with pytest.raises(SchemaMismatchError, match="use the model's bins"):
        predict(LOGISTIC, np.zeros(4, np.float32), LOANS[:, :2])


@pytest.mark.parametrize("wrong", [("logistic", 0, ()), ("mlp", 3, (0,)), ("logistic", 3, (4,))])
def test_an_architecture_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(SchemaMismatchError, match=r"widths of at least 1|no hidden layers"):
        Architecture(*wrong)


def test_the_fingerprint_names_schema_bins_and_architecture():
    own = model_fingerprint("schema", "bins", LOGISTIC)
    others = {
        model_fingerprint("other", "bins", LOGISTIC),
        model_fingerprint("schema", "other", LOGISTIC),
        model_fingerprint("schema", "bins", MLP),
    }
    assert own not in others
    assert len(others) == 3
    require_same_fingerprint(own, model_fingerprint("schema", "bins", Architecture("logistic", 3)))


def test_another_sides_fingerprint_is_refused():
    with pytest.raises(SchemaMismatchError, match="use the coordinator's schema file and this job's bins"):
        require_same_fingerprint("a" * 64, "b" * 64)

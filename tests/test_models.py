"""A model is one flat vector; it starts in public, and no vector is used under another meaning."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from scipy import special
from torch import nn

from fedfin.credit.binning import bins_from_histogram, encode, histogram, inputs
from fedfin.credit.models import (
    Architecture,
    architecture_of,
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
from fedfin.plan import ModelPlan
from fedfin.simulation.partition import demo_loans

LOGISTIC = Architecture("logistic", 3)
MLP = Architecture("mlp", 3, (8, 4))
ATTENTION = Architecture("attention", 3, (8, 5), (2, 1))
KINDS = [LOGISTIC, MLP, ATTENTION]
LOANS = np.random.default_rng(0).random((5, 3)).astype(np.float32)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_vector_loaded_into_the_module_comes_out_as_it_was(architecture):
    weights = np.random.default_rng(1).normal(size=num_parameters(architecture)).astype(np.float32)
    module = build(architecture)
    load_weights(module, weights)
    assert_array_equal(flatten(module), weights)


@pytest.mark.parametrize("architecture", KINDS)
def test_the_initial_weights_are_the_same_for_the_same_seed_and_give_one_half_to_all(architecture):
    weights = initial_weights(architecture, 7)
    assert weights.shape == (num_parameters(architecture),)
    assert_array_equal(weights, initial_weights(architecture, 7))
    assert_array_equal(predict(architecture, weights, LOANS), np.full(5, 0.5))


def test_logistic_starts_at_zero_and_other_hidden_layers_by_the_seed():
    assert not initial_weights(LOGISTIC, 7).any()
    for architecture in (MLP, ATTENTION):
        assert (initial_weights(architecture, 7) != initial_weights(architecture, 8)).any()


def test_logistic_predicts_by_the_logistic_function():
    weights = np.array([1, -2, 3, 0.5], dtype=np.float32)
    expected = 1 / (1 + np.exp(-(LOANS @ weights[:3] + 0.5)))
    assert_allclose(predict(LOGISTIC, weights, LOANS), expected, rtol=1e-6)


@pytest.mark.parametrize("architecture", [MLP, ATTENTION])
def test_a_loans_prediction_does_not_depend_on_the_other_loans(architecture):
    weights = np.random.default_rng(1).normal(size=num_parameters(architecture)).astype(np.float32)
    together = predict(architecture, weights, LOANS)
    assert_allclose([predict(architecture, weights, loan[None])[0] for loan in LOANS], together, rtol=1e-5)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in build(architecture).modules())


@pytest.mark.parametrize("hidden", [(8,), (8, 5), (32,)])
def test_the_attentions_length_is_that_of_its_module(hidden):
    architecture = Architecture("attention", 9, hidden, (2, 4, 3))
    assert num_parameters(architecture) == sum(p.numel() for p in build(architecture).parameters())


def test_attention_has_a_token_for_each_column_of_the_schema_that_no_other_columns_inputs_reach():
    loans, schema = demo_loans()
    bins = bins_from_histogram(histogram(loans.frame, schema), schema, 6)
    architecture = architecture_of(ModelPlan(kind="attention", hidden=(8,)), schema, bins)
    assert len(architecture.blocks) == len(schema.features)
    encoded = encode(loans.frame, schema, bins, "piecewise_linear")
    assert sum(architecture.blocks) == architecture.num_inputs == encoded.shape[1]
    first = inputs(schema, bins, "piecewise_linear")[: architecture.blocks[0]]
    assert {one.column for one in first} == {schema.features[0].name}


def test_the_attentions_tokens_see_each_other():
    """The prediction is not a sum over columns: the effect of one depends on another."""
    weights = np.random.default_rng(1).normal(size=num_parameters(ATTENTION)).astype(np.float32)
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]], np.float32)
    logits = special.logit(predict(ATTENTION, weights, corners))
    assert abs(logits[3] - logits[1] - logits[2] + logits[0]) > 0.01


def test_predictions_are_probabilities_even_far_out():
    extreme = predict(
        LOGISTIC, np.array([1e4, 0, 0, 0], np.float32), np.array([[1, 0, 0], [-1, 0, 0]], np.float32)
    )
    assert_array_equal(extreme, [1.0, 0.0])


def test_torchs_global_generator_is_not_drawn_from():
    before = torch.get_rng_state()
    predict(MLP, initial_weights(MLP, 0), LOANS)
    assert torch.equal(torch.get_rng_state(), before)


def test_logistic_takes_indicators_and_the_others_piecewise_linear_inputs():
    assert [encoding_of(one.kind) for one in KINDS] == ["one_hot", "piecewise_linear", "piecewise_linear"]


def test_weights_of_another_length_are_refused():
    with pytest.raises(SchemaMismatchError, match=r"takes \(4,\); compare model fingerprints"):
        predict(LOGISTIC, np.zeros(5, np.float32), LOANS)


def test_loans_of_another_width_are_refused():
    with pytest.raises(SchemaMismatchError, match="use the model's bins"):
        predict(LOGISTIC, np.zeros(4, np.float32), LOANS[:, :2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("logistic", 0, ()), "widths of at least 1"),
        (("mlp", 3, (0,)), "widths of at least 1"),
        (("attention", 3, (8,), (3, 0)), "widths of at least 1"),
        (("logistic", 3, (4,)), "no hidden layers"),
        (("attention", 3, (), (3,)), "token width"),
        (("attention", 3, (6,), (3,)), "multiple of 4"),
        (("attention", 3, (8, 8, 8), (3,)), "token width"),
        (("attention", 3, (8,), (2, 2)), "do not add up"),
        (("mlp", 3, (8,), (3,)), "do not add up"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(wrong, message):
    with pytest.raises(SchemaMismatchError, match=message):
        Architecture(*wrong)


@pytest.mark.parametrize("hidden", [(), (6,), (8, 8, 8)])
def test_a_plan_whose_attention_cannot_be_built_is_refused_at_once(hidden):
    with pytest.raises(ValidationError, match=r"try \[32\]"):
        ModelPlan(kind="attention", hidden=hidden)


def test_the_fingerprint_names_schema_bins_and_architecture():
    own = model_fingerprint("schema", "bins", LOGISTIC)
    others = {
        model_fingerprint("other", "bins", LOGISTIC),
        model_fingerprint("schema", "other", LOGISTIC),
        model_fingerprint("schema", "bins", MLP),
        model_fingerprint("schema", "bins", ATTENTION),
        model_fingerprint("schema", "bins", Architecture("attention", 3, (8, 5), (1, 2))),
    }
    assert own not in others
    assert len(others) == 5
    require_same_fingerprint(own, model_fingerprint("schema", "bins", Architecture("logistic", 3)))


def test_another_sides_fingerprint_is_refused():
    with pytest.raises(SchemaMismatchError, match="use the coordinator's schema file and this job's bins"):
        require_same_fingerprint("a" * 64, "b" * 64)

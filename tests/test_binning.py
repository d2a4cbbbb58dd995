"""Bins come from sums of histograms only, are the same everywhere, and every loan is encoded finitely."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from fedfin.credit.binning import (
    Bins,
    Input,
    bins_from_histogram,
    encode,
    histogram,
    histogram_sensitivity,
    histogram_size,
    inputs,
    num_inputs,
)
from fedfin.credit.schema import CategoricalColumn, Label, NumericColumn, Schema
from fedfin.errors import DataError, SchemaMismatchError

SCHEMA = Schema(
    label=Label(name="bad", bad=("1",), good=("0",), definition="90 days past due"),
    columns=(
        NumericColumn(
            name="income", minimum=0, maximum=8, grid_cells=8, nullable=True, special_codes={-1: "none"}
        ),
        NumericColumn(name="age", minimum=18, maximum=98, grid_cells=4, protected=True),
        CategoricalColumn(name="home", categories=("own", "rent"), nullable=True),
    ),
)
LOANS = pd.DataFrame(
    {
        "income": [0.0, 1.5, 8.0, -1.0, np.nan],
        "age": [20.0, 30.0, 40.0, 50.0, 60.0],
        "home": np.array(["own", "rent", "rent", None, "own"], dtype=object),
    }
)
TWO_BINS = Bins((("income", (0.0, 2.0, 8.0)),))


def random_loans(num_loans, seed):
    rng = np.random.default_rng(seed)
    income = rng.choice([*np.linspace(0, 8, 30), -1.0, np.nan], num_loans)
    home = rng.choice(np.array(["own", "rent", None], dtype=object), num_loans)
    return pd.DataFrame({"income": income, "age": 30.0, "home": home})


def test_a_histogram_counts_grid_cells_then_special_codes_then_missing_of_each_feature():
    assert_array_equal(histogram(LOANS, SCHEMA), [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 1])
    assert histogram_size(SCHEMA) == 13


@given(st.integers(0, 50), st.integers(0, 50))
def test_the_sum_of_histograms_is_the_histogram_of_all_loans(num_loans, other_num_loans):
    first, second = random_loans(num_loans, 0), random_loans(other_num_loans, 1)
    both = pd.concat([first, second], ignore_index=True)
    assert_array_equal(histogram(first, SCHEMA) + histogram(second, SCHEMA), histogram(both, SCHEMA))


@given(st.integers(1, 40), st.integers(0, 1000))
def test_one_loan_moves_the_histogram_by_its_sensitivity(num_loans, seed):
    loans = random_loans(num_loans, seed)
    change = histogram(loans, SCHEMA) - histogram(loans.iloc[:-1], SCHEMA)
    assert np.linalg.norm(change) == pytest.approx(histogram_sensitivity(SCHEMA))


def test_protected_columns_are_in_neither_histogram_nor_inputs():
    assert {described.column for described in inputs(SCHEMA, TWO_BINS, "one_hot")} == {"income", "home"}


def test_edges_lie_at_the_quantiles_of_the_grid():
    counts = np.concatenate([np.full(8, 10), [0, 0], [0, 0, 0]])
    assert bins_from_histogram(counts, SCHEMA, 4).edges == (("income", (0.0, 2.0, 4.0, 6.0, 8.0)),)


def test_edges_that_fall_together_are_merged():
    counts = np.array([90, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert bins_from_histogram(counts, SCHEMA, 8).edges == (("income", (0.0, 1.0, 8.0)),)


@pytest.mark.parametrize("counts", [np.zeros(13), np.full(13, -5.0), [100, *[0] * 12]])
def test_a_column_has_at_least_one_bin(counts):
    (name, edges), *_ = bins_from_histogram(counts, SCHEMA, 8).edges
    assert (name, edges[0], edges[-1]) == ("income", 0.0, 8.0)


@given(arrays(np.float64, 13, elements=st.floats(-1e6, 1e6)), st.integers(1, 16))
def test_any_noisy_histogram_gives_sound_bins_and_the_same_ones_again(counts, max_bins):
    bins = bins_from_histogram(counts, SCHEMA, max_bins)
    ((_, edges),) = bins.edges
    assert 2 <= len(edges) <= max_bins + 1
    assert (np.diff(edges) > 0).all()
    assert bins_from_histogram(counts.copy(), SCHEMA, max_bins) == bins


def test_noise_in_empty_cells_does_not_draw_the_edges_there():
    # a fifth of the column's 64 cells hold loans; clipping at zero alone would count the noise's positive half
    column = NumericColumn(name="amount", minimum=0, maximum=64)
    schema = Schema(label=SCHEMA.label, columns=(column,))
    counts = np.zeros(65)
    counts[:13] = 100
    noise = np.random.default_rng(0).normal(0, 30, 65)
    ((_, edges),) = bins_from_histogram(counts + noise, schema, 4).edges
    assert edges[-2] <= 13


@pytest.mark.parametrize("counts", [np.zeros(12), np.full(13, np.nan), np.zeros((13, 1))])
def test_a_histogram_of_another_schema_is_refused(counts):
    with pytest.raises(SchemaMismatchError, match="all lenders need the coordinator's schema"):
        bins_from_histogram(counts, SCHEMA, 4)


def test_one_hot_marks_each_loans_bin_code_category_or_absence():
    expected = [
        [1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0, 1],
        [0, 0, 0, 1, 1, 0, 0],
    ]
    assert_array_equal(encode(LOANS, SCHEMA, TWO_BINS, "one_hot"), expected)


def test_piecewise_linear_fills_the_bins_below_a_value_and_its_own_bin_in_part():
    expected = [[0, 0, 0, 0], [0.75, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert_allclose(encode(LOANS, SCHEMA, TWO_BINS, "piecewise_linear")[:, :4], expected)


def test_on_a_logarithmic_grid_piecewise_linear_is_linear_in_the_logarithm():
    column = NumericColumn(name="assets", minimum=0, maximum=999, grid="log", grid_cells=300)
    schema = Schema(label=SCHEMA.label, columns=(column,))
    loans = pd.DataFrame({"assets": [0.0, 9.0, 99.0, 999.0]})
    encoded = encode(loans, schema, Bins((("assets", (0.0, 999.0)),)), "piecewise_linear")
    assert_allclose(encoded[:, 0], [0, 1 / 3, 2 / 3, 1], atol=1e-3)


@pytest.mark.parametrize("kind", ["one_hot", "piecewise_linear"])
def test_every_loan_is_encoded_in_zero_to_one_with_one_column_per_input(kind):
    loans = random_loans(500, 0)
    bins = bins_from_histogram(histogram(loans, SCHEMA), SCHEMA, 5)
    encoded = encode(loans, SCHEMA, bins, kind)
    assert encoded.dtype == np.float32
    assert encoded.shape == (500, num_inputs(SCHEMA, bins, kind))
    assert encoded.min() >= 0
    assert encoded.max() <= 1


def test_values_outside_the_grid_belong_to_its_outer_bins():
    loans = pd.DataFrame({"income": [-3.0, 99.0], "home": ["own", "own"]})
    assert_array_equal(encode(loans, SCHEMA, TWO_BINS, "one_hot")[:, :2], [[1, 0], [0, 1]])


def test_inputs_are_named_for_people():
    assert inputs(SCHEMA, TWO_BINS, "one_hot") == (
        Input("income", "0 to 2"),
        Input("income", "2 to 8"),
        Input("income", "none"),
        Input("income", "missing"),
        Input("home", "own"),
        Input("home", "rent"),
        Input("home", "missing"),
    )


def test_bins_survive_json_and_their_fingerprint_tells_them_apart():
    again = Bins.from_json(TWO_BINS.to_json())
    assert again == TWO_BINS
    assert again.fingerprint() == TWO_BINS.fingerprint()
    assert Bins((("income", (0.0, 3.0, 8.0)),)).fingerprint() != TWO_BINS.fingerprint()


@pytest.mark.parametrize(
    "text", ["", "{}x", "[1]", '[["income", ["a"]]]', '[["income", [1]]]', '[["income", [2, 1]]]']
)
def test_text_that_is_no_bins_is_refused(text):
    with pytest.raises(SchemaMismatchError, match="bins"):
        Bins.from_json(text)


def test_bins_of_another_schema_are_refused():
    with pytest.raises(SchemaMismatchError, match="use one job's files"):
        encode(LOANS, SCHEMA, Bins((("assets", (0.0, 1.0)),)), "one_hot")


@pytest.mark.parametrize(
    ("column", "value", "mend"),
    [("income", np.inf, "write it as missing"), ("home", "castle", "correct the row")],
)
def test_a_value_that_cannot_be_encoded_is_refused_by_its_row(column, value, mend):
    loans = LOANS.copy()
    loans.loc[2, column] = value
    with pytest.raises(DataError, match=f"row 2, column {column}.*{mend}"):
        encode(loans, SCHEMA, TWO_BINS, "one_hot")


def test_an_absent_column_is_refused():
    with pytest.raises(DataError, match="column income of the schema is absent"):
        histogram(LOANS.drop(columns="income"), SCHEMA)


def test_the_loans_are_not_changed():
    loans = LOANS.copy(deep=True)
    encode(loans, SCHEMA, TWO_BINS, "piecewise_linear")
    histogram(loans, SCHEMA)
    pd.testing.assert_frame_equal(loans, LOANS)

"""The federation's schema: what it may say, what it refuses, and the grids it fixes in public."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

import fedfin.simulation
from fedfin.credit.schema import CategoricalColumn, Label, NumericColumn, Schema
from fedfin.errors import ConfigError

SCHEMA = """
description: two loans a day
label: {name: bad, bad: [1, written-off], good: 0, definition: 90 days past due within 12 months}
columns:
  - {name: income, kind: numeric, unit: EUR, minimum: 0, maximum: 100000, nullable: true, grid: log}
  - {name: score, kind: numeric, minimum: 0, maximum: 900, integer: true, special_codes: {-1: no record}}
  - {name: home, kind: categorical, categories: [owner, rent]}
  - {name: sex, kind: categorical, categories: [f, m], protected: true}
"""


def schema_with(old, new):
    assert SCHEMA.count(old) == 1
    return Schema.from_yaml(SCHEMA.replace(old, new), "schema.yaml")


def test_a_schema_file_says_what_each_column_holds():
    schema = Schema.from_yaml(SCHEMA, "schema.yaml")
    assert [column.name for column in schema.columns] == ["income", "score", "home", "sex"]
    assert schema.label.bad == ("1", "written-off")
    assert schema.label.good == ("0",)
    score = schema.columns[1]
    assert isinstance(score, NumericColumn)
    assert score.special_codes == {-1.0: "no record"}
    assert_array_equal(score.special_values, [-1.0])
    assert (score.integer, score.nullable, score.grid, score.grid_cells) == (True, False, "linear", 64)


def test_a_protected_attribute_is_a_feature_only_for_a_reason_in_words():
    schema = Schema.from_yaml(SCHEMA, "schema.yaml")
    assert [column.name for column in schema.features] == ["income", "score", "home"]
    assert [column.name for column in schema.protected] == ["sex"]
    reason = 'protected: true, protected_as_feature: "the law asks for it"'
    assert schema_with("protected: true", reason).features[-1].name == "sex"


def test_whole_numbers_are_spellings_too():
    schema = schema_with("categories: [owner, rent]", "categories: [1, 2]")
    assert schema.columns[2].categories == ("1", "2")


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        (
            "unit: EUR",
            "units: EUR",
            r"columns\.0.*units is not a key of this release; remove it or mend its spelling",
        ),
        ("minimum: 0, maximum: 900", "minimum: 0", r"columns\.1.*maximum is missing; add it"),
        (
            "minimum: 0, maximum: 900",
            "minimum: 900, maximum: 0",
            "minimum 900 of score is not below maximum 0; widen",
        ),
        (
            "minimum: 0, maximum: 100000",
            "minimum: -1, maximum: 9",
            "grid of income is log, but minimum -1 is negative",
        ),
        ("minimum: 0, maximum: 900", "minimum: 1.0e+16, maximum: 1.0000000000000002e+16", "lower grid_cells"),
        ("maximum: 900", "maximum: .inf", "finite"),
        ("-1: no record", "-1: ''", "special code -1 has no meaning; say in words"),
        ("-1: no record", ".nan: gone", "special_codes.nan.*should be a finite number"),
        ("[owner, rent]", "[]", r"columns\.2.*categories"),
        ("[owner, rent]", "[owner, owner]", "category 'owner' stands twice; remove one"),
        ("[owner, rent]", "[owner, yes]", "put the word between quotes"),
        ("[owner, rent]", "[owner, ' rent']", "value ' rent' has spaces around it"),
        ("kind: categorical, categories: [owner, rent]", "kind: text", "categorical"),
        ("name: home", "name: 2nd home", r"columns\.2.*name"),
        ("name: home", "name: INCOME", "column 'income' stands twice in columns"),
        ("name: home", "name: Bad", "label 'bad' stands among columns, as a model input; remove it there"),
        ("good: 0", "good: 1", "label value '1' stands twice in bad and good"),
        ("good: 0", "good: []", r"label\.good"),
        ("definition: 90 days past due within 12 months", "definition: ''", r"label\.definition"),
        (
            "protected: true",
            "protected_as_feature: why not",
            "needs protected: true; set it, or remove the reason",
        ),
        (
            "protected: true",
            "protected: true, protected_as_feature: ' '",
            "is empty; write the reason in words",
        ),
        ("nullable: true", "nullable: perhaps", r"columns\.0.*nullable is 'perhaps'"),
    ],
)
def test_a_schema_that_cannot_be_meant_is_refused_with_file_key_and_mend(old, new, refusal):
    with pytest.raises(ConfigError, match=refusal) as refused:
        schema_with(old, new)
    assert str(refused.value).startswith("schema.yaml: ")


def test_a_schema_of_protected_attributes_alone_is_refused():
    only_sex = re.sub(r"  - \{name: (income|score|home).*\n", "", SCHEMA)
    with pytest.raises(
        ConfigError, match="every column is protected, so the model has no input; add a column"
    ):
        Schema.from_yaml(only_sex, "schema.yaml")


@pytest.mark.parametrize("text", ["columns: [", "- a", "", "a: 1\na: 2"])
def test_what_is_no_yaml_of_keys_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=r"^schema\.yaml"):
        Schema.from_yaml(text, "schema.yaml")


def test_a_schema_never_changes():
    schema = Schema.from_yaml(SCHEMA, "schema.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        schema.columns = ()


def test_the_fingerprint_changes_with_any_part_and_with_nothing_else():
    fingerprint = Schema.from_yaml(SCHEMA, "a.yaml").fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert Schema.from_yaml("# a comment\n" + SCHEMA, "b.yaml").fingerprint() == fingerprint
    assert schema_with("maximum: 900", "maximum: 901").fingerprint() != fingerprint
    assert schema_with("[owner, rent]", "[rent, owner]").fingerprint() != fingerprint
    assert schema_with("unit: EUR", "unit: USD").fingerprint() != fingerprint


ranges = st.tuples(
    st.floats(0, 1e9, allow_subnormal=False),
    st.floats(0.1, 1e9),
    st.integers(2, 200),
    st.sampled_from(["linear", "log"]),
)
words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8)
numeric_columns = st.builds(
    lambda r, integer, nullable, codes: NumericColumn(
        name="number",
        minimum=r[0],
        maximum=r[0] + r[1],
        grid_cells=r[2],
        grid=r[3],
        integer=integer,
        nullable=nullable,
        special_codes=codes,
    ),
    ranges,
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.floats(-1e6, 1e6), words, max_size=3),
)
categorical_columns = st.builds(
    lambda categories, protected: CategoricalColumn(name="word", categories=categories, protected=protected),
    st.lists(words, min_size=1, max_size=5, unique=True),
    st.booleans(),
)


@settings(max_examples=30)
@given(numeric_columns, categorical_columns, words)
def test_yaml_and_back_is_the_same_schema(number, word, definition):
    label = Label(name="target", bad="1", good="0", definition=definition)
    schema = Schema(label=label, columns=(number, word))
    again = Schema.from_yaml(schema.to_yaml(), "schema.yaml")
    assert again == schema
    assert again.fingerprint() == schema.fingerprint()


@given(numeric_columns)
def test_the_grid_covers_the_range_exactly_and_in_order(column):
    edges = column.grid_edges()
    assert edges.shape == (column.grid_cells + 1,)
    assert edges.dtype == np.float64
    assert (edges[0], edges[-1]) == (column.minimum, column.maximum)
    assert np.diff(edges).min() > 0


def test_a_linear_grid_is_even_and_a_log_grid_is_even_in_log_of_one_plus_value():
    linear = NumericColumn(name="x", minimum=-2, maximum=2, grid_cells=4)
    log = NumericColumn(name="x", minimum=0, maximum=15, grid="log", grid_cells=4)
    assert_allclose(linear.grid_edges(), [-2, -1, 0, 1, 2])
    assert_allclose(log.grid_edges(), [0, 1, 3, 7, 15], atol=1e-12)


def test_the_schema_of_the_demo_holds_its_loans():
    folder = Path(fedfin.simulation.__file__).parent
    schema = Schema.from_yaml((folder / "credit_data.yaml").read_text(), "credit_data.yaml")
    loans = pd.read_csv(folder / "credit_data.csv.gz")
    assert [*(column.name for column in schema.columns), schema.label.name] == list(loans.columns)
    assert [column.name for column in schema.protected] == ["Age", "Marital"]
    assert not {"Age", "Marital"} & {column.name for column in schema.features}
    for column in schema.columns:
        cells = loans[column.name].dropna()
        assert column.nullable == loans[column.name].isna().any()
        if isinstance(column, NumericColumn):
            assert cells.between(column.minimum, column.maximum).all()
        else:
            assert set(cells) == set(column.categories)

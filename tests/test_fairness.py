"""Fairness from counts: the rates of a direct computation, and nothing of a group that noise hides."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfin.credit.fairness import fairness_of
from fedfin.credit.groups import NUM_BANDS, Group, group_cells, group_counts, groups
from fedfin.credit.schema import Schema
from fedfin.errors import DataError

SCHEMA = Schema.from_yaml(
    """
label: {name: bad, bad: 1, good: 0, definition: 90 days past due within 12 months}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 100000}
  - {name: sex, kind: categorical, categories: [f, m], protected: true}
  - name: age
    kind: numeric
    minimum: 20
    maximum: 100
    special_codes: {-1: not told}
    nullable: true
    protected: true
""",
    "schema.yaml",
)
UNPROTECTED = Schema.from_yaml(SCHEMA.to_yaml().replace("protected: true", "protected: false"), "schema.yaml")
AGE_LABELS = ("20 to 40", "40 to 60", "60 to 80", "80 to 100", "not told", "missing")


@st.composite
def loans(draw):
    """Loans with every kind of protected value, their outcomes, and whether a cut-off rejects them."""
    num = draw(st.integers(1, 60))
    sexes = draw(st.lists(st.sampled_from(["f", "m"]), min_size=num, max_size=num))
    ages = draw(
        st.lists(st.sampled_from([20.0, 39.5, 40.0, 77.0, 100.0, -1.0, np.nan]), min_size=num, max_size=num)
    )
    bits = st.lists(st.booleans(), min_size=num, max_size=num)
    labels, rejected = np.array(draw(bits), dtype=np.int64), np.array(draw(bits))
    return pd.DataFrame({"sex": sexes, "age": ages}), labels, rejected


def in_group(frame, group):
    """The loans of a group, said another way than the code says it."""
    if group.column == "sex":
        return (frame["sex"] == group.label).to_numpy()
    if group.label == "missing":
        return frame["age"].isna().to_numpy()
    if group.label == "not told":
        return (frame["age"] == -1).to_numpy()
    low, high = (float(edge) for edge in group.label.split(" to "))
    return (
        (frame["age"] >= low) & ((frame["age"] < high) | ((high == 100) & (frame["age"] == 100)))
    ).to_numpy()


def exact(frame, labels, rejected):
    return group_counts(frame, labels, rejected, SCHEMA).astype(np.float64)


def test_groups_are_categories_bands_of_the_valid_range_special_codes_and_missing_values():
    sexes = (Group("sex", "f"), Group("sex", "m"))
    assert groups(SCHEMA) == sexes + tuple(Group("age", label) for label in AGE_LABELS)
    assert len(AGE_LABELS) == NUM_BANDS + 2
    assert group_cells(SCHEMA) == 4 * 8


def test_a_schema_without_protected_columns_has_no_groups():
    frame, none = pd.DataFrame({"income": [1.0, 2.0]}), np.zeros(2, dtype=np.int64)
    assert groups(UNPROTECTED) == ()
    assert group_counts(frame, none, none.astype(bool), UNPROTECTED).shape == (0,)
    assert fairness_of(np.zeros(0), UNPROTECTED, 1.0) == ()


def test_a_logarithmic_column_has_bands_of_equal_ratio():
    text = SCHEMA.to_yaml().replace(
        "minimum: 20.0\n  maximum: 100.0", "minimum: 0.0\n  maximum: 9999.0\n  grid: log"
    )
    labels = [group.label for group in groups(Schema.from_yaml(text, "schema.yaml")) if group.column == "age"]
    assert labels[:NUM_BANDS] == ["0 to 9", "9 to 99", "99 to 999", "999 to 9999"]


@given(loans())
def test_counts_are_those_of_a_direct_count(table):
    frame, labels, rejected = table
    rows = group_counts(frame, labels, rejected, SCHEMA).reshape(-1, 4)
    for group, row in zip(groups(SCHEMA), rows, strict=True):
        inside = in_group(frame, group)
        assert list(row) == [
            (inside & (labels == bad) & (rejected == side)).sum() for bad in (0, 1) for side in (False, True)
        ]


@given(loans())
def test_every_loan_is_once_in_every_protected_column(table):
    frame, labels, rejected = table
    counts = group_counts(frame, labels, rejected, SCHEMA)
    assert (counts[:8].sum(), counts[8:].sum()) == (len(frame), len(frame))


@settings(max_examples=50)
@given(loans())
def test_rates_and_differences_are_those_of_a_direct_computation(table):
    frame, labels, rejected = table
    for column in fairness_of(exact(*table), SCHEMA, 0.0):
        members = {
            group.label: in_group(frame, group) for group in groups(SCHEMA) if group.column == column.column
        }
        sizes = {label: int(inside.sum()) for label, inside in members.items()}
        assert {group.label for group in column.groups} == {label for label, size in sizes.items() if size}
        assert sizes[column.reference] == max(sizes.values())
        reference = ~rejected[members[column.reference]]
        for group in column.groups:
            inside = members[group.label]
            good = inside & (labels == 0)
            assert group.loans.value == sizes[group.label]
            assert group.accepted.value == pytest.approx((~rejected[inside]).mean())
            assert group.parity.value == pytest.approx((~rejected[inside]).mean() - reference.mean())
            if good.any():
                assert group.good_accepted.value == pytest.approx((~rejected[good]).mean())
            else:
                assert group.good_accepted is None


def test_equal_opportunity_compares_the_good_loans_only():
    frame = pd.DataFrame({"sex": ["f"] * 40 + ["m"] * 60, "age": 30.0})
    labels = np.tile([0, 0, 0, 1], 25)
    rejected = (labels == 1) | (np.arange(100) < 12)  # all bad loans, and of the good ones the first nine
    sex = fairness_of(exact(frame, labels, rejected), SCHEMA, 0.0)[0]
    women, men = sex.groups
    assert sex.reference == "m"
    assert (women.good_accepted.value, men.good_accepted.value) == (21 / 30, 1.0)
    assert women.opportunity.value == pytest.approx(-9 / 30)
    assert women.parity.value == pytest.approx(21 / 40 - 45 / 60)
    assert (men.parity.value, men.opportunity.value) == (0.0, 0.0)


@pytest.mark.parametrize("noise", [3.0, 10.0])
def test_the_noise_error_of_rates_and_differences_is_what_noise_does_to_them(noise):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sex": rng.choice(["f", "m"], 3000, p=[0.3, 0.7]), "age": 30.0})
    labels, rejected = (rng.random(3000) < 0.2).astype(np.int64), rng.random(3000) < 0.4
    counts = exact(frame, labels, rejected)
    found = [
        fairness_of(counts + rng.normal(0, noise, counts.shape), SCHEMA, noise)[0].groups[0]
        for _ in range(400)
    ]
    for name in ("accepted", "good_accepted", "parity", "opportunity"):
        values = [getattr(group, name).value for group in found]
        errors = [getattr(group, name).noise_error for group in found]
        assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)


def test_a_small_group_is_hidden_by_noise_and_named():
    frame = pd.DataFrame({"sex": ["f"] * 12 + ["m"] * 2000, "age": 30.0})
    labels = np.tile([0, 1], 1006)
    counts = exact(frame, labels, labels == 1)
    sex = fairness_of(counts + np.random.default_rng(1).normal(0, 5.0, counts.shape), SCHEMA, 5.0)[0]
    assert [group.label for group in sex.groups] == ["m"]
    assert sex.hidden == ("f",)


def test_where_noise_hides_the_largest_group_nothing_is_compared():
    counts = np.random.default_rng(2).normal(0, 50.0, group_cells(SCHEMA))
    for column in fairness_of(counts, SCHEMA, 50.0):
        assert (column.reference, column.groups) == ("", ())
        assert column.hidden == tuple(
            group.label for group in groups(SCHEMA) if group.column == column.column
        )


def test_a_rate_of_few_loans_has_a_sampling_error_even_where_all_are_accepted():
    frame = pd.DataFrame({"sex": ["f", "m", "m"], "age": 30.0})
    none = np.zeros(3, dtype=np.int64)
    women = fairness_of(exact(frame, none, none == 1), SCHEMA, 0.0)[0].groups[0]
    assert (women.accepted.value, women.accepted.noise_error) == (1.0, 0.0)
    assert women.accepted.sampling_error > 0.3


@pytest.mark.parametrize("sex", ["x", None])
def test_a_value_that_the_schema_does_not_allow_is_refused(sex):
    frame = pd.DataFrame({"sex": ["f", sex], "age": 30.0})
    none = np.zeros(2, dtype=np.int64)
    with pytest.raises(DataError, match="column sex holds values that the schema does not allow"):
        group_counts(frame, none, none == 1, SCHEMA)

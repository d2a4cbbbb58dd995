"""The demo's split: every loan in one house, five houses of 90, skewed as the rule says, outcomes not looked at."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fedfin.credit.source import Loans
from fedfin.errors import DataError
from fedfin.simulation.partition import RULE, demo_loans, split_demo

LOANS, SCHEMA = demo_loans()
SPLIT = split_demo(LOANS, 0)
SERVES = {
    "tenant-micro": LOANS.frame["Home"] == "rent",
    "family-micro": LOANS.frame["Home"].isin(["parents", "priv", "other", "ignore"]),
    "starter-micro": LOANS.frame["Seniority"] <= 1,
    "freelance-micro": LOANS.frame["Job"] == "freelance",
    "basket-micro": LOANS.frame["Amount"] <= 700,
}


def test_the_loans_that_ship_are_all_there_and_fit_their_schema():
    assert len(LOANS) == 4454
    assert LOANS.labels.mean() == pytest.approx(0.2815, abs=1e-4)
    assert not {"Age", "Marital"} & {column.name for column in SCHEMA.features}


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_every_loan_is_held_out_or_at_one_lender(seed):
    split = split_demo(LOANS, seed)
    rows = np.concatenate([split.held_out, *(lender.rows for lender in split.lenders)])
    assert_array_equal(np.sort(rows), np.arange(4454))
    assert [len(lender.rows) for lender in split.small_lenders] == [90] * 5
    assert min(len(lender.rows) for lender in split.banks) > 700


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_every_lender_has_good_and_bad_loans(seed):
    for lender in split_demo(LOANS, seed).lenders:
        assert set(LOANS.labels[lender.rows]) == {0, 1}


def test_the_held_out_loans_are_three_tenths_of_each_outcome():
    held_out = LOANS.labels[SPLIT.held_out]
    assert held_out.sum() == round(0.3 * LOANS.labels.sum())
    assert len(held_out) == round(0.3 * len(LOANS))


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    again, other = split_demo(LOANS, 0), split_demo(LOANS, 1)
    assert_array_equal(again.held_out, SPLIT.held_out)
    for lender, same in zip(SPLIT.lenders, again.lenders, strict=True):
        assert_array_equal(lender.rows, same.rows)
    assert set(other.held_out) != set(SPLIT.held_out)


@pytest.mark.parametrize("lender", SPLIT.small_lenders, ids=lambda lender: lender.name)
def test_a_small_lender_serves_mostly_the_segment_that_the_rule_states(lender):
    assert SERVES[lender.name].to_numpy()[lender.rows].sum() >= 72
    assert lender.name in RULE


@pytest.mark.parametrize(
    ("position", "column"), list(enumerate(["Income", "Assets", "Seniority"])), ids=["city", "north", "union"]
)
def test_a_bank_serves_people_with_more_of_what_it_prefers(position, column):
    means = [LOANS.frame[column].iloc[bank.rows].mean() for bank in SPLIT.banks]
    assert np.argmax(means) == position
    assert SPLIT.banks[position].name in RULE


def test_a_table_without_enough_loans_of_a_segment_is_refused():
    few = Loans(LOANS.frame.iloc[:300].reset_index(drop=True), LOANS.labels[:300])
    with pytest.raises(DataError, match="give the demo its table"):
        split_demo(few, 0)


def test_loans_of_one_outcome_are_refused():
    good = Loans(LOANS.frame, np.zeros_like(LOANS.labels))
    with pytest.raises(DataError, match="choose another seed"):
        split_demo(good, 0)

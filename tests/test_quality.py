"""The check of a lender's table: every planted fault is named, honest columns are left alone."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import fedfin.simulation
from fedfin.config import DataSource
from fedfin.credit.binning import histogram, histogram_size
from fedfin.credit.drift import Reference, chance_psi, num_cells, psi
from fedfin.credit.leakage import LEAK_AUC, single_column_auc
from fedfin.credit.quality import MIN_LOANS, check_source, check_table
from fedfin.credit.schema import NumericColumn, Schema
from fedfin.credit.source import read_loans
from fedfin.errors import ConfigError, DataError, SchemaMismatchError

FOLDER = Path(fedfin.simulation.__file__).parent
SCHEMA = Schema.from_yaml((FOLDER / "credit_data.yaml").read_text(), "credit_data.yaml")
SOURCE = DataSource(path="credit_data.csv.gz")


@pytest.fixture(scope="module")
def loans():
    return read_loans(SOURCE, SCHEMA, FOLDER)


@pytest.fixture
def raw():
    """The demo's table as text, for spoiling."""
    return pd.read_csv(FOLDER / "credit_data.csv.gz", dtype=object, keep_default_na=False)


def small_table(num_rows=40):
    """An honest table of loans: the outcome depends on nothing."""
    rng = np.random.default_rng(7)
    return pd.DataFrame(
        {"income": rng.integers(0, 1000, num_rows), "home": rng.choice(["owner", "rent"], num_rows)}
    ).assign(bad=np.arange(num_rows) % 3 == 0)


SMALL = Schema.from_yaml(
    """
label: {name: bad, bad: "true", good: "false", definition: 90 days past due}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 1000, nullable: true, special_codes: {-1: no record}}
  - {name: home, kind: categorical, categories: [owner, rent], nullable: true}
""",
    "schema.yaml",
)


def found(report):
    return {(finding.rule, finding.column): finding for finding in report.findings}


def only(report, rule):
    (finding,) = (finding for finding in report.findings if finding.rule == rule)
    return finding


# The demo's table


def test_the_demo_table_can_take_part_and_its_two_duplicates_are_named():
    report = check_source(SOURCE, SCHEMA, FOLDER)
    assert report.can_take_part
    assert (report.num_rows, report.num_bad, report.num_good) == (4454, 1254, 3200)
    assert report.bad_rate == pytest.approx(0.2815, abs=1e-4)
    (duplicates,) = report.findings
    assert (duplicates.severity, duplicates.rule, duplicates.count) == ("warning", "duplicate_rows", 2)
    assert duplicates.rows == (1023, 2930)
    assert duplicates.lines == (1024, 2931)
    income = next(column for column in report.columns if column.name == "Income")
    assert (income.num_missing, income.missing_rate) == (381, 381 / 4454)
    assert [column.single_auc is not None for column in report.columns] == [
        column.is_feature for column in SCHEMA.columns
    ]


def test_every_fault_planted_in_the_demo_table_is_named_in_one_report(raw, tmp_path):
    spoiled = raw.copy()
    spoiled.loc[4, "Seniority"] = "nine"
    spoiled.loc[[10, 20], "Age"] = "17"
    spoiled.loc[7, "Home"] = "castle"
    spoiled.loc[3, "Income"] = "inf"
    spoiled.loc[5, "Time"] = "48.5"
    spoiled.loc[6, "Expenses"] = ""
    spoiled.loc[8, "target"] = "2"
    spoiled.loc[9, "target"] = ""
    spoiled.loc[:, "Records"] = "no"
    spoiled["Amount"] = np.where(spoiled["target"] == "1", "100", "200")  # known only afterwards
    spoiled = pd.concat([spoiled, spoiled.iloc[[100, 100]]]).drop(columns="Price").assign(branch="north")
    spoiled.to_csv(tmp_path / "loans.csv", index=False)

    report = check_source(DataSource(path="loans.csv"), SCHEMA, tmp_path)

    assert not report.can_take_part
    planted = {
        ("missing_column", "Price"): ("error", 1, ()),
        ("wrong_type", "Seniority"): ("error", 1, (5,)),
        ("out_of_range", "Age"): ("error", 2, (11, 21)),
        ("unknown_category", "Home"): ("error", 1, (8,)),
        ("infinite", "Income"): ("error", 1, (4,)),
        ("not_integer", "Time"): ("error", 1, (6,)),
        ("missing_value", "Expenses"): ("error", 1, (7,)),
        ("unknown_label", "target"): ("error", 1, (9,)),
        ("missing_label", "target"): ("error", 1, (10,)),
        ("suspect_leak", "Amount"): ("error", 4456, ()),
        ("constant_column", "Records"): ("warning", 1, ()),
        ("extra_column", None): ("note", 1, ()),
    }
    findings = found(report)
    duplicates = findings.pop(("duplicate_rows", None))
    assert duplicates.count >= 2
    assert {key: (f.severity, f.count, f.rows) for key, f in findings.items()} == planted
    assert all(finding.mend for finding in report.findings)
    assert findings["out_of_range", "Age"].lines == (12, 22)
    assert "castle" in findings["unknown_category", "Home"].message
    assert "branch" in findings["extra_column", None].message
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


def test_the_report_counts_the_faults_of_each_column(raw):
    raw.loc[[1, 2], "Age"] = ["x", "200"]
    raw.loc[1, "Home"] = "castle"
    report = check_table(raw.replace("", None).drop(columns="Price"), SCHEMA)
    of = {column.name: column for column in report.columns}
    assert (of["Age"].num_wrong_type, of["Age"].num_out_of_range) == (1, 1)
    assert of["Home"].num_unknown_category == 1
    assert (of["Price"].present, of["Age"].present) == (False, True)


def test_the_report_is_plain_json(loans):
    reference = Reference.from_histogram(histogram(loans.frame, SCHEMA), SCHEMA)
    report = check_source(SOURCE, SCHEMA, FOLDER, reference=reference)
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["can_take_part"] is True
    assert plain["findings"][0]["rows"] == [1023, 2930]
    assert plain["columns"][0]["name"] == "Seniority"


def test_a_translation_to_what_the_schema_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"data\.columns names Wage, which the schema lacks"):
        check_source(DataSource(path=SOURCE.path, columns={"Wage": "Income"}), SCHEMA, FOLDER)


@given(st.data())
def test_no_table_however_spoiled_stops_the_check(data):
    cells = st.sampled_from([None, "", "1", 1, 2.5, -1, True, "owner", "x", np.inf, pd.NaT, (1, 2), [3]])
    num_rows = data.draw(st.integers(0, 6))
    names = data.draw(st.lists(st.sampled_from(["income", "home", "bad", "other"]), unique=True, min_size=1))
    table = pd.DataFrame(
        {name: pd.Series([data.draw(cells) for _ in range(num_rows)], dtype=object) for name in names}
    )
    report = check_table(table, SMALL)
    assert not report.can_take_part  # it has fewer loans than the least
    assert report.num_rows == num_rows
    assert {f.column for f in report.findings if f.rule == "missing_column"} == {
        "income",
        "home",
        "bad",
    } - set(names)


# The table as a whole


def test_too_few_loans_cannot_take_part():
    assert check_table(small_table(MIN_LOANS), SMALL).can_take_part
    report = check_table(small_table(MIN_LOANS - 1), SMALL)
    finding = only(report, "too_few_loans")
    assert (finding.severity, finding.message) == ("error", "19 loans, fewer than 20")
    assert finding.mend == "add loans, or join through a larger lender"


@pytest.mark.parametrize(("outcome", "rule"), [(False, "no_bad_loans"), (True, "no_good_loans")])
def test_loans_of_one_outcome_cannot_take_part(outcome, rule):
    report = check_table(small_table().assign(bad=outcome), SMALL)
    assert only(report, rule).severity == "error"
    assert only(report, rule).mend == "check the outcome's column and spellings, or take a longer period"


def test_a_table_without_outcomes_has_no_bad_rate():
    assert check_table(small_table().drop(columns="bad"), SMALL).bad_rate is None


def test_special_codes_are_counted_and_are_not_out_of_range():
    table = small_table().assign(income=lambda t: t["income"].where(t.index > 2, -1))
    report = check_table(table, SMALL)
    assert report.can_take_part
    assert report.columns[0].special == (("no record", 3),)


def test_an_empty_column_is_constant():
    report = check_table(small_table().assign(income=np.nan), SMALL)
    assert only(report, "constant_column").column == "income"


def test_faulty_rows_are_not_duplicates_of_each_other():
    table = small_table().astype({"income": object})
    table.loc[:1, "income"] = ["x", "y"]
    table.loc[:1, "home"] = "rent"
    table.loc[:1, "bad"] = True
    assert "duplicate_rows" not in {finding.rule for finding in check_table(table, SMALL).findings}


# Leaks


def test_a_copy_of_the_outcome_is_a_suspected_leak_whatever_its_direction(loans):
    for copy in (loans.labels, 1 - loans.labels, loans.labels * 2.0 + np.linspace(0, 1, len(loans))):
        assert single_column_auc(copy.astype(np.float64), loans.labels) > 0.99
    words = np.where(loans.labels == 1, "gone", "paid").astype(object)
    assert single_column_auc(words, loans.labels) == 1.0


def test_a_leak_that_goes_up_and_down_is_found():
    # As in the SBA loans: the term is a multiple of 12 for nearly all goods and for few bads.
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 2000)
    years, odd = rng.integers(1, 20, 2000) * 12, rng.integers(1, 12, 2000)
    terms = years + np.where(rng.random(2000) < np.where(labels == 1, 0.97, 0.01), odd, 0)
    assert abs(single_column_auc(rng.permutation(terms).astype(np.float64), labels) - 0.5) < 0.1
    assert single_column_auc(terms.astype(np.float64), labels) > LEAK_AUC


def test_a_number_of_its_own_for_every_loan_is_no_leak():
    labels = np.tile([1, 0, 0], 200)
    numbers = np.random.default_rng(2).permutation(600)
    assert single_column_auc(numbers.astype(np.float64), labels) < 0.6
    names = np.array([f"customer {number}" for number in numbers], dtype=object)
    assert single_column_auc(names, labels) < 0.6


def test_a_column_that_is_empty_alone_ranks_nothing():
    labels = np.tile([1, 0], 50)
    assert single_column_auc(np.full(100, np.nan), labels) == 0.5


def test_what_is_missing_only_for_bad_loans_is_a_leak():
    labels = np.tile([1, 0], 100)
    recovered = np.where(labels == 1, np.nan, np.arange(200) % 9.0)
    assert single_column_auc(recovered, labels) > LEAK_AUC


def test_an_acknowledged_leak_is_a_warning():
    table = small_table(60).assign(income=lambda t: t["bad"] * 500)
    finding = only(check_table(table, SMALL), "suspect_leak")
    assert (finding.severity, finding.column) == ("error", "income")
    assert "AUC 1.000, above 0.95: was it known beforehand?" in finding.message
    assert "take it out of the federation's schema" in finding.mend
    report = check_table(table, SMALL, acknowledged=frozenset({"income"}))
    assert only(report, "suspect_leak").severity == "warning"
    assert report.can_take_part


def test_with_few_bad_loans_no_leak_is_claimed():
    report = check_table(small_table(25), SMALL)
    assert only(report, "leak_not_checked").severity == "note"
    assert report.columns[0].single_auc is None


@pytest.mark.parametrize(
    ("name", "leaking"),
    [
        ("taiwan_default", set()),
        ("south_german_credit", set()),
        ("sba_small_business_ca", {"Term"}),
        ("hmda_boston_denial", set()),
        ("credit_data_spain", set()),
    ],
)
def test_of_the_real_tables_columns_only_the_sba_term_is_suspected(name, leaking):
    folder = os.environ.get("FEDFIN_DATA_DIR") or Path(__file__).parents[1] / "../shared/data"
    path = Path(folder) / f"{name}.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in FEDFIN_DATA_DIR")
    table = pd.read_csv(path)
    labels = table.pop("target").to_numpy()
    aucs = {}
    for column in table.columns:
        numeric = pd.api.types.is_numeric_dtype(table[column])
        aucs[column] = single_column_auc(table[column].to_numpy(dtype=float if numeric else object), labels)
    assert {column for column, auc in aucs.items() if auc > LEAK_AUC} == leaking
    assert max(auc for column, auc in aucs.items() if column not in leaking) < 0.8


# Drift


def test_a_table_does_not_drift_from_its_own_reference(loans):
    reference = Reference.from_histogram(histogram(loans.frame, SCHEMA), SCHEMA)
    report = check_source(SOURCE, SCHEMA, FOLDER, reference=reference)
    assert "drift" not in {finding.rule for finding in report.findings}
    of = {column.name: column.psi for column in report.columns}
    assert max(of[column.name] for column in SCHEMA.features) < 1e-6
    assert of["Age"] is None  # protected: no input of the model


def test_a_wrong_unit_is_a_warning_and_the_other_columns_are_left_alone(raw, loans):
    reference = Reference.from_histogram(histogram(loans.frame, SCHEMA), SCHEMA)
    pesetas = raw.replace("", None).assign(Income=lambda t: t["Income"].astype(float) / 12)
    drifts = [f for f in check_table(pesetas, SCHEMA, reference=reference).findings if f.rule == "drift"]
    assert [(finding.column, finding.severity) for finding in drifts] == [("Income", "warning")]
    assert drifts[0].message.startswith("differs from the federation's loans: population stability index ")
    assert "check the column's unit, currency and period" in drifts[0].mend


def test_a_small_lender_differs_by_chance_and_is_not_blamed_for_it(raw, loans):
    reference = Reference.from_histogram(histogram(loans.frame, SCHEMA), SCHEMA)
    rng = np.random.default_rng(3)
    blamed = 0
    for _ in range(20):
        sample = raw.replace("", None).iloc[rng.choice(len(raw), 90, replace=False)].reset_index(drop=True)
        blamed += sum(f.rule == "drift" for f in check_table(sample, SCHEMA, reference=reference).findings)
    assert blamed <= 5  # of 220 columns, at one in a hundred


def test_drift_survives_a_missing_column(raw, loans):
    reference = Reference.from_histogram(histogram(loans.frame, SCHEMA), SCHEMA)
    report = check_table(raw.replace("", None).drop(columns=["Income", "Home"]), SCHEMA, reference=reference)
    assert {column.name for column in report.columns if column.psi is None} == {
        "Income",
        "Home",
        "Age",
        "Marital",
    }


def test_psi_is_that_of_the_definition():
    word = SMALL.columns[1]
    index, num_bins = psi(np.array([300_000, 600_000, 100_000]), np.array([0.5, 0.3, 0.2]), word)
    assert num_bins == 3
    actual, expected = np.array([0.3, 0.6, 0.1]), np.array([0.5, 0.3, 0.2])
    assert_allclose(index, np.sum((actual - expected) * np.log(actual / expected)), rtol=1e-4)


@given(
    st.lists(st.integers(0, 50), min_size=12, max_size=12),
    st.lists(st.integers(0, 50), min_size=12, max_size=12),
)
def test_psi_is_finite_and_never_negative(mine, theirs):
    column = NumericColumn(name="x", minimum=0, maximum=1, grid_cells=10, special_codes={-1: "none"})
    counts, others = np.array(mine) + np.eye(12, dtype=int)[0], np.array(theirs) + np.eye(12, dtype=int)[1]
    index, num_bins = psi(counts, others / others.sum(), column)
    assert 0 <= index < 100
    assert 1 <= num_bins <= 12


def test_chance_is_the_quantile_of_chi_squared():
    # 0.99 quantiles of chi-squared with 1, 9 and 12 degrees of freedom, from a table
    for num_bins, quantile in ((2, 6.635), (10, 21.666), (13, 26.217)):
        assert_allclose(chance_psi(1000, num_bins), quantile / 1000, rtol=0.02)


def test_the_reference_survives_json_and_counts_noise_below_zero_as_none():
    counts = np.full(histogram_size(SMALL), 10.0)
    counts[0] = -3.0
    reference = Reference.from_histogram(counts, SMALL)
    assert Reference.from_json(reference.to_json(), SMALL) == reference
    assert reference.of("income")[0] == 0.0
    for column in SMALL.features:
        assert reference.of(column.name).shape == (num_cells(column),)
        assert_allclose(reference.of(column.name).sum(), 1.0)


def test_a_reference_that_does_not_fit_is_refused():
    counts = np.ones(histogram_size(SMALL))
    reference = Reference.from_histogram(counts, SMALL)
    with pytest.raises(
        SchemaMismatchError, match="is of another schema; ask the coordinator for the one of this"
    ):
        Reference.from_json(reference.to_json(), SCHEMA)
    with pytest.raises(SchemaMismatchError, match=r"the reference cannot be read .*; ask for it again"):
        Reference.from_json("{}", SMALL)
    with pytest.raises(SchemaMismatchError, match="finite cells; take both from one job"):
        Reference.from_histogram(counts[:-1], SMALL)
    with pytest.raises(
        DataError, match="the histogram of income counts no loans; take the reference of another job"
    ):
        Reference.from_histogram(0 * counts, SMALL)

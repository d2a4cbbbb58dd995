"""A loan is known again by its number, whatever became of its row, and numbers that are none are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from lenders import JOB, PLAN, lender_folder, open_lender, proposal
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.client.checking import check_folder
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.config import DataSource
from fedfin.credit.loan_ids import canonical_id
from fedfin.credit.schema import Schema
from fedfin.credit.source import read_loans
from fedfin.errors import ConfigError, DataError
from fedfin.plan import PrivacyPlan
from fedfin.update import Accepted, Finish, Refused, decode, encode

# A job that takes what the default limit of epsilon 3 admits.
WHOLE = PLAN.model_copy(update={"privacy": PrivacyPlan(epsilon=3.0)})
SCHEMA = Schema.from_yaml(
    """
label: {name: bad, bad: "1", good: "0", definition: 90 days past due}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 1000}
""",
    "schema.yaml",
)


@pytest.fixture
def bank(tmp_path):
    """A lender whose table has a column of numbers that bank.yaml does not name yet."""
    bank = lender_folder(tmp_path / "north-bank")
    table = read_table(bank)
    write_table(bank, table.assign(contract=[f"{number:05d}" for number in range(len(table))]))
    return bank


def read_table(bank):
    return pd.read_csv(bank.parent / "loans.csv", dtype=str, keep_default_na=False)


def write_table(bank, table):
    table.to_csv(bank.parent / "loans.csv", index=False)


def configure(bank, **data):
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump({**config, "data": {**config["data"], **data}}))


def snapshot(bank):
    return prepare(LenderFolder(bank)).snapshot


def num_shared(first, second):
    def rows(snapshot):
        return {snapshot.rows[start : start + 16] for start in range(0, len(snapshot.rows), 16)}

    return len(rows(first) & rows(second))


def spend_all(bank):
    """Run a job's histogram of the whole budget, and end the job after it reserved everything."""
    lender = open_lender(bank)
    decode(lender.answer(proposal(WHOLE)), Accepted)
    lender.close()


def answer_to_the_next_job(bank):
    lender = open_lender(bank)
    try:
        return lender.answer(proposal(WHOLE, job="credit-5678"))
    finally:
        lender.close()


# What the budget makes of a table that changed


def test_without_numbers_an_edited_row_is_a_new_loan(bank):
    before = snapshot(bank)
    table = read_table(bank)
    table["Amount"] = [str(int(amount) + 1) for amount in table["Amount"]]
    write_table(bank, table)
    assert num_shared(before, snapshot(bank)) == 0


def test_with_numbers_an_edited_row_is_the_loan_it_was(bank):
    configure(bank, loan_id="contract")
    spend_all(bank)
    before = prepare(LenderFolder(bank))
    table = read_table(bank)
    table["Amount"] = [str(int(amount) + 1) for amount in table["Amount"]]
    write_table(bank, table)
    after = prepare(LenderFolder(bank))
    assert after.snapshot.digest != before.snapshot.digest
    assert after.snapshot.rows == before.snapshot.rows
    # and it stays on its side of the held-out split
    assert list(after.holdout.loan_ids) == list(before.holdout.loan_ids)
    assert "budget" in decode(answer_to_the_next_job(bank), Refused).reason


def test_the_same_table_under_another_name_order_and_format_is_the_same_snapshot(bank):
    configure(bank, loan_id="contract")
    before = snapshot(bank)
    table = read_table(bank)
    # numbers that a Parquet file holds as integers, and a CSV file with leading zeros
    table["contract"] = table["contract"].astype("int64")
    table.iloc[::-1].to_parquet(bank.parent / "moved.parquet")
    configure(bank, path="moved.parquet")
    assert snapshot(bank) == before


@pytest.mark.parametrize("on_first", [True, False])
def test_switching_the_numbers_on_or_off_sets_no_budget_back(bank, on_first):
    configure(bank, loan_id="contract" if on_first else None)
    spend_all(bank)
    configure(bank, loan_id=None if on_first else "contract")
    assert "budget" in decode(answer_to_the_next_job(bank), Refused).reason


def test_another_column_of_numbers_sets_no_budget_back(bank):
    table = read_table(bank)
    write_table(bank, table.assign(serial=range(1000, 1000 + len(table))))
    configure(bank, loan_id="contract")
    spend_all(bank)
    configure(bank, loan_id="serial")
    assert "budget" in decode(answer_to_the_next_job(bank), Refused).reason


def test_new_loans_have_a_budget_of_their_own(bank):
    configure(bank, loan_id="contract")
    spend_all(bank)
    table = read_table(bank)
    write_table(bank, table.assign(contract=[f"new {number}" for number in range(len(table))]))
    decode(answer_to_the_next_job(bank), Accepted)


def test_a_budget_that_was_only_reserved_comes_back_for_all_tables(bank):
    configure(bank, loan_id="contract")
    spend_all(bank)
    lender = open_lender(bank)
    lender.answer(encode(Finish(JOB, "abandoned", 0, "", "", np.zeros(0, np.float32))))
    lender.close()
    write_table(bank, read_table(bank).iloc[:-20])
    decode(answer_to_the_next_job(bank), Accepted)


def test_no_number_of_a_loan_is_kept(bank):
    table = read_table(bank)
    numbers = [f"contract-{number}-of-the-bank" for number in range(len(table))]
    write_table(bank, table.assign(contract=numbers))
    configure(bank, loan_id="contract")
    spend_all(bank)
    for path in bank.parent.rglob("*"):
        if path.is_file() and path.name != "loans.csv":
            assert b"-of-the-bank" not in path.read_bytes()
    loans = prepare(LenderFolder(bank))
    assert "-of-the-bank" not in repr(loans)
    assert "rows=" not in repr(loans.snapshot)


# Numbers that are none


def source(tmp_path, numbers):
    rows = [f"{number},{10 * place},{place % 2}" for place, number in enumerate(numbers)]
    (tmp_path / "loans.csv").write_text("\n".join(["contract,income,bad", *rows]) + "\n")
    return DataSource(path="loans.csv", loan_id="contract")


def test_the_numbers_are_read_and_are_no_feature(tmp_path):
    loans = read_loans(source(tmp_path, ["007", "8", "A9"]), SCHEMA, tmp_path)
    assert list(loans.loan_ids) == ["7", "8", "A9"]
    assert list(loans.frame.columns) == ["income"]
    assert read_loans(DataSource(path="loans.csv"), SCHEMA, tmp_path).loan_ids is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["7", "8", "7.0"], r"row 3 \(line 4\) has the number of an earlier row in contract \(1 such"),
        (["7", "", "NA"], r"row 2 \(line 3\) has no loan number in contract \(2 such rows.*data\.loan_id"),
    ],
)
def test_repeated_and_missing_numbers_are_refused_by_row(tmp_path, numbers, message):
    with pytest.raises(DataError, match=message):
        read_loans(source(tmp_path, numbers), SCHEMA, tmp_path)


def test_a_column_that_is_absent_or_a_feature_is_refused(tmp_path):
    source(tmp_path, ["1", "2"])
    with pytest.raises(DataError, match=r"no column serial, which data\.loan_id names; correct it"):
        read_loans(DataSource(path="loans.csv", loan_id="serial"), SCHEMA, tmp_path)
    for columns in ({}, {"income": "wages"}, {"bad": "income"}):
        with pytest.raises(ConfigError, match="which is a column of the schema"):
            read_loans(DataSource(path="loans.csv", loan_id="income", columns=columns), SCHEMA, tmp_path)


def test_the_check_names_rows_with_faulty_numbers(bank):
    table = read_table(bank)
    table.loc[[3, 5], "contract"] = table.loc[2, "contract"]
    table.loc[9, "contract"] = ""
    write_table(bank, table)
    configure(bank, loan_id="contract")
    report, _ = check_folder(bank)
    found = [(f.severity, f.column, f.rows, f.count) for f in report.findings if f.rule == "loan_id"]
    assert found == [("error", "contract", (10,), 1), ("error", "contract", (4, 6), 2)]
    configure(bank, loan_id="serial")
    (finding,) = (f for f in check_folder(bank)[0].findings if f.rule == "loan_id")
    assert (finding.severity, finding.column) == ("error", "serial")
    assert "no such column" in finding.message


def test_the_check_says_what_a_table_without_numbers_does_to_the_budget(bank):
    def rules():
        shown = CliRunner().invoke(app, ["client", "check", "--config", str(bank), "--json"])
        document = json.loads(shown.output)
        assert document["can_take_part"]
        return {finding["rule"]: finding for finding in document["findings"]}

    note = rules()["no_loan_id"]
    assert note["severity"] == "note"
    assert "edited later" in note["message"]
    assert "data.loan_id" in note["mend"]
    configure(bank, loan_id="contract")
    assert rules().keys() & {"no_loan_id", "extra_column"} == set()


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (7, "7"), ("7", "7"), (7.0, "7"), ("007", "7"), ("7.00", "7"), (" +7 ", "7"), ("0", "0"), ("000", "0"),
        ("A7", "A7"), ("7A", "7A"), ("-7", "-7"), (np.int64(7), "7"),
        ("12345678901234567890123", "12345678901234567890123"),
        (None, ""), (float("nan"), ""), (pd.NA, ""), (pd.NaT, ""), ("", ""),
    ],
)  # fmt: skip
def test_a_number_is_the_same_text_from_every_source(cell, text):
    assert canonical_id(cell) == text

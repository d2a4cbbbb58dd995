"""Nothing that a lender does to its own files gives loans a fresh budget without a word."""

import json
import os
import shutil

import pandas as pd
import pytest
import yaml
from lenders import JOB, PLAN, lender_folder, open_lender, proposal
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.errors import ConfigError, LedgerError, LinkError
from fedfin.plan import PrivacyPlan
from fedfin.update import Accepted, AskHistogram, Refused, decode, encode

# A job that takes what the default limit of epsilon 3 admits.
WHOLE = PLAN.model_copy(update={"privacy": PrivacyPlan(epsilon=3.0)})


@pytest.fixture
def bank(tmp_path):
    """A lender with an open job that holds its whole budget."""
    bank = lender_folder(tmp_path / "north-bank")
    lender = open_lender(bank)
    decode(lender.answer(proposal(WHOLE)), Accepted)
    lender.close()
    return bank


def answer_to_the_next_job(bank):
    lender = open_lender(bank)
    try:
        return lender.answer(proposal(WHOLE, job="credit-5678"))
    finally:
        lender.close()


def configure(bank, **data):
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump({**config, "data": {**config["data"], **data}}))


def edit_table(bank, edit):
    path = bank.parent / "loans.csv"
    edit(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


@pytest.mark.parametrize(
    "reading",
    [
        {"values": {"Home": {"owner": "rent", "rent": "owner"}, "Marital": {"married": "single"}}},
        {"missing": ["", "owner", "rent", "parents", "other", "NA"]},
        {"columns": {"Amount": "Price", "Price": "Amount"}},
    ],
    ids=lambda reading: next(iter(reading)),
)
def test_another_reading_of_the_same_table_sets_no_budget_back(bank, reading):
    """Without numbers a loan is known by its row as it is read, and rows read differently now."""
    before = prepare(LenderFolder(bank)).snapshot
    configure(bank, **reading)
    assert prepare(LenderFolder(bank)).snapshot.digest != before.digest
    assert "budget" in decode(answer_to_the_next_job(bank), Refused).reason


def test_settings_that_read_every_row_as_before_keep_loans_comparable(bank):
    before = prepare(LenderFolder(bank)).snapshot
    edit_table(bank, lambda table: table.iloc[:-40])
    configure(
        bank, columns={"Amount": "Amount"}, missing=["NULL", "null", "NaN", "nan", "N/A", "NA", "", "NA"]
    )
    after = prepare(LenderFolder(bank)).snapshot
    assert after.digest != before.digest
    assert after.scheme == before.scheme


def test_another_salt_sets_no_budget_back(bank):
    (bank.parent / "keys" / "salt.key").write_bytes(os.urandom(32))
    assert "budget" in decode(answer_to_the_next_job(bank), Refused).reason


def test_a_ledger_that_is_gone_is_not_begun_anew(bank):
    (bank.parent / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="gone"):
        open_lender(bank)
    for command in (["client", "status"], ["privacy", "ledger"], ["privacy", "plan", "--no-auc"]):
        result = CliRunner().invoke(app, [*command, "--config", str(bank), "--json"])
        assert result.exit_code == 1, result.output
        assert "gone" in json.loads(result.output)["error"]
    assert not (bank.parent / "ledger.db").exists()


def test_an_old_copy_of_the_ledger_is_not_taken_for_the_ledger(bank, tmp_path):
    copy = tmp_path / "ledger.db"
    other = lender_folder(tmp_path / "south-bank")
    open_lender(other).close()
    shutil.copy(other.parent / "ledger.db", copy)  # as it was before the job
    copy.replace(bank.parent / "ledger.db")
    with pytest.raises(LedgerError, match=f"lacks job {JOB}"):
        open_lender(bank)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"job": "credit-1234"}', b"\xff"])
def test_a_damaged_record_of_a_job_stops_every_command_in_one_paragraph(bank, content):
    (bank.parent / "jobs" / JOB / "job.json").write_bytes(content)
    for command in (["client", "status"], ["privacy", "ledger"], ["client", "release", JOB]):
        result = CliRunner().invoke(app, [*command, "--config", str(bank)])
        assert result.exit_code == 1
        assert "job.json is damaged; restore it" in result.stderr
        assert "bug" not in result.stderr
    with pytest.raises(ConfigError, match="damaged"):
        open_lender(bank)


@pytest.mark.parametrize("job", ["", "..", "a/b", "a\x00b", "a\nb", "\x1b[2J", "-a", "a" * 81, "\uff411"])
def test_a_job_is_named_so_that_it_can_be_a_folder_and_a_line_of_the_log(bank, job):
    lender = open_lender(bank)
    for question in (proposal(job=job), encode(AskHistogram(job))):
        with pytest.raises(LinkError, match="letters, digits and dashes"):
            lender.answer(question)
    lender.close()

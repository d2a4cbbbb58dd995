"""A new job waits for people: it is kept, shown, signed by approvers with keys of their own, and only then accepted."""

import datetime as dt
import json

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lender_log import logged
from lenders import JOB, PLAN, AskedLender, lender_folder, open_lender, proposal, schema
from secure_house import SecureHouse, hurry, job_of
from typer.testing import CliRunner

from fedfin.approver import Subject, load_key, make_key, public_line, sign, verifies
from fedfin.audit.events import Approval, Refusal
from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.job_approval import approve, approvers_of, held_job, held_jobs
from fedfin.errors import ConfigError
from fedfin.identity import key_fingerprint, private_pem
from fedfin.privacy.ledger import Ledger
from fedfin.server import gathering
from fedfin.update import Accepted, AskHistogram, Finish, Refused, decode, encode

ANNA, BEN, EVE = (Ed25519PrivateKey.generate() for _ in range(3))
TWO = {
    "approvers": [
        {"name": name, "key": public_line(key.public_key())} for name, key in (("anna", ANNA), ("ben", BEN))
    ],
    "approvals_needed": 2,
}
OTHER_PLAN = PLAN.model_copy(update={"training": PLAN.training.model_copy(update={"rounds": 2})})


@pytest.fixture
def bank(tmp_path):
    return lender_folder(tmp_path / "bank", **TWO)


@pytest.fixture
def lender(bank):
    opened = open_lender(bank)
    yield opened
    opened.close()


def refused(lender, plan=PLAN, job=JOB):
    return decode(lender.answer(proposal(plan, job)), Refused)


def accepted(lender, plan=PLAN, job=JOB):
    return decode(lender.answer(proposal(plan, job)), Accepted)


def sign_as(bank, name, key, job=JOB):
    folder = LenderFolder(bank)
    return approve(folder, held_job(folder, job), name, key)


def given(bank, plan=PLAN, job=JOB):
    folder = LenderFolder(bank)
    return [one.name for one in approvers_of(folder, job, plan.digest(), schema().fingerprint())]


def test_a_job_waits_until_two_different_approvers_have_signed_it_and_needs_no_restart(bank, lender):
    answer = refused(lender)
    assert (answer.waits, "waits for its approval" in answer.reason) == ("approval", True)
    assert sign_as(bank, "anna", ANNA) == 1
    assert refused(lender).waits == "approval"
    assert sign_as(bank, "ben", BEN) == 2
    assert accepted(lender).weight == 100.0
    approvers = [key_fingerprint(key.public_key()) for key in (ANNA, BEN)]
    assert json.loads((bank.parent / "jobs" / JOB / "job.json").read_text())["approvers"].split() == approvers
    assert {event.approver for event in logged(bank.parent, Approval) if event.subject == "job"} == set(
        approvers
    )
    assert held_jobs(LenderFolder(bank)) == ()


def test_while_it_waits_nothing_is_reserved_and_no_loan_is_read_and_the_log_says_it_once(
    bank, lender, monkeypatch
):
    monkeypatch.setattr("fedfin.client.lender.prepare", lambda _: pytest.fail("read the loans"))
    for _ in range(5):
        refused(lender)
    assert [event.reason for event in logged(bank.parent, Refusal)] == [refused(lender).reason]
    with Ledger(bank.parent / "ledger.db") as ledger:
        assert ledger.entries() == ()


def test_the_same_approver_twice_counts_once(bank, lender):
    refused(lender)
    assert [sign_as(bank, "anna", ANNA) for _ in range(2)] == [1, 1]
    assert refused(lender).waits == "approval"


def test_a_key_that_bank_yaml_does_not_name_for_the_approver_is_refused(bank, lender):
    refused(lender)
    for name, key in (("anna", EVE), ("anna", BEN)):
        with pytest.raises(ConfigError, match=r"is not the one that policy\.approvers .* states for anna"):
            sign_as(bank, name, key)
    with pytest.raises(ConfigError, match=r"eve is no approver: policy\.approvers of .* names anna, ben"):
        sign_as(bank, "eve", EVE)
    assert given(bank) == []


def forge(bank, key, owner, **changes):
    """Write a signature into the folder past the command, in an approver's name."""
    folder = LenderFolder(bank)
    held = held_job(folder, JOB)
    names = {"federation": "test", "lender": "north-bank", "job": JOB, "plan": held.plan.digest()}
    subject = Subject(**{**names, "schema": held.schema, **changes})
    path = bank.parent / "jobs" / JOB / "approvals" / f"{key_fingerprint(owner.public_key())[:32]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"signature": sign(subject, key).hex()}))


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": OTHER_PLAN.digest()},
        {"job": "credit-9999"},
        {"lender": "south-bank"},
        {"federation": "other"},
        {"schema": "0" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_signature_over_anything_else_counts_for_nothing(bank, lender, changes):
    refused(lender)
    forge(bank, ANNA, ANNA)
    assert given(bank) == ["anna"]
    forge(bank, ANNA, ANNA, **changes)
    assert given(bank) == []


def test_a_signature_by_another_key_or_a_damaged_one_counts_for_nothing_and_can_be_given_again(bank, lender):
    refused(lender)
    forge(bank, EVE, ANNA)
    assert given(bank) == []
    next((bank.parent / "jobs" / JOB / "approvals").iterdir()).write_text("{")
    assert given(bank) == []
    assert sign_as(bank, "anna", ANNA) == 1


def test_another_plan_under_the_same_id_needs_its_own_approvals(bank, lender):
    refused(lender)
    sign_as(bank, "anna", ANNA)
    sign_as(bank, "ben", BEN)
    assert refused(lender, OTHER_PLAN).waits == "approval"
    assert given(bank, OTHER_PLAN) == []
    assert held_job(LenderFolder(bank), JOB).plan == OTHER_PLAN


def test_the_plan_that_was_shown_is_signed_and_not_the_one_that_took_its_place_meanwhile(bank, lender):
    refused(lender)
    folder = LenderFolder(bank)
    shown = held_job(folder, JOB)
    refused(lender, OTHER_PLAN)
    assert approve(folder, shown, "anna", ANNA) == 1
    assert (given(bank, PLAN), given(bank, OTHER_PLAN)) == (["anna"], [])


def test_the_same_plan_proposed_as_a_new_job_needs_its_own_approvals(bank, lender):
    refused(lender)
    sign_as(bank, "anna", ANNA)
    sign_as(bank, "ben", BEN)
    accepted(lender)
    assert refused(lender, job="credit-5678").waits == "approval"


def test_before_a_proposal_and_after_its_acceptance_there_is_nothing_to_approve(bank, lender):
    with pytest.raises(ConfigError, match=r"no job credit-1234 waits for approval at north-bank \(none is\)"):
        sign_as(bank, "anna", ANNA)
    refused(lender)
    sign_as(bank, "anna", ANNA)
    sign_as(bank, "ben", BEN)
    accepted(lender)
    with pytest.raises(ConfigError, match="no job credit-1234 waits for approval"):
        sign_as(bank, "anna", ANNA)


def test_a_job_outside_the_policy_is_refused_for_good_and_never_kept_for_approval(bank, lender):
    outside = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"delta": 1e-3})})
    answer = refused(lender, outside)
    assert (answer.waits, "privacy.delta" in answer.reason) == ("", True)
    assert held_jobs(LenderFolder(bank)) == ()


def test_a_job_can_be_approved_in_the_day_that_runs_at_night(tmp_path):
    bank = lender_folder(tmp_path / "bank", hours="22:00-06:00", time_zone="UTC", **TWO)
    now = [dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)]
    lender = AskedLender(LenderFolder(bank), say=lambda _: None, now=lambda: now[0])
    assert refused(lender).waits == "approval"
    sign_as(bank, "anna", ANNA)
    sign_as(bank, "ben", BEN)
    assert refused(lender).waits == "hours"
    now[0] += dt.timedelta(hours=11)
    assert accepted(lender).weight == 100.0
    lender.close()


def test_a_job_that_the_coordinator_gave_up_waits_no_more(bank, lender):
    refused(lender)
    lender.answer(encode(Finish(JOB, "abandoned", 0, "", "", np.zeros(0, np.float32))))
    assert held_jobs(LenderFolder(bank)) == ()


def test_a_coordinator_that_proposes_without_end_fills_no_disk(bank, lender):
    for number in range(25):
        refused(lender, job=f"credit-{number}")
    assert len(held_jobs(LenderFolder(bank))) == 20
    assert held_job(LenderFolder(bank), "credit-24").plan == PLAN


def test_a_policy_that_was_narrowed_since_stops_a_job_that_runs(bank, lender):
    refused(lender)
    sign_as(bank, "anna", ANNA)
    sign_as(bank, "ben", BEN)
    accepted(lender)
    lender.close()
    config = yaml.safe_load(bank.read_text())
    config["policy"]["max_rounds"] = 2
    bank.write_text(yaml.safe_dump(config))
    restarted = open_lender(bank)
    answer = decode(restarted.answer(encode(AskHistogram(JOB))), Refused)
    assert answer.reason == "training.rounds is 3, and this lender accepts 2; lower it"
    restarted.close()


# Keys and signatures


def test_an_approvers_key_is_a_file_of_their_own_that_is_never_replaced(tmp_path):
    path = tmp_path / "anna.key"
    public = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path).public_key() == public
    with pytest.raises(ConfigError, match="exists already"):
        make_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        load_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_key(tmp_path / "none.key")
    (tmp_path / "bad.key").write_text("no key")
    (tmp_path / "bad.key").chmod(0o600)
    with pytest.raises(ConfigError, match="holds no approver's key"):
        load_key(tmp_path / "bad.key")


def test_a_signature_holds_for_one_key_and_one_subject():
    subject = Subject("test", "north-bank", JOB, "a" * 64, "b" * 64)
    signature = sign(subject, ANNA)
    assert verifies(signature, subject, ANNA.public_key())
    assert not verifies(signature, subject, BEN.public_key())
    assert not verifies(signature[:-1] + bytes([signature[-1] ^ 1]), subject, ANNA.public_key())
    assert not verifies(b"", subject, ANNA.public_key())


# Commands


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def key_file(directory, key):
    path = directory / "approver.key"
    path.write_bytes(private_pem(key))
    path.chmod(0o600)
    return path


def test_the_command_makes_a_key_whose_line_bank_yaml_takes(tmp_path):
    made = run("client", "make-approver", "anna", "--key", tmp_path / "anna.key")
    assert made.exit_code == 0
    line = next(line for line in made.output.splitlines() if "{name: anna" in line)
    bank = lender_folder(tmp_path / "bank", approvers=yaml.safe_load(line), approvals_needed=1)
    (approver,) = LenderFolder(bank).config.policy.approvers
    assert approver.key == public_line(load_key(tmp_path / "anna.key").public_key())
    wrong = run("client", "make-approver", "Anna Smith", "--key", tmp_path / "wrong.key")
    assert wrong.exit_code == 1
    assert not (tmp_path / "wrong.key").exists()


def test_the_command_shows_the_job_asks_and_signs(bank, lender, tmp_path):
    refused(lender)
    status = run("client", "status", "--config", bank).output
    assert "credit-1234 waits for approval" in " ".join(status.split())
    command = (
        "client",
        "approve-job",
        JOB,
        "--as",
        "anna",
        "--key",
        key_file(tmp_path, ANNA),
        "--config",
        bank,
    )
    said_no = CliRunner().invoke(app, [str(word) for word in command], input="n\n")
    assert (said_no.exit_code, given(bank)) == (1, [])
    assert "Seniority" in said_no.output
    assert "nothing was approved" in said_no.output
    looked = run(*command, "--json")
    assert (json.loads(looked.output)["approved"], given(bank)) == (False, [])
    done = json.loads(run(*command, "--yes", "--json").output)
    assert (done["approved"], done["approvals"]) == (True, {"given": 1, "needed": 2})
    assert given(bank) == ["anna"]
    wrong = run(
        "client", "approve-job", JOB, "--as", "ben", "--key", tmp_path / "approver.key", "--config", bank
    )
    assert wrong.exit_code == 1
    assert "states for ben" in " ".join(wrong.output.split())


# The coordinator


@pytest.fixture
def house(tmp_path, monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setattr(gathering, "ASK_AGAIN_S", {"approval": 0.001, "hours": 0.001})
    made = SecureHouse(tmp_path)
    bank = made.banks["bank-c"]
    config = yaml.safe_load(bank.read_text())
    config["policy"] |= {**TWO, "approvals_needed": 1}
    bank.write_text(yaml.safe_dump(config))
    made.restart("bank-c")
    yield made
    made.close()


def approving(house, when):
    """Let an approver of bank-c sign as soon as the coordinator says `when`."""
    before, folder = house.say, LenderFolder(house.banks["bank-c"])

    def say(event):
        before(event)
        if event["event"] == when and (held := held_jobs(folder)):
            approve(folder, held[0], "anna", ANNA)

    house.say = say


def test_the_coordinator_proposes_again_to_a_lender_that_waits_and_it_joins_without_a_restart(house):
    approving(house, "held")
    plan = job_of(rounds=2, cohort={"min_lenders": 4, "start_timeout_s": 30.0})
    house.run(plan)
    assert [line["lender"] for line in house.said("held")] == ["bank-c"]
    assert "waits for its approval" in house.said("held")[0]["reason"]
    assert house.said("refused") == []
    assert all("bank-c" in cohort for cohort in house.cohorts().values())


def test_a_job_starts_without_a_lender_that_waits_and_takes_it_in_once_it_is_approved(house):
    approving(house, "round_done")
    house.run(job_of(rounds=4))
    joined = [number for number, cohort in sorted(house.cohorts().items()) if "bank-c" in cohort]
    assert 1 not in house.cohorts() or "bank-c" not in house.cohorts()[1]
    assert joined[-1] == 4
    assert house.said("refused") == []


def test_a_lender_whose_hours_end_is_left_out_of_rounds_and_comes_back_in_the_same_job(house):
    approving(house, "held")
    bank = house.banks["bank-d"]
    config = yaml.safe_load(bank.read_text())
    config["policy"] |= {"hours": "22:00-06:00", "time_zone": "UTC"}
    bank.write_text(yaml.safe_dump(config))
    now = [dt.datetime(2026, 11, 24, 23, tzinfo=dt.UTC)]
    house.lenders["bank-d"].close()
    house.lenders["bank-d"] = AskedLender(LenderFolder(bank), say=lambda _: None, now=lambda: now[0])
    before = house.say

    def say(event):
        before(event)
        if event["event"] == "round_done" and event["round"] in {1, 4}:
            now[0] += dt.timedelta(hours=12)  # to 11:00, and to 23:00 again

    house.say = say
    house.run(job_of(rounds=7, cohort={"min_lenders": 4, "start_timeout_s": 30.0}))
    present = {number: "bank-d" in cohort for number, cohort in house.cohorts().items()}
    assert (present[1], present[3], present[4], present[7]) == (True, False, False, True)
    assert "policy.hours" in next(line["reason"] for line in house.said("held") if line["lender"] == "bank-d")
    assert house.said("refused") == []

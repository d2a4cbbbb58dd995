"""How a lender answers: within its policy, from its own budget, and once."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import rosters
import yaml
from lender_log import logged
from lenders import JOB, PLAN, AskedLender, lender_folder, open_lender, proposal, schema, train_request
from secure_lenders import chain_of
from typer.testing import CliRunner

from fedfin.audit.events import Budget, Refusal
from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.errors import AuditError, ConfigError, DataError, LedgerError, LinkError
from fedfin.plan import ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy.ledger import Ledger
from fedfin.update import (
    Accepted,
    AskHistogram,
    Done,
    Finish,
    Histogram,
    Propose,
    Refused,
    Train,
    Update,
    decode,
    encode,
)

BINS = encode(AskHistogram(JOB))


@pytest.fixture
def bank(tmp_path):
    return lender_folder(tmp_path / "north-bank")


def commits(bank):
    with Ledger(bank.parent / "ledger.db") as ledger:
        return [entry.stage for entry in ledger.entries() if entry.kind == "commit"]


def refusal(lender, question):
    return decode(lender.answer(question), Refused).reason


def plan(**changes):
    return PLAN.model_copy(update=changes)


def test_a_job_is_accepted_counted_and_trained(bank):
    lender = open_lender(bank)
    accepted = decode(lender.answer(proposal()), Accepted)
    assert accepted.weight == 100.0  # about 70% of 178 loans, rounded down to the bucket of 50
    histogram = lender.answer(BINS)
    update = decode(lender.answer(train_request(histogram, 1)), Update)
    assert update.round == 1
    assert np.linalg.norm(update.delta) > 0
    assert commits(bank) == ["bins", "round 1"]


def test_a_repeated_question_gets_the_same_bytes_and_costs_nothing(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    update = lender.answer(train_request(histogram, 1))
    lender.close()
    restarted = open_lender(bank)
    assert restarted.answer(proposal()) == open_answer(bank)
    assert restarted.answer(BINS) == histogram
    assert restarted.answer(train_request(histogram, 1)) == update
    assert commits(bank) == ["bins", "round 1"]


def open_answer(bank):
    accepted = json.loads((bank.parent / "jobs" / JOB / "job.json").read_text())
    return encode(Accepted(JOB, accepted["weight"]))


def test_the_same_round_for_another_model_is_refused(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    lender.answer(train_request(histogram, 1))
    assert "another model" in refusal(lender, train_request(histogram, 1, shift=0.5))
    assert commits(bank) == ["bins", "round 1"]


@pytest.mark.parametrize(
    "dies", ["before the answer is kept", "before it is logged", "before it is charged", "before it is sent"]
)
def test_killed_at_any_step_a_stage_is_charged_once_for_what_left(bank, monkeypatch, dies):
    """Whatever leaves was charged, once; whatever did not leave was made anew."""

    class Killed(BaseException):
        pass

    def die(*_args, **_kwargs):
        raise Killed

    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    question = train_request(histogram, 1)
    with monkeypatch.context() as patch:
        if dies == "before the answer is kept":
            patch.setattr("fedfin.client.folder.JobFolder.keep_answer", die)
        elif dies == "before it is logged":
            patch.setattr("fedfin.client.journal.Journal.flush", die)
        elif dies == "before it is charged":
            patch.setattr("fedfin.privacy.ledger.Ledger.commit", die)
        else:
            patch.setattr("fedfin.client.witnessing.Witness.attach", die)
        with pytest.raises(Killed):
            lender.answer(question)
    lender.close()
    kept = bank.parent / "jobs" / JOB / "outbox" / "round-1.bin"
    unsent = kept.read_bytes()[32:] if kept.exists() else None
    restarted = open_lender(bank)
    answer = restarted.answer(question)
    assert commits(bank) == ["bins", "round 1"]
    # charged before the kill: these very bytes may have left; not charged: they did not, and are made anew
    assert (answer == unsent) == (dies == "before it is sent")


def test_nothing_is_spent_that_the_log_does_not_say(bank, monkeypatch):
    def full(*_):
        raise AuditError("the disk is full")

    lender = open_lender(bank)
    lender.answer(proposal())
    with monkeypatch.context() as patch:
        patch.setattr("fedfin.audit.log.AuditLog.append_many", full)
        with pytest.raises(AuditError):
            lender.answer(BINS)
    assert commits(bank) == []
    lender.answer(BINS)
    assert commits(bank) == ["bins"]
    said = [event.stage for event in logged(bank.parent, Budget) if event.action == "commit"]
    assert set(said) == {"bins"}


def test_an_answer_that_was_charged_and_lost_is_not_made_twice(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    lender.answer(BINS)
    (bank.parent / "jobs" / JOB / "outbox" / "bins.bin").unlink()
    assert "ledger" in refusal(lender, BINS)
    assert commits(bank) == ["bins"]


def test_two_histograms_of_two_lenders_with_the_same_loans_differ_by_their_noise(tmp_path):
    answers = []
    for name in ("one", "two"):
        lender = open_lender(lender_folder(tmp_path / name))
        lender.answer(proposal())
        answers.append(decode(lender.answer(BINS), Histogram).counts)
    assert not np.array_equal(*answers)
    assert not np.array_equal(answers[0], np.round(answers[0]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"privacy": PrivacyPlan(mode="none")}, "allow_no_privacy"),
        ({"privacy": PrivacyPlan(epsilon=50.0)}, "budget"),
        ({"privacy": PrivacyPlan(delta=1e-3)}, "privacy.delta"),
        ({"training": TrainingPlan(rounds=5000)}, "training.rounds"),
        ({"training": TrainingPlan(local_steps=5000)}, "training.local_steps"),
        ({"training": TrainingPlan(weight_bucket=1)}, "training.weight_bucket"),
    ],
)
def test_a_plan_outside_the_policy_is_refused_and_logged_and_reserves_nothing(bank, change, word):
    lender = open_lender(bank)
    assert word in refusal(lender, proposal(plan(**change)))
    assert isinstance(logged(bank.parent)[-1], Refusal)
    assert not (bank.parent / "jobs" / JOB).exists()
    with Ledger(bank.parent / "ledger.db") as ledger:
        assert ledger.entries() == ()


def test_a_model_larger_than_the_policy_allows_is_refused(tmp_path):
    bank = lender_folder(tmp_path / "bank", max_parameters=10)
    lender = open_lender(bank)
    assert "the plan's model has up to" in refusal(lender, proposal())


def test_crafted_weights_are_refused_without_looking_at_a_loan_and_cost_nothing(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    assert "beyond" in refusal(lender, train_request(histogram, 1, shift=3e38))
    assert commits(bank) == ["bins"]


def test_work_that_fails_is_charged_like_work_that_succeeds_and_not_done_again(bank, monkeypatch):
    """A failure that cost nothing could be asked for again and again, and would tell what no noise covers."""
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    question = train_request(histogram, 1)

    def fails(*_args, **_kwargs):
        raise FloatingPointError("row 17")

    with monkeypatch.context() as patch:
        patch.setattr("fedfin.client.stages.train_locally", fails)
        first = lender.answer(question)
    assert "row 17" not in decode(first, Refused).reason
    assert commits(bank) == ["bins", "round 1"]
    assert lender.answer(question) == first
    assert "another model" in refusal(lender, train_request(histogram, 1, shift=0.5))


def test_what_was_not_accepted_is_not_answered(bank):
    lender = open_lender(bank)
    assert "did not accept" in refusal(lender, BINS)


def test_what_is_answered_or_fails_is_said_in_the_lenders_terminal(bank, monkeypatch):
    said = []
    lender = AskedLender(LenderFolder(bank), said.append)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    assert said[-1] == f"job {JOB}: bins answered"

    def fails(*_args, **_kwargs):
        raise FloatingPointError("row 17")

    monkeypatch.setattr("fedfin.client.stages.train_locally", fails)
    lender.answer(train_request(histogram, 1))
    assert said[-2] == f"job {JOB}: round 1 failed, and is charged all the same: row 17"


def test_a_plan_that_contradicts_itself_is_refused_with_what_is_wrong(bank):
    document = {**PLAN.model_dump(mode="json"), "privacy": {"mode": "shared"}}
    text = json.dumps({**document, "training": {"local_steps": 1}})
    reason = refusal(open_lender(bank), encode(Propose(JOB, text, schema().fingerprint())))
    assert "privacy.mode is shared and aggregation is plain" in reason
    assert commits(bank) == []


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"rounds": 3}', "[" * 100_000])
def test_a_plan_that_does_not_parse_is_refused(bank, text):
    reason = refusal(open_lender(bank), encode(Propose(JOB, text, schema().fingerprint())))
    assert "the proposed plan does not" in reason
    assert "same release" in reason


def test_a_plain_job_may_come_with_a_roster_that_holds(bank):
    """In clear nothing rests on it; it is held to all the same."""
    chain = chain_of({"north-bank": bank})
    about = (JOB, PLAN.model_dump_json(), schema().fingerprint())
    lender = open_lender(bank)
    assert "does not parse" in refusal(lender, encode(Propose(*about, "{}")))
    stranger = rosters.founded(("south-bank",))
    assert refusal(lender, encode(Propose(*about, stranger.to_json()))).startswith("membership: ")
    assert decode(lender.answer(encode(Propose(*about, chain.to_json()))), Accepted)
    assert decode(lender.answer(encode(Propose(*about))), Accepted)  # the same job, as it was asked before


def test_another_plan_under_an_accepted_job_is_refused(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    assert "another plan" in refusal(lender, proposal(plan(training=TrainingPlan(rounds=2))))


def test_another_schema_is_refused_before_anything_is_read_or_charged(bank):
    lender = open_lender(bank)
    assert "schema" in refusal(lender, encode(Propose(JOB, PLAN.model_dump_json(), "0" * 64)))
    assert commits(bank) == []


def test_a_model_of_another_architecture_is_refused_before_training(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    other = train_request(histogram, 1, plan(model=ModelPlan(kind="mlp", hidden=(8,))))
    assert "fingerprint" in refusal(lender, other).lower() or "architecture" in refusal(lender, other)
    assert commits(bank) == ["bins"]


def test_rounds_beyond_the_plan_are_refused(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    assert "not one of the plan" in refusal(lender, train_request(histogram, 4))


def test_loans_that_changed_within_a_job_stop_it(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    lender.close()
    lines = (bank.parent / "loans.csv").read_text().splitlines()
    (bank.parent / "loans.csv").write_text("\n".join(lines[:-40]) + "\n")
    restarted = open_lender(bank)
    assert "loans changed" in refusal(restarted, BINS)
    assert commits(bank) == []


def test_the_reason_that_reaches_the_coordinator_says_nothing_of_the_loans(bank):
    lender = open_lender(bank)
    reason = refusal(lender, proposal(plan(privacy=PrivacyPlan(epsilon=50.0))))
    assert not any(character.isdigit() for character in reason)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"status": "done"}, "cannot end as 'done'"),
        ({"rounds": 4}, "4 rounds"),
        ({"rounds": -1}, "-1 rounds"),
    ],
)
def test_an_end_that_is_none_of_the_plan_ends_no_job(bank, changes, why):
    lender = open_lender(bank)
    lender.answer(proposal())
    question = decode(train_request(lender.answer(BINS), 1), Train)
    finish = Finish(JOB, "completed", 3, question.bins, question.fingerprint, question.weights)
    assert why in refusal(lender, encode(replace(finish, **changes)))
    assert list((bank.parent / "models").glob("*/model.json")) == []
    decode(lender.answer(encode(finish)), Done)


def test_the_end_of_a_job_keeps_the_model_and_frees_what_was_not_spent(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    question = decode(train_request(histogram, 1), Train)
    finish = Finish(JOB, "completed", 3, question.bins, question.fingerprint, question.weights)
    decode(lender.answer(encode(finish)), Done)
    assert len(list((bank.parent / "models").glob("*/model.json"))) == 1
    with Ledger(bank.parent / "ledger.db") as ledger:
        (snapshot,) = ledger.snapshots()
        assert ledger.reserved(snapshot, 1e-5).epsilon_rdp == 0.0
        assert ledger.spent(snapshot, 1e-5).epsilon_rdp > 0.0
    assert lender.evaluate_pending() == 1
    assert lender.evaluate_pending() == 0
    # the second job is refused or accepted by what is left, never by what was reserved and freed
    decode(lender.answer(proposal(job="credit-5678")), Accepted)


def test_a_finished_job_takes_no_second_model_and_a_bad_one_keeps_no_other_from_being_judged(bank):
    lender = open_lender(bank)
    for job in (JOB, "credit-5678"):
        lender.answer(proposal(plan(privacy=PrivacyPlan(epsilon=0.5)), job=job))
        histogram = lender.answer(encode(AskHistogram(job)))
        asked = decode(train_request(histogram, 1, job=job), Train)
        for shift in (0.0, 1.0):
            weights = asked.weights + np.float32(shift)
            lender.answer(encode(Finish(job, "completed", 3, asked.bins, asked.fingerprint, weights)))
    models = sorted((bank.parent / "models").glob("*/model.json"))
    assert len(models) == 2
    (models[0].parent / "model.safetensors").write_bytes(b"damaged")
    assert lender.evaluate_pending() == 2
    results = [json.loads((model.parent / "evaluation.json").read_text()) for model in models]
    assert "error" in results[0]
    assert "arms" in results[1]
    assert lender.evaluate_pending() == 0


def test_a_reference_that_does_not_fit_is_refused_and_a_damaged_one_keeps_nobody_out(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    asked = decode(train_request(histogram, 1), Train)
    reference = json.dumps(
        {"schema_fingerprint": schema().fingerprint(), "num_loans": 1.0, "noise_stddev": 0.0, "columns": []}
    )
    finish = Finish(JOB, "completed", 3, asked.bins, asked.fingerprint, asked.weights, reference)
    assert "reference" in refusal(lender, encode(finish))
    lender.close()
    (bank.parent / "reference.json").write_text("{}")
    open_lender(bank).close()


def test_an_abandoned_job_frees_its_budget(bank):
    lender = open_lender(bank)
    lender.answer(proposal())
    decode(lender.answer(encode(Finish(JOB, "abandoned", 0, "", "", np.zeros(0, np.float32)))), Done)
    decode(lender.answer(proposal(job="credit-5678")), Accepted)


@pytest.mark.parametrize("job", ["../../etc", "a/b", ".hidden", "x" * 200])
def test_a_job_cannot_name_a_path(bank, job):
    lender = open_lender(bank)
    with pytest.raises(LinkError, match="job"):
        lender.answer(proposal(job=job))


def test_a_lender_with_one_outcome_does_not_start(bank):
    header, *rows = (bank.parent / "loans.csv").read_text().splitlines()
    good = [row for row in rows if row.endswith(",0")]
    (bank.parent / "loans.csv").write_text("\n".join([header, *good]) + "\n")
    with pytest.raises(DataError, match="bad"):
        open_lender(bank)


def test_the_held_out_loans_stay_the_same_when_the_table_is_reordered(bank):
    lender = open_lender(bank)
    before = (lender.loans.snapshot, sorted(lender.loans.holdout.frame["Price"]))
    lender.close()
    header, *rows = (bank.parent / "loans.csv").read_text().splitlines()
    (bank.parent / "loans.csv").write_text("\n".join([header, *reversed(rows)]) + "\n")
    again = open_lender(bank)
    assert (again.loans.snapshot, sorted(again.loans.holdout.frame["Price"])) == before


def test_a_lost_salt_stops_a_lender_that_has_a_ledger(bank):
    open_lender(bank).answer(proposal())
    (bank.parent / "keys" / "salt.key").unlink()
    with pytest.raises(LedgerError, match="backup"):
        open_lender(bank)


def test_a_damaged_ledger_stops_the_lender(bank):
    (bank.parent / "ledger.db").write_bytes(b"garbage" * 1000)
    (bank.parent / "ledger.db").chmod(0o600)
    with pytest.raises(LedgerError):
        open_lender(bank)


def test_the_schema_of_the_folder_is_the_one_that_counts(bank):
    assert open_lender(bank).loans.schema.fingerprint() == schema().fingerprint()


def test_a_job_released_by_hand_frees_its_budget_and_is_over_for_good(bank):
    from fedfin.client.status import release_job, status_of

    lender = open_lender(bank)
    lender.answer(proposal())
    histogram = lender.answer(BINS)
    lender.close()
    release_job(bank, JOB)
    document = status_of(bank)
    assert document["jobs"] == [{"job": JOB, "mode": "local", "open": False}]
    assert document["snapshots"][0]["reserved_rdp"] == 0.0
    restarted = open_lender(bank)
    for question in (proposal(), BINS, train_request(histogram, 1)):
        assert "is over" in refusal(restarted, question)
    assert commits(bank) == ["bins"]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"policy": {"epsilon_limt": 3.0}}, r"policy\.epsilon_limt is not a key of this release"),
        ({"policy": {"epsilon_limit": -1}}, r"policy\.epsilon_limit is -1"),
        (
            {"policy": {"max_delta": 0.5, "min_cohort": 2}},
            r"policy\.max_delta is 0\.5.*policy\.min_cohort is 2",
        ),
        ({"holdout": {"fraction": 1.5}}, r"holdout\.fraction is 1\.5"),
    ],
)
def test_the_status_names_a_wrong_key_and_shows_what_does_not_depend_on_it(bank, section, named):
    from fedfin.client.status import status_of

    lender = open_lender(bank)
    lender.answer(proposal())
    lender.answer(BINS)
    lender.close()
    before = status_of(bank)
    assert before["config_error"] == ""
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump(config | section))
    after = status_of(bank)
    assert re.search(named, after["config_error"])
    # never a limit that is not the one the engineer meant
    assert (after["epsilon_limit"], after["snapshots"][0]["filter"]) == (None, None)
    for key in ("jobs", "models", "roster", "name"):
        assert after[key] == before[key]
    assert after["snapshots"][0]["epsilon_rdp"] == before["snapshots"][0]["epsilon_rdp"] > 0.0
    shown = CliRunner().invoke(app, ["client", "status", "--config", str(bank)], env={"COLUMNS": "400"})
    assert shown.exit_code == 1
    assert re.search(named, shown.output)
    assert JOB in shown.output
    assert "admits nothing" not in shown.output
    asked = CliRunner().invoke(app, ["client", "status", "--config", str(bank), "--json"])
    assert asked.exit_code == 1
    assert json.loads(asked.stdout)["config_error"] == after["config_error"]
    with pytest.raises(ConfigError, match=named):  # but it takes no part
        open_lender(bank)


def test_the_status_of_a_file_without_a_name_or_loans_shows_nothing(bank):
    from fedfin.client.status import status_of

    bank.write_text(yaml.safe_dump({**yaml.safe_load(bank.read_text()), "data": {}, "policy": {"x": 1}}))
    with pytest.raises(ConfigError, match=r"give exactly one of path and url.*policy\.x is not a key"):
        status_of(bank)


def test_the_status_shows_every_figure_with_its_delta_and_relation(bank):
    from fedfin.client.status import status_of

    lender = open_lender(bank)
    lender.answer(proposal())
    lender.answer(BINS)
    lender.close()
    (shown,) = status_of(bank)["snapshots"]
    assert (shown["delta"], shown["relation"]) == (1e-5, "add_or_remove_one")
    assert 0.0 < shown["epsilon_pld"] < shown["epsilon_rdp"] < shown["together_rdp"] <= 2.0
    assert shown["epsilon_pld"] < shown["together_pld"] < shown["together_rdp"]
    one, two, three = shown["borrower_pld"]
    assert one == shown["epsilon_pld"] < two < three
    limit = shown["filter"]
    assert (
        0.0
        < limit["share_spent"]
        < limit["share_reserved"]
        < limit["share_spent"] + limit["share_reserved"]
        < 1.0
    )
    assert (limit["delta"], limit["others"]) == (1e-5, [])
    printed = (
        CliRunner().invoke(app, ["client", "status", "--config", str(bank)], env={"COLUMNS": "400"}).output
    )
    words = " ".join(printed.split())
    assert (
        f"{limit['share_spent']:.1%} of the limit is spent and {limit['share_reserved']:.1%} reserved"
        in words
    )
    assert f"Renyi filter of order {limit['order']:g} at delta 1e-05" in words
    assert f"epsilon {shown['epsilon_pld']:.3f} by PLD ({shown['epsilon_rdp']:.3f} by RDP)" in words
    assert "for one loan added or removed" in words
    assert f"at 2 | 3 lenders: {two:.3f} | {three:.3f}" in words


def test_a_limit_that_admits_nothing_is_shown_as_such(bank):
    from fedfin.client.status import status_of

    lender = open_lender(bank)
    lender.answer(proposal())
    lender.close()
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump({**config, "policy": {"epsilon_limit": 0.001}}))
    limit = status_of(bank)["snapshots"][0]["filter"]
    assert not limit["fits"]
    assert f"Renyi order {limit['order']:g} since their first job" in limit["why_nothing"]
    printed = (
        CliRunner().invoke(app, ["client", "status", "--config", str(bank)], env={"COLUMNS": "400"}).output
    )
    assert limit["why_nothing"] in printed


def test_looking_at_a_fresh_lender_makes_no_ledger(bank):
    from fedfin.client.status import status_of

    assert status_of(bank)["snapshots"] == []
    assert not (bank.parent / "ledger.db").exists()
    open_lender(bank).close()


def test_only_accepted_jobs_are_released(bank):
    from fedfin.client.status import release_job
    from fedfin.errors import ConfigError

    with pytest.raises(ConfigError, match="status"):
        release_job(bank, "credit-0000")


def test_a_model_that_comes_after_a_release_by_hand_is_still_kept(bank):
    from fedfin.client.status import release_job

    lender = open_lender(bank)
    lender.answer(proposal())
    asked = decode(train_request(lender.answer(BINS), 1), Train)
    lender.close()
    release_job(bank, JOB)
    restarted = open_lender(bank)
    finish = Finish(JOB, "completed", 3, asked.bins, asked.fingerprint, asked.weights)
    decode(restarted.answer(encode(finish)), Done)
    assert len(list((bank.parent / "models").glob("*/model.json"))) == 1

"""What a lender is told of its privacy budget: before a job (`plan`) and afterwards (`ledger`)."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import yaml
from lenders import JOB, PLAN, lender_folder, open_lender, proposal, train_request
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.client.spending import choose
from fedfin.credit.metrics import auroc
from fedfin.errors import ConfigError
from fedfin.plan import CohortPlan, JobPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy.accounting import (
    GaussianEvent,
    borrower_epsilon,
    calibrate,
    epsilon_pld,
    epsilon_rdp,
    job_events,
)
from fedfin.privacy.ledger import Ledger
from fedfin.simulation.arms import federate
from fedfin.update import Accepted, AskHistogram, Refused, decode, encode

QUICK = ("--rounds", 3, "--local-steps", 2)


def fedfin(*arguments):
    return CliRunner().invoke(app, ["privacy", *map(str, arguments)], env={"COLUMNS": "160"})


def document(*arguments, exit_code=0):
    done = fedfin(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_job(bank, *, job=JOB, rounds=2, plan=PLAN):
    """Accept a job, send the histogram and some rounds, and leave the job open."""
    lender = open_lender(bank)
    decode(lender.answer(proposal(plan, job=job)), Accepted)
    histogram = lender.answer(encode(AskHistogram(job)))
    for number in range(1, rounds + 1):
        lender.answer(train_request(histogram, number, plan, job=job))
    lender.close()


def without_rows(bank, num_rows):
    header, *rows = (bank.parent / "loans.csv").read_text().splitlines()
    (bank.parent / "loans.csv").write_text("\n".join([header, *rows[num_rows:]]) + "\n")


@pytest.fixture
def bank(tmp_path):
    return lender_folder(tmp_path / "north-bank")


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A lender with an open job of three rounds, of which the bins and two rounds have left."""
    bank = lender_folder(tmp_path_factory.mktemp("used") / "north-bank")
    run_job(bank)
    return bank


# ---------------------------------------------------------------- plan: the arithmetic


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_every_figure_of_a_plan_is_the_accountants(rate):
    told = document("plan", "--epsilon", 2, "--rounds", 4, "--local-steps", 3, "--sample-rate", rate)
    privacy = PrivacyPlan(epsilon=2.0)
    noise = calibrate(privacy, sample_rate=rate, num_steps=12)
    events = job_events(noise, rate, 12)
    bins, sigma = events[0], noise.training_noise_multiplier
    assert told["noise"] == {
        "bins_noise_multiplier": noise.bins_noise_multiplier,
        "training_noise_multiplier": sigma,
        "num_steps": 12,
    }
    for figure, epsilon_of in (("rdp", epsilon_rdp), ("pld", epsilon_pld)):
        job, alone = epsilon_of(events, 1e-5), epsilon_of([bins], 1e-5)
        before_last = epsilon_of([bins, GaussianEvent(sigma, rate, 9)], 1e-5)
        assert {part: told["epsilon"][part][figure] for part in told["epsilon"]} == {
            "job": job,
            "bins": alone,
            "round_alone": epsilon_of([GaussianEvent(sigma, rate, 3)], 1e-5),
            "round_average": pytest.approx((job - alone) / 4),
            "round_last": pytest.approx(job - before_last),
        }
    assert told["borrower_pld"] == [borrower_epsilon(events, 1e-5, num_lenders=k) for k in (1, 2, 3)]
    assert (told["relation"], told["delta"], told["lender"]) == ("add_or_remove_one", 1e-5, None)
    assert 1.99 <= told["epsilon"]["job"]["rdp"] <= 2.0


def test_a_plan_of_one_round_has_a_last_round():
    epsilon = document("plan", "--rounds", 1)["epsilon"]
    assert epsilon["round_last"] == pytest.approx(epsilon["round_average"])


def test_the_plan_may_come_from_the_coordinators_file_and_be_changed(tmp_path):
    assert CliRunner().invoke(app, ["server", "init", str(tmp_path / "fed"), "--name", "coop"]).exit_code == 0
    path = tmp_path / "fed" / "federation.yaml"
    federation = yaml.safe_load(path.read_text())
    federation["job"] = {"training": {"rounds": 7, "local_steps": 4}, "privacy": {"epsilon": 1.5}}
    path.write_text(yaml.safe_dump(federation))
    told = document("plan", "--job", path, "--local-steps", 2)
    assert (told["plan"]["training"]["rounds"], told["noise"]["num_steps"]) == (7, 14)
    assert told["plan"]["privacy"]["epsilon"] == 1.5


@pytest.mark.parametrize("named", [JOB, "job.json"])
def test_the_plan_may_be_that_of_a_job_that_this_lender_accepted(used, named):
    job = used.parent / "jobs" / JOB / "job.json" if named == "job.json" else named
    before = contents(used.parent)
    told = document("plan", "--config", used, "--job", job, "--epsilon", 0.5, "--no-auc")
    assert contents(used.parent) == before
    ran = PLAN.model_dump(mode="json", include={"model", "training", "privacy"})
    assert told["plan"] == {**ran, "privacy": {**ran["privacy"], "epsilon": 0.5}}


def test_a_job_json_is_enough_where_there_is_no_lender(used):
    told = document("plan", "--job", used.parent / "jobs" / JOB / "job.json")
    assert told["plan"]["training"]["rounds"] == PLAN.training.rounds


def test_an_unknown_job_is_refused_with_those_that_were_accepted(used, bank):
    for unknown in ("credit-9999", f"../jobs/{JOB}"):
        done = fedfin("plan", "--config", used, "--job", unknown, "--no-auc")
        assert done.exit_code == 1
        assert f"--job {unknown} does not exist" in done.stderr
        assert f"it accepted {JOB}" in done.stderr
    assert "it accepted none yet" in fedfin("plan", "--config", bank, "--job", JOB).stderr


def test_a_job_whose_plan_no_longer_fits_is_refused_by_its_file(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"job": JOB, "plan": json.dumps({"privacy": {"mode": "quantum"}})}))
    done = fedfin("plan", "--job", path)
    assert done.exit_code == 1
    assert "job.json holds no plan that this release of fedfin knows" in done.stderr


def test_a_sweep_gives_the_noise_at_each_epsilon():
    sweep = document("plan", *QUICK, "--sweep")["sweep"]
    assert [row["epsilon"] for row in sweep] == [0.5, 1.0, 2.0, 3.0, 5.0, 8.0]
    for row in sweep:
        noise = calibrate(PrivacyPlan(epsilon=row["epsilon"]), sample_rate=1.0, num_steps=6)
        assert row["noise"]["training_noise_multiplier"] == noise.training_noise_multiplier
        assert row["job"]["pld"] == epsilon_pld(job_events(noise, 1.0, 6), 1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--epsilon", value) for value in ("0", "-1", "nan", "inf", "1000000")),
        *(("--delta", value) for value in ("0", "0.5")),
        *(("--rounds", value) for value in ("0", "100000")),
        ("--local-steps", "0"),
        *(("--sample-rate", value) for value in ("0", "1.5")),
        ("--model", "tree"),
    ],
)
def test_a_value_without_meaning_is_refused_by_its_option(option, value):
    done = fedfin("plan", option, value)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"fedfin: {option} is ")
    assert "bug" not in done.stderr


def test_wrong_usage_of_plan_exits_with_two():
    assert fedfin("plan", "--lenders", 0).exit_code == 2
    assert fedfin("plan", "--epsilon", "much").exit_code == 2


@pytest.mark.parametrize("option", ["--config", "--job"])
def test_a_file_that_is_not_there_is_named_with_its_option(option, tmp_path):
    done = fedfin("plan", option, tmp_path / "none.yaml")
    assert done.exit_code == 1
    assert "none.yaml does not exist" in done.stderr
    assert option in done.stderr


def test_a_job_without_privacy_has_no_cost_to_plan(tmp_path):
    CliRunner().invoke(app, ["server", "init", str(tmp_path / "fed"), "--name", "coop"])
    path = tmp_path / "fed" / "federation.yaml"
    federation = yaml.safe_load(path.read_text())
    federation["job"] = {"privacy": {"mode": "none"}}
    path.write_text(yaml.safe_dump(federation))
    done = fedfin("plan", "--job", path)
    assert done.exit_code == 1
    assert "privacy.mode is none" in done.stderr


# ---------------------------------------------------------------- plan: the lender's budget


def test_looking_at_a_fresh_lender_makes_nothing_and_spends_nothing(bank):
    before = contents(bank.parent)
    told = document("plan", "--config", bank, *QUICK)["lender"]
    assert contents(bank.parent) == before
    assert told["would_accept"]
    assert told["budget"]["spent"] == {"rdp": 0.0, "pld": 0.0}
    assert "inherited" not in fedfin("plan", "--config", bank, *QUICK, "--no-auc").stdout
    limit = told["budget"]["filter"]
    assert limit["share_asked"] + limit["share_left"] == pytest.approx(1.0)
    assert limit["epsilon"] == pytest.approx(told["budget"]["after"]["rdp"])


def test_a_plan_is_held_against_what_was_spent_and_reserved_and_leaves_the_ledger_as_it_is(used):
    before = contents(used.parent)
    told = document("plan", "--config", used, "--epsilon", 0.5, *QUICK, "--no-auc")["lender"]
    assert contents(used.parent) == before
    snapshot = prepare(LenderFolder(used)).snapshot
    with Ledger(used.parent / "ledger.db") as ledger:
        spent, reserved = ledger.spent(snapshot, 1e-5), ledger.reserved(snapshot, 1e-5)
        held = ledger.held(snapshot, 1e-5)
    budget = told["budget"]
    assert budget["snapshot"] == snapshot.digest
    assert budget["is_known"]
    assert budget["spent"] == {"rdp": spent.epsilon_rdp, "pld": spent.epsilon_pld}
    assert budget["reserved"] == {"rdp": reserved.epsilon_rdp, "pld": reserved.epsilon_pld}
    asked = job_events(calibrate(PrivacyPlan(epsilon=0.5), sample_rate=1.0, num_steps=6), 1.0, 6)
    assert budget["after"]["pld"] == epsilon_pld([*held.events, *asked], 1e-5)
    limit = budget["filter"]
    shares = [limit[f"share_{part}"] for part in ("spent", "reserved", "asked", "left")]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0.0


def test_the_budget_is_held_at_the_lenders_delta_and_says_so(bank):
    asked = ("--config", bank, "--delta", 1e-6, *QUICK, "--no-auc")
    told = document("plan", *asked)
    assert (told["delta"], told["lender"]["budget"]["delta"]) == (1e-6, 1e-5)
    shown = fedfin("plan", *asked).stdout
    assert "epsilon at delta 1e-06, for tables that differ by one loan" in shown
    assert "epsilon at your policy's delta 1e-05, for tables that differ by one loan" in shown


def test_rows_that_stood_in_an_earlier_table_bring_its_spend_along(bank):
    run_job(bank)
    without_rows(bank, 20)
    budget = document("plan", "--config", bank, *QUICK, "--no-auc", exit_code=1)["lender"]["budget"]
    with Ledger(bank.parent / "ledger.db") as ledger:
        (earlier,) = ledger.snapshots()
        spent = ledger.spent(earlier, 1e-5)
    assert not budget["is_known"]
    assert budget["snapshot"] != earlier
    assert budget["spent"]["pld"] == spent.epsilon_pld
    assert budget["filter"]["others"] == [earlier]
    shown = fedfin("plan", "--config", bank, *QUICK, "--no-auc").stdout
    assert "no job on exactly these loans yet" in shown
    assert (
        "All that is spent or reserved is inherited from earlier snapshots that hold some of them:"
        f" {earlier[:12]}." in shown
    )


@pytest.mark.parametrize(("epsilon", "accepts"), [(0.5, True), (2.9, False)])
def test_the_lender_then_does_what_the_plan_said(bank, epsilon, accepts):
    run_job(bank)
    told = document(
        "plan", "--config", bank, "--epsilon", epsilon, *QUICK, "--no-auc", exit_code=0 if accepts else 1
    )["lender"]
    assert told["would_accept"] is accepts
    planned = JobPlan(
        aggregation="plain",
        training=TrainingPlan(rounds=3, local_steps=2),
        privacy=PrivacyPlan(epsilon=epsilon),
        cohort=CohortPlan(min_lenders=5),
    )
    answer = open_lender(bank).answer(proposal(planned, job="credit-5678"))
    assert isinstance(decode(answer, Accepted, Refused), Accepted if accepts else Refused)


@pytest.mark.parametrize(
    ("policy", "options", "word"),
    [
        ({}, ("--delta", 1e-4, "--epsilon", 1), "privacy.delta"),
        ({"max_rounds": 2}, (), "training.rounds"),
        ({"models": ["mlp"]}, (), "model.kind"),
        ({"max_parameters": 5}, (), "parameters"),
        ({"min_cohort": 9}, ("--lenders", 8), "cohort.min_lenders"),
        ({"epsilon_limit": 1.0}, (), "epsilon_limit"),
        ({"epsilon_limit": 1e-3}, (), "leaves no room"),
        ({"epsilon_limit": 1e-12}, (), "leaves no room"),
    ],
)
def test_what_the_policy_refuses_is_named(tmp_path, policy, options, word):
    bank = lender_folder(tmp_path / "bank", **policy)
    done = fedfin("plan", "--config", bank, *QUICK, "--no-auc", *options)
    assert done.exit_code == 1
    (refusal,) = [line for line in done.stdout.splitlines() if line.startswith("north-bank would refuse")]
    assert word in refusal


def test_a_limit_above_what_is_asked_is_told_as_a_share_that_is_left(tmp_path):
    bank = lender_folder(tmp_path / "bank", epsilon_limit=9.0)
    done = fedfin("plan", "--config", bank, *QUICK, "--no-auc")
    left = document("plan", "--config", bank, *QUICK, "--no-auc")["lender"]["budget"]["filter"]["share_left"]
    assert f"left {left:.1%}" in done.stdout
    assert done.stdout.splitlines()[-1] == "north-bank would accept this job"


# ---------------------------------------------------------------- plan: the expected AUROC


def forecast_of(bank, *options):
    return document("plan", "--config", bank, *QUICK, *options)["lender"]["auc"]


def test_the_baseline_is_the_models_own_auroc_on_the_held_out_loans(bank):
    loans = prepare(LenderFolder(bank), looking=True)
    plan = JobPlan(training=TrainingPlan(rounds=3, local_steps=2), privacy=PrivacyPlan(mode="none"))
    model = federate([loans.train], loans.schema, plan, seed=0)
    assert forecast_of(bank)["plain"] == pytest.approx(
        auroc(loans.holdout.labels, model.predict(loans.holdout.frame)), abs=1e-3
    )


def test_noise_costs_auroc_and_more_noise_costs_more(tmp_path):
    bank = lender_folder(tmp_path / "bank", num_loans=600, epsilon_limit=1000.0)
    options = ("--local-steps", 5, "--rounds", 2)
    little, much = (
        document("plan", "--config", bank, *options, "--epsilon", epsilon)["lender"]["auc"]["forecast"]
        for epsilon in (8, 0.5)
    )
    assert much["alone_loss"]["low"] > 0.01
    assert much["alone_loss"]["low"] > little["alone_loss"]["high"]
    # the noise of five lenders averages
    assert little["federation_high"]["high"] < much["federation_high"]["low"]
    for loss in (much["alone_loss"], much["federation_low"], much["federation_high"]):
        assert loss["low"] <= loss["estimate"] <= loss["high"]


def test_a_federation_of_one_is_the_lender_alone_and_a_large_one_loses_little(bank):
    one = forecast_of(bank, "--lenders", 1)["forecast"]
    assert one["federation_low"] == one["alone_loss"]
    thousand = forecast_of(bank, "--lenders", 1000)["forecast"]
    assert thousand["federation_high"]["estimate"] < 0.2 * one["federation_high"]["estimate"]


def test_the_forecast_is_repeatable_says_simulated_and_names_its_loans(bank):
    first, second = (document("plan", "--config", bank, *QUICK)["lender"] for _ in range(2))
    assert first == second
    assert (first["auc"]["noise"], first["auc"]["num_seeds"]) == ("simulated", 8)
    loans = prepare(LenderFolder(bank), looking=True)
    assert (first["num_train"], first["num_holdout"]) == (len(loans.train), len(loans.holdout))
    shown = fedfin("plan", "--config", bank, *QUICK).stdout
    assert f"{len(loans.holdout)} held-out loans" in shown
    assert "simulated noise" in shown
    assert "You alone is the plan's own model here" in shown


def test_attention_is_forecast_from_fewer_draws_of_the_noise(bank):
    tiny = ("--model", "attention", "--rounds", 1, "--local-steps", 1)
    assert forecast_of(bank, *tiny)["num_seeds"] == 4


def test_a_sweep_of_a_lender_has_an_auroc_for_each_epsilon(bank):
    rows = document("plan", "--config", bank, "--rounds", 1, "--local-steps", 1, "--sweep")["sweep"]
    assert all(math.isfinite(row["forecast"]["alone_auroc"]) for row in rows)
    assert len({row["forecast"]["alone_auroc"] for row in rows}) > 1


def test_without_auc_nothing_is_trained(bank, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("fedfin.client.forecast.train_rounds", never)
    assert document("plan", "--config", bank, "--no-auc")["lender"]["auc"] is None


# ---------------------------------------------------------------- ledger


def test_a_lender_without_a_ledger_is_told_so_and_gets_none(bank):
    before = contents(bank.parent)
    done = fedfin("ledger", "--config", bank)
    assert done.exit_code == 0
    assert "no ledger yet" in done.stdout
    assert document("ledger", "--config", bank)["snapshots"] == []
    assert contents(bank.parent) == before


def test_the_ledger_shows_what_a_real_job_spent_and_what_it_holds(used):
    before = contents(used.parent)
    (told,) = document("ledger", "--config", used)["snapshots"]
    assert contents(used.parent) == before
    noise = calibrate(PLAN.privacy, sample_rate=0.5, num_steps=6)
    bins = GaussianEvent(noise.bins_noise_multiplier)
    one_round = GaussianEvent(noise.training_noise_multiplier, 0.5, 2)
    assert [release["stage"] for release in told["releases"]] == ["bins", "round 1", "round 2"]
    for number, release in enumerate(told["releases"]):
        events = [bins, *[one_round] * number]
        assert release["epsilon_rdp"] == epsilon_rdp(events, 1e-5)
        assert release["epsilon_pld"] == epsilon_pld(events, 1e-5)
        assert release["job"] == JOB
        assert not release["inherited"]
        (event,) = release["events"]
        assert event["mechanism"] == "gaussian"
        assert event["noise_multiplier"] == events[-1].noise_multiplier
        assert (event["sample_rate"], event["count"]) == (events[-1].sample_rate, events[-1].count)
    spent = [bins, one_round, one_round]
    assert told["spent"] == {"rdp": epsilon_rdp(spent, 1e-5), "pld": epsilon_pld(spent, 1e-5)}
    assert told["reserved"]["rdp"] == epsilon_rdp([one_round], 1e-5)
    assert told["held"]["pld"] == epsilon_pld([*spent, one_round], 1e-5)
    assert told["borrower_pld"] == [borrower_epsilon(spent, 1e-5, num_lenders=k) for k in (1, 2, 3)]
    assert (told["relation"], told["delta"]) == ("add_or_remove_one", 1e-5)
    limit = told["filter"]
    assert limit["share_spent"] + limit["share_reserved"] + limit["share_left"] == pytest.approx(1.0)
    assert [job["share"] for job in told["jobs"]] == pytest.approx([limit["share_spent"]])


def test_the_table_has_a_line_for_every_release(used):
    shown = fedfin("ledger", "--config", used).stdout
    (told,) = document("ledger", "--config", used)["snapshots"]
    for release in told["releases"]:
        (line,) = [line for line in shown.splitlines() if f" {release['stage']} " in line]
        assert JOB in line
        assert f"{release['epsilon_pld']:.3f}" in line
    assert f"left {told['filter']['share_left']:.1%}" in shown


def test_the_spend_of_earlier_loans_is_shown_as_inherited(tmp_path):
    bank = lender_folder(tmp_path / "bank", epsilon_limit=8.0)
    run_job(bank, rounds=1)
    without_rows(bank, 20)
    run_job(bank, job="credit-5678", rounds=1)
    first, second = document("ledger", "--config", bank)["snapshots"]
    assert [release["inherited"] for release in second["releases"]] == [True, True, False, False]
    assert second["others"] == [first["snapshot"]]
    assert [(job["job_id"], job["is_inherited"]) for job in second["jobs"]] == [
        (JOB, True),
        ("credit-5678", False),
    ]
    (only,) = document("ledger", "--config", bank, "--snapshot", second["snapshot"][:6])["snapshots"]
    assert only == second
    shown = fedfin("ledger", "--config", bank, "--snapshot", second["snapshot"][:6]).stdout
    lines = [line for line in shown.splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert [first["snapshot"][:12] in line for line in lines] == [True, True, False, False]
    fedfin("ledger", "--config", bank, "--plot", tmp_path / "both.png")
    (height, _, _) = matplotlib.image.imread(tmp_path / "both.png").shape
    assert height > 1000


def test_an_unknown_snapshot_is_refused_with_those_that_are_known(used):
    done = fedfin("ledger", "--config", used, "--snapshot", "zz")
    (told,) = document("ledger", "--config", used)["snapshots"]
    assert done.exit_code == 1
    assert "'zz'" in done.stderr
    assert told["snapshot"][:12] in done.stderr


def test_an_empty_snapshot_is_refused_as_empty(used):
    done = fedfin("ledger", "--config", used, "--snapshot", "")
    assert done.exit_code == 1
    assert "--snapshot '' is empty; give the first digits of one of: " in done.stderr


def test_first_digits_that_several_snapshots_share_are_refused():
    with pytest.raises(ConfigError, match=r"'ab' names more than one snapshot; .* one of: ab12, ab34, cd56"):
        choose(("ab12", "ab34", "cd56"), "ab")


def test_an_unknown_snapshot_is_refused_where_there_is_no_ledger(bank):
    done = fedfin("ledger", "--config", bank, "--snapshot", "ab")
    assert done.exit_code == 1
    assert "names no snapshot" in done.stderr


def test_the_plot_is_a_picture_for_the_owner_alone(used, tmp_path):
    path = tmp_path / "spent.png"
    done = fedfin("ledger", "--config", used, "--plot", path)
    assert done.exit_code == 0, done.output
    assert str(path) in done.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 1000
    # lines, marks of a job, the limit: not an empty sheet
    assert len(np.unique(np.round(picture[:, :, :3] * 8), axis=None)) > 4
    assert (np.ptp(picture[:, :, :3], axis=2) > 0.5).sum() > 100


@pytest.mark.parametrize("place", ["missing/spent.png", "taken.png", "file/spent.png"])
def test_a_plot_that_cannot_be_written_leaves_nothing_behind(used, tmp_path, place):
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    done = fedfin("ledger", "--config", used, "--plot", tmp_path / place)
    assert done.exit_code == 1
    assert place.split("/")[-1] in done.stderr
    assert "bug" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plot_is_a_png_and_needs_something_to_draw(used, bank, tmp_path):
    other = fedfin("ledger", "--config", used, "--plot", tmp_path / "spent.jpg")
    assert (other.exit_code, "ends in .png" in other.stderr) == (1, True)
    nothing = fedfin("ledger", "--config", bank, "--plot", tmp_path / "spent.png")
    assert (nothing.exit_code, "nothing to draw" in nothing.stderr) == (1, True)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


# ---------------------------------------------------------------- both


COMMANDS = [("plan", "--no-auc"), ("ledger",)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_ledger_is_one_paragraph_with_the_mend(bank, command):
    run_job(bank, rounds=1)
    path = bank.parent / "ledger.db"
    path.write_bytes(b"garbage" * 1000)
    done = fedfin(*command, "--config", bank)
    assert done.exit_code == 1
    assert "restore it from a backup" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_error_is_json_when_asked_and_has_a_traceback_when_asked(command, tmp_path):
    done = fedfin(*command, "--config", tmp_path / "none.yaml", "--json")
    assert done.exit_code == 1
    assert "does not exist" in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_limit_lowered_until_it_admits_nothing_is_said_in_words_and_valid_json(bank, command):
    run_job(bank, rounds=1)
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump({**config, "policy": {"epsilon_limit": 0.01}}))
    done = fedfin(*command, "--config", bank)
    shown = " ".join(done.stdout.split())
    snapshot = prepare(LenderFolder(bank)).snapshot
    with Ledger(bank.parent / "ledger.db") as ledger:
        account, spent = ledger.account(snapshot.digest), ledger.spent(snapshot, 1e-5)
        least = ledger.budget(snapshot, epsilon_limit=0.01, max_delta=1e-5).least_limit
        assert ledger.budget(snapshot, epsilon_limit=least * 1.001, max_delta=1e-5).capacity > 0.0
        assert ledger.budget(snapshot, epsilon_limit=least * 0.999, max_delta=1e-5).capacity < 0.0
    why = (
        f"epsilon_limit 0.01 admits nothing: these loans' account is held at Renyi order {account.order:g} since their"
        f" first job, and at this order and delta 1e-05 a limit below about {least:.4g} admits nothing; epsilon"
        f" {spent.epsilon_rdp:.3f} by RDP ({spent.epsilon_pld:.3f} by PLD) is spent already, over the limit"
    )
    assert why in shown
    assert (f"would refuse this job: policy.{why}; ask the data officer" in shown) is (command[0] == "plan")
    assert " inf" not in done.stdout
    printed = fedfin(*command, "--config", bank, "--json").stdout
    assert "Infinity" not in printed
    assert '"share_spent": null' in printed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_one_paragraph():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fedfin", "privacy", "plan", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lost_salt_stops_a_plan_where_there_is_a_ledger(bank):
    run_job(bank, rounds=1)
    (bank.parent / "keys" / "salt.key").unlink()
    done = fedfin("plan", "--config", bank, "--no-auc")
    assert done.exit_code == 1
    assert "salt.key is gone" in done.stderr


def test_neither_command_shows_a_loan_or_a_secret(used):
    header, *rows = (used.parent / "loans.csv").read_text().splitlines()
    salt = (used.parent / "keys" / "salt.key").read_bytes().hex()
    with Ledger(used.parent / "ledger.db") as ledger:
        assert ledger.snapshots()
    for arguments in (("plan", *QUICK), ("plan", *QUICK, "--json"), ("ledger",), ("ledger", "--json")):
        shown = fedfin(*arguments, "--config", used).output
        assert salt not in shown
        assert not any(row in shown or row.replace(",", ", ") in shown for row in rows)
        assert not any(name in shown.split() for name in header.split(",")[1:-1])


def test_our_example_is_the_one_of_the_help():
    namespace = SimpleNamespace(
        plan=fedfin("plan", "--help").output, ledger=fedfin("ledger", "--help").output
    )
    assert "fedfin privacy plan --config" in namespace.plan
    assert "fedfin privacy ledger --config" in namespace.ledger

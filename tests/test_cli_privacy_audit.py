"""`fedfin privacy audit`: the verdict as text, as JSON and as exit code; nothing of the lender's folder changes."""

import json

import pytest
import typer
from lenders import JOB, lender_folder, open_lender, proposal, schema
from typer.testing import CliRunner

import fedfin.client.twin
from fedfin.cli_privacy_audit import EPILOG, audit
from fedfin.client.training import LocalPrivacy, train_locally
from fedfin.credit.binning import bins_from_histogram, histogram
from fedfin.credit.export import ReleasedModel, save_model
from fedfin.credit.models import architecture_of, initial_weights, model_fingerprint
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.simulation.partition import demo_loans

QUICK = ["--epsilon", "30", "--rounds", "1"]  # little noise and few steps: quickly told apart


def run(*arguments):
    app = typer.Typer()
    app.command(name="audit", epilog=EPILOG)(audit)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def everything_in(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_without_a_configuration_the_demos_loans_are_audited():
    shown = run(*QUICK)
    assert shown.exit_code == 0, shown.output
    assert (
        "1 round of 10 steps, sample rate 1, epsilon 30 at delta 1e-05, on the demo's loans" in shown.output
    )
    assert "at most, by the ledger (PLD, tighter)" in shown.output
    assert "at least, by single steps" in shown.output
    assert "The attacker sees the noisy sum of every step" in shown.output
    assert "fails this audit once in 1000 times at most" in shown.output
    assert "passed: the attack proves" in shown.output


def test_a_lenders_own_loans_are_audited_and_its_folder_stays_as_it_is(tmp_path):
    bank = lender_folder(tmp_path / "north-bank")
    before = everything_in(bank.parent)
    shown = run("--config", bank, *QUICK, "--json")
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    assert (document["loans"], document["passed"]) == ("north-bank", True)
    assert document["epsilon_measured"] <= document["claim_pld"] <= document["claim_rdp"] <= 30
    assert everything_in(bank.parent) == before


def test_the_plan_of_an_accepted_job_is_audited_by_its_id(tmp_path):
    bank = lender_folder(tmp_path / "north-bank")
    lender = open_lender(bank)
    lender.answer(proposal())
    lender.close()
    shown = run("--config", bank, "--job", JOB, "--epsilon", "30")
    assert shown.exit_code == 0, shown.output
    assert "3 rounds of 2 steps, sample rate 0.5, epsilon 30 at delta 1e-05, on north-bank's" in shown.output
    unknown = run("--config", bank, "--job", "credit-9999")
    assert (unknown.exit_code, f"it accepted {JOB}" in unknown.output) == (1, True)


def test_a_fault_in_the_training_ends_with_exit_1_and_says_which(monkeypatch):
    def unclipped(*arguments, privacy, **more):
        return train_locally(*arguments, privacy=LocalPrivacy(privacy.noise_multiplier / 1e9, 2e9), **more)

    monkeypatch.setattr(fedfin.client.twin, "train_locally", unclipped)
    shown = run(*QUICK)
    assert shown.exit_code == 1
    assert "FAILS  clipping, exact: without noise one hostile loan moves a step's sum by" in shown.output
    assert "failed: the attack by single steps shows that epsilon is at least" in shown.output
    assert "stop training with this installation" in shown.output
    assert json.loads(run(*QUICK, "--json").output)["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "0"], "--epsilon is 0.0: input should be greater than 0"),
        (["--rounds", "0"], "--rounds is 0: input should be greater than or equal to 1"),
        (["--model", "tree"], "--model is 'tree'"),
        (["--model-dir", "models"], "--model-dir models needs the loans that trained it"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--job", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_answered_with_its_mend(arguments, message):
    shown = run(*arguments)
    assert shown.exit_code == 1
    assert message in shown.output
    assert "Traceback" not in shown.output


def test_a_plan_without_noise_is_refused(tmp_path):
    job = tmp_path / "federation.yaml"
    job.write_text("federation: f\naddress: 127.0.0.1:9092\njob: {privacy: {mode: none}}\n")
    shown = run("--job", job)
    assert shown.exit_code == 1
    assert "privacy.mode is none" in shown.output


def kept_model(bank):
    """A model in the lender's folder that no job of its own made."""
    loans, columns = demo_loans()
    plan = JobPlan(model=ModelPlan(), training=TrainingPlan(rounds=1, local_steps=2), privacy=PrivacyPlan())
    bins = bins_from_histogram(histogram(loans.frame, columns), columns, 3)
    architecture = architecture_of(plan.model, columns, bins)
    fingerprint = model_fingerprint(schema().fingerprint(), bins.fingerprint(), architecture)
    weights = initial_weights(architecture, 0)
    model = ReleasedModel(JOB, 1, plan.model_dump_json(), columns, bins, fingerprint, weights)
    save_model(model, bank.parent / "models" / model.digest)
    return bank.parent / "models" / model.digest


def test_a_released_model_is_attacked_instead(tmp_path):
    bank = lender_folder(tmp_path / "north-bank")
    kept = kept_model(bank)
    digest, directory = kept.name, kept.rename(tmp_path / "model")  # a copy is told by its digest too
    before = everything_in(bank.parent)
    shown = run("--config", bank, "--model-dir", directory)
    assert shown.exit_code == 0, shown.output
    assert f"who trained model {digest[:12]}?" in shown.output
    assert "64 shadow models" in shown.output
    assert "AUROC" in shown.output
    assert f"not those that job {JOB} trained on" in shown.output
    assert "it can show a leak, and never that there is none" in shown.output
    document = json.loads(run("--config", bank, "--model-dir", directory, "--json").output)
    assert document["model"] == digest
    assert document["low"] <= document["auroc"] <= document["high"]
    assert everything_in(bank.parent) == before


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    bank = lender_folder(tmp_path / "north-bank")
    shown = run("--config", bank, "--model-dir", tmp_path)
    assert shown.exit_code == 1
    assert "does not hold a whole model" in shown.output

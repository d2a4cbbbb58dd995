"""A dry run says what a job would ask of a lender: held against what real jobs then asked; and it leaves no trace."""

import hashlib
import json
from collections import defaultdict

import pytest
import yaml
from lenders import PLAN, lender_folder, open_lender, proposal, train_request
from secure_house import SecureHouse, hurry, job_of
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.client.dry_run import dry_run
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.errors import QuorumError
from fedfin.plan import PrivacyPlan
from fedfin.privacy.ledger import Ledger
from fedfin.update import Accepted, AskHistogram, Histogram, Masked, Refused, Update, decode, encode


def contents(directory):
    """The digest of every file under a folder, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def sizes(run):
    return {departure.stage: (departure.times, departure.bytes) for departure in run.departures}


def keys(run):
    return [breach.key for breach in run.refusals]


def ledger_says(bank):
    """What the lender's own ledger holds of its loans now: of those that train and those that judge."""
    folder = LenderFolder(bank)
    loans, policy = prepare(folder), folder.config.policy
    with Ledger(folder.ledger_path) as ledger:
        found = []
        for snapshot in (loans.snapshot, loans.counted.snapshot):
            held = ledger.held(snapshot, policy.max_delta)
            budget = ledger.budget(snapshot, epsilon_limit=policy.epsilon_limit, max_delta=policy.max_delta)
            found.append((held.epsilon_rdp, held.epsilon_pld, budget.share(budget.left)))
        return found


def dry_says(run):
    return [
        (spend.after.rdp, spend.after.pld, spend.budget.share(spend.budget.left))
        for spend in (run.training, run.held_out)
    ]


@pytest.fixture
def house(tmp_path, monkeypatch):
    hurry(monkeypatch)
    made = SecureHouse(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_what_it_says_is_what_a_job_of_secure_sums_then_asks_spends_and_leaves(house, mode):
    bank, plan = house.banks["bank-b"], job_of(mode, rounds=3, times=2, min_lenders=5)
    before = contents(bank.parent)
    said = dry_run(plan, LenderFolder(bank), num_members=6)
    assert contents(bank.parent) == before
    assert keys(said) == []

    left = defaultdict(list)

    def watch(name, reply):
        if name == "bank-b" and isinstance(reply, Masked):
            left[house.stages[reply.sum].partition(" ")[0]].append(reply.values.nbytes)
        return reply

    house.spoil = watch
    house.run(plan)
    claimed = sizes(said)
    assert {stage: len(found) for stage, found in left.items()} == {
        stage: times for stage, (times, _) in claimed.items()
    }
    assert set(left["bins"]) == {claimed["bins"][1]}
    assert set(left["evaluation"]) == {claimed["evaluation"][1]}
    # some columns get fewer bins than the plan allows: at most is what it says
    assert max(left["round"]) <= claimed["round"][1]
    assert max(left["round"]) > 0.8 * claimed["round"][1]
    # every round was answered, so that all that was reserved is spent
    assert ledger_says(bank) == [pytest.approx(figures) for figures in dry_says(said)]

    more = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": 2.9})})
    assert keys(dry_run(plan, LenderFolder(bank), num_members=6)) == []
    assert keys(dry_run(more, LenderFolder(bank), num_members=6)) == ["epsilon_limit"]
    with pytest.raises(QuorumError, match="its privacy budget does not allow the job"):
        house.run(more, new_job=True)


def test_in_clear_it_says_the_weight_that_is_told_and_what_is_seen_by_itself(tmp_path):
    bank = lender_folder(tmp_path / "bank")
    folder = LenderFolder(bank)
    folder.salt()  # the held-out loans are chosen by it
    said = dry_run(PLAN, folder, num_members=2)
    lender = open_lender(bank)
    assert decode(lender.answer(proposal()), Accepted).weight == said.told_weight == 100.0
    histogram = lender.answer(encode(AskHistogram("credit-1234")))
    update = decode(lender.answer(train_request(histogram, 1)), Update)
    assert sizes(said)["bins"] == (1, decode(histogram, Histogram).counts.nbytes)
    assert sizes(said)["round"][0] == PLAN.training.rounds
    assert 0.5 * sizes(said)["round"][1] < update.delta.nbytes <= sizes(said)["round"][1]
    assert said.held_out is None  # the plan has no evaluation
    lender.close()


@pytest.mark.parametrize(
    ("change", "policy", "key"),
    [
        ({}, {}, None),
        ({"privacy": PrivacyPlan(mode="none")}, {}, "allow_no_privacy"),
        ({"privacy": PrivacyPlan(epsilon=50.0)}, {}, "epsilon_limit"),
        ({}, {"max_parameters": 10}, "max_parameters"),
        ({}, {"columns": ["Income"]}, "columns"),
        ({}, {"protected": ["Job"]}, "protected"),
        ({}, {"jobs": ["marketing"]}, "jobs"),
        ({}, {"max_epsilon_per_job": 1.0}, "max_epsilon_per_job"),
        ({}, {"allow_plain_aggregation": False}, "allow_plain_aggregation"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_it_refuses_exactly_what_the_lender_then_refuses(tmp_path, change, policy, key):
    bank = lender_folder(tmp_path / "bank", **policy)
    plan = PLAN.model_copy(update=change)
    assert keys(dry_run(plan, LenderFolder(bank), num_members=2)) == ([] if key is None else [key])
    lender = open_lender(bank)
    answer = decode(lender.answer(proposal(plan)), Accepted, Refused)
    assert isinstance(answer, Accepted) == (key is None)
    lender.close()


def test_a_plan_that_no_noise_meets_has_no_sums_to_speak_of(tmp_path):
    plan = job_of("shared", privacy={"mode": "shared", "epsilon": 1e-9}, cohort={"min_lenders": 5})
    said = dry_run(plan, LenderFolder(lender_folder(tmp_path / "bank")), num_members=5)
    assert (keys(said), said.training, said.departures) == (["min_planned_colluders", "privacy"], None, ())


def test_a_lender_that_keeps_out_of_evaluations_says_so_and_trains(tmp_path):
    bank = lender_folder(tmp_path / "bank", allow_evaluations=False)
    plan = PLAN.model_copy(update={"evaluation": PLAN.evaluation.model_copy(update={"times": 1})})
    said = dry_run(plan, LenderFolder(bank), num_members=2)
    assert (keys(said), said.held_out) == ([], None)
    assert said.declines == "this lender's policy.allow_evaluations is false"
    assert "evaluation" not in sizes(said)
    lender = open_lender(bank)
    decode(lender.answer(proposal(plan)), Accepted)
    accepted = json.loads((bank.parent / "jobs" / "credit-1234" / "job.json").read_text())
    assert accepted["counted"] == ""
    lender.close()


def test_it_names_the_columns_by_both_names_and_what_each_is_for(tmp_path):
    bank = lender_folder(tmp_path / "bank")
    config = yaml.safe_load(bank.read_text())
    table = (bank.parent / "loans.csv").read_text()
    (bank.parent / "loans.csv").write_text(table.replace("Income", "inc_eur", 1))
    config["data"]["columns"] = {"Income": "inc_eur"}
    bank.write_text(yaml.safe_dump(config))
    plan = PLAN.model_copy(update={"evaluation": PLAN.evaluation.model_copy(update={"times": 1})})
    columns = {column.name: column for column in dry_run(plan, LenderFolder(bank), num_members=2).columns}
    assert (columns["Income"].local, columns["Income"].is_feature) == ("inc_eur", True)
    assert (columns["Age"].is_feature, columns["Age"].protected, columns["Age"].cells) == (False, True, 0)
    assert "Age" not in {column.name for column in dry_run(PLAN, LenderFolder(bank), num_members=2).columns}


def test_the_command_says_it_all_and_exits_by_the_answer(tmp_path):
    bank = lender_folder(tmp_path / "bank", hours="00:00-23:59", time_zone="UTC")
    file = tmp_path / "federation.yaml"

    def run(job, *options):
        file.write_text(yaml.safe_dump({"federation": "test", "address": "127.0.0.1:1", "job": job}))
        command = ["client", "dry-run", "--config", str(bank), "--plan", str(file), *options]
        return CliRunner().invoke(app, command)

    good = run({"training": {"rounds": 3}})
    assert good.exit_code == 0
    words = " ".join(good.output.split())
    for text in (
        "fairness figures only",
        "what leaves, at most, with 5 lenders",
        "of the limit is left then",
        "hours: ",
    ):
        assert text in words
    document = json.loads(run({"training": {"rounds": 3}}, "--json", "--members", "9").output)
    assert (document["members"], document["refusals"]) == (9, [])
    assert document["bytes"] == sum(item["times"] * item["bytes"] for item in document["departures"])
    bad = run({"training": {"rounds": 300}})
    assert (bad.exit_code, "refused by policy.max_rounds" in " ".join(bad.output.split())) == (1, True)
    neither = CliRunner().invoke(app, ["client", "dry-run", "--config", str(bank)])
    assert (neither.exit_code, "give either --plan" in " ".join(neither.output.split())) == (1, True)

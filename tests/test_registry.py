"""The coordinator's run directory: what is kept, and what is not."""

import json

import pytest
from federation import SCHEMA

from fedfin.config import FederationConfig
from fedfin.credit.schema import Schema
from fedfin.errors import ConfigError
from fedfin.plan import JobPlan
from fedfin.server.registry import RunDirectory
from fedfin.server.roster import Job

CONFIG = FederationConfig(federation="coop", address="127.0.0.1:9443")
JOB = Job(
    "credit-1234", JobPlan().model_dump_json(), JobPlan().digest(), "running", "2026-01-01T00:00:00+00:00"
)


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / JOB.job_id)
    directory.begin(CONFIG, JOB, Schema.from_yaml(SCHEMA.read_text(), origin="schema.yaml"), "f" * 64)
    return directory


def test_run_json_says_under_what_the_job_runs_and_a_restart_does_not_rewrite_it(run):
    before = (run.path / "run.json").read_text()
    document = json.loads(before)
    assert document["plan_digest"] == JobPlan().digest()
    assert document["root_fingerprint"] == "f" * 64
    assert document["versions"]["flwr"] == "1.41.0"
    run.begin(CONFIG, JOB, Schema.from_yaml(SCHEMA.read_text(), origin="schema.yaml"), "f" * 64)
    assert (run.path / "run.json").read_text() == before


def test_rounds_are_kept_line_by_line_and_passing_events_are_not(run):
    run.note({"event": "round_done", "round": 1, "cohort": ["a", "b"], "missing": {}, "seconds": 1.0})
    run.note({"event": "waiting", "online": [], "for": ["a"], "wanted": 2})
    run.note({"event": "answer", "round": 1, "lender": "a"})
    (line,) = (run.path / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["cohort"] == ["a", "b"]


def test_a_full_disk_is_named_with_its_mend_and_run_json_stays_whole(run):
    (run.path / "rounds.jsonl").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="free the disk"):
        run.note({"event": "round_done", "round": 1})
    assert json.loads((run.path / "run.json").read_text())["job"] == JOB.job_id


def test_the_end_of_a_run_names_the_model(run):
    run.finish("d" * 64)
    document = json.loads((run.path / "run.json").read_text())
    assert document["model"] == "d" * 64
    assert document["completed"]


def test_an_evaluation_is_kept_by_its_number_and_the_later_one_counts(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.judge({"evaluation": 2, "round": 10})
    directory.judge({"evaluation": 1, "round": 5})
    directory.judge({"evaluation": 2, "round": 10, "figures": {}})
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept == {
        "evaluations": [{"evaluation": 1, "round": 5}, {"evaluation": 2, "round": 10, "figures": {}}]
    }


def test_what_a_killed_coordinator_had_not_noted_is_noted_once(tmp_path):
    directory = RunDirectory(tmp_path)
    first, second = ({"event": "round_done", "round": number, "cohort": ["a"]} for number in (1, 2))
    directory.note(first)
    directory.catch_up(first)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"time": "2026-11-24T20:00:00.000+00:00", "event": "rou')  # killed while it wrote
    for _ in range(2):
        directory.catch_up(second)
    directory.catch_up(None)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]


def test_rounds_that_cannot_be_read_stop_the_job(tmp_path):
    (tmp_path / "rounds.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="restore it from the backup"):
        RunDirectory(tmp_path).catch_up(None)

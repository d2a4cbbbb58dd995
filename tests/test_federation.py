"""A real federation, process by process: what a lender's engineer and a coordinator see, and what must go right."""

import contextlib
import datetime as dt
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from federation import SECURE_JOB, Federation, federation, shares

from fedfin.audit.events import Refusal
from fedfin.credit.export import load_model
from fedfin.errors import LinkError
from fedfin.identity import load_lender_keys
from fedfin.privacy.accounting import calibrate, job_events
from fedfin.privacy.ledger import Ledger

NAMES = ("north-bank", "harbour-micro", "lane-micro")
FIVE = (*NAMES, "quarry-micro", "river-micro")
LONG_ROUNDS = {"training": {"rounds": 4, "local_steps": 400, "sample_rate": 0.5, "learning_rate": 0.01}}

MANY_LONG_ROUNDS = {"training": {**LONG_ROUNDS["training"], "rounds": 40}}
MANY_SHORT_ROUNDS = {"training": {"rounds": 60, "local_steps": 10, "learning_rate": 0.01}}


def started(built: Federation, names: tuple[str, ...] = NAMES, *options: str, **policy: object) -> None:
    built.start_server()
    for name, rows in zip(names, shares(len(names)), strict=True):
        built.enrol(name, rows, **policy)
    for name in names:
        built.start_lender(name, *options)


def kept_models(built: Federation, name: str) -> list[Path]:
    return sorted((built.directory / name / "models").glob("*/model.json"))


def charged(built: Federation, name: str) -> list[str]:
    """Return the stages that this lender's ledger was charged for, in order."""
    with Ledger(built.directory / name / "ledger.db") as ledger:
        return [entry.stage for entry in ledger.entries() if entry.kind == "commit"]


def spent(built: Federation, name: str) -> float:
    with Ledger(built.directory / name / "ledger.db") as ledger:
        (snapshot,) = ledger.snapshots()
        return ledger.spent(snapshot, 1e-5).epsilon_rdp


def in_round(built: Federation, name: str, number: int) -> bool:
    """Tell whether a lender has answered the round before `number` and works on it now."""
    stages = built.released(name)
    return f"round {number - 1}" in stages and f"round {number}" not in stages


@pytest.mark.timeout(240)
def certificate_of(built, name):
    return built.directory / name / "certificate.pem", built.directory / name / "keys" / "tls.key"


def test_three_lenders_train_one_model_and_the_public_port_answers_only_them(tmp_path, monkeypatch):
    with federation(tmp_path, SECURE_JOB) as built:
        started(built, NAMES, "--once", min_cohort=3)
        assert_public_port_is_closed_but_for_fleet_health_and_enrolment(built)
        assert_an_unenrolled_node_is_refused(built)
        assert_a_clock_an_hour_off_is_named(built, monkeypatch)
        assert built.wait_for_end("server") == 0, built.tail("server")
        for name in NAMES:
            assert built.wait_for_end(name) == 0, built.tail(name)
        models = {name: load_model(path.parent) for name in NAMES for path in kept_models(built, name)}
        released = load_model(built.run_path() / "model")
        assert {model.digest for model in models.values()} == {released.digest}
        assert np.linalg.norm(released.weights) > 0
        assert [line["round"] for line in built.events("round_done")] == [1, 2, 3]
        for name in NAMES:
            assert charged(built, name) == ["bins", "round 1", "round 2", "round 3", "evaluation 1"]
            evaluation = json.loads((kept_models(built, name)[0].parent / "evaluation.json").read_text())
            assert set(evaluation["arms"]) == {"alone", "federated"}
        assert_nothing_of_one_lender_is_at_the_coordinator(built)
        refused = built.fedfin("server", "--config", built.config, check=False)
        assert refused.returncode == 1
        assert "--new-job" in refused.stderr


def assert_public_port_is_closed_but_for_fleet_health_and_enrolment(built: Federation) -> None:
    root = ssl.create_default_context(cafile=str(built.config.parent / "ca.pem"))
    with httpx.Client(base_url=f"https://{built.address}", verify=root) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/enrol/root").status_code == 200
        for path in (
            "/",
            "/docs",
            "/openapi.json",
            "/v1/control/start-run",
            "/v1/control/list-runs",
            "/v1/runtime/acquire-task",
            "/v1/runtime/get-nodes",
            "/v1/fedfin/run",
            "/v1/responses",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "/v1/enrolment",
            "//v1/runtime/get-nodes",
        ):
            for method in ("GET", "POST"):
                answer = client.request(method, path)
                assert answer.status_code == 404, (method, path, answer.status_code)


def assert_an_unenrolled_node_is_refused(built: Federation) -> None:
    from fedfin.client.node import Node  # imports Flower, which other tests do without

    stranger = Node(
        built.address,
        built.config.parent / "ca.pem",
        certificate_of(built, "north-bank"),
        ec.generate_private_key(ec.SECP384R1()),
        app=None,
        state_path=built.directory / "stranger.json",
        say=lambda _: None,
        idle=lambda: None,
    )
    with stranger._client() as client, pytest.raises(httpx.HTTPStatusError) as refusal:
        stranger._activate(client)
    assert refusal.value.response.status_code == 401

    # A member's node key with another member's certificate is refused too.
    mixed = Node(
        built.address,
        built.config.parent / "ca.pem",
        certificate_of(built, NAMES[1]),
        load_lender_keys(built.directory / "north-bank" / "keys").node,
        app=None,
        state_path=built.directory / "mixed.json",
        say=lambda _: None,
        idle=lambda: None,
    )
    with mixed._client() as client, pytest.raises(httpx.HTTPStatusError) as refusal:
        mixed._activate(client)
    assert refusal.value.response.status_code == 401


def assert_a_clock_an_hour_off_is_named(built: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of an enrolled lender whose clock is an hour ahead: Flower refuses its signature, we say why."""
    from fedfin.client import node as node_module

    class Ahead(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return dt.datetime.now(tz) + dt.timedelta(hours=1)

    node = node_module.Node(
        built.address,
        built.config.parent / "ca.pem",
        certificate_of(built, "north-bank"),
        load_lender_keys(built.directory / "north-bank" / "keys").node,
        app=None,
        state_path=built.directory / "ahead.json",
        say=lambda _: None,
        idle=lambda: None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            "flwr.supernode.node_auth_http_interceptor.now",
            lambda: dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
        )
        patch.setattr(node_module, "dt", SimpleNamespace(datetime=Ahead, UTC=dt.UTC))
        with pytest.raises(LinkError, match="60 minutes ahead of"):
            node.run()


def assert_nothing_of_one_lender_is_at_the_coordinator(built: Federation) -> None:
    texts = [path.read_text() for path in built.run_path().rglob("*.json*") if path.name != "model.json"]
    for word in ("n_train", "num_examples", 'weight"'):
        assert not any(word in text.lower() for text in texts), word
    with contextlib.closing(sqlite3.connect(built.config.parent / "federation.db")) as database:
        assert set(database.execute("SELECT weight FROM answers")) == {(0.0,)}
    # figures are of the sum over all lenders
    (evaluation,) = json.loads((built.run_path() / "metrics.json").read_text())["evaluations"]
    assert evaluation["lenders"] == len(NAMES)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_lender_killed_in_a_secure_round_is_left_out_of_it_and_takes_part_again_when_restarted(tmp_path):
    # a generous deadline: Flower notices within 20 s that the killed node is gone, which ends the round before it
    changes = {**MANY_SHORT_ROUNDS, "cohort": {"round_deadline_s": 60.0}}
    with federation(tmp_path, SECURE_JOB, **changes) as built:
        started(built, FIVE, min_cohort=3)
        built.wait(lambda: built.rounds_done() >= 1, "the first round is done", timeout_s=120)
        built.kill("lane-micro")
        without = [name for name in sorted(FIVE) if name != "lane-micro"]
        built.wait(
            lambda: without in [line["cohort"] for line in built.events("round_done")],
            "a round ends without the lender",
            timeout_s=90,
        )
        assert built.events("round_lost") == []
        built.start_lender("lane-micro")
        built.wait(
            lambda: built.events("round_done")[-1]["cohort"] == sorted(FIVE),
            "the restarted lender takes part again",
            timeout_s=90,
        )
        built.stop()
        for name in FIVE:
            # whatever was killed or prepared in vain, what left a lender was charged once, and nothing else was
            stages = charged(built, name)
            assert len(stages) == len(set(stages))
            assert built.released(name) <= set(stages)
            assert "bins" in stages


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_lender_killed_mid_round_is_named_missing_and_takes_part_again_when_restarted(tmp_path):
    with federation(tmp_path, **MANY_LONG_ROUNDS, cohort={"round_deadline_s": 15.0}) as built:
        started(built)
        built.wait(lambda: in_round(built, "lane-micro", 2), "lane-micro works on round 2", timeout_s=90)
        built.kill("lane-micro")
        built.wait(lambda: built.rounds_done() >= 2, "the round ends without the lender", timeout_s=60)
        second = next(line for line in built.events("round_done") if line["round"] == 2)
        assert second["cohort"] == ["harbour-micro", "north-bank"]
        assert list(second["missing"]) == ["lane-micro"]
        # at the deadline, or when Flower notices before that the node is gone
        assert re.search("15 s|went away", second["missing"]["lane-micro"])
        built.start_lender("lane-micro")
        built.wait(
            lambda: any("lane-micro" in line["cohort"] for line in built.events("round_done")[2:]),
            "the restarted lender takes part again",
            timeout_s=90,
        )
        built.stop()
        for name in NAMES:
            # whatever was killed or repeated, each stage that left a lender was charged once, and nothing else was
            stages = charged(built, name)
            assert len(stages) == len(set(stages))
            assert built.released(name) <= set(stages)
            assert "bins" in stages


def assert_charges_are_exact(built: Federation, name: str, rounds: int = 4) -> None:
    """Bins and every round once: what an uninterrupted run would have spent."""
    from fedfin.config import FederationConfig
    from fedfin.parsing import load_config

    plan = load_config(built.config, FederationConfig).job
    noise = calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)
    assert charged(built, name) == ["bins", *(f"round {number}" for number in range(1, rounds + 1))]
    with Ledger(built.directory / name / "ledger.db") as ledger:
        (snapshot,) = ledger.snapshots()
        events = sorted(
            (e.noise_multiplier, e.sample_rate, e.count) for e in ledger.spent(snapshot, 1e-5).events
        )
    wanted = job_events(noise, plan.training.sample_rate, plan.num_steps)
    assert sum(count for *_, count in events) == sum(event.count for event in wanted)
    assert {event[:2] for event in events} == {(e.noise_multiplier, e.sample_rate) for e in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["fedfin.server.app", "fedfin.server.link"])
def test_a_coordinators_process_killed_mid_round_is_started_again_and_nothing_is_charged_twice(
    tmp_path, module
):
    with federation(tmp_path, **LONG_ROUNDS) as built:
        started(built, NAMES, "--once")
        built.wait(lambda: in_round(built, "north-bank", 2), "round 2", timeout_s=90)
        os.kill(built.child(module), signal.SIGKILL)
        assert built.wait_for_end("server", timeout_s=150) == 0, built.tail("server")
        assert "started again" in built.output("server")
        for name in NAMES:
            assert built.wait_for_end(name) == 0, built.tail(name)
            assert_charges_are_exact(built, name)
        assert [line["round"] for line in built.events("round_done")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_coordinator_killed_with_all_its_processes_goes_on_from_its_checkpoint(tmp_path):
    with federation(tmp_path, **LONG_ROUNDS) as built:
        started(built, NAMES, "--once")
        built.wait(lambda: in_round(built, "north-bank", 3), "round 3", timeout_s=90)
        children = [built.child("fedfin.server.link"), built.child("fedfin.server.app")]
        built.kill("server")
        built.wait(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "its children end with it"
        )
        time.sleep(2)
        built.start_server()
        assert built.wait_for_end("server", timeout_s=150) == 0, built.tail("server")
        assert "resumed" in built.output("server")
        for name in NAMES:
            assert built.wait_for_end(name) == 0, built.tail(name)
            assert_charges_are_exact(built, name)
        assert [line["round"] for line in built.events("round_done")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_below_quorum_the_coordinator_waits_saying_for_whom_and_goes_on_when_they_return(tmp_path):
    with federation(tmp_path, **LONG_ROUNDS, cohort={"min_lenders": 3, "round_deadline_s": 8.0}) as built:
        started(built, NAMES, "--once")
        built.wait(lambda: in_round(built, "north-bank", 2), "round 2", timeout_s=90)
        for name in ("lane-micro", "harbour-micro"):
            built.kill(name)
        built.wait(
            lambda: "away: harbour-micro, lane-micro" in built.output("server"),
            "it says for whom",
            timeout_s=60,
        )
        for name in ("lane-micro", "harbour-micro"):
            built.start_lender(name, "--once")
        assert built.wait_for_end("server", timeout_s=150) == 0, built.tail("server")
        assert_charges_are_exact(built, "north-bank")


@pytest.mark.slow
def test_ctrl_c_stops_the_coordinator_and_its_processes_within_five_seconds(tmp_path):
    with federation(tmp_path, **MANY_LONG_ROUNDS) as built:
        started(built)
        built.wait(lambda: in_round(built, "north-bank", 2), "round 2", timeout_s=90)
        children = [built.child("fedfin.server.link"), built.child("fedfin.server.app")]
        asked = time.monotonic()
        built.processes["server"].send_signal(signal.SIGINT)
        assert built.wait_for_end("server") == 130
        assert time.monotonic() - asked < 5
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        assert "Traceback" not in built.output("server")


@pytest.mark.slow
def test_a_lender_without_budget_is_left_out_and_the_federation_goes_on_without_it(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        for name, rows in zip(NAMES, shares(3), strict=True):
            built.enrol(name, rows, epsilon_limit=0.5 if name == "lane-micro" else 3.0)
        for name in NAMES:
            built.start_lender(name)
        assert built.wait_for_end("server") == 0, built.tail("server")
        assert "budget" in built.output("server")
        assert all(line["cohort"] == ["harbour-micro", "north-bank"] for line in built.events("round_done"))
        # while it waited for its engineer it said no to the roster too
        (refusal,) = [said for said in built.journal("lane-micro", Refusal) if said.asked == "Propose"]
        assert refusal.rule == "BudgetSpentError"
        assert charged(built, "lane-micro") == []


@pytest.mark.slow
def test_a_job_without_privacy_runs_only_where_both_sides_say_so(tmp_path):
    with federation(tmp_path, privacy={"mode": "none"}) as built:
        built.start_server()
        for name, rows in zip(NAMES, shares(3), strict=True):
            built.enrol(name, rows, allow_no_privacy=name != "lane-micro")
        for name in NAMES:
            built.start_lender(name)
        assert built.wait_for_end("server") == 0, built.tail("server")
        assert all(line["cohort"] == ["harbour-micro", "north-bank"] for line in built.events("round_done"))
        assert "allow_no_privacy" in built.output("server")


@pytest.mark.slow
def test_a_lender_of_another_schema_is_refused_before_training(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        for name, rows in zip(NAMES, shares(3), strict=True):
            built.enrol(name, rows)
        schema = built.directory / "lane-micro" / "schema.yaml"
        schema.write_text(
            schema.read_text().replace("grid_cells: ", "grid_cells: 1", 1)
            if "grid_cells: " in schema.read_text()
            else schema.read_text().replace("description: ", "description: x", 1)
        )
        for name in NAMES:
            built.start_lender(name)
        assert built.wait_for_end("server") == 0, built.tail("server")
        assert "schema" in built.output("server")
        assert all("lane-micro" not in line["cohort"] for line in built.events("round_done"))


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_at_once(tmp_path):
    with federation(tmp_path) as built:
        host, _, port = built.address.rpartition(":")
        with contextlib.closing(socket.socket()) as holder:
            holder.bind((host, int(port)))
            holder.listen()
            done = built.fedfin("server", "--config", built.config, check=False)
        assert done.returncode == 1
        assert port in done.stderr
        assert "change address" in done.stderr


@pytest.mark.slow
def test_a_lender_that_trusts_another_authority_says_so_and_ends(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        built.enrol("north-bank", shares(1)[0])
        other = Federation(tmp_path / "other")
        other.found({})
        (built.directory / "north-bank" / "ca.pem").write_bytes((other.config.parent / "ca.pem").read_bytes())
        done = built.fedfin("client", "--config", built.bank("north-bank"), check=False)
        assert done.returncode == 1
        assert "authority" in done.stderr


@pytest.mark.slow
def test_a_lender_with_no_bad_loans_is_told_so_before_it_connects(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        built.enrol("north-bank", shares(1)[0])
        loans = built.directory / "north-bank" / "loans.csv"
        header, *rows = loans.read_text().splitlines()
        loans.write_text("\n".join([header, *(row for row in rows if row.endswith(",0"))]) + "\n")
        for command in (("client", "check"), ("client",)):
            done = built.fedfin(*command, "--config", built.bank("north-bank"), check=False)
            assert done.returncode == 1
            assert "bad" in done.stdout + done.stderr


@pytest.mark.slow
def test_tokens_are_refused_with_the_reason_over_the_wire(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        token = built.fedfin("server", "invite", "north-bank", "--config", built.config).stdout.strip()
        built.fedfin("client", "join", token, "--dir", built.directory / "first")
        for spoiled, word in (
            (token, "used"),
            (token[:40] + ("A" if token[40] != "A" else "B") + token[41:], "altered"),
            ("hello", "no invitation token"),
        ):
            done = built.fedfin("client", "join", spoiled, "--dir", built.directory / "second", check=False)
            assert done.returncode == 1
            assert word in done.stderr
            assert not (built.directory / "second").exists()
        other = Federation(tmp_path / "other")
        other.found({})
        foreign = other.fedfin("server", "invite", "north-bank", "--config", other.config).stdout.strip()
        from fedfin.invitation import Invitation

        parsed = Invitation.from_token(foreign)
        redirected = Invitation(parsed.name, built.address, parsed.fingerprint, parsed.secret).to_token()
        done = built.fedfin("client", "join", redirected, "--dir", built.directory / "second", check=False)
        assert done.returncode == 1
        assert "fingerprints" in done.stderr


@pytest.mark.slow
def test_two_processes_of_one_lender_are_not_started(tmp_path):
    with federation(tmp_path) as built:
        built.start_server()
        built.enrol("north-bank", shares(1)[0])
        built.start_lender("north-bank")
        built.wait(lambda: "connected" in built.output("north-bank"), "it is connected")
        done = built.fedfin("client", "--config", built.bank("north-bank"), check=False)
        assert done.returncode == 1
        assert "another `fedfin client`" in done.stderr


@pytest.mark.slow
def test_a_full_disk_at_a_lender_ends_no_other_lenders_round(tmp_path):
    """One lender cannot write a byte more: it says so, nothing leaves it, the others go on."""
    with federation(tmp_path, cohort={"start_timeout_s": 30.0}) as built:
        started(built, NAMES[:2])
        built.enrol("lane-micro", shares(3)[2])
        limited = [
            "bash", "-c", 'ulimit -f 4; exec "$0" -P -m fedfin client --config "$1"', sys.executable,
            str(built.bank("lane-micro")),
        ]  # fmt: skip
        with (built.directory / "lane-micro" / "client.out").open("ab") as out:
            built.processes["lane-micro"] = subprocess.Popen(
                limited, stdout=out, stderr=out, start_new_session=True
            )
        assert built.wait_for_end("server", timeout_s=150) == 0, built.tail("server")
        assert all("lane-micro" not in line["cohort"] for line in built.events("round_done"))
        assert "Traceback" not in built.output("lane-micro")

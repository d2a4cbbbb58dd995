"""The demo as anyone runs it first: whole, with its processes seen from outside."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(directory, *options):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fedfin", "demo", "--dir", str(directory), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def processes(directory):
    """Return the command lines of the processes that belong to this demo, by what they are."""
    found = {"link": [], "app": [], "client": []}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
            environment = (path.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"FLWR_HOME={directory}" not in environment:
            continue
        for kind, word in (
            ("client", " client "),
            ("link", "fedfin.server.link"),
            ("app", "fedfin.server.app"),
        ):
            if word in command:
                found[kind].append(command)
    return found


def wait_until(done, what, timeout_s=120):
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def test_the_demo_is_a_real_federation_and_ends_with_a_report(tmp_path):
    directory = tmp_path / "demo"
    demo = start(directory, "--json")
    wait_until(lambda: list(directory.glob("coordinator/runs/*/rounds.jsonl")), "the first round")
    seen = processes(directory)
    assert len(seen["client"]) == 8
    assert len(seen["link"]) == 1
    assert len(seen["app"]) == 1
    output, errors = demo.communicate(timeout=540)
    assert demo.returncode == 0, errors
    document = json.loads(output)
    assert (document["aggregation"], document["mode"], document["rounds"]) == ("secure", "shared", 30)
    assert [lender["kind"] for lender in document["lenders"]] == ["bank"] * 3 + ["small"] * 5
    assert all(lender["n_train"] == 90 for lender in document["lenders"][3:])
    assert document["epsilon"] == 3.0
    gains = [lender["auc"]["federated"] - lender["auc"]["alone"] for lender in document["lenders"][3:]]
    assert np.mean(gains) >= 0.02
    assert Path(document["run"], "model", "model.json").exists()
    report = (directory / "report.html").read_text()
    assert report.count("<svg") == 3
    judged = document["evaluation"]
    assert judged["lenders"] == 8, "a loan that trains and is held out by chance keeps no lender from judging"
    assert judged["figures"]["loans"]["value"] == pytest.approx(8 * 1336, abs=200)
    exact = document["lenders"][0]["auc"]["federated"]
    found = judged["figures"]["auroc"]
    assert abs(found["value"] - exact) < 5 * found["noise_error"] + 0.002
    assert json.loads(Path(document["run"], "metrics.json").read_text())["evaluations"] == [judged]
    assert "summed under secure aggregation" in report
    assert (
        "no more than 2 of the 8 lenders tell others their share, and at least 7 answer in each sum" in report
    )
    assert not re.search(r"(src|href)=[\"']https?:", report), "the report must open offline"
    for name in [lender["name"] for lender in document["lenders"]]:
        assert name in report
        private = directory / "lenders" / name
        assert all(key.stat().st_mode & 0o777 == 0o600 for key in (private / "keys").iterdir())
    assert processes(directory)["client"] == []
    the_evidence_holds(directory, document, tmp_path / "elsewhere")


def the_evidence_holds(directory, document, elsewhere):
    """The pack verifies in another place, a flipped byte is found, and every round can be done again."""
    shutil.copytree(directory / "evidence", elsewhere)
    trusted = json.loads(Path(document["run"], "run.json").read_text())["root_fingerprint"]
    assert fedfin("audit", "verify", elsewhere, "--trust", trusted).returncode == 0
    kept = sorted(elsewhere.rglob("transcripts/*"))
    others = sorted(path for path in elsewhere.rglob("*") if path.is_file() and path not in kept)
    for path in [*others, *kept[:: max(1, len(kept) // 5)]]:
        right = path.read_bytes()
        at = secrets.randbelow(len(right))
        path.write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
        wrong = fedfin("audit", "verify", elsewhere)
        assert wrong.returncode == 1, f"byte {at} of {path.name} was flipped"
        path.write_bytes(right)
    run = elsewhere / "run"
    model = json.loads((run / "run.json").read_text())["model"]
    for number in (1, document["rounds"]):  # the last does all before it again
        done = fedfin("audit", "replay", number, "--run", run, "--json")
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == document["rounds"]
    assert json.loads(done.stdout)["model"] == model


def fedfin(*arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "fedfin", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_three_lenders_are_summed_securely_and_two_in_clear_and_both_say_so(tmp_path):
    for lenders, said in (
        ("3", "Updates are summed under secure aggregation"),
        ("2", "With 2 lenders the coordinator sees each update by itself"),
    ):
        directory = tmp_path / lenders
        demo = start(directory, "--lenders", lenders, "--rounds", "2")
        output, errors = demo.communicate(timeout=250)
        assert demo.returncode == 0, errors
        printed = " ".join((output + errors).split())
        assert said in printed
        assert ("These lenders accept sums of 3" in printed) is (lenders == "3")
        summed = "summed under secure aggregation" in (directory / "report.html").read_text()
        assert summed is (lenders == "3")


def test_without_privacy_the_federation_comes_close_to_pooled_loans(tmp_path):
    demo = start(tmp_path / "demo", "--json", "--no-privacy", "--seed", "1")
    output, errors = demo.communicate(timeout=400)
    assert demo.returncode == 0, errors
    lenders = json.loads(output)["lenders"]
    assert np.mean([lender["auc"]["federated"] - lender["auc"]["alone"] for lender in lenders[3:]]) >= 0.08
    assert lenders[0]["auc"]["pooled"] - lenders[0]["auc"]["federated"] <= 0.01


def test_the_demo_stops_on_ctrl_c_and_leaves_no_process(tmp_path):
    directory = tmp_path / "demo"
    demo = start(directory, "--lenders", "2")
    wait_until(lambda: list(directory.glob("coordinator/runs/*/rounds.jsonl")), "the first round")
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=20)
    assert demo.returncode == 130
    assert processes(directory)["client"] == []

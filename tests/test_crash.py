"""A lender killed at any write of a job, started again, has spent what the uninterrupted one has: no more, no less.

A real lender in a real process: a job from its proposal to its end, with a coordinator that asks again after every
death for what it did not get, and for the last that it did.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from crashing import build_shim

CYCLE = textwrap.dedent(
    """
    import ctypes, hashlib, json, os, shutil, signal, sys
    from pathlib import Path

    import numpy as np

    from fedfin.privacy.ledger import Ledger
    from fedfin.update import Accepted, AskHistogram, Done, Finish, Histogram, Refused, Train, Update, decode, encode
    from lenders import JOB, lender_folder, open_lender, proposal, train_request

    shim, scratch, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # here: the coordinator whose log these lenders are shown is this process's
    template = lender_folder(scratch / "template").parent
    crash = ctypes.CDLL(shim)
    STAGES = ("proposal", "bins", "round 1", "round 2", "round 3", "end")
    ANSWER = dict(zip(STAGES, (Accepted, Histogram, Update, Update, Update, Done)))

    def question(stage, got):
        if stage == "proposal":
            return proposal()
        if stage == "bins":
            return encode(AskHistogram(JOB))
        if stage != "end":
            return train_request(got["bins"], int(stage[6:]))
        last = decode(train_request(got["bins"], 3), Train)
        return encode(Finish(JOB, "completed", 3, last.bins, last.fingerprint, last.weights))

    def run(bank, mailbox):
        '''Ask for the last answer that arrived, and for all that did not; an answer's file is its arrival.'''
        got = {stage: (mailbox / stage).read_bytes() for stage in STAGES if (mailbox / stage).exists()}
        lender = open_lender(bank)
        # after the last round it only asks for the end: a job that is over answers no round
        for stage in STAGES[max(len(got) - 1, 0) if len(got) < 5 else 5:]:
            answer = lender.answer(question(stage, got))
            decoded = decode(answer, ANSWER[stage], Refused)
            assert isinstance(decoded, ANSWER[stage]), f"{stage} was refused: {decoded}"
            assert got.setdefault(stage, answer) == answer, f"{stage} was answered twice, differently"
            (mailbox / "arriving").write_bytes(answer)
            os.replace(mailbox / "arriving", mailbox / stage)
        lender.close()

    def state(bank):
        with Ledger(bank.parent / "ledger.db") as ledger:
            (snapshot,) = ledger.snapshots()
            spent, reserved = ledger.spent(snapshot, 1e-5), ledger.reserved(snapshot, 1e-5)
            entries = [(e.kind, e.job_id, e.stage, repr(e.events)) for e in ledger.entries()]
            return repr((spent, reserved, entries, ledger.account(snapshot)))

    def left(bank):
        '''Which stages the ledger has charged, with the digests of what left.'''
        if not (bank.parent / "ledger.db").exists():
            return {}
        with Ledger(bank.parent / "ledger.db") as ledger:
            return {e.stage: e.release_digest for e in ledger.entries() if e.kind == "commit"}

    def in_a_process(work):
        child = os.fork()
        if child == 0:
            try:
                work()
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def fresh(name):
        folder, mailbox = scratch / name / "bank", scratch / name / "mailbox"
        shutil.copytree(template, folder)
        mailbox.mkdir()
        return folder / "bank.yaml", mailbox

    whole, mailbox = fresh("whole")
    run(whole, mailbox)  # here: what it computes is not computed again in every child
    expected = state(whole)
    bank, mailbox = fresh("counted")
    crash.crash_arm(str(bank.parent).encode(), ctypes.c_long(0))
    run(bank, mailbox)
    num_writes = crash.crash_disarm()
    outcome = {"writes": num_writes, "killed": 0, "tried": 0, "wrong": []}
    for kill_at in range(1, num_writes + 1, stride):
        bank, mailbox = fresh(str(kill_at))

        def killed():
            crash.crash_arm(str(bank.parent).encode(), ctypes.c_long(kill_at))
            run(bank, mailbox)

        status = in_a_process(killed)
        outcome["tried"] += 1
        outcome["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        arrived = {stage: hashlib.sha256((mailbox / stage).read_bytes()).hexdigest()
                   for stage in STAGES[1:-1] if (mailbox / stage).exists()}
        charged = left(bank)
        # all that arrived was charged, and at most the stage in progress without having arrived
        if {stage: charged.get(stage) for stage in arrived} != arrived or len(charged) > len(arrived) + 1:
            outcome["wrong"].append(["forgot", kill_at])
        if in_a_process(lambda: run(bank, mailbox)) != 0:
            outcome["wrong"].append(["stuck", kill_at])
        elif state(bank) != expected or not (mailbox / "end").exists():
            outcome["wrong"].append(["total", kill_at])
        shutil.rmtree(bank.parent.parent)
    print(json.dumps(outcome))
    """
)


MEMORY = Path("/dev/shm")  # a kill loses nothing that the kernel has: no disk needs to be waited for


@pytest.fixture
def folder(tmp_path):
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as name:
        yield Path(name)


def killed_at_writes(folder, *, stride):
    shim = build_shim(folder)
    (folder / "scratch").mkdir()
    here = Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, "-c", CYCLE, shim, folder / "scratch", str(stride)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    outcome = json.loads(finished.stdout)
    assert outcome["wrong"] == [], finished.stderr
    assert outcome["killed"] == outcome["tried"] == len(range(1, outcome["writes"] + 1, stride))
    return outcome


def test_killed_at_some_writes_of_a_job_the_totals_are_those_of_the_uninterrupted_run(folder):
    assert killed_at_writes(folder, stride=29)["tried"] >= 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_every_write_of_a_job_the_totals_are_those_of_the_uninterrupted_run(folder):
    assert killed_at_writes(folder, stride=1)["tried"] >= 250

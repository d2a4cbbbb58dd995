"""Tampering with the evidence of a running federation: the lenders find it at the next question, and nothing leaves.

Four real lender processes, TLS and Flower's SuperLink, one federation. In each test its coordinator tampers in exactly
one way, and the test ends with an honest job: the lenders are none the worse for what they were shown. The last one
ends without: it leaves the coordinator's own database with a roster that nobody goes by.
"""

import json
import shutil
import sqlite3

import pytest
from federation import SECURE_JOB, federation, shares
from forking import install, kept_by

from fedfin.audit.checkpoint import NoteKey, parse_checkpoint, verify_note
from fedfin.audit.events import Event, Exchange, Fork, Incident, Refusal
from fedfin.audit.sealing import seal_run
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import own_row, pending, pinned
from fedfin.identity import key_fingerprint
from fedfin.roster_chain import RosterChain, SignedRoster
from fedfin.roster_versions import RosterVersion, sign_version
from fedfin.server.founding import open_federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = ("bank-a", "bank-b", "bank-c", "bank-d")
SHOWN = "bank-d"  # who is shown another log; with three of four the others' rounds and logs are whole
OTHERS = NAMES[:3]
INVENTED = "made-up"
POLICY = {"min_cohort": 3, "epsilon_limit": 100.0}
JOB = {
    "training": {"rounds": 3, "local_steps": 1, "learning_rate": 0.1},
    "evaluation": {"times": 0},
}
LEFT = {"masked", "released"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A federation whose roster all members signed; an honest job is done."""
    with federation(tmp_path_factory.mktemp("evidence"), SECURE_JOB, **JOB) as founded:
        founded.start_server()
        for name, rows in zip(NAMES, shares(len(NAMES)), strict=True):
            founded.enrol(name, rows, **POLICY)
        for name in NAMES:
            founded.start_lender(name)
        assert founded.wait_for_end("server", timeout_s=240) == 0, founded.tail("server")
        yield founded


def run_job(built, *options):
    """Run a job to its end, an unfinished one where there is one; return its id and its rounds' cohorts."""
    built.start_server(*options)
    assert built.wait_for_end("server", timeout_s=240) == 0, built.tail("server")
    run = last_run(built)
    return run.name, [line["cohort"] for line in lines_of(run) if line["event"] == "round_done"]


def last_run(built):
    paths = built.config.parent.glob("runs/*/rounds.jsonl")
    return max(paths, key=lambda path: path.stat().st_mtime).parent


def lines_of(run):
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def verify(built, path, *options):
    """Run `fedfin audit verify` as an auditor who knows the root's fingerprint."""
    trust = open_federation(built.config).identity().statement.root
    done = built.fedfin("audit", "verify", path, "--trust", trust, "--json", *options, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 1)
    return found


def key_of(built, name):
    """Return the fingerprint of a lender's identity key, which owns its log."""
    return key_fingerprint(LenderFolder(built.bank(name)).keys().identity.public_key())


def of_job(built, name, job, kind: type[Event]):
    return [event for event in built.journal(name, kind) if event.job == job]


def left(built, name, job):
    """The stages of a job of which an answer left a lender."""
    return [event.stage for event in of_job(built, name, job, Exchange) if event.step in LEFT]


def status(built, name):
    return json.loads(built.fedfin("client", "status", "--config", built.bank(name), "--json").stdout)


def clear(built, name):
    command = ("client", "clear-fork", "--config", built.bank(name), "--yes", "--json")
    return json.loads(built.fedfin(*command).stdout)["cleared"]


def key_of_the_coordinator(built, name):
    folder = LenderFolder(built.bank(name))
    return NoteKey("signer", folder.coordinator().public_key())


def require_whole(built):
    """Run an honest job: all lenders take part, and an auditor finds nothing wrong."""
    job, cohorts = run_job(built, "--new-job")
    assert cohorts == [list(NAMES)] * 3
    found = verify(built, built.config.parent / "runs" / job)
    assert found["ok"], found["wrong"]
    assert set(found["log"]["cosigned"]["by"]) == set(NAMES)
    for name in NAMES:
        assert left(built, name, job) == ["bins", "round 1", "round 2", "round 3"]
        told = status(built, name)
        assert told["log"]["forks"] == []
        # its own log, with what it saw and cleared in it
        assert verify(built, built.directory / name, "--trust", key_of(built, name))["ok"]


def shown_to_one(built, directory, how):
    """Run a job in whose second round SHOWN is shown another log; return the job and the note."""
    before = built.journal(SHOWN, Refusal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(install(directory, SHOWN, 2, how)))
        job, cohorts = run_job(built, "--new-job")
    # the others' rounds go on without it
    assert cohorts == [list(NAMES), list(OTHERS), list(OTHERS)]
    refused = built.journal(SHOWN, Refusal)[len(before) :]
    assert (refused[0].job, refused[0].asked) == (job, "Mask")
    assert {event.rule for event in refused} == {"fork"}  # from then on it answers nothing
    # nothing of its vector of that round left
    assert left(built, SHOWN, job) == ["bins", "round 1"]
    for name in OTHERS:
        assert left(built, name, job) == ["bins", "round 1", "round 2", "round 3"]
        assert of_job(built, name, job, Refusal) == []
        assert not kept_by(built.directory / name)
    (incident,) = of_job(built, SHOWN, job, Incident)
    assert (incident.kind, incident.member) == ("integrity", "coordinator")
    return job, (directory / "shown.note").read_text()


def require_said_and_cleared(built):
    """The engineer reads of it in the status, and lets the lender, which still runs, answer again."""
    (path,) = status(built, SHOWN)["log"]["forks"]
    assert "cannot be its own" in built.fedfin("client", "status", "--config", built.bank(SHOWN)).stdout
    assert [one["file"] for one in clear(built, SHOWN)] == [path]
    assert status(built, SHOWN)["log"]["forks"] == []


def test_a_fork_shown_to_one_lender_is_refused_and_proven(built, tmp_path):
    job, note = shown_to_one(built, tmp_path / "hooks", "fork")
    kept = kept_by(built.directory / SHOWN)[-1]
    assert (kept["job"], kept["question"], kept["shown"]) == (job, "Mask", note)
    fork = built.journal(SHOWN, Fork)[-1]
    assert (fork.held, fork.shown) == (kept["held"], note)
    # the coordinator's own signature is under both
    key = key_of_the_coordinator(built, SHOWN)
    origin = parse_checkpoint(note).origin
    for signed in (fork.held, fork.shown):
        verify_note(signed, {origin: key})
    # and an auditor who is handed the note finds that the coordinator's log is another one
    shown = tmp_path / "shown.note"
    shown.write_text(note)
    assert not verify(built, built.config.parent, "--checkpoint", shown)["ok"]
    require_said_and_cleared(built)
    require_whole(built)


def test_a_checkpoint_signed_by_another_key_is_refused(built, tmp_path):
    job, note = shown_to_one(built, tmp_path / "hooks", "another_key")
    kept = kept_by(built.directory / SHOWN)[-1]
    assert (kept["job"], kept["question"], kept["shown"]) == (job, "Mask", note)
    # what it held before is the coordinator's, and goes on to count
    verify_note(kept["held"], {parse_checkpoint(note).origin: key_of_the_coordinator(built, SHOWN)})
    require_said_and_cleared(built)
    require_whole(built)


def stop_after_the_first_round(built):
    """Begin a job, and stop the coordinator when a round is done."""
    known = set(built.config.parent.glob("runs/*"))

    def is_done():
        run = last_run(built)
        return run not in known and any(line["event"] == "round_done" for line in lines_of(run))

    built.start_server("--new-job")
    built.wait(is_done, "the first round is done", timeout_s=120)
    built.processes["server"].terminate()
    built.wait_for_end("server")


def copy_log(source, target):
    """Copy a log as an operator does with the database's own backup."""
    with sqlite3.connect(f"file:{source}?mode=ro", uri=True) as log, sqlite3.connect(target) as copy:
        log.backup(copy)
    log.close()
    copy.close()


def put_back(copy, path):
    for part in ("", "-wal", "-shm"):
        path.with_name(path.name + part).unlink(missing_ok=True)
    shutil.copy(copy, path)


def test_a_log_restored_from_before_the_second_round_stops_the_coordinator(built, tmp_path):
    log, old, newest = built.config.parent / "audit.db", tmp_path / "old.db", tmp_path / "newest.db"
    stop_after_the_first_round(built)
    copy_log(log, old)
    job, cohorts = run_job(built)
    assert cohorts == [list(NAMES)] * 3
    copy_log(log, newest)
    before = {name: len(built.journal(name, Exchange)) for name in NAMES}
    put_back(old, log)
    built.start_server("--new-job")
    assert built.wait_for_end("server", timeout_s=120) == 1
    assert "restored from an older copy" in " ".join(built.tail("server").split())
    for name in NAMES:
        # the first question was refused, nothing left, and everyone holds the proof
        refused = built.journal(name, Refusal)[-1]
        assert (refused.asked, refused.rule) == ("Propose", "fork")
        assert len(built.journal(name, Exchange)) == before[name]
        assert kept_by(built.directory / name)[-1]["job"] == refused.job != job
        told = verify(built, built.config.parent, "--checkpoint", built.directory / name)["wrong"]["what"]
        assert "held elsewhere" in told
    # the operator does what it was told to, the engineers clear it, and nobody has to start again
    put_back(newest, log)
    for name in NAMES:
        assert len(clear(built, name)) == 1
    require_whole(built)


def founded_alone(built, members):
    """Return a roster's next version with these members, signed by the coordinator and by who was invented alone."""
    coordinator = open_federation(built.config)
    identity, store = coordinator.identity(), coordinator.store
    last = store.versions.complete()[-1].version
    keys = LenderFolder(members / "bank.yaml").keys()
    version = RosterVersion(
        federation=last.federation,
        number=last.number + 1,
        previous=last.digest(),
        coordinator=last.coordinator,
        members=dict(sorted({**last.members, INVENTED: own_row(INVENTED, keys)}.items())),
    )
    own = {INVENTED: sign_version(version, keys.identity)}
    return SignedRoster(version, sign_version(version, identity.key), own)


def test_a_roster_with_an_invented_lender_is_gone_by_by_nobody(built):
    coordinator = open_federation(built.config)
    store, identity = coordinator.store, coordinator.identity()
    run = last_run(built)
    agreed = {name: pinned(LenderFolder(built.bank(name))) for name in NAMES}
    ledgers = {name: status(built, name)["snapshots"] for name in NAMES}
    # it is let in as any lender is, and its row is signed by no other
    built.start_server("--enrol-only")
    built.enrol(INVENTED, shares(5)[4], **POLICY)
    built.processes["server"].terminate()
    built.wait_for_end("server")
    signed = founded_alone(built, built.directory / INVENTED)
    store.versions.add(signed)
    before = {name: len(built.journal(name, Refusal)) for name in NAMES}
    built.start_lender(INVENTED)
    built.start_server("--new-job")
    assert built.wait_for_end("server", timeout_s=120) == 1
    said = " ".join(built.tail("server").split())
    for name in NAMES:
        (refused,) = built.journal(name, Refusal)[before[name] :]
        assert (refused.asked, refused.rule) == ("Propose", "roster_quorum")
        assert f"{name}: roster_quorum" in said
        # no key that it went by is another now, nothing is to be signed, nothing reserved and nothing left
        folder = LenderFolder(built.bank(name))
        assert (pinned(folder), pending(folder)) == (agreed[name], None)
        assert left(built, name, refused.job) == []
        assert status(built, name)["snapshots"] == ledgers[name]
        assert status(built, name)["log"]["forks"] == []
    # a coordinator that seals it into a run all the same is found out by any auditor
    forged = shutil.copytree(run, built.directory / "forged")
    chain = RosterChain(identity.statement, store.versions.complete())
    (forged / "roster.json").write_text(chain.to_json())
    seal_run(forged, run.name, identity.key)
    told = verify(built, forged)["wrong"]["what"]
    assert told.startswith("roster.json: ")
    assert "lacks signatures" in told
    assert verify(built, run)["ok"]

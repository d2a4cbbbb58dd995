"""What may be done to a federation's evidence, and that `fedfin audit verify` names it with exit status 1."""

import json
import shutil
import sqlite3

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from evidence_house import JOB, MEMBERS, MODELS, PLAN, consent, cosigned, federation_log, run_directory
from rosters import authority, coordinator, founded, keys_of, signed, version
from typer.testing import CliRunner

from fedfin.audit.events import CheckpointSeen, Consent, Receipt, RoundCompleted, Service
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.audit.sealing import seal_run
from fedfin.cli import app
from fedfin.identity import create_identity_key
from fedfin.roster_chain import RosterChain

ROOT = authority().fingerprint


def verify(path, *options, trust=ROOT):
    result = CliRunner().invoke(app, ["audit", "verify", str(path), "--json", "--trust", trust, *options])
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document.get("ok") else 1)
    return document


def wrong(path, *options, trust=ROOT):
    """What verify says of evidence that its owner itself changed, and sealed again."""
    if (path / "run.json").exists():
        seal_run(path, JOB, coordinator().key)
    document = verify(path, *options, trust=trust)
    assert not document["ok"]
    return document["wrong"]["what"]


def tampered(path, *statements):
    """Change a log as someone who owns the file can: the triggers that refuse it are put back afterwards."""
    with sqlite3.connect(path) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)
        for _, sql in triggers:
            db.execute(sql)
    db.close()


@pytest.fixture
def fed(tmp_path):
    """The coordinator's folder."""
    return federation_log(tmp_path / "fed")


@pytest.fixture
def run(tmp_path, fed):
    return run_directory(tmp_path, fed)


def lender_log(folder, *notes):
    """A lender's log that holds checkpoints of the coordinator's."""
    folder.mkdir()
    key = keys_of("city-bank").identity
    with AuditLog.create(
        folder / "audit.db", origin="fedfin/test/lender/city-bank", actor="city-bank", key=key, side="lender"
    ) as log:
        for note in notes:
            log.append(CheckpointSeen(member="coordinator", size=1, note=note, cosigned=True))
    return folder


def test_what_nobody_touched_passes(fed, run):
    document = verify(run)
    assert document["log"]["cosigned"]["by"] == list(MEMBERS)
    assert {check["what"] for check in document["checked"]} >= {
        "roster",
        "tree",
        "signatures",
        "owner",
        "run",
    }
    assert verify(fed, trust=founded(MEMBERS).statement.fingerprint)["ok"]


def test_a_file_of_a_sealed_run(run):
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        told = verify(run)["wrong"]
        assert path.name in told["what"], told
        path.write_bytes(content)
    (run / "more.txt").write_text("x")
    assert "more.txt was added" in verify(run)["wrong"]["what"]
    (run / "more.txt").unlink()
    (run / "manifest.json").unlink()
    assert "not sealed" in verify(run)["wrong"]["what"]


def test_a_run_that_somebody_else_sealed(tmp_path, fed):
    told = verify(run_directory(tmp_path, fed, key=create_identity_key()))["wrong"]
    assert "not the coordinator's" in told["what"]


def test_the_root_s_fingerprint_leads_to_the_coordinator_s_key_in_its_own_folder(fed):
    assert "not among those trusted" in verify(fed)["wrong"]["what"]
    (fed / "ca.pem").write_bytes(authority().root.public_bytes(Encoding.PEM))
    (fed / "coordinator.json").write_text(coordinator().statement.to_json())
    assert verify(fed)["ok"]
    text = (fed / "coordinator.json").read_text()
    (fed / "coordinator.json").write_text(text.replace(coordinator().statement.key, "0" * 64))
    assert "not signed by the federation's authority" in verify(fed)["wrong"]["what"]


def test_an_entry_that_was_changed(run):
    tampered(
        run / "audit.db",
        "UPDATE body SET content = CAST(replace(content, 'north', 'south') AS BLOB) WHERE idx = 3",
    )
    assert "entry 3" in wrong(run)


def test_an_entry_that_was_removed(run):
    tampered(run / "audit.db", "DELETE FROM body WHERE idx = 4", "DELETE FROM entry WHERE idx = 4")
    assert "entry 4" in wrong(run)


def test_entries_that_were_reordered(run):
    swap = "UPDATE {0} SET idx = CASE idx WHEN 2 THEN 1002 ELSE 1003 END WHERE idx IN (2, 3)"
    back = "UPDATE {0} SET idx = 1005 - idx WHERE idx > 1000"
    tampered(run / "audit.db", *(text.format(table) for table in ("body", "entry") for text in (swap, back)))
    assert "tree" in wrong(run) or "entry 2" in wrong(run) or "hash" in wrong(run)


def test_a_tail_that_was_cut_off(run):
    with open_log(run / "audit.db") as log:
        last = log.size - 1
    tampered(
        run / "audit.db", f"DELETE FROM body WHERE idx = {last}", f"DELETE FROM entry WHERE idx = {last}"
    )
    assert wrong(run)


def test_a_database_that_was_restored_from_yesterday(fed, tmp_path):
    yesterday = (fed / "audit.db").read_bytes()
    with AuditLog.open(fed / "audit.db", key=coordinator().key) as log:
        log.append(Service(action="stopped", release="0.1.0"))
        held = cosigned(log)
    (fed / "audit.db").write_bytes(yesterday)
    own = founded(MEMBERS).statement.fingerprint
    assert verify(fed, trust=own)["ok"]  # by itself it looks right: only what others hold shows it
    lender = lender_log(tmp_path / "city-bank", held)
    assert "held elsewhere" in wrong(fed, "--checkpoint", str(lender), trust=own)


def test_a_fork_that_one_lender_was_shown(fed, tmp_path):
    shutil.copytree(fed, tmp_path / "other")
    notes = []
    for folder, action in ((fed, "stopped"), (tmp_path / "other", "started")):
        with AuditLog.open(folder / "audit.db", key=coordinator().key) as log:
            log.append(Service(action=action, release="0.1.0"))
            notes.append(log.checkpoint())
    shown = tmp_path / "shown.note"
    shown.write_text(notes[1])
    told = wrong(fed, "--checkpoint", str(shown), trust=founded(MEMBERS).statement.fingerprint)
    assert "another root" in told


def test_a_checkpoint_by_another_key(fed, run, tmp_path):
    shutil.copytree(fed, tmp_path / "forged")
    (tmp_path / "forged" / "audit.db").unlink()
    with AuditLog.create(
        tmp_path / "forged" / "audit.db",
        origin="fedfin/test/coordinator",
        actor="coordinator",
        key=create_identity_key(),
        side="coordinator",
    ) as log:
        log.append(Service(action="started", release="0.1.0"))
        note = log.checkpoint()
    tampered(run / "audit.db", f"INSERT INTO checkpoint VALUES (1, '{note}')")
    assert "not signed by the key" in wrong(run)
    shutil.copy(tmp_path / "forged" / "audit.db", run / "audit.db")
    assert "not among those trusted" in wrong(run) or "cosigned" in wrong(run)


def test_a_roster_with_an_invented_lender(tmp_path, fed):
    first = founded(MEMBERS)
    invented = signed(version((*MEMBERS, "made-up"), first.last), ("made-up",))
    run = run_directory(tmp_path, fed, roster=RosterChain(first.statement, (*first.versions, invented)))
    told = wrong(run)
    assert "roster.json" in told
    assert "lacks signatures" in told


def test_a_consent_of_an_invented_lender_or_by_another_key(tmp_path):
    for number, (name, key, told) in enumerate(
        [
            ("made-up", keys_of("made-up").identity, "in no version of the roster"),
            ("city-bank", create_identity_key(), "not signed by its identity key"),
        ]
    ):
        fed = federation_log(tmp_path / f"fed{number}", extra=(consent(name, key=key),))
        run = run_directory(tmp_path / str(number), fed)
        assert told in wrong(run)


def test_an_answer_that_nobody_signed(tmp_path):
    for number, answer in enumerate(
        (
            Consent(job=JOB, member="city-bank", plan=PLAN.digest(), decision="accepted"),
            Consent(job=JOB, member="made-up", plan=PLAN.digest(), decision="accepted"),
            Receipt(job=JOB, member="city-bank", status="completed", model=MODELS[2]),
        )
    ):
        run = run_directory(
            tmp_path / str(number), federation_log(tmp_path / f"fed{number}", extra=(answer,))
        )
        assert "not signed by its identity key" in wrong(run) or "in no version" in wrong(run)


@pytest.mark.parametrize("consented", [False, True])
def test_an_invented_lender_in_a_round_s_sum(tmp_path, consented):
    cohort = (*MEMBERS, "made-up")
    answers = (consent("made-up"),) if consented else ()
    invented = RoundCompleted(
        job=JOB, round=3, cohort=cohort, seconds="1.5", model_before=MODELS[2], model_after=MODELS[2]
    )
    run = run_directory(tmp_path, federation_log(tmp_path / "fed", extra=answers))
    with AuditLog.open(run / "audit.db", key=coordinator().key) as log:
        log.append(invented)
        cosigned(log)
    with (run / "rounds.jsonl").open("a") as rounds:
        stated = {"event": "round_done", "round": 3, "cohort": list(cohort), "missing": {}, "seconds": 1.5}
        rounds.write(json.dumps(stated) + "\n")
    told = wrong(run)
    assert "made-up" in told
    assert "no consent" in told or "in no version of the roster" in told


def test_a_member_in_a_round_s_sum_that_never_agreed_to_the_job(tmp_path):
    run = run_directory(tmp_path, federation_log(tmp_path / "fed", members=MEMBERS[:2]))
    assert "north-bank is in the sum of round 1, and the log holds no consent" in wrong(run)


def test_rounds_that_no_quorum_saw(tmp_path):
    run = run_directory(tmp_path, federation_log(tmp_path / "fed"))
    with AuditLog.open(run / "audit.db", key=coordinator().key) as log:
        for number in (3, 4):
            log.append(
                RoundCompleted(
                    job=JOB,
                    round=number,
                    cohort=MEMBERS,
                    seconds="1.5",
                    model_before=MODELS[2],
                    model_after=MODELS[2],
                )
            )
        log.checkpoint()
    with (run / "rounds.jsonl").open("a") as rounds:
        for number in (3, 4):
            stated = {
                "event": "round_done",
                "round": number,
                "cohort": list(MEMBERS),
                "missing": {},
                "seconds": 1.5,
            }
            rounds.write(json.dumps(stated) + "\n")
    # the last round is seen with the job's end, or by the next job
    assert "no checkpoint that a quorum of the members cosigned covers round 3" in wrong(run)


def test_a_run_whose_roster_was_taken_away_by_its_owner(run):
    for name in ("roster.json", "ca.pem"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        assert "has no signed roster" in wrong(run, trust=founded(MEMBERS).statement.fingerprint)
        (run / name).write_bytes(content)


def test_rounds_that_name_other_lenders_than_the_log(run):
    lines = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(
        lines.replace('"north-bank"], "missing": {}', '"south-bank"], "missing": {}')
    )
    assert "name different lenders in round 1" in wrong(run)
    (run / "rounds.jsonl").write_text(
        lines.replace('"missing": {}', '"missing": {"south-bank": "no answer"}')
    )
    assert "name different lenders in round 1" in wrong(run)


def test_too_few_cosignatures(tmp_path):
    fed = federation_log(tmp_path / "fed", cosigners=MEMBERS[:2])
    assert "cosigned by 3 of the 3" in wrong(run_directory(tmp_path, fed))


def test_another_federation(run):
    assert "the roster is of the federation" in wrong(run, trust="0" * 64)


def test_files_of_a_run_that_say_something_else_than_the_log(run):
    lines = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(lines.replace('"round": 2', '"round": 7'))
    assert "round" in wrong(run)
    (run / "rounds.jsonl").write_text(lines)
    (run / "audit.db").unlink()
    assert "has no log" in wrong(run)


def test_a_model_that_was_exchanged_between_two_rounds(tmp_path):
    exchanged = RoundCompleted(
        job=JOB, round=3, cohort=MEMBERS, seconds="1", model_before="0" * 64, model_after="1" * 64
    )
    fed = federation_log(tmp_path / "fed")
    with AuditLog.open(fed / "audit.db", key=coordinator().key) as log:
        log.append(exchanged)
        cosigned(log)
    assert "round 3 did not begin with" in wrong(run_directory(tmp_path, fed))

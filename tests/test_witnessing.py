"""Lenders witness the coordinator's log: forks, rewinds and foreign keys are found at the next question, and kept."""

import json
import shutil
import time

import numpy as np
import pytest
import rosters
from cryptography.hazmat.primitives.serialization import Encoding
from lender_log import logged
from lenders import ROOT, lender_folder, schema
from secure_house import Killed, hurry, job_of
from typer.testing import CliRunner
from witnessed_house import ORIGIN, WitnessedHouse

from fedfin.audit.checkpoint import NoteKey, cosign, parse_checkpoint, verify_note
from fedfin.audit.consents import verify_answer
from fedfin.audit.entry import canonical_json
from fedfin.audit.events import (
    CheckpointSeen,
    Clock,
    Consent,
    Event,
    Fork,
    Incident,
    PlanProposed,
    Policy,
    Receipt,
    Refusal,
    RoundCompleted,
)
from fedfin.audit.events import Seal as SealEvent
from fedfin.audit.log import AuditLog
from fedfin.audit.origins import COORDINATOR
from fedfin.audit.reading import open_log
from fedfin.audit.sealing import read_seal
from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.lender import Lender
from fedfin.client.status import status_of
from fedfin.client.witnessing import clear_forks, last_cosigned, open_forks
from fedfin.errors import AuditError, ConfigError
from fedfin.identity import create_identity_key
from fedfin.plan import JobPlan
from fedfin.privacy.sum_context import threshold_of
from fedfin.server.journal import Journal
from fedfin.server.log_status import log_status
from fedfin.server.sealing import seal_finished
from fedfin.update import Accepted, Done, Finish, Propose, Refused, decode, encode
from fedfin.witness import Shown, Witnessed

PLAN = JobPlan.model_validate(
    {
        "aggregation": "plain",
        "privacy": {"mode": "none"},
        "cohort": {"min_lenders": 1},
        "training": {"rounds": 1},
        "evaluation": {"times": 0},
    }
)


class Coordinator:
    """A log of the coordinator's and what it shows of it."""

    def __init__(self, path, key=None):
        self.key = key or rosters.coordinator().key
        self.log = AuditLog.create(path, origin=ORIGIN, actor=COORDINATOR, key=self.key, side="coordinator")

    def grow(self, number, mark="a"):
        self.log.append_many([Policy(digest=mark * 64)] * number)

    def shown(self, *sizes):
        note = self.log.checkpoint()
        size = parse_checkpoint(note).size
        return Shown(
            note, {old: self.log.consistency(old, size) for old in sizes}, 1_700_000_000_000
        ).to_json()


def propose(job="job-1", witness=""):
    return encode(Propose(job, PLAN.model_dump_json(), schema().fingerprint(), witness=witness))


@pytest.fixture
def folder(tmp_path):
    return LenderFolder(lender_folder(tmp_path / "bank", allow_no_privacy=True))


@pytest.fixture
def lender(folder):
    opened = Lender(folder, lambda _: None)
    yield opened
    opened.close()


@pytest.fixture
def honest(tmp_path):
    made = Coordinator(tmp_path / "coordinator.db")
    made.grow(5)
    yield made
    made.log.close()


def taken(lender, data):
    """The answer, and what came with it."""
    answer = decode(lender.answer(data), Accepted, Refused)
    return answer, Witnessed.from_json(answer.witness)


def cosigned(directory):
    """What the lender says in its status."""
    if not (directory / "audit.db").exists():
        return None
    with open_log(directory / "audit.db") as log:
        return last_cosigned(log)


def witness_key(folder):
    return NoteKey("cosigner", folder.keys().witness.public_key())


# A lender alone


def test_a_checkpoint_is_checked_kept_and_then_cosigned(lender, folder, honest):
    answer, seen = taken(lender, propose(witness=honest.shown()))
    assert isinstance(answer, Accepted)
    before = time.time()
    note = honest.log.checkpoint() + seen.cosignature
    by = verify_note(note, {"north-bank": witness_key(folder)}).by
    assert before - 60 < by["north-bank"] <= before + 1
    (kept,) = logged(folder.directory, CheckpointSeen)
    assert (kept.member, kept.size, kept.cosigned) == (COORDINATOR, 5, True)
    # its own log is pinned to what it logged before the answer left
    own = parse_checkpoint(seen.checkpoint)
    assert own.size == folder.journal.log.size
    assert own.root == folder.journal.log.root()
    (clock,) = [event for event in logged(folder.directory, Clock) if event.source == "coordinator"]
    assert clock.offset_ms > 1_000_000


def test_a_grown_log_is_followed_by_its_proof_over_restarts(lender, folder, honest):
    for size, grown in ((5, 0), (9, 4), (9, 0), (200, 191)):
        honest.grow(grown) if grown else None
        held = [cosigned(folder.directory)] if cosigned(folder.directory) not in {None, size} else []
        answer, seen = taken(lender, propose(witness=honest.shown(*held)))
        assert isinstance(answer, Accepted)
        assert seen.cosignature
        assert cosigned(folder.directory) == size
        lender.close()
        lender = Lender(LenderFolder(folder.config_path), lambda _: None)
    assert [event.size for event in logged(folder.directory, CheckpointSeen)] == [5, 9, 200]
    lender.close()


def test_the_cosignature_is_not_made_where_the_checkpoint_cannot_be_kept(lender, honest, monkeypatch):
    def full(*_):
        raise AuditError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append_many", full)
        with pytest.raises(AuditError, match="the disk is full"):
            lender.answer(propose(witness=honest.shown()))
    assert taken(lender, propose(witness=honest.shown()))[1].cosignature


@pytest.mark.parametrize(
    "witness", ["", "{}", "[", json.dumps({"checkpoint": 1, "proofs": {}, "time_ms": 0})]
)
def test_a_question_without_a_checkpoint_is_refused_and_nothing_is_reserved(lender, folder, witness):
    answer = decode(lender.answer(propose(witness=witness)), Refused)
    assert answer.reason.startswith("witness: ")
    assert not (folder.jobs_path / "job-1").exists()
    assert logged(folder.directory, Refusal)[-1].rule == "witness"
    assert open_forks(folder) == ()


def test_without_a_proof_the_lender_says_what_it_holds_and_goes_on_with_one(lender, folder, honest):
    taken(lender, propose(witness=honest.shown()))
    honest.grow(3)
    answer, seen = taken(lender, propose("job-2", honest.shown()))
    assert answer.reason.startswith("witness: ")
    assert (seen.cosignature, parse_checkpoint(seen.held).size) == ("", 5)
    assert isinstance(taken(lender, propose("job-2", honest.shown(5)))[0], Accepted)


def forked(honest, path):
    """Another history from the third entry on."""
    other = Coordinator(path)
    other.grow(3)
    other.grow(7, "b")
    return other.shown(5)


def rewound(honest, path):
    """Yesterday's database, which went on in another way."""
    other = Coordinator(path)
    other.grow(2)
    other.grow(1, "c")
    return other.shown()


def same_size(honest, path):
    other = Coordinator(path)
    other.grow(5, "d")
    return other.shown()


def another_key(honest, path):
    other = Coordinator(path, create_identity_key())
    other.grow(6)
    return other.shown(5)


def spoilt_proof(honest, path):
    honest.grow(2)
    shown = json.loads(honest.shown(5))
    shown["proofs"]["5"][0] = "0" * 64
    return json.dumps(shown)


@pytest.mark.parametrize("show", [forked, rewound, same_size, another_key, spoilt_proof])
def test_what_cannot_be_the_log_it_knows_is_refused_kept_and_ends_all_answers(
    lender, folder, honest, tmp_path, show
):
    shown_before = honest.shown()
    taken(lender, propose(witness=shown_before))
    shown = show(honest, tmp_path / "other.db")
    answer, seen = taken(lender, propose("job-2", shown))
    assert answer.reason.startswith("fork: ")
    assert seen.cosignature == ""
    assert not (folder.jobs_path / "job-2").exists()
    # the proof is whole: both notes, both signed
    (path,) = open_forks(folder)
    kept = json.loads(path.read_text())
    assert kept["held"] == json.loads(shown_before)["checkpoint"]
    assert kept["shown"] == json.loads(shown)["checkpoint"]
    assert [event.held for event in logged(folder.directory, Fork)] == [kept["held"]]
    assert logged(folder.directory, Incident)[-1].kind == "integrity"
    # an honest question comes too late, after a restart too
    for opened in (lender, Lender(LenderFolder(folder.config_path), lambda _: None)):
        assert taken(opened, propose("job-3", honest.shown(5)))[0].reason.startswith("fork: ")
        opened.close()
    # until the engineer has looked
    (cleared,) = clear_forks(folder)
    assert cleared["file"] == str(path)
    assert open_forks(folder) == ()
    assert path.exists()
    again = Lender(LenderFolder(folder.config_path), lambda _: None)
    if show is another_key:  # what was cosigned last still holds
        assert isinstance(taken(again, propose("job-4", honest.shown(5)))[0], Accepted)
    else:  # goes on from what was shown
        assert isinstance(taken(again, propose("job-4", shown))[0], Accepted)
    again.close()
    with pytest.raises(ConfigError, match="nothing to clear"):
        clear_forks(folder)


@pytest.mark.parametrize("put_back", [True, False])
@pytest.mark.parametrize("restarted", [True, False])
def test_a_lender_goes_on_from_the_newest_copy_or_from_what_was_cleared(
    lender, folder, honest, tmp_path, put_back, restarted
):
    """Its operator puts the newest copy of the log back, or has none and goes on with the old one."""
    taken(lender, propose(witness=honest.shown()))
    old = Coordinator(tmp_path / "old.db")
    old.grow(3, "c")
    assert taken(lender, propose("job-2", old.shown()))[0].reason.startswith("fork: ")
    clear_forks(LenderFolder(folder.config_path))  # in another process
    assert cosigned(folder.directory) == 5
    if restarted:
        lender.close()
        lender = Lender(LenderFolder(folder.config_path), lambda _: None)
    honest.grow(2)
    old.grow(4)
    kept, other = (honest, old) if put_back else (old, honest)
    assert isinstance(taken(lender, propose("job-3", kept.shown(3, 5)))[0], Accepted)
    assert cosigned(folder.directory) == 7
    # one of the two, and then no longer the other
    other.grow(3)
    assert taken(lender, propose("job-4", other.shown(3, 5, 7)))[0].reason.startswith("fork: ")
    lender.close()


def test_an_older_checkpoint_that_was_cosigned_is_late_and_no_fork(lender, folder, honest):
    first = honest.shown()
    taken(lender, propose(witness=first))
    honest.grow(2)
    taken(lender, propose(witness=honest.shown(5)))
    answer, seen = taken(lender, propose("job-2", first))
    assert answer.reason.startswith("witness: ")
    assert parse_checkpoint(seen.held).size == 7
    assert open_forks(folder) == ()


def test_a_lender_without_the_coordinators_key_cosigns_nothing(lender, folder, honest):
    folder.statement_path.unlink()
    assert taken(lender, propose(witness=honest.shown()))[0].reason.startswith("witness: ")


def test_a_refusal_and_a_receipt_are_signed_by_the_lenders_identity_key(lender, folder, honest):
    key = folder.keys().identity.public_key()
    answer, seen = taken(lender, propose("job-1", honest.shown()))
    accepted = Consent(job="job-1", member="north-bank", plan=PLAN.digest(), decision="accepted")
    verify_answer(accepted.model_copy(update={"signature": seen.signature}), key, ORIGIN)
    with pytest.raises(AuditError, match="not signed by its identity key"):
        verify_answer(accepted.model_copy(update={"signature": seen.signature, "job": "job-2"}), key, ORIGIN)
    assert isinstance(answer, Accepted)
    end = Finish("job-1", "abandoned", 0, "", "", np.zeros(0, np.float32), witness=honest.shown())
    signature = Witnessed.from_json(decode(lender.answer(encode(end)), Done).witness).signature
    verify_answer(
        Receipt(job="job-1", member="north-bank", status="abandoned", signature=signature), key, ORIGIN
    )


def test_status_tells_of_a_fork_and_the_engineer_clears_it(lender, folder, honest, tmp_path):
    taken(lender, propose(witness=honest.shown()))
    command = ["client", "clear-fork", "--config", str(folder.config_path)]
    nothing = CliRunner().invoke(app, [*command, "--yes"])
    assert (nothing.exit_code, "nothing to clear" in " ".join(nothing.output.split())) == (1, True)
    taken(lender, propose("job-2", forked(honest, tmp_path / "other.db")))
    lender.close()
    found = status_of(folder.config_path)["log"]
    assert (found["cosigned"], len(found["forks"])) == (5, 1)
    shown = CliRunner().invoke(app, ["client", "status", "--config", str(folder.config_path)])
    assert "cannot be its own" in shown.output
    kept = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert len(kept["forks"]) == 1  # and it is still there
    assert CliRunner().invoke(app, command, input="n\n").exit_code == 1
    assert status_of(folder.config_path)["log"]["forks"] == found["forks"]
    assert CliRunner().invoke(app, command, input="y\n").exit_code == 0
    assert status_of(folder.config_path)["log"]["forks"] == []


def test_status_states_the_fingerprints_that_an_auditor_takes_from_a_lender(folder):
    statement = rosters.coordinator().statement
    folder.statement_path.write_text(statement.to_json())
    folder.root_path.write_bytes(rosters.authority().root.public_bytes(Encoding.PEM))
    trust = {"root": statement.root, "coordinator": statement.fingerprint}
    assert status_of(folder.config_path)["trust"] == trust
    shown = CliRunner().invoke(app, ["client", "status", "--config", str(folder.config_path)]).output
    assert [fingerprint in shown for fingerprint in trust.values()] == [True, True]

    folder.root_path.unlink()  # a folder that was made before there was one
    folder.statement_path.unlink()
    assert status_of(folder.config_path)["trust"] == {"root": None, "coordinator": None}


# A coordinator and its lenders


@pytest.fixture
def house(tmp_path, monkeypatch):
    hurry(monkeypatch)
    built = WitnessedHouse(tmp_path)
    yield built
    built.close()


@pytest.mark.parametrize("aggregation", ["secure", "plain"])
def test_a_job_is_logged_and_cosigned_by_all(house, aggregation):
    house.run(job_of(aggregation=aggregation, rounds=2, times=1))
    completed = house.entries(RoundCompleted)
    assert [event.round for event in completed] == [1, 2]
    assert completed[0].model_after == completed[1].model_before
    assert {event.member for event in house.entries(Consent)} == set(house.names)
    assert {event.member for event in house.entries(Receipt)} == set(house.names)
    assert len(house.entries(PlanProposed)) == 1
    for event in [*house.entries(Consent), *house.entries(Receipt)]:
        key = LenderFolder(house.banks[event.member]).keys().identity.public_key()
        verify_answer(event, key, ORIGIN)
    seen = house.entries(CheckpointSeen)
    assert {event.member for event in seen} == set(house.names)
    with house.log() as log:
        final = parse_checkpoint(log.final_checkpoint(threshold_of(len(house.names))))
        assert final.size == parse_checkpoint(log.latest_checkpoint()).size
        assert set(log.cosignatures(final.size)) == set(house.names)
    assert log_status(house.log_path, house.names) == {
        "entries": len(house.entries(Event)),
        "checkpoint": final.size,
        "cosigned_by": sorted(house.names),
        "quorum": threshold_of(len(house.names)),
        "final": final.size,
    }
    # nobody was shown anything else
    for bank in house.banks.values():
        assert cosigned(bank.parent) == final.size
    assert house.said("witness_doubted") == []


def test_a_finished_run_is_sealed_with_its_log_and_whatever_is_changed_in_it_is_named(house, tmp_path):
    plan = job_of(rounds=1, times=0)
    house.run(plan)
    (job,) = house.store.jobs()
    runs, root = tmp_path / "runs", tmp_path / "ca.pem"
    (runs / job.job_id / "model").mkdir(parents=True)
    (runs / job.job_id / "model" / "model.json").write_text("{}")
    root.write_bytes(ROOT)
    with house.log() as log:
        journal = Journal(log)
        assert seal_finished(runs, root, house.store, rosters.coordinator(), journal) == (job.job_id,)
        assert seal_finished(runs, root, house.store, rosters.coordinator(), journal) == ()
    run = runs / job.job_id
    seal = read_seal(run)
    assert (seal.job, seal.signed_by) == (job.job_id, rosters.coordinator().statement.fingerprint)
    assert {path.name for path in run.iterdir()} == {
        "audit.db",
        "ca.pem",
        "manifest.json",
        "model",
        "roster.json",
    }
    with open_log(run / "audit.db") as copy:
        assert not copy.unmerged
        assert copy.latest_checkpoint() == copy.note(copy.size)
    assert [event.run for event in house.entries(SealEvent)] == [job.job_id]
    for change, name in (
        (lambda: (run / "model" / "model.json").write_text("[]"), "model/model.json"),
        (lambda: (run / "more.txt").write_text("x"), "more.txt"),
        ((run / "roster.json").unlink, "roster.json"),
        (lambda: (run / "manifest.json").write_bytes(b"{}"), "manifest.json"),
    ):
        kept = shutil.copytree(run, tmp_path / f"kept-{name.replace('/', '-')}")
        change()
        with pytest.raises(AuditError, match=name):
            read_seal(run)
        shutil.rmtree(run)
        shutil.copytree(kept, run)
    body = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_bytes(canonical_json({**body, "job": "another"}) + b"\n")
    with pytest.raises(AuditError, match="the signature of manifest"):
        read_seal(run)


def test_a_log_is_final_at_its_quorum_of_cosignatures(house):
    """Of six lenders five are enough: one whose cosignature is lost or by another key does not hold the log up."""
    stranger = create_identity_key()

    def other_key(name, text):
        if name != "bank-f" or not text:
            return text
        seen = json.loads(text)
        with open_log(house.log_path) as log:
            seen["cosignature"] = cosign(log.latest_checkpoint(), name, stranger, 1_700_000_000)
        return json.dumps(seen)

    house.said_by = other_key
    house.run(job_of(rounds=1, times=0))
    with house.log() as log:
        last = parse_checkpoint(log.latest_checkpoint()).size
        assert set(log.cosignatures(last)) == set(house.names) - {"bank-f"}
        assert parse_checkpoint(log.final_checkpoint(5)).size == last
        assert log.final_checkpoint(6) is None
    assert {line["lender"] for line in house.said("witness_doubted")} == {"bank-f"}
    assert "cosignature" in house.entries(Incident)[-1].reason


def test_a_lender_whose_answer_was_lost_is_ahead_and_goes_on(house):
    """It cosigned what the coordinator does not know of; the proofs are from everything that it was shown."""
    lost = []

    def fault(name, question, stage):
        if name == "bank-a" and stage == "round 1" and type(question).__name__ == "Mask" and not lost:
            lost.append(name)
            return "mute"
        return None

    house.fault = fault
    house.run(job_of(rounds=2, times=0))
    assert lost
    assert house.cohorts()[2] == house.names
    assert house.said("sum_refused") == []


def test_a_coordinator_that_forgot_what_it_showed_learns_it_from_the_lenders(house):
    house.run(job_of(rounds=1, times=0))
    lost = {name: cosigned(bank.parent) for name, bank in house.banks.items()}
    with house.log() as log:
        # cosignatures that never arrived
        log._db.execute("DROP TRIGGER cosignature_no_delete")
        log._db.execute("DELETE FROM cosignature")
        log._db.execute(
            "CREATE TRIGGER cosignature_no_delete BEFORE DELETE ON cosignature"
            " BEGIN SELECT RAISE(ABORT, 'cosignatures of a log are never changed'); END"
        )
    house.run(job_of(rounds=2, times=0), new_job=True)
    assert house.cohorts()[2]
    assert all(cosigned(bank.parent) > lost[name] for name, bank in house.banks.items())


def test_a_log_restored_from_yesterday_is_found_by_the_next_question(house):
    house.run(job_of(rounds=1, times=0))
    yesterday = house.directory / "yesterday.db"
    shutil.copy(house.log_path, yesterday)
    house.run(job_of(rounds=2, times=0), new_job=True)
    shutil.copy(yesterday, house.log_path)
    with pytest.raises(AuditError, match=r"cosigned .* entries .* restored from an older copy"):
        house.run(job_of(rounds=3, times=0), new_job=True)
    assert all(open_forks(LenderFolder(bank)) for bank in house.banks.values())


def test_a_fork_shown_to_one_lender_is_found_and_the_others_go_on(house, tmp_path):
    other = Coordinator(tmp_path / "fork.db")
    other.grow(400, "e")

    def shown_to(name, text):
        return other.shown(*range(1, 200)) if name == "bank-b" and text and house.cohorts() else text

    house.shown_to = shown_to
    house.run(job_of(rounds=2, times=0, min_lenders=4))
    assert "bank-b" not in house.cohorts()[2]
    assert open_forks(LenderFolder(house.banks["bank-b"]))
    assert not open_forks(LenderFolder(house.banks["bank-a"]))
    (fork,) = logged(house.banks["bank-b"].parent, Fork)
    for note in (fork.held, fork.shown):  # the coordinator's own signatures prove it
        verify_note(note, {ORIGIN: NoteKey("signer", rosters.coordinator().key.public_key())})


def test_a_job_goes_on_after_restarts_on_both_sides(house):
    def kill():
        if house.said("round_done"):
            house.on_step = lambda: None
            raise Killed

    house.on_step = kill
    with pytest.raises(Killed):
        house.run(job_of(rounds=3, times=0))
    for name in ("bank-a", "bank-c"):
        house.restart(name)
    house.run(job_of(rounds=3, times=0))
    assert house.entries(RoundCompleted)[-1].round == 3
    assert len(house.entries(PlanProposed)) == 1
    assert not any(open_forks(LenderFolder(bank)) for bank in house.banks.values())


def test_nothing_goes_on_that_the_coordinator_cannot_log(house, monkeypatch):
    real, count = AuditLog.append_many, []

    def fails(log, events):
        if log.side == "coordinator" and house.said("bins"):
            count.append(1)
            raise AuditError("the disk is full")
        return real(log, events)

    monkeypatch.setattr(AuditLog, "append_many", fails)
    with pytest.raises(AuditError, match="the disk is full"):
        house.run(job_of(rounds=3, times=0))
    assert house.questions(type(None), "round 1") == []
    assert count

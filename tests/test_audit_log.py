"""A log keeps what it acknowledged, in one order, on the disk; what it cannot keep it refuses, and then goes on."""

import hashlib
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from audit_logs import ORIGIN, changed, new_log, round_event, rows
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit import logfile, merkle
from fedfin.audit.checkpoint import NoteKey, cosign, verify_note
from fedfin.audit.events import Budget, Pruned, Refusal, Rotation, UnknownEvent
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.audit.verifying import verify_log
from fedfin.errors import AuditError

DIGEST = "ab" * 32
TIME = 1_767_225_600


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.db"


@pytest.fixture
def log(path, key):
    with new_log(path, key) as log:
        yield log


def test_entries_come_back_in_their_order(log):
    assert log.append(round_event(0)) == 0
    assert log.append_many([round_event(1), round_event(2)]) == 1
    assert log.size == 3
    assert [(index, entry.event) for index, entry in log.entries()] == [
        (at, round_event(at)) for at in range(3)
    ]
    assert [entry.seq for _, entry in log.entries(1, 2)] == [1]
    assert log.entry(2).event == round_event(2)


def test_no_events_are_logged_as_nothing(log):
    assert log.append_many([]) == 0
    assert log.size == 0


def test_root_and_proofs_are_those_of_the_leaves(log):
    for number in range(21):
        log.append(round_event(number))
        leaves = [merkle.leaf_hash(log.body(index)) for index in range(number + 1)]
        assert [log.leaf_hash(index) for index in range(number + 1)] == leaves
        for index in range(number + 1):
            merkle.verify_inclusion(leaves[index], index, log.size, log.inclusion(index), log.root())
        for old in range(number + 2):
            merkle.verify_consistency(old, log.size, log.root(old), log.root(), log.consistency(old))
    assert len(log.inclusion(3, 8)) == 3


def test_what_the_log_does_not_have_is_refused(log):
    log.append(round_event())
    for ask in (log.entry, log.body, log.leaf_hash, log.inclusion):
        for index in (1, -1, 2**70):
            with pytest.raises(AuditError):
                ask(index)
    with pytest.raises(AuditError, match="has 1 entries, not 2; name a size up to that"):
        log.root(2)
    with pytest.raises(AuditError, match="holds no checkpoint of 1 entries; sign one first"):
        log.note(1)


def test_a_log_goes_on_after_it_was_closed(path, key):
    with new_log(path, key, num_entries=5) as log:
        before = log.root()
    with AuditLog.open(path, key=key) as log:
        assert (log.origin, log.actor, log.side, log.root()) == (ORIGIN, "coordinator", "coordinator", before)
        assert log.append(round_event(5)) == 5
        merkle.verify_consistency(5, 6, before, log.root(), log.consistency(5))
    assert verify_log(path).ok


def test_a_closed_log_is_one_file_that_its_owner_alone_reads(path, key):
    before = os.umask(0)
    try:
        with new_log(path, key, num_entries=1):
            assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_file_is_never_replaced(path, key):
    new_log(path, key, num_entries=1).close()
    with pytest.raises(AuditError, match="exists already; a log is never replaced"):
        new_log(path, key)
    with pytest.raises(AuditError, match="cannot be made"):
        new_log(path.parent / "none" / "audit.db", key)
    with open_log(path) as log:
        assert log.size == 1
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_log_is_refused(tmp_path, path, key):
    with pytest.raises(AuditError, match=r"is no file; a log is made when"):
        AuditLog.open(path, key=key)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(AuditError, match="cannot be opened"):
        AuditLog.open(path, key=key)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE entry(idx INTEGER PRIMARY KEY)")
    with pytest.raises(AuditError, match="is no log of this release of fedfin"):
        AuditLog.open(other, key=key)
    assert rows(other, "PRAGMA journal_mode") == [("delete",)]  # nothing was changed in it


def test_another_key_cannot_go_on_with_a_log(path, key):
    new_log(path, key).close()
    with pytest.raises(AuditError, match="the key is not the one that signs"):
        AuditLog.open(path, key=Ed25519PrivateKey.generate())


def test_a_log_holds_only_what_its_side_may_say(log, tmp_path):
    spent = Budget(action="commit", job="job-1", snapshot=DIGEST)
    with pytest.raises(AuditError, match="a budget event has no place in the log of a coordinator"):
        log.append(spent)
    with new_log(tmp_path / "bank.db", side="lender", actor="bank-a", origin="fedfin/bank-a") as lenders:
        assert lenders.append(spent) == 0
        with pytest.raises(AuditError, match="a round_completed event has no place in the log of a lender"):
            lenders.append_many([spent, round_event()])
        assert lenders.size == 1


def test_what_the_log_itself_says_is_not_said_by_hand(log):
    own = Rotation(member="coordinator", key="identity", old=DIGEST, new=DIGEST)
    erased = Pruned(ranges=((0, 1),), num_entries=1, digest=DIGEST, retention="month")
    for event in (own, erased, UnknownEvent(type="merger", version=1, content="{}")):
        with pytest.raises(AuditError, match="is not appended by hand"):
            log.append(event)
    # Of a member's key, and of the owner's other keys, the log is told.
    assert log.append(Rotation(member="bank-a", key="identity", old=DIGEST, new=DIGEST)) == 0
    assert log.append(Rotation(member="coordinator", key="tls", old=DIGEST, new=DIGEST)) == 1


def test_an_entry_is_on_the_disk_when_the_call_returns(path, key):
    """Every commit of the log's connection syncs the WAL, which holds it."""
    with new_log(path, key) as log:
        assert log.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert log.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        log.append(round_event())
        copy = path.parent / "copy"
        copy.mkdir()
        for file in path.parent.glob("audit.db*"):
            shutil.copy(file, copy)
    with AuditLog.open(copy / "audit.db", key=key) as found:
        assert found.size == 1


def test_threads_share_a_log_and_its_syncs(log, path):
    synced = []
    log.connection.set_trace_callback(lambda text: synced.append(text) if text == "COMMIT" else None)
    found = {}

    def work(name):
        found[name] = [
            log.append(Refusal(rule=f"rule {name}", asked="Train", reason=str(at))) for at in range(25)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for indices in found.values() for index in indices) == list(range(200))
    for name, indices in found.items():
        said = [(log.entry(index).event.rule, log.entry(index).event.reason) for index in indices]
        assert said == [(f"rule {name}", str(at)) for at in range(25)]
    assert len(synced) < 200
    assert verify_log(path).ok


def test_processes_share_a_log(path, key):
    with new_log(path, key) as first, AuditLog.open(path, key=key) as second:
        indices = [log.append(round_event(number)) for number in range(5) for log in (first, second)]
        assert indices == list(range(10))
        assert first.root() == second.root()
        second.rotate(Ed25519PrivateKey.generate())
        with pytest.raises(AuditError, match=r"the key that signs .* is another one now"):
            first.append(round_event())
    assert verify_log(path).size == 11


def test_a_log_that_another_process_holds_is_refused_and_then_goes_on(path, key, monkeypatch):
    monkeypatch.setattr(logfile, "_BUSY_TIMEOUT_S", 0.05)
    with new_log(path, key) as log:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            AuditError, match=r"cannot be written \(database is locked\).*nothing goes on unlogged"
        ):
            log.append(round_event())
        with pytest.raises(AuditError, match="locked"):
            log.checkpoint()
        other.execute("ROLLBACK")
        other.close()
        assert log.append(round_event()) == 0


def test_a_thread_that_waits_learns_that_its_entry_was_not_written(log, monkeypatch):
    """The thread that writes for all fails: nobody is told that an entry is there."""
    errors = []

    def work():
        try:
            log.append(round_event())
        except AuditError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    log.connection.execute("PRAGMA query_only = ON")
    with log._lock:  # all of them wait now
        for thread in threads:
            thread.start()
        while len(log._queue.tickets) < 4:
            pass
    for thread in threads:
        thread.join()
    assert len(errors) == 4
    assert all("readonly" in text for text in errors)
    log.connection.execute("PRAGMA query_only = OFF")
    assert (log.size, log.append(round_event())) == (0, 0)


def test_a_full_database_is_refused_whole_and_then_goes_on(log, path):
    log.append_many([round_event(number) for number in range(50)])
    before = log.root()
    pages = log.connection.execute("PRAGMA page_count").fetchone()[0]
    log.connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(AuditError, match=r"cannot be written \(database or disk is full\); free the disk"):
        log.append_many([round_event(number) for number in range(500)])
    assert (log.size, log.root()) == (50, before)
    log.connection.execute("PRAGMA max_page_count = 1000000")
    assert log.append(round_event()) == 50
    assert verify_log(path).ok


FULL = textwrap.dedent(
    """
    import resource, signal, sys
    from pathlib import Path
    from audit_logs import round_event
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from fedfin.audit.log import AuditLog
    from fedfin.errors import AuditError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
    path, key = Path(sys.argv[1]), Ed25519PrivateKey.generate()
    log = AuditLog.create(path, origin="fedfin/full", actor="coordinator", key=key, side="coordinator")
    kept = 0
    for room in range(40_000, 300_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            while True:
                kept = log.append_many([round_event(n) for n in range(7)]) + 7
        except AuditError as error:
            assert "nothing goes on unlogged" in str(error), error
            assert log.size == kept, (log.size, kept)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert log.append(round_event()) == kept
    log.close()
    print(kept + 1)
    """
)


def test_a_full_disk_loses_nothing_that_was_acknowledged(path):
    """Files may not grow past a limit, a new one each time: every write of the WAL and of the file fails somewhere."""
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    report = verify_log(path)
    assert (report.wrong, report.size) == (None, int(child.stdout))
    assert report.size > 50
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_no_row_of_a_log_can_be_changed(log):
    log.append_many([round_event(number) for number in range(4)])
    note = log.checkpoint()
    witness = Ed25519PrivateKey.generate()
    log.add_cosignatures(4, [cosign(note, "bank-a", witness, TIME)], {"bank-a": witness.public_key()})
    log.prune([(1, 2)], retention="month")
    tables = ("meta", "signer", "entry", "body", "node", "checkpoint", "cosignature", "erasure")
    for table in tables:
        column = log.connection.execute(f"SELECT name FROM pragma_table_info('{table}')").fetchone()[0]
        for statement in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table}s of a log are never changed"):
                log.connection.execute(statement)


def test_a_checkpoint_is_stored_once_and_is_of_the_log(log, key):
    log.append_many([round_event(number) for number in range(3)])
    note = log.checkpoint()
    assert log.checkpoint() == note
    keys = {ORIGIN: NoteKey("signer", key.public_key())}
    checkpoint = verify_note(note, keys).checkpoint
    assert (checkpoint.origin, checkpoint.size, checkpoint.root) == (ORIGIN, 3, log.root())
    log.append(round_event())
    assert [size for size, _ in log.checkpoints()] == [3]
    log.checkpoint()
    assert [size for size, _ in log.checkpoints()] == [3, 4]
    assert next(log.checkpoints()) == (3, note)


def test_cosignatures_make_a_checkpoint_final(log):
    witnesses = {name: Ed25519PrivateKey.generate() for name in ("bank-a", "bank-b", "bank-c")}
    known = {name: one.public_key() for name, one in witnesses.items()}
    assert (log.latest_checkpoint(), log.final_checkpoint(1)) == (None, None)
    first = log.checkpoint()
    for name in ("bank-b", "bank-a"):
        assert log.add_cosignatures(0, [cosign(first, name, witnesses[name], TIME)], known) == {name: TIME}
    log.append(round_event())
    second = log.checkpoint()
    log.add_cosignatures(1, [cosign(second, "bank-c", witnesses["bank-c"], TIME)], known)
    assert list(log.cosignatures(0)) == ["bank-a", "bank-b"]
    assert log.final_checkpoint(3) is None
    assert log.final_checkpoint(2) == log.note(0)
    assert log.final_checkpoint(1) == log.final_checkpoint(0) == log.latest_checkpoint() == log.note(1)
    keys = {name: NoteKey("cosigner", one) for name, one in known.items()}
    assert verify_note(log.note(0), keys).by == {"bank-a": TIME, "bank-b": TIME}


def test_a_cosignature_that_does_not_hold_is_not_stored(log):
    witness, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    known = {"bank-a": witness.public_key()}
    note = log.checkpoint()
    good = cosign(note, "bank-a", witness, TIME)
    log.append(round_event())
    other = cosign(log.checkpoint(), "bank-a", witness, TIME)
    for lines, reason in (
        ([cosign(note, "bank-x", stranger, TIME)], "by bank-x is not a line by a member of the roster"),
        ([good, cosign(note, "bank-a", stranger, TIME)], "signed by none of those trusted here"),
        ([other], "does not verify"),
        (["nonsense\n"], "malformed"),
    ):
        with pytest.raises(AuditError, match=reason):
            log.add_cosignatures(0, lines, known)
    with pytest.raises(AuditError, match="holds no checkpoint of 7 entries"):
        log.add_cosignatures(7, [good], known)
    assert log.add_cosignatures(0, [], known) == {}
    assert log.cosignatures(0) == {}


def test_the_first_cosignature_of_a_witness_stays(log):
    witness = Ed25519PrivateKey.generate()
    known = {"bank-a": witness.public_key()}
    note = log.checkpoint()
    first = cosign(note, "bank-a", witness, TIME)
    log.add_cosignatures(0, [first], known)
    log.add_cosignatures(0, [cosign(note, "bank-a", witness, TIME + 1)], known)
    assert log.cosignatures(0) == {"bank-a": first}


def test_a_key_is_replaced_by_a_signature_of_the_old_one(path, key):
    new_key = Ed25519PrivateKey.generate()
    with new_log(path, key, num_entries=2) as log:
        log.checkpoint()
        assert log.rotate(new_key) == 2
        log.append(round_event())
        log.checkpoint()
        log.entry(2).verify(key.public_key(), ORIGIN)
        log.entry(3).verify(new_key.public_key(), ORIGIN)
    with pytest.raises(AuditError, match="the key is not the one"):
        AuditLog.open(path, key=key)
    AuditLog.open(path, key=new_key).close()
    assert verify_log(path).ok


def test_a_key_that_could_not_be_replaced_goes_on(log, key):
    log.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(AuditError, match="readonly"):
        log.rotate(Ed25519PrivateKey.generate())
    log.connection.execute("PRAGMA query_only = OFF")
    log.entry(log.append(round_event())).verify(key.public_key(), ORIGIN)


def test_bodies_are_erased_and_every_proof_still_holds(path, key):
    with new_log(path, key, num_entries=20) as log:
        before, leaves = log.root(), [log.leaf_hash(index) for index in range(20)]
        text = log.body(4)
        assert log.prune([(2, 6), (9, 10)], retention="month") == 20
        said = log.entry(20).event
        digest = hashlib.sha256(b"".join([*leaves[2:6], leaves[9]])).hexdigest()
        assert (said.ranges, said.num_entries, said.digest) == (((2, 6), (9, 10)), 5, digest)
        assert [index for index, entry in log.entries() if entry is None] == [2, 3, 4, 5, 9]
        assert (log.body(4), log.entry(4), log.leaf_hash(4)) == (None, None, leaves[4])
        merkle.verify_inclusion(leaves[4], 4, 20, log.inclusion(4, 20), before)
        # Nothing of it is left in a free page or in the WAL.
        assert all(text not in file.read_bytes() for file in path.parent.iterdir())
    report = verify_log(path)
    assert (report.wrong, report.num_pruned) == (None, 5)


def test_what_may_not_be_erased_stays(log):
    log.append_many([round_event(number) for number in range(4)])
    log.rotate(Ed25519PrivateKey.generate())
    log.prune([(0, 1)], retention="month")
    for ranges, reason in (
        ([(4, 5)], "entry 4 of .* must stay"),
        ([(1, 2), (5, 6)], "entry 5 of .* must stay"),
        ([], "no entries of .* are named"),
        ([(2, 2)], "are no range of"),
        ([(2, 3), (1, 2)], "name ranges in their order"),
        ([(3, 99)], "are no range of"),
        ([(-1, 2)], "are no range of"),
    ):
        with pytest.raises(AuditError, match=reason):
            log.prune(ranges, retention="month")
    assert [index for index, entry in log.entries() if entry is None] == [0]
    assert log.size == 6


def test_an_erasure_that_fails_erases_nothing(log, path):
    log.append_many([round_event(number) for number in range(4)])
    log.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(AuditError, match="readonly"):
        log.prune([(0, 2)], retention="month")
    log.connection.execute("PRAGMA query_only = OFF")
    assert (log.size, log.entry(1).event) == (4, round_event(1))


def test_reading_changes_nothing_beside_the_log(path, key):
    new_log(path, key, num_entries=3).close()
    before = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        with open_log(path) as log:
            assert (log.size, log.unmerged, len(list(log.entries()))) == (3, False, 3)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_log_in_use_is_read_from_a_copy(path, key):
    with new_log(path, key, num_entries=3) as log:
        lasting = (path, path.with_name("audit.db-wal"))
        files = [file.read_bytes() for file in lasting]
        with open_log(path) as found:
            assert (found.size, found.root(), found.unmerged) == (3, log.root(), True)
        assert [file.read_bytes() for file in lasting] == files
        assert len(list(path.parent.iterdir())) == 3  # and the index of the WAL
        assert any("was not closed" in note for note in verify_log(path).notes)
        log.append(round_event())


def test_a_log_that_changes_while_it_is_copied_is_copied_again(path, key, monkeypatch):
    with new_log(path, key, num_entries=3) as log:
        copy, left = shutil.copyfile, [2]

        def meddling(source, target):
            copy(source, target)
            if left[0]:
                left[0] -= 1
                log.append(round_event())

        monkeypatch.setattr(logfile.shutil, "copyfile", meddling)
        with open_log(path) as found:
            assert (found.size, found.root()) == (5, log.root())
        left[0] = 10**6
        monkeypatch.setattr(logfile.time, "sleep", lambda seconds: None)
        with pytest.raises(AuditError, match="is written faster than it can be copied"), open_log(path):
            pass


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE body SET content = x'00' WHERE idx = 6", "entry 6 is not what its hash says"),
        ("UPDATE node SET hash = zeroblob(32) WHERE level = 2 AND idx = 0", "does not fit those below it"),
        ("DELETE FROM node WHERE level = 1 AND idx = 2", "holds no hash 2 of level 1"),
        ("DELETE FROM entry WHERE idx >= 5", "signed a checkpoint of 7 entries and holds 5"),
        ("UPDATE entry SET leaf = zeroblob(32) WHERE idx = 6", "entry 6 is not what its hash says"),
        ("DELETE FROM entry WHERE idx = 6", "signed a checkpoint of 7 entries and holds 6"),
        ("UPDATE checkpoint SET size = 6", "its tree is not the one of its checkpoint of 6 entries"),
        ("INSERT INTO node VALUES (1, 3, zeroblob(32))", "holds parts of entries that are gone"),
        ("INSERT INTO body VALUES (7, x'00')", "holds parts of entries that are gone"),
        ("DELETE FROM meta WHERE name = 'origin'", "does not say whose log it is"),
        ("DELETE FROM signer", "does not hold the key that signs it"),
        ("DROP TABLE erasure", "tables or triggers of .* are not those that fedfin makes"),
        ("PRAGMA user_version = 2", "is no log of this release"),
    ],
)
def test_a_log_that_was_changed_at_its_end_is_not_gone_on_with(path, key, statement, reason):
    with new_log(path, key, num_entries=7) as log:
        log.checkpoint()
    with changed(path) as db:
        db.execute(statement)
    with pytest.raises(AuditError, match=reason):
        AuditLog.open(path, key=key)


def test_a_log_whose_triggers_are_gone_is_not_gone_on_with(path, key):
    new_log(path, key).close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER entry_no_update")
    with pytest.raises(AuditError, match="someone changed the file"):
        AuditLog.open(path, key=key)

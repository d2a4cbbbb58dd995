"""Whatever is done to a log's file, verifying it names the first thing that is wrong, and where."""

import shutil

import pytest
from audit_logs import ORIGIN, changed, new_log, round_event, rows
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit import contents, entry, merkle, tree
from fedfin.audit.checkpoint import Checkpoint, add_signatures, cosign, sign
from fedfin.audit.entry import event_json, signed_leaves
from fedfin.audit.events import Budget, Clock, Pruned, Rotation
from fedfin.audit.verifying import Trust, verify_log
from fedfin.identity import key_fingerprint

TIME = 1_767_225_600
NUM_ENTRIES = 300
SIDES = ("bank-a", "bank-b")


@pytest.fixture(scope="module")
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def witnesses():
    return {name: Ed25519PrivateKey.generate() for name in SIDES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, key, witnesses):
    """A finished log: 300 entries, checkpoints of 100 and 300, the latter cosigned by two."""
    path = tmp_path_factory.mktemp("whole") / "audit.db"
    known = {name: one.public_key() for name, one in witnesses.items()}
    with new_log(path, key, num_entries=100) as log:
        log.checkpoint()
        log.append_many([round_event(number) for number in range(200)])
        note = log.checkpoint()
        log.add_cosignatures(300, [cosign(note, name, one, TIME) for name, one in witnesses.items()], known)
    return path


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copy(whole, tmp_path / "audit.db")


@pytest.fixture
def trust(key, witnesses):
    return Trust(
        fingerprints=frozenset({key_fingerprint(key.public_key())}),
        witnesses={name: one.public_key() for name, one in witnesses.items()},
        threshold=2,
    )


@pytest.fixture
def cosigned(whole):
    """The checkpoint of 300 entries, as the lenders hold it."""
    ((note,),) = rows(whole, "SELECT note FROM checkpoint WHERE size = 300")
    return add_signatures(
        note, [line for (line,) in rows(whole, "SELECT line FROM cosignature ORDER BY name")]
    )


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that 300 entries are several batches, the last one not whole."""
    monkeypatch.setattr(tree, "_BATCH_LEVELS", 5)
    monkeypatch.setattr(tree, "_BATCH", 32)
    monkeypatch.setattr(contents, "_BATCH", 32)


def rewritten(path, bodies):
    """Make the file a log of these bodies, every hash of its tree right: what an intruder who knows trees does."""
    nodes, edge = [], []
    leaves = [merkle.leaf_hash(body) for body in bodies]
    for size, leaf in enumerate(leaves):
        merkle.grow(edge, size, leaf, lambda *node: nodes.append(node))
    with changed(path) as db:
        for table in ("entry", "body", "node"):
            db.execute(f"DELETE FROM {table}")
        db.executemany("INSERT INTO entry VALUES (?, ?)", enumerate(leaves))
        db.executemany("INSERT INTO body VALUES (?, ?)", enumerate(bodies))
        db.executemany("INSERT INTO node VALUES (?, ?, ?)", nodes)


def bodies_of(path):
    return [body for (body,) in rows(path, "SELECT content FROM body ORDER BY idx")]


def leaf(event, seq, key, *, time="2026-11-24T18:19:06.928Z", actor="coordinator", origin=ORIGIN):
    return next(signed_leaves(seq, time, actor, [event_json(event)], key=key, origin=origin))


def test_a_whole_log_holds_and_the_report_says_what_was_checked(path, trust, cosigned):
    report = verify_log(path, Trust(**{**as_dict(trust), "anchors": (cosigned,)}))
    assert (report.wrong, report.ok, report.size, report.origin) == (None, True, NUM_ENTRIES, ORIGIN)
    assert [check.what for check in report.checked] == [
        "file",
        "tree",
        "signatures",
        "owner",
        "checkpoints",
        "cosignatures",
        "anchors",
    ]
    assert (report.anchored.size, report.anchored.by) == (300, SIDES)
    assert report.notes == []
    assert report.root == merkle.root(merkle.edge(Nodes(path), 300))


def as_dict(trust):
    return {name: getattr(trust, name) for name in ("fingerprints", "witnesses", "threshold", "anchors")}


class Nodes:
    def __init__(self, path):
        self.leaves = [merkle.leaf_hash(body) for body in bodies_of(path)]

    def __call__(self, level, index):
        found = self.leaves[index << level : (index + 1) << level]
        while len(found) > 1:
            found = merkle.node_hashes(found)
        return found[0]


def test_what_was_not_checked_is_said(path):
    report = verify_log(path)
    assert report.ok
    assert len(report.notes) == 2
    assert "no key was given to trust: compare the fingerprint" in report.notes[0]
    assert "nothing that others hold was given" in report.notes[1]
    assert "the entries' signatures were not checked" in verify_log(path, signatures=False).notes[0]


def test_progress_is_told(path):
    told = []
    verify_log(path, progress=lambda done, whole: told.append((done, whole)))
    assert told == [(min(done, 300), 300) for done in range(32, 321, 32)]


@pytest.mark.parametrize("size", [0, 1, 2, 31, 32, 33, 63, 64, 65, 96])
def test_a_log_of_any_size_holds(tmp_path, key, size):
    with new_log(tmp_path / "log.db", key, num_entries=size) as log:
        log.checkpoint()
        root = log.root()
    report = verify_log(tmp_path / "log.db")
    assert (report.wrong, report.size, report.root) == (None, size, root)


# --- one change behind the log's back ---------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 31, 32, 150, 299])
def test_an_entry_that_was_changed_is_named(path, index):
    with changed(path) as db:
        db.execute("UPDATE body SET content = CAST(content || ' ' AS BLOB) WHERE idx = ?", (index,))
    wrong = verify_log(path).wrong
    assert (wrong.index, wrong.what) == (index, f"entry {index} is not what its hash says")
    assert "the log was changed" in wrong.meaning


@pytest.mark.parametrize("index", [0, 40, 299])
def test_an_entry_that_was_changed_with_its_hash_is_named_by_the_hash_above(path, index):
    body = bodies_of(path)[index].replace(b"bank-b", b"bank-x")
    with changed(path) as db:
        db.execute("UPDATE body SET content = ? WHERE idx = ?", (body, index))
        db.execute("UPDATE entry SET leaf = ? WHERE idx = ?", (merkle.leaf_hash(body), index))
    wrong = verify_log(path).wrong
    assert wrong.index == index - index % 2
    assert "of level 1, over entries" in wrong.what


@pytest.mark.parametrize("index", [0, 40, 150, 299])
def test_an_entry_that_was_changed_with_the_whole_tree_is_named_by_its_signature(path, index):
    found = bodies_of(path)
    found[index] = found[index].replace(b"bank-b", b"bank-x")
    rewritten(path, found)
    wrong = verify_log(path).wrong
    assert (wrong.index, wrong.what) == (index, f"entry {index} is not signed by the key of the log's owner")


def test_the_first_of_two_wrong_entries_is_named(path, key):
    found = bodies_of(path)
    found[250] = found[250].replace(b"bank-b", b"bank-x")
    found[251] = b"{}"
    rewritten(path, found)
    assert verify_log(path).wrong.index == 250


@pytest.mark.parametrize("index", [0, 40, 150])
def test_an_entry_that_was_removed_is_named(path, index):
    with changed(path) as db:
        db.execute("DELETE FROM entry WHERE idx = ?", (index,))
        db.execute("DELETE FROM body WHERE idx = ?", (index,))
    wrong = verify_log(path).wrong
    assert (wrong.index, wrong.what) == (index, f"entry {index} is missing from the log")


def test_an_entry_that_was_removed_and_its_place_closed_is_named(path):
    found = bodies_of(path)
    rewritten(path, found[:150] + found[151:])
    wrong = verify_log(path).wrong
    assert (wrong.index, wrong.what) == (150, "at place 150 stands the entry that was written as 151")


def test_entries_in_another_order_are_named(path):
    found = bodies_of(path)
    found[150], found[151] = found[151], found[150]
    rewritten(path, found)
    assert verify_log(path).wrong.what == "at place 150 stands the entry that was written as 151"


def test_a_body_that_is_gone_and_not_erased_is_named(path):
    with changed(path) as db:
        db.execute("DELETE FROM body WHERE idx IN (77, 78)")
        db.execute("INSERT INTO erasure VALUES (77, 79)")
    wrong = verify_log(path).wrong
    assert wrong.index == 77
    assert wrong.what == "the body of entry 77 is gone, and no entry says that it was erased"


@pytest.mark.parametrize("level", range(1, 9))
def test_a_hash_of_the_tree_that_was_changed_is_named(path, level):
    index = (NUM_ENTRIES >> level) - 1
    with changed(path) as db:
        db.execute("UPDATE node SET hash = zeroblob(32) WHERE level = ? AND idx = ?", (level, index))
    wrong = verify_log(path).wrong
    assert wrong.index == index << level
    assert f"hash {index} of level {level}" in wrong.what


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("DELETE FROM node WHERE level = 3 AND idx = 5", "hash 5 of level 3"),
        ("UPDATE node SET hash = zeroblob(33) WHERE level = 3 AND idx = 5", "hash 5 of level 3"),
        ("UPDATE entry SET leaf = zeroblob(33) WHERE idx = 5", "entry 5 is not what its hash says"),
        ("INSERT INTO node VALUES (1, 150, zeroblob(32))", "hashes of entries that it does not hold"),
        ("INSERT INTO body VALUES (300, x'00')", "a body at place 300, outside the log"),
        ("INSERT INTO body VALUES (-1, x'00')", "a body at place -1, outside the log"),
        ("INSERT INTO entry VALUES (-1, x'00')", "a body at place -1, outside the log"),
        ("INSERT INTO entry VALUES (4611686018427387904, x'00')", "entry 300 is missing"),
        ("UPDATE checkpoint SET size = 200 WHERE size = 100", "stored for 200 entries is of another size"),
        (
            "UPDATE cosignature SET name = 'bank-x' WHERE name = 'bank-a'",
            "bank-x at 300 entries is of another name",
        ),
        ("UPDATE cosignature SET line = 'x'", "malformed"),
        ("UPDATE checkpoint SET note = 'x'", "malformed"),
        ("UPDATE meta SET value = 'fedfin/other' WHERE name = 'origin'", "entry 0 is not signed"),
        ("UPDATE meta SET value = 'bank-a' WHERE name = 'actor'", "entry 0 is by coordinator"),
        ("UPDATE meta SET value = 'lender' WHERE name = 'side'", "entry 0, a round_completed, has no place"),
        ("DELETE FROM signer", "does not hold the key that signs its first entry"),
        ("UPDATE signer SET start = 1", "does not hold the key that signs its first entry"),
        ("UPDATE signer SET public = zeroblob(31)", "does not hold the key that signs it"),
        (
            "INSERT INTO signer VALUES (300, (SELECT public FROM signer))",
            "are not those that its entries name",
        ),
        ("DROP TABLE erasure", "tables or triggers"),
        ("CREATE TABLE more(a)", "tables or triggers"),
        ("CREATE VIEW more AS SELECT 1", "tables or triggers"),
    ],
)
def test_any_other_change_is_named(path, statement, what):
    with changed(path) as db:
        db.execute(statement)
    wrong = verify_log(path).wrong
    assert what in wrong.what
    assert wrong.meaning


def test_a_value_of_another_type_is_named(path):
    """STRICT tables are only as strict as who writes them."""
    with changed(path) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, ' STRICT', '') WHERE name = 'body'")
    with changed(path) as db:
        db.execute("UPDATE body SET content = 'text' WHERE idx = 5")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = sql || ' STRICT' WHERE name = 'body'")
    assert "the database is damaged" in verify_log(path).wrong.what


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_damaged_file_is_reported_and_never_crashes(path, place):
    content = bytearray(path.read_bytes())
    start = int(len(content) * place)
    content[start : start + 4096] = bytes(range(256)) * 16
    path.write_bytes(content)
    assert not verify_log(path).ok


def test_a_file_that_was_cut_is_reported(path):
    content = path.read_bytes()
    for part in (0, 50, 5000, len(content) // 2):
        path.write_bytes(content[:part])
        assert not verify_log(path).ok
    path.unlink()
    assert "is no file" in verify_log(path).wrong.what


# --- what the owner itself may try ------------------------------------------------------------------------------


def test_a_log_that_its_owner_cut_short_is_found_by_its_own_checkpoint(path):
    rewritten(path, bodies_of(path)[:280])
    wrong = verify_log(path).wrong
    assert (wrong.index, wrong.what) == (
        280,
        "the log's checkpoint of 300 entries is signed, and the log holds only 280",
    )
    assert "cut short or restored from an older copy" in wrong.meaning


def test_a_log_cut_short_with_its_checkpoints_is_found_by_the_one_that_others_hold(path, trust, cosigned):
    rewritten(path, bodies_of(path)[:280])
    with changed(path) as db:
        db.execute("DELETE FROM checkpoint WHERE size > 280")
        db.execute("DELETE FROM cosignature")
    assert verify_log(path).ok  # by itself it looks whole
    wrong = verify_log(path, Trust(anchors=(cosigned,))).wrong
    assert (wrong.index, "held elsewhere is signed, and the log holds only 280" in wrong.what) == (280, True)
    assert "no checkpoint is cosigned by 2 of the 2" in verify_log(path, trust).wrong.what


def test_a_database_of_yesterday_is_found_by_the_checkpoint_that_others_hold(tmp_path, key):
    path = tmp_path / "audit.db"
    with new_log(path, key, num_entries=50) as log:
        log.checkpoint()
    yesterday = path.read_bytes()
    from fedfin.audit.log import AuditLog

    with AuditLog.open(path, key=key) as log:
        log.append(round_event())
        held = log.checkpoint()
    assert verify_log(path, Trust(anchors=(held,))).ok
    path.write_bytes(yesterday)
    assert verify_log(path).ok
    wrong = verify_log(path, Trust(anchors=(held,))).wrong
    assert (
        wrong.what
        == "the checkpoint of 51 entries that is held elsewhere is signed, and the log holds only 50"
    )
    assert "restored from an older copy" in wrong.meaning


def test_a_log_that_its_owner_wrote_anew_is_found_by_the_checkpoint_that_others_hold(tmp_path, key, cosigned):
    """A fork: the owner's key signs all of it, and another history than the one that was cosigned."""
    path = tmp_path / "fork.db"
    with new_log(path, key, num_entries=400) as log:
        log.checkpoint()
    assert verify_log(path).ok
    wrong = verify_log(path, Trust(anchors=(cosigned,))).wrong
    assert "held elsewhere has another root than the log's first 300 entries" in wrong.what
    assert "shows different parties different histories" in wrong.meaning


def test_a_checkpoint_of_another_tree_is_named(path, key):
    note = sign(Checkpoint(ORIGIN, 200, bytes(32)), key)
    with changed(path) as db:
        db.execute("INSERT INTO checkpoint VALUES (200, ?)", (note,))
    wrong = verify_log(path).wrong
    assert (
        wrong.what == "the log's checkpoint of 200 entries has another root than the log's first 200 entries"
    )


def test_a_checkpoint_by_another_key_is_named(path):
    stranger = Ed25519PrivateKey.generate()
    with changed(path) as db:
        ((note,),) = db.execute("SELECT note FROM checkpoint WHERE size = 100").fetchall()
        root = Checkpoint.from_body(note.split("\n\n")[0] + "\n").root
        db.execute(
            "UPDATE checkpoint SET note = ? WHERE size = 100",
            (sign(Checkpoint(ORIGIN, 100, root), stranger),),
        )
    wrong = verify_log(path).wrong
    assert "checkpoint of 100 entries is not signed by the key of coordinator" in wrong.what


def test_a_checkpoint_of_another_log_is_named(path, key):
    other = sign(Checkpoint("fedfin/other", 100, bytes(32)), key)
    assert "is not signed by the key of coordinator" in verify_log(path, Trust(anchors=(other,))).wrong.what


def test_a_log_by_a_key_that_is_not_trusted_is_named(path, key):
    stranger = key_fingerprint(Ed25519PrivateKey.generate().public_key())
    wrong = verify_log(path, Trust(fingerprints=frozenset({stranger}))).wrong
    assert (
        f"the key with the fingerprint {key_fingerprint(key.public_key())}, which is not among those"
        in wrong.what
    )


def test_a_forged_cosignature_is_named(path, trust, witnesses):
    ((note,),) = rows(path, "SELECT note FROM checkpoint WHERE size = 100")
    forged = cosign(
        sign(Checkpoint(ORIGIN, 99, bytes(32)), Ed25519PrivateKey.generate()),
        "bank-a",
        witnesses["bank-a"],
        TIME,
    )
    assert note
    with changed(path) as db:
        db.execute("INSERT INTO cosignature VALUES (100, 'bank-a', ?)", (forged,))
    assert "a cosignature at 100 entries does not hold" in verify_log(path, trust).wrong.what


def test_cosignatures_by_keys_that_are_not_trusted_do_not_count(path, trust):
    strangers = {name: Ed25519PrivateKey.generate().public_key() for name in SIDES}
    wrong = verify_log(path, Trust(witnesses=strangers, threshold=2)).wrong
    assert "no checkpoint is cosigned by 2 of the 2 trusted witnesses" in wrong.what
    assert verify_log(path, trust).ok


def test_what_the_witnesses_have_not_seen_is_said(path, key, trust):
    from fedfin.audit.log import AuditLog

    with AuditLog.open(path, key=key) as log:
        log.append_many([round_event()] * 4)
    report = verify_log(path, trust)
    assert report.ok
    assert report.anchored.size == 300
    assert "the last 4 entries are vouched for by coordinator alone" in report.notes


# --- what entries say about the log -----------------------------------------------------------------------------


def test_entries_that_have_no_place_in_a_log_are_named(path, key):
    found = bodies_of(path)[:10]
    for event, what in (
        (Budget(action="commit", job="job-1", snapshot="ab" * 32), "entry 10, a budget, has no place"),
        (
            Rotation(member="coordinator", key="identity", old="ab" * 32, new="cd" * 32),
            "entry 10 replaces a key that did not sign the log",
        ),
        (
            Pruned(ranges=((3, 11),), num_entries=8, digest="ab" * 32, retention="month"),
            "entry 10 erases entries 3 to 11, which are not before it",
        ),
        (
            Pruned(ranges=((3, 4),), num_entries=1, digest="ab" * 32, retention="month"),
            "entry 10 erased other entries than the log holds the hashes of",
        ),
    ):
        rewritten(path, [*found, leaf(event, 10, key)])
        wrong = verify_log(path).wrong
        assert wrong.index == 10
        assert what in wrong.what


def test_entries_of_another_log_or_actor_are_named(path, key):
    found = bodies_of(path)[:10]
    rewritten(path, [*found, leaf(round_event(), 10, key, origin="fedfin/other")])
    assert verify_log(path).wrong.what == "entry 10 is not signed by the key of the log's owner"
    rewritten(path, [*found, leaf(round_event(), 10, key, actor="bank-a")])
    assert verify_log(path).wrong.what == "entry 10 is by bank-a, and the log is that of coordinator"


def test_the_old_key_signs_nothing_after_it_was_replaced(tmp_path, key):
    path, new_key = tmp_path / "audit.db", Ed25519PrivateKey.generate()
    with new_log(path, key, num_entries=3) as log:
        log.checkpoint()
        log.rotate(new_key)
        log.append(round_event())
        log.checkpoint()
    report = verify_log(path)
    assert report.ok
    assert "who replaced its key 1 times" in report.checked[2].detail
    for trusted in (key, new_key):
        assert verify_log(path, Trust(fingerprints=frozenset({key_fingerprint(trusted.public_key())}))).ok
    by_old = sign(Checkpoint(ORIGIN, 5, report.root), key)
    assert "is not signed by the key" in verify_log(path, Trust(anchors=(by_old,))).wrong.what
    rewritten(path, [*bodies_of(path), leaf(round_event(), 5, key)])
    assert verify_log(path).wrong.index == 5


def test_a_key_that_a_stranger_merely_names_vouches_for_nothing(tmp_path, key):
    """A forger ends its own log with a rotation to a key that people trust, and cannot sign with it."""
    path, forger = tmp_path / "audit.db", Ed25519PrivateKey.generate()
    with new_log(path, forger, num_entries=3) as log:
        log.checkpoint()
        log.rotate(key)
    trust = Trust(fingerprints=frozenset({key_fingerprint(key.public_key())}))
    assert "is not among those trusted" in verify_log(path, trust).wrong.what


def test_erased_entries_are_counted_and_hold(path, key, cosigned):
    from fedfin.audit.log import AuditLog

    with AuditLog.open(path, key=key) as log:
        log.prune([(0, 40), (64, 65)], retention="25 months")
        log.prune([(30, 70)], retention="25 months")
    report = verify_log(path, Trust(anchors=(cosigned,)))
    assert (report.wrong, report.num_pruned) == (None, 70)
    assert "the bodies of 70 entries were erased; their hashes are in the tree" in report.notes


def test_a_clock_that_went_back_is_said_unless_it_was_explained(tmp_path, key, monkeypatch):
    path = tmp_path / "audit.db"
    late, early = "2026-11-24T18:19:06.928Z", "2026-11-24T18:19:06.927Z"
    new_log(path, key).close()
    said = "the clock of coordinator went back before entry 1, unexplained"
    rewritten(path, [leaf(round_event(), 0, key, time=late), leaf(round_event(), 1, key, time=early)])
    report = verify_log(path)
    assert report.ok
    assert said in report.notes
    clock = leaf(Clock(source="ntp", offset_ms=-1), 1, key, time=early)
    rewritten(path, [leaf(round_event(), 0, key, time=late), clock, leaf(round_event(), 2, key, time=early)])
    assert not any("went back" in note for note in verify_log(path).notes)


def test_entries_of_a_later_release_are_counted_and_hold(tmp_path, key):
    path = tmp_path / "audit.db"
    new_log(path, key).close()
    later = list(
        signed_leaves(
            0,
            entry.utc_now(),
            "coordinator",
            ['{"a":[1],"type":"merger","version":3}'],
            key=key,
            origin=ORIGIN,
        )
    )
    rewritten(path, later)
    report = verify_log(path)
    assert report.ok
    assert "1 entries are of a later release: signed and in the tree, not read" in report.notes

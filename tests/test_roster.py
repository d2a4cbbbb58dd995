"""federation.db: invitations work once and for one name, and what a method returned survives."""

import contextlib
import dataclasses
import datetime as dt
import multiprocessing
import sqlite3
import stat
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fedfin.errors import ConfigError, EnrolmentError, LinkError
from fedfin.invitation import Invitation, secret_hash
from fedfin.server.roster import AskedSum, Checkpoint, FederationStore, Member


@pytest.fixture
def path(tmp_path):
    return tmp_path / "federation.db"


@pytest.fixture
def store(path):
    return FederationStore.create(path)


def invitation_for(name):
    return Invitation.create(name, "fed.example:9092", "0" * 64)


def member_named(name, key=None):
    return Member(name, key or f"node key of {name}", "certificate", "identity", "witness", "signature")


def invited(store, name):
    invitation = invitation_for(name)
    store.invite(invitation)
    return invitation.secret_hash()


def move_expiry(path, hours):
    """Let the stored invitations expire by so many hours from now."""
    expires = dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE invitations SET expires_at = ?", (expires.isoformat(),))
    db.close()


# Invitations


def test_an_invited_lender_is_enrolled_and_its_invitation_used_up(store):
    hashed = invited(store, "north")
    store.check_invitation("north", hashed)
    store.enrol(member_named("north"), hashed)
    assert store.members() == (member_named("north"),)
    assert store.pending_invitations() == ()


def test_nobody_is_invited_under_the_coordinator_s_name(store):
    with pytest.raises(EnrolmentError, match="take another name"):
        store.invite(Invitation.create("coordinator", "fed.example:9092", "0" * 64))


def test_an_invitation_holds_for_24_hours(store, path):
    before = dt.datetime.now(dt.UTC)
    hashed = invited(store, "north")
    ((name, expires),) = store.pending_invitations()
    assert name == "north"
    lasts = dt.datetime.fromisoformat(expires) - before
    assert dt.timedelta(hours=24) <= lasts < dt.timedelta(hours=24, minutes=1)
    move_expiry(path, hours=0.01)
    store.check_invitation("north", hashed)
    move_expiry(path, hours=-0.01)
    assert store.pending_invitations() == ()
    for use in (
        lambda: store.check_invitation("north", hashed),
        lambda: store.enrol(member_named("north"), hashed),
    ):
        with pytest.raises(
            EnrolmentError, match=r"expired at .*, 24 hours after .*`fedfin server invite north`"
        ):
            use()
    assert store.members() == ()


def test_checking_an_invitation_does_not_use_it(store):
    hashed = invited(store, "north")
    for _ in range(3):
        store.check_invitation("north", hashed)
    store.enrol(member_named("north"), hashed)


def test_an_invitation_works_once(store):
    hashed = invited(store, "north")
    store.enrol(member_named("north"), hashed)
    for use in (
        lambda: store.check_invitation("north", hashed),
        lambda: store.enrol(member_named("north", key="another node key"), hashed),
    ):
        with pytest.raises(EnrolmentError, match=r"the token of north was used at .*; a token works once"):
            use()
    assert store.members() == (member_named("north"),)


def test_an_invitation_is_for_one_name(store):
    invitation = invitation_for("north")
    store.invite(invitation)
    with pytest.raises(EnrolmentError, match="this federation gave no such token to south"):
        store.enrol(member_named("south"), secret_hash("south", invitation.secret))
    store.enrol(member_named("north"), invitation.secret_hash())


def test_a_newer_invitation_replaces_the_one_before(store):
    old, new = invited(store, "north"), invited(store, "north")
    with pytest.raises(EnrolmentError, match=r"replaced or altered; ask .*`fedfin server invite north`"):
        store.enrol(member_named("north"), old)
    assert [name for name, _ in store.pending_invitations()] == ["north"]
    store.enrol(member_named("north"), new)


def test_a_newer_invitation_mends_an_expired_one(store, path):
    invited(store, "north")
    move_expiry(path, hours=-1)
    store.enrol(member_named("north"), invited(store, "north"))


def test_an_enrolled_name_is_not_invited_again(store):
    store.enrol(member_named("north"), invited(store, "north"))
    with pytest.raises(EnrolmentError, match="north is enrolled already; take another name"):
        store.invite(invitation_for("north"))
    store.enrol(member_named("north-2"), invited(store, "north-2"))


def test_a_node_key_is_enrolled_once_and_the_second_ones_token_stays_usable(store):
    store.enrol(member_named("north"), invited(store, "north"))
    hashed = invited(store, "south")
    with pytest.raises(EnrolmentError, match="south or its node key is enrolled already"):
        store.enrol(member_named("south", key="node key of north"), hashed)
    store.enrol(member_named("south"), hashed)


def test_an_unknown_secret_is_refused(store):
    with pytest.raises(EnrolmentError, match="this federation gave no such token to north"):
        store.check_invitation("north", "0" * 64)


def test_of_many_threads_with_one_token_exactly_one_is_enrolled(store):
    hashed = invited(store, "north")
    together, outcomes = threading.Barrier(8), []

    def enrol(number):
        together.wait()
        try:
            store.enrol(member_named("north", key=f"key {number}"), hashed)
            outcomes.append("enrolled")
        except EnrolmentError as error:
            outcomes.append(str(error).partition(" at ")[0])

    threads = [threading.Thread(target=enrol, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["enrolled", *["the token of north was used"] * 7]
    assert len(store.members()) == 1


def _enrol_in_a_process(path, hashed, number, together, outcomes):
    together.wait()
    try:
        FederationStore(path).enrol(member_named("north", key=f"key {number}"), hashed)
        outcomes.put("enrolled")
    except EnrolmentError as error:
        outcomes.put(str(error).partition(" at ")[0])


def test_of_two_processes_with_one_token_exactly_one_is_enrolled(store, path):
    hashed = invited(store, "north")
    context = multiprocessing.get_context("forkserver")
    together, outcomes = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_enrol_in_a_process, args=(path, hashed, number, together, outcomes))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    told = sorted(outcomes.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    outcomes.close()
    assert told == ["enrolled", "the token of north was used"]


def test_no_secret_is_in_the_file(store, path):
    invitations = [invitation_for(name) for name in ("north", "south")]
    for invitation in invitations:
        store.invite(invitation)
    store.enrol(member_named("north"), invitations[0].secret_hash())
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for invitation in invitations:
        assert invitation.secret_hash().encode() in kept
        for form in (
            invitation.secret.encode(),
            bytes.fromhex(invitation.secret),
            invitation.to_token().encode(),
        ):
            assert form not in kept


# Members, jobs, checkpoints, answers


def test_the_roster_is_by_name_and_survives_reopening(store, path):
    for name in ("south", "east", "north"):
        store.enrol(member_named(name), invited(store, name))
    expected = tuple(member_named(name) for name in ("east", "north", "south"))
    assert FederationStore(path).members() == expected


def test_jobs_survive_reopening_oldest_first(store, path):
    store.start_job("b-1", '{"plan": 1}', "digest 1")
    store.start_job("a-2", '{"plan": 2}', "digest 2")
    store.end_job("b-1", "completed")
    jobs = FederationStore(path).jobs()
    assert [(job.job_id, job.plan, job.digest, job.status) for job in jobs] == [
        ("b-1", '{"plan": 1}', "digest 1", "completed"),
        ("a-2", '{"plan": 2}', "digest 2", "running"),
    ]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=8, deadline=None)  # a disk may be slow
@given(
    st.lists(finite, max_size=8), st.integers(0, 10_000), st.text(st.characters(exclude_categories=["Cs"]))
)
def test_a_checkpoint_survives_to_the_last_bit(tmp_path_factory, values, number, bins):
    path = tmp_path_factory.mktemp("store") / "federation.db"
    store = FederationStore.create(path)
    store.start_job("job", "{}", "digest")
    weights = np.array(values, dtype=np.float32)
    store.save_checkpoint("job", Checkpoint(number, bins, "fingerprint", weights))
    kept = FederationStore(path).checkpoint("job")
    assert (kept.round, kept.bins, kept.fingerprint) == (number, bins, "fingerprint")
    assert_array_equal(kept.weights.view(np.uint32), weights.view(np.uint32), strict=True)


def test_the_newest_checkpoint_of_each_job_is_kept(store):
    for job in ("a", "b"):
        store.start_job(job, "{}", job)
        assert store.checkpoint(job) is None
    for number in (0, 1, 2):
        said = {"event": "round_done", "round": number}
        store.save_checkpoint("a", Checkpoint(number, "[]", "f", np.full(3, number, dtype=np.float32)), said)
    assert store.checkpoint("a").round == 2
    assert_array_equal(store.checkpoint("a").weights, [2, 2, 2])
    assert store.checkpoint("b") is None
    assert (store.said("a"), store.said("b")) == ({"event": "round_done", "round": 2}, None)
    store.keep_said("a", {"event": "evaluated"})
    assert store.said("a") == {"event": "evaluated"}


def test_a_checkpoint_does_not_show_its_weights():
    shown = repr(Checkpoint(1, "[]", "f", np.full(3, 0.125, dtype=np.float32)))
    assert "0.125" not in shown


def test_answers_are_weights_or_refusals_and_the_last_one_counts(store, path):
    store.start_job("job", "{}", "digest")
    store.save_answer("job", "north", weight=100.0, reason=None)
    store.save_answer("job", "south", weight=None, reason="its policy")
    store.save_answer("job", "east", weight=None, reason="its policy")
    store.save_answer("job", "east", weight=50.0, reason=None)
    assert FederationStore(path).weights("job") == {"north": 100.0, "east": 50.0}
    assert store.weights("another") == {}


def test_a_lender_that_took_part_is_told_of_the_end_until_it_confirms(store, path):
    store.start_job("job", "{}", "digest")
    for name in ("south", "north"):
        store.save_answer("job", name, weight=1.0, reason=None)
    store.save_answer("job", "east", weight=None, reason="its policy")
    assert store.undelivered("job") == ("north", "south")
    store.mark_delivered("job", "north")
    assert FederationStore(path).undelivered("job") == ("south",)


def test_a_lender_that_stops_in_the_middle_has_no_weight_but_is_told_of_the_end(store):
    """It reserved budget for the job, which only the job's end gives back."""
    store.start_job("job", "{}", "digest")
    store.save_answer("job", "north", weight=100.0, reason=None)
    store.save_answer("job", "north", weight=None, reason="its ledger cannot record")
    assert store.weights("job") == {}
    assert store.undelivered("job") == ("north",)
    store.save_answer("job", "north", weight=100.0, reason=None)
    assert store.weights("job") == {"north": 100.0}


# Secure sums


@pytest.fixture
def job(store):
    store.start_job("job", "{}", "digest")
    return "job"


def test_a_jobs_roster_is_the_first_one_whatever_comes_later(store, path, job):
    assert store.roster(job) is None
    assert store.freeze_roster(job, "first") == "first"
    assert FederationStore(path).freeze_roster(job, "second") == "first"
    assert FederationStore(path).roster(job) == "first"


def test_no_attempt_of_a_stage_is_given_out_twice(store, path, job):
    assert [store.open_sum(job, "round 1") for _ in range(3)] == [0, 1, 2]
    assert FederationStore(path).open_sum(job, "round 1") == 3
    assert store.open_sum(job, "round 2") == 0


def test_a_sum_counts_as_asked_from_its_mark_on_and_not_before(store, path, job):
    for stage in ("bins", "round 1", "round 2"):
        store.open_sum(job, stage)
    names = frozenset({"east", "north", "south"})
    store.mark_asked(job, AskedSum("round 2", 0, 1, names, None))
    store.mark_asked(job, AskedSum("bins", 0, 0, names, None))
    store.mark_survivors(job, "bins", 0, ["north", "east"])
    assert set(FederationStore(path).asked_sums(job)) == {
        AskedSum("round 2", 0, 1, names, None),
        AskedSum("bins", 0, 0, names, frozenset({"east", "north"})),
    }


def test_a_strategys_moments_and_the_cohorts_loans_survive_to_the_last_bit(store, path, job):
    weights = np.zeros(3, dtype=np.float32)
    moments = (np.array([0.1, -1e-300, 5.0]), np.array([1e300, 0.0, 2.0]))
    store.save_checkpoint(job, Checkpoint(1, "[]", "f", weights, "", moments, 1234.5))
    kept = FederationStore(path).checkpoint(job)
    assert kept.num_loans == 1234.5
    for before, after in zip(moments, kept.moments, strict=True):
        assert_array_equal(before, after, strict=True)


# The file


def test_the_file_is_readable_by_its_owner_only(store, path):
    invited(store, "north")
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_federation_is_never_overwritten(store, path):
    store.enrol(member_named("north"), invited(store, "north"))
    with pytest.raises(ConfigError, match=r"federation\.db exists already; .*use another folder"):
        FederationStore.create(path)
    assert len(store.members()) == 1


def test_a_file_that_is_missing_damaged_or_of_another_release_is_refused(store, path):
    with pytest.raises(ConfigError, match=r"gone\.db does not exist; it is made by `fedfin server init`"):
        FederationStore(path.with_name("gone.db")).members()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(
        ConfigError, match=r"of version 99, this release reads \d+; run the release that made it"
    ):
        store.members()
    other = path.with_name("other.db")
    other.write_bytes(b"this is no database" * 100)
    with pytest.raises(LinkError, match=r"other\.db cannot be opened .*restore it from its backup"):
        FederationStore(other).members()


VERSION_1 = """
CREATE TABLE invitations (
    name TEXT PRIMARY KEY, secret_hash TEXT NOT NULL UNIQUE, expires_at TEXT NOT NULL, used_at TEXT);
CREATE TABLE members (
    name TEXT PRIMARY KEY, node_key TEXT NOT NULL UNIQUE, certificate TEXT NOT NULL,
    identity_key TEXT NOT NULL, witness_key TEXT NOT NULL, signature TEXT NOT NULL, joined_at TEXT NOT NULL);
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, plan TEXT NOT NULL, digest TEXT NOT NULL, status TEXT NOT NULL,
    created_at TEXT NOT NULL);
CREATE TABLE checkpoints (
    job_id TEXT PRIMARY KEY REFERENCES jobs, round INTEGER NOT NULL, bins TEXT NOT NULL,
    fingerprint TEXT NOT NULL, weights BLOB NOT NULL, reference TEXT NOT NULL);
CREATE TABLE answers (
    job_id TEXT NOT NULL REFERENCES jobs, name TEXT NOT NULL, weight REAL, reason TEXT, delivered_at TEXT,
    PRIMARY KEY (job_id, name));
INSERT INTO members VALUES ('north', 'k', 'c', 'i', 'w', 's', '2026-11-01');
INSERT INTO jobs VALUES ('job', '{}', 'd', 'running', '2026-11-01');
INSERT INTO checkpoints VALUES ('job', 7, '[1]', 'f', x'0000803f00000040', '{}');
INSERT INTO answers VALUES ('job', 'north', 50.0, NULL, NULL);
PRAGMA user_version=1;
"""


def test_a_file_of_version_1_is_brought_to_this_one_with_all_that_is_in_it(tmp_path):
    path = tmp_path / "federation.db"
    with sqlite3.connect(path) as db:
        db.executescript(VERSION_1)
    db.close()
    store = FederationStore(path)
    kept = store.checkpoint("job")
    assert (kept.round, kept.bins, kept.fingerprint, kept.reference) == (7, "[1]", "f", "{}")
    assert_array_equal(kept.weights, [1.0, 2.0])
    assert (kept.moments, kept.num_loans) == ((), 0.0)
    assert store.weights("job") == {"north": 50.0}
    assert [member.name for member in store.members()] == ["north"]
    assert store.open_sum("job", "bins") == 0
    assert store.freeze_roster("job", "roster") == "roster"
    FederationStore.create(tmp_path / "new.db")
    assert columns_of(path) == columns_of(tmp_path / "new.db")


def test_a_file_of_version_2_knows_which_jobs_had_begun(tmp_path):
    path = tmp_path / "federation.db"
    store = FederationStore.create(path)
    for job_id in ("new", "asked"):
        store.start_job(job_id, "{}", "d")
    store.open_sum("asked", "bins")
    with sqlite3.connect(path) as db:  # as version 2 had it
        db.execute("ALTER TABLE jobs DROP COLUMN reason")
        db.execute("ALTER TABLE jobs DROP COLUMN began_at")
        db.executescript(
            "DROP TABLE roster_versions; DROP TABLE roster_candidate; DROP TABLE said; PRAGMA user_version=2;"
        )
    db.close()
    assert store.versions.complete() == ()
    kept = {job.job_id: job for job in store.jobs()}
    assert (kept["new"].began_at, kept["new"].reason) == (None, "")
    assert kept["asked"].began_at == kept["asked"].created_at
    FederationStore.create(tmp_path / "new.db")
    assert columns_of(path) == columns_of(tmp_path / "new.db")


def columns_of(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: db.execute(f"PRAGMA table_info({table})").fetchall() for table in sorted(tables)}


def test_a_migration_that_fails_leaves_version_1_whole(tmp_path):
    path = tmp_path / "federation.db"
    with sqlite3.connect(path) as db:
        db.executescript(VERSION_1)
        db.execute("CREATE TABLE sums (in_the_way TEXT)")
    db.close()
    with pytest.raises(LinkError, match="restore it from its backup"):
        FederationStore(path).members()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert len(db.execute("PRAGMA table_info(checkpoints)").fetchall()) == 6
    db.close()


def test_a_job_with_an_id_that_exists_is_refused_and_nothing_is_half_written(store):
    store.start_job("job", "{}", "one")
    with pytest.raises(LinkError, match=r"federation\.db cannot be written .*UNIQUE"):
        store.start_job("job", "{}", "two")
    assert [job.digest for job in store.jobs()] == ["one"]


def test_a_transaction_that_fails_leaves_nothing(store):
    hashed = invited(store, "north")
    broken = dataclasses.replace(member_named("north"), certificate=None)
    with pytest.raises(EnrolmentError):
        store.enrol(broken, hashed)
    assert store.members() == ()
    store.enrol(member_named("north"), hashed)

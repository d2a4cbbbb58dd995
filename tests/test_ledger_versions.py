"""A ledger of version 1 is brought up to date whole or not at all, and what it holds counts for every table."""

import sqlite3

import pytest

from fedfin.errors import BudgetSpentError, LedgerError, PrivacyParameterError
from fedfin.privacy.accounting import GaussianEvent, epsilon_rdp
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.ledger_file import Stage
from fedfin.privacy.snapshot import Snapshot

DELTA = 1e-5
BINS, ROUND = GaussianEvent(40.0), GaussianEvent(20.0, 0.5, 5)
WHOLE_JOB = epsilon_rdp([BINS, ROUND, ROUND], DELTA)

# As fedfin 0.1 wrote it: a finished job that spent bins and two rounds of "old", an open one with bins of "other".
VERSION_1 = """
BEGIN;
PRAGMA application_id=1717920870;
PRAGMA user_version=1;
CREATE TABLE entry (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('reserve', 'commit', 'release')),
    job_id TEXT NOT NULL,
    snapshot TEXT NOT NULL,
    stage TEXT NOT NULL,
    release_digest TEXT NOT NULL,
    delta REAL NOT NULL,
    epsilon_limit REAL NOT NULL,
    versions TEXT NOT NULL,
    utc TEXT NOT NULL,
    UNIQUE (job_id, kind, stage)
) STRICT;
CREATE INDEX entry_of_snapshot ON entry (snapshot);
CREATE TABLE event (
    seq INTEGER NOT NULL REFERENCES entry (seq),
    mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    count INTEGER NOT NULL,
    sampler TEXT NOT NULL,
    relation TEXT NOT NULL
) STRICT;
CREATE INDEX event_of_entry ON event (seq);
CREATE TRIGGER entry_stays BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'entries only grow'); END;
CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'entries only grow'); END;
CREATE TRIGGER event_stays BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'entries only grow'); END;
CREATE TRIGGER event_is_fixed BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'entries only grow'); END;
INSERT INTO entry VALUES
 (1, 'reserve', 'job-1', 'old', '', '', 1e-5, 3.0, 'fedfin=0.1', '2026-01-01T00:00:00+00:00'),
 (2, 'commit', 'job-1', 'old', 'bins', 'b1', 0.0, 0.0, 'fedfin=0.1', '2026-01-01T00:00:01+00:00'),
 (3, 'commit', 'job-1', 'old', 'round 1', 'r1', 0.0, 0.0, 'fedfin=0.1', '2026-01-01T00:00:02+00:00'),
 (4, 'commit', 'job-1', 'old', 'round 12', 'r2', 0.0, 0.0, 'fedfin=0.1', '2026-01-01T00:00:03+00:00'),
 (5, 'release', 'job-1', 'old', '', '', 0.0, 0.0, 'fedfin=0.1', '2026-01-01T00:00:04+00:00'),
 (6, 'reserve', 'job-2', 'other', '', '', 1e-5, 3.0, 'fedfin=0.1', '2026-01-02T00:00:00+00:00'),
 (7, 'commit', 'job-2', 'other', 'bins', 'b2', 0.0, 0.0, 'fedfin=0.1', '2026-01-02T00:00:01+00:00');
INSERT INTO event VALUES
 (1, 'gaussian', 40.0, 1.0, 1, 'none', 'add_or_remove_one'),
 (1, 'gaussian', 20.0, 0.5, 10, 'poisson', 'add_or_remove_one'),
 (2, 'gaussian', 40.0, 1.0, 1, 'none', 'add_or_remove_one'),
 (3, 'gaussian', 20.0, 0.5, 5, 'poisson', 'add_or_remove_one'),
 (4, 'gaussian', 20.0, 0.5, 5, 'poisson', 'add_or_remove_one'),
 (6, 'gaussian', 20.0, 0.5, 5, 'poisson', 'add_or_remove_one'),
 (6, 'gaussian', 40.0, 1.0, 1, 'none', 'add_or_remove_one'),
 (7, 'gaussian', 40.0, 1.0, 1, 'none', 'add_or_remove_one');
COMMIT;
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.db"
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(VERSION_1)
    database.close()
    path.chmod(0o600)
    return path


def table(name, loans):
    return Snapshot(name, "row", b"".join(loan.to_bytes(16, "big") for loan in sorted(loans)))


def schema_of(path):
    database = sqlite3.connect(path)
    rows = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    schema = [(kind, name, " ".join((sql or "").split())) for kind, name, sql in rows]
    version = database.execute("PRAGMA user_version").fetchone()
    database.close()
    return version, schema


def reserve(ledger, snapshot, job_id, limit, events=(BINS,)):
    ledger.reserve(job_id, snapshot, events, delta=DELTA, epsilon_limit=limit, max_delta=DELTA)


def test_an_old_file_gets_the_tables_of_a_new_one_and_keeps_every_entry(path, tmp_path):
    Ledger(tmp_path / "new.db").close()
    with Ledger(path) as ledger:
        entries = ledger.entries()
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    assert [(e.kind, e.job_id, e.stage, e.stage_kind, e.round, e.release_digest) for e in entries] == [
        ("reserve", "job-1", "", "", 0, ""),
        ("commit", "job-1", "bins", "bins", 0, "b1"),
        ("commit", "job-1", "round 1", "training", 1, "r1"),
        ("commit", "job-1", "round 12", "training", 12, "r2"),
        ("release", "job-1", "", "", 0, ""),
        ("reserve", "job-2", "", "", 0, ""),
        ("commit", "job-2", "bins", "bins", 0, "b2"),
    ]
    assert [e.events for e in entries[1:4]] == [(BINS,), (ROUND,), (ROUND,)]
    assert {(e.versions, e.utc[:4]) for e in entries} == {("fedfin=0.1", "2026")}
    with Ledger(path) as again:
        assert again.entries() == entries


def test_entries_of_an_old_file_stay_fixed(path):
    Ledger(path).close()
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="entries only grow"):
        database.execute("UPDATE entry SET stage = 'x'")
    database.close()


def test_a_new_table_counts_as_holding_all_loans_of_version_1(path):
    """Of a table of version 1 no loan was recorded, so any loan may have been in it."""
    new = table("new", range(5))
    with Ledger(path) as ledger:
        assert ledger.spent(new, DELTA).epsilon_rdp == epsilon_rdp([BINS, ROUND, ROUND, BINS], DELTA)
        assert ledger.held(new, DELTA).epsilon_rdp == epsilon_rdp([BINS, ROUND, ROUND, BINS, ROUND], DELTA)
        assert ledger.spent("old", DELTA) == ledger.spent(new, DELTA)
        with pytest.raises(BudgetSpentError, match="with 2 other snapshots"):
            reserve(ledger, new, "job-3", limit=WHOLE_JOB)
        reserve(ledger, new, "job-3", limit=3.0)


def test_a_table_of_version_1_that_comes_again_is_known_from_then_on(path):
    with Ledger(path) as ledger:
        assert ledger.account("old") is None
        for name, loans in (("old", range(5)), ("other", range(5, 10))):
            reserve(ledger, table(name, loans), f"job of {name}", limit=3.0)
        # known now to hold different loans
        assert ledger.spent("old", DELTA).epsilon_rdp == WHOLE_JOB
        assert ledger.spent("other", DELTA).events == (BINS,)
        assert ledger.account("old") == ledger.account("other")
        assert ledger.spent(table("new", [20]), DELTA).events == ()


def test_a_job_that_was_open_goes_on(path):
    with Ledger(path) as ledger:
        reserve(ledger, table("other", range(5)), "job-2", limit=3.0, events=(BINS, ROUND))
        ledger.commit("job-2", "round 1", [ROUND], "r3")
        ledger.release("job-2")
        assert [entry.kind for entry in ledger.entries()[5:]] == ["reserve", "commit", "commit", "release"]


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    before = path.read_bytes()
    broken = "fedfin.privacy.ledger_schema._VERSIONS"
    from fedfin.privacy import ledger_schema

    first, second = ledger_schema._VERSIONS
    with monkeypatch.context() as patch:
        patch.setattr(broken, (first, (*second, "CREATE TABLE entry (x)")))
        with pytest.raises(LedgerError, match="already exists"):
            Ledger(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["ledger.db"]
    Ledger(path).close()


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("statistics", Stage("statistics", 0)),
        ("bins", Stage("bins", 0)),
        ("round 7", Stage("training", 7)),
        ("evaluation 1", Stage("evaluation", 1)),
    ],
)
def test_a_stage_is_of_one_of_four_kinds(text, stage):
    assert Stage.parse(text) == stage


@pytest.mark.parametrize(
    "text", ["", "round", "round 0", "round x", "round 1 ", "bins 2", "scoring", "evaluation", "evaluation 0"]
)
def test_a_stage_of_no_kind_is_refused(text):
    with pytest.raises(PrivacyParameterError, match="must be statistics, bins, or round or evaluation"):
        Stage.parse(text)

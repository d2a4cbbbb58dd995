"""The tables of the ledger's SQLite file, version by version; a file of an earlier version is brought up to date.

A new file runs the statements of all versions, an old one those that it lacks, in one transaction: so both end with
the same tables. Entries, events and snapshots only grow, which triggers enforce.
"""

import sqlite3
from typing import Final

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION", "upgrade"]

APPLICATION_ID: Final = 0x66656466  # "fedf"

_GROWS = "BEGIN SELECT RAISE(ABORT, 'entries only grow'); END"

_VERSION_1 = (
    """
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
) STRICT
""",
    "CREATE INDEX entry_of_snapshot ON entry (snapshot)",
    """
CREATE TABLE event (
    seq INTEGER NOT NULL REFERENCES entry (seq),
    mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    count INTEGER NOT NULL,
    sampler TEXT NOT NULL,
    relation TEXT NOT NULL
) STRICT
""",
    "CREATE INDEX event_of_entry ON event (seq)",
    f"CREATE TRIGGER entry_stays BEFORE DELETE ON entry {_GROWS}",
    f"CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry {_GROWS}",
    f"CREATE TRIGGER event_stays BEFORE DELETE ON event {_GROWS}",
    f"CREATE TRIGGER event_is_fixed BEFORE UPDATE ON event {_GROWS}",
)
# Version 2: what a stage is, in words; parameters of other mechanisms; each snapshot's loans and account. A snapshot
# of version 1 has no row in `snapshot` until a job is reserved on the same table again.
_VERSION_2 = (
    "ALTER TABLE entry ADD COLUMN stage_kind TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE entry ADD COLUMN round INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE event ADD COLUMN parameters TEXT NOT NULL DEFAULT '{}'",
    "DROP TRIGGER entry_is_fixed",
    "UPDATE entry SET stage_kind = stage WHERE stage = 'bins'",
    "UPDATE entry SET stage_kind = 'training', round = CAST(substr(stage, 7) AS INTEGER) WHERE stage LIKE 'round %'",
    f"CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry {_GROWS}",
    """
CREATE TABLE snapshot (
    digest TEXT PRIMARY KEY,
    scheme TEXT NOT NULL,
    rows BLOB NOT NULL,
    renyi_order REAL NOT NULL,
    delta REAL NOT NULL
) STRICT
""",
    f"CREATE TRIGGER snapshot_stays BEFORE DELETE ON snapshot {_GROWS}",
    f"CREATE TRIGGER snapshot_is_fixed BEFORE UPDATE ON snapshot {_GROWS}",
)
_VERSIONS: Final = (_VERSION_1, _VERSION_2)

SCHEMA_VERSION: Final = len(_VERSIONS)


def upgrade(database: sqlite3.Connection) -> None:
    """Bring a file of an earlier version, or an empty one (version 0), up to date: wholly or not at all.

    Args:
        database: Open, in autocommit mode.

    Raises:
        sqlite3.Error: The file cannot be written; it is as it was.
    """
    database.execute("BEGIN IMMEDIATE")
    try:
        # read under the lock: another process may have been first
        (version,) = database.execute("PRAGMA user_version").fetchone()
        for statements in _VERSIONS[version:]:
            for statement in statements:
                database.execute(statement)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise

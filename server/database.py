"""federation.db as a file: its tables, its versions, and transactions that are safe from several processes at once.

SQLite with `synchronous=FULL`: what was committed survives a power cut.
"""

import contextlib
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedfin.errors import ConfigError, LinkError

__all__ = ["FederationFile"]

_VERSION: Final = 4
_SCHEMA: Final = """
CREATE TABLE invitations (
    name TEXT PRIMARY KEY, secret_hash TEXT NOT NULL UNIQUE, expires_at TEXT NOT NULL, used_at TEXT);
CREATE TABLE members (
    name TEXT PRIMARY KEY, node_key TEXT NOT NULL UNIQUE, certificate TEXT NOT NULL,
    identity_key TEXT NOT NULL, witness_key TEXT NOT NULL, signature TEXT NOT NULL, joined_at TEXT NOT NULL);
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, plan TEXT NOT NULL, digest TEXT NOT NULL, status TEXT NOT NULL,
    created_at TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', began_at TEXT);
CREATE TABLE checkpoints (
    job_id TEXT PRIMARY KEY REFERENCES jobs, round INTEGER NOT NULL, bins TEXT NOT NULL,
    fingerprint TEXT NOT NULL, weights BLOB NOT NULL, reference TEXT NOT NULL,
    moments BLOB NOT NULL DEFAULT x'', num_loans REAL NOT NULL DEFAULT 0);
CREATE TABLE answers (
    job_id TEXT NOT NULL REFERENCES jobs, name TEXT NOT NULL, weight REAL, reason TEXT, delivered_at TEXT,
    PRIMARY KEY (job_id, name));
"""
_SECURE_SUMS: Final = """
CREATE TABLE rosters (job_id TEXT PRIMARY KEY REFERENCES jobs, roster TEXT NOT NULL);
CREATE TABLE sums (
    job_id TEXT NOT NULL REFERENCES jobs, stage TEXT NOT NULL, attempt INTEGER NOT NULL, base INTEGER,
    sharers TEXT, survivors TEXT, PRIMARY KEY (job_id, stage, attempt));
"""
_ROSTERS: Final = """
CREATE TABLE roster_versions (number INTEGER PRIMARY KEY, signed TEXT NOT NULL, completed_at TEXT NOT NULL);
CREATE TABLE roster_candidate (place INTEGER PRIMARY KEY CHECK (place = 1), signed TEXT NOT NULL);
"""
_SAID: Final = """
CREATE TABLE said (job_id TEXT PRIMARY KEY REFERENCES jobs, event TEXT NOT NULL);
"""
_ENDS: Final = """
ALTER TABLE jobs ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN began_at TEXT;
UPDATE jobs SET began_at = created_at WHERE job_id IN (SELECT job_id FROM checkpoints UNION SELECT job_id FROM sums);
"""
_MIGRATIONS: Final = {
    1: f"""
ALTER TABLE checkpoints ADD COLUMN moments BLOB NOT NULL DEFAULT x'';
ALTER TABLE checkpoints ADD COLUMN num_loans REAL NOT NULL DEFAULT 0;
{_SECURE_SUMS}""",
    2: _ENDS + _ROSTERS,
    3: _SAID,
}
"""What brings a database of a version to the next."""


class FederationFile:
    """A federation's database on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty database.

        Raises:
            ConfigError: The file exists already.
        """
        if path.exists():
            msg = f"{path} exists already; `fedfin server init` never overwrites a federation: use another folder"
            raise ConfigError(msg)
        path.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(
                f"{_SCHEMA}{_SECURE_SUMS}{_ROSTERS}{_SAID}PRAGMA user_version={_VERSION};"
            )

    @contextlib.contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """Give a connection to read with.

        Raises:
            LinkError: The file cannot be read.
            ConfigError: It does not exist, or is of a version that this release does not read.
        """
        connection = self._connect()
        try:
            yield connection
        except sqlite3.Error as error:
            msg = f"{self._path} cannot be read ({error}); restore it from its backup"
            raise LinkError(msg) from error
        finally:
            connection.close()

    @contextlib.contextmanager
    def writing(self) -> Generator[sqlite3.Connection]:
        """Give a connection in one transaction: all of it is kept, or nothing; errors as `reading`."""
        connection = self._connect()
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            msg = f"{self._path} cannot be written ({error}); free the disk or mend its permissions, then start again"
            raise LinkError(msg) from error
        finally:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not self._path.exists():
            msg = f"{self._path} does not exist; it is made by `fedfin server init`"
            raise ConfigError(msg)
        try:
            connection = sqlite3.connect(self._path, timeout=10, isolation_level=None)
            connection.execute("PRAGMA synchronous=FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version in _MIGRATIONS:
                version = _migrate(connection)
        except sqlite3.Error as error:
            msg = f"{self._path} cannot be opened ({error}); restore it from its backup"
            raise LinkError(msg) from error
        if version != _VERSION:
            connection.close()
            msg = f"{self._path} is of version {version}, this release reads {_VERSION}; run the release that made it"
            raise ConfigError(msg)
        return connection


def _migrate(connection: sqlite3.Connection) -> int:
    """Bring a database of an earlier version to this one, wholly or not at all; return its version."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        # read again: another process may have done it since
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        while version in _MIGRATIONS:
            for statement in filter(str.strip, _MIGRATIONS[version].split(";")):
                connection.execute(statement)
            version += 1
        connection.execute(f"PRAGMA user_version={version}")
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.execute("ROLLBACK")
        raise
    return version

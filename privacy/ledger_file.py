"""The ledger's SQLite file: entries that only grow, whole transactions, and an error for all that is in doubt.

Journal mode DELETE with synchronous=EXTRA: a transaction is on the disk, directory included, when it returns
(https://sqlite.org/pragma.html#pragma_synchronous).
"""

import os
import re
import sqlite3
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias, cast

from fedfin.errors import LedgerError, PrivacyParameterError
from fedfin.privacy.events import Event, event_of, parameters_of
from fedfin.privacy.filter import Account
from fedfin.privacy.ledger_schema import APPLICATION_ID, SCHEMA_VERSION, upgrade
from fedfin.privacy.snapshot import Snapshot

__all__ = ["Entry", "Kind", "LedgerFile", "Stage", "StageKind"]

Kind: TypeAlias = Literal["reserve", "commit", "release"]
StageKind: TypeAlias = Literal["", "statistics", "bins", "training", "evaluation"]
_Fields: TypeAlias = tuple[Kind, str, str, str, StageKind, int, str, float, float, str, str]  # but the events

_BUSY_TIMEOUT_S = 10.0
_STAGE = re.compile(r"(?P<once>statistics|bins)|(?P<many>round|evaluation) (?P<number>[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger; fields that a kind does not use are empty or 0."""

    kind: Kind
    job_id: str
    snapshot: str
    stage: str  # of a commit, as `Stage.parse` reads it: "bins", "round 7"
    stage_kind: StageKind  # of a commit
    round: int  # of a commit of training or of an evaluation: its number, from 1
    release_digest: str  # of a commit
    delta: float  # as the job was reserved
    epsilon_limit: float  # as the job was reserved
    versions: str  # of fedfin and of the libraries that drew and accounted
    utc: str  # ISO 8601
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a release is part of: aggregate statistics, the bins' histograms, a training round, an evaluation."""

    kind: StageKind
    round: int  # number of the training round or of the evaluation, from 1; 0 otherwise

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Read "statistics", "bins", "round 7" or "evaluation 1".

        Raises:
            PrivacyParameterError: The text is none of these.
        """
        match = _STAGE.fullmatch(text)
        if match is None:
            msg = f"stage is {text!r}; it must be statistics, bins, or round or evaluation and its number"
            raise PrivacyParameterError(msg)
        if match["once"]:
            return cls(cast("StageKind", match["once"]), 0)
        return cls("training" if match["many"] == "round" else "evaluation", int(match["number"]))


class LedgerFile:
    """The open file; made with mode 0600 if it is not there, its folder must be; an earlier version is brought up.

    Raises:
        LedgerError: The file cannot be made, read or trusted; says why and the mend.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.failing_closed():
            if not path.exists():
                _create(path)
            self._db = _open(path)
            try:
                self._check()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file; what was recorded is already on the disk."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Hold the file's exclusive lock; all that is done inside is recorded, or none of it."""
        with self.failing_closed():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def failing_closed(self) -> Generator[None]:
        """Turn what SQLite or the file system refuses into a LedgerError."""
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last: SQLite quotes damaged text
            msg = (
                f"the privacy ledger {self.path} cannot be used ({error}), so nothing may leave; check that its"
                " folder exists and can be written, that the disk has space and that no other process holds the"
                " file, or restore it from a backup"
            )
            raise LedgerError(msg) from error

    def all_entries(self) -> tuple[Entry, ...]:
        """Return every entry, oldest first."""
        return self._read("", ())

    def job(self, job_id: str) -> tuple[Entry, ...]:
        """Return a job's entries, its reservation first; none for an unknown job."""
        return self._read("WHERE job_id = ?", (job_id,))

    def accounts(self) -> dict[str, Account]:
        """Return the account of each snapshot that has one, oldest first; those of version 1 have none."""
        with self.failing_closed():
            rows = self._db.execute(
                "SELECT digest, renyi_order, delta FROM snapshot ORDER BY rowid"
            ).fetchall()
        try:
            return {digest: Account(order, delta) for digest, order, delta in rows}
        except PrivacyParameterError as error:
            msg = f"{self.path} holds an account that this version cannot hold ({error}); restore it from a backup"
            raise LedgerError(msg) from error

    def snapshot(self, digest: str) -> Snapshot | None:
        """Return a snapshot with its loans' digests, or None where they are not recorded."""
        with self.failing_closed():
            row = self._db.execute(
                "SELECT digest, scheme, rows FROM snapshot WHERE digest = ?", (digest,)
            ).fetchone()
        return None if row is None else Snapshot(*row)

    def open_account(self, snapshot: Snapshot, account: Account) -> None:
        """Record a snapshot's loans and account, inside a transaction; they never change."""
        self._db.execute(
            "INSERT INTO snapshot VALUES (?, ?, ?, ?, ?)",
            (snapshot.digest, snapshot.scheme, snapshot.rows, account.order, account.delta),
        )

    def _read(self, where: str, parameters: tuple[str, ...]) -> tuple[Entry, ...]:
        query = (
            "SELECT entry.seq, kind, job_id, snapshot, stage, stage_kind, round, release_digest, delta,"  # noqa: S608  `where` is one of the two above
            " epsilon_limit, versions, utc,"
            " mechanism, noise_multiplier, sample_rate, count, parameters, sampler, relation"
            f" FROM entry LEFT JOIN event ON event.seq = entry.seq {where} ORDER BY entry.seq, event.rowid"
        )
        with self.failing_closed():
            # one statement, so that a reader sees one state of the file
            rows = self._db.execute(query, parameters).fetchall()
        events: dict[int, list[Event]] = {}
        fields: dict[int, _Fields] = {}
        for seq, *row in rows:
            fields[seq] = cast("_Fields", tuple(row[:11]))
            events.setdefault(seq, [])
            if row[11] is not None:
                events[seq].append(self._parsed_event(*row[11:]))
        return tuple(Entry(*row, tuple(events[seq])) for seq, row in fields.items())

    def _parsed_event(
        self,
        mechanism: str,
        noise_multiplier: float,
        sample_rate: float,
        count: int,
        parameters: str,
        sampler: str,
        relation: str,
    ) -> Event:
        try:
            event = event_of(mechanism, noise_multiplier, sample_rate, count, parameters)
        except PrivacyParameterError as error:
            msg = (
                f"{self.path} holds an event that cannot be accounted for ({error}); restore it from a backup"
            )
            raise LedgerError(msg) from error
        if (mechanism, sampler, relation) != (event.mechanism, event.sampler, event.relation):
            msg = (
                f"{self.path} holds an event ({mechanism}, {sampler}, {relation}) that this version cannot account"
                " for; install the version of fedfin that wrote it"
            )
            raise LedgerError(msg)
        return event

    def append(
        self,
        kind: Kind,
        job_id: str,
        snapshot: str,
        events: Sequence[Event],
        *,
        stage: str = "",
        release_digest: str = "",
        delta: float = 0.0,
        epsilon_limit: float = 0.0,
    ) -> None:
        """Add an entry, inside a transaction."""
        utc = datetime.now(UTC).isoformat(timespec="seconds")
        what = Stage.parse(stage) if stage else Stage("", 0)
        cursor = self._db.execute(
            "INSERT INTO entry (kind, job_id, snapshot, stage, stage_kind, round, release_digest, delta,"
            " epsilon_limit, versions, utc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(kind, job_id, snapshot, stage, what.kind, what.round, release_digest, delta),
                *(epsilon_limit, _versions(), utc),
            ),
        )
        for event in events:
            self._db.execute(
                "INSERT INTO event (seq, mechanism, noise_multiplier, sample_rate, count, sampler, relation,"
                " parameters) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    cursor.lastrowid,
                    event.mechanism,
                    event.noise_multiplier,
                    event.sample_rate,
                    event.count,
                    event.sampler,
                    event.relation,
                    parameters_of(event),
                ),
            )

    def _check(self) -> None:
        if self.path.stat().st_mode & 0o077:
            msg = f"{self.path} can be read or changed by others; run chmod 600 on it"
            raise LedgerError(msg)
        (application_id,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application_id != APPLICATION_ID:
            msg = (
                f"{self.path} is not a privacy ledger; name the lender's ledger, or restore it from a backup"
            )
            raise LedgerError(msg)
        if not 1 <= version <= SCHEMA_VERSION:
            msg = (
                f"{self.path} has schema version {version} and this fedfin knows {SCHEMA_VERSION}; install the"
                " version that wrote it"
            )
            raise LedgerError(msg)
        (state,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            msg = f"{self.path} is damaged ({state}); restore it from a backup"
            raise LedgerError(msg)
        if version < SCHEMA_VERSION:
            upgrade(self._db)


def _create(path: Path) -> None:
    """Make an empty ledger that appears under its name whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        os.close(handle)
        with closing(sqlite3.connect(name, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous=EXTRA")
            upgrade(database)
        # not rename: a ledger that another process made meanwhile must stay
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=rw"
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    # EXTRA and fullfsync: a committed entry survives a power cut, on macOS too
    database.executescript("PRAGMA synchronous=EXTRA; PRAGMA fullfsync=ON; PRAGMA trusted_schema=OFF;")
    return database


@lru_cache(maxsize=1)
def _versions() -> str:
    names = ("fedfin", "dp-accounting", "numpy", "cryptography", "torch", "opacus")
    return " ".join(f"{name}={metadata.version(name)}" for name in names)

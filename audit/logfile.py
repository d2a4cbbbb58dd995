"""The SQLite file of a log: its tables, how it is opened to write, and how it is read without touching it.

`entry` holds the leaf hashes and only grows; `body` holds the bytes, of which a row may go when an erasure that covers
it is on record; `node` holds the complete subtrees of level 1 and more; `checkpoint` and `cosignature` what was signed;
`signer` from which entry on which key signs. Triggers refuse every change but those. They stop mistakes, not an
intruder: that is what the tree, the signatures and the other parties' cosignatures are for.
"""

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fedfin.errors import AuditError
from fedfin.files import sync_directory

__all__ = ["check_schema", "connect", "create_file", "open_unchanged"]

_APPLICATION_ID: Final = 0x66666175  # "ffau": `file` and SQLite tell it from other databases
_FORMAT: Final = 1
_BUSY_TIMEOUT_S: Final = 10.0
_LARGEST_VALUE: Final = 2**20  # of a crafted file SQLite allocates no more than this for one value
_COPY_TRIES: Final = 20
_MAPPED_BYTES: Final = 2**40  # the whole file: pages are read without a call for each


def _frozen(table: str, change: str, when: str = "") -> str:
    return (
        f"CREATE TRIGGER {table}_no_{change} BEFORE {change.upper()} ON {table}{when}"
        f" BEGIN SELECT RAISE(ABORT, '{table}s of a log are never changed'); END"
    )


_ERASED: Final = " WHEN NOT EXISTS (SELECT 1 FROM erasure WHERE OLD.idx >= start AND OLD.idx < stop)"

_SCHEMA: Final = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE signer(start INTEGER PRIMARY KEY, public BLOB NOT NULL) STRICT",
    "CREATE TABLE entry(idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL) STRICT",
    "CREATE TABLE body(idx INTEGER PRIMARY KEY, content BLOB NOT NULL) STRICT",
    "CREATE TABLE node(level INTEGER, idx INTEGER, hash BLOB NOT NULL, PRIMARY KEY(level, idx)) STRICT, WITHOUT ROWID",
    "CREATE TABLE checkpoint(size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT",
    "CREATE TABLE cosignature(size INTEGER, name TEXT, line TEXT NOT NULL, PRIMARY KEY(size, name)) STRICT",
    "CREATE TABLE erasure(start INTEGER PRIMARY KEY, stop INTEGER NOT NULL) STRICT",
    *(
        _frozen(table, change)
        for table in ("meta", "signer", "entry", "node", "checkpoint", "cosignature", "erasure")
        for change in ("update", "delete")
    ),
    _frozen("body", "update"),
    _frozen("body", "delete", _ERASED),
)


def create_file(path: Path, *, origin: str, actor: str, side: str, public: bytes) -> None:
    """Write an empty log, whole or not at all, with mode 0600; an existing file is never replaced.

    Raises:
        AuditError: The file exists already, or cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as db:
            _set_durable(db)
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={_FORMAT}")
            db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                db.execute(statement)
            named = [("actor", actor), ("origin", origin), ("side", side)]
            db.executemany("INSERT INTO meta VALUES (?, ?)", named)
            db.execute("INSERT INTO signer VALUES (0, ?)", (public,))
            db.execute("COMMIT")
        os.link(part, path)  # not rename, which would replace
        sync_directory(path.parent)
    except FileExistsError as error:
        msg = f"{path} exists already; a log is never replaced: use another folder, or open this one"
        raise AuditError(msg) from error
    except (OSError, sqlite3.Error) as error:
        msg = f"{path} cannot be made ({error}); free the disk or check the folder's permissions"
        raise AuditError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection that writes, every commit on the disk when it returns.

    Raises:
        AuditError: The file does not exist, or is no log of this release.
    """
    if not path.is_file():
        msg = (
            f"{path} is no file; a log is made when its owner starts for the first time, or restored from a"
            " backup"
        )
        raise AuditError(msg)
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        check_schema(db, path)  # before anything is changed: it may be no log at all
        _set_durable(db)
    except (sqlite3.Error, AuditError) as error:
        if db is not None:
            db.close()
        if isinstance(error, AuditError):
            raise
        msg = f"{path} cannot be opened ({error}); free the disk, or restore the log from its backup"
        raise AuditError(msg) from error
    return db


@contextlib.contextmanager
def open_unchanged(path: Path) -> Generator[tuple[sqlite3.Connection, bool]]:
    """Give a connection that reads a log and changes nothing beside it, and tell whether it had an unmerged WAL.

    A log that was closed is one file, and is read in place. Beside one that is in use, or whose process was killed,
    lies a `-wal` file with its last entries: both are copied to a temporary folder and read there.

    Raises:
        AuditError: The file does not exist, is no log of this release, or is written too fast to be copied. At the
            end: a process opened it and wrote while it was read in place, so that what was read is of no one moment.
    """
    if not path.is_file():
        msg = f"{path} is no file; give the path of a log"
        raise AuditError(msg)
    wal = path.with_name(path.name + "-wal")
    with contextlib.ExitStack() as stack:
        try:
            unmerged = wal.is_file()  # an empty one too: whoever opened the log may write at any moment
            before = _state(path)
            if unmerged:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedfin-log-")))
                address = f"file:{quote(str(_copy(path, wal, folder)))}?mode=rw"
            else:
                address = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
            db = stack.enter_context(
                contextlib.closing(
                    sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
                )
            )
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_VALUE)
            db.execute("PRAGMA trusted_schema=OFF")
            db.execute("PRAGMA query_only=ON")
            db.execute(f"PRAGMA mmap_size={_MAPPED_BYTES}")
            check_schema(db, path)
        except (OSError, sqlite3.Error) as error:
            msg = (
                f"{path} cannot be read ({error}); it is damaged, or no log of fedfin: restore it from a"
                " backup"
            )
            raise AuditError(msg) from error
        try:
            yield db, unmerged
        finally:
            if not unmerged and _state(path) != before:
                msg = f"{path} was written while it was read; read it again"
                raise AuditError(msg)


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Check that the file is a log of this release, its tables and triggers as they were made.

    Raises:
        AuditError: It is something else, or a table or trigger was changed.
        sqlite3.Error: It is no database.
    """
    kind = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if (kind, version) != (_APPLICATION_ID, _FORMAT):
        msg = (
            f"{path} is no log of this release of fedfin (format {version}); give the path of a log, or use"
            " the release that made it"
        )
        raise AuditError(msg)
    found = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if found != set(_SCHEMA):
        msg = (
            f"the tables or triggers of {path} are not those that fedfin makes: someone changed the file;"
            " restore it from a backup"
        )
        raise AuditError(msg)


def _set_durable(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")  # the WAL is synced at every commit
    db.execute("PRAGMA secure_delete=ON")  # what is erased leaves no copy in a free page


def _copy(path: Path, wal: Path, folder: Path) -> Path:
    """Copy a log and its WAL as of one moment, by trying until neither changed meanwhile."""
    copy = folder / "log.db"
    for _ in range(_COPY_TRIES):
        before = _state(path), _state(wal)
        shutil.copyfile(path, copy)
        if wal.exists():
            shutil.copyfile(wal, folder / "log.db-wal")
        if before == (_state(path), _state(wal)):
            return copy
        (folder / "log.db-wal").unlink(missing_ok=True)
        time.sleep(0.05)
    msg = (
        f"{path} is written faster than it can be copied; stop the process that writes it, or try again later"
    )
    raise AuditError(msg)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns

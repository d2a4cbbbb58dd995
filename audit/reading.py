"""A log as anyone reads it, without a key: entries, roots, proofs, checkpoints and who cosigned them.

`open_log` reads a file and changes nothing; `fedfin.audit.log.AuditLog` is the same and writes.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final, Literal, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit import merkle
from fedfin.audit.checkpoint import add_signatures
from fedfin.audit.entry import Entry, parse_leaf
from fedfin.audit.logfile import open_unchanged
from fedfin.errors import AuditError

__all__ = ["LogReader", "open_log"]

_PAGE: Final = 1024  # entries in memory at a time


class LogReader:
    """Reads a log; safe for several threads.

    Attributes:
        path: The file.
        unmerged: Whether its last entries were read from a WAL that nobody has merged: the log is in use, or its
            process was killed.
        origin: The log's unique name, which its checkpoints carry.
        actor: Its owner, who signs the entries.
        side: Whether its owner is the coordinator or a lender.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, *, unmerged: bool = False) -> None:
        self.path = path
        self.unmerged = unmerged
        self._db = db
        self._lock = threading.RLock()
        self._depth = 0  # of snapshots and transactions that are open
        meta = dict(self._rows("SELECT name, value FROM meta"))
        if meta.keys() != {"origin", "actor", "side"} or meta["side"] not in {"coordinator", "lender"}:
            msg = f"{path} does not say whose log it is; restore it from a backup"
            raise AuditError(msg)
        self.origin: str = meta["origin"]
        self.actor: str = meta["actor"]
        self.side = cast("Literal['coordinator', 'lender']", meta["side"])

    @property
    def size(self) -> int:
        """Entries of the log."""
        return int(self._rows("SELECT coalesce(max(idx) + 1, 0) FROM entry")[0][0])

    @contextlib.contextmanager
    def snapshot(self) -> Generator[None]:
        """Have all that is read inside be of one moment, whatever other processes append meanwhile.

        Nothing can be appended inside it. It may be nested.

        Raises:
            AuditError: The file cannot be read.
        """
        with self._lock:
            if self._depth:
                yield
                return
            self._depth = 1
            try:
                self._roll_back()
                self._db.execute("BEGIN")
                yield
            except sqlite3.Error as error:
                raise self._unreadable(error) from error
            finally:
                self._depth = 0
                self._roll_back()

    @property
    def connection(self) -> sqlite3.Connection:
        """The database, for who reads it whole (`fedfin.audit.verifying`)."""
        return self._db

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that signs the log now, as the file says; the entries prove it (`verify_log`)."""
        rows = self._rows("SELECT public FROM signer ORDER BY start DESC LIMIT 1")
        return _public(rows[0][0] if rows else b"", self.path)

    def signers(self) -> list[tuple[int, Ed25519PublicKey]]:
        """Return from which entry on which key signs, as the file says."""
        rows = self._rows("SELECT start, public FROM signer ORDER BY start")
        return [(start, _public(public, self.path)) for start, public in rows]

    def root(self, size: int | None = None) -> bytes:
        """Return the root over the first `size` entries, all by default.

        Raises:
            AuditError: The log has fewer entries, or cannot be read.
        """
        with self.snapshot():
            return merkle.root(merkle.edge(self.node, self._size(size)))

    def node(self, level: int, index: int) -> bytes:
        """Return the stored hash of a complete subtree; level 0 are the leaves.

        Raises:
            AuditError: The log holds no such hash.
        """
        if level:
            rows = self._rows("SELECT hash FROM node WHERE level = ? AND idx = ?", level, index)
        else:
            rows = self._rows("SELECT leaf FROM entry WHERE idx = ?", index)
        if not rows:
            what = f"entry {index}" if not level else f"hash {index} of level {level}"
            msg = f"{self.path} holds no {what}; name one that it has, or restore the log from its backup"
            raise AuditError(msg)
        found: bytes = rows[0][0]
        return found

    def leaf_hash(self, index: int) -> bytes:
        """Return the hash of an entry.

        Raises:
            AuditError: There is no such entry.
        """
        return self.node(0, index)

    def body(self, index: int) -> bytes | None:
        """Return the bytes of an entry; None where its body was erased.

        Raises:
            AuditError: There is no such entry.
        """
        with self.snapshot():
            self.node(0, index)
            rows = self._rows("SELECT content FROM body WHERE idx = ?", index)
        return rows[0][0] if rows else None

    def entry(self, index: int) -> Entry | None:
        """Return an entry; None where its body was erased.

        Raises:
            AuditError: There is no such entry, or it does not parse.
        """
        body = self.body(index)
        return None if body is None else parse_leaf(body)

    def leaf_hashes(self, start: int, stop: int) -> Iterator[bytes]:
        """Give the leaf hashes of the entries from `start` to before `stop`."""
        for first in range(start, stop, _PAGE):
            rows = self._rows(
                "SELECT leaf FROM entry WHERE idx >= ? AND idx < ? ORDER BY idx",
                first,
                min(first + _PAGE, stop),
            )
            yield from (leaf for (leaf,) in rows)

    def bodies(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes, bytes | None]]:
        """Give index, leaf hash and bytes of the entries from `start` to before `stop`; bytes are None if erased."""
        stop = self._size(stop)
        for first in range(start, stop, _PAGE):
            yield from self._rows(
                "SELECT entry.idx, leaf, content FROM entry LEFT JOIN body ON body.idx = entry.idx"
                " WHERE entry.idx >= ? AND entry.idx < ? ORDER BY entry.idx",
                first,
                min(first + _PAGE, stop),
            )

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Entry | None]]:
        """Give index and entry from `start` to before `stop`; None where the body was erased.

        Raises:
            AuditError: An entry does not parse.
        """
        for index, _, body in self.bodies(start, stop):
            yield index, None if body is None else parse_leaf(body)

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the proof that entry `index` is in the log of `size` entries, all by default.

        Raises:
            AuditError: There is no such entry in a log of that size.
        """
        with self.snapshot():
            return merkle.inclusion(self.node, index, self._size(size))

    def consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """Return the proof that the log of `new` entries begins with that of `old`.

        Raises:
            AuditError: The log was never that long, or `old` is larger.
        """
        with self.snapshot():
            return merkle.consistency(self.node, old, self._size(new))

    def checkpoints(self) -> Iterator[tuple[int, str]]:
        """Give the size and the note of each stored checkpoint, the smallest first, with the log's signature only."""
        last = -1
        while rows := self._rows(
            "SELECT size, note FROM checkpoint WHERE size > ? ORDER BY size LIMIT ?", last, _PAGE
        ):
            yield from rows
            last = rows[-1][0]

    def cosignatures(self, size: int) -> dict[str, str]:
        """Return the witnesses' lines on the checkpoint of that size, by name."""
        return dict(self._rows("SELECT name, line FROM cosignature WHERE size = ? ORDER BY name", size))

    def last_cosigned(self) -> dict[str, int]:
        """Return the size of the longest checkpoint that each witness cosigned, by name."""
        return dict(self._rows("SELECT name, max(size) FROM cosignature GROUP BY name ORDER BY name"))

    def note(self, size: int) -> str:
        """Return the checkpoint of that size with its cosignatures.

        Raises:
            AuditError: There is none.
        """
        with self.snapshot():
            rows = self._rows("SELECT note FROM checkpoint WHERE size = ?", size)
            if not rows:
                msg = (
                    f"{self.path} holds no checkpoint of {size} entries; sign one first, or name another size"
                )
                raise AuditError(msg)
            return add_signatures(rows[0][0], self.cosignatures(size).values())

    def last_signed(self) -> tuple[int, str] | None:
        """Return the size and note of the longest checkpoint, without cosignatures; None where there is none."""
        rows = self._rows("SELECT size, note FROM checkpoint ORDER BY size DESC LIMIT 1")
        return (rows[0][0], rows[0][1]) if rows else None

    def latest_checkpoint(self) -> str | None:
        """Return the longest checkpoint with its cosignatures; None where there is none."""
        with self.snapshot():
            last = self.last_signed()
            return None if last is None else self.note(last[0])

    def final_checkpoint(self, threshold: int) -> str | None:
        """Return the longest checkpoint that at least `threshold` witnesses cosigned; None where there is none."""
        with self.snapshot():
            rows = self._rows(
                "SELECT size FROM checkpoint LEFT JOIN cosignature USING (size) GROUP BY size"
                " HAVING count(name) >= ? ORDER BY size DESC LIMIT 1",
                threshold,
            )
            return self.note(rows[0][0]) if rows else None

    def _size(self, size: int | None) -> int:
        held = self.size
        if size is None:
            return held
        if not 0 <= size <= held:
            msg = f"{self.path} has {held} entries, not {size}; name a size up to that"
            raise AuditError(msg)
        return size

    def _rows(self, query: str, *values: int | str | bytes) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except (sqlite3.Error, OverflowError) as error:
            raise self._unreadable(error) from error

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            # A failing disk may refuse even this; what begins next tries again before it does.
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _unreadable(self, error: sqlite3.Error | OverflowError) -> AuditError:
        return AuditError(f"{self.path} cannot be read ({error}); restore the log from its backup")


@contextlib.contextmanager
def open_log(path: Path) -> Generator[LogReader]:
    """Open a log to read it, changing neither it nor what lies beside it.

    Raises:
        AuditError: The file does not exist or is no log of this release.
    """
    with open_unchanged(path) as (db, unmerged):
        yield LogReader(path, db, unmerged=unmerged)


def _public(raw: bytes, path: Path) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, TypeError) as error:
        msg = f"{path} does not hold the key that signs it; restore the log from its backup"
        raise AuditError(msg) from error

"""The log of a coordinator or a lender: append-only, signed, on the disk when a call returns.

A call that fails has logged nothing, and the next one works once its cause is gone; what would go unlogged must not go
on. Threads that append at one time share a sync of the disk: the first to hold the lock writes for all who wait.
Several processes may append to one log; each looks at what the others wrote inside its own transaction.
"""

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.audit import merkle
from fedfin.audit.checkpoint import (
    Checkpoint,
    NoteKey,
    sign,
    signature_lines,
    verify_note,
)
from fedfin.audit.ending import check_ending
from fedfin.audit.entry import event_json, parse_leaf, signed_leaves, utc_now
from fedfin.audit.events import Event, Pruned, Rotation, Side, UnknownEvent
from fedfin.audit.logfile import connect, create_file
from fedfin.audit.reading import LogReader
from fedfin.errors import AuditError

__all__ = ["AuditLog"]

_KEPT_TYPES: Final = frozenset({"pruned", "rotation"})
"""Without these what was erased, and by which key, could not be checked."""

_MAX_EVENT_BYTES: Final = 255 * 1024


@dataclass(slots=True)
class _Tail:
    """Where the next entry goes: the tree's size and edge."""

    size: int
    edge: list[bytes]


@dataclass(slots=True)
class _Ticket:
    """Events that wait to be written, and what became of them."""

    texts: Sequence[str]
    first: int = -1
    error: BaseException | None = None
    done: bool = False


@dataclass(slots=True)
class _Queue:
    tickets: list[_Ticket] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, ticket: _Ticket) -> None:
        with self.lock:
            self.tickets.append(ticket)

    def take(self) -> list[_Ticket]:
        with self.lock:
            taken, self.tickets = self.tickets, []
            return taken


class AuditLog(LogReader):
    """A log that is written; safe for several threads. Close it, so that it is one file."""

    def __init__(self, path: Path, db: sqlite3.Connection, key: Ed25519PrivateKey) -> None:
        super().__init__(path, db)
        self._key = key
        self._queue = _Queue()
        self._tail = _Tail(-1, [])
        check_ending(self, key.public_key())

    @classmethod
    def create(cls, path: Path, *, origin: str, actor: str, key: Ed25519PrivateKey, side: Side) -> Self:
        """Make an empty log and open it.

        Args:
            path: The file; it must not exist.
            origin: The log's unique name in its checkpoints, such as `fedfin/credit-2026/bank-a`.
            actor: Its owner.
            key: The owner's identity key.
            side: Whether the owner is the coordinator or a lender: it decides which events the log may hold.

        Raises:
            AuditError: The file exists, cannot be made, or the origin is no name of a log.
        """
        Checkpoint(origin=origin, size=0, root=merkle.EMPTY_ROOT)
        create_file(path, origin=origin, actor=actor, side=side, public=key.public_key().public_bytes_raw())
        return cls.open(path, key=key)

    @classmethod
    def open(cls, path: Path, *, key: Ed25519PrivateKey) -> Self:
        """Open a log to go on with it, after a stop or a crash alike.

        Raises:
            AuditError: The file is missing or no log, its end does not fit its tree, it is shorter than a checkpoint
                that it signed, or `key` is not the one that signs it.
        """
        db = connect(path)
        try:
            return cls(path, db, key)
        except BaseException:
            db.close()
            raise

    def close(self) -> None:
        """Merge what was written into the one file and let it go; the log cannot be used after it.

        Raises:
            AuditError: The file cannot be written; nothing is lost, the next opening merges it.
        """
        try:
            with self._lock:
                self._db.close()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, event: Event) -> int:
        """Log an event; it is on the disk when this returns.

        Returns:
            Its index.

        Raises:
            AuditError: It could not be logged, or this log may not hold it: what it is about must not go on.
        """
        return self.append_many((event,))

    def append_many(self, events: Iterable[Event]) -> int:
        """Log events, all or none of them, with one sync of the disk.

        Returns:
            The index of the first.

        Raises:
            AuditError: As `append`.
        """
        ticket = _Ticket([self._checked(event) for event in events])
        self._queue.put(ticket)
        with self._lock:
            if not ticket.done:  # else whoever held the lock wrote it
                self._write(self._queue.take())
        if ticket.error is not None:
            if isinstance(ticket.error, AuditError):
                raise AuditError(str(ticket.error)) from ticket.error
            msg = (
                f"{self.path}: another thread was stopped while it wrote; log again: nothing goes on unlogged"
            )
            raise AuditError(msg) from ticket.error
        return ticket.first

    def append_first(self, event: Event) -> bool:
        """Log an event if the log is empty: of several processes that found a log, one says so.

        Returns:
            Whether it was logged.

        Raises:
            AuditError: As `append`.
        """
        text = self._checked(event)
        with self._lock:
            if self.size:
                return False
            with self._transaction() as tail:
                is_empty = tail.size == 0
                if is_empty:
                    self._insert(tail, [text])
            return is_empty

    def checkpoint(self) -> str:
        """Sign and store a checkpoint of the log as it is; the same one again where nothing was added.

        Returns:
            A note with the log's signature and the cosignatures it already has.

        Raises:
            AuditError: It could not be stored, and is not to be shown to anyone.
        """
        with self._lock:
            size = self.size
            if not self._rows("SELECT 1 FROM checkpoint WHERE size = ?", size):
                with self._transaction() as tail:
                    size = tail.size
                    note = sign(Checkpoint(self.origin, size, merkle.root(tail.edge)), self._key)
                    self._db.execute("INSERT OR IGNORE INTO checkpoint VALUES (?, ?)", (size, note))
            return self.note(size)

    def add_cosignatures(
        self, size: int, lines: Iterable[str], witnesses: Mapping[str, Ed25519PublicKey]
    ) -> dict[str, int]:
        """Store witnesses' lines on the checkpoint of `size`; a witness's first line stays.

        Args:
            size: Of a stored checkpoint.
            lines: As `fedfin.audit.checkpoint.cosign` gives them.
            witnesses: The witness key of each member of the roster.

        Returns:
            When each witness of these lines cosigned, Unix seconds.

        Raises:
            AuditError: A line is of none of the witnesses, or does not verify; nothing is stored.
        """
        with self._lock:
            note = self.note(size)
            checked = [_cosignature(note, line, witnesses) for line in lines]
            with self._transaction():
                self._db.executemany(
                    "INSERT OR IGNORE INTO cosignature VALUES (?, ?, ?)",
                    [(size, name, line) for name, _, line in checked],
                )
            return {name: time for name, time, _ in checked}

    def copy_to(self, path: Path) -> None:
        """Write a copy of the log as it is now: one file, whole or not at all; an existing file is replaced.

        Raises:
            AuditError: It cannot be written.
        """
        part = path.with_name(f".{path.name}.part")
        try:
            part.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy:
                with self._lock:
                    self._db.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # nothing lies beside a copy that nobody writes
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, sqlite3.Error) as error:
            part.unlink(missing_ok=True)
            raise self._failed(error) from error

    def rotate(self, new_key: Ed25519PrivateKey) -> int:
        """Log that the owner's identity key is replaced: the old key signs this entry, the new one all after it.

        Returns:
            The entry's index.

        Raises:
            AuditError: It could not be logged; the old key goes on.
        """
        old, new = (key.public_key().public_bytes_raw() for key in (self._key, new_key))
        event = Rotation(member=self.actor, key="identity", old=old.hex(), new=new.hex())
        with self._lock:
            with self._transaction() as tail:
                index = tail.size
                self._insert(tail, [event_json(event)])
                self._db.execute("INSERT INTO signer VALUES (?, ?)", (tail.size, new))
            self._key = new_key
            return index

    def prune(self, ranges: Sequence[tuple[int, int]], *, retention: str) -> int:
        """Erase the bodies of entries; their hashes stay, so every proof holds. That it was done is logged first.

        Args:
            ranges: First index and the one after the last, ascending and apart.
            retention: The retention class that has run out.

        Returns:
            The index of the entry that says so.

        Raises:
            AuditError: A range is not of this log, holds an entry that must stay (a rotation, an earlier erasure),
                or the disk refused; nothing is erased.
        """
        with self._lock:
            with self._transaction() as tail:
                self._check_ranges(ranges)
                event = self._pruned(ranges, retention)
                index = tail.size
                self._insert(tail, [event_json(event)])
                self._db.executemany("INSERT OR IGNORE INTO erasure VALUES (?, ?)", ranges)
                self._db.executemany("DELETE FROM body WHERE idx >= ? AND idx < ?", ranges)
            # The WAL still holds the pages as they were: it is merged and cut to nothing.
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")
            return index

    def _pruned(self, ranges: Sequence[tuple[int, int]], retention: str) -> Pruned:
        digest, number = hashlib.sha256(), 0
        for start, stop in ranges:
            for index, leaf, body in self.bodies(start, stop):
                if body is not None and parse_leaf(body).event.type in _KEPT_TYPES:
                    msg = (
                        f"entry {index} of {self.path} must stay, or the log could not be checked;"
                        " leave it out of the ranges"
                    )
                    raise AuditError(msg)
                digest.update(leaf)
                number += 1
        return Pruned(
            ranges=tuple(ranges), num_entries=number, digest=digest.hexdigest(), retention=retention
        )

    def _checked(self, event: Event) -> str:
        own = isinstance(event, Rotation) and event.member == self.actor and event.key == "identity"
        if isinstance(event, UnknownEvent | Pruned) or own:
            msg = (
                f"a {event.type} event is not appended by hand; use the method of the log that does what it"
                " says"
            )
            raise AuditError(msg)
        if self.side not in event.sides:
            msg = (
                f"a {event.type} event has no place in the log of a {self.side}: it would tell what only"
                " the other side may know"
            )
            raise AuditError(msg)
        text = event_json(event)
        if len(text) > _MAX_EVENT_BYTES:
            msg = (
                f"a {event.type} event of {len(text)} characters is too large; log a digest and keep it in"
                " a file"
            )
            raise AuditError(msg)
        return text

    def _write(self, tickets: list[_Ticket]) -> None:
        """Write the events of all tickets in one transaction; each ticket learns how it went."""
        failure: BaseException | None = None
        try:
            with self._transaction() as tail:
                for ticket in tickets:
                    ticket.first = tail.size
                    self._insert(tail, ticket.texts)
        except BaseException as error:
            failure = error
            if not isinstance(error, AuditError):
                raise
        finally:
            for ticket in tickets:
                ticket.error, ticket.done = failure, True

    def _insert(self, tail: _Tail, texts: Sequence[str]) -> None:
        leaves: list[tuple[int, bytes]] = []
        bodies: list[tuple[int, bytes]] = []
        nodes: list[tuple[int, int, bytes]] = []

        def write(level: int, index: int, found: bytes) -> None:
            nodes.append((level, index, found))

        signed = signed_leaves(tail.size, utc_now(), self.actor, texts, key=self._key, origin=self.origin)
        for index, body in enumerate(signed, tail.size):
            leaf = merkle.leaf_hash(body)
            bodies.append((index, body))
            leaves.append((index, leaf))
            merkle.grow(tail.edge, index, leaf, write)
        tail.size += len(bodies)
        self._db.executemany("INSERT INTO entry VALUES (?, ?)", leaves)
        self._db.executemany("INSERT INTO body VALUES (?, ?)", bodies)
        self._db.executemany("INSERT INTO node VALUES (?, ?, ?)", nodes)

    @contextlib.contextmanager
    def _transaction(self) -> Generator[_Tail]:
        """Give the tail to write at; all of it is kept and synced, or nothing. The lock is held."""
        if self._depth:
            msg = f"{self.path} is being read as of one moment; nothing is written until that is done"
            raise AuditError(msg)
        self._depth = 1
        try:
            self._roll_back()
            self._db.execute("BEGIN IMMEDIATE")
            tail = self._present()
            yield tail
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        finally:
            self._depth = 0
            self._roll_back()  # after a commit there is nothing to
        self._tail = tail

    def _present(self) -> _Tail:
        """Return the tail as it is in the file, where another process may have written."""
        size = self.size
        if size != self._tail.size:
            if self.public_key.public_bytes_raw() != self._key.public_key().public_bytes_raw():
                msg = (
                    f"the key that signs {self.path} is another one now; open the log with the key of its"
                    " owner"
                )
                raise AuditError(msg)
            return _Tail(size, merkle.edge(self.node, size))
        return _Tail(size, list(self._tail.edge))

    def _check_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        before = 0
        for start, stop in ranges:
            if not before <= start < stop <= self.size:
                msg = (
                    f"entries {start} to {stop} are no range of {self.path}, or not after the one before;"
                    " name ranges in their order"
                )
                raise AuditError(msg)
            before = stop
        if not ranges:
            msg = f"no entries of {self.path} are named; nothing is erased"
            raise AuditError(msg)

    def _failed(self, error: sqlite3.Error | OSError) -> AuditError:
        return AuditError(
            f"{self.path} cannot be written ({error}); free the disk or mend the folder: nothing goes on unlogged"
        )


def _cosignature(note: str, line: str, witnesses: Mapping[str, Ed25519PublicKey]) -> tuple[str, int, str]:
    """Return the name, time and text of a witness's line that holds for the note."""
    body = note[: note.rfind("\n\n") + 2]
    named = signature_lines(body + line)
    name = named[0][0]
    if len(named) != 1 or name not in witnesses:
        msg = f"a cosignature by {name} is not a line by a member of the roster; ask the members for theirs"
        raise AuditError(msg)
    time = verify_note(body + line, {name: NoteKey("cosigner", witnesses[name])}).by[name]
    return name, time or 0, line

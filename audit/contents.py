"""Checks what the entries of a log say: form, place, actor, signature, the owner's keys, and what was erased.

Signatures are most of the work; they are checked by as many threads as there are cores, a batch ahead of the parsing.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.entry import Entry, parse_leaf, signed_part
from fedfin.audit.events import Clock, Pruned, Rotation, UnknownEvent
from fedfin.audit.findings import CHANGED, FoundError
from fedfin.audit.reading import LogReader
from fedfin.errors import AuditError

__all__ = ["Contents", "check_entries"]

_BATCH: Final = 1024
_BATCHES_AHEAD: Final = 4

_Signed = tuple[int, bytes, bytes, Ed25519PublicKey]  # index, message, signature, key


@dataclass(slots=True)
class Contents:
    """What the entries say about the log itself.

    Attributes:
        keys: From which size on which key signs.
        num_unknown: Entries of a later release.
        backwards: The first entry whose clock is behind the entry before it, neither of them about the clock.
    """

    keys: list[tuple[int, Ed25519PublicKey]]
    num_unknown: int = 0
    backwards: int | None = None
    _missing: list[list[int]] = field(default_factory=list)
    _erased: list[tuple[int, int]] = field(default_factory=list)
    _last_time: str = ""
    _last_is_clock: bool = False

    def key_at(self, size: int) -> Ed25519PublicKey:
        """Return the key that signs a checkpoint of this size."""
        return next(key for start, key in reversed(self.keys) if start <= size)

    def miss(self, index: int) -> None:
        """Note that an entry has no body."""
        if self._missing and self._missing[-1][1] == index:
            self._missing[-1][1] = index + 1
        else:
            self._missing.append([index, index + 1])

    def read(self, entry: Entry) -> None:
        """Take in an entry that is well formed."""
        event = entry.event
        self.num_unknown += isinstance(event, UnknownEvent)
        is_clock = isinstance(event, Clock)
        if (
            entry.time < self._last_time
            and not is_clock
            and not self._last_is_clock
            and self.backwards is None
        ):
            self.backwards = entry.seq
        self._last_time, self._last_is_clock = entry.time, is_clock
        if isinstance(event, Rotation) and event.member == entry.actor and event.key == "identity":
            if event.old != self.keys[-1][1].public_bytes_raw().hex():
                what = f"entry {entry.seq} replaces a key that did not sign the log"
                raise FoundError(entry.seq, what, CHANGED)
            self.keys.append((entry.seq + 1, Ed25519PublicKey.from_public_bytes(bytes.fromhex(event.new))))

    def erase(self, log: LogReader, entry: Entry, event: Pruned) -> None:
        """Hold an erasure against the hashes of what it erased."""
        digest, number, before = hashlib.sha256(), 0, 0
        for start, stop in event.ranges:
            if not before <= start < stop <= entry.seq:
                what = f"entry {entry.seq} erases entries {start} to {stop}, which are not before it or not in order"
                raise FoundError(entry.seq, what, CHANGED)
            for leaf in log.leaf_hashes(start, stop):
                digest.update(leaf)
                number += 1
            before = stop
        if (number, digest.hexdigest()) != (event.num_entries, event.digest):
            what = f"entry {entry.seq} erased other entries than the log holds the hashes of"
            raise FoundError(entry.seq, what, CHANGED)
        self._erased.extend(event.ranges)

    def check_missing(self) -> None:
        """Check that every body that is gone was erased by an entry that says so."""
        erased = sorted(self._erased)
        for start, stop in self._missing:
            place = start
            for first, last in erased:
                if first <= place < last:
                    place = last
            if place < stop:
                what = f"the body of entry {place} is gone, and no entry says that it was erased"
                raise FoundError(place, what, CHANGED)


def check_entries(log: LogReader, progress: Callable[[int, int], None] | None = None) -> Contents:
    """Check every entry of a log whose tree holds.

    Args:
        log: The log.
        progress: Called with (entries done, entries in all) after each batch.

    Returns:
        What the entries say about the log itself.

    Raises:
        FoundError: The first thing that is wrong.
        AuditError: The file cannot be read.
    """
    signers = log.signers()
    if not signers or signers[0][0] != 0:
        raise FoundError(None, "the file does not hold the key that signs its first entry", CHANGED)
    contents = Contents(keys=[signers[0]])
    size = log.size
    with _verifying() as submit:
        for first in range(0, size, _BATCH):
            signed: list[_Signed] = []
            try:
                for index, _, body in log.bodies(first, min(first + _BATCH, size)):
                    if body is None:
                        contents.miss(index)
                    else:
                        signed.append(_check_entry(log, contents, index, body))
            finally:
                submit(signed)  # also before a malformed entry: an earlier one may be wrong
            if progress is not None:
                progress(min(first + _BATCH, size), size)
    contents.check_missing()
    named, found = (
        [(start, key.public_bytes_raw()) for start, key in keys] for keys in (signers, contents.keys)
    )
    if named != found:
        raise FoundError(None, "the keys that the file names are not those that its entries name", CHANGED)
    return contents


def _check_entry(log: LogReader, contents: Contents, index: int, body: bytes) -> _Signed:
    try:
        entry = parse_leaf(body)
    except AuditError as error:
        raise FoundError(index, f"entry {index}: {error}", CHANGED) from error
    if entry.seq != index:
        raise FoundError(index, f"at place {index} stands the entry that was written as {entry.seq}", CHANGED)
    if entry.actor != log.actor:
        raise FoundError(
            index, f"entry {index} is by {entry.actor}, and the log is that of {log.actor}", CHANGED
        )
    if log.side not in entry.event.sides:
        what = f"entry {index}, a {entry.event.type}, has no place in the log of a {log.side}"
        raise FoundError(
            index, what, "its owner logged what only the other side may know, or changed the log"
        )
    key = contents.keys[-1][1]  # before it is read: a rotation is signed by the old key
    contents.read(entry)
    if isinstance(entry.event, Pruned):
        contents.erase(log, entry, entry.event)
    return index, *signed_part(body, log.origin), key


@contextmanager
def _verifying() -> Generator[Callable[[list[_Signed]], None]]:
    """Give a function that takes signatures to check; what is wrong is raised from it or at the end."""
    pending: deque[Future[int | None]] = deque()  # in the order of the entries

    def settle() -> None:
        index = pending.popleft().result()
        if index is not None:
            pending.clear()  # what comes later is not the first thing wrong
            what = f"entry {index} is not signed by the key of the log's owner"
            raise FoundError(index, what, CHANGED)

    def submit(signed: list[_Signed]) -> None:
        if signed:
            pending.append(pool.submit(_first_unsigned, signed))
        while len(pending) > _BATCHES_AHEAD:
            settle()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield submit
        finally:
            while pending:
                settle()


def _first_unsigned(signed: Sequence[_Signed]) -> int | None:
    for index, message, signature, key in signed:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return index
    return None

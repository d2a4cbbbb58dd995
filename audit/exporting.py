"""A log as lines of text (JSONL), for tools that read no SQLite and for people who get no bodies.

The first line says whose log it is and holds its checkpoints with their cosignatures. Each line after it is an entry:
its very bytes as they were hashed, or, where the body was erased or left out, its hash alone. So a line of an entry is
readable JSON and needs nothing else to be checked. A pruned export keeps the bodies without which the rest could not
be checked (key rotations, erasures) and no other: who checks it learns that nothing was changed, and not what happened.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit import merkle
from fedfin.audit.checking import Signers, check_note
from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.entry import canonical_json, parse_leaf
from fedfin.audit.events import Pruned
from fedfin.audit.findings import CUT, FoundError, Wrong
from fedfin.audit.reading import LogReader
from fedfin.audit.verifying import Anchored, Check, Report, Trust
from fedfin.errors import AuditError
from fedfin.files import write_public

__all__ = ["EXPORT_FORMAT", "Exported", "export_log", "verify_export"]

EXPORT_FORMAT: Final = "fedfin log export 1"

_KEPT: Final = frozenset({"pruned", "rotation"})
_MAX_LINE_BYTES: Final = 64 * 1024 * 1024  # the first line holds every checkpoint


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        digest: SHA-256 of it, hex.
        num_entries: Entries of the log.
        num_bodies: Entries whose bodies are in the file.
    """

    path: Path
    digest: str
    num_entries: int
    num_bodies: int


def export_log(log: LogReader, path: Path, *, pruned: bool = False) -> Exported:
    """Write a log to a file of lines.

    Args:
        log: Open to read.
        path: The file; replaced where it exists.
        pruned: Leave the bodies out; their hashes stay.

    Raises:
        AuditError: The log cannot be read.
        ConfigError: The file cannot be written.
    """
    size = log.size
    lines = [_header(log, size, pruned=pruned)]
    num_bodies = 0
    for _, leaf, body in log.bodies(0, size):
        if body is None or (pruned and parse_leaf(body).event.type not in _KEPT):
            lines.append(canonical_json({"leaf_hash": leaf.hex()}))
        else:
            num_bodies += 1
            lines.append(body)
    content = b"\n".join(lines) + b"\n"
    write_public(path, content)
    return Exported(path, hashlib.sha256(content).hexdigest(), size, num_bodies)


def verify_export(
    path: Path, trust: Trust | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Check an export by itself; what is wrong is reported, not raised.

    Args:
        path: The file.
        trust: What is known from elsewhere.
        progress: Called with (entries done, entries in all).
    """
    report = Report(path)
    try:
        with path.open("rb") as file:
            _check(_lines(file), trust or Trust(), report, progress or (lambda _done, _all: None))
    except FoundError as found:
        report.wrong = found.wrong
    except AuditError as error:
        report.wrong = Wrong(None, str(error), "the export cannot be checked further; ask for it again")
    except OSError as error:
        report.wrong = Wrong(
            None, f"{path} cannot be read ({error.strerror})", "name a file that can be read"
        )
    return report


@dataclass(frozen=True, slots=True)
class _Header:
    actor: str
    checkpoints: tuple[str, ...]
    key: Ed25519PublicKey
    origin: str
    pruned: bool
    size: int


def _header(log: LogReader, size: int, *, pruned: bool) -> bytes:
    first = log.signers()[0][1].public_bytes_raw().hex()
    return canonical_json(
        {
            "actor": log.actor,
            "checkpoints": [log.note(held) for held, _ in log.checkpoints()],
            "format": EXPORT_FORMAT,
            "key": first,
            "origin": log.origin,
            "pruned": pruned,
            "size": size,
        }
    )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_MAX_LINE_BYTES + 1):
        if not line.endswith(b"\n"):
            msg = "the last line of the export is cut; ask for it again"
            raise AuditError(msg)
        yield line[:-1]


def _parse_header(line: bytes) -> _Header:
    try:
        found = json.loads(line.decode())
        if found["format"] != EXPORT_FORMAT or canonical_json(found) != line:
            raise ValueError  # noqa: TRY301  (one message for all of it)
        header = _Header(
            actor=str(found["actor"]),
            checkpoints=tuple(str(note) for note in found["checkpoints"]),
            key=Ed25519PublicKey.from_public_bytes(bytes.fromhex(found["key"])),
            origin=str(found["origin"]),
            pruned=found["pruned"] is True,
            size=int(found["size"]),
        )
        if found.keys() != {"actor", "checkpoints", "format", "key", "origin", "pruned", "size"}:
            raise ValueError  # noqa: TRY301
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = (
            f"the first line is not that of an export of fedfin ({EXPORT_FORMAT}); ask for the export again,"
            " or use the release that made it"
        )
        raise AuditError(msg) from error
    return header


def _check(
    lines: Iterator[bytes], trust: Trust, report: Report, progress: Callable[[int, int], None]
) -> None:
    header = _parse_header(next(lines, b""))
    report.origin, report.actor = header.origin, header.actor
    signers = Signers(header.origin, header.actor, header.key)
    roots = _Roots(header.checkpoints, trust.anchors)
    subtrees: list[bytes] = []
    missing: set[int] = set()
    index = 0
    roots.note(0, subtrees, signers)
    for index, line in enumerate(lines, 1):
        at = index - 1
        if line.startswith(b'{"leaf_hash":'):
            leaf = _hash_of(line, at)
            missing.add(at)
        else:
            leaf = merkle.leaf_hash(line)
            event = signers.check(line, at).event
            if isinstance(event, Pruned):
                for start, stop in event.ranges:
                    missing.difference_update(range(start, min(stop, at)))
                    report.num_pruned += min(stop, at) - start
        merkle.grow(subtrees, at, leaf, lambda _level, _index, _hash: None)
        roots.note(index, subtrees, signers)
        if index % 4096 == 0:
            progress(index, header.size)
    report.size, report.root = index, merkle.root(subtrees)
    if index != header.size:
        raise FoundError(
            None,
            f"the export has {index} entries, and its first line says {header.size}",
            "lines were taken out or added: ask for the export again",
        )
    report.checked.append(Check("export", f"the log {header.origin} of {header.actor}, {index} entries"))
    _check_missing(missing, header, report)
    report.checked.append(Check("tree", f"the entries make the root {report.root.hex()}"))
    num_signed = index - len(missing) - report.num_pruned
    report.checked.append(
        Check("signatures", f"{num_signed} entries are signed by the key of {header.actor}")
    )
    roots.check(trust, signers, report)
    signers.check_trust(trust, report)


def _check_missing(missing: set[int], header: _Header, report: Report) -> None:
    if missing and not header.pruned:
        raise FoundError(
            min(missing),
            f"the body of entry {min(missing)} is missing, and no erasure of it is on record",
            "the export was changed: ask for it again",
        )
    if header.pruned:
        report.notes.append(
            "the export holds hashes without bodies: it shows that nothing was changed, and not what happened"
        )


def _hash_of(line: bytes, index: int) -> bytes:
    try:
        found = bytes.fromhex(json.loads(line.decode())["leaf_hash"])
        same = len(found) == 32 and canonical_json({"leaf_hash": found.hex()}) == line
    except (ValueError, KeyError, TypeError, RecursionError):
        found, same = b"", False
    if not same:
        raise FoundError(
            index, f"the line of entry {index} is no hash", "the export was changed: ask for it again"
        )
    return found


class _Roots:
    """The tree's roots at the sizes of all checkpoints, taken while the entries pass by."""

    def __init__(self, own: tuple[str, ...], anchors: tuple[str, ...]) -> None:
        self._own = [(parse_checkpoint(note).size, note) for note in own]
        self._anchors = [(parse_checkpoint(note).size, note) for note in anchors]
        self._wanted = {size for size, _ in (*self._own, *self._anchors)}
        self._roots: dict[int, tuple[bytes, Ed25519PublicKey]] = {}

    def note(self, size: int, subtrees: list[bytes], signers: Signers) -> None:
        if size in self._wanted:
            self._roots[size] = merkle.root(subtrees), signers.key

    def check(self, trust: Trust, signers: Signers, report: Report) -> None:
        anchored: Anchored | None = None
        for size, note in self._own:
            by = self._verify(size, note, trust, signers, "a checkpoint of the export")
            if by and len(by) >= max(1, trust.threshold):
                anchored = Anchored(size, by)
        for size, note in self._anchors:
            self._verify(size, note, trust, signers, "a checkpoint that is held elsewhere")
        if trust.threshold and anchored is None:
            raise FoundError(
                None,
                f"no checkpoint is cosigned by {trust.threshold} of the witnesses",
                "nobody vouches for this log but its owner: ask the members for their cosignatures",
            )
        report.anchored = anchored
        if self._own:
            report.checked.append(
                Check("checkpoints", f"{len(self._own)}, each of this tree and signed by its owner")
            )
        else:
            report.notes.append("the export holds no checkpoint: its tail may have been cut off")

    def _verify(self, size: int, note: str, trust: Trust, signers: Signers, what: str) -> tuple[str, ...]:
        if size not in self._roots:
            raise FoundError(
                None,
                f"{what} is of {size} entries, and the export has fewer",
                CUT,
            )
        root, key = self._roots[size]
        signers.vouch(key)  # what follows raises where it does not
        return check_note(note, signers.origin, size, root, key, trust.witnesses, what)

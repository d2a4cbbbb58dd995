"""Checks a log from end to end, offline, trusting neither its owner nor its file, and names the first thing wrong.

In order: the file's tables; every leaf hash from its bytes and every stored hash of the tree; every entry's form,
place, actor and signature, the keys' rotations, and what was erased; every checkpoint against the recomputed tree; the
cosignatures; and the checkpoints that others hold, without which a log that was cut short cannot be told from one that
never grew. Memory is bounded: the file is read in batches.

Source: RFC 6962 section 2.1, RFC 9162 section 2.1.
"""

import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.checkpoint import (
    NoteKey,
    VerifiedNote,
    parse_checkpoint,
    signature_lines,
    verify_note,
)
from fedfin.audit.contents import Contents, check_entries
from fedfin.audit.findings import CHANGED, CUT, REWRITTEN, FoundError, Wrong
from fedfin.audit.reading import LogReader, open_log
from fedfin.audit.tree import check_tree
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Anchored", "Check", "Report", "Trust", "Wrong", "verify_log"]


@dataclass(frozen=True, slots=True)
class Trust:
    """What the one who checks knows from elsewhere.

    Attributes:
        fingerprints: Of identity keys of the log's owner, one of which must sign the log; any key will do if empty.
        witnesses: Witness keys whose cosignatures count, by name.
        threshold: Cosignatures that make a checkpoint final; with fewer on every one the log is reported as wrong.
        anchors: Checkpoints of this log that others hold, as signed notes.
    """

    fingerprints: frozenset[str] = frozenset()
    witnesses: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    threshold: int = 0
    anchors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was checked and holds."""

    what: str
    detail: str


@dataclass(frozen=True, slots=True)
class Anchored:
    """The longest checkpoint that witnesses cosigned: the log up to there is vouched for by others than its owner."""

    size: int
    by: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """What was checked of a log, and the first thing that is wrong.

    Attributes:
        path: The file.
        origin: The log's name.
        actor: Its owner.
        size: Entries.
        root: Root over all of them, as recomputed; empty where that failed.
        checked: What holds, in the order in which it was checked.
        notes: What is not wrong but should be known.
        wrong: The first thing that is wrong; None where nothing is.
        anchored: How far the witnesses vouch for the log.
        num_pruned: Entries whose bodies were erased.
        tree_s: Seconds for hashes.
        signatures_s: Seconds for entries and their signatures.
    """

    path: Path
    origin: str = ""
    actor: str = ""
    size: int = 0
    root: bytes = b""
    checked: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: Wrong | None = None
    anchored: Anchored | None = None
    num_pruned: int = 0
    tree_s: float = 0.0
    signatures_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.wrong is None


def verify_log(
    path: Path,
    trust: Trust | None = None,
    *,
    signatures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a log; what is wrong is reported, not raised.

    Args:
        path: A log's file.
        trust: What is known from elsewhere; nothing by default, and then the log is held against itself only.
        signatures: Whether the entries are parsed and their signatures checked: most of the time that it takes.
        progress: Called with (entries done, entries in all) after every batch of the last pass.
    """
    trust = trust or Trust()
    report = Report(path)
    try:
        with open_log(path) as log:
            _check_opened(log, report)
            start = time.perf_counter()
            report.num_pruned, report.root = check_tree(log)
            report.tree_s = time.perf_counter() - start
            _tell_tree(report)
            start = time.perf_counter()
            if signatures:
                contents = check_entries(log, progress)
                _tell_contents(contents, report)
            else:
                contents = Contents(keys=log.signers())
                report.notes.append("the entries' signatures were not checked, as was asked")
            report.signatures_s = time.perf_counter() - start
            _check_owner(log, contents, trust, report)
            _check_checkpoints(log, contents, trust, report)
            _check_anchors(log, contents, trust, report)
            _check_final(trust, report)
    except FoundError as found:
        report.wrong = found.wrong
    except AuditError as error:
        report.wrong = Wrong(None, str(error), "the file cannot be checked further: rely on none of it")
    except (sqlite3.Error, TypeError, ValueError) as error:  # values of other types, in a file made for this
        report.wrong = Wrong(None, f"the database is damaged ({error})", CHANGED)
    return report


def _check_opened(log: LogReader, report: Report) -> None:
    report.origin, report.actor, report.size = log.origin, log.actor, log.size
    report.checked.append(
        Check("file", f"the log {log.origin} of {log.actor}: tables and triggers as they are made")
    )
    if log.unmerged:
        report.notes.append(
            f"the log was not closed: it is in use, or its process was killed; {log.path.name}-wal was read from a copy"
        )


def _tell_tree(report: Report) -> None:
    kept = report.size - report.num_pruned
    what = (
        f"{kept} entries hash to their leaves, and all {report.size} leaves to the root {report.root.hex()}"
    )
    report.checked.append(Check("tree", what))
    if report.num_pruned:
        report.notes.append(
            f"the bodies of {report.num_pruned} entries were erased; their hashes are in the tree"
        )


def _tell_contents(contents: Contents, report: Report) -> None:
    kept = report.size - report.num_pruned
    rotated = f", who replaced its key {len(contents.keys) - 1} times" if len(contents.keys) > 1 else ""
    report.checked.append(
        Check("signatures", f"{kept} entries, each at its place, signed by {report.actor}{rotated}")
    )
    if contents.num_unknown:
        report.notes.append(
            f"{contents.num_unknown} entries are of a later release: signed and in the tree, not read"
        )
    if contents.backwards is not None:
        report.notes.append(
            f"the clock of {report.actor} went back before entry {contents.backwards}, unexplained"
        )


def _check_owner(log: LogReader, contents: Contents, trust: Trust, report: Report) -> None:
    """Hold the owner's first key, which the chain of rotations starts from, against those that are trusted."""
    first = key_fingerprint(contents.keys[0][1])
    if not trust.fingerprints:
        report.notes.append(f"no key was given to trust: compare the fingerprint {first} with {log.actor}'s")
        return
    latest = log.latest_checkpoint()
    by = key_fingerprint(contents.key_at(parse_checkpoint(latest).size)) if latest is not None else first
    # A later key that signed a checkpoint vouches for all below it; merely being named by a rotation is no consent.
    if trust.fingerprints.isdisjoint({first, by}):
        what = f"the log is signed by the key with the fingerprint {first}, which is not among those trusted"
        raise FoundError(
            None, what, "someone else made this log, or the trusted fingerprint is of another key"
        )
    report.checked.append(
        Check("owner", f"the key is one that is trusted ({', '.join(sorted(trust.fingerprints))})")
    )


def _check_checkpoints(log: LogReader, contents: Contents, trust: Trust, report: Report) -> None:
    number, cosigned = 0, 0
    for size, note in log.checkpoints():
        if parse_checkpoint(note).size != size:
            raise FoundError(None, f"the checkpoint stored for {size} entries is of another size", CHANGED)
        _check_note(log, contents, note, f"the log's checkpoint of {size} entries")
        number += 1
        for name, line in log.cosignatures(size).items():
            if signature_lines(note + line)[-1][0] != name:
                raise FoundError(
                    None, f"the cosignature of {name} at {size} entries is of another name", CHANGED
                )
        cosigned += _count_witnesses(log.note(size), contents, trust, report)
    report.checked.append(Check("checkpoints", f"{number} checkpoints are signed and fit the tree"))
    if trust.witnesses:
        report.checked.append(Check("cosignatures", f"{cosigned} by {', '.join(sorted(trust.witnesses))}"))


def _check_anchors(log: LogReader, contents: Contents, trust: Trust, report: Report) -> None:
    for note in trust.anchors:
        size = parse_checkpoint(note).size
        _check_note(log, contents, note, f"the checkpoint of {size} entries that is held elsewhere")
        _count_witnesses(note, contents, trust, report)
    if trust.anchors:
        report.checked.append(
            Check("anchors", f"{len(trust.anchors)} checkpoints that others hold fit the tree")
        )


def _check_note(log: LogReader, contents: Contents, note: str, called: str) -> VerifiedNote:
    """Hold a checkpoint against the log: its origin, signature, size and root."""
    size = parse_checkpoint(note).size
    keys = {log.origin: NoteKey("signer", contents.key_at(size))}
    try:
        verified = verify_note(note, keys)
    except AuditError as error:
        what = f"{called} is not signed by the key of {log.actor} ({error})"
        raise FoundError(None, what, "another key made it: find out whose, and rely on neither") from error
    checkpoint = verified.checkpoint
    if checkpoint.origin != log.origin:
        raise FoundError(None, f"{called} is of the log {checkpoint.origin}, not of {log.origin}", REWRITTEN)
    if size > log.size:
        raise FoundError(log.size, f"{called} is signed, and the log holds only {log.size}", CUT)
    if log.root(size) != checkpoint.root:
        raise FoundError(None, f"{called} has another root than the log's first {size} entries", REWRITTEN)
    return verified


def _count_witnesses(note: str, contents: Contents, trust: Trust, report: Report) -> int:
    """Return how many trusted witnesses cosigned; the longest checkpoint with enough of them goes into the report."""
    checkpoint = parse_checkpoint(note)
    size, owner = checkpoint.size, checkpoint.origin
    keys = {name: NoteKey("cosigner", key) for name, key in trust.witnesses.items()}
    keys[owner] = NoteKey(
        "signer", contents.key_at(size)
    )  # is on it, so that it need not bear a trusted witness's
    try:
        by = tuple(sorted(verify_note(note, keys).by.keys() - {owner}))
    except AuditError as error:
        what = f"a cosignature at {size} entries does not hold: {error}"
        raise FoundError(
            None, what, "it is forged or was altered: ask the witness for its own copy"
        ) from error
    if len(by) >= max(1, trust.threshold) and (report.anchored is None or size > report.anchored.size):
        report.anchored = Anchored(size, by)
    return len(by)


def _check_final(trust: Trust, report: Report) -> None:
    if report.anchored is not None and report.anchored.size < report.size:
        rest = report.size - report.anchored.size
        report.notes.append(f"the last {rest} entries are vouched for by {report.actor} alone")
    if trust.threshold and report.anchored is None:
        what = (
            f"no checkpoint is cosigned by {trust.threshold} of the {len(trust.witnesses)} trusted witnesses"
        )
        raise FoundError(
            None, what, "the owner alone vouches for the log: it could show others a different one"
        )
    if not trust.witnesses and not trust.anchors:
        report.notes.append(
            "nothing that others hold was given: a log that its owner cut short or rewrote whole would look the same"
        )

"""A small file that shows that one entry is in a log, and when by whose clock, to someone who has not the log.

It holds the entry's bytes, the hashes from it up to the root, a checkpoint with that root, and the cosignatures on
it. Where the owner's key was rotated since, the rotations stand in it as well, each with its own path, so that the
entry's signature leads to the checkpoint's. An entry whose body was erased is proved by its hash.

Source: RFC 6962 section 2.1.1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit import merkle
from fedfin.audit.checking import Signers, check_note
from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.entry import canonical_json
from fedfin.audit.events import Rotation
from fedfin.audit.findings import FoundError, Wrong
from fedfin.audit.reading import LogReader
from fedfin.audit.verifying import Anchored, Check, Report, Trust
from fedfin.errors import AuditError

__all__ = ["PROOF_FORMAT", "prove", "verify_proof"]

PROOF_FORMAT: Final = "fedfin proof 1"

_MAX_BYTES: Final = 4 * 1024 * 1024
_ALTERED: Final = (
    "the proof was altered, or is of another log: ask for it again, and rely on nothing until one holds"
)


def prove(log: LogReader, index: int) -> bytes:
    """Return the proof of an entry, canonical JSON.

    Args:
        log: Open to read.
        index: Of the entry, from 0.

    Raises:
        AuditError: There is no such entry, or no checkpoint of the log covers it yet.
    """
    log.leaf_hash(index)
    covering = [size for size, _ in log.checkpoints() if size > index]
    if not covering:
        msg = (
            f"no checkpoint of {log.path} covers entry {index} yet; its owner signs one in every round and when a"
            " run is sealed"
        )
        raise AuditError(msg)
    # The more witnesses vouch for it the better; of equals the shortest, which proves it the earliest.
    size = max(covering, key=lambda held: (len(log.cosignatures(held)), -held))
    starts = log.signers()
    first = [key for start, key in starts if start <= index][-1]
    # The entry that rotates a key is the one before the new key's first.
    handed_over = [start - 1 for start, _ in starts if index <= start - 1 < size]
    return canonical_json(
        {
            "actor": log.actor,
            "checkpoint": log.note(size),
            "entry": _part(log, index, size),
            "format": PROOF_FORMAT,
            "key": first.public_bytes_raw().hex(),
            "origin": log.origin,
            "rotations": [_part(log, found, size) for found in handed_over if found != index],
        }
    )


def verify_proof(path: Path, trust: Trust | None = None) -> Report:
    """Check a proof by itself; what is wrong is reported, not raised."""
    report = Report(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            msg = f"{path} is larger than {_MAX_BYTES} bytes, and no proof of fedfin; ask for it again"
            raise AuditError(msg)  # noqa: TRY301
        _check(_parse(path.read_bytes()), trust or Trust(), report)
    except FoundError as found:
        report.wrong = found.wrong
    except AuditError as error:
        report.wrong = Wrong(None, str(error), _ALTERED)
    except OSError as error:
        report.wrong = Wrong(
            None, f"{path} cannot be read ({error.strerror})", "name a file that can be read"
        )
    return report


@dataclass(frozen=True, slots=True)
class _Part:
    """An entry and its way to the root; `leaf` is None where its body was erased."""

    index: int
    leaf: bytes | None
    leaf_hash: bytes
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Proof:
    actor: str
    checkpoint: str
    entry: _Part
    key: Ed25519PublicKey
    origin: str
    rotations: tuple[_Part, ...]


def _part(log: LogReader, index: int, size: int) -> dict[str, Any]:
    body = log.body(index)
    found = {"index": index, "path": [step.hex() for step in log.inclusion(index, size)]}
    return (
        {**found, "leaf_hash": log.leaf_hash(index).hex()}
        if body is None
        else {**found, "leaf": body.decode()}
    )


def _parse(content: bytes) -> _Proof:
    try:
        found = json.loads(content.decode())
        if found["format"] != PROOF_FORMAT or canonical_json(found) != content.rstrip(b"\n"):
            raise ValueError  # noqa: TRY301  (one message for all of it)
        if found.keys() != {"actor", "checkpoint", "entry", "format", "key", "origin", "rotations"}:
            raise ValueError  # noqa: TRY301
        return _Proof(
            actor=str(found["actor"]),
            checkpoint=str(found["checkpoint"]),
            entry=_parse_part(found["entry"]),
            key=Ed25519PublicKey.from_public_bytes(bytes.fromhex(found["key"])),
            origin=str(found["origin"]),
            rotations=tuple(_parse_part(part) for part in found["rotations"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"the file is no proof of fedfin ({PROOF_FORMAT}), or was altered; ask for it again"
        raise AuditError(msg) from error


def _parse_part(found: Mapping[str, Any]) -> _Part:
    leaf = found["leaf"].encode() if "leaf" in found else None
    if set(found) != {"index", "path", "leaf_hash" if leaf is None else "leaf"}:
        raise ValueError
    return _Part(
        index=int(found["index"]),
        leaf=leaf,
        leaf_hash=bytes.fromhex(found["leaf_hash"]) if leaf is None else merkle.leaf_hash(leaf),
        hashes=tuple(bytes.fromhex(step) for step in found["path"]),
    )


def _check(proof: _Proof, trust: Trust, report: Report) -> None:
    checkpoint = parse_checkpoint(proof.checkpoint)
    report.origin, report.actor, report.size = proof.origin, proof.actor, checkpoint.size
    signers = Signers(proof.origin, proof.actor, proof.key)
    for part in (proof.entry, *proof.rotations):
        try:
            merkle.verify_inclusion(part.leaf_hash, part.index, checkpoint.size, part.hashes, checkpoint.root)
        except AuditError as error:
            raise FoundError(part.index, str(error), _ALTERED) from error
    entry = proof.entry
    if entry.leaf is None:
        report.num_pruned = 1
        report.notes.append(f"the body of entry {entry.index} was erased: it is proved by its hash alone")
    else:
        found = signers.check(entry.leaf, entry.index)
        report.checked.append(
            Check("entry", f"entry {entry.index}, {found.event.type}, {found.time}, signed by {proof.actor}")
        )
    last = entry.index
    for part in proof.rotations:
        if part.leaf is None or part.index <= last:
            raise FoundError(part.index, f"entry {part.index} hands over no key", _ALTERED)
        if not isinstance(signers.check(part.leaf, part.index).event, Rotation):
            raise FoundError(part.index, f"entry {part.index} hands over no key", _ALTERED)
        last = part.index
    by = check_note(
        proof.checkpoint,
        proof.origin,
        checkpoint.size,
        checkpoint.root,
        signers.key,
        trust.witnesses,
        "the checkpoint",
    )
    signers.vouch(signers.key)
    report.root = checkpoint.root
    report.checked.append(
        Check("inclusion", f"entry {entry.index} is in the log {proof.origin} of {checkpoint.size} entries")
    )
    if len(by) < trust.threshold:
        raise FoundError(
            None,
            f"{len(by)} of the witnesses cosigned the checkpoint, and {trust.threshold} must",
            "too few vouch for this log: ask for a proof against a checkpoint that is final",
        )
    if by:
        report.anchored = Anchored(checkpoint.size, by)
    signers.check_trust(trust, report)

"""What every check of evidence has in common: whose key signs which entry, and whether a checkpoint is of this tree.

Used where a log is not a database: in exports and in proofs of single entries.
"""

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.checkpoint import NoteKey, verify_note
from fedfin.audit.entry import Entry, parse_leaf
from fedfin.audit.events import Rotation
from fedfin.audit.findings import CHANGED, REWRITTEN, FoundError
from fedfin.audit.verifying import Check, Report, Trust
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Signers", "check_note"]


class Signers:
    """The key that signs a log, from its first one on: a rotation hands over to the next.

    Attributes:
        origin: The log's.
        key: That signs the next entry.
    """

    def __init__(self, origin: str, actor: str, first: Ed25519PublicKey) -> None:
        self.origin = origin
        self.key = first
        self._actor = actor
        self._last = key_fingerprint(first)
        self._vouching = {self._last}

    def check(self, leaf: bytes, index: int) -> Entry:
        """Check form, place, actor and signature of an entry, and take over a new key where it says so.

        Raises:
            FoundError: Something of it is wrong.
        """
        try:
            entry = parse_leaf(leaf)
            entry.verify(self.key, self.origin)
        except AuditError as error:
            raise FoundError(index, f"entry {index}: {error}", CHANGED) from error
        if entry.seq != index or entry.actor != self._actor:
            raise FoundError(
                index,
                f"entry {index} says that it is entry {entry.seq}, of {entry.actor}",
                "entries were moved: do not rely on it, and ask for it again",
            )
        event = entry.event
        if isinstance(event, Rotation) and event.key == "identity" and event.member == self._actor:
            if event.old != self.key.public_bytes_raw().hex():
                raise FoundError(index, f"entry {index} rotates a key that does not sign this log", CHANGED)
            self.key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(event.new))
            self._last = key_fingerprint(self.key)
        return entry

    def vouch(self, key: Ed25519PublicKey) -> None:
        """Take note that this key signed a checkpoint, and so vouches for everything before it."""
        self._vouching.add(key_fingerprint(key))

    def check_trust(self, trust: Trust, report: Report) -> None:
        """Check that the first key is trusted, or one that signed a checkpoint, where any fingerprint is named.

        A rotation alone shows nothing of the new key: anyone can hand over to a key that is not his.

        Raises:
            FoundError: None is.
        """
        if not trust.fingerprints:
            report.notes.append(
                f"no fingerprint was given to trust: the keys are those in the file itself ({self._last})"
            )
            return
        if not trust.fingerprints & self._vouching:
            raise FoundError(
                None,
                f"the log is signed by the key {self._last}, which is not trusted",
                "it was made by someone else, or the fingerprint is not the owner's: compare it by another way",
            )
        report.checked.append(
            Check("owner", f"the key {self._last} is trusted, or was handed over by one that is")
        )


def check_note(
    note: str,
    origin: str,
    size: int,
    root: bytes,
    key: Ed25519PublicKey,
    witnesses: Mapping[str, Ed25519PublicKey],
    what: str,
) -> tuple[str, ...]:
    """Check that a checkpoint is signed by the log's key and states this tree; return the witnesses that cosigned.

    Raises:
        FoundError: It is not.
    """
    keys = {name: NoteKey("cosigner", witness) for name, witness in witnesses.items() if name != origin}
    try:
        found = verify_note(note, {origin: NoteKey("signer", key), **keys})
        checkpoint = found.checkpoint
    except AuditError as error:
        raise FoundError(None, f"{what} of {size} entries: {error}", CHANGED) from error
    if origin not in found.by:
        raise FoundError(
            None,
            f"{what} of {size} entries is not signed by the key of the log",
            "another key made it: do not rely on it",
        )
    if (checkpoint.origin, checkpoint.size, checkpoint.root) != (origin, size, root):
        raise FoundError(
            None,
            f"{what} of {size} entries does not state the root of these entries",
            REWRITTEN,
        )
    return tuple(sorted(found.by.keys() - {origin}))

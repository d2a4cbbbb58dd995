"""Checkpoints of a log: signed notes that say how long it is and what its root is, and cosignatures on them.

A log signs its checkpoint with its identity key (signature type 0x01). A witness that has checked that the log only
grew cosigns it with its own witness key (type 0x04): the cosignature covers the time and the whole checkpoint but not
the witness's name, so one key cosigns under one name. Types that are not known here, such as ML-DSA-44 (0x06), are
ignored as the specification asks, so a log can carry them today and check them tomorrow.

Source: c2sp.org/signed-note, c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature (2025).
"""

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.errors import AuditError

__all__ = [
    "MAX_NOTE_BYTES",
    "Checkpoint",
    "NoteKey",
    "VerifiedNote",
    "add_signatures",
    "cosign",
    "parse_checkpoint",
    "sign",
    "signature_lines",
    "verify_note",
]

MAX_NOTE_BYTES: Final = 512 * 1024
"""A note is at most this long: a thousand cosignatures fit, and a few of the post-quantum kind."""

_MAX_SIGNATURES: Final = 1100
_MAX_BODY_BYTES: Final = 4096
_MAX_LINE_BYTES: Final = 8192
_HASH_BYTES: Final = 32
_MAX_TIME: Final = 2**63 - 1
_DASH: Final = "\u2014"
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_SPACE_OR_PLUS: Final = re.compile(r"[\s+\x00-\x1f\x7f]")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_TYPES: Final = {"signer": 0x01, "cosigner": 0x04}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log at one size.

    Attributes:
        origin: The log's unique name, such as `fedfin/credit-2026/coordinator`.
        size: Entries.
        root: Root of the Merkle tree over them, 32 bytes.

    Raises:
        AuditError: A value has no place in a checkpoint.
    """

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        _check_name(self.origin)
        if not 0 <= self.size <= _MAX_TIME or len(self.root) != _HASH_BYTES:
            msg = (
                f"a checkpoint of {self.size} entries with a root of {len(self.root)} bytes; the root has 32"
            )
            raise AuditError(msg)

    def to_body(self) -> str:
        """Return the note's text: three lines."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def from_body(cls, body: str) -> "Checkpoint":
        """Return the checkpoint that a note's text states; lines after the third are not understood and refused.

        Raises:
            AuditError: The text is no checkpoint, or is not written canonically.
        """
        lines = body.split("\n")
        if len(lines) != 4 or lines[3] or not _SIZE.fullmatch(lines[1]):
            msg = (
                "the note is no checkpoint: it has an origin, a size and a root, a line each; ask for it"
                " again"
            )
            raise AuditError(msg)
        return cls(origin=lines[0], size=int(lines[1]), root=_decoded(lines[2]))


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A public key that may have signed a note.

    Attributes:
        kind: `signer` for a log's own key (type 0x01), `cosigner` for a witness key (type 0x04).
        public: Ed25519.
    """

    kind: Literal["signer", "cosigner"]
    public: Ed25519PublicKey = field(repr=False)

    def key_id(self, name: str) -> bytes:
        """Return the four bytes that stand before a signature by this key under this name."""
        found = name.encode() + b"\n" + bytes([_TYPES[self.kind]]) + self.public.public_bytes_raw()
        return hashlib.sha256(found).digest()[:4]


@dataclass(frozen=True, slots=True)
class VerifiedNote:
    """A note that at least one known key signed.

    Attributes:
        body: The signed text.
        by: When each known name cosigned, Unix seconds by its own clock; None for a signature without a time.
    """

    body: str
    by: Mapping[str, int | None]

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the body states; errors as `Checkpoint.from_body`."""
        return Checkpoint.from_body(self.body)


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """Return the checkpoint as a note signed by the log's key, under the log's origin as name."""
    body = checkpoint.to_body()
    key_id = NoteKey("signer", key.public_key()).key_id(checkpoint.origin)
    return body + "\n" + _line(checkpoint.origin, key_id + key.sign(body.encode()))


def cosign(note: str, name: str, witness_key: Ed25519PrivateKey, time: int) -> str:
    """Return a witness's line for the note: as of `time` this is the longest history of the log that it has seen.

    The caller has checked the log's signature and a consistency proof from what it last cosigned, and has stored
    the new size durably, before it calls.

    Args:
        note: A signed checkpoint.
        name: The witness's name; one key cosigns under one name only.
        witness_key: Ed25519, used for nothing else.
        time: Unix seconds.

    Raises:
        AuditError: The note is no checkpoint, or the name or time cannot be written.
    """
    body, _ = _split_note(note)
    Checkpoint.from_body(body)
    _check_name(name)
    if not 0 < time <= _MAX_TIME:
        msg = f"the time {time} is no time of a cosignature; mend the clock of this machine"
        raise AuditError(msg)
    key_id = NoteKey("cosigner", witness_key.public_key()).key_id(name)
    return _line(name, key_id + struct.pack(">Q", time) + witness_key.sign(_cosigned(time, body)))


def add_signatures(note: str, lines: Iterable[str]) -> str:
    """Return the note with these lines after its own; a line that it has already is not added again.

    Raises:
        AuditError: A line is malformed, or the note becomes too large.
    """
    _, held = _split_note(note)
    known = {line.text for line in held}
    grown = note + "".join(dict.fromkeys(line for line in lines if line not in known))
    _split_note(grown)
    return grown


def signature_lines(note: str) -> tuple[tuple[str, str], ...]:
    """Return the name and the whole line of each signature of the note; nothing is verified.

    Raises:
        AuditError: The note is malformed.
    """
    return tuple((line.name, line.text) for line in _split_note(note)[1])


def verify_note(note: str, keys: Mapping[str, NoteKey]) -> VerifiedNote:
    """Check a note's signatures.

    Args:
        note: A signed note.
        keys: Whose signatures count, by name.

    Returns:
        The text and who signed it: at least one of `keys`.

    Raises:
        AuditError: The note is malformed, a known key's signature does not verify, or no known key signed.
    """
    body, lines = _split_note(note)
    by: dict[str, int | None] = {}
    for line in lines:
        key = keys.get(line.name)
        if key is None or line.raw[:4] != key.key_id(line.name):
            continue  # unknown keys are ignored, even under a known name: so keys are rotated
        by[line.name] = _verified(body, line.name, line.raw[4:], key)
    if not by:
        known = ", ".join(sorted(keys)) or "nobody"
        msg = f"the note is signed by none of those trusted here ({known}); get the right keys from its maker"
        raise AuditError(msg)
    return VerifiedNote(body=body, by=by)


def parse_checkpoint(note: str) -> Checkpoint:
    """Return the checkpoint of a note without looking at its signatures: for what is then checked otherwise.

    Raises:
        AuditError: The note is malformed.
    """
    return Checkpoint.from_body(_split_note(note)[0])


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    raw: bytes
    text: str


def _verified(body: str, name: str, raw: bytes, key: NoteKey) -> int | None:
    time: int | None = None
    message, signature = body.encode(), raw
    if key.kind == "cosigner":
        time = int.from_bytes(raw[:8])
        message, signature = _cosigned(time, body), raw[8:]
    try:
        key.public.verify(signature, message)
    except InvalidSignature as error:
        msg = f"the signature of {name} on the note does not verify: the note was altered; ask for it again"
        raise AuditError(msg) from error
    return time


def _cosigned(time: int, body: str) -> bytes:
    return f"cosignature/v1\ntime {time}\n{body}".encode()


def _split_note(note: str) -> tuple[str, tuple[_Line, ...]]:
    """Return the text and the signature lines; malformed notes are refused before anything is believed."""
    try:
        size = len(note.encode()) if len(note) <= MAX_NOTE_BYTES else len(note)
    except UnicodeEncodeError as error:
        msg = "the note is no Unicode text; ask for it again"
        raise AuditError(msg) from error
    if size > MAX_NOTE_BYTES:
        msg = f"the note is longer than {MAX_NOTE_BYTES} bytes; it is none of fedfin's"
        raise AuditError(msg)
    cut = note.rfind("\n\n")
    if cut < 1 or not note.endswith("\n") or _CONTROL.search(note) or cut > _MAX_BODY_BYTES:
        msg = (
            "the note is malformed: a text, an empty line and signatures, without control characters; ask"
            " again"
        )
        raise AuditError(msg)
    texts = note[cut + 2 :].split("\n")[:-1]
    if not 1 <= len(texts) <= _MAX_SIGNATURES:
        msg = f"the note has {len(texts)} signatures; it has 1 to {_MAX_SIGNATURES}"
        raise AuditError(msg)
    lines = tuple(_parse_line(text) for text in texts)
    if len({(line.name, line.raw[:4]) for line in lines}) != len(lines):
        msg = "the note is signed twice by one key; keep one of the signatures"
        raise AuditError(msg)
    return note[: cut + 1], lines


def _parse_line(text: str) -> _Line:
    parts = text.split(" ")
    if len(text) > _MAX_LINE_BYTES or len(parts) != 3 or parts[0] != _DASH:
        msg = "a signature line of the note is malformed (dash, name, base64); ask for the note again"
        raise AuditError(msg)
    _check_name(parts[1])
    raw = _decoded(parts[2])
    if len(raw) <= 4:
        msg = f"the signature of {parts[1]} on the note is too short; ask for the note again"
        raise AuditError(msg)
    return _Line(name=parts[1], raw=raw, text=text + "\n")


def _line(name: str, raw: bytes) -> str:
    return f"{_DASH} {name} {base64.b64encode(raw).decode()}\n"


def _decoded(text: str) -> bytes:
    """Return the bytes of canonical base64: b64decode alone lets spare bits and other alphabets pass."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != text:
        msg = "the note holds base64 that is not canonical; ask for it again"
        raise AuditError(msg)
    return raw


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= 255 or _SPACE_OR_PLUS.search(name) or not name.isprintable():
        msg = (
            f"{name!r:.80} cannot be the name of a log or witness: no spaces, no plus sign, at most 255"
            " characters"
        )
        raise AuditError(msg)

"""People of a lender who approve its jobs: each has an Ed25519 key of their own, and signs what they looked at.

What is signed names the federation, the lender, the job, the plan and the schema, so that a signature counts for that
one job: neither for another plan under the same name, nor for the same plan proposed again, nor at another lender.

Source: RFC 8032 (Ed25519).
"""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedfin.errors import ConfigError
from fedfin.files import write_private
from fedfin.identity import private_pem

__all__ = [
    "Subject",
    "load_key",
    "make_key",
    "public_key_of",
    "public_line",
    "sign",
    "verifies",
]

_PREFIX: Final = "ed25519:"
_LINE: Final = re.compile(r"ed25519:[A-Za-z0-9+/]{43}=")


@dataclass(frozen=True, slots=True)
class Subject:
    """What an approval is about.

    Attributes:
        federation: The federation's name.
        lender: The lender's name.
        job: The job's id.
        plan: Digest of its plan, hex.
        schema: Fingerprint of the schema that it is to run on, hex.
    """

    federation: str
    lender: str
    job: str
    plan: str
    schema: str

    def to_bytes(self) -> bytes:
        """Return what is signed; no name of a federation, lender or job holds a line's end."""
        names = (self.federation, self.lender, self.job, self.plan, self.schema)
        return "\n".join(("fedfin approval of a job 1", *names, "")).encode()


def make_key(path: Path) -> Ed25519PublicKey:
    """Write a new key, PEM with mode 0600, and return its public part.

    Raises:
        ConfigError: The file exists already, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    write_private(path, private_pem(key))
    return key.public_key()


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read an approver's key.

    Raises:
        ConfigError: The file cannot be read, can be read by others, or holds no Ed25519 key.
    """
    try:
        mode, content = path.stat().st_mode & 0o777, path.read_bytes()
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); it is made by `fedfin client make-approver`"
        raise ConfigError(msg) from error
    if mode & 0o077:
        msg = f"{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`"
        raise ConfigError(msg)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        msg = f"{path} holds no approver's key; give the file that `fedfin client make-approver` made"
        raise ConfigError(msg)
    return key


def public_line(key: Ed25519PublicKey) -> str:
    """Return a public key as one word, for `policy.approvers` of bank.yaml."""
    return _PREFIX + base64.b64encode(key.public_bytes_raw()).decode()


def public_key_of(line: str) -> Ed25519PublicKey:
    """Return the key that `public_line` wrote; nothing else is accepted.

    Raises:
        ValueError: The text is no such word.
    """
    msg = (
        "an approver's key is the word that `fedfin client make-approver` prints, ed25519: and 44 characters"
    )
    if not _LINE.fullmatch(line):
        raise ValueError(msg)
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(line.removeprefix(_PREFIX), validate=True))
    except (ValueError, binascii.Error) as error:
        raise ValueError(msg) from error
    if public_line(key) != line:  # the last digit of base64 has bits to spare: one key, one word
        raise ValueError(msg)
    return key


def sign(subject: Subject, key: Ed25519PrivateKey) -> bytes:
    """Return an approval's signature, 64 bytes."""
    return key.sign(subject.to_bytes())


def verifies(signature: bytes, subject: Subject, key: Ed25519PublicKey) -> bool:
    """Tell whether the holder of a key approved this very subject."""
    try:
        key.verify(signature, subject.to_bytes())
    except InvalidSignature:
        return False
    return True

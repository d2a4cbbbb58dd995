"""A manifest over the files of a folder: what a run's seal and an evidence pack's have in common.

It is one file of canonical JSON that names every other file with its digest, and may be signed. Each kind has a label
of its own under its signature, so that one cannot pass for the other.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.audit.entry import canonical_json
from fedfin.errors import AuditError
from fedfin.files import write_public
from fedfin.identity import key_fingerprint

__all__ = ["MANIFEST", "difference", "sha256_of", "signer_of", "write_manifest"]

MANIFEST: Final = "manifest.json"


def write_manifest(folder: Path, body: Mapping[str, Any], label: bytes, key: Ed25519PrivateKey | None) -> str:
    """Write manifest.json, with the key and its signature where there is one; return its SHA-256, hex.

    Raises:
        ConfigError: It cannot be written.
    """
    full = dict(body)
    if key is not None:
        full["key"] = key.public_key().public_bytes_raw().hex()
        full["signature"] = key.sign(label + canonical_json(full)).hex()
    content = canonical_json(full) + b"\n"
    write_public(folder / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def signer_of(body: Mapping[str, Any], label: bytes) -> str:
    """Return the fingerprint of the key that signed a manifest.

    Raises:
        AuditError: It is not signed, or not by the key that it names; says no mend, which is the caller's to know.
    """
    unsigned = {name: value for name, value in body.items() if name != "signature"}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["key"]))
        key.verify(bytes.fromhex(body["signature"]), label + canonical_json(unsigned))
    except (InvalidSignature, ValueError, KeyError, TypeError) as error:
        msg = f"the signature of {MANIFEST} does not verify"
        raise AuditError(msg) from error
    return key_fingerprint(key)


def difference(held: Mapping[str, Any], stated: Mapping[str, Any], what: str) -> str | None:
    """Return the first thing in which a folder's files are not those that its manifest names; None where all are.

    Args:
        held: What the folder holds, by file.
        stated: What its manifest says.
        what: Of what they are: the run, the pack.
    """
    for name in sorted({*held, *stated}):
        if name not in held:
            return f"the file {name} is missing from the {what}"
        if name not in stated:
            return f"the file {name} was added to the {what}: its manifest does not name it"
        if held[name] != stated[name]:
            return f"the file {name} is not the one that the manifest names"
    return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

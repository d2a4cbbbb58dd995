"""The seal of a finished run: a signed manifest with the SHA-256 of every file of its folder.

What is in the folder then stands as one: a file that is changed, added or taken away is named. Who signed is the
coordinator, whose key the federation's root states; the log in the folder says the same, entry by entry.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.audit.entry import canonical_json
from fedfin.errors import AuditError
from fedfin.files import write_public
from fedfin.identity import key_fingerprint

__all__ = ["MANIFEST", "RUN_FORMAT", "RunSeal", "is_sealed", "read_seal", "seal_run"]

MANIFEST: Final = "manifest.json"
RUN_FORMAT: Final = "fedfin run 1"

_LABEL: Final = b"fedfin run v1\n"
_KEYS: Final = frozenset({"files", "format", "job", "key", "signature"})


@dataclass(frozen=True, slots=True)
class RunSeal:
    """A seal that was checked.

    Attributes:
        job: Whose run it is.
        num_files: Beside the manifest.
        signed_by: Fingerprint of the key that signed it.
    """

    job: str
    num_files: int
    signed_by: str


def is_sealed(folder: Path) -> bool:
    """Tell whether a run has a manifest; whether it holds is `read_seal`'s to say."""
    return (folder / MANIFEST).exists()


def seal_run(folder: Path, job: str, key: Ed25519PrivateKey) -> str:
    """Write manifest.json over all files of a run's folder; return its SHA-256, hex.

    Args:
        folder: The run's; nothing in it is changed afterwards.
        job: Its id.
        key: The coordinator's identity key.

    Raises:
        AuditError: The folder holds something that is no plain file.
        ConfigError: It cannot be written.
    """
    body = {
        "files": _digests(folder),
        "format": RUN_FORMAT,
        "job": job,
        "key": key.public_key().public_bytes_raw().hex(),
    }
    signature = key.sign(_LABEL + canonical_json(body)).hex()
    content = canonical_json({**body, "signature": signature}) + b"\n"
    write_public(folder / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def read_seal(folder: Path) -> RunSeal:
    """Check a run's seal and every file that it names.

    Raises:
        AuditError: A file is missing, was changed or added, or the manifest is not as it was signed; names the first.
    """
    body = _parse(folder / MANIFEST)
    held, stated = _digests(folder), body["files"]
    for name in sorted({*held, *stated}):
        if name not in held:
            raise _changed(f"the file {name} is missing from the run")
        if name not in stated:
            raise _changed(f"the file {name} was added to the run: its manifest does not name it")
        if held[name] != stated[name]:
            raise _changed(f"the file {name} is not the one that the manifest names")
    return RunSeal(job=str(body["job"]), num_files=len(stated), signed_by=_signer(body))


def _signer(body: Mapping[str, Any]) -> str:
    unsigned = {name: value for name, value in body.items() if name != "signature"}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["key"]))
        key.verify(bytes.fromhex(body["signature"]), _LABEL + canonical_json(unsigned))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise _changed(f"the signature of {MANIFEST} does not verify") from error
    return key_fingerprint(key)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        body: dict[str, Any] = json.loads(content)
        if (
            canonical_json(body) + b"\n" != content
            or body.keys() != _KEYS
            or body["format"] != RUN_FORMAT
            or not isinstance(body["files"], dict)
        ):
            raise ValueError  # noqa: TRY301  (one message for all of it)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _changed(f"{path.name} is missing or not as fedfin writes it ({RUN_FORMAT})") from error
    return body


def _digests(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file():
            msg = f"{path} is no plain file, and a run holds nothing else; take it out"
            raise AuditError(msg)
        if name != MANIFEST:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _changed(what: str) -> AuditError:
    return AuditError(
        f"{what}; the run was changed after it was sealed: rely on none of it, and ask for it again"
    )

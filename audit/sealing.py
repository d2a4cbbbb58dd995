"""The seal of a finished run: a signed manifest with the SHA-256 of every file of its folder.

What is in the folder then stands as one: a file that is changed, added or taken away is named. Who signed is the
coordinator, whose key the federation's root states; the log in the folder says the same, entry by entry.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.entry import canonical_json
from fedfin.audit.manifest import MANIFEST, difference, sha256_of, signer_of, write_manifest
from fedfin.errors import AuditError

__all__ = ["RUN_FORMAT", "RunSeal", "is_sealed", "read_seal", "seal_run"]

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
    body = {"files": _digests(folder), "format": RUN_FORMAT, "job": job}
    return write_manifest(folder, body, _LABEL, key)


def read_seal(folder: Path) -> RunSeal:
    """Check a run's seal and every file that it names.

    Raises:
        AuditError: A file is missing, was changed or added, or the manifest is not as it was signed; names the first.
    """
    body = _parse(folder / MANIFEST)
    if (what := difference(_digests(folder), body["files"], "run")) is not None:
        raise _changed(what)
    try:
        signed_by = signer_of(body, _LABEL)
    except AuditError as error:
        raise _changed(str(error)) from error
    return RunSeal(job=str(body["job"]), num_files=len(body["files"]), signed_by=signed_by)


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
            found[name] = sha256_of(path)
    return found


def _changed(what: str) -> AuditError:
    return AuditError(
        f"{what}; the run was changed after it was sealed: rely on none of it, and ask for it again"
    )

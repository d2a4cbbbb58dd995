"""The files of an evidence pack: a folder or one zip file, with a manifest that holds the SHA-256 of each.

A pack is written in one way only: manifest.json is canonical JSON, and a zip has its files stored in the order of
their names, without times or compression. So a byte that was changed anywhere, be it in a header that nobody reads, is
found, by writing the pack again and comparing.
"""

import errno
import json
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.entry import canonical_json
from fedfin.audit.findings import FoundError
from fedfin.audit.manifest import MANIFEST, difference, sha256_of, signer_of, write_manifest
from fedfin.errors import AuditError

__all__ = ["PACK_FORMAT", "PackManifest", "read_manifest", "seal_pack", "unzip_pack", "zip_pack"]

PACK_FORMAT: Final = "fedfin evidence pack 1"

_LABEL: Final = b"fedfin evidence pack v1\n"
_CHANGED: Final = "the pack was changed after it was made: rely on none of it, and ask for it again"
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]*(/[A-Za-z0-9_-][A-Za-z0-9_. -]*)*")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_MAX_FILES: Final = 100_000
_CHUNK: Final = 1 << 20
_DAMAGED: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
"""What Python's reader raises at a damaged file."""


@dataclass(frozen=True, slots=True)
class PackManifest:
    """A manifest whose files were checked.

    Attributes:
        job: Whose run it is.
        num_files: Beside the manifest.
        signed_by: Fingerprint of the key that signed it; None where nobody did.
    """

    job: str
    num_files: int
    signed_by: str | None


def seal_pack(folder: Path, job: str, key: Ed25519PrivateKey | None) -> str:
    """Write manifest.json over all files of a folder; return its SHA-256, hex.

    Args:
        folder: The pack; nothing in it is changed afterwards.
        job: Whose run it is.
        key: The coordinator's identity key; without one the manifest is not signed.

    Raises:
        ConfigError: The folder cannot be written.
    """
    body = {"files": _digests(folder), "format": PACK_FORMAT, "job": job}
    return write_manifest(folder, body, _LABEL, key)


def read_manifest(folder: Path) -> PackManifest:
    """Check every file of a pack against its manifest.

    Raises:
        FoundError: A file is missing, was changed or added, or the manifest is not as it was written.
    """
    body = _parse(folder / MANIFEST)
    if (what := difference(_digests(folder), body["files"], "pack")) is not None:
        raise FoundError(None, what, _CHANGED)
    return PackManifest(job=str(body["job"]), num_files=len(body["files"]), signed_by=_signer(body))


def zip_pack(folder: Path, path: Path) -> None:
    """Write a folder as one zip file, the same bytes for the same files; an existing file is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, strict_timestamps=True) as archive:
        for name in _names(folder):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as file, archive.open(entry, "w") as target:
                shutil.copyfileobj(file, target, _CHUNK)
    part.replace(path)


def unzip_pack(path: Path, folder: Path) -> None:
    """Take a pack's zip file apart, and check that it is byte for byte as `zip_pack` writes it.

    Args:
        path: The file.
        folder: Exists and is empty.

    Raises:
        FoundError: The file is damaged, or something of it was changed.
    """
    offsets: dict[int, str] = {}
    name = path.name
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in _checked(archive, path):
                name = entry.filename
                offsets[entry.header_offset] = name
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as file, target.open("wb") as written:
                    shutil.copyfileobj(file, written, _CHUNK)
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that one: an offset that is nowhere
            msg = f"{path} cannot be taken apart ({error.strerror}); free the disk of {folder.parent}"
            raise AuditError(msg) from error
        raise FoundError(None, f"{name} in the pack is damaged ({error})", _CHANGED) from error
    again = folder.with_name(f"{folder.name}.again.zip")
    try:
        zip_pack(folder, again)
        place = _first_difference(path, again)
    finally:
        again.unlink(missing_ok=True)
    if place is not None:
        where = next(
            (name for start, name in sorted(offsets.items(), reverse=True) if start <= place), path.name
        )
        raise FoundError(
            None, f"byte {place} of {path.name} was changed, at or after the file {where}", _CHANGED
        )


def _checked(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    size = path.stat().st_size
    if len(entries) > _MAX_FILES or len({entry.filename for entry in entries}) != len(entries):
        msg = "it names too many files, or one twice"
        raise ValueError(msg)
    # The same bytes named by many entries would grow without compression.
    if sum(entry.file_size for entry in entries) > size:
        msg = "its files are together larger than it is"
        raise ValueError(msg)
    for entry in entries:
        plain = _NAME.fullmatch(entry.filename) and ".." not in PurePosixPath(entry.filename).parts
        # Stored, so that no file can be larger than the whole.
        if not plain or entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            msg = f"{entry.filename!r:.80} is no file of a pack"
            raise ValueError(msg)
    return entries


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        body: dict[str, Any] = json.loads(content.decode())
        same = canonical_json(body) + b"\n" == content
        if not same or body["format"] != PACK_FORMAT or not isinstance(body["job"], str):
            raise ValueError  # noqa: TRY301  (one message for all of it)
        if not isinstance(body["files"], dict) or body.keys() - {
            "files",
            "format",
            "job",
            "key",
            "signature",
        }:
            raise ValueError  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{path.name} is missing or not as fedfin writes it ({PACK_FORMAT})"
        raise FoundError(None, what, _CHANGED) from error
    return body


def _signer(body: Mapping[str, Any]) -> str | None:
    if "key" not in body and "signature" not in body:
        return None
    try:
        return signer_of(body, _LABEL)
    except AuditError as error:
        raise FoundError(None, str(error), _CHANGED) from error


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in _names(folder):
        if name != MANIFEST:
            found[name] = {
                "bytes": (folder / name).stat().st_size,
                "sha256": sha256_of(folder / name),
            }
    return found


def _names(folder: Path) -> list[str]:
    """Return the files of a folder by their paths in it, sorted.

    Raises:
        AuditError: It holds something that is no plain file, or has no plain name.
    """
    names: list[str] = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file() or not _NAME.fullmatch(name):
            msg = f"{path} is no plain file with a plain name; a pack holds nothing else: take it out"
            raise AuditError(msg)
        names.append(name)
    return sorted(names)


def _first_difference(one: Path, other: Path) -> int | None:
    place = 0
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            left, right = first.read(_CHUNK), second.read(_CHUNK)
            if left != right:
                same = next(
                    (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                    min(len(left), len(right)),
                )
                return place + same
            if not left:
                return None
            place += len(left)

"""Writes an evidence pack: what to read, the run it is about, and a manifest over all of it.

report.html      to read and print, without a network
model-card.md    the model
evidence.json    what the report says, for programs
README.txt       what this is and how to check it
run/             the run directory as it is, with its log
manifest.json    SHA-256 of every file; signed where the coordinator's key is at hand
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.evidence import Evidence, to_html, to_json, to_model_card
from fedfin.audit.pack_files import seal_pack, zip_pack
from fedfin.errors import AuditError

__all__ = ["RUN_FOLDER", "Pack", "write_pack"]

RUN_FOLDER: Final = "run"

_README: Final = """\
Evidence of the job {job} of the federation {federation}, made by fedfin.

    report.html      open it in any browser; it loads nothing from elsewhere
    model-card.md    the model: use, columns, figures, limits
    evidence.json    what the report says, for programs
    run/             the coordinator's files of the run: plan, rounds, sums, model, log
    manifest.json    SHA-256 of every file here

To check it, on any machine, without a network:

    pip install fedfin
    fedfin audit verify {name} --trust FINGERPRINT

FINGERPRINT is that of the federation's root certificate or of the coordinator's identity key. Take it from a member of
the federation, not from this pack. The command says what it checked, who cosigned the log, and the first thing that is
wrong; it ends with status 0 where nothing is, and 1 where something is.
"""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack that was written.

    Attributes:
        path: The folder or the zip file.
        report: The page to open; None in a zip file.
        manifest: SHA-256 of manifest.json, hex.
        is_signed: Whether the manifest is signed.
    """

    path: Path
    report: Path | None
    manifest: str
    is_signed: bool


def write_pack(
    evidence: Evidence, target: Path, *, as_zip: bool = False, key: Ed25519PrivateKey | None = None
) -> Pack:
    """Write a pack, whole or not at all.

    Args:
        evidence: What it tells.
        target: A new folder, or a new zip file.
        as_zip: Whether it is one file.
        key: The coordinator's identity key, to sign the manifest with.

    Raises:
        AuditError: The target exists, cannot be written, or the run directory holds something that is no plain file.
    """
    if target.exists():
        msg = f"{target} exists already; name another place with --out, or move it away"
        raise AuditError(msg)
    try:
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=".pack-", dir=target.resolve().parent) as scratch:
            folder = Path(scratch) / "pack"
            shutil.copytree(evidence.run.path, folder / RUN_FOLDER, symlinks=True)
            for name, text in (
                ("report.html", to_html(evidence, target.name)),
                ("model-card.md", to_model_card(evidence)),
                ("evidence.json", to_json(evidence)),
                (
                    "README.txt",
                    _README.format(
                        job=evidence.run.job, federation=evidence.run.federation, name=target.name
                    ),
                ),
            ):
                (folder / name).write_text(text, encoding="utf-8")
            manifest = seal_pack(folder, evidence.run.job, key)
            if as_zip:
                zip_pack(folder, target)
            else:
                folder.chmod(0o755)
                folder.rename(target)
    except OSError as error:
        msg = f"{target} cannot be written ({error.strerror or error}); free the disk, or name another place with --out"
        raise AuditError(msg) from error
    return Pack(
        path=target,
        report=None if as_zip else target / "report.html",
        manifest=manifest,
        is_signed=key is not None,
    )

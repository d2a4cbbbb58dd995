"""Checks whatever it is handed: a log, a folder with one, a run directory, an evidence pack, an export, a proof.

Offline and read-only. What a folder holds decides what is checked: every file against a manifest, the log against
itself and against who vouches for it, the roster's versions against the federation's root, and what the run's files
say against what the log says.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from fedfin.audit.access import LOG_FILE
from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.events import CheckpointSeen
from fedfin.audit.exporting import EXPORT_FORMAT, verify_export
from fedfin.audit.findings import CHANGED, FoundError, Wrong
from fedfin.audit.manifest import MANIFEST
from fedfin.audit.membership import ROOT, ROSTER, Membership, read_membership, stated_coordinator
from fedfin.audit.pack import RUN_FOLDER
from fedfin.audit.pack_files import read_manifest, unzip_pack
from fedfin.audit.proving import PROOF_FORMAT, verify_proof
from fedfin.audit.reading import open_log
from fedfin.audit.run_checking import check_run
from fedfin.audit.run_record import read_run
from fedfin.audit.sealing import RunSeal, is_sealed, read_seal
from fedfin.audit.verifying import Check, Report, Trust, verify_log
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Inspection", "Kind", "anchors_of", "inspect", "origin_of"]

Kind = Literal["log", "folder", "run directory", "evidence pack", "export", "proof"]

_SQLITE: Final = b"SQLite format 3\x00"

_SUFFIXES: Final[dict[str, Kind]] = {
    ".db": "log",
    ".zip": "evidence pack",
    ".json": "proof",
    ".jsonl": "export",
}

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Inspection:
    """What was checked of something, and the first thing that is wrong.

    Attributes:
        path: What was handed in.
        kind: What it is.
        checked: What holds, in the order in which it was checked.
        notes: What is not wrong but should be known.
        wrong: None where nothing is.
        where: The file that the wrong thing is in; relative to `path`, or itself.
        log: The report of the log, export or proof; None where it did not come to that.
    """

    path: Path
    kind: Kind
    checked: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: Wrong | None = None
    where: str = ""
    log: Report | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.wrong is None

    def take(self, report: Report, where: str) -> None:
        """Take over what a check of a log, an export or a proof found."""
        self.log = report
        self.checked += report.checked
        self.notes += report.notes
        if self.wrong is None and report.wrong is not None:
            self.wrong, self.where = report.wrong, where


def inspect(path: Path, trust: Trust | None = None, progress: Progress | None = None) -> Inspection:
    """Check something; what is wrong is reported, not raised.

    Args:
        path: A file or folder.
        trust: What is known from elsewhere. A fingerprint may be that of the federation's root certificate, where the
            folder holds what leads from it to the coordinator's key.
        progress: Called with (entries done, entries in all).

    Raises:
        AuditError: The path is nothing that can be checked.
    """
    trust = trust or Trust()
    kind = _kind(path)
    found = Inspection(path, kind)
    try:
        match kind:
            case "log":
                _inspect_log(path, trust, found, progress)
            case "export":
                found.take(verify_export(path, trust, progress=progress), path.name)
            case "proof":
                found.take(verify_proof(path, trust), path.name)
            case "folder":
                _inspect_log(path / LOG_FILE, trust, found, progress)
            case "run directory":
                _inspect_run(path, "", trust, found, progress)
            case "evidence pack":
                _inspect_pack(path, trust, found, progress)
    except FoundError as error:
        found.wrong = error.wrong
        found.where = found.where or path.name
    except AuditError as error:
        found.wrong = Wrong(None, str(error), "it cannot be checked further")
        found.where = found.where or path.name
    return found


def anchors_of(path: Path, origin: str) -> tuple[str, ...]:
    """Return the checkpoints of one log that a file holds: a note, or a log of someone who was shown them.

    Args:
        path: A signed note, or the log of a lender or of the coordinator.
        origin: Of the log that they are of.

    Raises:
        AuditError: The file is neither, or holds none of that log.
    """
    if path.is_dir():
        path = path / LOG_FILE
    with path.open("rb") as file:
        is_log = file.read(len(_SQLITE)) == _SQLITE
    if not is_log:
        note = path.read_text(encoding="utf-8")
        found: tuple[str, ...] = (note,) if parse_checkpoint(note).origin == origin else ()
    else:
        with open_log(path) as log:
            seen = (entry.event for _, entry in log.entries() if entry is not None)
            notes = [event.note for event in seen if isinstance(event, CheckpointSeen)]
            own = [note for _, note in log.checkpoints()]
            found = tuple(note for note in (*notes, *own) if parse_checkpoint(note).origin == origin)
    if not found:
        msg = f"{path} holds no checkpoint of the log {origin}; name a log or a note of someone who was shown one"
        raise AuditError(msg)
    return found


def origin_of(path: Path) -> str:
    """Return the name of the log that something is of, unverified: for looking up who holds a checkpoint of it.

    Raises:
        AuditError: It cannot be told.
    """
    if path.is_dir():
        path = next(
            (found for found in (path / LOG_FILE, path / RUN_FOLDER / LOG_FILE) if found.exists()),
            path / LOG_FILE,
        )
    if path.is_file() and _kind_of_file(path) == "log":
        with open_log(path) as log:
            return log.origin
    msg = f"{path} is no log and no folder with one, which --checkpoint needs; take a zip file apart first"
    raise AuditError(msg)


def _kind(path: Path) -> Kind:
    return _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)


def _kind_of_folder(path: Path) -> Kind:
    if (path / RUN_FOLDER).is_dir():
        return "evidence pack"
    if (path / "run.json").exists():
        return "run directory"
    if (path / LOG_FILE).exists():
        return "folder"
    msg = f"{path} holds no log ({LOG_FILE}), no run (run.json) and no evidence pack; name one that does"
    raise AuditError(msg)


def _kind_of_file(path: Path) -> Kind:
    """Tell by the first bytes, and where those were damaged by the name."""
    try:
        with path.open("rb") as file:
            start = file.read(65536)
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); name a log, a run directory, a pack, an export or a proof"
        raise AuditError(msg) from error
    kinds: list[tuple[Kind, bool]] = [
        ("log", start.startswith(_SQLITE)),
        ("evidence pack", start.startswith(b"PK")),
        ("proof", PROOF_FORMAT.encode() in start),
        ("export", EXPORT_FORMAT.encode() in start),
    ]
    by_content: list[Kind] = [kind for kind, fits in kinds if fits]
    kind: Kind | None = by_content[0] if by_content else _SUFFIXES.get(path.suffix)
    if kind is None:
        msg = f"{path} is nothing of fedfin's evidence; name a log, a run directory, a pack, an export or a proof"
        raise AuditError(msg)
    return kind


def _inspect_pack(path: Path, trust: Trust, found: Inspection, progress: Progress | None) -> None:
    if path.is_dir():
        _inspect_pack_folder(path, trust, found, progress)
        return
    with tempfile.TemporaryDirectory(prefix="fedfin-pack-") as scratch:
        folder = Path(scratch) / "pack"
        folder.mkdir()
        unzip_pack(path, folder)
        found.checked.append(Check("zip", f"{path.name} is byte for byte as fedfin writes its files"))
        _inspect_pack_folder(folder, trust, found, progress)


def _inspect_pack_folder(folder: Path, trust: Trust, found: Inspection, progress: Progress | None) -> None:
    found.where = ""
    manifest = read_manifest(folder)
    signed = f", signed by the key {manifest.signed_by}" if manifest.signed_by else ""
    found.checked.append(Check("manifest", f"{manifest.num_files} files are those that it names{signed}"))
    if manifest.signed_by is None and trust.fingerprints:
        what = "nobody signed the pack's manifest, so its report and model card may be anyone's"
        raise FoundError(
            None, what, f"ask the coordinator for its own pack, or verify {RUN_FOLDER}/ by itself"
        )
    if manifest.signed_by is None:
        found.notes.append(
            "nobody signed the pack's manifest: report and model card are by whoever made the pack; what is in run/"
            " stands for itself"
        )
    _inspect_run(folder / RUN_FOLDER, f"{RUN_FOLDER}/", trust, found, progress)
    if found.ok:
        record = read_run(folder / RUN_FOLDER)
        if record.job != manifest.job:
            what = f"the manifest is of the job {manifest.job}, and the run in the pack is {record.job}"
            raise FoundError(None, what, CHANGED)
        signer = manifest.signed_by
        if signer and found.log is not None and signer not in _keys_of(folder / RUN_FOLDER / LOG_FILE):
            what = f"the manifest is signed by the key {signer}, which is not the coordinator's"
            raise FoundError(None, what, "somebody else made this pack: ask the coordinator for its own")


def _inspect_log(path: Path, trust: Trust, found: Inspection, progress: Progress | None) -> None:
    """Check a log by itself, and where it is the coordinator's against the roster that lies beside it."""
    with open_log(path) as log:
        is_coordinator = log.side == "coordinator"
    membership = None
    if is_coordinator:
        found.where = ROSTER
        membership = read_membership(path.parent, trust.fingerprints)
        _tell_membership(membership, found)
        if membership is None:  # the coordinator's own folder: the root states its key
            stated = {stated_coordinator(path.parent, one) for one in trust.fingerprints} - {None}
            trust = replace(trust, fingerprints=trust.fingerprints | {one for one in stated if one})
    found.where = path.name
    # A federation that has only begun has no final checkpoint, and nothing is wrong with that.
    found.take(verify_log(path, _trust_of(trust, membership, 0), progress=progress), path.name)


def _inspect_run(path: Path, prefix: str, trust: Trust, found: Inspection, progress: Progress | None) -> None:
    found.where = f"{prefix}{MANIFEST}"
    seal = _read_seal(path, found)
    found.where = f"{prefix}run.json"
    record = read_run(path)
    found.where = f"{prefix}{ROSTER}"
    membership = read_membership(path, trust.fingerprints)
    if (
        membership is None and record.plan.aggregation == "secure"
    ):  # then nobody's cosignature would be asked for
        what = f"the run {record.job} has no signed roster ({prefix}{ROSTER} and {prefix}{ROOT})"
        raise FoundError(None, what, "without it nobody but the coordinator vouches for the run: ask for it")
    _tell_membership(membership, found)
    found.where = f"{prefix}{LOG_FILE}"
    if not (path / LOG_FILE).exists():
        what = f"the run {record.job} has no log ({prefix}{LOG_FILE})"
        raise FoundError(
            None, what, "it was taken away, or the run was made by a release without one: ask for it"
        )
    threshold = 0 if membership is None else membership.quorum
    found.take(
        verify_log(path / LOG_FILE, _trust_of(trust, membership, threshold), progress=progress),
        f"{prefix}{LOG_FILE}",
    )
    if found.ok:
        if membership is not None and membership.coordinator not in _keys_of(path / LOG_FILE):
            what = f"the log is signed by another key than that of the roster's coordinator, {membership.coordinator}"
            raise FoundError(None, what, "it is another federation's log, or somebody else made it")
        found.checked += check_run(record, path / LOG_FILE, membership)
        found.where = f"{prefix}{MANIFEST}"
        _check_seal(seal, record.job, _keys_of(path / LOG_FILE))
        found.where = ""


def _read_seal(path: Path, found: Inspection) -> RunSeal:
    if not is_sealed(
        path
    ):  # its copy of the log comes with the seal, so a run without one has nothing to hold on to
        what = "the run is not sealed"
        raise FoundError(
            None, what, "it has not ended yet, or its seal was taken away: ask for the sealed run"
        )
    seal = read_seal(path)
    found.checked.append(
        Check(
            "seal",
            f"{seal.num_files} files of the run are those that were sealed by the key {seal.signed_by}",
        )
    )
    return seal


def _check_seal(seal: RunSeal, job: str, keys: set[str]) -> None:
    if seal.signed_by not in keys:
        what = f"the run is sealed by the key {seal.signed_by}, which is not the coordinator's"
        raise FoundError(None, what, "somebody else sealed it: ask the coordinator for its own")
    if seal.job != job:
        what = f"the seal is of the job {seal.job}, and the run is {job}"
        raise FoundError(None, what, CHANGED)


def _tell_membership(membership: Membership | None, found: Inspection) -> None:
    if membership is None:
        found.notes.append(
            "no signed roster is beside the log: who may cosign it is not known, and no cosignature was counted"
        )
    else:
        found.checked.append(Check("roster", membership.told))


def _trust_of(trust: Trust, membership: Membership | None, threshold: int) -> Trust:
    if membership is None:
        return trust
    fingerprints = trust.fingerprints
    if membership.root in fingerprints:  # the root states the coordinator's key
        fingerprints = fingerprints - {membership.root} | {membership.coordinator}
    witnesses = {**membership.witnesses, **trust.witnesses}
    return replace(
        trust, fingerprints=fingerprints, witnesses=witnesses, threshold=max(trust.threshold, threshold)
    )


def _keys_of(path: Path) -> set[str]:
    with open_log(path) as log:
        return {key_fingerprint(key) for _, key in log.signers()}

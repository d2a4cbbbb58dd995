"""How a lender witnesses the coordinator's log: checks each checkpoint before it answers, keeps it, then cosigns it.

With every question of weight comes a checkpoint of the coordinator's log and a proof that the log only grew since the
one that this lender cosigned last. What it cosigned last stands in its own log, on the disk before the cosignature is
made. So a coordinator that rewrites its log, goes back to an old copy, or shows lenders different ones is found out at
the next question. That question is refused, both checkpoints are kept in `forks/`, and this lender answers nothing more
until its engineer has looked at them (`fedfin client clear-fork`).

Source: C2SP tlog-witness (what a witness checks and must not forget), RFC 9162 section 2.1.4.2.
"""

import datetime as dt
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.checkpoint import Checkpoint, NoteKey, cosign, parse_checkpoint, verify_note
from fedfin.audit.events import CheckpointSeen, Clock, Fork, Incident, bounded
from fedfin.audit.merkle import verify_consistency
from fedfin.audit.origins import COORDINATOR, coordinator_origin, root_fingerprint
from fedfin.audit.reading import LogReader
from fedfin.client.folder import LenderFolder
from fedfin.client.sum_rules import refusal
from fedfin.errors import AuditError, ConfigError, LinkError, ProtocolRefusalError
from fedfin.files import write_public
from fedfin.identity import LenderKeys
from fedfin.roster_chain import RosterChain
from fedfin.update import Message, Propose, with_witness
from fedfin.witness import WITNESSED, Shown, Witnessed

__all__ = ["Witness", "clear_forks", "last_cosigned", "open_forks"]

_LONGEST_NOTE: Final = 8192  # of a note in an entry


@dataclass(frozen=True, slots=True)
class _Seen:
    """A checkpoint of the coordinator's log, as its note states it."""

    checkpoint: Checkpoint
    note: str


class _NotGrownError(Exception):
    """A log that is signed and did not grow from one that this lender knows; with the proof that should say so."""

    def __init__(self, what: str, proof: Sequence[bytes] = ()) -> None:
        super().__init__(what)
        self.proof = proof


class Witness:
    """One lender as a witness of its coordinator's log; used by one thread at a time."""

    def __init__(self, folder: LenderFolder, keys: LenderKeys) -> None:
        """Prepare.

        Args:
            folder: The lender's.
            keys: Its keys; the witness key cosigns, and signs nothing else.

        Raises:
            ConfigError: The root certificate cannot be read, or a kept fork is damaged.
        """
        self._folder = folder
        self._key = keys.witness
        self._origin = coordinator_origin(folder.config.federation, root_fingerprint(folder.root_path))
        self._bases: tuple[_Seen, ...] = ()
        self._is_read = False
        self._shown: _Seen | None = None
        self._tells_held = False

    @property
    def origin(self) -> str:
        """Origin of the coordinator's log."""
        return self._origin

    def check(self, question: Message) -> None:
        """Check what came with a question, and note the checkpoint in this lender's log.

        Raises:
            ProtocolRefusalError: The log forked, went back or is signed by another key, now or before (rule `fork`);
                or nothing that could be checked came with the question (rule `witness`).
            AuditError: This lender's own log cannot be read.
            ConfigError: The fork cannot be kept.
        """
        self._shown, self._tells_held = None, False
        if forks := open_forks(self._folder):
            what = (
                f"the coordinator showed a log that cannot be the one this lender knows ({forks[0].name}); its engineer"
                " looks at it, and at what the other lenders saw, and clears it with `fedfin client clear-fork`"
            )
            raise refusal("fork", what)
        if not self._is_read:
            known = self._folder.journal.path.exists()
            self._bases, self._is_read = _bases(self._folder.journal.log) if known else (), True
        if not isinstance(question, WITNESSED):
            return
        if not question.witness:
            raise refusal("witness", f"no checkpoint came with {type(question).__name__}")
        try:
            shown = Shown.from_json(question.witness)
        except LinkError as error:
            raise refusal("witness", str(error)) from error
        seen = self._signed(shown, question)
        self._require_grown(seen, shown, question)
        if self._bases != (seen,):
            self._folder.journal.note(
                CheckpointSeen(member=COORDINATOR, size=seen.checkpoint.size, note=seen.note, cosigned=True)
            )
        if isinstance(question, Propose):
            offset = round(time.time() * 1000) - shown.time_ms
            self._folder.journal.note(Clock(source="coordinator", offset_ms=offset))
        self._shown = seen

    def attach(self, answer: bytes, signature: str = "") -> bytes:
        """Return an answer with the cosignature and this lender's own checkpoint; what it noted is on the disk then.

        Args:
            answer: The answer's bytes.
            signature: By the identity key over what it agreed to, hex, or empty.

        Raises:
            AuditError: The log cannot be written: nothing is cosigned and nothing leaves.
        """
        own = self._folder.journal.checkpoint()
        cosignature = ""
        if self._shown is not None:
            self._bases = (self._shown,)
            cosignature = cosign(self._shown.note, self._folder.config.name, self._key, int(time.time()))
        held = self._bases[0].note if self._tells_held and self._bases else ""
        return with_witness(answer, Witnessed(cosignature, own, held, signature).to_json())

    def _signed(self, shown: Shown, question: Message) -> _Seen:
        key = NoteKey("signer", self._coordinator(question))
        try:
            checkpoint = verify_note(shown.checkpoint, {self._origin: key}).checkpoint
            if checkpoint.origin != self._origin:
                msg = f"the checkpoint is of the log {checkpoint.origin}, not of {self._origin}"
                raise AuditError(msg)  # noqa: TRY301  (one way to refuse whatever is wrong with the note)
        except AuditError as error:
            raise self._fork(question, shown.checkpoint, (), f"{error}") from error
        return _Seen(checkpoint, shown.checkpoint)

    def _coordinator(self, question: Message) -> Ed25519PublicKey:
        """Return the coordinator's key as it is pinned, or is stated by the pinned root in what is about to be."""
        statement = self._folder.coordinator()
        if statement is None and isinstance(question, Propose) and question.roster:
            statement = RosterChain.from_json(question.roster).statement
            statement.verify(self._folder.root(), self._folder.config.federation)
        if statement is None:
            raise refusal("witness", "this lender has pinned no key of the coordinator yet")
        return statement.public_key()

    def _require_grown(self, seen: _Seen, shown: Shown, question: Message) -> None:
        """Require that the log only grew since what was cosigned last, or since what the engineer cleared after it."""
        wanting: list[ProtocolRefusalError] = []
        broken: list[_NotGrownError] = []
        for base in self._bases:
            try:
                self._require_grown_since(base.checkpoint, seen, shown)
            except ProtocolRefusalError as error:
                wanting.append(error)
            except _NotGrownError as error:
                broken.append(error)
            else:
                return
        if wanting:  # it may have grown from that one, and the proof did not come
            self._tells_held = True
            raise wanting[0]
        if broken:
            raise self._fork(question, seen.note, broken[0].proof, str(broken[0])) from broken[0]

    def _require_grown_since(self, held: Checkpoint, seen: _Seen, shown: Shown) -> None:
        new = seen.checkpoint
        if new.size < held.size:
            if _was_cosigned(self._folder, seen):  # a late question proves nothing, and is not answered
                what = (
                    f"the checkpoint of {new.size} entries is older than the one of {held.size} cosigned last"
                )
                raise refusal("witness", what)
            what = f"its log went back from {held.size} entries, which this lender cosigned, to {new.size}"
            raise _NotGrownError(what)
        proof = () if new.size == held.size else shown.proofs.get(held.size)
        if proof is None:
            what = f"no proof came from the {held.size} entries that this lender cosigned last to the {new.size} shown"
            raise refusal("witness", what)
        try:
            verify_consistency(held.size, new.size, held.root, new.root, proof)
        except AuditError as error:
            raise _NotGrownError(str(error), proof) from error

    def _fork(self, question: Message, shown: str, proof: Sequence[bytes], what: str) -> ProtocolRefusalError:
        """Keep the proof that the coordinator's log is not one; return the refusal."""
        self._tells_held = True
        self._is_read = False  # clearing it, in another process, adds to what this lender may go on from
        held = self._bases[0].note if self._bases else ""
        now = dt.datetime.now(dt.UTC)
        document = {
            "time": now.isoformat(timespec="seconds"),
            "job": question.job_id,
            "question": type(question).__name__,
            "reason": what,
            "held": held,
            "shown": shown[: 64 * 1024],
            "proof": [part.hex() for part in proof],
            "cleared": None,
        }
        directory = self._folder.forks_path
        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / f"{now:%Y%m%dT%H%M%S}-{question.job_id[:40]}.json"
        write_public(path, (json.dumps(document, indent=1) + "\n").encode(), mode=0o600)
        events: list[Fork | Incident] = []
        if held and _fits(shown):
            events.append(Fork(member=COORDINATOR, held=held, shown=shown, reason=bounded(what)))
        events.append(
            Incident(kind="integrity", reason=bounded(what), job=question.job_id, member=COORDINATOR)
        )
        self._folder.journal.note(*events)
        return refusal("fork", f"{what}; both checkpoints are kept at this lender")


def open_forks(folder: LenderFolder) -> tuple[Path, ...]:
    """Return the kept forks that the engineer has not cleared, the oldest first.

    Raises:
        ConfigError: One cannot be read.
    """
    if not folder.forks_path.is_dir():
        return ()
    return tuple(path for path in sorted(folder.forks_path.glob("*.json")) if _read(path)["cleared"] is None)


def clear_forks(folder: LenderFolder) -> tuple[dict[str, Any], ...]:
    """Let the lender answer again after its engineer has looked; return what was cleared.

    The lender goes on from what it cosigned last, or, where the coordinator's key signed it, from what was shown: an
    operator may put the newest copy of its log back, or have none. The first of the two that it cosigns is the log from
    then on. The proof stays.

    Raises:
        ConfigError: There is nothing to clear, or a file cannot be read or written.
        AuditError: It cannot be logged, and so nothing is cleared.
    """
    paths = open_forks(folder)
    if not paths:
        msg = f"no fork is kept in {folder.forks_path}; there is nothing to clear"
        raise ConfigError(msg)
    cleared: list[dict[str, Any]] = []
    origin = coordinator_origin(folder.config.federation, root_fingerprint(folder.root_path))
    statement = folder.coordinator()
    keys = {} if statement is None else {origin: NoteKey("signer", statement.public_key())}
    for path in paths:
        found = _read(path)
        events: list[CheckpointSeen | Incident] = [
            Incident(kind="integrity", reason=f"the engineer cleared {path.name}", member=COORDINATOR)
        ]
        try:
            shown = verify_note(found["shown"], keys).checkpoint
            events.append(CheckpointSeen(member=COORDINATOR, size=shown.size, note=found["shown"]))
        except AuditError:
            pass  # another key's: what was cosigned last still holds
        folder.journal.write(*events)
        found["cleared"] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        write_public(path, (json.dumps(found, indent=1) + "\n").encode(), mode=0o600)
        cleared.append({"file": str(path), **found})
    return tuple(cleared)


def last_cosigned(log: LogReader) -> int | None:
    """Return the size of the coordinator's log that a lender cosigned last, by its own log; None for none yet."""
    bases = [event for event in _newest_first(log) if event.cosigned]
    return bases[0].size if bases else None


def _bases(log: LogReader) -> tuple[_Seen, ...]:
    """Return from which checkpoints of the coordinator's log a lender may go on, by its own log; the newest first.

    That is the one that it cosigned last, and those that its engineer cleared after that.
    """
    return tuple(_Seen(parse_checkpoint(event.note), event.note) for event in _newest_first(log))


def _newest_first(log: LogReader) -> Iterator[CheckpointSeen]:
    """Go through the coordinator's checkpoints in a lender's own log, back to the one that was cosigned last."""
    for index in reversed(range(log.size)):
        entry = log.entry(index)
        event = None if entry is None else entry.event
        if isinstance(event, CheckpointSeen) and event.member == COORDINATOR:
            yield event
            if event.cosigned:
                return


def _was_cosigned(folder: LenderFolder, seen: _Seen) -> bool:
    return any(
        entry is not None
        and isinstance(entry.event, CheckpointSeen)
        and entry.event.cosigned
        and parse_checkpoint(entry.event.note) == seen.checkpoint
        for _, entry in folder.journal.log.entries()
    )


def _fits(note: str) -> bool:
    try:
        parse_checkpoint(note)
    except AuditError:
        return False
    return len(note) <= _LONGEST_NOTE


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = found["cleared"], found["shown"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} is damaged ({error}); restore it from the backup: it is the proof of a fork"
        raise ConfigError(msg) from error
    return found

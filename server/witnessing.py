"""The coordinator's side of witnessing: what it logged is shown with every question of weight, and lenders cosign it.

`WitnessedExchange` stands between the job's loop and the way to the lenders. Before a question leaves, what was noted
is on the disk and a checkpoint of it is signed; with it go the consistency proofs that the lenders asked may need. From
their answers it takes the cosignatures, the checkpoints of their own logs, which become entries here, and what they
signed of weight. The loop sees none of it.

A lender whose cosignature does not hold is logged and told of; its answer counts all the same, since the log's finality
needs no more than a quorum. A lender that cosigned more than this log holds stops the job: the log is an old copy.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedfin.audit.checkpoint import (
    Checkpoint,
    NoteKey,
    add_signatures,
    parse_checkpoint,
    signature_lines,
    verify_note,
)
from fedfin.audit.consents import answer_of, verify_answer
from fedfin.audit.events import CheckpointSeen, Incident, bounded
from fedfin.audit.origins import lender_origin
from fedfin.coordinator_key import CoordinatorStatement
from fedfin.credit.export import model_digest
from fedfin.errors import AuditError, FedfinError, LinkError
from fedfin.server.exchange import Answers, Exchange
from fedfin.server.jobs import Say
from fedfin.server.journal import Journal
from fedfin.server.roster import Member
from fedfin.update import Finish, Message
from fedfin.witness import WITNESSED, Shown, Witnessed

__all__ = ["WitnessedExchange"]

_MOST_SHOWN: Final = 64  # earlier checkpoints that a lender may have cosigned, and whose cosignature was lost


@dataclass(frozen=True, slots=True)
class _Keys:
    identity: Ed25519PublicKey
    witness: Ed25519PublicKey


@dataclass(slots=True)
class _Showing:
    """One checkpoint on its way with one set of questions."""

    checkpoint: Checkpoint
    note: str
    keys: Mapping[str, _Keys]
    requests: Mapping[str, Message]
    lines: dict[str, str] = field(default_factory=dict[str, str])
    again: set[str] = field(default_factory=set[str])
    stop: AuditError | None = None


class WitnessedExchange:
    """An `Exchange` whose questions carry the log's checkpoint."""

    def __init__(
        self,
        exchange: Exchange,
        journal: Journal,
        *,
        members: Callable[[], tuple[Member, ...]],
        statement: CoordinatorStatement,
        say: Say,
    ) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            journal: The federation's log.
            members: Whose keys count now.
            statement: The federation, its root and the coordinator's key.
            say: Told of lenders whose cosignature or checkpoint does not hold.
        """
        self._exchange = exchange
        self._journal = journal
        self._members = members
        self._federation = statement.federation
        self._root = statement.root
        self._say = say
        self._may_hold: dict[str, list[int]] = defaultdict(list)
        log = journal.log
        sizes = [size for size, _ in log.checkpoints()]
        cosigned = log.last_cosigned()
        for name, last in cosigned.items():
            self._may_hold[name] = [last, *[size for size in sizes if size > last][-_MOST_SHOWN:]]
        self._own: dict[str, Checkpoint] = {}
        self._signed_by: dict[str, tuple[tuple[str, str], _Keys]] = {}

    def online(self) -> frozenset[str]:
        """Return the names of the enrolled lenders that are connected now."""
        return self._exchange.online()

    def ask(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        *,
        deadline_s: float,
        on_reply: Callable[[str], None] | None = None,
        fold: Callable[[str, Message], None] | None = None,
        enough: int | None = None,
    ) -> Answers:
        """Ask as `Exchange.ask` does.

        Raises:
            AuditError: The log cannot be written, or is shorter than what a lender cosigned: the job must not go on.
        """
        if not any(isinstance(request, WITNESSED) for request in requests.values()):
            return self._exchange.ask(
                requests, expected, deadline_s=deadline_s, on_reply=on_reply, fold=fold, enough=enough
            )
        answers, again = self._ask(requests, expected, deadline_s, on_reply, fold, enough)
        if again:  # they told what they cosigned last, whose cosignature was lost: now the proof is there
            rest = {name: requests[name] for name in sorted(again)}
            more, _ = self._ask(rest, expected, deadline_s, on_reply, fold, enough)
            answers = Answers(answers.replies | more.replies, answers.failures | more.failures)
        return answers

    def _ask(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        deadline_s: float,
        on_reply: Callable[[str], None] | None,
        fold: Callable[[str, Message], None] | None,
        enough: int | None,
    ) -> tuple[Answers, set[str]]:
        """Ask once with a checkpoint; return also who refused for want of a proof that can now be given."""
        showing, shown = self._show(requests)

        def fold_bare(name: str, reply: Message) -> None:
            assert fold is not None  # noqa: S101  (given to the exchange below only where there is one)
            fold(name, self._taken(showing, name, reply))

        answers = self._exchange.ask(
            shown,
            expected,
            deadline_s=deadline_s,
            on_reply=on_reply,
            fold=None if fold is None else fold_bare,
            enough=enough,
        )
        for name, reply in list(answers.replies.items()):
            try:
                answers.replies[name] = self._taken(showing, name, reply)
            except FedfinError as error:
                del answers.replies[name]
                answers.failures[name] = str(error)
        if showing.lines:
            witnesses = {name: keys.witness for name, keys in showing.keys.items()}
            self._journal.log.add_cosignatures(showing.checkpoint.size, showing.lines.values(), witnesses)
        self._journal.flush()  # what they signed is logged before anything rests on it
        if showing.stop is not None:
            raise showing.stop
        for name in showing.again:
            answers.replies.pop(name, None)
        return answers, showing.again

    # What is shown

    def _show(self, requests: Mapping[str, Message]) -> tuple[_Showing, dict[str, Message]]:
        """Sign what was logged, and return it with the questions that carry it."""
        self._journal.flush()
        log = self._journal.log
        note = _bare(log.checkpoint())
        checkpoint = parse_checkpoint(note)
        held = {size for name in requests for size in self._may_hold[name] if size < checkpoint.size}
        proofs = {size: log.consistency(size, checkpoint.size) for size in sorted(held)}
        text = Shown(note, proofs, round(time.time() * 1000)).to_json()
        carrying: dict[int, Message] = {}
        shown: dict[str, Message] = {}
        for name, request in requests.items():
            # one object for all that are asked the same: its bytes are made and sent once
            if id(request) not in carrying:
                carrying[id(request)] = dataclasses.replace(request, witness=text)
            shown[name] = carrying[id(request)]
            if checkpoint.size not in self._may_hold[name]:
                self._may_hold[name] = [*self._may_hold[name][-_MOST_SHOWN:], checkpoint.size]
        return _Showing(checkpoint, note, self._keys(), requests), shown

    def _keys(self) -> dict[str, _Keys]:
        """Return the members' keys; each PEM is parsed once."""
        found: dict[str, _Keys] = {}
        for member in self._members():
            pems = (member.identity_key, member.witness_key)
            kept = self._signed_by.get(member.name)
            if kept is None or kept[0] != pems:
                kept = (pems, _Keys(*map(_public, pems)))
                self._signed_by[member.name] = kept
            found[member.name] = kept[1]
        return found

    # What comes back

    def _taken(self, showing: _Showing, name: str, reply: Message) -> Message:
        """Take what pins the logs off an answer; return the answer alone.

        Raises:
            LinkError: It does not parse.
            AuditError: What the lender must sign of weight is not signed by its key.
        """
        witnessed = Witnessed.from_json(reply.witness)
        bare = dataclasses.replace(reply, witness="")
        keys = showing.keys.get(name)
        if keys is None:
            return bare  # removed while it answered
        if witnessed.held:
            self._take_held(showing, name, witnessed.held)
        if witnessed.cosignature:
            self._take_cosignature(showing, name, witnessed.cosignature, keys)
        if witnessed.checkpoint:
            self._take_checkpoint(name, witnessed.checkpoint, keys)
        if name in showing.again:
            return bare
        question = showing.requests[name]
        model = _model_of(question) if isinstance(question, Finish) else None
        answer = answer_of(name, question, bare, model=model)
        if answer is not None:
            answer = answer.model_copy(update={"signature": witnessed.signature})
            verify_answer(answer, keys.identity, self._journal.log.origin)
            self._journal.note(answer)
        return bare

    def _take_held(self, showing: _Showing, name: str, note: str) -> None:
        """Learn what a lender cosigned last; it may have been asked by a log that was longer than this one."""
        log = self._journal.log
        try:
            key = NoteKey("signer", log.public_key)
            held = verify_note(note, {log.origin: key}).checkpoint
        except AuditError as error:
            self._doubt(name, f"what it says it cosigned last is not this coordinator's: {error}")
            return
        size = log.size
        if held.size > size or log.root(held.size) != held.root:
            showing.stop = AuditError(
                f"{name} cosigned {held.size} entries of this log with this coordinator's signature, and"
                f" {log.path} holds {size}, or others: it was changed or restored from an older copy. Restore the"
                " newest copy; lenders refuse every other, and keep the proof"
            )
        elif held.size not in self._may_hold[name]:
            self._may_hold[name].append(held.size)
            showing.again.add(name)

    def _take_cosignature(self, showing: _Showing, name: str, line: str, keys: _Keys) -> None:
        try:
            signed = add_signatures(showing.note, [line])
            by = verify_note(signed, {name: NoteKey("cosigner", keys.witness)}).by
            if len(signature_lines(signed)) != 2 or set(by) != {name}:
                msg = "the line is not one cosignature by this lender"
                raise AuditError(msg)  # noqa: TRY301  (one way to doubt it, whatever is wrong)
        except AuditError as error:
            self._doubt(name, f"its cosignature does not hold: {error}")
            return
        showing.lines[name] = line
        self._may_hold[name] = [showing.checkpoint.size]

    def _take_checkpoint(self, name: str, note: str, keys: _Keys) -> None:
        """Log the checkpoint of a lender's own log; what cannot be a longer one than before is told of."""
        origin = lender_origin(self._federation, self._root, name)
        try:
            seen = verify_note(note, {origin: NoteKey("signer", keys.identity)}).checkpoint
            event = CheckpointSeen(member=name, size=seen.size, note=note)
            if seen.origin != origin:
                msg = f"it is of the log {seen.origin}"
                raise AuditError(msg)  # noqa: TRY301  (as above)
        except (AuditError, ValueError) as error:
            self._doubt(name, f"the checkpoint of its own log does not hold: {error}")
            return
        before = self._own.get(name)
        if before == seen:
            return
        if before is not None and before.size >= seen.size:
            self._doubt(name, f"its own log went from {before.size} entries to {seen.size}")
        self._own[name] = seen
        self._journal.note(event)

    def _doubt(self, name: str, what: str) -> None:
        self._journal.note(Incident(kind="integrity", reason=bounded(f"{name}: {what}"), member=name))
        self._say({"event": "witness_doubted", "lender": name, "reason": what})


def _model_of(finish: Finish) -> str | None:
    return model_digest(finish.fingerprint, finish.weights) if finish.status == "completed" else None


def _bare(note: str) -> str:
    """Return a note with its first signature only, the log's own."""
    body, _, lines = note.rpartition("\n\n")
    first, _, _ = lines.partition("\n")
    return f"{body}\n\n{first}\n"


def _public(pem: str) -> Ed25519PublicKey:
    key = load_pem_public_key(pem.encode())
    if not isinstance(key, Ed25519PublicKey):
        msg = "a member's key is no Ed25519 key; it must enrol again"
        raise LinkError(msg)
    return key

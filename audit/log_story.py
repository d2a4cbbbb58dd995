"""What a federation's log tells of one job, in a reader's order: who, agreed to what, and what came of it."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedfin.audit.checkpoint import parse_checkpoint, signature_lines
from fedfin.audit.entry import Entry
from fedfin.audit.events import (
    Approval,
    Consent,
    Enrolment,
    Gate,
    Incident,
    Release,
    Revocation,
    RosterVersion,
    RoundCompleted,
    Seal,
)
from fedfin.audit.reading import LogReader, open_log
from fedfin.identity import key_fingerprint

__all__ = ["LogStory", "Member", "Step", "read_story"]


@dataclass(frozen=True, slots=True)
class Member:
    """A member by the fingerprints of its keys, as enrolled last."""

    name: str
    identity: str
    witness: str | None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """An entry in words.

    Attributes:
        index: In the log.
        time: UTC.
        what: One sentence.
    """

    index: int
    time: str
    what: str


@dataclass(slots=True)
class LogStory:
    """What the log tells.

    Attributes:
        origin: The log's name.
        actor: Its owner.
        key: Fingerprint of the key that signs it now.
        size: Entries.
        root: Hex, over all entries.
        checkpoint: The longest that a lender cosigned, or else the longest, as a note with its cosignatures; None where
            there is none.
        covered: Entries that it covers.
        cosigned_by: Names on it, besides the log's own.
        num_by_type: Entries of each type.
        num_erased: Entries without a body.
        members: By name.
        rosters: Versions that were signed or pinned.
        approvals: Of jobs, members and rosters.
        consents: Of this job, by member: the last decision, and whether the log holds the member's signature.
        decisions: Gate, release, seal, incidents.
        models: Number of a round -> (digest before, digest after).
    """

    origin: str
    actor: str
    key: str
    size: int
    root: str
    checkpoint: str | None
    covered: int
    cosigned_by: tuple[str, ...]
    num_by_type: Mapping[str, int] = field(default_factory=dict)
    num_erased: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    rosters: list[Step] = field(default_factory=list)
    approvals: list[Step] = field(default_factory=list)
    consents: dict[str, tuple[str, bool]] = field(default_factory=dict)
    decisions: list[Step] = field(default_factory=list)
    models: dict[int, tuple[str, str]] = field(default_factory=dict)


def read_story(path: Path, job: str) -> LogStory:
    """Read a federation's log for one job; it is not verified here.

    Raises:
        AuditError: The log cannot be read, or an entry does not parse.
    """
    with open_log(path) as log:
        story = _opened(log)
        counts: Counter[str] = Counter()
        for _, entry in log.entries():
            if entry is None:
                story.num_erased += 1
                continue
            counts[entry.event.type] += 1
            _tell(story, entry, job)
        story.num_by_type = dict(sorted(counts.items()))
        return story


def _opened(log: LogReader) -> LogStory:
    # entries after it, receipts and the seal among them, are covered by the next job's
    note = log.final_checkpoint(1) or log.latest_checkpoint()
    names = () if note is None else tuple(name for name, _ in signature_lines(note))
    return LogStory(
        origin=log.origin,
        actor=log.actor,
        key=key_fingerprint(log.public_key),
        size=log.size,
        root=log.root().hex(),
        checkpoint=note,
        covered=0 if note is None else parse_checkpoint(note).size,
        cosigned_by=tuple(sorted(set(names) - {log.origin})),
    )


def _tell(story: LogStory, entry: Entry, job: str) -> None:  # one case an event: flat
    at = entry.seq, entry.time
    match entry.event:
        case Enrolment(member=name, identity=identity, witness=witness):
            story.members[name] = Member(name, identity, witness)
        case Revocation(member=name):
            with contextlib.suppress(KeyError):
                held = story.members[name]
                story.members[name] = Member(name, held.identity, held.witness, revoked=True)
        case RosterVersion(action="signed" | "pinned", number=number, digest=digest) as roster:
            signed = f", signed by {', '.join(roster.signed_by)}" if roster.signed_by else ""
            story.rosters.append(
                Step(*at, f"version {number} of {roster.num_members} members, {digest[:16]}{signed}")
            )
        case Approval(subject=subject) as approval:
            whom = approval.job or approval.member or "the roster"
            if approval.job in {None, job}:
                story.approvals.append(Step(*at, f"{subject}: {whom}, digest {approval.digest[:16]}"))
        case Consent(job=found, member=name, decision=decision) as consent if found == job:
            story.consents[name] = decision, consent.signature is not None
        case Gate(job=found, decision=decision, rule=rule, reason=reason) if found == job:
            story.decisions.append(Step(*at, f"gate: {decision} by rule {rule}: {reason}"))
        case Release(job=found, model=model, num_lenders=number) if found == job:
            story.decisions.append(Step(*at, f"model {model[:16]} released to {number} lenders"))
        case RoundCompleted(job=found, round=number) as done if found == job:
            story.models[number] = done.model_before, done.model_after
        case Seal(run=found, manifest=manifest) if found == job:
            story.decisions.append(Step(*at, f"the run was sealed, manifest {manifest[:16]}"))
        case Incident(kind=kind, reason=reason) as incident if incident.job in {None, job}:
            story.decisions.append(Step(*at, f"incident ({kind}): {reason}"))
        case _:
            pass

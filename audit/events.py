"""What a log may say: typed events with a version, and nothing else.

No personal data can be said: every field is the name of an institution, a digest, a count, a word of a closed
vocabulary, or a bounded text that fedfin itself wrote. A digest of anything guessable (a snapshot of loans, a row) is
salted, so that erasing the salt erases what it stood for. Each event names the sides that may log it; the
coordinator's have no field for a number of one lender, and its metrics need a cohort of three.

Numbers that are not whole are decimal texts (`real`), since two machines need not print a float alike. An event of a
later release is read as an `UnknownEvent` and kept byte for byte, so that an older release still verifies the log.
"""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from fedfin.audit.vocabulary import (
    COORDINATOR,
    LARGEST_COUNT,
    LEAST_COHORT,
    LENDER,
    Count,
    Digest,
    Event,
    JobId,
    Label,
    Name,
    Names,
    NoteText,
    Number,
    PublicKeyHex,
    Ranges,
    Real,
    Reason,
    Side,
    SignatureHex,
    bounded,
    real,
    salted_digest,
)

__all__ = [
    "EVENT_TYPES",
    "LEAST_COHORT",
    "Approval",
    "Budget",
    "Candidate",
    "CheckpointSeen",
    "Clock",
    "Consent",
    "Enrolment",
    "Evaluation",
    "Event",
    "Exchange",
    "Export",
    "Failure",
    "Fork",
    "Gate",
    "Incident",
    "JobEnded",
    "LogAccess",
    "ModelKept",
    "PlanProposed",
    "Policy",
    "Pruned",
    "Refusal",
    "Release",
    "Retirement",
    "Revocation",
    "RosterVersion",
    "Rotation",
    "RoundCompleted",
    "RoundLost",
    "Seal",
    "Service",
    "Side",
    "UnknownEvent",
    "bounded",
    "real",
    "salted_digest",
]

# --- who takes part ---------------------------------------------------------------------------------------------


class Enrolment(Event, frozen=True):
    """A lender joined: at the coordinator the member's keys, at the lender the federation's root."""

    type: Literal["enrolment"] = "enrolment"
    version: Literal[1] = 1
    member: Name
    federation: Name
    identity: Digest = Field(description="Fingerprint of the identity key.")
    witness: Digest | None = Field(default=None, description="Fingerprint of the witness key.")
    root: Digest | None = Field(default=None, description="Fingerprint of the federation's root certificate.")


class RosterVersion(Event, frozen=True):
    """A version of the list of members was proposed, signed by its quorum, or pinned by a lender."""

    type: Literal["roster"] = "roster"
    version: Literal[1] = 1
    action: Literal["proposed", "signed", "pinned", "refused"]
    number: Count = Field(description="The roster's own version; 0 where it has none.")
    digest: Digest
    previous: Digest | None = None
    num_members: Number
    signed_by: Names = ()
    added: Names = ()
    removed: Names = ()
    changed: Names = ()


class Rotation(Event, frozen=True):
    """A key was replaced: the old one signs the new one.

    In the log of the member itself the entry's own signature, by the old key, is that signature; elsewhere it is
    `proof`. Entries after the rotation of a log's own identity key are signed by the new key.
    """

    type: Literal["rotation"] = "rotation"
    version: Literal[1] = 1
    member: Name
    key: Literal["identity", "witness", "tls", "node"]
    old: PublicKeyHex = Field(
        description="The Ed25519 public key (raw, hex); of TLS and node keys the SHA-256."
    )
    new: PublicKeyHex
    proof: SignatureHex | None = None


class Revocation(Event, frozen=True):
    """A member or a key of it counts no more, from the round named on."""

    type: Literal["revocation"] = "revocation"
    version: Literal[1] = 1
    member: Name
    key: Literal["identity", "witness", "tls", "node", "all"] = "all"
    reason: Reason
    signed_by: Names = ()
    from_round: Count | None = None


class Approval(Event, frozen=True):
    """Someone allowed something by hand: a job, a member or a roster.

    Attributes:
        approver: Which of the two persons, as the fingerprint of a key or a salted digest: never a name.
    """

    type: Literal["approval"] = "approval"
    version: Literal[1] = 1
    subject: Literal["job", "member", "roster"]
    job: JobId | None = None
    member: Name | None = None
    digest: Digest = Field(description="Of what was approved: the plan, the member's key or the roster.")
    approver: Digest | None = None


# --- what was agreed --------------------------------------------------------------------------------------------


class Policy(Event, frozen=True):
    """A lender's policy or a coordinator's configuration is in force, by its digest."""

    type: Literal["policy"] = "policy"
    version: Literal[1] = 1
    digest: Digest
    previous: Digest | None = None


class PlanProposed(Event, frozen=True):
    """A job's plan, as the coordinator stated it."""

    type: Literal["plan"] = "plan"
    version: Literal[1] = 1
    job: JobId
    digest: Digest
    model: Label
    strategy: Label
    aggregation: Label
    mode: Literal["local", "shared", "none"]
    epsilon: Real | None = None
    delta: Real | None = None
    rounds: Number
    least_cohort: Number


class Consent(Event, frozen=True):
    """A lender took part in a job or did not: at the coordinator with the lender's signature."""

    type: Literal["consent"] = "consent"
    version: Literal[1] = 1
    job: JobId
    member: Name
    plan: Digest
    decision: Literal["accepted", "refused", "withdrawn", "evaluations declined"]
    reason: Reason | None = None
    signature: SignatureHex | None = None


# --- a round ----------------------------------------------------------------------------------------------------


class Exchange(Event, frozen=True):
    """One step of a round: what left or arrived, by digest."""

    type: Literal["exchange"] = "exchange"
    version: Literal[1] = 1
    job: JobId
    stage: Label = Field(description="What the sum is for, such as `bins` or `round 3`.")
    attempt: Number = 1
    step: Literal["opened", "shared", "masked", "confirmed", "unmasked", "released", "repeated"]
    cohort_size: Count
    context: Digest | None = Field(default=None, description="Of everything that both sides hold fixed.")
    digest: Digest | None = Field(default=None, description="Of what was sent or received.")


class RoundCompleted(Event, frozen=True):
    """A round gave a new model."""

    sides = COORDINATOR
    type: Literal["round_completed"] = "round_completed"
    version: Literal[1] = 1
    job: JobId
    round: Count
    attempt: Number = 1
    cohort: Names
    dropped: Names = ()
    seconds: Real
    model_before: Digest
    model_after: Digest
    transcript: Digest | None = None


class RoundLost(Event, frozen=True):
    """A round was given up: nothing of it was published."""

    sides = COORDINATOR
    type: Literal["round_lost"] = "round_lost"
    version: Literal[1] = 1
    job: JobId
    round: Count
    attempt: Number = 1
    cohort: Names = ()
    dropped: Names = ()
    reason: Reason


class Refusal(Event, frozen=True):
    """This side refused what was asked: the rule, the question's kind and the reason."""

    type: Literal["refusal"] = "refusal"
    version: Literal[1] = 1
    rule: Label
    asked: Label
    reason: Reason
    job: JobId | None = None


class Failure(Event, frozen=True):
    """Work was begun and did not succeed."""

    type: Literal["failure"] = "failure"
    version: Literal[1] = 1
    stage: Label
    reason: Reason
    job: JobId | None = None


class Budget(Event, frozen=True):
    """A lender's privacy budget moved. Only a lender's own log may hold this."""

    sides = LENDER
    type: Literal["budget"] = "budget"
    version: Literal[1] = 1
    action: Literal["reserve", "commit", "release"]
    job: JobId
    snapshot: Digest = Field(description="Salted digest of the loans.")
    epsilon: Real | None = None
    delta: Real | None = None
    relation: Literal["add_or_remove_one", "replace_one"] | None = None
    stage: Label | None = None
    by_hand: bool = False


class JobEnded(Event, frozen=True):
    """A job is over at this side."""

    type: Literal["job_ended"] = "job_ended"
    version: Literal[1] = 1
    job: JobId
    status: Label


# --- the model --------------------------------------------------------------------------------------------------


class Candidate(Event, frozen=True):
    """A job gave a model that may be released."""

    sides = COORDINATOR
    type: Literal["candidate"] = "candidate"
    version: Literal[1] = 1
    job: JobId
    model: Digest
    rounds: Count


class Evaluation(Event, frozen=True):
    """A model was judged. At the coordinator: sums over the cohort, of three lenders and more."""

    type: Literal["evaluation"] = "evaluation"
    version: Literal[1] = 1
    job: JobId
    model: Digest
    cohort_size: Number
    after_round: Count | None = None
    auroc: Real | None = None
    brier: Real | None = None
    calibration: Real | None = None
    digest: Digest | None = Field(default=None, description="Of the sums.")

    @model_validator(mode="after")
    def _metrics_are_a_cohorts(self) -> Self:
        if self.cohort_size < LEAST_COHORT and (self.auroc or self.brier or self.calibration):
            msg = (
                f"metrics of {self.cohort_size} lenders tell one lender's; log the digest alone below"
                f" {LEAST_COHORT}"
            )
            raise ValueError(msg)
        return self


class Gate(Event, frozen=True):
    """A model was held against the gate's rules."""

    sides = COORDINATOR
    type: Literal["gate"] = "gate"
    version: Literal[1] = 1
    job: JobId
    model: Digest
    decision: Literal["released", "refused", "held"]
    rule: Label
    reason: Reason


class Release(Event, frozen=True):
    """A model went to the lenders."""

    sides = COORDINATOR
    type: Literal["release"] = "release"
    version: Literal[1] = 1
    job: JobId
    model: Digest
    num_lenders: Count


class ModelKept(Event, frozen=True):
    """A lender keeps a model that it was sent."""

    sides = LENDER
    type: Literal["model_kept"] = "model_kept"
    version: Literal[1] = 1
    job: JobId
    model: Digest


class Retirement(Event, frozen=True):
    """A model is no longer to be used."""

    type: Literal["retirement"] = "retirement"
    version: Literal[1] = 1
    model: Digest
    reason: Reason


# --- the evidence itself ----------------------------------------------------------------------------------------


class Service(Event, frozen=True):
    """This side started or stopped."""

    type: Literal["service"] = "service"
    version: Literal[1] = 1
    action: Literal["started", "stopped"]
    release: Label
    snapshot: Digest | None = Field(default=None, description="Salted digest of the loans.")


class Export(Event, frozen=True):
    """Evidence or a model was written out for someone else."""

    type: Literal["export"] = "export"
    version: Literal[1] = 1
    what: Literal["log", "pruned log", "proof", "evidence pack", "model"]
    digest: Digest
    num_entries: Count | None = None


class LogAccess(Event, frozen=True):
    """Someone read the log by a command of fedfin."""

    type: Literal["log_access"] = "log_access"
    version: Literal[1] = 1
    command: Label
    first: Count
    num_entries: Count


class Incident(Event, frozen=True):
    """Something that should not happen: for the people who answer for it."""

    type: Literal["incident"] = "incident"
    version: Literal[1] = 1
    kind: Literal["security", "privacy", "availability", "integrity"]
    reason: Reason
    job: JobId | None = None
    member: Name | None = None


class Clock(Event, frozen=True):
    """The clock that stamps the entries, and how far it is known to be off."""

    type: Literal["clock"] = "clock"
    version: Literal[1] = 1
    source: Literal["system", "ntp", "coordinator"]
    offset_ms: Annotated[int, Field(ge=-LARGEST_COUNT, le=LARGEST_COUNT)] | None = None


class CheckpointSeen(Event, frozen=True):
    """Another log's signed checkpoint: a lender's at the coordinator, the coordinator's at a lender."""

    type: Literal["checkpoint"] = "checkpoint"
    version: Literal[1] = 1
    member: Name = Field(description="Whose log.")
    size: Count
    note: NoteText
    cosigned: bool = Field(default=False, description="Whether this side cosigned it.")


class Fork(Event, frozen=True):
    """Two signed checkpoints of one log that cannot both be true: the proof is kept whole."""

    type: Literal["fork"] = "fork"
    version: Literal[1] = 1
    member: Name = Field(description="Whose log.")
    held: NoteText
    shown: NoteText
    reason: Reason


class Pruned(Event, frozen=True):
    """Bodies of entries were erased; their hashes stay.

    Attributes:
        ranges: First index and the one after the last, of each run of entries; ascending.
        digest: SHA-256 over the leaf hashes of the entries, in their order, hex.
    """

    type: Literal["pruned"] = "pruned"
    version: Literal[1] = 1
    ranges: Ranges
    num_entries: Number
    digest: Digest
    retention: Label


class Seal(Event, frozen=True):
    """A finished run's manifest was signed."""

    type: Literal["seal"] = "seal"
    version: Literal[1] = 1
    run: JobId
    manifest: Digest


class UnknownEvent(Event, frozen=True):
    """An event of a later release: its fields are kept as canonical JSON and mean nothing here.

    Attributes:
        content: The whole event, canonical JSON.
    """

    content: str


_KNOWN: Final[tuple[type[Event], ...]] = (
    Enrolment,
    RosterVersion,
    Rotation,
    Revocation,
    Approval,
    Policy,
    PlanProposed,
    Consent,
    Exchange,
    RoundCompleted,
    RoundLost,
    Refusal,
    Failure,
    Budget,
    JobEnded,
    Candidate,
    Evaluation,
    Gate,
    Release,
    ModelKept,
    Retirement,
    Service,
    Export,
    LogAccess,
    Incident,
    Clock,
    CheckpointSeen,
    Fork,
    Pruned,
    Seal,
)

EVENT_TYPES: Final[dict[str, type[Event]]] = {str(kind.model_fields["type"].default): kind for kind in _KNOWN}
"""Every event of this release by its `type`."""

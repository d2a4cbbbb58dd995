"""federation.db: the coordinator's durable state: invitations, members, jobs, checkpoints and secure sums.

It is the one thing that enrolment (in the SuperLink's process), `fedfin server invite` and the ServerApp share;
Flower's own state is in memory and is rebuilt from it. SQLite with `synchronous=FULL`: what a method returned
survives a power cut. Only the hash of an invitation's secret is kept.
"""

import contextlib
import datetime as dt
import json
import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.audit.origins import COORDINATOR
from fedfin.errors import EnrolmentError
from fedfin.invitation import Invitation
from fedfin.roster_chain import SignedRoster
from fedfin.server.database import FederationFile
from fedfin.server.version_store import VersionStore

__all__ = ["LEFT_OUT", "AskedSum", "Checkpoint", "FederationStore", "Job", "Member"]

TOKEN_HOURS: Final = 24

LEFT_OUT: Final = "left out: "
"""Start of the reason of a lender that the coordinator leaves out of a job for good: it is not asked again."""


@dataclass(frozen=True, slots=True)
class Member:
    """A row of the roster: all keys are public, PEM; `signature` is the identity key's over the row, hex."""

    name: str
    node_key: str
    certificate: str
    identity_key: str
    witness_key: str
    signature: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job of this federation.

    Attributes:
        job_id: Its id.
        plan: Its plan, JSON.
        digest: The plan's, SHA-256 in hex.
        status: `running` (unfinished), `completed`, `failed` (given up: it cannot go on) or `abandoned` (another job
            was started in its place).
        created_at: ISO 8601.
        reason: Why it failed or, where it is unfinished, why it stopped last; empty where it did not.
        began_at: When its lenders were first together, ISO 8601; before that nobody was asked for anything that costs.
    """

    job_id: str
    plan: str
    digest: str
    status: str
    created_at: str
    reason: str = ""
    began_at: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A job after `round` aggregated rounds: its bins (JSON), its fingerprint and its weights, float32 (d,).

    `reference` is the cohort's distribution of each column, JSON, for the lenders' drift checks. `moments` are what
    the strategy keeps between rounds, float64 (d,) each. `num_loans` are the cohort's loans by its noisy histogram, in
    mode shared, where a mean gradient is taken over them; elsewhere 0.
    """

    round: int
    bins: str
    fingerprint: str
    weights: NDArray[np.float32] = field(repr=False)
    reference: str = field(default="", repr=False)
    moments: tuple[NDArray[np.float64], ...] = field(default=(), repr=False)
    num_loans: float = 0.0


@dataclass(frozen=True, slots=True)
class AskedSum:
    """A secure sum whose masked vectors were asked for: it cannot be taken back.

    Attributes:
        stage: What was summed: `bins`, `round 3`, `evaluation 1`.
        attempt: Which attempt of the stage.
        base: Rounds aggregated in the model that was asked about.
        sharers: Lenders whose masks are in the vectors.
        survivors: Lenders that were to be confirmed as survivors, or None where it did not come to that.
    """

    stage: str
    attempt: int
    base: int
    sharers: frozenset[str]
    survivors: frozenset[str] | None


class FederationStore:
    """Open federation.db; every method is one transaction, safe from several processes at once."""

    def __init__(self, path: Path) -> None:
        self._file = FederationFile(path)

    @classmethod
    def create(cls, path: Path) -> "FederationStore":
        """Make an empty database.

        Raises:
            ConfigError: The file exists already.
        """
        FederationFile.create(path)
        return cls(path)

    @property
    def versions(self) -> VersionStore:
        """The signed versions of the roster, in the same file."""
        return VersionStore(self._read, self._write)

    def invite(self, invitation: Invitation) -> None:
        """Keep the hash of an invitation, for 24 hours; an unused older one for the same name is void.

        Raises:
            EnrolmentError: A lender of that name is enrolled already, or it is the coordinator's in every log.
        """
        if invitation.name == COORDINATOR:
            msg = f"{invitation.name} is how logs name the coordinator; take another name for the lender"
            raise EnrolmentError(msg)
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(hours=TOKEN_HOURS)
        with self._write() as db:
            if db.execute("SELECT 1 FROM members WHERE name = ?", (invitation.name,)).fetchone():
                msg = f"{invitation.name} is enrolled already; take another name, or `fedfin server remove` it first"
                raise EnrolmentError(msg)
            db.execute(
                "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, NULL)",
                (invitation.name, invitation.secret_hash(), expires.isoformat()),
            )

    def enrol(self, member: Member, secret_hash: str) -> None:
        """Use up the invitation and add the member, both or neither.

        Raises:
            EnrolmentError: The invitation is unknown here, used, expired or for another name, or a key is
                enrolled already.
        """
        now = dt.datetime.now(dt.UTC)
        with self._write() as db:
            self._check_invitation(db, member.name, secret_hash, now)
            db.execute(
                "UPDATE invitations SET used_at = ? WHERE secret_hash = ?", (now.isoformat(), secret_hash)
            )
            try:
                db.execute(
                    "INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        member.name,
                        member.node_key,
                        member.certificate,
                        member.identity_key,
                        member.witness_key,
                        member.signature,
                        now.isoformat(),
                    ),
                )
            except sqlite3.IntegrityError as error:
                msg = f"{member.name} or its node key is enrolled already; ask for a token with another name"
                raise EnrolmentError(msg) from error

    def check_invitation(self, name: str, secret_hash: str) -> None:
        """Check an invitation without using it.

        Raises:
            EnrolmentError: As `enrol`.
        """
        with self._read() as db:
            self._check_invitation(db, name, secret_hash, dt.datetime.now(dt.UTC))

    def enrolled_by(self, name: str, secret_hash: str) -> Member | None:
        """Return the member that used this very invitation, or None."""
        with self._read() as db:
            used = db.execute(
                "SELECT 1 FROM invitations WHERE name = ? AND secret_hash = ? AND used_at IS NOT NULL",
                (name, secret_hash),
            ).fetchone()
        return next((member for member in self.members() if member.name == name), None) if used else None

    def remove(self, name: str) -> None:
        """Take a member off the roster; its name can be invited again.

        Raises:
            EnrolmentError: Nobody of that name is enrolled.
        """
        with self._write() as db:
            if db.execute("DELETE FROM members WHERE name = ?", (name,)).rowcount == 0:
                msg = f"{name} is not enrolled; `fedfin server roster` lists who is"
                raise EnrolmentError(msg)
            # Nobody waits for its answer or its confirmation any more, and a newcomer of that name is a newcomer.
            db.execute("DELETE FROM answers WHERE name = ?", (name,))

    def replace_keys(
        self,
        before: Member,
        after: Member,
        rotation: SignedRoster | None,
        log: Callable[[], None] = lambda: None,
    ) -> None:
        """Put a member's new keys in the place of those before, with the version that says so: all or nothing.

        Args:
            before: The member as it was when its request was checked.
            after: The same lender with its new keys.
            rotation: The version of the roster that this makes; None where there is no complete version yet.
            log: Called when nothing stands in its way any more; where it raises, nothing is replaced.

        Raises:
            EnrolmentError: The member's keys are not those of `before` any more, or a key is another member's.
            LinkError: Another version of the roster came first: the request is to be made again.
        """
        with self._write() as db:
            try:
                changed = db.execute(
                    "UPDATE members SET node_key = ?, certificate = ?, identity_key = ?, witness_key = ?, signature = ?"
                    " WHERE name = ? AND identity_key = ? AND certificate = ?",
                    (
                        after.node_key,
                        after.certificate,
                        after.identity_key,
                        after.witness_key,
                        after.signature,
                        before.name,
                        before.identity_key,
                        before.certificate,
                    ),
                ).rowcount
            except sqlite3.IntegrityError as error:
                msg = f"the new node key of {after.name} is another member's; make new keys again"
                raise EnrolmentError(msg) from error
            if not changed:
                msg = f"the keys of {after.name} were replaced in between, or it was removed; look at the roster"
                raise EnrolmentError(msg)
            if rotation is not None:
                self.versions.add_within(db, rotation)
            log()

    def members(self) -> tuple[Member, ...]:
        """Return the roster, by name."""
        with self._read() as db:
            rows = db.execute(
                "SELECT name, node_key, certificate, identity_key, witness_key, signature FROM members ORDER BY name"
            ).fetchall()
        return tuple(Member(*row) for row in rows)

    def pending_invitations(self) -> tuple[tuple[str, str], ...]:
        """Return (name, expiry in ISO 8601) of the invitations that are neither used nor expired."""
        now = dt.datetime.now(dt.UTC).isoformat()
        with self._read() as db:
            return tuple(
                db.execute(
                    "SELECT name, expires_at FROM invitations WHERE used_at IS NULL AND expires_at > ? ORDER BY name",
                    (now,),
                ).fetchall()
            )

    def start_job(self, job_id: str, plan: str, digest: str) -> None:
        """Record a job as running."""
        with self._write() as db:
            db.execute(
                "INSERT INTO jobs (job_id, plan, digest, status, created_at) VALUES (?, ?, ?, 'running', ?)",
                (job_id, plan, digest, dt.datetime.now(dt.UTC).isoformat()),
            )

    def begin_job(self, job_id: str) -> None:
        """Record, before it happens, that a job's lenders are asked for what costs them."""
        now = dt.datetime.now(dt.UTC).isoformat()
        with self._write() as db:
            db.execute("UPDATE jobs SET began_at = coalesce(began_at, ?) WHERE job_id = ?", (now, job_id))

    def stop_job(self, job_id: str, reason: str) -> None:
        """Keep why an unfinished job stopped; an empty reason says that it goes on."""
        with self._write() as db:
            db.execute("UPDATE jobs SET reason = ? WHERE job_id = ?", (reason, job_id))

    def end_job(self, job_id: str, status: str, reason: str = "") -> None:
        """Record how a job ended: completed, failed (and why) or abandoned."""
        with self._write() as db:
            db.execute("UPDATE jobs SET status = ?, reason = ? WHERE job_id = ?", (status, reason, job_id))

    def jobs(self) -> tuple[Job, ...]:
        """Return all jobs, oldest first."""
        with self._read() as db:
            rows = db.execute(
                "SELECT job_id, plan, digest, status, created_at, reason, began_at FROM jobs ORDER BY created_at"
            ).fetchall()
        return tuple(Job(*row) for row in rows)

    def save_checkpoint(
        self, job_id: str, checkpoint: Checkpoint, said: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the newest state of a job, durably; the round counts as done from here on.

        Args:
            job_id: The job.
            checkpoint: Its state.
            said: The event that is said of it next, JSON: both are kept, or neither.
        """
        with self._write() as db:
            if said is not None:
                db.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (job_id, json.dumps(said)))
            db.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id,
                    checkpoint.round,
                    checkpoint.bins,
                    checkpoint.fingerprint,
                    checkpoint.weights.astype("<f4").tobytes(),
                    checkpoint.reference,
                    b"".join(moment.astype("<f8").tobytes() for moment in checkpoint.moments),
                    checkpoint.num_loans,
                ),
            )

    def keep_said(self, job_id: str, said: Mapping[str, Any]) -> None:
        """Keep the event that is said of a job next, JSON: what was killed before it was logged is logged late."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (job_id, json.dumps(said)))

    def said(self, job_id: str) -> dict[str, Any] | None:
        """Return the event that was kept last of a job, or None."""
        with self._read() as db:
            row = db.execute("SELECT event FROM said WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def checkpoint(self, job_id: str) -> Checkpoint | None:
        """Return the newest state of a job, or None before its bins are made."""
        with self._read() as db:
            row = db.execute(
                "SELECT round, bins, fingerprint, weights, reference, moments, num_loans FROM checkpoints"
                " WHERE job_id = ?",
                (job_id,),
            ).fetchone()
        if row is None:
            return None
        weights = np.frombuffer(row[3], dtype="<f4").astype(np.float32)
        moments = np.frombuffer(row[5], dtype="<f8").astype(np.float64)
        return Checkpoint(
            round=row[0],
            bins=row[1],
            fingerprint=row[2],
            weights=weights,
            reference=row[4],
            moments=tuple(moments.reshape(-1, len(weights))) if len(moments) else (),
            num_loans=row[6],
        )

    def freeze_roster(self, job_id: str, roster: str) -> str:
        """Keep a job's roster, JSON, unless one is kept already; return the one that is kept."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO rosters VALUES (?, ?)", (job_id, roster))
            return str(db.execute("SELECT roster FROM rosters WHERE job_id = ?", (job_id,)).fetchone()[0])

    def roster(self, job_id: str) -> str | None:
        """Return the roster that a job was first proposed with, JSON, or None."""
        with self._read() as db:
            row = db.execute("SELECT roster FROM rosters WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else str(row[0])

    def open_sum(self, job_id: str, stage: str) -> int:
        """Record that a stage is summed, or tried again, under secure aggregation; return the attempt, from 0.

        No attempt is given out twice, whatever was killed: a lender makes keys for each once.
        """
        with self._write() as db:
            (attempt,) = db.execute(
                "SELECT coalesce(max(attempt) + 1, 0) FROM sums WHERE job_id = ? AND stage = ?",
                (job_id, stage),
            ).fetchone()
            db.execute("INSERT INTO sums (job_id, stage, attempt) VALUES (?, ?, ?)", (job_id, stage, attempt))
        return int(attempt)

    def mark_asked(self, job_id: str, asked: AskedSum) -> None:
        """Record, before it happens, that masked vectors are asked for: from here on the stage is used up."""
        with self._write() as db:
            db.execute(
                "UPDATE sums SET base = ?, sharers = ? WHERE job_id = ? AND stage = ? AND attempt = ?",
                (asked.base, json.dumps(sorted(asked.sharers)), job_id, asked.stage, asked.attempt),
            )

    def unmark_asked(self, job_id: str, stage: str, attempt: int) -> None:
        """Take the mark of `mark_asked` back: no masked vector was made that another sum could be compared with."""
        with self._write() as db:
            db.execute(
                "UPDATE sums SET base = NULL, sharers = NULL WHERE job_id = ? AND stage = ? AND attempt = ?",
                (job_id, stage, attempt),
            )

    def mark_survivors(self, job_id: str, stage: str, attempt: int, survivors: Collection[str]) -> None:
        """Record, before it happens, that lenders are asked to confirm these survivors."""
        with self._write() as db:
            db.execute(
                "UPDATE sums SET survivors = ? WHERE job_id = ? AND stage = ? AND attempt = ?",
                (json.dumps(sorted(survivors)), job_id, stage, attempt),
            )

    def asked_sums(self, job_id: str) -> tuple[AskedSum, ...]:
        """Return a job's secure sums whose masked vectors were asked for, in the order of their asking."""
        with self._read() as db:
            rows = db.execute(
                "SELECT stage, attempt, base, sharers, survivors FROM sums"
                " WHERE job_id = ? AND sharers IS NOT NULL ORDER BY rowid",
                (job_id,),
            ).fetchall()
        return tuple(
            AskedSum(stage, attempt, base, _names(sharers), None if survivors is None else _names(survivors))
            for stage, attempt, base, sharers, survivors in rows
        )

    def save_answer(self, job_id: str, name: str, *, weight: float | None, reason: str | None) -> None:
        """Keep a lender's answer: a weight, or the reason of its refusal, at the proposal or later in the job."""
        with self._write() as db:
            db.execute(
                "INSERT INTO answers (job_id, name, weight, reason) VALUES (?, ?, ?, ?)"
                # A lender that stops later keeps its weight here: it holds a reservation until the job's end.
                " ON CONFLICT (job_id, name)"
                " DO UPDATE SET weight = coalesce(excluded.weight, weight), reason = excluded.reason",
                (job_id, name, weight, reason),
            )

    def weights(self, job_id: str) -> dict[str, float]:
        """Return the weight of every lender that accepted the job and did not refuse to go on."""
        with self._read() as db:
            rows = db.execute(
                "SELECT name, weight FROM answers WHERE job_id = ? AND weight IS NOT NULL AND reason IS NULL",
                (job_id,),
            ).fetchall()
        return dict(rows)

    def refusals(self, job_id: str) -> dict[str, str]:
        """Return the reason of every lender that has no part in a job: it refused, or is left out, by name."""
        with self._read() as db:
            rows = db.execute(
                "SELECT name, reason FROM answers WHERE job_id = ? AND reason IS NOT NULL ORDER BY name",
                (job_id,),
            ).fetchall()
        return dict(rows)

    def left_out(self, job_id: str) -> dict[str, str]:
        """Return the reason, without `LEFT_OUT`, of every lender that is left out of a job for good."""
        return {
            name: reason[len(LEFT_OUT) :]
            for name, reason in self.refusals(job_id).items()
            if reason.startswith(LEFT_OUT)
        }

    def mark_delivered(self, job_id: str, name: str) -> None:
        """Record that a lender has confirmed the end of the job."""
        with self._write() as db:
            db.execute(
                "UPDATE answers SET delivered_at = ? WHERE job_id = ? AND name = ?",
                (dt.datetime.now(dt.UTC).isoformat(), job_id, name),
            )

    def undelivered(self, job_id: str) -> tuple[str, ...]:
        """Return the lenders that accepted the job and have not confirmed its end."""
        with self._read() as db:
            rows = db.execute(
                "SELECT name FROM answers WHERE job_id = ? AND weight IS NOT NULL AND delivered_at IS NULL"
                " ORDER BY name",
                (job_id,),
            ).fetchall()
        return tuple(name for (name,) in rows)

    @staticmethod
    def _check_invitation(db: sqlite3.Connection, name: str, secret_hash: str, now: dt.datetime) -> None:
        row = db.execute(
            "SELECT name, expires_at, used_at FROM invitations WHERE secret_hash = ?", (secret_hash,)
        ).fetchone()
        mend = f"ask the coordinator for a new one (`fedfin server invite {name}`)"
        if row is None:
            msg = f"this federation gave no such token to {name}: it is foreign, replaced or altered; {mend}"
            raise EnrolmentError(msg)
        if row[2] is not None:
            msg = (
                f"the token of {name} was used at {row[2][:16]} UTC; a token works once: if its keys are lost, the"
                f" coordinator removes the name first (`fedfin server remove {name}`) and invites it again"
            )
            raise EnrolmentError(msg)
        if now >= dt.datetime.fromisoformat(row[1]):
            msg = f"the token of {name} expired at {row[1][:16]} UTC, {TOKEN_HOURS} hours after it was made; {mend}"
            raise EnrolmentError(msg)

    def _read(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return self._file.reading()

    def _write(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return self._file.writing()


def _names(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))

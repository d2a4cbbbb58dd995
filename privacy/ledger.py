"""The lender's privacy ledger: what was promised and what has left, for each data snapshot.

A job is reserved whole before anything leaves, each stage is committed before its release leaves, and what a
finished job did not use is freed. Every method is one transaction that is on the disk when it returns, so a
crash neither forgets a release nor charges it twice. Whatever cannot be recorded or read stops the work
(`privacy/ledger_file.py`).

The limit is held by a Renyi filter (`privacy/filter.py`) for every loan of the snapshot a job asks for: what
counts is all that left, or is reserved, of every snapshot that holds the loan (`privacy/overlap.py`). Figures are
those of the loan that has given most.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedfin.errors import BudgetSpentError, LedgerError, PrivacyParameterError
from fedfin.privacy.accounting import epsilon_pld, epsilon_rdp
from fedfin.privacy.books import (
    Books,
    Budget,
    Spent,
    committed,
    held,
    is_over,
    left_of,
    not_committed,
    worst,
)
from fedfin.privacy.events import Event, count_events, merge_events
from fedfin.privacy.filter import Account
from fedfin.privacy.ledger_file import Entry, LedgerFile, Stage
from fedfin.privacy.overlap import memberships
from fedfin.privacy.snapshot import Snapshot

__all__ = ["Budget", "Charge", "Entry", "Ledger", "Spent"]

_MAX_NAME = 200
_MOST_PLDS = 32  # in a history: each takes a tenth of a second


@dataclass(frozen=True, slots=True)
class Charge:
    """One release of what a snapshot's loans have given, and what they had given in all after it."""

    entry: Entry
    epsilon_pld: float | None  # of `_MOST_PLDS` releases at most, the last one always
    epsilon_rdp: float


class Ledger:
    """One lender's ledger; the invariant: entries only grow, and no reservation passes its limit.

    Several processes may open the same file: each method that writes holds the file's exclusive lock. One
    object serves the thread that made it.

    Args:
        path: The SQLite file; made with mode 0600 if it is not there. Its folder must be.

    Raises:
        LedgerError: From the constructor and every method: the file cannot be made, read, written or
            trusted; says why and the mend.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LedgerFile(path)

    def __repr__(self) -> str:
        return f"Ledger({str(self._path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was recorded is already on the disk."""
        self._file.close()

    def reserve(
        self,
        job_id: str,
        snapshot: Snapshot,
        events: Sequence[Event],
        *,
        delta: float,
        epsilon_limit: float,
        max_delta: float,
    ) -> None:
        """Record a whole job's events before any of them leaves; a repetition changes nothing.

        Args:
            job_id: The job, unique in this ledger.
            snapshot: The loans (`snapshot_of`); their first job opens their account.
            events: Everything the job may release; at least one.
            delta: The job's own, in (0, 1); recorded. What is charged does not depend on it.
            epsilon_limit: The lender's limit for all jobs on these loans; also checked on a repetition.
            max_delta: The lender's delta for all jobs on these loans: a new account takes it, an older one is
                held at the lower of its own and this.

        Raises:
            BudgetSpentError: Committed, reserved and asked events together pass `epsilon_limit` for some loan.
            LedgerError: The id is taken by another job or a finished one, or nothing can be recorded.
            PrivacyParameterError: An argument has no meaning.
        """
        _check_names(job_id=job_id, snapshot=snapshot.digest)
        asked = _some(events)
        epsilon_rdp(asked, delta)  # refuses a delta without meaning
        with self._file.transaction():
            job = self._file.job(job_id)
            if job and (job[0].snapshot, job[0].events, job[0].delta) != (snapshot.digest, asked, delta):
                msg = f"job {job_id} is already reserved in {self._path} with other content; give this job its own id"
                raise LedgerError(msg)
            if is_over(job):
                msg = f"job {job_id} is over in {self._path}; give the new job its own id"
                raise LedgerError(msg)
            books = self._books(snapshot, without=job_id)
            account = books.account(asked, epsilon_limit, max_delta)
            budget = books.budget(account, asked, epsilon_limit, max_delta)
            if not budget.fits:
                raise BudgetSpentError(_refusal(job_id, snapshot, budget, self.spent(snapshot, max_delta)))
            if books.own_account is None:
                self._file.open_account(snapshot, account)
            if not job:
                self._file.append(
                    "reserve", job_id, snapshot.digest, asked, delta=delta, epsilon_limit=epsilon_limit
                )

    def commit(self, job_id: str, stage: str, events: Sequence[Event], release_digest: str) -> None:
        """Record that a stage's release is about to leave; a repetition with the same digest changes nothing.

        Args:
            job_id: A reserved job.
            stage: What leaves, "statistics", "bins", "round 7" or "evaluation 1"; each leaves once.
            events: What the release costs; at least one, out of the reservation.
            release_digest: Digest of the bytes that leave.

        Raises:
            LedgerError: The stage has left with other content, the events pass what the reservation still
                holds, the job is unknown or over, or nothing can be recorded: the release must not leave.
            PrivacyParameterError: An argument has no meaning.
        """
        _check_names(job_id=job_id, release_digest=release_digest)
        Stage.parse(stage)
        charged = _some(events)
        with self._file.transaction():
            job = self._file.job(job_id)
            if not job:
                msg = f"job {job_id} is not reserved in {self._path}; reserve it before anything leaves"
                raise LedgerError(msg)
            for entry in job:
                if entry.kind == "commit" and entry.stage == stage:
                    if (entry.release_digest, entry.events) == (release_digest, charged):
                        return
                    msg = (
                        f"stage {stage} of job {job_id} has already left as {entry.release_digest[:12]}; a second"
                        " release would be a second charge: send the first one again"
                    )
                    raise LedgerError(msg)
            if is_over(job):
                msg = f"job {job_id} is over, so stage {stage} may not leave; reserve a new job"
                raise LedgerError(msg)
            excess = count_events(charged) - left_of(job)
            if excess:
                msg = (
                    f"stage {stage} of job {job_id} releases more than is left of its reservation (too much:"
                    f" {_in_words(excess)}); reserve a new job with all its stages"
                )
                raise LedgerError(msg)
            self._file.append(
                "commit", job_id, job[0].snapshot, charged, stage=stage, release_digest=release_digest
            )

    def release(self, job_id: str) -> None:
        """Free what a finished or abandoned job reserved and did not commit.

        A job that holds nothing (released before, or never reserved) changes nothing.

        Raises:
            LedgerError: Nothing can be recorded.
        """
        with self._file.transaction():
            job = self._file.job(job_id)
            if job and not is_over(job):
                self._file.append("release", job_id, job[0].snapshot, ())

    def committed(self, job_id: str, stage: str) -> str | None:
        """Return the digest under which a stage has left, or None if it has not."""
        digests = {
            entry.stage: entry.release_digest for entry in self._file.job(job_id) if entry.kind == "commit"
        }
        return digests.get(stage)

    def spent(self, snapshot: Snapshot | str, delta: float) -> Spent:
        """Return what has left of a snapshot's loans, at `delta` in (0, 1); each figure of its worst loan.

        Args:
            snapshot: A digest in this ledger, or a snapshot that may be new to it. A digest whose loans are not
                recorded (version 1, or unknown) counts as holding every loan.
            delta: In (0, 1).

        Returns:
            Zero where none of these loans was ever used. `events` are those of the loan that is worst by RDP.
        """
        return worst(self._books(snapshot).per_loan(committed), delta)

    def reserved(self, snapshot: Snapshot | str, delta: float) -> Spent:
        """Return what open jobs still hold of a snapshot's loans beyond what they have committed, as `spent`."""
        return worst(self._books(snapshot).per_loan(not_committed), delta)

    def held(self, snapshot: Snapshot | str, delta: float) -> Spent:
        """Return what has left or is reserved of a snapshot's loans, as `spent`."""
        return worst(self._books(snapshot).per_loan(held), delta)

    def budget(
        self,
        snapshot: Snapshot | str,
        asked: Sequence[Event] = (),
        *,
        epsilon_limit: float,
        max_delta: float,
    ) -> Budget:
        """Return how the limit stands, and would stand with `asked`; nothing is recorded.

        Args:
            snapshot: As in `spent`.
            asked: A job that might be reserved; empty for none.
            epsilon_limit: The lender's limit.
            max_delta: The lender's delta.

        Raises:
            BudgetSpentError: The limit is too small to hold at any order.
            PrivacyParameterError: An argument has no meaning.
        """
        books, merged = self._books(snapshot), merge_events(asked)
        account = books.account(merged, epsilon_limit, max_delta)
        return books.budget(account, merged, epsilon_limit, max_delta)

    def history(self, snapshot: Snapshot | str, delta: float) -> tuple[Charge, ...]:
        """Return the releases that the loan with the largest spend gave, oldest first, with the running total.

        Where there are many, the PLD figure is that of some releases only, evenly spread and the last among them.
        """
        books = self._books(snapshot)
        worst = max(
            books.loans,
            key=lambda loan: epsilon_rdp(committed(books.entries_of(loan)), delta),
        )
        charges: list[Charge] = []
        total: tuple[Event, ...] = ()
        released = [entry for entry in books.entries_of(worst) if entry.kind == "commit"]
        every = math.ceil(len(released) / _MOST_PLDS)
        for left, entry in zip(range(len(released) - 1, -1, -1), released, strict=True):
            total = merge_events([*total, *entry.events])
            pld = epsilon_pld(total, delta) if left % every == 0 else None
            charges.append(Charge(entry, pld, epsilon_rdp(total, delta)))
        return tuple(charges)

    def account(self, snapshot: str) -> Account | None:
        """Return a snapshot's account; None before its first job, and for one that only version 1 recorded."""
        return self._file.accounts().get(snapshot)

    def entries(self, snapshot: str | None = None) -> tuple[Entry, ...]:
        """Return all entries, or those of jobs on one snapshot, oldest first."""
        return tuple(entry for entry in self._file.all_entries() if snapshot in {None, entry.snapshot})

    def snapshots(self) -> tuple[str, ...]:
        """Return the snapshots with entries, oldest first."""
        return tuple(dict.fromkeys(entry.snapshot for entry in self.entries()))

    def _books(self, snapshot: Snapshot | str, *, without: str = "") -> Books:
        digest = snapshot if isinstance(snapshot, str) else snapshot.digest
        entries = tuple(entry for entry in self._file.all_entries() if entry.job_id != without)
        names = [digest, *(entry.snapshot for entry in entries)]
        known = {name: self._file.snapshot(name) for name in dict.fromkeys(names)}
        if isinstance(snapshot, Snapshot):
            known[digest] = snapshot
        return Books(digest, entries, self._file.accounts(), memberships(digest, known))


def _check_names(**names: str) -> None:
    for setting, name in names.items():
        if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            msg = f"{setting} has {len(name)} characters; it must be a printable text of 1 to {_MAX_NAME}"
            raise PrivacyParameterError(msg)


def _some(events: Sequence[Event]) -> tuple[Event, ...]:
    merged = merge_events(events)
    if not merged:
        msg = "no events were given; a release without an event has no privacy to record: state what it costs"
        raise PrivacyParameterError(msg)
    return merged


def _refusal(job_id: str, snapshot: Snapshot, budget: Budget, spent: Spent) -> str:
    if not budget.capacity > 0.0:
        reason = budget.why_nothing(spent.epsilon_rdp, spent.epsilon_pld)
        return (
            f"job {job_id} asks for loans of data snapshot {snapshot.digest[:12]}, of which policy.{reason}; ask the"
            " data officer to raise it in bank.yaml, or leave this job out"
        )
    others = f", with {len(budget.others)} other snapshots that hold the same loans" if budget.others else ""
    taken = budget.share(budget.spent + budget.reserved)
    return (
        f"job {job_id} asks {budget.share(budget.asked):.1%} of what policy.epsilon_limit {budget.epsilon_limit:g}"
        f" admits for a loan of data snapshot {snapshot.digest[:12]}, and {taken:.1%}"
        f" is spent or reserved{others}; the total ε={budget.epsilon:.4g} (RDP of order {budget.account.order:g},"
        f" δ={budget.account.delta:g}, one loan added or removed) passes the limit; ask the data officer to raise"
        " policy.epsilon_limit in bank.yaml, or leave this job out"
    )


def _in_words(counts: Counter[Event]) -> str:
    return ", ".join(
        f"{count} of noise_multiplier {kind.noise_multiplier:.4g} at sample_rate {kind.sample_rate:g}"
        for kind, count in counts.items()
    )

"""The lender's privacy ledger: what was promised and what has left, for each data snapshot.

A job is reserved whole before anything leaves, each stage is committed before its release leaves, and what a
finished job did not use is freed. Every method is one transaction that is on the disk when it returns, so a
crash neither forgets a release nor charges it twice. Whatever cannot be recorded or read stops the work
(`privacy/ledger_file.py`).

The limit is held by a Renyi filter (`privacy/filter.py`) for every loan of the snapshot a job asks for: what
counts is all that left, or is reserved, of every snapshot that holds the loan (`privacy/overlap.py`). Figures are
those of the loan that has given most.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from fedfin.errors import BudgetSpentError, LedgerError, PrivacyParameterError
from fedfin.privacy.accounting import epsilon_pld, epsilon_rdp
from fedfin.privacy.events import Event, Gap, GaussianEvent, gap_of, merge_events
from fedfin.privacy.filter import Account, capacity, divergence, filter_epsilon, open_account
from fedfin.privacy.ledger_file import Entry, LedgerFile, Stage
from fedfin.privacy.overlap import memberships
from fedfin.privacy.snapshot import Snapshot

__all__ = ["Budget", "Charge", "Entry", "Ledger", "Spent"]

_EventsOf: TypeAlias = Callable[[tuple[Entry, ...]], list[Event]]

_MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Spent:
    """Events of one loan and what they cost together; the neighbours differ by one loan added or removed."""

    epsilon_pld: float  # the tighter figure, for people
    epsilon_rdp: float  # the least over all Renyi orders
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Charge:
    """One release of what a snapshot's loans have given, and what they had given in all after it."""

    entry: Entry
    epsilon_pld: float
    epsilon_rdp: float


@dataclass(frozen=True, slots=True)
class Budget:
    """How the limit stands for the loan of a snapshot that has the least left.

    Divergences are of the account's Renyi order; they add up, so shares of `capacity` do too.
    """

    account: Account  # its delta is the lower of the account's own and the lender's present one
    epsilon_limit: float
    capacity: float  # what the limit admits; 0 or below: nothing
    spent: float
    reserved: float
    asked: float
    gap: Gap  # what noise in shares adds to epsilon, of all of these
    others: tuple[str, ...]  # other snapshots that hold loans of this one and count here; digests

    @property
    def left(self) -> float:
        """What neither was spent, nor is reserved, nor asked; below 0 where that passes the limit."""
        return self.capacity - self.spent - self.reserved - self.asked

    @property
    def epsilon(self) -> float:
        """What is spent, reserved and asked, as the filter's epsilon: the job fits up to `epsilon_limit`."""
        return filter_epsilon(self.account, self.spent + self.reserved + self.asked, self.gap)

    @property
    def fits(self) -> bool:
        """Whether the limit admits what is asked."""
        return self.epsilon <= self.epsilon_limit

    def share(self, spent: float) -> float:
        """Return a divergence as a share of the capacity; above 1 (inf) where nothing may be spent."""
        return spent / self.capacity if self.capacity > 0.0 else float("inf")


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
            if _is_over(job):
                msg = f"job {job_id} is over in {self._path}; give the new job its own id"
                raise LedgerError(msg)
            books = self._books(snapshot, without=job_id)
            account = books.account(asked, epsilon_limit, max_delta)
            budget = books.budget(account, asked, epsilon_limit, max_delta)
            if not budget.fits:
                raise BudgetSpentError(_refusal(job_id, snapshot, budget))
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
            stage: What leaves, "statistics", "bins", "round 7" or "evaluation"; each leaves once.
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
            if _is_over(job):
                msg = f"job {job_id} is over, so stage {stage} may not leave; reserve a new job"
                raise LedgerError(msg)
            excess = _count(charged) - _left(job)
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
            if job and not _is_over(job):
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
        return _worst(self._books(snapshot).per_loan(_committed), delta)

    def reserved(self, snapshot: Snapshot | str, delta: float) -> Spent:
        """Return what open jobs still hold of a snapshot's loans beyond what they have committed, as `spent`."""
        return _worst(self._books(snapshot).per_loan(_uncommitted), delta)

    def held(self, snapshot: Snapshot | str, delta: float) -> Spent:
        """Return what has left or is reserved of a snapshot's loans, as `spent`."""
        return _worst(self._books(snapshot).per_loan(_held), delta)

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
        """Return the releases that the loan with the largest spend gave, oldest first, with the running total."""
        books = self._books(snapshot)
        worst = max(
            books.loans,
            key=lambda loan: epsilon_rdp(_committed(books.entries_of(loan)), delta),
        )
        charges: list[Charge] = []
        total: tuple[Event, ...] = ()
        for entry in books.entries_of(worst):
            if entry.kind == "commit":
                total = merge_events([*total, *entry.events])
                charges.append(Charge(entry, epsilon_pld(total, delta), epsilon_rdp(total, delta)))
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

    def _books(self, snapshot: Snapshot | str, *, without: str = "") -> "_Books":
        digest = snapshot if isinstance(snapshot, str) else snapshot.digest
        entries = tuple(entry for entry in self._file.all_entries() if entry.job_id != without)
        names = [digest, *(entry.snapshot for entry in entries)]
        known = {name: self._file.snapshot(name) for name in dict.fromkeys(names)}
        if isinstance(snapshot, Snapshot):
            known[digest] = snapshot
        return _Books(digest, entries, self._file.accounts(), memberships(digest, known))


@dataclass(frozen=True, slots=True)
class _Books:
    """All that is recorded, seen from one snapshot."""

    snapshot: str
    entries: tuple[Entry, ...]
    accounts: Mapping[str, Account]  # oldest first
    loans: tuple[frozenset[str], ...]  # the snapshots that each kind of this snapshot's loans are in

    @property
    def own_account(self) -> Account | None:
        return self.accounts.get(self.snapshot)

    @property
    def overlapping(self) -> frozenset[str]:
        return frozenset().union(*self.loans) - {self.snapshot}

    def entries_of(self, loan: frozenset[str]) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.snapshot in loan)

    def per_loan(self, events_of: _EventsOf) -> set[tuple[Event, ...]]:
        return {merge_events(events_of(self.entries_of(loan))) for loan in self.loans}

    def account(self, asked: tuple[Event, ...], epsilon_limit: float, max_delta: float) -> Account:
        """Return the snapshot's account: its own, that of the oldest snapshot it meets, or a new one.

        The order of a new one depends on the first job alone, which was known before anything left.
        """
        if not epsilon_limit > 0.0:
            msg = f"policy.epsilon_limit is {epsilon_limit}; it must be above 0"
            raise PrivacyParameterError(msg)
        met = {self.snapshot, *self.overlapping}
        for account in (self.own_account, *(self.accounts[name] for name in self.accounts if name in met)):
            if account is not None:
                return account
        # only entries of version 1 are older than the account of their snapshot
        first = (entry.events for entry in self.entries if entry.kind == "reserve" and entry.snapshot in met)
        return open_account(next(first, asked) or (GaussianEvent(1.0),), epsilon_limit, max_delta)

    def budget(
        self, account: Account, asked: tuple[Event, ...], epsilon_limit: float, max_delta: float
    ) -> Budget:
        """Return the budget of the loan with the least left, at each of the accounts it is held to."""
        budgets: list[Budget] = []
        for loan in self.loans:
            entries = self.entries_of(loan)
            accounts = {account, *(self.accounts[name] for name in loan if name in self.accounts)}
            for own in accounts:
                held = replace(own, delta=min(own.delta, max_delta))
                gap = gap_of([*_held(entries), *asked])
                budgets.append(
                    Budget(
                        account=held,
                        epsilon_limit=epsilon_limit,
                        capacity=capacity(held, epsilon_limit, gap),
                        spent=divergence(_committed(entries), own.order),
                        reserved=divergence(_uncommitted(entries), own.order),
                        asked=divergence(asked, own.order),
                        gap=gap,
                        others=tuple(
                            dict.fromkeys(e.snapshot for e in entries if e.snapshot != self.snapshot)
                        ),
                    )
                )
        return min(budgets, key=lambda budget: (budget.fits, -budget.share(budget.capacity - budget.left)))


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


def _by_job(entries: Iterable[Entry]) -> list[tuple[Entry, ...]]:
    jobs: dict[str, list[Entry]] = {}
    for entry in entries:
        jobs.setdefault(entry.job_id, []).append(entry)
    return [tuple(job) for job in jobs.values()]


def _is_over(job: Sequence[Entry]) -> bool:
    return any(entry.kind == "release" for entry in job)


def _count(events: Iterable[Event]) -> Counter[Event]:
    counts: Counter[Event] = Counter()
    for event in events:
        counts[replace(event, count=1)] += event.count
    return counts


def _left(job: Sequence[Entry]) -> Counter[Event]:
    """Return what a job's reservation holds beyond its commitments."""
    return _count(job[0].events) - _count(_committed(job))


def _committed(entries: Iterable[Entry]) -> list[Event]:
    return [event for entry in entries if entry.kind == "commit" for event in entry.events]


def _uncommitted(entries: Iterable[Entry]) -> list[Event]:
    """Return what open jobs hold beyond what they have committed."""
    return [
        replace(kind, count=count)
        for job in _by_job(entries)
        if not _is_over(job)
        for kind, count in _left(job).items()
    ]


def _held(entries: tuple[Entry, ...]) -> list[Event]:
    """Return what counts against the limit: an open job whole, a finished one as far as it committed."""
    return [*_committed(entries), *_uncommitted(entries)]


def _worst(spends: Iterable[tuple[Event, ...]], delta: float) -> Spent:
    figures = [Spent(epsilon_pld(events, delta), epsilon_rdp(events, delta), events) for events in spends]
    worst = max(figures, key=lambda spent: spent.epsilon_rdp)
    return replace(worst, epsilon_pld=max(spent.epsilon_pld for spent in figures))


def _refusal(job_id: str, snapshot: Snapshot, budget: Budget) -> str:
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

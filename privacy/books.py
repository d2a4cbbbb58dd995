"""All that a ledger holds, seen from one data snapshot: what its loans have given, and what they may still give.

Pure arithmetic over the ledger's entries. What counts for a loan is all that left, or is reserved, of every snapshot
that holds it; figures are those of the loan that has given most, or has the least left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.accounting import epsilon_pld, epsilon_rdp
from fedfin.privacy.events import Event, Gap, GaussianEvent, count_events, gap_of, merge_events
from fedfin.privacy.filter import Account, capacity, divergence, filter_epsilon, least_limit, open_account
from fedfin.privacy.ledger_file import Entry

__all__ = [
    "Books",
    "Budget",
    "Spent",
    "committed",
    "held",
    "is_over",
    "left_of",
    "not_committed",
    "worst",
]

_EventsOf: TypeAlias = Callable[[tuple[Entry, ...]], list[Event]]


@dataclass(frozen=True, slots=True)
class Spent:
    """Events of one loan and what they cost together; the neighbours differ by one loan added or removed."""

    epsilon_pld: float  # the tighter figure, for people
    epsilon_rdp: float  # the least over all Renyi orders
    events: tuple[Event, ...]


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
    def least_limit(self) -> float:
        """The epsilon at or below which a limit would admit nothing at the account's order."""
        return least_limit(self.account, self.gap)

    @property
    def fits(self) -> bool:
        """Whether the limit admits what is asked."""
        return self.epsilon <= self.epsilon_limit

    def why_nothing(self, spent_rdp: float, spent_pld: float) -> str:
        """Say why the limit admits nothing at the account's order: it was higher when the account was opened.

        Only where `capacity` is 0 or below; the arguments are the epsilon of what has left, by RDP and by PLD.
        """
        text = (
            f"epsilon_limit {self.epsilon_limit:g} admits nothing: these loans' account is held at Renyi order"
            f" {self.account.order:g} since their first job, and at this order and delta {self.account.delta:g} a"
            f" limit below about {self.least_limit:.4g} admits nothing"
        )
        if not spent_rdp > 0.0:
            return text
        over = ", over the limit" if spent_rdp > self.epsilon_limit else ""
        return f"{text}; epsilon {spent_rdp:.3f} by RDP ({spent_pld:.3f} by PLD) is spent already{over}"

    def share(self, spent: float) -> float:
        """Return a divergence as a share of the capacity; above 1 (inf) where nothing may be spent."""
        return spent / self.capacity if self.capacity > 0.0 else float("inf")


@dataclass(frozen=True, slots=True)
class Books:
    """All that is recorded, seen from one snapshot."""

    snapshot: str
    entries: tuple[Entry, ...]
    accounts: Mapping[str, Account]  # oldest first
    loans: tuple[frozenset[str], ...]  # the snapshots that each kind of this snapshot's loans are in

    @property
    def own_account(self) -> Account | None:
        """The snapshot's account, if it was opened."""
        return self.accounts.get(self.snapshot)

    @property
    def overlapping(self) -> frozenset[str]:
        """The other snapshots that hold loans of this one."""
        return frozenset().union(*self.loans) - {self.snapshot}

    def entries_of(self, loan: frozenset[str]) -> tuple[Entry, ...]:
        """Return the entries that count for loans which are in these snapshots, oldest first."""
        return tuple(entry for entry in self.entries if entry.snapshot in loan)

    def per_loan(self, events_of: _EventsOf) -> set[tuple[Event, ...]]:
        """Return the merged events of each kind of loan, as `committed`, `not_committed` or `held` picks them."""
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
                now = replace(own, delta=min(own.delta, max_delta))
                gap = gap_of([*held(entries), *asked])
                budgets.append(
                    Budget(
                        account=now,
                        epsilon_limit=epsilon_limit,
                        capacity=capacity(now, epsilon_limit, gap),
                        spent=divergence(committed(entries), own.order),
                        reserved=divergence(not_committed(entries), own.order),
                        asked=divergence(asked, own.order),
                        gap=gap,
                        others=tuple(
                            dict.fromkeys(e.snapshot for e in entries if e.snapshot != self.snapshot)
                        ),
                    )
                )
        return min(budgets, key=lambda budget: (budget.fits, -budget.share(budget.capacity - budget.left)))


def _by_job(entries: Iterable[Entry]) -> list[tuple[Entry, ...]]:
    jobs: dict[str, list[Entry]] = {}
    for entry in entries:
        jobs.setdefault(entry.job_id, []).append(entry)
    return [tuple(job) for job in jobs.values()]


def is_over(job: Sequence[Entry]) -> bool:
    """Tell whether a job's entries end with its release."""
    return any(entry.kind == "release" for entry in job)


def left_of(job: Sequence[Entry]) -> Counter[Event]:
    """Return what a job's reservation holds beyond its commitments."""
    return count_events(job[0].events) - count_events(committed(job))


def committed(entries: Iterable[Entry]) -> list[Event]:
    """Return what has left."""
    return [event for entry in entries if entry.kind == "commit" for event in entry.events]


def not_committed(entries: Iterable[Entry]) -> list[Event]:
    """Return what open jobs hold beyond what they have committed."""
    return [
        replace(kind, count=count)
        for job in _by_job(entries)
        if not is_over(job)
        for kind, count in left_of(job).items()
    ]


def held(entries: tuple[Entry, ...]) -> list[Event]:
    """Return what counts against the limit: an open job whole, a finished one as far as it committed."""
    return [*committed(entries), *not_committed(entries)]


def worst(spends: Iterable[tuple[Event, ...]], delta: float) -> Spent:
    """Return the largest of each figure over kinds of loans, with the events of the one that RDP puts first."""
    figures = [Spent(epsilon_pld(events, delta), epsilon_rdp(events, delta), events) for events in spends]
    first = max(figures, key=lambda spent: spent.epsilon_rdp)
    return replace(first, epsilon_pld=max(spent.epsilon_pld for spent in figures))

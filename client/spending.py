"""What a lender's loans have given away, release by release, read from its ledger; nothing is recorded or sent."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fedfin.client.budgeting import Epsilon, budget_to_json
from fedfin.client.folder import LenderFolder
from fedfin.errors import ConfigError
from fedfin.privacy.accounting import borrower_epsilons
from fedfin.privacy.evaluation_noise import is_evaluation_job
from fedfin.privacy.filter import divergence
from fedfin.privacy.ledger import Budget, Charge, Ledger

__all__ = ["JobShare", "Spending", "choose", "is_held_out", "open_ledger", "spendings_of", "to_json"]


@dataclass(frozen=True, slots=True)
class JobShare:
    """One job's part of what the limit admits, in what a snapshot's loans have given."""

    job_id: str
    is_inherited: bool  # it ran on another snapshot that holds some of these loans
    share: float  # of the capacity; shares add up


@dataclass(frozen=True, slots=True)
class Spending:
    """What the loans of one snapshot have given, at the lender's delta, for tables that differ by one loan.

    Attributes:
        snapshot: Digest.
        held_out: Whether its own jobs are evaluations: these loans judge, and train nothing under this digest.
        delta: At which epsilons are given.
        spent: What has left.
        reserved: What open jobs still hold.
        held: Both together.
        borrower: PLD epsilon of what has left, for a borrower whose other lenders spent as much: 1, 2 and 3 of them.
        budget: How the filter stands.
        jobs: Shares of the limit, in the order of the jobs' first releases.
        charges: Every release, oldest first, with the epsilon of all up to it.
    """

    snapshot: str
    held_out: bool
    delta: float
    spent: Epsilon
    reserved: Epsilon
    held: Epsilon
    borrower: tuple[float, float, float]
    budget: Budget
    jobs: tuple[JobShare, ...]
    charges: tuple[Charge, ...]

    def is_inherited(self, charge: Charge) -> bool:
        """Tell whether a release was made of another snapshot that holds some of these loans."""
        return charge.entry.snapshot != self.snapshot


@contextmanager
def open_ledger(folder: LenderFolder) -> Generator[Ledger | None]:
    """Open the lender's ledger if there is one: looking makes none."""
    if not folder.has_ledger():
        yield None
        return
    with folder.ledger() as ledger:
        yield ledger


def choose(known: Sequence[str], prefix: str | None) -> tuple[str, ...]:
    """Return the snapshots that a prefix of a digest names, or all of them without one.

    Raises:
        ConfigError: The prefix is empty, names none, or more than one.
    """
    if prefix is None:
        return tuple(known)
    found = [snapshot for snapshot in known if snapshot.startswith(prefix.lower())]
    if prefix and len(found) == 1:
        return tuple(found)
    wrong = "names more than one snapshot" if found else "names no snapshot of the ledger"
    if not prefix:
        wrong = "is empty"
    listed = ", ".join(snapshot[:12] for snapshot in known) or "none"
    msg = f"--snapshot {prefix!r} {wrong}; give the first digits of one of: {listed}"
    raise ConfigError(msg)


def is_held_out(ledger: Ledger, snapshot: str) -> bool:
    """Tell whether a snapshot is one of held-out loans: all jobs that asked for it are evaluations."""
    entries = ledger.entries(snapshot)
    return bool(entries) and all(is_evaluation_job(entry.job_id) for entry in entries)


def spendings_of(ledger: Ledger, folder: LenderFolder, prefix: str | None = None) -> tuple[Spending, ...]:
    """Return what each snapshot's loans have given, the oldest snapshot first.

    Args:
        ledger: The lender's.
        folder: Its policy states limit and delta.
        prefix: First digits of the one snapshot that is wanted; None for all.

    Raises:
        ConfigError: The prefix names no snapshot, or several.
        LedgerError: The ledger cannot be read.
    """
    policy = folder.config.policy
    return tuple(
        _spending_of(ledger, snapshot, policy.epsilon_limit, policy.max_delta)
        for snapshot in choose(ledger.snapshots(), prefix)
    )


def to_json(spending: Spending) -> dict[str, Any]:
    """Return a snapshot's part of the document of `fedfin privacy ledger --json`."""
    budget = spending.budget
    return {
        "snapshot": spending.snapshot,
        "held_out": spending.held_out,
        "relation": "add_or_remove_one",
        "delta": spending.delta,
        "spent": asdict(spending.spent),
        "reserved": asdict(spending.reserved),
        "held": asdict(spending.held),
        "borrower_pld": list(spending.borrower),
        "filter": budget_to_json(budget),
        "others": list(budget.others),
        "jobs": [asdict(job) for job in spending.jobs],
        "releases": [
            {
                "utc": charge.entry.utc,
                "job": charge.entry.job_id,
                "stage": charge.entry.stage,
                "snapshot": charge.entry.snapshot,
                "inherited": spending.is_inherited(charge),
                "events": [
                    {
                        "mechanism": event.mechanism,
                        "sampler": event.sampler,
                        "noise_multiplier": event.noise_multiplier,
                        "sample_rate": event.sample_rate,
                        "count": event.count,
                    }
                    for event in charge.entry.events
                ],
                "digest": charge.entry.release_digest,
                "epsilon_rdp": charge.epsilon_rdp,
                "epsilon_pld": charge.epsilon_pld,
            }
            for charge in spending.charges
        ],
    }


def _spending_of(ledger: Ledger, snapshot: str, epsilon_limit: float, delta: float) -> Spending:
    spent, reserved = ledger.spent(snapshot, delta), ledger.reserved(snapshot, delta)
    held = ledger.held(snapshot, delta)
    budget = ledger.budget(snapshot, epsilon_limit=epsilon_limit, max_delta=delta)
    charges = ledger.history(snapshot, delta)
    by_job: dict[tuple[str, bool], list[Charge]] = {}
    for charge in charges:
        by_job.setdefault((charge.entry.job_id, charge.entry.snapshot != snapshot), []).append(charge)
    return Spending(
        snapshot=snapshot,
        held_out=is_held_out(ledger, snapshot),
        delta=delta,
        spent=Epsilon(spent.epsilon_rdp, spent.epsilon_pld),
        reserved=Epsilon(reserved.epsilon_rdp, reserved.epsilon_pld),
        held=Epsilon(held.epsilon_rdp, held.epsilon_pld),
        borrower=borrower_epsilons(spent.events, delta),
        budget=budget,
        jobs=tuple(
            JobShare(job_id, inherited, budget.share(_divergence(own, budget)))
            for (job_id, inherited), own in by_job.items()
        ),
        charges=charges,
    )


def _divergence(charges: Sequence[Charge], budget: Budget) -> float:
    return divergence([event for charge in charges for event in charge.entry.events], budget.account.order)

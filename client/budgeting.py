"""What a job would cost, before anything is spent: noise, epsilon, and whether this lender would accept it.

Nothing here looks at a loan or changes a ledger. Every epsilon is for tables that differ by one loan added or
removed, at the plan's delta, unless it says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedfin.client.policy import breaches, schema_breaches
from fedfin.config import LenderPolicy
from fedfin.credit.schema import Schema
from fedfin.errors import BudgetSpentError, PrivacyParameterError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import (
    CalibratedNoise,
    Event,
    GaussianEvent,
    borrower_epsilons,
    calibrate,
    epsilon_pld,
    epsilon_rdp,
    job_events,
)
from fedfin.privacy.ledger import Budget, Ledger
from fedfin.privacy.snapshot import Snapshot

__all__ = [
    "Epsilon",
    "JobCost",
    "Standing",
    "budget_to_json",
    "cost_of",
    "epsilon_of",
    "refusals",
    "standing",
]


@dataclass(frozen=True, slots=True)
class Epsilon:
    """One cost in both figures."""

    rdp: float  # the least over all Renyi orders: what plans are calibrated to
    pld: float  # tighter, for people


@dataclass(frozen=True, slots=True)
class JobCost:
    """What one lender's part in a whole job costs.

    Attributes:
        events: The histogram for the bins and all steps.
        noise: Noise multipliers of both.
        num_steps: Noisy steps in the whole job.
        job: The whole job.
        bins: The histogram, if nothing else left.
        round_alone: One round, if nothing else left.
        round_average: A round's mean share of the job: job less bins, over the rounds.
        round_last: What the last round adds to all that came before.
        borrower: PLD epsilon of a borrower known to 1, 2 and 3 lenders that all take part.
    """

    events: tuple[Event, ...]
    noise: CalibratedNoise
    num_steps: int
    job: Epsilon
    bins: Epsilon
    round_alone: Epsilon
    round_average: Epsilon
    round_last: Epsilon
    borrower: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Standing:
    """A lender's budget for its present loans, as it is and as it would be after a job.

    Attributes:
        snapshot: Digest of the present training loans.
        delta: The lender's own, `policy.max_delta`, at which the epsilons here are given.
        is_known: Whether a job was ever reserved on exactly these loans.
        spent: What has left of these loans, of other snapshots that hold them too.
        reserved: What open jobs still hold.
        after: Spent, reserved and the planned job together.
        budget: How the filter stands with the planned job; None where the limit holds at no order.
    """

    snapshot: str
    delta: float
    is_known: bool
    spent: Epsilon
    reserved: Epsilon
    after: Epsilon
    budget: Budget | None


def cost_of(plan: JobPlan) -> JobCost:
    """Return what a job costs each lender; the same for all of them, whatever their number of loans.

    Raises:
        PrivacyParameterError: The plan's mode is not local, or no noise meets its epsilon.
    """
    if plan.privacy.mode != "local":
        msg = (
            f"privacy.mode is {plan.privacy.mode}; a lender can plan its own budget for mode local only: set"
            " privacy.mode to local"
        )
        raise PrivacyParameterError(msg)
    training, delta, rounds = plan.training, plan.privacy.delta, plan.training.rounds
    noise = calibrate(plan.privacy, sample_rate=training.sample_rate, num_steps=plan.num_steps)
    events = job_events(noise, training.sample_rate, plan.num_steps)
    histogram = GaussianEvent(noise.bins_noise_multiplier)

    def steps_of(num_rounds: int) -> list[Event]:
        count = num_rounds * training.local_steps
        return [GaussianEvent(noise.training_noise_multiplier, training.sample_rate, count)] if count else []

    job, bins = epsilon_of(events, delta), epsilon_of([histogram], delta)
    before_last = epsilon_of([histogram, *steps_of(rounds - 1)], delta)
    return JobCost(
        events=events,
        noise=noise,
        num_steps=plan.num_steps,
        job=job,
        bins=bins,
        round_alone=epsilon_of(steps_of(1), delta),
        round_average=Epsilon((job.rdp - bins.rdp) / rounds, (job.pld - bins.pld) / rounds),
        round_last=Epsilon(job.rdp - before_last.rdp, job.pld - before_last.pld),
        borrower=borrower_epsilons(events, delta),
    )


def standing(ledger: Ledger | None, snapshot: Snapshot, cost: JobCost, policy: LenderPolicy) -> Standing:
    """Return the lender's budget now and after a job; at the lender's own delta, and nothing is recorded.

    Args:
        ledger: The lender's, or None where there is none yet.
        snapshot: Its present training loans, which may be new to the ledger.
        cost: The planned job.
        policy: States limit and delta.
    """
    if ledger is None:
        with TemporaryDirectory() as directory, Ledger(Path(directory) / "ledger.db") as empty:
            return standing(empty, snapshot, cost, policy)
    limit, delta = policy.epsilon_limit, policy.max_delta
    spent, reserved = ledger.spent(snapshot, delta), ledger.reserved(snapshot, delta)
    held = ledger.held(snapshot, delta)
    try:
        budget = ledger.budget(snapshot, cost.events, epsilon_limit=limit, max_delta=delta)
    except BudgetSpentError:
        budget = None
    return Standing(
        snapshot=snapshot.digest,
        delta=delta,
        is_known=snapshot.digest in ledger.snapshots(),
        spent=Epsilon(spent.epsilon_rdp, spent.epsilon_pld),
        reserved=Epsilon(reserved.epsilon_rdp, reserved.epsilon_pld),
        after=epsilon_of([*held.events, *cost.events], delta),
        budget=budget,
    )


def refusals(plan: JobPlan, policy: LenderPolicy, now: Standing, schema: Schema) -> tuple[str, ...]:
    """Return why this lender would refuse the job, one sentence for each reason; none where it would accept.

    Args:
        plan: The job.
        policy: The lender's.
        now: From `standing`.
        schema: The federation's.
    """
    found = [breach.reason for breach in (*breaches(plan, policy), *schema_breaches(plan, schema, policy))]
    budget = now.budget
    if budget is None:
        found.append(
            f"policy.epsilon_limit {policy.epsilon_limit:g} at policy.max_delta {policy.max_delta:g} leaves no room"
            " for any release; ask the data officer to raise it"
        )
    elif not budget.capacity > 0.0:
        found.append(
            f"policy.{budget.why_nothing(now.spent.rdp, now.spent.pld)}; ask the data officer to raise it"
        )
    elif not budget.fits:
        before = budget.share(budget.spent + budget.reserved)
        found.append(
            f"the job asks {budget.share(budget.asked):.1%} of what policy.epsilon_limit {policy.epsilon_limit:g}"
            f" admits, and {max(0.0, 1 - before):.1%} is left; lower --epsilon, or ask the data officer to raise the"
            " limit"
        )
    return tuple(found)


def budget_to_json(budget: Budget) -> dict[str, Any]:
    """Return how the limit stands, for the documents of `plan`, `ledger` and `status`; shares are of the limit."""
    return {
        "order": budget.account.order,
        "delta": budget.account.delta,
        "epsilon": budget.epsilon,
        "epsilon_limit": budget.epsilon_limit,
        "fits": budget.fits,
        "share_spent": budget.share(budget.spent),
        "share_reserved": budget.share(budget.reserved),
        "share_asked": budget.share(budget.asked),
        "share_left": budget.share(budget.left),
        "others": list(budget.others),
    }


def epsilon_of(events: Sequence[Event], delta: float) -> Epsilon:
    """Return what events cost at `delta`, in both figures."""
    return Epsilon(epsilon_rdp(events, delta), epsilon_pld(events, delta))

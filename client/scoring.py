"""What a lender releases of a model's quality: counts of its held-out loans, under its own noise where the mode asks.

Nothing here is a figure of merit: AUROC and the like are made by the coordinator, of the sum over all lenders.

Held-out loans have an account of their own in the ledger. They train nothing, so that a job's evaluations may take the
plan's whole epsilon of them, and the lender's limit holds for them as for the others. Where the limit leaves no room
for the evaluations, the lender trains all the same and declines them from the start: what it has spent depends on
earlier jobs, which the coordinator knows, and not on how a loan scores.

A lender whose held-out loans lack an outcome, or a group, counts what it has. Only the sum needs both outcomes, and to
decline would tell without noise what the counts say under noise.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from fedfin.client.costs import covering
from fedfin.client.preparation import CountedLoans, PreparedLoans
from fedfin.config import LenderPolicy
from fedfin.credit.binning import Bins, encode
from fedfin.credit.models import Architecture, encoding_of, predict
from fedfin.credit.schema import Schema
from fedfin.credit.score_counts import count_scores, evaluation_cells, evaluation_sensitivity
from fedfin.errors import BudgetSpentError, DataError, PolicyRefusalError, PrivacyParameterError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import epsilon_rdp
from fedfin.privacy.evaluation_noise import evaluation_event, evaluation_job, evaluation_scheme
from fedfin.privacy.events import Event
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.noise import NoiseSource
from fedfin.privacy.shares import ShareScheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "evaluation_counts",
    "event_of_evaluation",
    "noisy_evaluation",
    "reserve_evaluations",
    "scheme_of_evaluation",
]


def reserve_evaluations(
    ledger: Ledger,
    job_id: str,
    plan: JobPlan,
    loans: PreparedLoans,
    policy: LenderPolicy,
    num_members: int,
) -> CountedLoans:
    """Reserve all evaluations of a job on the held-out loans, where the mode has a budget; return the loans to count.

    Args:
        ledger: The lender's.
        job_id: The job; its evaluations stand under `evaluation_job(job_id)`.
        plan: With an evaluation at least.
        loans: The lender's.
        policy: States limit and delta, and whether its loans may be counted at all.
        num_members: Members of the roster, for mode shared.

    Raises:
        BudgetSpentError: The limit leaves no room on the held-out loans: the lender declines the evaluations.
        PolicyRefusalError: The policy keeps held-out loans out of evaluations: likewise.
        DataError: All held-out loans train as well, so that none may judge: likewise.
        LedgerError: Nothing can be recorded.
    """
    if not policy.allow_evaluations:
        msg = "this lender's policy.allow_evaluations is false"
        raise PolicyRefusalError(msg)
    if loans.counted is None:
        msg = (
            "every held-out loan is among the training loans too, so that none can judge the model; give loans that do"
            " not train in holdout.source of bank.yaml"
        )
        raise DataError(msg)
    if plan.privacy.mode == "none":
        return loans.counted
    event = event_of_evaluation(plan, loans.schema, num_members)
    try:
        ledger.reserve(
            evaluation_job(job_id),
            loans.counted.snapshot,
            (replace(event, count=plan.evaluation.times),),
            delta=plan.privacy.delta,
            epsilon_limit=policy.epsilon_limit,
            max_delta=policy.max_delta,
        )
    except BudgetSpentError as error:
        if loans.counted.snapshot.scheme == loans.snapshot.scheme:
            raise
        msg = (
            f"{error}. The held-out loans are known in another way than the training loans, so that each counts as one"
            " of them: give holdout.source the same loan_id, or without one the same columns, values and missing"
        )
        raise BudgetSpentError(msg) from error
    return loans.counted


def event_of_evaluation(plan: JobPlan, schema: Schema, num_members: int) -> Event:
    """Return what one evaluation costs a held-out loan, modes local and shared.

    Args:
        plan: With an evaluation at least.
        schema: The federation's.
        num_members: Members of the roster: in mode shared the sum of any cohort of them costs no more than this.

    Raises:
        PrivacyParameterError: The mode is none, or no noise meets the plan for every size of cohort.
    """
    if plan.privacy.mode != "shared":
        return evaluation_event(plan)
    cohorts = range(plan.cohort.min_lenders, num_members + 1)
    event = covering(scheme_of_evaluation(plan, schema, num_lenders) for num_lenders in cohorts)
    epsilon = epsilon_rdp([replace(event, count=plan.evaluation.times)], plan.privacy.delta)
    if epsilon > plan.privacy.epsilon:
        msg = (
            f"evaluations of any {plan.cohort.min_lenders} to {num_members} lenders may cost epsilon {epsilon:g}, and"
            f" privacy.epsilon is {plan.privacy.epsilon:g}; lower evaluation.times, or raise cohort.min_lenders"
        )
        raise PrivacyParameterError(msg)
    return event


def scheme_of_evaluation(plan: JobPlan, schema: Schema, num_lenders: int) -> ShareScheme:
    """Return how this lender rounds its counts and adds its share of the noise, for mode shared.

    Raises:
        PrivacyParameterError: As `privacy.evaluation_noise.evaluation_scheme`.
    """
    return evaluation_scheme(
        plan,
        num_lenders=num_lenders,
        num_cells=evaluation_cells(schema),
        sensitivity=evaluation_sensitivity(schema),
    )


def evaluation_counts(
    architecture: Architecture,
    weights: "NDArray[np.float32]",
    bins: Bins,
    counted: CountedLoans,
    schema: Schema,
    cutoff: float,
) -> "NDArray[np.int64]":
    """Return the counts of held-out loans by outcome, score and protected group; whole numbers, nothing else.

    Args:
        architecture: The model's.
        weights: Its flat vector, shape (d,), checked by the caller.
        bins: The job's.
        counted: The loans; not changed.
        schema: The columns.
        cutoff: The plan's `evaluation.cutoff`.

    Returns:
        Shape (evaluation_cells(schema),).
    """
    loans = counted.loans
    inputs = encode(loans.frame, schema, bins, encoding_of(architecture.kind))
    return count_scores(loans.frame, loans.labels, predict(architecture, weights, inputs), schema, cutoff)


def noisy_evaluation(
    counts: "NDArray[np.int64]", schema: Schema, noise_multiplier: float, noise: NoiseSource
) -> "NDArray[np.float64]":
    """Return the counts plus Gaussian noise, for mode local; shape as `counts`, which are not changed.

    Args:
        counts: From `evaluation_counts`.
        schema: The columns: they say what one loan moves.
        noise_multiplier: Standard deviation over the counts' L2 sensitivity to one loan; > 0.
        noise: The lender's own.
    """
    return counts + noise.normal(counts.shape, noise_multiplier * evaluation_sensitivity(schema))

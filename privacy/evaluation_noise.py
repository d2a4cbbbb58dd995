"""The noise of a job's evaluations, which count held-out loans and no others.

Held-out loans train nothing, and a loan is on one side of the split whatever the other loans are: so what the training
releases and what the evaluations release are of disjoint loans, and each loan has the plan's epsilon for itself
(parallel composition: McSherry, "Privacy Integrated Queries", SIGMOD 2009, theorem 4). All of it goes into the
`evaluation.times` releases of the job. A loan that was on the other side in an earlier job brings that job's spend
along: the ledger sees it by the loan's digest (`privacy/overlap.py`).
"""

from typing import Final

from fedfin.errors import PrivacyParameterError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import GaussianEvent, calibrate_releases, epsilon_rdp
from fedfin.privacy.events import gap_of
from fedfin.privacy.shared_events import shared_event
from fedfin.privacy.shares import Cohort, ShareScheme, SumShape, make_scheme

__all__ = [
    "evaluation_event",
    "evaluation_job",
    "evaluation_scheme",
    "is_evaluation_job",
    "job_of",
]

_SUFFIX: Final = " evaluation"
_SPARE: Final = 2e-3
"""Of epsilon: what a lender reserves covers cohorts of any size, and so the coarsest of their lattices."""


def evaluation_job(job_id: str) -> str:
    """Return the name under which a job's evaluations stand in the ledger: they have a reservation of their own.

    A job's id has no space (`client/lender.py`), so no other job can have this name.
    """
    return f"{job_id}{_SUFFIX}"


def is_evaluation_job(name: str) -> bool:
    """Tell whether a name in the ledger is that of a job's evaluations: its loans are held out."""
    return name.endswith(_SUFFIX)


def job_of(name: str) -> str:
    """Return the job's id, from its own name in the ledger or that of its evaluations."""
    return name.removesuffix(_SUFFIX)


def evaluation_event(plan: JobPlan) -> GaussianEvent:
    """Return one evaluation under a lender's own noise; `evaluation.times` of them meet the plan's epsilon.

    Args:
        plan: Mode local, with an evaluation at least.

    Raises:
        PrivacyParameterError: The mode is another, there is no evaluation, or no noise meets the plan.
    """
    _require(plan, "local")
    return GaussianEvent(calibrate_releases(plan.privacy.epsilon, plan.privacy.delta, plan.evaluation.times))


def evaluation_scheme(plan: JobPlan, *, num_lenders: int, num_cells: int, sensitivity: float) -> ShareScheme:
    """Return how the lenders of one evaluation round and add their shares of the noise, for mode shared.

    The noise is that of the planned shares alone, and `evaluation.times` sums meet the plan's epsilon, lattice and all.
    As with the histogram for the bins, a lender's counts are scaled down to the norm that `training.weight_cap` loans
    in the same cells would have, so that the lattice can be fine and no bank owns the figures.

    Args:
        plan: Mode shared, with an evaluation at least.
        num_lenders: Lenders in the sum.
        num_cells: Cells of the counts.
        sensitivity: L2 sensitivity of the counts to one loan.

    Raises:
        PrivacyParameterError: The mode is another, there is no evaluation, or no noise meets the plan.
    """
    _require(plan, "shared")
    privacy, times = plan.privacy, plan.evaluation.times
    cohort = Cohort(num_lenders, privacy.planned_dropouts, privacy.planned_colluders)
    shape = SumShape(num_cells, sensitivity, plan.training.weight_cap * sensitivity)
    # The lattice's gap, taken at the noise without it, is the larger one: more noise, finer lattice.
    whole = privacy.epsilon * (1.0 - _SPARE)
    first = make_scheme(calibrate_releases(whole, privacy.delta, times), cohort, shape)
    gap = gap_of([shared_event(first, count=times)])
    epsilon, delta = gap.continuous(whole), gap.delta_left(privacy.delta)
    if epsilon < 0.8 * privacy.epsilon or delta < 0.5 * privacy.delta:
        msg = (
            f"the lattice would leave {epsilon:.2g} of privacy.epsilon {privacy.epsilon:g} and {max(delta, 0.0):.2g} of"
            f" privacy.delta {privacy.delta:g} for the evaluations; lower the number of lenders or evaluation.times"
        )
        raise PrivacyParameterError(msg)
    scheme = make_scheme(calibrate_releases(epsilon, delta, times), cohort, shape)
    assert epsilon_rdp([shared_event(scheme, count=times)], privacy.delta) <= privacy.epsilon  # noqa: S101  (our bug)
    return scheme


def _require(plan: JobPlan, mode: str) -> None:
    if plan.privacy.mode != mode or plan.evaluation.times < 1:
        msg = (
            f"privacy.mode is {plan.privacy.mode} and evaluation.times {plan.evaluation.times}; this noise is for mode"
            f" {mode} and one evaluation at least: do not ask for it"
        )
        raise PrivacyParameterError(msg)

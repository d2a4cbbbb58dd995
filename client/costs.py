"""What each stage of a private job costs this lender's loans: what is reserved at the proposal, and charged later.

In mode local a stage's cost is its own noise. In mode shared it is the noise of a sum, which depends a little on how
many lenders are in it: what is reserved covers every cohort that the plan and the roster allow, and every sum is held
against it before it is charged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedfin.credit.binning import histogram_size
from fedfin.credit.models import largest_model
from fedfin.credit.schema import Schema
from fedfin.errors import PrivacyParameterError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import CalibratedNoise, calibrate, job_events
from fedfin.privacy.events import Event, GaussianEvent, SharedNoiseEvent
from fedfin.privacy.shared_accounting import SharedSums, calibrate_shared, shared_sums
from fedfin.privacy.shared_events import shared_event
from fedfin.privacy.shares import ShareScheme
from fedfin.strategies.sums import bins_scheme, round_scheme

__all__ = ["Costs", "costs_of", "covering", "require_covered"]


@dataclass(frozen=True, slots=True)
class Costs:
    """The noise of a private job, and what it costs.

    Attributes:
        noise: Noise multipliers of the histogram and of a step.
        bins: What the histogram is charged.
        round: What one round is charged.
        whole: What the whole job reserves of the training loans: the histogram and all rounds.
        sums: What is summed in mode shared, for all members of the roster; None in mode local.
    """

    noise: CalibratedNoise
    bins: Event
    round: Event
    whole: tuple[Event, ...]
    sums: SharedSums | None = None


def costs_of(plan: JobPlan, schema: Schema, num_members: int) -> Costs:
    """Return what a private job costs; public, the same at every lender.

    Args:
        plan: Mode local or shared.
        schema: The federation's.
        num_members: Members of the roster; of no account in mode local.

    Raises:
        PrivacyParameterError: The mode is none, no noise meets the plan, or the roster is smaller than its quorum.
    """
    training = plan.training
    if plan.privacy.mode == "local":
        noise = calibrate(plan.privacy, sample_rate=training.sample_rate, num_steps=plan.num_steps)
        return Costs(
            noise=noise,
            bins=GaussianEvent(noise.bins_noise_multiplier),
            round=GaussianEvent(noise.training_noise_multiplier, training.sample_rate, training.local_steps),
            whole=job_events(noise, training.sample_rate, plan.num_steps),
        )
    sums = shared_sums(
        plan,
        num_lenders=num_members,
        num_cells=histogram_size(schema),
        num_features=len(schema.features),
        num_parameters=largest_model(plan.model, schema),
    )
    noise = calibrate_shared(plan.privacy, sums, sample_rate=training.sample_rate, num_rounds=training.rounds)
    cohorts = range(plan.cohort.min_lenders, num_members + 1)
    bins = covering(bins_scheme(noise, sums, n) for n in cohorts)
    one_round = covering(
        (round_scheme(noise, sums, sums.gradient.size, n) for n in cohorts), sample_rate=training.sample_rate
    )
    return Costs(
        noise=noise,
        bins=bins,
        round=one_round,
        whole=(bins, replace(one_round, count=training.rounds)),
        sums=sums,
    )


def covering(schemes: Iterable[ShareScheme], *, sample_rate: float = 1.0) -> SharedNoiseEvent:
    """Return an event that costs at least as much as the sum of any of these schemes; one at least.

    Raises:
        PrivacyParameterError: There is none: a lattice is too coarse for the comparison.
    """
    events = [shared_event(scheme, sample_rate=sample_rate) for scheme in schemes]
    worst = SharedNoiseEvent(
        noise_multiplier=min(event.noise_multiplier for event in events),
        sample_rate=sample_rate,
        count=1,
        size=max(event.size for event in events),
        share_stddev=min(event.share_stddev for event in events),
        num_shares=min(event.num_shares for event in events),
        num_lenders=max(event.num_lenders for event in events),
    )
    for event in events:
        require_covered(event, worst)
    return worst


def require_covered(event: SharedNoiseEvent, reserved: Event) -> None:
    """Hold one sum's event against what is charged for it.

    Less noise costs more, and so does a larger distance to continuous noise (`fedfin.privacy.shared_events`).

    Raises:
        PrivacyParameterError: The sum would cost more than what was reserved, in noise or in distance.
    """
    if not (
        isinstance(reserved, SharedNoiseEvent)
        and event.noise_multiplier >= reserved.noise_multiplier
        and (event.sample_rate, event.count) == (reserved.sample_rate, reserved.count)
        and _no_farther(event.round_gap, reserved.round_gap)
    ):
        msg = (
            f"a sum of {event.num_lenders} lenders with noise multiplier {event.noise_multiplier:.6g} may cost more"
            " than what is reserved for it; lower training.weight_cap, or take a smaller model or another roster"
        )
        raise PrivacyParameterError(msg)


def _no_farther(gap: Sequence[float], reserved: Sequence[float]) -> bool:
    return all(one <= other for one, other in zip(gap, reserved, strict=True))

"""A job of mode `shared`: what its lenders add up, under which events, and the noise that makes its epsilon true.

One sum a round is published. `fedfin.privacy.accounting` gives the figures of its events: those of the same rounds
with continuous noise of the planned shares' variance, plus what the lattice may add, by the claim of
`fedfin.privacy.shared_events`.
"""

import math
from dataclasses import dataclass, replace

from fedfin.errors import PrivacyParameterError
from fedfin.plan import JobPlan, PrivacyPlan
from fedfin.privacy.accounting import CalibratedNoise, calibrate, epsilon_rdp
from fedfin.privacy.events import gap_of
from fedfin.privacy.rounding import rounding_share
from fedfin.privacy.shared_events import SharedNoiseEvent, shared_event
from fedfin.privacy.shares import Cohort, ShareScheme, SumShape, make_scheme

__all__ = [
    "SharedSums",
    "calibrate_shared",
    "shared_events",
    "shared_sums",
]


@dataclass(frozen=True, slots=True)
class SharedSums:
    """The two kinds of sums of a job in mode `shared`: their shapes, and who is in them.

    Attributes:
        cohort: Who is in a sum.
        histogram: The one histogram for the bins.
        gradient: A round's sum of clipped gradients; `size` may be an upper bound while the bins are not known.
    """

    cohort: Cohort
    histogram: SumShape
    gradient: SumShape

    def gradient_of(self, size: int) -> SumShape:
        """Return a gradient's shape once the model's size is known; raises where it passes the accounted bound."""
        if size > self.gradient.size:
            msg = f"a gradient of {size} values was accounted for as {self.gradient.size} at most; plan the job anew"
            raise PrivacyParameterError(msg)
        return replace(self.gradient, size=size)

    def schemes(self, noise: CalibratedNoise) -> tuple[ShareScheme, ShareScheme]:
        """Return how to round and add noise, for the histogram and for a gradient."""
        return (
            make_scheme(noise.bins_noise_multiplier, self.cohort, self.histogram),
            make_scheme(noise.training_noise_multiplier, self.cohort, self.gradient),
        )


def shared_sums(
    plan: JobPlan, *, num_lenders: int, num_cells: int, num_features: int, num_parameters: int
) -> SharedSums:
    """Return the sums of a job: all its public parts, the same at every lender.

    Every loan counts alike, up to a point: a lender's sum is scaled down to the norm that `weight_cap` loans could
    reach, so that the lattice can be as fine as the ring allows and no bank owns the model.

    Args:
        plan: The job.
        num_lenders: Lenders that start a round; at least cohort.min_lenders.
        num_cells: Cells of a histogram.
        num_features: Columns of a histogram; a loan counts once in each, so its L2 sensitivity is the square root.
        num_parameters: Parameters of the model, or an upper bound while the bins are not known.

    Raises:
        PrivacyParameterError: There are fewer lenders than the plan's quorum, or a count is below 1.
    """
    if num_lenders < plan.cohort.min_lenders:
        msg = (
            f"{num_lenders} lenders start the round, and cohort.min_lenders is {plan.cohort.min_lenders}; wait for"
            " more, or lower it"
        )
        raise PrivacyParameterError(msg)
    privacy, training = plan.privacy, plan.training
    cohort = Cohort(num_lenders, privacy.planned_dropouts, privacy.planned_colluders)
    one_loan = math.sqrt(num_features)
    # the clipped sum is made in float32, as in mode local, where the noise is larger by the same share
    one_gradient = privacy.clipping_bound * (1.0 + rounding_share())
    most_loans = max(1.0, training.sample_rate * training.weight_cap)
    return SharedSums(
        cohort,
        SumShape(num_cells, one_loan, training.weight_cap * one_loan),
        SumShape(num_parameters, one_gradient, most_loans * privacy.clipping_bound),
    )


def shared_events(
    noise: CalibratedNoise, sums: SharedSums, *, sample_rate: float, num_rounds: int
) -> tuple[SharedNoiseEvent, SharedNoiseEvent]:
    """Return a whole job's events: one histogram of all loans, then a sampled gradient a round."""
    histogram, gradient = sums.schemes(noise)
    return shared_event(histogram), shared_event(gradient, sample_rate=sample_rate, count=num_rounds)


def calibrate_shared(
    plan: PrivacyPlan, sums: SharedSums, *, sample_rate: float, num_rounds: int
) -> CalibratedNoise:
    """Return the least noise of the published sums with which a job meets the plan's epsilon at its delta, by RDP.

    The noise is that of the planned shares alone. Deterministic, and public: nothing in it depends on a loan.

    Args:
        plan: The guarantee; mode "shared".
        sums: What is summed by whom.
        sample_rate: Poisson rate of a round, in (0, 1].
        num_rounds: Rounds, of one sum each; >= 1.

    Returns:
        Noise whose composed epsilon, lattice and all, is within 1% below `plan.epsilon`.

    Raises:
        PrivacyParameterError: The plan is of another mode, an argument is out of range, or no noise meets it.
    """
    if plan.mode != "shared":
        msg = f"privacy.mode is {plan.mode}; noise in shares is for mode shared: set it"
        raise PrivacyParameterError(msg)
    local = plan.model_copy(update={"mode": "local", "planned_dropouts": 0, "planned_colluders": 0})
    # The lattice's gap, taken at the noise without it, is the larger one: more noise, finer lattice.
    noise = calibrate(local, sample_rate=sample_rate, num_steps=num_rounds)
    events = shared_events(noise, sums, sample_rate=sample_rate, num_rounds=num_rounds)
    gap = gap_of(events)
    epsilon, delta = gap.continuous(plan.epsilon), gap.delta_left(plan.delta)
    if epsilon < 0.8 * plan.epsilon or delta < 0.5 * plan.delta:
        msg = (
            f"the lattice would leave {epsilon:.2g} of privacy.epsilon {plan.epsilon:g} and {max(delta, 0.0):.2g} of"
            f" privacy.delta {plan.delta:g}; lower training.weight_cap or take a smaller model, so that it can be finer"
        )
        raise PrivacyParameterError(msg)
    inner = local.model_copy(update={"epsilon": epsilon, "delta": delta})
    noise = calibrate(inner, sample_rate=sample_rate, num_steps=num_rounds)
    events = shared_events(noise, sums, sample_rate=sample_rate, num_rounds=num_rounds)
    assert epsilon_rdp(events, plan.delta) <= plan.epsilon  # noqa: S101  (our bug, not the caller's)
    return noise

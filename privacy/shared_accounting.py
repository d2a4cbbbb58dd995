"""What a job costs whose noise comes in shares, and the noise that makes a plan's epsilon true.

One sum a round is published. The figures are those of the same rounds with continuous noise of the planned shares'
variance (`fedfin.privacy.accounting`), plus what the lattice may add: the claim of `fedfin.privacy.shared_events`.
"""
# pyright: reportMissingTypeStubs=false
# dp_accounting ships no types

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from fedfin.errors import PrivacyParameterError
from fedfin.plan import JobPlan, PrivacyPlan
from fedfin.privacy.accounting import CalibratedNoise, GaussianEvent, calibrate, epsilon_pld, epsilon_rdp
from fedfin.privacy.shared_events import SharedNoiseEvent, shared_event
from fedfin.privacy.shares import Cohort, ShareScheme, SumShape, make_scheme

__all__ = [
    "SharedSums",
    "calibrate_shared",
    "shared_borrower_epsilon",
    "shared_epsilon_pld",
    "shared_epsilon_rdp",
    "shared_events",
    "shared_sums",
]

_LARGEST_EPSILON = 150.0  # beyond the largest plan; larger ones are inf
_PLD_INTERVAL = 1e-3  # of a mixture of Gaussians, which takes ten times the time at 1e-4; upwards, so sound


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
    most_loans = max(1.0, training.sample_rate * training.weight_cap)
    return SharedSums(
        cohort,
        SumShape(num_cells, one_loan, training.weight_cap * one_loan),
        SumShape(num_parameters, privacy.clipping_bound, most_loans * privacy.clipping_bound),
    )


def shared_events(
    noise: CalibratedNoise, sums: SharedSums, *, sample_rate: float, num_rounds: int
) -> tuple[SharedNoiseEvent, SharedNoiseEvent]:
    """Return a whole job's events: one histogram of all loans, then a sampled gradient a round."""
    histogram, gradient = sums.schemes(noise)
    return shared_event(histogram), shared_event(gradient, sample_rate=sample_rate, count=num_rounds)


def shared_epsilon_rdp(events: Sequence[SharedNoiseEvent], delta: float) -> float:
    """Return epsilon of the composition by Renyi differential privacy, the figure that limits hold.

    Args:
        events: Sums, in any order.
        delta: In (0, 1).

    Returns:
        Epsilon, an upper bound; 0.0 without events; inf above 150, or where the lattice takes all of delta.

    Raises:
        PrivacyParameterError: `delta` is out of range.
    """
    return _with_gaps(epsilon_rdp, events, delta)


def shared_epsilon_pld(events: Sequence[SharedNoiseEvent], delta: float) -> float:
    """Return epsilon of the composition by privacy loss distributions; as `shared_epsilon_rdp`, tighter."""
    return _with_gaps(epsilon_pld, events, delta)


def shared_borrower_epsilon(events: Sequence[SharedNoiseEvent], delta: float, *, num_lenders: int) -> float:
    """Return the PLD epsilon of a borrower with one loan at each of `num_lenders` lenders of the cohort.

    The loans meet in the same sum under the same noise: it moves by one sensitivity for each of them that was
    sampled. A mixture of Gaussians, with chances of a binomial distribution.

    Args:
        events: The job's sums; all lenders have the same sample rate.
        delta: In (0, 1).
        num_lenders: Lenders that know the borrower; >= 1.

    Raises:
        PrivacyParameterError: As `shared_epsilon_pld`, or `num_lenders` is below 1.

    Source: Choquette-Choo, Ganesh, Steinke & Thakurta 2023, "Privacy amplification for matrix mechanisms"
    (arXiv:2310.15526): vectors of at most these lengths, whatever their directions, are dominated by this mixture.
    """
    if num_lenders < 1:
        msg = f"num_lenders is {num_lenders}; a borrower is known to at least 1 lender"
        raise PrivacyParameterError(msg)

    def mixture_epsilon(gaussians: Sequence[GaussianEvent], own_delta: float) -> float:
        accountant = PLDAccountant(value_discretization_interval=_PLD_INTERVAL)
        for event in gaussians:
            rate = event.sample_rate
            chances = [
                math.comb(num_lenders, known) * rate**known * (1.0 - rate) ** (num_lenders - known)
                for known in range(num_lenders + 1)
            ]
            if rate == 1.0:
                release = dp_event.GaussianDpEvent(event.noise_multiplier / num_lenders)
            else:
                shifts = [float(known) for known in range(num_lenders + 1)]
                release = dp_event.MixtureOfGaussiansDpEvent(event.noise_multiplier, shifts, chances)
            accountant.compose(release, event.count)
        return float(accountant.get_epsilon(own_delta))

    return _with_gaps(mixture_epsilon, events, delta)


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
    eta, zeta = _gaps(events)
    spare = _spare_delta(eta, zeta)
    if 2.0 * eta > 0.2 * plan.epsilon or spare > 0.5 * plan.delta:
        msg = (
            f"the lattice would cost {2.0 * eta:.2g} of privacy.epsilon {plan.epsilon:g} and {spare:.2g} of delta;"
            " lower training.weight_cap or take a smaller model, so that it can be finer"
        )
        raise PrivacyParameterError(msg)
    inner = local.model_copy(
        update={"epsilon": plan.epsilon - 2.0 * eta, "delta": math.exp(-eta) * (plan.delta - spare)}
    )
    noise = calibrate(inner, sample_rate=sample_rate, num_steps=num_rounds)
    events = shared_events(noise, sums, sample_rate=sample_rate, num_rounds=num_rounds)
    assert shared_epsilon_rdp(events, plan.delta) <= plan.epsilon  # noqa: S101  (our bug, not the caller's)
    return noise


def _gaps(events: Sequence[SharedNoiseEvent]) -> tuple[float, float]:
    """Return H and D of the claim."""
    gaps = [(event.count, *event.round_gap) for event in events]
    return sum(count * eta for count, eta, _ in gaps), sum(count * zeta for count, _, zeta in gaps)


def _spare_delta(eta: float, zeta: float) -> float:
    """Return what the lattice takes of delta, for any epsilon up to `_LARGEST_EPSILON`."""
    return zeta * (1.0 + math.exp(eta + _LARGEST_EPSILON)) if eta <= 1.0 else math.inf


def _with_gaps(
    epsilon_of: Callable[[Sequence[GaussianEvent], float], float],
    events: Sequence[SharedNoiseEvent],
    delta: float,
) -> float:
    """Return the claim's epsilon at delta, from the function that accounts for the continuous rounds."""
    eta, zeta = _gaps(events)
    left = math.exp(-eta) * (delta - _spare_delta(eta, zeta)) if events else delta
    if left <= 0.0 < delta:
        return math.inf
    epsilon = epsilon_of([event.gaussian for event in events], left)
    return epsilon + 2.0 * eta if epsilon <= _LARGEST_EPSILON else math.inf

"""What a job costs: typed events in, epsilon out, and the noise that makes a plan's epsilon true.

Two figures come from Google's dp_accounting, both upper bounds for the add-or-remove-one-loan relation.
RDP (Mironov, Talwar & Zhang 2019, with the conversion of Canonne, Kamath & Steinke 2020, proposition 12)
calibrates plans; the divergences it adds are what limits hold (`privacy/filter.py`). Privacy loss
distributions (PLD, Doroshenko et al. 2022) are tighter and stand beside it. No central-limit (GDP) figure: it
reports too little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedfin.errors import PrivacyParameterError
from fedfin.plan import PrivacyPlan
from fedfin.privacy.composition import ORDERS, composed_divergences, pld_epsilon, rdp_epsilon
from fedfin.privacy.events import Event, GaussianEvent, gap_of, merge_events

__all__ = [
    "ORDERS",
    "CalibratedNoise",
    "Event",
    "GaussianEvent",
    "borrower_epsilon",
    "borrower_epsilons",
    "calibrate",
    "calibrate_releases",
    "checked_delta",
    "divergences",
    "epsilon_pld",
    "epsilon_rdp",
    "job_events",
    "merge_events",
]

_CALIBRATION_TOLERANCE = 0.005


@dataclass(frozen=True, slots=True)
class CalibratedNoise:
    """A plan's noise at one lender, each as standard deviation over L2 sensitivity."""

    bins_noise_multiplier: float  # of the one histogram release
    training_noise_multiplier: float  # of each DP-SGD step's sum of clipped gradients


def epsilon_pld(events: Sequence[Event], delta: float) -> float:
    """Return epsilon of the composition by privacy loss distributions, the tightest figure.

    Args:
        events: Releases, in any order.
        delta: In (0, 1).

    Returns:
        Epsilon, an upper bound; 0.0 without events. Never above `epsilon_rdp`.

    Raises:
        PrivacyParameterError: `delta` is out of range, or an event is of an unknown type.

    Source: Doroshenko, Ghazi, Kamath, Kumar & Manurangsi 2022, "Connect the dots".
    """
    return _with_gap(events, delta, pld_epsilon)


def epsilon_rdp(events: Sequence[Event], delta: float) -> float:
    """Return epsilon of the composition by Renyi differential privacy, the least over all orders.

    Args:
        events: Releases, in any order.
        delta: In (0, 1).

    Returns:
        Epsilon, an upper bound; 0.0 without events.

    Raises:
        PrivacyParameterError: `delta` is out of range, or an event is of an unknown type.

    Source: Mironov, Talwar & Zhang 2019, section 3.3; Canonne, Kamath & Steinke 2020, proposition 12.
    """
    return _with_gap(events, delta, rdp_epsilon)


def divergences(events: Sequence[Event]) -> tuple[float, ...]:
    """Return the Renyi divergence of the composition at each of `ORDERS`, which adds up over jobs.

    Args:
        events: Releases, in any order; noise in shares counts as continuous, and `events.gap_of` comes on top.

    Returns:
        Upper bounds, inf at an order where none is known; zeros without events.

    Raises:
        PrivacyParameterError: An event is of an unknown type.
    """
    return composed_divergences(_continuous(events))


def borrower_epsilon(events: Sequence[Event], delta: float, *, num_lenders: int) -> float:
    """Return the PLD epsilon of a borrower with one loan at each of `num_lenders` lenders.

    Of releases with a lender's own noise (mode `local`) there are as many as lenders, each with the whole noise.
    Sums under noise in shares (mode `shared`) hold all the borrower's loans at once, under the same noise.

    Args:
        events: One lender's releases; the other lenders release the same, with the same sample rate.
        delta: In (0, 1).
        num_lenders: Lenders that know the borrower; >= 1.

    Returns:
        Epsilon, an upper bound; 0.0 without events.

    Raises:
        PrivacyParameterError: As `epsilon_pld`, or `num_lenders` below 1.
    """
    if num_lenders < 1:
        msg = f"num_lenders is {num_lenders}; a borrower is known to at least 1 lender"
        raise PrivacyParameterError(msg)
    merged = merge_events(events)
    own = [event for event in merged if isinstance(event, GaussianEvent)] * num_lenders
    met = tuple((event.gaussian, num_lenders) for event in merged if not isinstance(event, GaussianEvent))
    if not met or num_lenders == 1:
        return epsilon_pld(
            [*own, *(event for event in merged if not isinstance(event, GaussianEvent))], delta
        )
    gap = gap_of(merged)
    left = gap.delta_left(checked_delta(delta))
    return gap.epsilon(pld_epsilon(_continuous(own), left, met)) if left > 0.0 else math.inf


def borrower_epsilons(events: Sequence[Event], delta: float) -> tuple[float, float, float]:
    """Return `borrower_epsilon` for a borrower known to 1, 2 and 3 lenders."""
    one, two, three = (borrower_epsilon(events, delta, num_lenders=known) for known in (1, 2, 3))
    return one, two, three


def calibrate(plan: PrivacyPlan, *, sample_rate: float, num_steps: int) -> CalibratedNoise:
    """Return the least noise with which a job meets the plan's epsilon at its delta, by RDP.

    The histograms for the bins alone cost `plan.bins_share` of epsilon; the steps take what their
    composition with the histograms leaves. Deterministic.

    Args:
        plan: The guarantee; mode "local".
        sample_rate: Poisson rate of a step, in (0, 1].
        num_steps: Optimizer steps of the whole job; >= 1.

    Returns:
        Noise whose composed epsilon is within 0.5% below `plan.epsilon`.

    Raises:
        PrivacyParameterError: An argument is out of range, the plan asks for no privacy, or no
            accountable noise meets it.
    """
    if plan.mode != "local":
        msg = f"privacy.mode is {plan.mode}; there is no noise to calibrate: set it to local"
        raise PrivacyParameterError(msg)
    return _calibrate(plan.epsilon, plan.delta, plan.bins_share, sample_rate, num_steps)


@lru_cache(maxsize=8)  # pure, a tenth of a second, and asked at every stage
def _calibrate(
    epsilon: float, delta: float, bins_share: float, sample_rate: float, num_steps: int
) -> CalibratedNoise:
    least, _ = GaussianEvent.noise_range(sample_rate)
    GaussianEvent(least, sample_rate, num_steps)  # refuses a rate or count without meaning

    def bins_epsilon(noise_multiplier: float) -> float:
        return epsilon_rdp([GaussianEvent(noise_multiplier)], delta)

    bins = _least_noise(bins_epsilon, epsilon * bins_share)

    def job_epsilon(noise_multiplier: float) -> float:
        noise = CalibratedNoise(bins, noise_multiplier)
        return epsilon_rdp(job_events(noise, sample_rate, num_steps), delta)

    # one unsampled release costs nothing to compute and has the size of the answer
    start = _least_noise(bins_epsilon, epsilon)
    start = max(0.5, start * sample_rate * math.sqrt(num_steps))
    training = _least_noise(job_epsilon, epsilon, start=start, sample_rate=sample_rate)
    return CalibratedNoise(bins, training)


@lru_cache(maxsize=8)  # pure, a tenth of a second, and asked at every stage
def calibrate_releases(epsilon: float, delta: float, num_releases: int) -> float:
    """Return the least noise with which so many equal releases of all loans meet epsilon at delta, by RDP.

    Args:
        epsilon: Of all releases together; > 0.
        delta: In (0, 1).
        num_releases: Unsampled releases, as of an evaluation's counts; >= 1.

    Returns:
        The noise multiplier of each; the composed epsilon is within 0.5% below `epsilon`.

    Raises:
        PrivacyParameterError: An argument is out of range, or no accountable noise meets it.
    """

    def epsilon_of(noise_multiplier: float) -> float:
        return epsilon_rdp([GaussianEvent(noise_multiplier, 1.0, num_releases)], delta)

    return _least_noise(epsilon_of, epsilon, start=math.sqrt(num_releases))


def job_events(noise: CalibratedNoise, sample_rate: float, num_steps: int) -> tuple[Event, ...]:
    """Return a whole job's events: one histogram release on all loans, then the sampled steps.

    Raises:
        PrivacyParameterError: `sample_rate` or `num_steps` is out of range.
    """
    return (
        GaussianEvent(noise.bins_noise_multiplier),
        GaussianEvent(noise.training_noise_multiplier, sample_rate, num_steps),
    )


def checked_delta(delta: float) -> float:
    """Return `delta`, or raise PrivacyParameterError where it is not in (0, 1)."""
    if not (0.0 < delta < 1.0):
        msg = f"delta is {delta}; it must be in (0, 1), well below one over the number of loans, such as 1e-5"
        raise PrivacyParameterError(msg)
    return delta


def _continuous(events: Sequence[Event]) -> tuple[GaussianEvent, ...]:
    """Return the releases with continuous noise in the place of noise in shares, merged."""
    merged = merge_events([event.gaussian for event in merge_events(events)])
    return tuple(event for event in merged if isinstance(event, GaussianEvent))


def _with_gap(
    events: Sequence[Event],
    delta: float,
    epsilon_of: Callable[[tuple[GaussianEvent, ...], float], float],
) -> float:
    gap = gap_of(merge_events(events))
    left = gap.delta_left(checked_delta(delta))
    return gap.epsilon(epsilon_of(_continuous(events), left)) if left > 0.0 else math.inf


def _least_noise(
    epsilon_of: Callable[[float], float], target: float, *, start: float = 1.0, sample_rate: float = 1.0
) -> float:
    """Return a noise multiplier with epsilon in [0.995 * target, target], by bisection and secant steps."""
    low, largest = GaussianEvent.noise_range(sample_rate)
    high, enough = largest, None
    aim = (1.0 - 0.5 * _CALIBRATION_TOLERANCE) * target
    slope = 1.5  # epsilon goes as noise**-1 where it is small, as noise**-2 where it is large
    noise = start
    last: tuple[float, float] | None = None
    while high > low * (1.0 + 1e-9):
        if not (low < noise < high):
            noise = math.sqrt(low * high)
        epsilon = epsilon_of(noise)
        # epsilon falls as noise grows, so the answer stays between low (too little) and high (enough)
        if epsilon > target:
            low = noise
        else:
            high = enough = noise
            if epsilon >= (1.0 - _CALIBRATION_TOLERANCE) * target:
                break
        if 0.0 < epsilon < math.inf:
            if last is not None and noise != last[0]:
                slope = max(0.5, math.log(last[1] / epsilon) / math.log(noise / last[0]))
            last = (noise, epsilon)
        noise *= (epsilon / aim) ** (1.0 / slope)
    if enough is None:
        msg = (
            f"privacy.epsilon leaves {target:g} of it to meet, which no noise multiplier up to {largest:g} does;"
            " raise privacy.epsilon, or lower privacy.bins_share or training.rounds"
        )
        raise PrivacyParameterError(msg)
    return enough

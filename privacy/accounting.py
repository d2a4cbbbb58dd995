"""What a job costs: typed events in, epsilon out, and the noise that makes a plan's epsilon true.

Two figures come from Google's dp_accounting, both upper bounds for the add-or-remove-one-loan relation.
RDP (Mironov, Talwar & Zhang 2019, with the conversion of Canonne, Kamath & Steinke 2020, proposition 12)
calibrates plans; the divergences it adds are what limits hold (`privacy/filter.py`). Privacy loss
distributions (PLD, Doroshenko et al. 2022) are tighter and stand beside it. No central-limit (GDP) figure: it
reports too little.
"""
# pyright: reportMissingTypeStubs=false
# dp_accounting ships no types

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from fedfin.errors import PrivacyParameterError
from fedfin.plan import PrivacyPlan
from fedfin.privacy.events import Event, GaussianEvent, merge_events

__all__ = [
    "ORDERS",
    "CalibratedNoise",
    "Event",
    "GaussianEvent",
    "borrower_epsilon",
    "borrower_epsilons",
    "calibrate",
    "checked_delta",
    "divergences",
    "epsilon_pld",
    "epsilon_rdp",
    "job_events",
    "merge_events",
]

_PLD_INTERVAL = 1e-4
# dp_accounting takes seconds beyond these sizes; the interval widens instead, which is as sound
_PLD_POINTS = 500_000  # of the composed distribution, by FFT
_PLD_POINTS_PER_RELEASE = 100_000  # of one release's, point by point
_NO_PROTECTION = 1000.0  # above this epsilon no second figure is worth its minutes
_CALIBRATION_TOLERANCE = 0.005

# Fine where plans live (orders 2 to 12), geometric above. The fractional orders below 3 do not always
# converge; those left out make the minimum larger, never smaller.
ORDERS: tuple[float, ...] = (
    *(1.25, 1.5, 1.75),
    *(order / 4 for order in range(8, 32)),
    *(order / 2 for order in range(16, 24)),
    *range(12, 64),
    *range(64, 128, 8),
    *range(128, 256, 32),
    *(256, 384, 512, 768, 1024),
)
"""The Renyi orders at which divergences are known, ascending."""


@dataclass(frozen=True, slots=True)
class CalibratedNoise:
    """A plan's noise at one lender, each as standard deviation over L2 sensitivity."""

    bins_noise_multiplier: float  # of the one histogram release
    training_noise_multiplier: float  # of each DP-SGD step's sum of clipped gradients


def epsilon_pld(events: Sequence[Event], delta: float) -> float:
    """Return epsilon of the composition by privacy loss distributions, the tightest figure.

    The loss is discretised at 1e-4, upwards. Where noise is below about 0.85 or epsilon above 50 the
    interval widens, and above 1000, where nothing is protected, the figure is the RDP one.

    Args:
        events: Releases, in any order.
        delta: In (0, 1).

    Returns:
        Epsilon, an upper bound; 0.0 without events. Never above `epsilon_rdp`.

    Raises:
        PrivacyParameterError: `delta` is out of range, or an event is of an unknown type.

    Source: Doroshenko, Ghazi, Kamath, Kumar & Manurangsi 2022, "Connect the dots".
    """
    return _epsilon_pld(merge_events(events), checked_delta(delta))


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
    return _epsilon_rdp(merge_events(events), checked_delta(delta))


def divergences(events: Sequence[Event]) -> tuple[float, ...]:
    """Return the Renyi divergence of the composition at each of `ORDERS`, which adds up over jobs.

    Args:
        events: Releases, in any order.

    Returns:
        Upper bounds, inf at an order where none is known; zeros without events.

    Raises:
        PrivacyParameterError: An event is of an unknown type.
    """
    return _composed(merge_events(events))


def borrower_epsilon(events: Sequence[Event], delta: float, *, num_lenders: int) -> float:
    """Return the PLD epsilon of a borrower with one loan at each of `num_lenders` lenders.

    Each lender adds its own full noise (mode `local`) and releases the same events.

    Args:
        events: One lender's releases.
        delta: In (0, 1).
        num_lenders: Lenders that know the borrower; >= 1.

    Returns:
        Epsilon of the composition of `num_lenders` copies of `events`.

    Raises:
        PrivacyParameterError: As `epsilon_pld`, or `num_lenders` below 1.
    """
    if num_lenders < 1:
        msg = f"num_lenders is {num_lenders}; a borrower is known to at least 1 lender"
        raise PrivacyParameterError(msg)
    return epsilon_pld(list(events) * num_lenders, delta)


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
    least, _ = GaussianEvent.noise_range(sample_rate)
    GaussianEvent(least, sample_rate, num_steps)  # refuses a rate or count without meaning

    def bins_epsilon(noise_multiplier: float) -> float:
        return epsilon_rdp([GaussianEvent(noise_multiplier)], plan.delta)

    bins = _least_noise(bins_epsilon, plan.epsilon * plan.bins_share)

    def job_epsilon(noise_multiplier: float) -> float:
        noise = CalibratedNoise(bins, noise_multiplier)
        return epsilon_rdp(job_events(noise, sample_rate, num_steps), plan.delta)

    # one unsampled release costs nothing to compute and has the size of the answer
    start = _least_noise(bins_epsilon, plan.epsilon)
    start = max(0.5, start * sample_rate * math.sqrt(num_steps))
    training = _least_noise(job_epsilon, plan.epsilon, start=start, sample_rate=sample_rate)
    return CalibratedNoise(bins, training)


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


@lru_cache(maxsize=512)
def _epsilon_pld(merged: tuple[Event, ...], delta: float) -> float:
    bound = _epsilon_rdp(merged, delta)
    if not merged or bound > _NO_PROTECTION:
        return bound
    release_loss = max(8.0 / event.noise_multiplier + 0.5 * event.noise_multiplier**-2 for event in merged)
    interval = max(_PLD_INTERVAL, bound / _PLD_POINTS, release_loss / _PLD_POINTS_PER_RELEASE)
    accountant = PLDAccountant(value_discretization_interval=interval)
    for event in merged:
        accountant.compose(_dp_event(event), event.count)
    # both are upper bounds; the wide interval can make the tighter one the looser
    return min(bound, float(accountant.get_epsilon(delta)))


@lru_cache(maxsize=4096)
def _epsilon_rdp(merged: tuple[Event, ...], delta: float) -> float:
    if not merged:
        return 0.0
    epsilon, _ = compute_epsilon(ORDERS, _composed(merged), delta)
    return float(epsilon)


def _composed(merged: tuple[Event, ...]) -> tuple[float, ...]:
    curves = [(event.count, _rdp_curve(event.noise_multiplier, event.sample_rate)) for event in merged]
    return tuple(sum(count * curve[order] for count, curve in curves) for order in range(len(ORDERS)))


@lru_cache(maxsize=4096)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    """Return one release's Renyi divergence at each of `ORDERS`; inf where it did not converge."""
    accountant = RdpAccountant(ORDERS)
    logger = logging.getLogger("absl")
    logger.addFilter(_is_not_about_an_order)
    try:
        accountant.compose(_dp_event(GaussianEvent(noise_multiplier, sample_rate)))
    finally:
        logger.removeFilter(_is_not_about_an_order)
    curve = tuple(float(divergence) for divergence in accountant.rdp)
    if min(curve) <= 0.0:  # dp_accounting would read it as no cost at all
        msg = f"noise_multiplier {noise_multiplier} at sample_rate {sample_rate} reads as no cost; lower it"
        raise PrivacyParameterError(msg)
    return curve


def _dp_event(event: GaussianEvent) -> dp_event.DpEvent:
    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
    if event.sample_rate == 1.0:
        return gaussian
    return dp_event.PoissonSampledDpEvent(event.sample_rate, gaussian)


def _is_not_about_an_order(record: logging.LogRecord) -> bool:
    """Silence dp_accounting about orders that it leaves out (see `ORDERS`), and nothing else."""
    return not str(record.msg).startswith("_compute_log_a_frac failed to converge")


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

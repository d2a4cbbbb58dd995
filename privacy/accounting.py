"""What a job costs: typed events in, epsilon out, and the noise that makes a plan's epsilon true.

Two figures come from Google's dp_accounting, both upper bounds for the add-or-remove-one-loan relation.
RDP (Mironov, Talwar & Zhang 2019, with the conversion of Canonne, Kamath & Steinke 2020, proposition 12)
holds the limits and calibrates plans. Privacy loss distributions (PLD, Doroshenko et al. 2022) are tighter
and stand beside it. No central-limit (GDP) figure: it reports too little.
"""
# pyright: reportMissingTypeStubs=false
# dp_accounting ships no types

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from fedfin.errors import PrivacyParameterError
from fedfin.plan import PrivacyPlan

__all__ = [
    "CalibratedNoise",
    "GaussianEvent",
    "borrower_epsilon",
    "calibrate",
    "epsilon_pld",
    "epsilon_rdp",
    "job_events",
    "merge_events",
]

_MIN_NOISE_MULTIPLIER = 0.01  # epsilon is in the thousands below
_MIN_RATE_OVER_NOISE = 1e-5  # below, the divergence of a step drowns in float64's rounding and reads 0
_PLD_INTERVAL = 1e-4
# dp_accounting takes seconds beyond these sizes; the interval widens instead, which is as sound
_PLD_POINTS = 500_000  # of the composed distribution, by FFT
_PLD_POINTS_PER_RELEASE = 100_000  # of one release's, point by point
_NO_PROTECTION = 1000.0  # above this epsilon no second figure is worth its minutes
_CALIBRATION_TOLERANCE = 0.005

# Fine where plans live (orders 2 to 12), geometric above. The fractional orders below 3 do not always
# converge; those left out make the minimum larger, never smaller.
_ORDERS: tuple[float, ...] = (
    *(1.25, 1.5, 1.75),
    *(order / 4 for order in range(8, 32)),
    *(order / 2 for order in range(16, 24)),
    *range(12, 64),
    *range(64, 128, 8),
    *range(128, 256, 32),
    *(256, 384, 512, 768, 1024),
)


@dataclass(frozen=True, slots=True)
class GaussianEvent:
    """`count` releases of a Gaussian mechanism on a Poisson sample of the loans, or on all of them.

    Attributes:
        noise_multiplier: Noise's standard deviation over the L2 sensitivity; >= 0.01, at most
            `sample_rate` * 1e5.
        sample_rate: Chance of each loan to be in a release's sample, in (0, 1]; 1 samples nothing.
        count: Releases; >= 1.

    Raises:
        PrivacyParameterError: A value is out of range, so that the event cannot be accounted for.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not (0.0 < self.sample_rate <= 1.0):
            msg = f"sample_rate is {self.sample_rate}; the chance of a loan to be sampled must be in (0, 1]"
            raise PrivacyParameterError(msg)
        largest = self.sample_rate / _MIN_RATE_OVER_NOISE
        if not (_MIN_NOISE_MULTIPLIER <= self.noise_multiplier <= largest):
            msg = (
                f"noise_multiplier is {self.noise_multiplier} at sample_rate {self.sample_rate}; below"
                f" {_MIN_NOISE_MULTIPLIER} it protects nothing and above {largest:g} its cost drowns in"
                " rounding: choose one between"
            )
            raise PrivacyParameterError(msg)
        if self.count < 1 or self.count != int(self.count):
            msg = f"count is {self.count!r}; an event stands for a whole number of releases, at least 1"
            raise PrivacyParameterError(msg)

    @property
    def mechanism(self) -> str:
        """The mechanism's name in the ledger."""
        return "gaussian"

    @property
    def sampler(self) -> str:
        """How a release's sample is drawn: "poisson", or "none" when it takes all loans."""
        return "poisson" if self.sample_rate < 1.0 else "none"

    @property
    def relation(self) -> str:
        """The neighbouring relation of every figure: two tables differ by one loan added or removed."""
        return "add_or_remove_one"


@dataclass(frozen=True, slots=True)
class CalibratedNoise:
    """A plan's noise at one lender, each as standard deviation over L2 sensitivity."""

    bins_noise_multiplier: float  # of the one histogram release
    training_noise_multiplier: float  # of each DP-SGD step's sum of clipped gradients


def epsilon_pld(events: Sequence[GaussianEvent], delta: float) -> float:
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
    return _epsilon_pld(merge_events(events), _checked_delta(delta))


def epsilon_rdp(events: Sequence[GaussianEvent], delta: float) -> float:
    """Return epsilon of the composition by Renyi differential privacy, the figure that limits hold.

    Args:
        events: Releases, in any order.
        delta: In (0, 1).

    Returns:
        Epsilon, an upper bound; 0.0 without events.

    Raises:
        PrivacyParameterError: `delta` is out of range, or an event is of an unknown type.

    Source: Mironov, Talwar & Zhang 2019, section 3.3; Canonne, Kamath & Steinke 2020, proposition 12.
    """
    return _epsilon_rdp(merge_events(events), _checked_delta(delta))


def borrower_epsilon(events: Sequence[GaussianEvent], delta: float, *, num_lenders: int) -> float:
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
    GaussianEvent(_MIN_NOISE_MULTIPLIER, sample_rate, num_steps)  # refuses a rate or count without meaning

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


def job_events(noise: CalibratedNoise, sample_rate: float, num_steps: int) -> tuple[GaussianEvent, ...]:
    """Return a whole job's events: one histogram release on all loans, then the sampled steps.

    Raises:
        PrivacyParameterError: `sample_rate` or `num_steps` is out of range.
    """
    return (
        GaussianEvent(noise.bins_noise_multiplier),
        GaussianEvent(noise.training_noise_multiplier, sample_rate, num_steps),
    )


def merge_events(events: Iterable[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """Return equal events as one with the sum of their counts, in a canonical order.

    Raises:
        PrivacyParameterError: An event is not a `GaussianEvent`.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        if type(event) is not GaussianEvent:
            msg = (
                f"an event of type {type(event).__name__} cannot be accounted for; describe every release as"
                " a GaussianEvent"
            )
            raise PrivacyParameterError(msg)
        counts[event.noise_multiplier, event.sample_rate] += event.count
    return tuple(GaussianEvent(*kind, count) for kind, count in sorted(counts.items()))


def _checked_delta(delta: float) -> float:
    if not (0.0 < delta < 1.0):
        msg = f"delta is {delta}; it must be in (0, 1), well below one over the number of loans, such as 1e-5"
        raise PrivacyParameterError(msg)
    return delta


@lru_cache(maxsize=512)
def _epsilon_pld(merged: tuple[GaussianEvent, ...], delta: float) -> float:
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
def _epsilon_rdp(merged: tuple[GaussianEvent, ...], delta: float) -> float:
    if not merged:
        return 0.0
    curves = [(event.count, _rdp_curve(event.noise_multiplier, event.sample_rate)) for event in merged]
    composed = [sum(count * curve[order] for count, curve in curves) for order in range(len(_ORDERS))]
    epsilon, _ = compute_epsilon(_ORDERS, composed, delta)
    return float(epsilon)


@lru_cache(maxsize=4096)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    """Return one release's Renyi divergence at each of `_ORDERS`; inf where it did not converge."""
    accountant = RdpAccountant(_ORDERS)
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
    """Silence dp_accounting about orders that it leaves out (see `_ORDERS`), and nothing else."""
    return not str(record.msg).startswith("_compute_log_a_frac failed to converge")


def _least_noise(
    epsilon_of: Callable[[float], float], target: float, *, start: float = 1.0, sample_rate: float = 1.0
) -> float:
    """Return a noise multiplier with epsilon in [0.995 * target, target], by bisection and secant steps."""
    largest = sample_rate / _MIN_RATE_OVER_NOISE
    low, high, enough = _MIN_NOISE_MULTIPLIER, largest, None
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

"""Releases with continuous noise, composed: Renyi divergences and privacy loss distributions, from dp_accounting.

Both are upper bounds for the add-or-remove-one-loan relation; what was computed once is kept for the process.
"""
# pyright: reportMissingTypeStubs=false
# dp_accounting ships no types

import logging
import math
from functools import lru_cache

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.gaussian_event import GaussianEvent

__all__ = ["ORDERS", "composed_divergences", "pld_epsilon", "rdp_epsilon"]

_PLD_INTERVAL = 1e-4
_PLD_INTERVAL_OF_MIXTURES = (
    1e-3  # a mixture's losses are found point by point, ten times as slowly as the others
)
# dp_accounting takes seconds beyond these sizes; the interval widens instead, which is as sound
_PLD_POINTS = 500_000  # of the composed distribution, by FFT
_PLD_POINTS_PER_RELEASE = 100_000  # of one release's, point by point
_NO_PROTECTION = 1000.0  # above this epsilon no second figure is worth its minutes

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


@lru_cache(maxsize=512)
def pld_epsilon(
    merged: tuple[GaussianEvent, ...], delta: float, met: tuple[tuple[GaussianEvent, int], ...] = ()
) -> float:
    """Return epsilon by privacy loss distributions, never above `rdp_epsilon`.

    The loss is discretised at 1e-4, upwards; at 1e-3 where loans meet. Where noise is below about 0.85 or epsilon
    above 50 the interval widens, and above 1000, where nothing is protected, the figure is the RDP one.

    Args:
        merged: Releases that the loan is in, merged.
        delta: In (0, 1).
        met: Releases in which k loans of one borrower meet, each in a sample on its own; with k.
    """
    # a bound: loans that meet cost at most what they do if all are in whenever one is (the mixture is monotone)
    alone = tuple(_together(event, known) for event, known in met)
    bound = rdp_epsilon((*merged, *alone), delta)
    if bound == 0.0 or bound > _NO_PROTECTION:
        return bound
    release_loss = max(
        8.0 / event.noise_multiplier + 0.5 * event.noise_multiplier**-2 for event in (*merged, *alone)
    )
    finest = _PLD_INTERVAL_OF_MIXTURES if met else _PLD_INTERVAL
    interval = max(finest, bound / _PLD_POINTS, release_loss / _PLD_POINTS_PER_RELEASE)
    accountant = PLDAccountant(value_discretization_interval=interval)
    for event in merged:
        accountant.compose(_dp_event(event), event.count)
    for event, known in met:
        accountant.compose(_mixture(event, known), event.count)
    # both are upper bounds; the wide interval can make the tighter one the looser
    return min(bound, float(accountant.get_epsilon(delta)))


@lru_cache(maxsize=4096)
def rdp_epsilon(merged: tuple[GaussianEvent, ...], delta: float) -> float:
    """Return the least epsilon over `ORDERS` by Renyi differential privacy; 0.0 without releases."""
    if not merged:
        return 0.0
    epsilon, _ = compute_epsilon(ORDERS, composed_divergences(merged), delta)
    return float(epsilon)


def composed_divergences(merged: tuple[GaussianEvent, ...]) -> tuple[float, ...]:
    """Return the composition's Renyi divergence at each of `ORDERS`; inf where none is known."""
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


def _together(event: GaussianEvent, known: int) -> GaussianEvent:
    rate = 1.0 if event.sample_rate == 1.0 else -math.expm1(known * math.log1p(-event.sample_rate))
    return GaussianEvent(event.noise_multiplier / known, rate, event.count)


def _mixture(event: GaussianEvent, known: int) -> dp_event.DpEvent:
    """Return a release that `known` loans of one borrower meet in: it moves by one for each that was sampled.

    Source: Choquette-Choo, Ganesh, Steinke & Thakurta 2023, arXiv:2310.15526: vectors of at most these lengths,
    whatever their directions, are dominated by this mixture.
    """
    rate = event.sample_rate
    if rate == 1.0:
        return dp_event.GaussianDpEvent(event.noise_multiplier / known)
    shifts = range(known + 1)
    chances = [math.comb(known, shift) * rate**shift * (1.0 - rate) ** (known - shift) for shift in shifts]
    return dp_event.MixtureOfGaussiansDpEvent(
        event.noise_multiplier, [float(shift) for shift in shifts], chances
    )


def _is_not_about_an_order(record: logging.LogRecord) -> bool:
    """Silence dp_accounting about orders that it leaves out (see `ORDERS`), and nothing else."""
    return not str(record.msg).startswith("_compute_log_a_frac failed to converge")

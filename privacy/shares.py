"""Noise in shares: discrete Gaussians on the integers, each lender's part of the noise of one sum.

In mode `shared` no lender adds the whole noise. Each one rounds its clipped sum to the integers and adds a discrete
Gaussian share; the integers are summed (under secure aggregation, in a ring of 2**32), and only the sum has the
planned noise. With n lenders, of which d may drop out or tell their shares, a share has the variance of the planned
noise over n - d. A share alone protects its lender little: it must not leave without secure aggregation.

The sampler is exact, in integers from the source's 64-bit words: no float decides (Canonne, Kamath & Steinke,
"The Discrete Gaussian for Differential Privacy", NeurIPS 2020, algorithms 1 to 3). The standard deviation is a whole
number of lattice units; what is fitted to the plan is the scale, lattice units for one unit of the values.
The time a draw takes tells how many proposals were rejected, and so a little about the noise.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError, QuorumError, TrainingError

__all__ = [
    "MAX_STDDEV",
    "ShareScheme",
    "WordSource",
    "add_share",
    "discrete_gaussian",
    "encode_sum",
    "make_scheme",
    "publish",
]

MAX_STDDEV: Final = 2**30
"""Largest standard deviation of `discrete_gaussian`: twice its square must fit into 64 bits."""

RING_LIMIT: Final = 2**31 - 1
"""Largest absolute value of a sum in the ring of 2**32, read as signed."""

TAIL: Final = 16.0
"""Shares further from zero than this many standard deviations are pulled in; chance below 2 exp(-128) each."""

_MIN_UNITS_PER_ROOT: Final = 5.0  # scale * bound over sqrt(size): rounding then adds a fifth at most
# float64's own error before rounding: relative 2**-53 of sums up to 2**31, in norm and product, for 2**20 values
_ROUNDING: Final = 1.0 + 2.0**-10


class WordSource(Protocol):
    """Where the bits come from: `SecureNoise` for what leaves a lender, `SimulatedNoise` for experiments."""

    def words(self, num: int) -> NDArray[np.uint64]:
        """Return independent uniform 64-bit integers, shape (num,)."""
        ...


@dataclass(frozen=True, slots=True)
class ShareScheme:
    """How the lenders of one sum round, and how much noise each adds; public, the same at every lender.

    Attributes:
        num_lenders: Lenders that start the round, n; each must know it from a roster it trusts, since a larger n
            makes every share smaller.
        num_dropouts: How many of them may fail to answer.
        num_colluders: How many of them may tell the others their share.
        size: Length of the sum, d >= 1.
        sensitivity_bound: L2 bound of what one loan adds to a lender's sum, before rounding; > 0.
        norm_bound: L2 bound to which a lender's whole sum is scaled down; > 0.
        scale: Lattice units for one unit of the sum; > 0.
        share_stddev: Standard deviation of one lender's noise, in lattice units.
    """

    num_lenders: int
    num_dropouts: int
    num_colluders: int
    size: int
    sensitivity_bound: float
    norm_bound: float
    scale: float
    share_stddev: int

    def __post_init__(self) -> None:
        _check_cohort(self.num_lenders, self.num_dropouts, self.num_colluders)
        if not 1 <= self.share_stddev <= MAX_STDDEV or self.size < 1:
            msg = (
                f"a share's standard deviation is {self.share_stddev} lattice units for {self.size} values; it must"
                f" be 1 to {MAX_STDDEV} and there must be a value: build the scheme with make_scheme"
            )
            raise PrivacyParameterError(msg)
        for name, value in (
            ("sensitivity bound", self.sensitivity_bound),
            ("norm bound", self.norm_bound),
            ("scale", self.scale),
        ):
            if not (math.isfinite(value) and value > 0):
                msg = (
                    f"the {name} is {value}; it must be a positive number: build the scheme with make_scheme"
                )
                raise PrivacyParameterError(msg)
        if self.num_lenders * self.largest_answer > RING_LIMIT:
            msg = (
                f"{self.num_lenders} answers of up to {self.largest_answer} can pass {RING_LIMIT} and wrap;"
                " build the scheme with make_scheme"
            )
            raise PrivacyParameterError(msg)
        if self.scale * self.sensitivity_bound < _MIN_UNITS_PER_ROOT * math.sqrt(self.size):
            msg = (
                f"one loan's bound is {self.scale * self.sensitivity_bound:.3g} lattice units, so that rounding"
                f" {self.size} values would count for more than a fifth of it; lower training.weight_cap or the"
                " number of lenders, or take a smaller model"
            )
            raise PrivacyParameterError(msg)

    @property
    def num_shares(self) -> int:
        """Shares that are sure to be in a published sum and unknown to everyone: n - d."""
        return self.num_lenders - self.num_dropouts - self.num_colluders

    @property
    def min_survivors(self) -> int:
        """Answers below which the sum is not published."""
        return self.num_lenders - self.num_dropouts

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the rounded sum to one loan, in lattice units.

        Two sums at distance C are at most scale * C apart before rounding, and rounding moves each of the d
        values of each sum by at most half a unit: scale * C + sqrt(d).
        """
        return self.scale * self.sensitivity_bound * (1.0 + 1e-12) + _ROUNDING * math.sqrt(self.size)

    @property
    def noise_multiplier(self) -> float:
        """Noise that the planned shares give, as standard deviation over `sensitivity`: what accounting counts."""
        return self.share_stddev * math.sqrt(self.num_shares) / self.sensitivity

    @property
    def largest_share(self) -> int:
        """Shares are pulled in to this absolute value; the chance of it is accounted for."""
        return math.ceil(TAIL * self.share_stddev)

    @property
    def largest_answer(self) -> int:
        """Absolute value that no element of a lender's answer passes."""
        return math.ceil(self.scale * self.norm_bound) + 1 + self.largest_share


def make_scheme(
    noise_multiplier: float,
    *,
    num_lenders: int,
    num_dropouts: int,
    num_colluders: int,
    size: int,
    sensitivity_bound: float,
    norm_bound: float,
) -> ShareScheme:
    """Return the finest scheme whose sum has this noise and cannot wrap, whatever the lenders hold.

    Args:
        noise_multiplier: Standard deviation of the published sum's noise over its sensitivity after rounding, with
            the planned shares only; > 0.
        num_lenders: Lenders that start the round; >= 1.
        num_dropouts: As in `ShareScheme`; >= 0.
        num_colluders: As in `ShareScheme`; >= 0.
        size: Length of the sum; >= 1.
        sensitivity_bound: As in `ShareScheme`; > 0.
        norm_bound: As in `ShareScheme`; > 0.

    Returns:
        A scheme with `noise_multiplier` as asked or, by at most a millionth, larger.

    Raises:
        PrivacyParameterError: A value is out of range, or the ring has no room for a fine enough scale.
    """
    _check_cohort(num_lenders, num_dropouts, num_colluders)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        msg = f"the sum's noise multiplier is {noise_multiplier}; it must be a positive number"
        raise PrivacyParameterError(msg)
    # scale * C + sqrt(d) = stddev * sqrt(n - d) / multiplier, so the room for one answer,
    # scale * norm_bound + TAIL * stddev + 2, is linear in stddev
    units_per_stddev = math.sqrt(num_lenders - num_dropouts - num_colluders) / noise_multiplier
    ratio = norm_bound / sensitivity_bound
    room = RING_LIMIT // num_lenders - 4
    stddev = min(MAX_STDDEV, int(room / (units_per_stddev * ratio + TAIL)))
    units = stddev * units_per_stddev - _ROUNDING * math.sqrt(size)
    if units <= 0:
        msg = (
            f"a ring of 2**32 has no room for {size} values of {num_lenders} lenders at noise multiplier"
            f" {noise_multiplier:g}; lower training.weight_cap or the number of lenders, or take a smaller model"
        )
        raise PrivacyParameterError(msg)
    # a hair below: float64's rounding must not make the noise smaller than asked
    scale = units / sensitivity_bound * (1.0 - 1e-9)
    return ShareScheme(
        num_lenders, num_dropouts, num_colluders, size, sensitivity_bound, norm_bound, scale, stddev
    )


def encode_sum(values: NDArray[np.float64], scheme: ShareScheme) -> NDArray[np.int64]:
    """Return a lender's clipped sum on the lattice: scaled down to the norm bound, scaled, rounded to the nearest.

    Scaling down to a ball brings no two sums further apart, so one loan still adds at most the sensitivity bound.

    Args:
        values: The sum of clipped contributions, shape (scheme.size,), finite; not changed.
        scheme: The round's.

    Raises:
        TrainingError: The values have another shape or are not finite.
    """
    if values.shape != (scheme.size,) or not np.isfinite(values).all():
        msg = (
            f"the sum to be encoded has shape {values.shape} or values that are not finite; the scheme is for"
            f" ({scheme.size},) finite ones: build it for this model"
        )
        raise TrainingError(msg)
    norm = float(np.linalg.norm(values))
    factor = scheme.scale * min(1.0, scheme.norm_bound / norm if norm > 0 else 1.0)
    return np.rint(values * factor).astype(np.int64)


def add_share(encoded: NDArray[np.int64], scheme: ShareScheme, source: WordSource) -> NDArray[np.int64]:
    """Return a lender's answer: its encoded sum plus its share of the noise; absolute values cannot wrap the sum.

    Args:
        encoded: From `encode_sum`; not changed.
        scheme: The same.
        source: `SecureNoise`, checked by `require_production`, for anything that leaves a lender.
    """
    share = discrete_gaussian(encoded.size, scheme.share_stddev, source)
    return encoded + np.clip(share, -scheme.largest_share, scheme.largest_share)


def publish(total: NDArray[np.int64], num_answers: int, scheme: ShareScheme) -> NDArray[np.float64]:
    """Return the sum of the lenders' answers in the unit of their values, if it has the noise that was planned.

    Args:
        total: The answers' sum, shape (scheme.size,); not changed.
        num_answers: Lenders in the sum.
        scheme: The round's.

    Raises:
        QuorumError: So few lenders answered that the sum lacks noise, or so many that it may have wrapped.
        TrainingError: The sum has another shape, or elements that no lenders' answers add up to.
    """
    if not scheme.min_survivors <= num_answers <= scheme.num_lenders:
        msg = (
            f"{num_answers} of {scheme.num_lenders} lenders answered, and the noise of their sum was planned for"
            f" {scheme.min_survivors} to {scheme.num_lenders}; it is not published: run a new round, with fresh"
            " noise and charge, and plan for more losses with privacy.planned_dropouts"
        )
        raise QuorumError(msg)
    if total.shape != (scheme.size,) or (np.abs(total) > num_answers * scheme.largest_answer).any():
        msg = (
            f"the sum of {num_answers} answers has shape {total.shape} or elements beyond"
            f" {num_answers * scheme.largest_answer}, which no lenders' answers add up to; the round is void"
        )
        raise TrainingError(msg)
    return total / scheme.scale


def discrete_gaussian(num: int, stddev: int, source: WordSource) -> NDArray[np.int64]:
    """Return independent discrete Gaussian integers: P(k) proportional to exp(-k**2 / (2 stddev**2)).

    Args:
        num: How many; >= 0.
        stddev: The parameter, a whole number from 1 to 2**30; the standard deviation is equal to it within 1e-6.
        source: The random bits.

    Returns:
        New array, shape (num,).

    Raises:
        PrivacyParameterError: An argument is out of range.

    Source: Canonne, Kamath & Steinke 2020, algorithm 3, with t = stddev: the discrete Laplace proposal y is kept with
    chance exp(-(|y| - stddev)**2 / (2 stddev**2)).
    """
    if num < 0 or stddev != int(stddev) or not 1 <= stddev <= MAX_STDDEV:
        msg = (
            f"{num} discrete Gaussian values of standard deviation {stddev} were asked; give a number of at least 0"
            f" and a whole standard deviation from 1 to {MAX_STDDEV}"
        )
        raise PrivacyParameterError(msg)
    kept: list[NDArray[np.int64]] = []
    missing = num
    while missing > 0:
        remainder, quotient, negative = _discrete_laplace(2 * missing + 16, int(stddev), source)
        accepted = _kept_as_gaussian(remainder, quotient, int(stddev), source)
        values = remainder[accepted].astype(np.int64) + int(stddev) * quotient[accepted]
        values[negative[accepted]] *= -1
        kept.append(values[:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def _discrete_laplace(
    num: int, scale: int, source: WordSource
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return what is left of `num` proposals |y| = remainder + scale * quotient, P(y) ~ exp(-|y| / scale), and signs.

    Source: algorithm 2.
    """
    remainder = _below(scale, num, source)
    remainder = remainder[_bernoulli_exp(remainder, scale, source)]
    quotient = np.zeros(len(remainder), dtype=np.int64)
    going = np.arange(len(remainder))
    while len(going):
        going = going[_bernoulli_exp(np.ones(len(going), dtype=np.uint64), 1, source)]
        quotient[going] += 1
    negative = (source.words(len(remainder)) >> np.uint64(63)).astype(np.bool_)
    # zero would be twice as likely: once with either sign
    once = ~(negative & (remainder == 0) & (quotient == 0))
    return remainder[once], quotient[once], negative[once]


def _kept_as_gaussian(
    remainder: NDArray[np.uint64], quotient: NDArray[np.int64], stddev: int, source: WordSource
) -> NDArray[np.bool_]:
    """Keep each proposal with chance exp(-(|y| - s)**2 / (2 s**2)), |y| = remainder + s * quotient.

    The exponent is written as a sum of terms of at most one half or one, each a Bernoulli draw of its own, so that
    every numerator fits into 64 bits: with u = remainder and v = quotient - 1 >= 0 it is
    v**2 / 2 + v u / s + u**2 / (2 s**2), and (s - u)**2 / (2 s**2) where the quotient is 0.
    """
    distance = np.where(quotient == 0, np.uint64(stddev) - remainder, remainder)
    keep = _bernoulli_exp(distance * distance, 2 * stddev * stddev, source)
    above = np.maximum(quotient - 1, 0)
    for numerators, denominator, times in (
        (np.ones_like(remainder), 2, above * above),
        (remainder, stddev, above),
    ):
        left = np.where(keep, times, 0)
        going = np.flatnonzero(left)
        while len(going):
            kept = _bernoulli_exp(numerators[going], denominator, source)
            keep[going[~kept]] = False
            left[going] -= 1
            going = going[kept & (left[going] > 0)]
    return keep


def _bernoulli_exp(numerators: NDArray[np.uint64], denominator: int, source: WordSource) -> NDArray[np.bool_]:
    """Return draws that are True with chance exp(-numerator / denominator), for numerators up to the denominator.

    Source: algorithm 1. Draw k is True with chance gamma / k; the first False at an odd k means True. The chance
    gamma / k is two draws, gamma and 1 / k, so that no product leaves 64 bits.
    """
    result = np.zeros(len(numerators), dtype=np.bool_)
    going = np.arange(len(numerators))
    trial = 1
    while len(going):
        successes = _below(denominator, len(going), source) < numerators[going]
        if trial > 1:
            successes &= _below(trial, len(going), source) == 0
        result[going[~successes]] = trial % 2 == 1
        going = going[successes]
        trial += 1
    return result


def _below(limit: int, num: int, source: WordSource) -> NDArray[np.uint64]:
    """Return uniform integers in [0, limit), shape (num,), limit < 2**64; words that would bias them are redrawn."""
    words = source.words(num).copy()
    surplus = np.uint64(2**64 % limit)  # of 2**64 words, these many are more than a multiple of the limit
    biased = np.flatnonzero(words < surplus)
    while len(biased):
        words[biased] = source.words(len(biased))
        biased = biased[words[biased] < surplus]
    remainders: NDArray[np.uint64] = words % np.uint64(limit)
    return remainders


def _check_cohort(num_lenders: int, num_dropouts: int, num_colluders: int) -> None:
    if num_dropouts < 0 or num_colluders < 0 or num_lenders - num_dropouts - num_colluders < 1:
        msg = (
            f"of {num_lenders} lenders {num_dropouts} may drop out and {num_colluders} collude, so that nobody's share"
            " is sure to be in the sum and secret; lower privacy.planned_dropouts or privacy.planned_colluders, or"
            " raise cohort.min_lenders"
        )
        raise PrivacyParameterError(msg)

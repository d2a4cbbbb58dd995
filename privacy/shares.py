"""Noise in shares: each lender's part of the noise of one sum, on the integers.

In mode `shared` no lender adds the whole noise. Each one scales and rounds its clipped sum to the integers and adds
a discrete Gaussian share; the integers are summed (under secure aggregation, in a ring of 2**32), and only the sum
has the planned noise. With n lenders, of which d may drop out or tell their shares, a share has the variance of the
planned noise over n - d. A share alone protects its lender little: it must not leave without secure aggregation.

A share's standard deviation is a whole number of lattice units. What is fitted to the plan is the scale, lattice
units for one unit of the values: as fine as the ring allows, so that rounding hardly adds to the sensitivity.
Layout after Kairouz, Liu & Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation" (ICML 2021), without their rotation and random rounding, which a coarse lattice needs and this one not.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError, QuorumError, TrainingError
from fedfin.privacy.discrete_gaussian import MAX_STDDEV, WordSource, discrete_gaussian

__all__ = [
    "TAIL",
    "Cohort",
    "ShareScheme",
    "SumShape",
    "add_share",
    "encode_sum",
    "make_scheme",
    "publish",
]

RING_LIMIT: Final = 2**31 - 1
"""Largest absolute value of a sum in the ring of 2**32, read as signed."""

TAIL: Final = 20.0
"""Shares further from zero than this many standard deviations are pulled in; chance below 2 exp(-200) each."""

_MIN_UNITS_PER_ROOT: Final = 5.0  # scale * bound over sqrt(size): rounding then adds a fifth at most
# float64's own error before rounding: relative 2**-53 of sums up to 2**31, in norm and product, for 2**20 values
_ROUNDING: Final = 1.0 + 2.0**-10


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who is in a sum, and how many of them the noise does without.

    Attributes:
        num_lenders: Lenders that start the round, n. Each must know it from a roster it trusts: a larger n makes
            every share smaller.
        num_dropouts: How many of them may fail to answer; >= 0.
        num_colluders: How many of them may tell the others their share; >= 0.

    Raises:
        PrivacyParameterError: No share would be sure to be in the sum and secret.
    """

    num_lenders: int
    num_dropouts: int = 0
    num_colluders: int = 0

    def __post_init__(self) -> None:
        if self.num_dropouts < 0 or self.num_colluders < 0 or self.num_shares < 1:
            msg = (
                f"of {self.num_lenders} lenders {self.num_dropouts} may drop out and {self.num_colluders} collude, so"
                " that nobody's share is sure to be in the sum and secret; lower privacy.planned_dropouts or"
                " privacy.planned_colluders, or raise cohort.min_lenders"
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


@dataclass(frozen=True, slots=True)
class SumShape:
    """What the lenders add up.

    Attributes:
        size: Length of the sum, >= 1.
        sensitivity: L2 bound of what one loan adds to a lender's sum, in its unit; > 0.
        norm_bound: L2 norm to which a lender's whole sum is scaled down, in its unit; > 0.

    Raises:
        PrivacyParameterError: A value is out of range.
    """

    size: int
    sensitivity: float
    norm_bound: float

    def __post_init__(self) -> None:
        bounds = (self.sensitivity, self.norm_bound)
        if self.size < 1 or not all(math.isfinite(bound) and bound > 0 for bound in bounds):
            msg = (
                f"a sum of {self.size} values with sensitivity {self.sensitivity} and norm bound {self.norm_bound}"
                " has no noise; give at least one value and positive bounds"
            )
            raise PrivacyParameterError(msg)


@dataclass(frozen=True, slots=True)
class ShareScheme:
    """How the lenders of one sum round, and how much noise each adds; public, the same at every lender.

    `make_scheme` builds it. The invariant: the sum of all answers fits into the ring, whatever the lenders hold.

    Attributes:
        cohort: Who is in the sum.
        shape: What is added up.
        scale: Lattice units for one unit of the sum; > 0.
        share_stddev: Standard deviation of one lender's noise, in lattice units; 1 to `MAX_STDDEV`.

    Raises:
        PrivacyParameterError: A value is out of range, the sum could wrap, or rounding would cost too much noise.
    """

    cohort: Cohort
    shape: SumShape
    scale: float
    share_stddev: int

    def __post_init__(self) -> None:
        if not 1 <= self.share_stddev <= MAX_STDDEV or not 0 < self.scale < math.inf:
            msg = (
                f"a share's standard deviation is {self.share_stddev} lattice units at scale {self.scale}; the first"
                f" must be 1 to {MAX_STDDEV}, the second positive: build the scheme with make_scheme"
            )
            raise PrivacyParameterError(msg)
        if self.cohort.num_lenders * self.largest_answer > RING_LIMIT:
            msg = (
                f"{self.cohort.num_lenders} answers of up to {self.largest_answer} can pass {RING_LIMIT} and wrap;"
                " build the scheme with make_scheme"
            )
            raise PrivacyParameterError(msg)
        units = self.scale * self.shape.sensitivity
        if units < _MIN_UNITS_PER_ROOT * math.sqrt(self.shape.size):
            msg = (
                f"one loan's bound is {units:.3g} lattice units, so that rounding {self.shape.size} values would add"
                " more than a fifth to it; lower training.weight_cap or the number of lenders, or take a smaller model"
            )
            raise PrivacyParameterError(msg)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the rounded sum to one loan, in lattice units.

        Two sums at distance C are at most scale * C apart before rounding, and rounding moves each of the d
        values of each sum by at most half a unit: scale * C + sqrt(d).
        """
        return self.scale * self.shape.sensitivity * (1.0 + 1e-12) + _ROUNDING * math.sqrt(self.shape.size)

    @property
    def noise_multiplier(self) -> float:
        """Noise that the planned shares give, as standard deviation over `sensitivity`: what accounting counts."""
        return self.share_stddev * math.sqrt(self.cohort.num_shares) / self.sensitivity

    @property
    def largest_share(self) -> int:
        """Shares are pulled in to this absolute value; the chance of it is accounted for."""
        return math.ceil(TAIL * self.share_stddev)

    @property
    def largest_answer(self) -> int:
        """Absolute value that no element of a lender's answer passes."""
        return math.ceil(self.scale * self.shape.norm_bound) + 1 + self.largest_share


def make_scheme(noise_multiplier: float, cohort: Cohort, shape: SumShape) -> ShareScheme:
    """Return the finest scheme whose sum has this noise and cannot wrap, whatever the lenders hold.

    Args:
        noise_multiplier: Standard deviation of the published sum's noise over its sensitivity after rounding, with
            the planned shares only; > 0.
        cohort: Who is in the sum.
        shape: What is added up.

    Returns:
        A scheme with `noise_multiplier` as asked or, by at most a millionth, larger.

    Raises:
        PrivacyParameterError: A value is out of range, or the ring has no room for a fine enough scale.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        msg = f"the sum's noise multiplier is {noise_multiplier}; it must be a positive number"
        raise PrivacyParameterError(msg)
    # scale * C + sqrt(d) = stddev * sqrt(n - d) / multiplier, so the room that one answer takes,
    # scale * norm_bound + TAIL * stddev + 4, is linear in stddev
    units_per_stddev = math.sqrt(cohort.num_shares) / noise_multiplier
    room = RING_LIMIT // cohort.num_lenders - 4
    stddev = min(MAX_STDDEV, int(room / (units_per_stddev * shape.norm_bound / shape.sensitivity + TAIL)))
    units = stddev * units_per_stddev - _ROUNDING * math.sqrt(shape.size)
    if stddev < 1 or units <= 0:
        msg = (
            f"a ring of 2**32 has no room for {shape.size} values of {cohort.num_lenders} lenders at noise multiplier"
            f" {noise_multiplier:g}; lower training.weight_cap or the number of lenders, or take a smaller model"
        )
        raise PrivacyParameterError(msg)
    # a hair below: float64's rounding must not make the noise smaller than asked
    return ShareScheme(cohort, shape, units / shape.sensitivity * (1.0 - 1e-9), stddev)


def encode_sum(values: NDArray[np.float64], scheme: ShareScheme) -> NDArray[np.int64]:
    """Return a lender's clipped sum on the lattice: scaled down to the norm bound, scaled, rounded to the nearest.

    Scaling down to a ball brings no two sums further apart, so one loan still adds at most the sensitivity bound.

    Args:
        values: The sum of clipped contributions, shape (scheme.shape.size,), finite; not changed.
        scheme: The round's.

    Raises:
        TrainingError: The values have another shape or are not finite.
    """
    if values.shape != (scheme.shape.size,) or not np.isfinite(values).all():
        msg = (
            f"the sum to be encoded has shape {values.shape} or values that are not finite; the scheme is for"
            f" ({scheme.shape.size},) finite ones: build it for this model"
        )
        raise TrainingError(msg)
    norm = float(np.linalg.norm(values))
    factor = scheme.scale * min(1.0, scheme.shape.norm_bound / norm if norm > 0 else 1.0)
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
        total: The answers' sum, shape (scheme.shape.size,); not changed.
        num_answers: Lenders in the sum.
        scheme: The round's.

    Raises:
        QuorumError: So few lenders answered that the sum lacks noise, or so many that it may have wrapped.
        TrainingError: The sum has another shape, or elements that no lenders' answers add up to.
    """
    fewest, most = scheme.cohort.min_survivors, scheme.cohort.num_lenders
    if not fewest <= num_answers <= most:
        msg = (
            f"{num_answers} of {most} lenders answered, and the noise of their sum was planned for {fewest} to {most};"
            " it is not published: run a new round, with fresh noise and charge, and plan for more losses with"
            " privacy.planned_dropouts"
        )
        raise QuorumError(msg)
    if total.shape != (scheme.shape.size,) or (np.abs(total) > num_answers * scheme.largest_answer).any():
        msg = (
            f"the sum of {num_answers} answers has shape {total.shape} or elements beyond"
            f" {num_answers * scheme.largest_answer}, which no lenders' answers add up to; the round is void. Find"
            " who sent it with the lenders and run `fedfin server remove NAME`, then `fedfin server --new-job`, whose"
            " roster each lender's engineer approves: of this model this job may ask the same lenders only"
        )
        raise TrainingError(msg)
    return total / scheme.scale

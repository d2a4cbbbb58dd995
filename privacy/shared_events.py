"""Sums whose noise comes in shares, as events for the accountant, and how far they are from continuous noise.

The claim. T rounds publish Q = v + Z, with v an integer vector of d values that one loan moves by at most Delta (L2),
and Z the sum of h discrete Gaussian shares of standard deviation sigma: those of the planned lenders less the planned
drop-outs and colluders (colluders subtract theirs; shares of lenders that did not drop out are independent noise on
top, which is post-processing). Let s**2 = h sigma**2, and let G be the same T rounds with continuous noise N(0, s**2)
on v, Poisson-sampled alike, which is (e, g)-DP by the usual accounting at noise multiplier s / Delta. Then the rounds
are (e + 2 H, exp(H) g + D (1 + exp(H + e)))-DP, where H = T eta and D = T zeta are:

1. Shares are pulled in at TAIL sigma. A discrete Gaussian is subgaussian (Canonne, Kamath & Steinke 2020, section 2),
   so with n lenders the sum differs from the sum of plain shares with chance at most 2 n d exp(-TAIL**2 / 2) =: c.
2. A sum of h discrete Gaussians against one, W, of variance s**2: the log ratio of the two probabilities is at most
   a = 5 sum over k < h of exp(-2 pi**2 sigma**2 k / (k + 1)) in each coordinate (Kairouz, Liu & Steinke 2021, the
   convolution theorem of section 3; their tau = 10 sum counts both neighbours, as the factor 2 of H does here).
3. W against R, the Gaussian rounded to the nearest integer. With f(k) = exp(-k**2 / (2 s**2)):
   P(R = k) / f(k) is proportional to the integral of exp(-k u / s**2 - u**2 / (2 s**2)) over |u| < 1/2, which is
   exp(-theta) sinh(x) / x with x = k / (2 s**2) and 0 <= theta <= 1 / (8 s**2); 0 <= log(sinh(x) / x) <= x**2 / 6;
   and by Poisson summation the normalising constants differ by a factor from 1 to 1 + 3 exp(-2 pi**2 s**2), s >= 1.
   So log P(R)/P(W) lies, over d coordinates, between -d / (8 s**2) - 3 d exp(-2 pi**2 s**2) and |k|**2 / (24 s**4) and
   as much. Where R comes from N(0, s**2), |k| <= |N| + sqrt(d) / 2, and |N|**2 <= s**2 (2 d + 3 t) but with chance
   exp(-t) (Laurent & Massart 2000, lemma 1): the upper end is at most (d + t) / (4 s**2) for s >= 1.
4. R on an integer v is the rounded sum v + N, so what is published is post-processing of G's. Given the batch of the
   other loans, the sampled mechanism is a mixture of two shifts, for each of which 1 to 3 hold; so they hold for it.

1 to 3 make each round (eta, zeta)-close to a round of rounded G in both directions, with eta = d a +
(d + t) / (4 s**2) + 3 d exp(-2 pi**2 s**2) and zeta = 2 (c + exp(-t)) as long as eta <= 1/2; T rounds, each chosen
after the last, are (H, D)-close (basic composition), and the claim is the chain close, G's guarantee, close. With
lattices as fine as `shares.make_scheme` takes, 2 H is about 1e-8 and D below 1e-80.

A check on it: at whole Renyi orders the divergences of the sampled W are exactly those of the sampled Gaussian, since
sum f(k - j w) over the lattice is the same for all integer vectors j w.
"""

import math
from dataclasses import dataclass

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.gaussian_event import GaussianEvent
from fedfin.privacy.shares import TAIL, ShareScheme

__all__ = ["SharedNoiseEvent", "shared_event"]

_LOG_CHANCE = 200.0  # t: the chance exp(-t) of a sum too far out for step 3
_MAX_ETA = 0.5


@dataclass(frozen=True, slots=True, order=True)
class SharedNoiseEvent:
    """`count` sums under noise in shares, on Poisson samples of the loans or on all of them.

    Attributes:
        noise_multiplier: Standard deviation of the planned shares' sum over the sensitivity after rounding.
        sample_rate: Chance of each of this lender's loans to be in a sum, in (0, 1].
        count: Sums; >= 1.
        size: Values of a sum; >= 1.
        share_stddev: Standard deviation of one share, in lattice units; >= 1.
        num_shares: Shares that are sure and secret; >= 1.
        num_lenders: Lenders whose shares may be in the sum; >= num_shares.

    Raises:
        PrivacyParameterError: A value is out of range, or the lattice is too coarse for the accounting.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    size: int
    share_stddev: int
    num_shares: int
    num_lenders: int

    def __post_init__(self) -> None:
        GaussianEvent(
            self.noise_multiplier, self.sample_rate, self.count
        )  # refuses what cannot be accounted for
        least = min(self.size, self.share_stddev, self.num_shares)
        if least < 1 or self.num_lenders < self.num_shares or self.round_gap[0] > _MAX_ETA:
            msg = (
                f"noise of {self.num_shares} shares of {self.num_lenders} lenders, of standard deviation"
                f" {self.share_stddev} each, on {self.size} values is too coarse to be accounted for; lower"
                " training.weight_cap or take a smaller model, so that the lattice can be finer"
            )
            raise PrivacyParameterError(msg)

    @property
    def mechanism(self) -> str:
        """The mechanism's name in the ledger."""
        return "discrete_gaussian_shares"

    @property
    def sampler(self) -> str:
        """How a sum's sample is drawn: "poisson", or "none" when it takes all loans."""
        return self.gaussian.sampler

    @property
    def relation(self) -> str:
        """The neighbouring relation of every figure: two tables differ by one loan added or removed."""
        return self.gaussian.relation

    @property
    def gaussian(self) -> GaussianEvent:
        """The same sums with continuous noise, to which the claim relates them."""
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.count)

    @property
    def round_gap(self) -> tuple[float, float]:
        """How far one sum is from its continuous counterpart, as (eta, zeta) of the module's claim."""
        share_variance, variance = (
            float(self.share_stddev) ** 2,
            float(self.share_stddev) ** 2 * self.num_shares,
        )
        convolution = 5.0 * sum(
            math.exp(-2.0 * math.pi**2 * share_variance * k / (k + 1)) for k in range(1, self.num_shares)
        )
        normaliser = 3.0 * math.exp(-2.0 * math.pi**2 * variance)
        eta = self.size * (convolution + normaliser) + (self.size + _LOG_CHANCE) / (4.0 * variance)
        pulled_in = 2.0 * self.num_lenders * self.size * math.exp(-0.5 * TAIL**2)
        return eta, 2.0 * (pulled_in + math.exp(-_LOG_CHANCE))


def shared_event(scheme: ShareScheme, *, sample_rate: float = 1.0, count: int = 1) -> SharedNoiseEvent:
    """Return the event of `count` sums under a scheme.

    Raises:
        PrivacyParameterError: As `SharedNoiseEvent`.
    """
    return SharedNoiseEvent(
        scheme.noise_multiplier,
        sample_rate,
        count,
        scheme.shape.size,
        scheme.share_stddev,
        scheme.cohort.num_shares,
        scheme.cohort.num_lenders,
    )

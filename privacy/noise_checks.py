"""Is the noise what the ledger charges for: of the planned scale, Gaussian, and never used twice?

Each check is a statement with an allowance that honest noise passes except with the given chance, by an inequality
that holds for every sample size. The noise is given in units of its planned standard deviation.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.lower_bounds import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "Check",
    "between_check",
    "everywhere_check",
    "lag_check",
    "repeat_check",
    "scale_check",
    "shape_check",
    "tail_check",
    "within_check",
]

_NUM_IN_TAILS: Final = 50
_MOST_VECTORS: Final = 1000  # of a lender, compared pair by pair; exact repeats are sought among all


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the code that was run.

    Attributes:
        name: What was looked at.
        holds: Whether the code passed.
        measured: The figure.
        allowed: What honest code stays within, except with the check's share of the error.
        text: The statement in words.
    """

    name: str
    holds: bool
    measured: float
    allowed: float
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the check for a JSON document."""
        return {
            "name": self.name,
            "holds": self.holds,
            "measured": self.measured,
            "allowed": self.allowed,
            "text": self.text,
        }


def scale_check(noise: "NDArray[np.float64]", error: float) -> Check:
    """Check that the noise's standard deviation is the planned one.

    Args:
        noise: Any shape, over the planned standard deviation; at least 100 values.
        error: Chance that honest noise fails, in (0, 1).

    Source: Laurent & Massart 2000, lemma 1, tails of a chi-square variable.
    """
    num = _enough(noise)
    half = math.log(2.0 / error)
    ratio = math.sqrt(float(np.mean(np.square(noise))))
    low = math.sqrt(max(0.0, 1.0 - 2.0 * math.sqrt(half / num)))
    high = math.sqrt(1.0 + 2.0 * math.sqrt(half / num) + 2.0 * half / num)
    text = (
        f"the noise's standard deviation is {ratio:.4f} of the planned one; {low:.4f} to {high:.4f} is chance"
    )
    return Check("noise scale", low <= ratio <= high, ratio, low, text)


def everywhere_check(noise: "NDArray[np.float64]", error: float) -> Check:
    """Check that every single value of a release has noise of about the planned standard deviation.

    Args:
        noise: Over the planned standard deviation, shape (releases, values): all values of a release, also those in
            which loans have something.
        error: Chance that honest noise fails, in (0, 1).

    Source: Laurent & Massart 2000, lemma 1, for each value.
    """
    num, num_values = noise.shape
    half = math.log(2.0 * num_values / error)
    ratios = np.sqrt(np.mean(np.square(noise), axis=0))
    low = math.sqrt(max(0.0, 1.0 - 2.0 * math.sqrt(half / num)))
    high = math.sqrt(1.0 + 2.0 * math.sqrt(half / num) + 2.0 * half / num)
    least, most = float(ratios.min()), float(ratios.max())
    text = (
        f"the noise of each of the {num_values} values of a step has {least:.3f} to {most:.3f} of the planned standard"
        f" deviation; {low:.3f} to {high:.3f} is chance"
    )
    return Check("noise everywhere", low <= least and most <= high, least, low, text)


def shape_check(noise: "NDArray[np.float64]", error: float) -> Check:
    """Check that the noise is distributed as the planned Gaussian.

    Args:
        noise: Any shape, over the planned standard deviation; at least 100 values.
        error: Chance that honest noise fails, in (0, 1).

    Source: Massart 1990, the Dvoretzky-Kiefer-Wolfowitz inequality.
    """
    num = _enough(noise)
    levels = np.linspace(0.0, 1.0, 2001)[1:-1]
    points = np.array([NormalDist().inv_cdf(level) for level in levels])
    shares = np.searchsorted(np.sort(noise, axis=None), points, side="right") / num
    distance = float(np.abs(shares - levels).max())
    allowed = math.sqrt(math.log(2.0 / error) / (2.0 * num))
    text = f"the noise's distribution is {distance:.5f} from the Gaussian; up to {allowed:.5f} is chance"
    return Check("noise shape", distance <= allowed, distance, allowed, text)


def tail_check(noise: "NDArray[np.float64]", error: float) -> Check:
    """Check that the noise reaches as far out as a Gaussian does: what delta stands for lies there.

    Noise cut off at three standard deviations has almost the scale and the shape of whole noise.

    Args:
        noise: Any shape, over the planned standard deviation; at least 100 values.
        error: Chance that honest noise fails, in (0, 1).

    Source: Clopper & Pearson 1934, at the level beyond which 50 values are expected.
    """
    num = _enough(noise)
    chance = _NUM_IN_TAILS / num
    level = NormalDist().inv_cdf(1.0 - chance / 2.0)
    count = int((np.abs(noise) > level).sum())
    low, high = clopper_pearson(count, num, error / 2.0)
    text = (
        f"{count} of {num} values of the noise are more than {level:.2f} standard deviations out; {_NUM_IN_TAILS} are"
        " expected"
    )
    return Check("noise tails", low <= chance <= high, float(count), float(_NUM_IN_TAILS), text)


def repeat_check(lenders: "Sequence[NDArray[np.float64]]") -> Check:
    """Check that no step's noise equals another's to the last bit, at this lender or at another one.

    Args:
        lenders: Each one's noise, shape (steps, values).
    """
    seen = [step.tobytes() for noise in lenders for step in noise]
    repeated = len(seen) - len(set(seen))
    text = f"{repeated} of {len(seen)} steps have the very noise of another step"
    return Check("noise repeated", repeated == 0, float(repeated), 0.0, text)


def within_check(lenders: "Sequence[NDArray[np.float64]]", error: float) -> Check:
    """Check that the noise of any two steps of one lender, of one round or of two, is uncorrelated.

    Args:
        lenders: Each one's noise in units of the planned standard deviation, shape (steps, values), steps >= 2.
        error: Chance that honest noise fails, in (0, 1).
    """
    vectors = [_first_and_last(noise) for noise in lenders]
    pairs = sum(len(noise) * (len(noise) - 1) // 2 for noise in vectors)
    largest = 0.0
    for noise in vectors:
        products = np.abs(noise @ noise.T)
        np.fill_diagonal(products, 0.0)
        largest = max(largest, float(products.max()))
    return _pairs_check("noise across steps and rounds", largest, vectors[0].shape[1], pairs, error)


def between_check(first: "NDArray[np.float64]", second: "NDArray[np.float64]", error: float) -> Check:
    """Check that the noise of any step of one lender is uncorrelated with any of another lender's.

    Args:
        first: One lender's, in units of the planned standard deviation, shape (steps, values).
        second: Another's.
        error: Chance that honest noise fails, in (0, 1).
    """
    one, other = _first_and_last(first), _first_and_last(second)
    largest = float(np.abs(one @ other.T).max())
    return _pairs_check("noise across lenders", largest, one.shape[1], len(one) * len(other), error)


def lag_check(lenders: "Sequence[NDArray[np.float64]]", error: float) -> Check:
    """Check that no stretch of the noise comes again, at any distance: in a step, later, or at another lender.

    Args:
        lenders: Each one's noise in units of the planned standard deviation, shape (steps, values).
        error: Chance that honest noise fails, in (0, 1).

    Returns:
        The sum of products at the worst distance, over what it may be by chance: at most 1.

    Source: two sums of products of independent Gaussians make one of overlapping stretches (Cauchy-Schwarz on the
        moment generating function), so it is sub-gamma with variance 2 n and scale 2 (Boucheron, Lugosi & Massart
        2013, section 2.4).
    """
    streams = [noise.ravel() for noise in lenders]
    size = 2 * max(len(stream) for stream in streams)
    spectra = [np.fft.rfft(stream, size) for stream in streams]
    half = math.log(2.0 * size * len(streams) ** 2 / error)
    worst = 0.0
    for position, spectrum in enumerate(spectra):
        for later in range(position, len(spectra)):
            products = np.fft.irfft(spectrum * np.conj(spectra[later]), size)
            distance = np.minimum(np.arange(size), size - np.arange(size))
            overlap = np.maximum(len(streams[later]) - distance, 1)
            ratio = np.abs(products) / (np.sqrt(4.0 * overlap * half) + 2.0 * half)
            worst = max(worst, float(ratio[1:].max() if later == position else ratio.max()))
    text = f"at every distance the noise's products sum to at most {worst:.2f} of what chance allows"
    return Check("noise at any distance", worst <= 1.0, worst, 1.0, text)


def _pairs_check(name: str, largest: float, num_values: int, num_pairs: int, error: float) -> Check:
    """Judge the largest of `num_pairs` products of two independent vectors: sub-gamma, variance n and scale 1."""
    half = math.log(2.0 * num_pairs / error)
    correlation = largest / num_values
    allowed = (math.sqrt(2.0 * num_values * half) + half) / num_values
    text = (
        f"the largest correlation of {num_pairs} pairs of noise vectors is {correlation:.3f}; up to {allowed:.3f} is"
        " chance"
    )
    return Check(name, correlation <= allowed, correlation, allowed, text)


def _first_and_last(noise: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return all vectors, or the first and the last of them where there are too many for all pairs."""
    half = _MOST_VECTORS // 2
    return noise if len(noise) <= _MOST_VECTORS else np.concatenate([noise[:half], noise[-half:]])


def _enough(noise: "NDArray[np.float64]") -> int:
    if noise.size < 100 or not np.isfinite(noise).all():
        msg = f"the {noise.size} values of noise that were observed are too few or not finite; the audit needs 100"
        raise PrivacyParameterError(msg)
    return noise.size

"""Discrete Gaussian noise on the integers, exact: no float decides, so no low bit of one can tell anything.

The sampler is that of Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy" (NeurIPS 2020),
algorithms 1 to 3, on whole arrays, fed with uniform 64-bit words. The standard deviation is a whole number; that and
a sum of small exponents keep every numerator and denominator within 64 bits. The time that a draw takes depends a
little on the values drawn; like all timing here it is not protected.
"""

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError

__all__ = ["MAX_STDDEV", "WordSource", "discrete_gaussian"]

MAX_STDDEV: Final = 2**30
"""Largest standard deviation: twice its square must fit into 64 bits."""


class WordSource(Protocol):
    """Where the bits come from: `SecureNoise` for what leaves a lender, `SimulatedNoise` for experiments."""

    def words(self, num: int) -> NDArray[np.uint64]:
        """Return independent uniform 64-bit integers, shape (num,)."""
        ...


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

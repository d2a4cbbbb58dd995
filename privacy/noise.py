"""Noise and batch draws: a production source that nobody can seed, a simulated one that production refuses.

Production noise comes from an AES-256-CTR keystream under a key that never leaves the object. Each sample
is the normalised sum of four independent Gaussians, so that the low bits of a released float no longer
tell which value the noise was added to (Mironov 2012, "On significance of the least significant bits";
Holohan & Braghin 2021, "Secure random sampling in differential privacy", section 5.1). Why floats and not
discrete noise, and why one angle may serve two samples: docs/decisions/0011.
"""

import math
import os
import secrets
from typing import NoReturn, Protocol, TypeAlias, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError

__all__ = ["NoiseSource", "SecureNoise", "Shape", "SimulatedNoise", "require_production"]

Shape: TypeAlias = int | tuple[int, ...]

_PAIRS = 2048  # pairs of samples at a time: the block's arrays stay in the second-level cache
_NUM_SUMMANDS = 4
_WORDS = 2 * _NUM_SUMMANDS  # a radius and an angle for each summand of a pair
_ZEROS = bytes(8 * _WORDS * _PAIRS)  # what is encrypted: the keystream itself comes out
_TAIL = 15  # update_into asks for room for a block of AES less one byte beyond the data


_num_forks = 0  # between this process and the one that imported this module


def _count_fork() -> None:
    global _num_forks  # noqa: PLW0603  (one per process, as its number is)
    _num_forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_count_fork)


def _process() -> tuple[int, int]:
    # the number alone can be the parent's: in a namespace of its own, or used again after the parent's end
    return os.getpid(), _num_forks


class NoiseSource(Protocol):
    """Where noise and batches come from; an argument of everything that draws."""

    def normal(self, size: Shape, stddev: float) -> NDArray[np.float64]:
        """Return independent N(0, stddev**2) values of shape `size`, in the unit of `stddev`."""
        ...

    def bernoulli(self, num: int, rate: float) -> NDArray[np.bool_]:
        """Return a Poisson-sampled batch: shape (num,), each True with chance `rate`, independently."""
        ...

    def words(self, num: int) -> NDArray[np.uint64]:
        """Return independent uniform 64-bit integers, shape (num,): what exact integer noise is made of."""
        ...


@final
class SecureNoise:
    """Noise for release: a fresh 256-bit key for each object, no seed, no copy, no pickle.

    After a fork the child draws a key of its own, so that parent and child never share noise. One object
    serves one thread.
    """

    __slots__ = ("_keystream", "_process")

    def __init__(self) -> None:
        self._rekey()

    def __repr__(self) -> str:
        return "SecureNoise()"

    def __reduce__(self) -> NoReturn:
        msg = "SecureNoise cannot be pickled or copied: a copy would repeat its noise; make a new one instead"
        raise TypeError(msg)

    def normal(self, size: Shape, stddev: float) -> NDArray[np.float64]:
        """Return Gaussian noise from the keystream.

        Args:
            size: Shape of the result; dimensions >= 0.
            stddev: Standard deviation, in the unit of the values it will be added to; finite, >= 0.

        Returns:
            New array of shape `size`, float64, finite.

        Raises:
            PrivacyParameterError: `stddev` or `size` is out of range, or the noise overflows.

        Source: Box & Muller 1958; sum of four, Holohan & Braghin 2021.
        """
        num = _checked_size(size)
        _check_stddev(stddev)
        noise = np.empty(num + num % 2)
        self._fill_with_sums(noise)
        # the sum of four unit Gaussians has standard deviation 2
        noise *= stddev / math.sqrt(_NUM_SUMMANDS)
        _check_finite(noise, stddev)
        return noise[:num].reshape(size)

    def bernoulli(self, num: int, rate: float) -> NDArray[np.bool_]:
        """Return a Poisson-sampled batch from the keystream; who is in it is as secret as the noise.

        Args:
            num: Number of records; >= 0.
            rate: Chance of each record, in (0, 1]; exact to 2**-53.

        Returns:
            Mask of shape (num,).

        Raises:
            PrivacyParameterError: `num` or `rate` is out of range.
        """
        _checked_size(num)
        _check_rate(rate)
        if rate == 1.0:
            return np.ones(num, dtype=np.bool_)
        words = self._words(num, np.empty(8 * num + _TAIL, dtype=np.uint8))
        words >>= np.uint64(11)
        return words < rate * 2.0**53

    def words(self, num: int) -> NDArray[np.uint64]:
        """Return uniform 64-bit integers from the keystream, shape (num,).

        Raises:
            PrivacyParameterError: `num` is negative.
        """
        _checked_size(num)
        return self._words(num, np.empty(8 * num + _TAIL, dtype=np.uint8))

    def _fill_with_sums(self, noise: NDArray[np.float64]) -> None:
        """Write sums of four unit Gaussians, of variance 4, into `noise`, whose length is even."""
        size = min(_PAIRS, len(noise) // 2)
        # once for all blocks: fresh memory for each would cost as much as the arithmetic
        stream = np.empty(8 * _WORDS * size + _TAIL, dtype=np.uint8)
        scratch = np.empty(_NUM_SUMMANDS * size)
        for start in range(0, len(noise), 2 * _PAIRS):
            block = noise[start : start + 2 * _PAIRS]
            pairs = len(block) // 2
            num = _NUM_SUMMANDS * pairs
            words = self._words(2 * num, stream)
            words >>= np.uint64(11)
            uniforms = words.view(np.float64)
            np.multiply(words, 2.0**-53, out=uniforms)  # in place: both are 64 bits wide
            radii, tangents, squares = uniforms[:num], uniforms[num:], scratch[:num]
            np.subtract(1.0, radii, out=radii)  # exact, and in (0, 1], for the logarithm
            np.log(radii, out=radii)
            radii *= -2.0
            np.sqrt(radii, out=radii)
            # cosine and sine by the half-angle's tangent: numpy vectorises tan and not cos, five times faster
            tangents *= math.pi
            np.tan(tangents, out=tangents)
            np.multiply(tangents, tangents, out=squares)
            squares += 1.0
            radii /= squares
            np.subtract(2.0, squares, out=squares)
            squares *= radii  # radius * cosine
            tangents *= radii  # radius * sine / 2
            # The cosines make one sample and the sines another, never both one: in one sum each angle's two
            # Gaussians would collapse into one, and four into two.
            np.add.reduce(squares.reshape(_NUM_SUMMANDS, pairs), axis=0, out=block[:pairs])
            np.add.reduce(tangents.reshape(_NUM_SUMMANDS, pairs), axis=0, out=block[pairs:])
            block[pairs:] *= 2.0

    def _words(self, num: int, stream: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Return uniform 64-bit words, shape (num,), written into `stream`, which has `_TAIL` bytes more."""
        if _process() != self._process:
            self._rekey()
        zeros, room = memoryview(_ZEROS), stream.data
        for start in range(0, 8 * num, len(_ZEROS)):
            self._keystream.update_into(zeros[: 8 * num - start], room[start:])
        return stream[: 8 * num].view(np.uint64)

    def _rekey(self) -> None:
        self._keystream: CipherContext = Cipher(AES(secrets.token_bytes(32)), CTR(bytes(16))).encryptor()
        self._process = _process()


@final
class SimulatedNoise:
    """Seeded noise for experiments, which must be repeatable; `require_production` refuses it."""

    __slots__ = ("_rng",)

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __repr__(self) -> str:
        return "SimulatedNoise()"

    def normal(self, size: Shape, stddev: float) -> NDArray[np.float64]:
        """Return seeded N(0, stddev**2) values; arguments and errors as `SecureNoise.normal`."""
        _checked_size(size)
        _check_stddev(stddev)
        noise = self._rng.standard_normal(size) * stddev
        _check_finite(noise, stddev)
        return noise

    def bernoulli(self, num: int, rate: float) -> NDArray[np.bool_]:
        """Return a seeded Poisson-sampled batch; arguments and errors as `SecureNoise.bernoulli`."""
        _checked_size(num)
        _check_rate(rate)
        return self._rng.random(num) < rate

    def words(self, num: int) -> NDArray[np.uint64]:
        """Return seeded uniform 64-bit integers; arguments and errors as `SecureNoise.words`."""
        _checked_size(num)
        return self._rng.integers(0, 2**64, num, dtype=np.uint64)


def require_production(source: NoiseSource) -> SecureNoise:
    """Return `source` if its noise may protect a release.

    Raises:
        PrivacyParameterError: `source` is anything but a `SecureNoise`.
    """
    if type(source) is not SecureNoise:
        msg = (
            f"the noise source is a {type(source).__name__}, which can be seeded or is unknown, so what it"
            " protects can be undone; pass SecureNoise() for anything that leaves a lender"
        )
        raise PrivacyParameterError(msg)
    return source


def _checked_size(size: Shape) -> int:
    dimensions = size if isinstance(size, tuple) else (size,)
    if any(dimension < 0 for dimension in dimensions):
        msg = f"the noise's size is {size}; every dimension must be at least 0"
        raise PrivacyParameterError(msg)
    return math.prod(dimensions)


def _check_stddev(stddev: float) -> None:
    if not (0.0 <= stddev < math.inf):
        msg = f"the noise's standard deviation is {stddev}; it must be finite and at least 0"
        raise PrivacyParameterError(msg)


def _check_rate(rate: float) -> None:
    if not (0.0 < rate <= 1.0):
        msg = f"training.sample_rate is {rate}; the chance of a loan to be in a batch must be in (0, 1]"
        raise PrivacyParameterError(msg)


def _check_finite(noise: NDArray[np.float64], stddev: float) -> None:
    if not np.isfinite(noise).all():
        msg = f"noise with standard deviation {stddev} is not finite; lower privacy.clipping_bound"
        raise PrivacyParameterError(msg)

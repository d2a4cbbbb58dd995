"""The auditor's noise sources: one that remembers who was drawn, and one that is silent. Neither serves a release."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.privacy.noise import NoiseSource, Shape

__all__ = ["Silence", "WatchedDraws"]


class WatchedDraws:
    """A noise source that hands on another's noise and remembers who was drawn last."""

    def __init__(self, noise: "NoiseSource") -> None:
        self._noise = noise
        self._last: NDArray[np.bool_] | None = None

    def drawn(self, num: int) -> "NDArray[np.bool_]":
        """Return the draw since the last call, shape (num,); all, where the code drew nobody by this source."""
        last, self._last = self._last, None
        return last if last is not None and len(last) == num else np.ones(num, np.bool_)

    def normal(self, size: "Shape", stddev: float) -> "NDArray[np.float64]":
        """Return the other's noise."""
        return self._noise.normal(size, stddev)

    def bernoulli(self, num: int, rate: float) -> "NDArray[np.bool_]":
        """Return the other's draw, and remember it."""
        self._last = self._noise.bernoulli(num, rate)
        return self._last

    def words(self, num: int) -> "NDArray[np.uint64]":
        """Return the other's words."""
        return self._noise.words(num)


class Silence:
    """No noise, and everybody drawn: for the clipping alone, on a table that is thrown away."""

    def normal(self, size: "Shape", stddev: float) -> "NDArray[np.float64]":
        """Return zeros."""
        del stddev
        return np.zeros(size)

    def bernoulli(self, num: int, rate: float) -> "NDArray[np.bool_]":
        """Return that everybody is drawn."""
        del rate
        return np.ones(num, np.bool_)

    def words(self, num: int) -> "NDArray[np.uint64]":
        """Return zeros."""
        return np.zeros(num, np.uint64)

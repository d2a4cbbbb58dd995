"""Numbers as elements of a ring, so that a secure sum is exact: fixed point, laid out in named segments.

Each lender clips every value to its segment's bound and rounds it to a whole number of quanta (steps), held as a
signed integer in two's complement. No value of a lender passes (2**(bits - 1) - 1) // n quanta, so the sum of n
lenders cannot wrap, whatever they hold. Its decoding is exact: the sum of the rounded values, to the last bit.

The ring is 2**32, or 2**24 where the quantum that 24 bits give is fine enough; then words travel in 3 bytes. Masks
are computed in 32 bits either way: 2**24 divides 2**32, so the low 24 bits of the sum are right.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError, TrainingError
from fedfin.privacy.discrete_gaussian import WordSource
from fedfin.privacy.sum_rules import refusal

__all__ = ["RING_BITS", "Layout", "Segment", "pack", "unpack"]

RING_BITS: Final = (24, 32)
"""The two rings, by the bits of a word."""

_BLOCK: Final = 2**16  # values encoded at a time: their float64 copies stay in the second-level cache
_LOW_24: Final = np.uint32(2**24 - 1)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of values with one meaning in the vector.

    Attributes:
        name: What it holds.
        size: Number of values, >= 1.
        bound: Values are clipped to this absolute value, in their unit; > 0.
        step: The quantum, in the values' unit: they are rounded to multiples of it; > 0, at most `bound`. 1.0 for
            counts, which stay exact.
    """

    name: str
    size: int
    bound: float
    step: float

    @property
    def largest(self) -> int:
        """Largest absolute value of a lender's element, in quanta: `bound`, to the nearest."""
        return round(self.bound / self.step)


@dataclass(frozen=True, slots=True)
class Layout:
    """What each element of a summed vector means; the same at every lender and the coordinator.

    Attributes:
        segments: In the vector's order, with different names.
        num_lenders: Lenders of the cohort, n: so many vectors of the largest values do not wrap.
        ring_bits: 24 or 32.

    Raises:
        PrivacyParameterError: A value is out of range, or the sum could wrap.
    """

    segments: tuple[Segment, ...]
    num_lenders: int
    ring_bits: int = 32

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if (
            not names
            or len(set(names)) != len(names)
            or self.num_lenders < 1
            or self.ring_bits not in RING_BITS
        ):
            msg = (
                f"a layout of segments {names} for {self.num_lenders} lenders in a ring of {self.ring_bits} bits;"
                " give at least one segment, different names, at least one lender, and 24 or 32 bits"
            )
            raise PrivacyParameterError(msg)
        for segment in self.segments:
            self._check(segment)

    @property
    def size(self) -> int:
        """Length of the vector, m."""
        return sum(segment.size for segment in self.segments)

    def digest(self) -> str:
        """Return the SHA-256 of the layout's canonical JSON, hex: what the sum's context holds."""
        return hashlib.sha256(
            json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def encode(
        self, parts: Mapping[str, NDArray[np.floating[Any]]], stochastic: WordSource | None = None
    ) -> NDArray[np.uint32]:
        """Return a lender's vector, shape (m,).

        Args:
            parts: Values by segment name: every segment, each of its size; floats of any width, any shape.
            stochastic: Rounds up or down by chance, without bias, with these random bits; None rounds to the nearest
                quantum, halves to the even one.

        Raises:
            PrivacyParameterError: The parts are not the layout's.
            TrainingError: A value is not finite.
        """
        vector = np.empty(self.size, dtype=np.uint32)
        signed = vector.view(np.int32)
        room = np.empty(min(_BLOCK, self.size), dtype=np.float64)  # one for all blocks: it stays in the cache
        for segment, where in self._placed(parts):
            values = np.ascontiguousarray(parts[segment.name]).reshape(-1)
            for at in range(0, segment.size, _BLOCK):
                block = room[: min(_BLOCK, segment.size - at)]
                _write_quanta(values[at : at + _BLOCK], segment, block)
                _round(block, stochastic)
                signed[where.start + at : where.start + at + len(block)] = block
        return vector

    def encode_integers(self, parts: Mapping[str, NDArray[np.int64]]) -> NDArray[np.uint32]:
        """Return a lender's vector of values that are whole numbers of quanta already, shape (m,).

        Args:
            parts: Quanta by segment name, as `encode` takes values.

        Raises:
            PrivacyParameterError: The parts are not the layout's.
            TrainingError: A value passes its segment's bound: it could make the sum wrap.
        """
        vector = np.empty(self.size, dtype=np.uint32)
        for segment, where in self._placed(parts):
            values = parts[segment.name].reshape(-1)
            # not by absolute values: that of the smallest int64 is negative
            if values.max() > segment.largest or values.min() < -segment.largest:
                msg = f"{segment.name!r} holds an integer beyond {segment.largest}, so the cohort's sum could wrap"
                raise TrainingError(msg)
            vector.view(np.int32)[where] = values
        return vector

    def decode(self, total: NDArray[np.uint32]) -> dict[str, NDArray[np.float64]]:
        """Return the sums by segment name, each of shape (size,), in the values' unit.

        Args:
            total: Sum of the lenders' vectors, modulo 2**32 or modulo the ring; shape (m,).

        Raises:
            PrivacyParameterError: The vector is not of the layout's length.
        """
        return {
            name: np.multiply(quanta, step, dtype=np.float64) for name, step, quanta in self._signed(total)
        }

    def decode_integers(self, total: NDArray[np.uint32]) -> dict[str, NDArray[np.int64]]:
        """Return the sums in quanta by segment name, each of shape (size,); arguments and errors as `decode`."""
        return {name: quanta.astype(np.int64) for name, _, quanta in self._signed(total)}

    def _signed(self, total: NDArray[np.uint32]) -> Iterator[tuple[str, float, NDArray[np.int32]]]:
        """Yield each segment's name, step and sums in quanta."""
        if total.dtype != np.uint32 or total.shape != (self.size,):
            msg = (
                f"a sum of shape {total.shape} and type {total.dtype} is not one of {self.size} ring elements"
            )
            raise PrivacyParameterError(msg)
        for segment, where in self._places():
            signed = np.ascontiguousarray(total[where]).view(np.int32)
            if self.ring_bits == 24:
                # the ring's highest bit becomes the sign
                signed = (signed << np.int32(8)) >> np.int32(8)
            yield segment.name, segment.step, signed

    def _places(self) -> Iterator[tuple[Segment, slice]]:
        start = 0
        for segment in self.segments:
            yield segment, slice(start, start + segment.size)
            start += segment.size

    def _placed(self, parts: Mapping[str, NDArray[Any]]) -> Iterator[tuple[Segment, slice]]:
        seen = {name: values.size for name, values in parts.items()}
        expected = {segment.name: segment.size for segment in self.segments}
        if seen != expected:
            msg = f"values of sizes {seen} do not fit into the layout's {expected}"
            raise PrivacyParameterError(msg)
        return self._places()

    def _check(self, segment: Segment) -> None:
        sound = segment.size >= 1 and math.isfinite(segment.bound) and 0 < segment.step <= segment.bound
        most = _most_quanta(self.num_lenders, self.ring_bits)
        # first as floats: the quotient can be infinite
        if not sound or segment.bound / segment.step > most + 1 or segment.largest > most:
            msg = (
                f"segment {segment.name!r} of {segment.size} values, bound {segment.bound} and step {segment.step} does"
                f" not fit {self.num_lenders} lenders in a ring of {self.ring_bits} bits, which holds {most} quanta of"
                " each; take a larger step, or 32 bits"
            )
            raise PrivacyParameterError(msg)


def pack(values: NDArray[np.uint32], ring_bits: int) -> bytes:
    """Return the ring elements as they travel: little-endian words of 3 or 4 bytes.

    Args:
        values: Shape (m,); what lies above the ring's bits is dropped.
        ring_bits: 24 or 32.
    """
    words = np.ascontiguousarray(values, dtype="<u4")
    if ring_bits == 32:
        return words.tobytes()
    packed, octets = np.empty(3 * len(words), dtype=np.uint8), words.view(np.uint8)
    for place in range(3):  # one long run for each: numpy is slow at many runs of three bytes
        packed[place::3] = octets[place::4]
    return packed.tobytes()


def unpack(data: bytes, size: int, ring_bits: int) -> NDArray[np.uint32]:
    """Return the ring elements that `pack` wrote, shape (size,); at 32 bits the array is read-only.

    Raises:
        ProtocolRefusalError: The bytes are not so many words (rule `malformed`).
    """
    if len(data) != size * ring_bits // 8:
        raise refusal("malformed", f"a vector has {len(data)} bytes, not {size} words of {ring_bits} bits")
    if ring_bits == 32:
        return np.frombuffer(data, dtype="<u4").astype(np.uint32, copy=False)
    if size == 0:
        return np.zeros(0, dtype=np.uint32)
    words = np.empty(size, dtype=np.uint32)
    # four bytes are read at every third, the fourth dropped; after the last three there is none
    np.bitwise_and(np.ndarray(size - 1, "<u4", data, strides=(3,)), _LOW_24, out=words[:-1])
    words[-1] = int.from_bytes(data[-3:], "little")
    return words


def _most_quanta(num_lenders: int, ring_bits: int) -> int:
    return ((1 << (ring_bits - 1)) - 1) // num_lenders


def _write_quanta(values: NDArray[np.floating[Any]], segment: Segment, quanta: NDArray[np.float64]) -> None:
    """Write the values as quanta, clipped and not yet rounded, into `quanta`, of the same length."""
    # before the clip, which would hide what is infinite
    if not np.isfinite(values).all():
        msg = f"{segment.name!r} holds a value that is not finite; it may not leave this lender"
        raise TrainingError(msg)
    # copied first: float32 times a number would be computed in float32, whatever `out` is
    np.copyto(quanta, values)
    with np.errstate(over="ignore"):  # the clip takes it
        np.multiply(quanta, 1.0 / segment.step, out=quanta)
    largest = float(segment.largest)
    np.clip(quanta, -largest, largest, out=quanta)


def _round(quanta: NDArray[np.float64], stochastic: WordSource | None) -> None:
    if stochastic is None:
        np.rint(quanta, out=quanta)
        return
    lower = np.floor(quanta)
    chances = (stochastic.words(len(quanta)) >> np.uint64(11)) * 2.0**-53
    quanta -= lower
    np.add(lower, chances < quanta, out=quanta)

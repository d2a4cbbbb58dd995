"""Masks: keystreams of AES-256-CTR added to a vector in the ring of 2**32, many at a time.

Each key serves one mask of one sum, so the counter starts at zero. All masks are added in one pass over the vector:
blocks outside and keys inside, so that a block and its keystream stay in the second-level cache. CTR can be entered
anywhere, so threads take slices of the vector.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["BLOCK_WORDS", "Mask", "add_masks"]

BLOCK_WORDS: Final = 2**15
"""Words of the vector that are masked at a time: 128 KiB, and as much keystream."""

_CIPHER_WORDS: Final = 4  # one block of AES
_ZEROS: Final = bytes(4 * BLOCK_WORDS)  # what is encrypted: the keystream itself comes out
_TAIL: Final = 15  # update_into asks for room for a block of AES less one byte beyond the data


@dataclass(frozen=True, slots=True)
class Mask:
    """One keystream that is added to a vector or taken off it; the repr shows no key.

    Attributes:
        key: 32 bytes that serve this mask only.
        subtracted: Whether it is taken off.
    """

    key: bytes = field(repr=False)
    subtracted: bool

    def undone(self) -> "Mask":
        """Return the mask that takes this one off again."""
        return Mask(self.key, not self.subtracted)


def add_masks(vector: NDArray[np.uint32], masks: Sequence[Mask], threads: int = 1) -> None:
    """Add every mask to the vector, in place, modulo 2**32.

    Args:
        vector: Shape (m,), contiguous and writeable; changed.
        masks: What to add.
        threads: Slices that are worked on at the same time; >= 1. The result does not depend on it.
    """
    if threads == 1 or len(vector) <= BLOCK_WORDS:
        _add_to_slice(vector, masks, 0)
        return
    num_blocks = -(-len(vector) // BLOCK_WORDS)
    words = -(-num_blocks // threads) * BLOCK_WORDS  # whole blocks: a slice begins where the cipher's does
    starts = range(0, len(vector), words)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_add_to_slice, vector[at : at + words], masks, at) for at in starts]:
            done.result()


def _add_to_slice(part: NDArray[np.uint32], masks: Sequence[Mask], first_word: int) -> None:
    counter = (first_word // _CIPHER_WORDS).to_bytes(16, "big")
    streams = [
        (
            Cipher(AES256(mask.key), CTR(counter)).encryptor().update_into,
            np.subtract if mask.subtracted else np.add,
        )
        for mask in masks
    ]
    room = bytearray(4 * BLOCK_WORDS + _TAIL)
    words = np.frombuffer(room, dtype="<u4", count=BLOCK_WORDS)  # the same masks on every machine
    for at in range(0, len(part), BLOCK_WORDS):
        block = part[at : at + BLOCK_WORDS]
        zeros, keystream = _ZEROS[: block.nbytes], words[: len(block)]
        for fill, combine in streams:
            fill(zeros, room)
            combine(block, keystream, out=block)

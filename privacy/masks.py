"""Masks: keystreams of AES-256 in counter mode, added to a vector in the ring of 2**32, many at a time.

Each key serves one mask of one sum. A mask is made in pieces of 128 KiB; piece i is the keystream of the counter
blocks (i, 2), (i, 3), ..., i in the first 12 bytes and the count in the last 4. That is what AES-GCM encrypts with
under nonce i, and it is taken from there, as the encryption of zeros: OpenSSL has wider code for GCM than for plain
counter mode (10.2 against 8.2 GB/s measured on one core of an AMD EPYC with VAES). GCM's tag is not used.

All masks are added in one pass over the vector: pieces outside and keys inside, so that a piece and its keystream
stay in the second-level cache. Every piece stands alone, so threads take slices of the vector.

Source: NIST SP 800-38D, section 7.1 (GCM's counter blocks for a nonce of 96 bits).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

__all__ = ["BLOCK_WORDS", "Mask", "add_masks"]

BLOCK_WORDS: Final = 2**15
"""Words of the vector that are masked at a time: 128 KiB, and as much keystream."""

_ZEROS: Final = bytes(4 * BLOCK_WORDS)  # what is encrypted: the keystream itself comes out
_TAG_BYTES: Final = 16
_NONCE_BYTES: Final = 12


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
    words = -(-num_blocks // threads) * BLOCK_WORDS  # whole blocks: a slice begins where a piece does
    starts = range(0, len(vector), words)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_add_to_slice, vector[at : at + words], masks, at) for at in starts]:
            done.result()


def _add_to_slice(part: NDArray[np.uint32], masks: Sequence[Mask], first_word: int) -> None:
    streams = [(AESGCM(mask.key).encrypt_into, np.subtract if mask.subtracted else np.add) for mask in masks]
    room = memoryview(bytearray(4 * BLOCK_WORDS + _TAG_BYTES))
    words = np.frombuffer(room, dtype="<u4", count=BLOCK_WORDS)  # the same masks on every machine
    for at in range(0, len(part), BLOCK_WORDS):
        block = part[at : at + BLOCK_WORDS]
        nonce = ((first_word + at) // BLOCK_WORDS).to_bytes(_NONCE_BYTES, "big")
        zeros, into, keystream = (
            _ZEROS[: block.nbytes],
            room[: block.nbytes + _TAG_BYTES],
            words[: len(block)],
        )
        for encrypt, combine in streams:
            encrypt(nonce, zeros, None, into)
            combine(block, keystream, out=block)

"""Masks: the keystream of the standard, added exactly, in any number of slices, and never shown."""

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfin.privacy.masks import BLOCK_WORDS, Mask, add_masks

KEYS = [bytes([number]) * 32 for number in range(5)]


def keystream(key, num_words):
    """The whole keystream by plain counter mode, piece by piece."""
    pieces = []
    for number in range(-(-num_words // BLOCK_WORDS)):
        first_counter = number.to_bytes(12, "big") + (2).to_bytes(4, "big")
        encryptor = Cipher(AES256(key), CTR(first_counter)).encryptor()
        pieces.append(np.frombuffer(encryptor.update(bytes(4 * BLOCK_WORDS)), dtype="<u4"))
    return np.concatenate([*pieces, np.zeros(0, "<u4")])[:num_words].astype(np.uint32)


def test_the_keystream_is_that_of_the_standard():
    """GCM specification, test case 14: AES-256, key, nonce and text of zeros."""
    vector = np.zeros(4, np.uint32)
    add_masks(vector, [Mask(bytes(32), subtracted=False)])
    assert vector.astype("<u4").tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"


def test_no_counter_block_of_a_mask_comes_twice():
    """128 KiB are 8,192 blocks of AES: the count in the last four bytes never reaches the nonce."""
    assert 2 + 4 * BLOCK_WORDS // 16 < 2**32
    words = keystream(KEYS[0], 4 * BLOCK_WORDS).reshape(-1, 4)
    assert len(np.unique(words, axis=0)) == len(words)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3 * BLOCK_WORDS + 7),
    st.lists(st.booleans(), max_size=4),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_mask_is_added_or_taken_off_exactly(size, signs, threads, seed):
    values = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
    masks = [Mask(key, subtracted=sign) for key, sign in zip(KEYS, signs, strict=False)]
    expected = values.astype(np.int64)
    for mask in masks:
        expected += (-1 if mask.subtracted else 1) * keystream(mask.key, size).astype(np.int64)
    add_masks(values, masks, threads)
    np.testing.assert_array_equal(values, (expected % 2**32).astype(np.uint32))


@pytest.mark.parametrize("size", [1, BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1, 2 * BLOCK_WORDS + 5])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_undone_masks_leave_the_vector_as_it_was(size, threads):
    values = np.arange(size, dtype=np.uint32)
    masks = [Mask(key, subtracted=key[0] % 2 == 0) for key in KEYS]
    add_masks(values, masks, threads)
    assert np.count_nonzero(values == np.arange(size, dtype=np.uint32)) < 8
    add_masks(values, [mask.undone() for mask in masks], threads)
    np.testing.assert_array_equal(values, np.arange(size, dtype=np.uint32))


def test_no_memory_is_taken_for_a_mask():
    values = np.zeros(2_000_000, np.uint32)
    tracemalloc.start()
    add_masks(values, [Mask(key, subtracted=False) for key in KEYS])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4 * BLOCK_WORDS


def test_no_repr_shows_a_key():
    assert repr(Mask(b"k" * 32, subtracted=True)) == "Mask(subtracted=True)"

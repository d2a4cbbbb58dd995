"""Secret sharing: any t shares give the secret, fewer tell nothing, wrong ones are told from right ones."""

import random
import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfin.privacy import shamir
from fedfin.privacy.shamir import PRIME, SHARE_BYTES, combine, is_share, split

SECRETS = st.binary(min_size=32, max_size=32)


def test_the_field_is_prime():
    odd = PRIME - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    for base in [2, 3, 5, 7, *(secrets.randbelow(PRIME - 3) + 2 for _ in range(40))]:  # Miller & Rabin
        power = pow(base, odd, PRIME)
        assert power in {1, PRIME - 1} or PRIME - 1 in {pow(power, 2**k, PRIME) for k in range(1, twos)}
    assert PRIME > 2**256


@settings(max_examples=100, deadline=None)
@given(SECRETS, st.data())
def test_any_threshold_of_the_shares_gives_the_secret(secret, data):
    num = data.draw(st.integers(1, 40))
    threshold = data.draw(st.integers(1, num))
    shares = dict(enumerate(split(secret, threshold, num), start=1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({point: shares[point] for point in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_smallest_and_the_largest_secret_are_shared(secret):
    shares = dict(enumerate(split(secret, 67, 100), start=1))
    assert combine(dict(list(shares.items())[33:])) == secret


@settings(max_examples=50, deadline=None)
@given(SECRETS, SECRETS)
def test_fewer_shares_fit_every_secret(secret, other):
    """To t - 1 shares any secret is as good: some polynomial has these points, and that value at 0."""
    shares = dict(enumerate(split(secret, 4, 6), start=1))
    known = {point: shares[point] for point in (2, 3, 6)}
    # Lagrange at 1 through the three known points and (0, other): a fourth share that completes them to `other`
    points = {0: int.from_bytes(other, "little")} | {
        at: int.from_bytes(data, "little") for at, data in known.items()
    }
    fourth = 0
    for at, value in points.items():
        above = below = 1
        for one in points:
            if one != at:
                above, below = above * (1 - one), below * (at - one)
        fourth += value * above * pow(below, -1, PRIME)
    assert combine(known | {1: (fourth % PRIME).to_bytes(SHARE_BYTES, "little")}) == other


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_one_share_of_a_constant_secret_is_uniform(secret):
    first = np.array([split(secret, 2, 2)[0][3] for _ in range(20_000)])
    counts = np.bincount(first, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_share_alone_in_its_field_is_recognised():
    assert is_share((PRIME - 1).to_bytes(33, "little"))
    assert not is_share(PRIME.to_bytes(33, "little"))
    assert not is_share(bytes(32))
    assert not is_share(bytes(34))


def test_a_wrong_share_gives_another_secret_or_none():
    secret, shuffled = secrets.token_bytes(32), random.Random(1)
    for _ in range(50):
        shares = dict(enumerate(split(secret, 5, 7), start=1))
        point = shuffled.choice(sorted(shares)[:5])
        shares[point] = secrets.randbelow(PRIME).to_bytes(33, "little")
        assert combine({at: shares[at] for at in range(1, 6)}) != secret


def test_a_value_that_no_secret_has_is_none():
    beyond = {1: (2**256).to_bytes(33, "little")}  # threshold 1: the share is the value at 0
    assert combine(beyond) is None
    assert combine({1: (2**256 - 1).to_bytes(33, "little")}) == b"\xff" * 32


def test_two_splits_of_one_secret_have_nothing_in_common():
    secret = bytes(32)
    assert set(split(secret, 3, 30)).isdisjoint(split(secret, 3, 30))


@pytest.mark.parametrize(
    ("secret", "threshold", "num"), [(b"short", 2, 3), (bytes(32), 4, 3), (bytes(32), 0, 3)]
)
def test_what_cannot_be_split_is_an_error(secret, threshold, num):
    with pytest.raises(ValueError, match="cannot be split"):
        split(secret, threshold, num)


def test_the_polynomial_is_evaluated_exactly():
    """The remainder is taken every 32 terms only: against plain arithmetic, for large and small points."""
    coefficients = [PRIME - 1 - number for number in range(100)]
    for point in (1, 2, 99, 65535):
        expected = sum(value * pow(point, 99 - at, PRIME) for at, value in enumerate(coefficients)) % PRIME
        assert shamir._value_at(point, coefficients) == expected

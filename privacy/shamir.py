"""Shamir's secret sharing of 32-byte secrets: any t of n shares give the secret, fewer tell nothing of it.

The field is the integers modulo 2**256 + 297, the smallest prime above 2**256: every 32 bytes are an element, so no
secret needs to be redrawn or cut. Plain Python integers suffice: 100 shares at t = 67 take under a millisecond, masks
a hundred. The time depends on the values and is not protected.

Source: Shamir, "How to share a secret" (CACM 1979).
"""

import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "combine", "is_share", "split"]

PRIME: Final = 2**256 + 297
"""The field's size, a prime."""

SECRET_BYTES: Final = 32
"""Length of a secret."""

SHARE_BYTES: Final = 33
"""Length of a share: an element of the field, little-endian."""

_LAZY: Final = 32  # additions and products by small numbers before a remainder is taken


def split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Return the shares of a secret at the points 1, 2, ..., num_shares.

    Args:
        secret: `SECRET_BYTES` bytes.
        threshold: Shares that give the secret, t; 1 to `num_shares`.
        num_shares: Shares to make; below 2**16.

    Returns:
        List of `num_shares` shares of `SHARE_BYTES` each; share i is at the point i + 1.

    Raises:
        ValueError: An argument is out of range: a bug of the caller's.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= num_shares < 2**16:
        msg = f"a secret of {len(secret)} bytes cannot be split {threshold} of {num_shares}"
        raise ValueError(msg)
    # highest degree first; the secret is the polynomial's value at 0
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "little"))
    return [
        _value_at(point, coefficients).to_bytes(SHARE_BYTES, "little") for point in range(1, num_shares + 1)
    ]


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """Return the secret that these shares give, or None where no 32 bytes have such shares.

    The caller gives exactly the threshold's number and checks the secret against its commitment: any t points lie on
    some polynomial.

    Args:
        shares: Share by its point, 1 or more, each accepted by `is_share`.
    """
    weights = _weights_at_zero(tuple(sorted(shares)))
    value = sum(weight * int.from_bytes(shares[point], "little") for point, weight in weights) % PRIME
    return value.to_bytes(SECRET_BYTES, "little") if value < 2**256 else None


def is_share(data: bytes) -> bool:
    """Say whether the bytes are an element of the field, written as `split` writes it."""
    return len(data) == SHARE_BYTES and int.from_bytes(data, "little") < PRIME


def _value_at(point: int, coefficients: list[int]) -> int:
    value = 0
    for count, coefficient in enumerate(coefficients, start=1):
        value = value * point + coefficient
        if count % _LAZY == 0:
            value %= PRIME
    return value % PRIME


@lru_cache(maxsize=8)  # the same helpers give the shares of every lender, unless one lied
def _weights_at_zero(points: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return Lagrange's weight of each point for the value at 0: the product of x_j / (x_j - x_i) over j != i."""
    weights = []
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above *= other
                below *= other - point
        weights.append((point, above * pow(below, -1, PRIME) % PRIME))
    return tuple(weights)

"""How the keys of a secure sum are derived: X25519 exchanges through HKDF-SHA256, each bound to the sum.

A channel's key is salted with the context's digest, a mask's key with the whole context, model and sharers included.
The names of the pair, and what the key is for, are in HKDF's info.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedfin.privacy.masks import Mask
from fedfin.privacy.sum_context import framed
from fedfin.privacy.sum_rules import refusal

__all__ = ["channel_key", "check_public", "exchanged", "own_mask", "pair_mask", "private_key"]

_KEY_BYTES: Final = 32
_CURVE_PRIME: Final = 2**255 - 19
_LOW_ORDER: Final = frozenset(
    {
        0,
        1,
        _CURVE_PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""The points of order 1, 2, 4 and 8 on Curve25519 and its twist, by their coordinate u."""


def check_public(public: bytes, owner: str) -> None:
    """Check that an exchange with this X25519 key gives a secret, as `exchanged` does, without making one.

    Args:
        public: The key, 32 bytes.
        owner: Whose it is, for the message.

    Raises:
        ProtocolRefusalError: The key is not canonical, or of low order (rule `weak_key`).

    Source: Bernstein, https://cr.yp.to/ecdh.html#validate; private keys are multiples of 8 (RFC 7748, section 5).
    """
    coordinate = int.from_bytes(public, "little")
    if coordinate >= _CURVE_PRIME:
        raise refusal("weak_key", f"a key of {owner} is not written canonically")
    if coordinate in _LOW_ORDER:
        raise refusal("weak_key", f"a key of {owner} has low order")


def exchanged(private: X25519PrivateKey, public: bytes, owner: str) -> bytes:
    """Return the secret of two X25519 keys, 32 bytes.

    Args:
        private: One's own key.
        public: The other's, 32 bytes.
        owner: Whose it is, for the message.

    Raises:
        ProtocolRefusalError: The public key is not canonical, or of low order: everybody would know the secret (rule
            `weak_key`).
    """
    check_public(public, owner)
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # an all-zero secret: OpenSSL looks for it as well
        raise refusal("weak_key", f"a key of {owner} has low order") from None


def private_key(secret: bytes) -> X25519PrivateKey:
    """Return the X25519 private key that these 32 bytes are."""
    return X25519PrivateKey.from_private_bytes(secret)


def channel_key(secret: bytes, context: bytes, sender: str, receiver: str) -> bytes:
    """Return the AES-256 key for the one message of `sender` to `receiver`, from their exchanged secret."""
    return _derived(secret, context, framed("channel", sender.encode(), receiver.encode()))


def pair_mask(secret: bytes, asked: bytes, name: str, peer: str) -> Mask:
    """Return the mask that `name` shares with `peer`: whose name comes first adds it, the other takes it off.

    Args:
        secret: What their mask keys exchanged.
        asked: The whole context's digest.
        name: The lender whose vector the mask is for.
        peer: The other.
    """
    first, second = sorted((name, peer))  # both must derive the same key
    key = _derived(secret, asked, framed("pair mask", first.encode(), second.encode()))
    return Mask(key, subtracted=name != first)


def own_mask(secret: bytes, asked: bytes, name: str) -> Mask:
    """Return the mask that a lender adds to its own vector, from its secret of 32 bytes."""
    return Mask(_derived(secret, asked, framed("own mask", name.encode())), subtracted=False)


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), _KEY_BYTES, salt, info).derive(secret)

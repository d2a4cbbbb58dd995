"""What lenders sign in a secure sum: adverts and confirmations, as bytes of fixed length.

Either form has one length and no options, so a parser has nothing to get wrong; whatever else arrives is refused as
`malformed`. Sealed shares, the third thing that travels, are in `sum_shares`.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.privacy.sum_context import framed
from fedfin.privacy.sum_rules import refusal

__all__ = [
    "ADVERT_BYTES",
    "CONFIRMATION_BYTES",
    "Advert",
    "secret_commitment",
    "sign_confirmation",
    "verify_confirmation",
]

_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64

ADVERT_BYTES: Final = 3 * _KEY_BYTES + _SIGNATURE_BYTES
"""Length of an advert: two keys, a commitment, a signature."""

CONFIRMATION_BYTES: Final = _SIGNATURE_BYTES
"""Length of a confirmation, a signature."""


@dataclass(frozen=True, slots=True)
class Advert:
    """The public keys of one lender for one sum.

    Attributes:
        channel_key: X25519 key under which shares are sealed to this lender.
        mask_key: X25519 key from which pairwise masks are made.
        commitment: `secret_commitment` of the secret of its own mask.
        signature: Ed25519, by the lender's identity key, over `body`.
    """

    channel_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes = b""

    def body(self, context: bytes, name: str) -> bytes:
        """Return what is signed: the keys, with the sum's context digest and the lender's name."""
        return framed("advert", context, name.encode(), self.channel_key, self.mask_key, self.commitment)

    def signed(self, context: bytes, name: str, identity: Ed25519PrivateKey) -> "Advert":
        """Return the advert with its signature."""
        signature = identity.sign(self.body(context, name))
        return Advert(self.channel_key, self.mask_key, self.commitment, signature)

    def verify(self, context: bytes, name: str, identity: Ed25519PublicKey) -> None:
        """Check that the lender's enrolled key signed this advert for this sum.

        Raises:
            ProtocolRefusalError: It did not (rule `advert_signature`).
        """
        try:
            identity.verify(self.signature, self.body(context, name))
        except InvalidSignature:
            what = f"the advert of {name} is not signed by its enrolled key for this sum"
            raise refusal("advert_signature", what) from None

    def to_bytes(self) -> bytes:
        """Return the advert as it travels, `ADVERT_BYTES` long."""
        return self.channel_key + self.mask_key + self.commitment + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> "Advert":
        """Return the advert that these bytes are; its keys and signature are not checked yet.

        Raises:
            ProtocolRefusalError: They have another length (rule `malformed`).
        """
        if len(data) != ADVERT_BYTES:
            raise refusal("malformed", f"an advert has {len(data)} bytes, not {ADVERT_BYTES}")
        return cls(data[:32], data[32:64], data[64:96], data[96:])


def secret_commitment(context: bytes, name: str, secret: bytes) -> bytes:
    """Return the SHA-256 by which the secret of a lender's own mask is recognised, 32 bytes.

    It hides the secret, which is 32 random bytes used for this sum only.
    """
    return hashlib.sha256(framed("own mask", context, name.encode(), secret)).digest()


def sign_confirmation(asked: bytes, survivors: frozenset[str], identity: Ed25519PrivateKey) -> bytes:
    """Return a lender's signature over the whole context and the survivors, `CONFIRMATION_BYTES` long."""
    return identity.sign(_confirmation_body(asked, survivors))


def verify_confirmation(
    asked: bytes, survivors: frozenset[str], name: str, identity: Ed25519PublicKey, confirmation: bytes
) -> None:
    """Check that a lender confirmed these survivors of this sum.

    Raises:
        ProtocolRefusalError: The confirmation has another length (rule `malformed`), or is not this lender's for this
            context, model, sharers and survivors (rule `confirmation`).
    """
    if len(confirmation) != CONFIRMATION_BYTES:
        raise refusal("malformed", f"the confirmation of {name} has {len(confirmation)} bytes")
    try:
        identity.verify(confirmation, _confirmation_body(asked, survivors))
    except InvalidSignature:
        what = f"{name} did not confirm these survivors: it was shown others, another model, or its signature is forged"
        raise refusal("confirmation", what) from None


@lru_cache(maxsize=2)  # the same for every confirmation of a sum; nothing in it is secret
def _confirmation_body(asked: bytes, survivors: frozenset[str]) -> bytes:
    return framed("survivors", asked, *(name.encode() for name in sorted(survivors)))

"""Shares on their way from one lender to another: committed to in the open, sealed, checked when they arrive.

A lender deals two shares to each: of the secret of its own mask, and of its mask key. The SHA-256 of each stands
beside them in clear, so that the coordinator can tell a right share from a wrong one when it comes back, and find a
lying helper without a search. To fewer than t holders a share is a uniform element of the field, so its hash tells
them nothing. The commitments are authenticated with the sealed shares, and the receiver checks that they belong.
"""

import hashlib
from collections.abc import Collection
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedfin.errors import ProtocolRefusalError
from fedfin.privacy.shamir import SHARE_BYTES, is_share
from fedfin.privacy.sum_context import framed
from fedfin.privacy.sum_keys import channel_key
from fedfin.privacy.sum_rules import refusal

__all__ = [
    "COMMITMENTS_BYTES",
    "MASK_KEY",
    "OWN_MASK",
    "SEALED_BYTES",
    "Dealt",
    "accused",
    "is_committed",
    "seal",
    "share_commitments",
    "unseal",
]

OWN_MASK: Final = "share of own mask"
"""Kind of a share of the secret of a lender's own mask: given back where the lender survived."""

MASK_KEY: Final = "share of mask key"
"""Kind of a share of a lender's mask key: given back where the lender dropped out."""

_KINDS: Final = (OWN_MASK, MASK_KEY)
_HASH_BYTES: Final = 32
_TAG_BYTES: Final = 16
_NONCE: Final = bytes(12)  # each channel key seals one message

COMMITMENTS_BYTES: Final = len(_KINDS) * _HASH_BYTES
"""Length of the commitments to one holder's two shares."""

SEALED_BYTES: Final = COMMITMENTS_BYTES + len(_KINDS) * SHARE_BYTES + _TAG_BYTES
"""Length of a sealed pair of shares: commitments in clear, shares encrypted, the tag of AES-GCM."""

_DOES_NOT_OPEN: Final = {
    "sealed_share": "the share of {} fails authentication: it was altered, or is of another lender or sum",
    "share_commitment": "{} sealed a share that is not the one it committed to",
}

Dealt = tuple[bytes, bytes]
"""The two shares of one holder, in the order of `OWN_MASK` and `MASK_KEY`."""


def share_commitments(context: bytes, owner: str, holder: str, pair: Dealt) -> bytes:
    """Return the commitments to a holder's two shares, `COMMITMENTS_BYTES` long; public.

    Args:
        context: Digest of the sum's context.
        owner: Whose secrets are shared.
        holder: Who holds these shares.
        pair: The shares.
    """
    return b"".join(
        _commitment(context, owner, holder, kind, share) for kind, share in zip(_KINDS, pair, strict=True)
    )


def is_committed(
    commitments: bytes, context: bytes, owner: str, holder: str, kind: str, share: bytes
) -> bool:
    """Say whether this is the share of this kind that `commitments` were made for; arguments as above."""
    start = _HASH_BYTES * _KINDS.index(kind)
    return _commitment(context, owner, holder, kind, share) == commitments[start : start + _HASH_BYTES]


def seal(pair: Dealt, secret: bytes, context: bytes, sender: str, receiver: str) -> bytes:
    """Return the shares as they travel, `SEALED_BYTES` long.

    Args:
        pair: What `sender` deals to `receiver`.
        secret: What their channel keys exchanged.
        context: Digest of the sum's context.
        sender: Whose secrets are shared.
        receiver: Who alone can open them.
    """
    commitments = share_commitments(context, sender, receiver, pair)
    cipher = AESGCM(channel_key(secret, context, sender, receiver))
    return commitments + cipher.encrypt(
        _NONCE, b"".join(pair), _bound(context, sender, receiver, commitments)
    )


def unseal(data: bytes, secret: bytes, context: bytes, sender: str, receiver: str) -> Dealt:
    """Return the shares that `seal` sealed for this sum, sender and receiver.

    Raises:
        ProtocolRefusalError: They are not of that form (rule `malformed`), not authentic (`sealed_share`), or not
            what the sender committed to (`share_commitment`).
    """
    if len(data) != SEALED_BYTES:
        raise refusal("malformed", f"the sealed share of {sender} has {len(data)} bytes, not {SEALED_BYTES}")
    commitments, sealed = data[:COMMITMENTS_BYTES], data[COMMITMENTS_BYTES:]
    cipher = AESGCM(channel_key(secret, context, sender, receiver))
    try:
        opened = cipher.decrypt(_NONCE, sealed, _bound(context, sender, receiver, commitments))
    except InvalidTag:
        raise _does_not_open("sealed_share", sender) from None
    pair = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
    if share_commitments(context, sender, receiver, pair) != commitments or not all(map(is_share, pair)):
        raise _does_not_open("share_commitment", sender)
    return pair


def accused(reason: str, senders: Collection[str]) -> str | None:
    """Return which of `senders` a refusal of `unseal` names, or None where the text is not exactly such a refusal.

    Args:
        reason: What a lender gave as the reason of its refusal; any text.
        senders: Whose sealed shares it was sent.
    """
    for sender in senders:
        if any(reason == str(_does_not_open(rule, sender)) for rule in _DOES_NOT_OPEN):
            return sender
    return None


def _does_not_open(rule: str, sender: str) -> ProtocolRefusalError:
    return refusal(rule, _DOES_NOT_OPEN[rule].format(sender))


def _commitment(context: bytes, owner: str, holder: str, kind: str, share: bytes) -> bytes:
    return hashlib.sha256(framed(kind, context, owner.encode(), holder.encode(), share)).digest()


def _bound(context: bytes, sender: str, receiver: str, commitments: bytes) -> bytes:
    return framed("sealed share", context, sender.encode(), receiver.encode(), commitments)

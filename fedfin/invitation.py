"""Invitation tokens: one word that lets one lender join once, carrying the coordinator's address and fingerprint."""

import base64
import binascii
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from fedfin.errors import EnrolmentError

__all__ = ["LENDER_NAME_PATTERN", "Invitation", "secret_hash"]


LENDER_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,39}$"
"""Names of lenders: they become folder names and certificate subjects."""


_TOKEN_PREFIX: Final = "fedfin1_"  # noqa: S105  (the format's name, not a secret)


_CHECK_CHARS: Final = 8


_TOKEN_PARTS: Final = (
    LENDER_NAME_PATTERN,
    r"[A-Za-z0-9_.:\[\]-]+:[0-9]{1,5}",
    r"[0-9a-f]{64}",
    r"[0-9a-f]{64}",
)


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an invitation token carries. The secret is 256 bits and is never shown by the repr."""

    name: str
    address: str
    fingerprint: str
    secret: str = field(repr=False)

    @classmethod
    def create(cls, name: str, address: str, fingerprint: str) -> "Invitation":
        """Return an invitation with a fresh secret."""
        return cls(name=name, address=address, fingerprint=fingerprint, secret=secrets.token_hex(32))

    def secret_hash(self) -> str:
        """Return what the coordinator keeps: SHA-256 over the secret, bound to the lender's name."""
        return secret_hash(self.name, self.secret)

    def to_token(self) -> str:
        """Return the text that is handed to the lender, one word without spaces."""
        body = json.dumps([self.name, self.address, self.fingerprint, self.secret], separators=(",", ":"))
        text = base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")
        return f"{_TOKEN_PREFIX}{text}.{_check(text)}"

    @classmethod
    def from_token(cls, token: str) -> "Invitation":
        """Parse a token.

        Raises:
            EnrolmentError: The text is no token, was cut, or a character was altered.
        """
        text, dot, check = token.strip().removeprefix(_TOKEN_PREFIX).partition(".")
        if not token.strip().startswith(_TOKEN_PREFIX) or not dot:
            msg = f"this is no invitation token (they begin with {_TOKEN_PREFIX}); copy the whole line again"
            raise EnrolmentError(msg)
        if not text.isascii() or check != _check(text):  # a checksum against slips, no secret
            msg = "the token was altered or cut on its way (its check characters do not match); copy it again"
            raise EnrolmentError(msg)
        try:
            parts = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (binascii.Error, ValueError, RecursionError) as error:
            msg = "the token cannot be read; ask the coordinator for a new one"
            raise EnrolmentError(msg) from error
        if not (
            isinstance(parts, list)
            and len(parts) == len(_TOKEN_PARTS)
            # The name becomes a folder, the address is called: a token is not to be trusted with either.
            and all(
                isinstance(part, str) and re.fullmatch(pattern, part)
                for part, pattern in zip(parts, _TOKEN_PARTS, strict=True)
            )
        ):
            msg = "the token is of another release of fedfin; ask the coordinator for a new one"
            raise EnrolmentError(msg)
        return cls(*parts)


def secret_hash(name: str, secret: str) -> str:
    """Return the hash under which the coordinator knows an invitation: over the secret and the lender's name."""
    return hashlib.sha256(f"fedfin invitation\n{name}\n{secret}".encode()).hexdigest()


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_CHECK_CHARS]

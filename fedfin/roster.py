"""The members of a federation with their identity keys, as they travel in a proposal and lie in a lender's folder.

The coordinator states the roster; a lender pins the first one that it sees (`client/pinning.py`). What it cannot do is
tell an invented lender from a real one: until a quorum of members signs the roster, that rests on its engineer, who
compares fingerprints with the other members.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedfin.errors import LinkError
from fedfin.identity import public_pem
from fedfin.invitation import LENDER_NAME_PATTERN

__all__ = ["Roster"]

_MAX_MEMBERS: Final = 1000  # as many as a secure sum may have


@dataclass(frozen=True, slots=True)
class Roster:
    """Who is a member, and with which identity key.

    Attributes:
        keys: The Ed25519 public key of each member, as canonical PEM text, by name; names sorted.

    Raises:
        LinkError: There are no members or too many, a name or key does not parse, or two members have one key.
    """

    keys: Mapping[str, str] = field(repr=False)
    _public: dict[str, Ed25519PublicKey] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= _MAX_MEMBERS:
            msg = f"a roster of {len(self.keys)} members; it has 1 to {_MAX_MEMBERS}"
            raise LinkError(msg)
        if list(self.keys) != sorted(self.keys) or not all(
            re.fullmatch(LENDER_NAME_PATTERN, name) for name in self.keys
        ):
            msg = "the roster's names are not lenders' names in their order; both sides must run the same release"
            raise LinkError(msg)
        if len(set(self.keys.values())) != len(self.keys):
            msg = "two members of the roster have the same identity key; each must have its own"
            raise LinkError(msg)
        found = {name: _key_of(name, pem) for name, pem in self.keys.items()}
        object.__setattr__(self, "_public", found)

    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        """Return the keys by name."""
        return dict(self._public)

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of each member's key, hex, by name: the one that `fedfin server roster` shows."""
        return {name: hashlib.sha256(pem.encode()).hexdigest() for name, pem in self.keys.items()}

    def digest(self) -> str:
        """Return the SHA-256 of the roster's canonical JSON, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the roster as canonical JSON text."""
        members = [{"identity": pem, "name": name} for name, pem in self.keys.items()]
        return json.dumps({"members": members}, separators=(",", ":"))

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> "Roster":
        """Return the roster of these members, in any order; errors as the constructor."""
        return cls({name: keys[name] for name in sorted(keys)})

    @classmethod
    def from_json(cls, text: str) -> "Roster":
        """Return the roster that `to_json` wrote; nothing else is accepted.

        Raises:
            LinkError: The text is not canonical JSON of a roster.
        """
        try:
            members: list[Any] = json.loads(text)["members"]
            roster = cls({member["name"]: member["identity"] for member in members})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = "the roster does not parse; both sides must run the same release"
            raise LinkError(msg) from error
        if roster.to_json() != text:
            msg = "the roster is not written canonically; both sides must run the same release"
            raise LinkError(msg)
        return roster


def _key_of(name: str, pem: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm, AttributeError):
        key = None
    if not isinstance(key, Ed25519PublicKey) or public_pem(key) != pem:
        msg = f"the roster's key of {name} is no Ed25519 key in PEM; {name} must enrol again"
        raise LinkError(msg)
    return key

"""Versions of a federation's roster, signed by its members: nobody enters or leaves by the coordinator's word alone.

A version names all members with their keys and the digest of the version before. The coordinator signs every version.
The first is signed by all its members; a later one by a quorum of the version before it, or by all of those that stay,
and by each newcomer itself. A member's new keys are signed by its old identity key, and need nobody else.

Which quorum: floor(2m/3) + 1 of m members, so that two versions of one number, both complete, share more than a third
of the members. With all that stay a federation of three can go on without a member whose keys are lost: everyone in
the new version has then signed it.

Source: section 4 of M. Castro and B. Liskov, "Practical Byzantine Fault Tolerance", OSDI 1999 (quorum intersection).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.coordinator_key import parse_key
from fedfin.errors import LinkError, ProtocolRefusalError
from fedfin.identity import key_fingerprint, public_pem
from fedfin.invitation import LENDER_NAME_PATTERN
from fedfin.roster import Roster

__all__ = [
    "Changes",
    "RosterMember",
    "RosterVersion",
    "changes_of",
    "quorum_of",
    "require_signature",
    "rotation_message",
    "sign_version",
]

_DOMAIN: Final = b"fedfin roster version 1\n"
_ROTATION: Final = b"fedfin rotation 1\n"
_MAX_MEMBERS: Final = 1000  # as many as a secure sum may have
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class RosterMember:
    """One member's row.

    Attributes:
        name: The lender's.
        identity: Its Ed25519 identity key, 32 bytes, hex.
        witness: Its Ed25519 witness key, 32 bytes, hex.
        node: SHA-256 of its node key's PEM, hex.
        tls: SHA-256 of the PEM of its certificate's key, hex: a renewed certificate has the same.

    Raises:
        LinkError: The name or a key is of another form.
    """

    name: str
    identity: str = field(repr=False)
    witness: str = field(repr=False)
    node: str = field(repr=False)
    tls: str = field(repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(LENDER_NAME_PATTERN, self.name):
            msg = "a member of the roster has no lender's name; both sides must run the same release"
            raise LinkError(msg)
        parse_key(self.identity, f"the identity key of {self.name}")
        parse_key(self.witness, f"the witness key of {self.name}")
        if not all(_DIGEST.fullmatch(digest) for digest in (self.node, self.tls)):
            msg = f"the roster's keys of {self.name} do not parse; both sides must run the same release"
            raise LinkError(msg)

    def identity_key(self) -> Ed25519PublicKey:
        """Return the identity key."""
        return parse_key(self.identity, self.name)

    def witness_key(self) -> Ed25519PublicKey:
        """Return the witness key."""
        return parse_key(self.witness, self.name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity key's PEM, hex: the figure that people compare."""
        return key_fingerprint(self.identity_key())

    def to_document(self) -> dict[str, str]:
        """Return the row as a JSON object."""
        return {
            "identity": self.identity,
            "name": self.name,
            "node": self.node,
            "tls": self.tls,
            "witness": self.witness,
        }


@dataclass(frozen=True, slots=True)
class RosterVersion:
    """One version, without its signatures.

    Attributes:
        federation: The federation's name.
        number: From 1.
        previous: Digest of the version before; "" for version 1.
        coordinator: The coordinator's Ed25519 identity key, 32 bytes, hex.
        members: By name, in the order of names.
        rotations: By member, the signature of its old identity key over `rotation_message`, hex, where its keys
            changed by its own word.

    Raises:
        LinkError: Something does not parse, is out of order, or two keys are one.
    """

    federation: str
    number: int
    previous: str
    coordinator: str = field(repr=False)
    members: Mapping[str, RosterMember] = field(repr=False)
    rotations: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_form()
        keys = [key for member in self.members.values() for key in (member.identity, member.witness)]
        keys += [key for member in self.members.values() for key in (member.node, member.tls)]
        if len({*keys, self.coordinator}) != len(keys) + 1:
            msg = "two keys of the roster are the same; each member has four keys of its own"
            raise LinkError(msg)

    def _check_form(self) -> None:
        parse_key(self.coordinator, "the coordinator's key")
        fits = (
            re.fullmatch(LENDER_NAME_PATTERN, self.federation)
            and self.number >= 1
            and bool(self.previous) == (self.number > 1)
            and (not self.previous or _DIGEST.fullmatch(self.previous))
            and 1 <= len(self.members) <= _MAX_MEMBERS
            and list(self.members) == sorted(self.members)
            and all(name == member.name for name, member in self.members.items())
            and set(self.rotations) <= set(self.members)
            and all(_SIGNATURE.fullmatch(signature) for signature in self.rotations.values())
        )
        if not fits:
            msg = "a version of the roster is not of its form; both sides must run the same release"
            raise LinkError(msg)

    def to_document(self) -> dict[str, Any]:
        """Return the version as a JSON object."""
        return {
            "coordinator": self.coordinator,
            "federation": self.federation,
            "members": [member.to_document() for member in self.members.values()],
            "number": self.number,
            "previous": self.previous,
            "rotations": dict(sorted(self.rotations.items())),
        }

    @classmethod
    def from_document(cls, document: Any) -> "RosterVersion":  # noqa: ANN401  (parsed JSON, checked here)
        """Return the version of a JSON object.

        Raises:
            LinkError: It is not one that `to_document` gives.
        """
        try:
            members = {row["name"]: RosterMember(**row) for row in document["members"]}
            fields: dict[str, Any] = {**document, "members": members}
            version = cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            msg = "a version of the roster does not parse; both sides must run the same release"
            raise LinkError(msg) from error
        # 1 and True, or a member that stands twice, are read alike and written otherwise
        if type(version.number) is not int or version.to_document() != document:
            msg = "a version of the roster is not written canonically; both sides must run the same release"
            raise LinkError(msg)
        return version

    def message(self) -> bytes:
        """Return the bytes that the coordinator and the members sign."""
        return _DOMAIN + _canonical(self.to_document())

    def digest(self) -> str:
        """Return the SHA-256 of `message`, hex: what the next version names, and people compare."""
        return hashlib.sha256(self.message()).hexdigest()

    def roster(self) -> Roster:
        """Return the members with their identity keys: what a secure sum rests on."""
        return Roster({name: public_pem(member.identity_key()) for name, member in self.members.items()})

    def witness_keys(self) -> dict[str, Ed25519PublicKey]:
        """Return the members' witness keys by name."""
        return {name: member.witness_key() for name, member in self.members.items()}

    @property
    def quorum(self) -> int:
        """How many of its members sign the next version, or make a checkpoint final."""
        return quorum_of(len(self.members))


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two versions, by name; `replaced` has other keys without the old key's word."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    rotated: tuple[str, ...]
    replaced: tuple[str, ...]

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Who enters with keys that the version before does not vouch for."""
        return tuple(sorted((*self.added, *self.replaced)))

    @property
    def is_rotation(self) -> bool:
        """Whether nothing but members' own new keys is in it."""
        return bool(self.rotated) and not (self.newcomers or self.removed)

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.newcomers or self.removed or self.rotated)


def changes_of(before: RosterVersion | None, after: RosterVersion) -> Changes:
    """Return what differs; of a member with other keys, whether a rotation is stated, not whether it holds."""
    old = {} if before is None else before.members
    other = [name for name in after.members if name in old and old[name] != after.members[name]]
    return Changes(
        added=tuple(name for name in after.members if name not in old),
        removed=tuple(name for name in old if name not in after.members),
        rotated=tuple(name for name in other if name in after.rotations),
        replaced=tuple(name for name in other if name not in after.rotations),
    )


def quorum_of(num_members: int) -> int:
    """Return floor(2m/3) + 1, at most m: two sets of so many share more than a third of the members."""
    return min(num_members, 2 * num_members // 3 + 1)


def rotation_message(federation: str, old: RosterMember, new: RosterMember) -> bytes:
    """Return the bytes by whose signature a member's old identity key takes over its new row.

    Both rows are in it: what was signed for one change of keys serves for no other.
    """
    return _ROTATION + _canonical(
        {"federation": federation, "new": new.to_document(), "old": old.to_document()}
    )


def sign_version(version: RosterVersion, key: Ed25519PrivateKey) -> str:
    """Return the signature of the coordinator or a member, hex."""
    return key.sign(version.message()).hex()


def require_signature(key: Ed25519PublicKey, signature: str, message: bytes, what: str) -> None:
    """Check an Ed25519 signature.

    Raises:
        ProtocolRefusalError: It is not this key's (rule `roster_signature`); `what` says whose it should be.
    """
    try:
        key.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError) as error:
        seen = f"{what} is not by that key; the version is forged or damaged: nobody goes by it"
        raise ProtocolRefusalError("roster_signature", seen) from error


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

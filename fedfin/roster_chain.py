"""The chain of a federation's roster versions with their signatures, and what makes each version complete."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509

from fedfin.coordinator_key import CoordinatorStatement, parse_key
from fedfin.errors import LinkError, ProtocolRefusalError
from fedfin.roster_versions import RosterVersion, changes_of, quorum_of, require_signature, rotation_message

__all__ = ["Missing", "RosterChain", "SignedRoster", "missing_signatures"]


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A version with the signatures over it that there are.

    Attributes:
        version: What is signed.
        coordinator_signature: The coordinator's, hex.
        signatures: The members', hex, by name.
    """

    version: RosterVersion
    coordinator_signature: str = field(repr=False)
    signatures: Mapping[str, str] = field(repr=False)

    def with_signature(self, name: str, signature: str) -> "SignedRoster":
        """Return the same version with one signature more."""
        signatures = dict(sorted({**self.signatures, name: signature}.items()))
        return SignedRoster(self.version, self.coordinator_signature, signatures)

    def to_document(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "coordinator_signature": self.coordinator_signature,
            "signatures": dict(sorted(self.signatures.items())),
            "version": self.version.to_document(),
        }

    @classmethod
    def from_document(cls, document: Any) -> "SignedRoster":  # noqa: ANN401  (parsed JSON, checked here)
        """Return the signed version of a JSON object.

        Raises:
            LinkError: It is not one that `to_document` gives.
        """
        try:
            fields: dict[str, Any] = {**document, "version": RosterVersion.from_document(document["version"])}
            signed = cls(**fields)
            texts: list[Any] = [signed.coordinator_signature, *signed.signatures, *signed.signatures.values()]
            fits = all(isinstance(text, str) for text in texts) and signed.to_document() == document
        except (KeyError, TypeError, AttributeError) as error:
            msg = "a signed version of the roster does not parse; both sides must run the same release"
            raise LinkError(msg) from error
        if not fits:
            msg = "a signed version of the roster is not written canonically; both sides must run the same release"
            raise LinkError(msg)
        return signed


@dataclass(frozen=True, slots=True)
class Missing:
    """What a version lacks to be complete; it is, when `newcomers` is empty and `quorum` is 0.

    Attributes:
        newcomers: Those who enter and have not signed.
        quorum: How many of `members` are to sign beyond those that did.
        members: Of the version before, those that stay and have not signed.
    """

    newcomers: tuple[str, ...]
    quorum: int
    members: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        """Whether the version is complete."""
        return not self.newcomers and self.quorum == 0

    @property
    def names(self) -> tuple[str, ...]:
        """Whose signatures are waited for, sorted."""
        return tuple(sorted({*self.newcomers, *(self.members if self.quorum else ())}))


def missing_signatures(before: RosterVersion | None, signed: SignedRoster) -> Missing:
    """Return what a version lacks; the signatures that there are have been checked (`RosterChain.verify`)."""
    changes = changes_of(before, signed.version)
    newcomers = tuple(name for name in changes.newcomers if name not in signed.signatures)
    if before is None or changes.is_rotation:
        return Missing(newcomers, 0, ())
    stay = [name for name in before.members if name not in {*changes.removed, *changes.replaced}]
    lacking = tuple(name for name in stay if name not in signed.signatures)
    # a member that was replaced signs with its new key, as a newcomer: the old one vouches for nothing
    given = [name for name in signed.signatures if name in before.members and name not in changes.replaced]
    wanting = max(0, quorum_of(len(before.members)) - len(given))
    return Missing(newcomers, min(wanting, len(lacking)) if stay else wanting, lacking)


@dataclass(frozen=True, slots=True)
class RosterChain:
    """All versions from the first on, with the authority's statement of the coordinator's key.

    The last one may lack signatures; all before it are complete.
    """

    statement: CoordinatorStatement
    versions: tuple[SignedRoster, ...]

    @property
    def last(self) -> RosterVersion:
        """The newest version."""
        return self.versions[-1].version

    @property
    def before_last(self) -> RosterVersion | None:
        """The version before the newest, or None."""
        return self.versions[-2].version if len(self.versions) > 1 else None

    def holds(self, version: RosterVersion) -> bool:
        """Whether this very version is in the chain."""
        return 1 <= version.number <= len(self.versions) and (
            self.versions[version.number - 1].version == version
        )

    def missing(self) -> Missing:
        """Return what the newest version lacks."""
        return missing_signatures(self.before_last, self.versions[-1])

    def verify(self, root: x509.Certificate, federation: str, *, complete: bool = True) -> None:
        """Check every version, every signature and every rule of the chain.

        Args:
            root: The federation's root certificate, as this side pinned it.
            federation: The federation's name.
            complete: Whether the newest version must be complete too.

        Raises:
            ProtocolRefusalError: Rules `coordinator_key`, `roster_chain`, `roster_signature`, `roster_quorum`; says
                which version and whose signature.
        """
        self.statement.verify(root, federation)
        before: RosterVersion | None = None
        for place, signed in enumerate(self.versions, 1):
            self._check_link(before, signed.version, place)
            _check_signatures(before, signed)
            missing = missing_signatures(before, signed)
            if not missing.nothing and (complete or place < len(self.versions)):
                what = f"version {place} of the roster lacks signatures: {_lacks(missing)}"
                raise ProtocolRefusalError("roster_quorum", what)
            before = signed.version

    def _check_link(self, before: RosterVersion | None, version: RosterVersion, place: int) -> None:
        if version.coordinator != self.statement.key or version.federation != self.statement.federation:
            what = (
                f"version {place} of the roster is of another coordinator or federation than the stated one"
            )
            raise ProtocolRefusalError("roster_chain", what)
        previous = "" if before is None else before.digest()
        if version.number != place or version.previous != previous:
            what = f"version {version.number} of the roster does not follow on the one before it"
            raise ProtocolRefusalError("roster_chain", what)
        changes = changes_of(before, version)
        if not changes.any or set(version.rotations) != set(changes.rotated):
            what = f"version {place} of the roster changes nothing, or states a change of keys that is none"
            raise ProtocolRefusalError("roster_chain", what)

    def to_json(self) -> str:
        """Return the chain as canonical JSON text."""
        document = {
            "coordinator": self.statement.to_document(),
            "versions": [signed.to_document() for signed in self.versions],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "RosterChain":
        """Return the chain that `to_json` wrote; nothing else is accepted.

        Raises:
            LinkError: The text is nothing of the kind.
        """
        try:
            document = json.loads(text)
            versions = tuple(SignedRoster.from_document(part) for part in document["versions"])
            chain = cls(CoordinatorStatement.from_document(document["coordinator"]), versions)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            msg = "the chain of rosters does not parse; both sides must run the same release"
            raise LinkError(msg) from error
        if not versions or chain.to_json() != text:
            msg = "the chain of rosters is empty or not written canonically; both sides must run the same release"
            raise LinkError(msg)
        return chain


def _check_signatures(before: RosterVersion | None, signed: SignedRoster) -> None:
    """Check each signature that is there; of who may sign it, not of how many did."""
    version, changes = signed.version, changes_of(before, signed.version)
    about = f"version {version.number} of the roster"
    whose = f"the coordinator's signature of {about}"
    coordinator = parse_key(version.coordinator, "the coordinator's key")
    require_signature(coordinator, signed.coordinator_signature, version.message(), whose)
    old = {} if before is None else before.members
    for name, signature in signed.signatures.items():
        member = version.members.get(name) if name in changes.newcomers else old.get(name)
        if member is None:
            what = f"{name} signed {about}, and is a member of neither it nor the one before"
            raise ProtocolRefusalError("roster_signature", what)
        require_signature(
            member.identity_key(), signature, version.message(), f"{name}'s signature of {about}"
        )
    for name, signature in version.rotations.items():
        message = rotation_message(version.federation, old[name], version.members[name])
        whose = f"the signature of {name}'s old key over its new ones in {about}"
        require_signature(old[name].identity_key(), signature, message, whose)


def _lacks(missing: Missing) -> str:
    parts: list[str] = []
    if missing.newcomers:
        parts.append(f"{', '.join(missing.newcomers)} did not sign to enter")
    if missing.quorum:
        parts.append(f"{missing.quorum} more of its earlier members must sign")
    return " and ".join(parts)

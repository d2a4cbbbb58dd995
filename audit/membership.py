"""Who may sign and cosign a federation's log: its roster's versions, held against the federation's root certificate.

A folder of the coordinator or of a run holds `ca.pem` (the root) and `roster.json` (all versions with their
signatures, and the root's statement of the coordinator's key). Both prove themselves, given the root's fingerprint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.findings import FoundError
from fedfin.coordinator_key import CoordinatorStatement
from fedfin.errors import LinkError, ProtocolRefusalError
from fedfin.identity import fingerprint_of
from fedfin.roster_chain import RosterChain

__all__ = ["ROOT", "ROSTER", "Membership", "read_membership", "stated_coordinator"]

ROOT: Final = "ca.pem"
ROSTER: Final = "roster.json"
STATEMENT: Final = "coordinator.json"

_FORGED: Final = "members were invented, or a signature is forged: rely on no checkpoint that they cosigned"


@dataclass(frozen=True, slots=True)
class Membership:
    """A federation's members by its last roster version, which was verified.

    Attributes:
        root: Fingerprint of the root certificate.
        coordinator: Fingerprint of the coordinator's identity key, as the root states it.
        witnesses: The members' witness keys, by name.
        identities: Every identity key that a member had in some version, by name.
        quorum: Cosignatures that make a checkpoint final.
        told: What was checked, in words.
    """

    root: str
    coordinator: str
    witnesses: Mapping[str, Ed25519PublicKey] = field(repr=False)
    identities: Mapping[str, tuple[Ed25519PublicKey, ...]] = field(repr=False)
    quorum: int
    told: str


def read_membership(folder: Path, trusted: frozenset[str]) -> Membership | None:
    """Read and verify the roster beside a log; None where there is none.

    Args:
        folder: Of the coordinator or a run.
        trusted: Fingerprints; where it names any, the root or the coordinator must be among them.

    Raises:
        FoundError: The roster does not follow from the root, or from any fingerprint that is trusted.
    """
    if not (folder / ROSTER).exists() or not (folder / ROOT).exists():
        return None
    try:
        root = x509.load_pem_x509_certificate((folder / ROOT).read_bytes())
        chain = RosterChain.from_json((folder / ROSTER).read_text(encoding="utf-8").rstrip("\n"))
        chain.verify(root, chain.last.federation)
    except (LinkError, ProtocolRefusalError) as error:
        raise FoundError(None, f"{ROSTER}: {error}", _FORGED) from error
    except (OSError, ValueError) as error:
        what = f"{ROOT} or {ROSTER} cannot be read ({error})"
        raise FoundError(None, what, "the folder is damaged: restore it from its backup") from error
    found, coordinator = fingerprint_of(root), chain.statement.fingerprint
    if trusted and not trusted & {found, coordinator}:
        what = f"the roster is of the federation with the root {found} and the coordinator {coordinator}"
        raise FoundError(
            None, what, "neither is trusted: it is another federation, or the fingerprint is another's"
        )
    last = chain.last
    return Membership(
        root=found,
        coordinator=coordinator,
        witnesses=last.witness_keys(),
        identities=_identities(chain),
        quorum=last.quorum,
        told=(
            f"{len(chain.versions)} version(s), each signed by its quorum and the coordinator;"
            f" {len(last.members)} members; the root is {found}"
        ),
    )


def stated_coordinator(folder: Path, root_fingerprint: str) -> str | None:
    """Return the fingerprint of the coordinator's key that this root states; None where the folder does not hold it.

    Raises:
        FoundError: The statement is not signed by the root that lies beside it.
    """
    if not (folder / STATEMENT).exists() or not (folder / ROOT).exists():
        return None
    try:
        root = x509.load_pem_x509_certificate((folder / ROOT).read_bytes())
        if fingerprint_of(root) != root_fingerprint:
            return None
        statement = CoordinatorStatement.from_json(
            (folder / STATEMENT).read_text(encoding="utf-8").rstrip("\n")
        )
        statement.verify(root, statement.federation)
    except (LinkError, ProtocolRefusalError, OSError, ValueError) as error:
        raise FoundError(None, f"{STATEMENT}: {error}", _FORGED) from error
    return statement.fingerprint


def _identities(chain: RosterChain) -> dict[str, tuple[Ed25519PublicKey, ...]]:
    found: dict[str, dict[str, Ed25519PublicKey]] = {}
    for signed in chain.versions:
        for name, member in signed.version.members.items():
            found.setdefault(name, {})[member.identity] = member.identity_key()
    return {name: tuple(keys.values()) for name, keys in found.items()}

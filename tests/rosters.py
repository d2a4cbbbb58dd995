"""Federations of tests as the rosters see them: one authority, one coordinator, members with keys, signed versions."""

import json
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from fedfin.coordinator_key import CoordinatorIdentity, CoordinatorStatement
from fedfin.identity import (
    CertificateAuthority,
    LenderKeys,
    create_authority,
    create_lender_keys,
    key_fingerprint,
    public_pem,
)
from fedfin.roster_chain import RosterChain, SignedRoster
from fedfin.roster_versions import RosterMember, RosterVersion, changes_of, rotation_message, sign_version
from fedfin.server.roster import Member

FEDERATION = "test"


@cache
def authority() -> CertificateAuthority:
    return create_authority(FEDERATION)


@cache
def coordinator() -> CoordinatorIdentity:
    key = create_lender_keys().identity
    return CoordinatorIdentity(CoordinatorStatement.make(authority(), FEDERATION, key.public_key()), key)


@cache
def keys_of(name: str) -> LenderKeys:
    """The same keys for the same name in a test run."""
    del name
    return create_lender_keys()


def member(name: str, keys: LenderKeys | None = None) -> RosterMember:
    keys = keys or keys_of(name)
    return RosterMember(
        name,
        keys.identity.public_key().public_bytes_raw().hex(),
        keys.witness.public_key().public_bytes_raw().hex(),
        key_fingerprint(keys.node.public_key()),
        key_fingerprint(keys.tls.public_key()),
    )


def version(names, after: RosterVersion | None = None, *, rotated=None, **changes) -> RosterVersion:
    """A version of these members, by name or as a mapping to their keys; `rotated` maps a member to its old keys."""
    keys = names if isinstance(names, dict) else {name: keys_of(name) for name in names}
    members = {name: member(name, keys[name]) for name in sorted(keys)}
    rotations = {
        name: old.identity.sign(rotation_message(FEDERATION, member(name, old), members[name])).hex()
        for name, old in (rotated or {}).items()
    }
    fields = {
        "federation": FEDERATION,
        "number": 1 if after is None else after.number + 1,
        "previous": "" if after is None else after.digest(),
        "coordinator": coordinator().statement.key,
        "members": members,
        "rotations": rotations,
        **changes,
    }
    return RosterVersion(**fields)


def signed(of: RosterVersion, signers, by=None) -> SignedRoster:
    """The version with the coordinator's signature (or another key's) and these members'."""
    keys = signers if isinstance(signers, dict) else {name: keys_of(name) for name in signers}
    signatures = {name: sign_version(of, keys[name].identity) for name in sorted(keys)}
    return SignedRoster(of, sign_version(of, by or coordinator().key), signatures)


def chain(*versions: SignedRoster) -> RosterChain:
    return RosterChain(coordinator().statement, versions)


def founded(keys) -> RosterChain:
    """Version 1 of these lenders, by name or as a mapping to their keys, signed by all."""
    return chain(signed(version(keys), keys))


def followed(before: RosterChain, keys, *, signers=None) -> RosterChain:
    """The chain with one version more, signed by all who may sign it (or by `signers`)."""
    after = version(keys, before.last)
    if signers is None:
        signers = {name: keys[name] for name in keys} if isinstance(keys, dict) else list(keys)
    assert changes_of(before.last, after).any
    return chain(*before.versions, signed(after, signers))


@cache
def _certificate(name: str, tls) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(tls, hashes.SHA256())
    certificate = authority().issue_lender(request, name)
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def enrolled(name: str, keys: LenderKeys | None = None) -> Member:
    """The row of federation.db for a lender with these keys."""
    keys = keys or keys_of(name)
    return Member(
        name,
        public_pem(keys.node.public_key()),
        _certificate(name, keys.tls),
        public_pem(keys.identity.public_key()),
        public_pem(keys.witness.public_key()),
        "signature",
    )


def pin(directory: Path, of: RosterChain) -> None:
    """Leave a lender's folder as if it had taken part by the last version of this chain."""
    text = json.dumps(of.versions[-1].to_document(), sort_keys=True, separators=(",", ":"))
    (directory / "roster.json").write_text(text)
    (directory / "coordinator.json").write_text(of.statement.to_json())

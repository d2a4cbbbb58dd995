"""How a version of the roster comes about: from the members, by their signatures, asked for until it is complete.

The coordinator may go by no version that lacks one: the first job of a federation waits for version 1, later ones go on
with the last complete version, and who is not in it takes part from the version on that lets it in.
"""

import time
from collections.abc import Collection
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedfin.coordinator_key import CoordinatorIdentity
from fedfin.errors import ConfigError, LinkError, ProtocolRefusalError
from fedfin.identity import key_fingerprint
from fedfin.roster_chain import Missing, RosterChain, SignedRoster, missing_signatures
from fedfin.roster_versions import (
    RosterMember,
    RosterVersion,
    changes_of,
    require_signature,
    sign_version,
)
from fedfin.server.exchange import Exchange
from fedfin.server.jobs import Say
from fedfin.server.roster import FederationStore, Member
from fedfin.update import Refused, RosterSigned, ShowRoster

__all__ = ["ASK_S", "RosterBook", "RosterSigning", "member_row", "versions_document"]

ASK_S: Final = 2.0
"""A lender whose engineer has not approved a version yet is asked again after this long."""

_ANSWER_S: Final = 20.0


class RosterBook:
    """The coordinator's roster versions: the complete ones, and the one that its members now make."""

    def __init__(self, store: FederationStore, identity: CoordinatorIdentity) -> None:
        self._store = store
        self._identity = identity

    def chain(self) -> RosterChain | None:
        """Return the complete versions, or None before the first."""
        versions = self._store.versions.complete()
        return RosterChain(self._identity.statement, versions) if versions else None

    def candidate(self) -> RosterChain | None:
        """Return the chain with the version that the members of now make, and the signatures it has so far.

        None where nobody is enrolled, or the last complete version has these very members. Signatures over an earlier
        candidate are dropped: what was signed was another roster.
        """
        complete, kept = self._store.versions.complete(), self._store.versions.candidate()
        last = complete[-1].version if complete else None
        version = self._next_version(last)
        if version is None:
            if kept is not None:
                self._store.versions.withdraw()
            return None
        if kept is None or kept.version != version:
            kept = SignedRoster(version, sign_version(version, self._identity.key), {})
            self._store.versions.propose(kept)
        return RosterChain(self._identity.statement, (*complete, kept))

    def _next_version(self, last: RosterVersion | None) -> RosterVersion | None:
        """Return the version after `last` with the members of now, or None where they are the same."""
        members = {member.name: member_row(member) for member in self._store.members()}
        if not members or (last is not None and dict(last.members) == members):
            return None
        statement = self._identity.statement
        return RosterVersion(
            federation=statement.federation,
            number=1 if last is None else last.number + 1,
            previous="" if last is None else last.digest(),
            coordinator=statement.key,
            members={name: members[name] for name in sorted(members)},
        )

    def rotation(self, before: RosterMember, after: RosterMember, signature: str) -> SignedRoster | None:
        """Return the version in which a member has new keys, complete; None where it is in no version yet.

        Raises:
            LinkError: The version before has other keys of it: they were replaced since, which its members must sign.
        """
        complete = self._store.versions.complete()
        last = complete[-1].version if complete else None
        if last is None or before.name not in last.members:
            return None
        if last.members[before.name] != before:
            msg = f"the roster has other keys of {before.name} than it is enrolled with; its members must sign first"
            raise LinkError(msg)
        version = RosterVersion(
            federation=last.federation,
            number=last.number + 1,
            previous=last.digest(),
            coordinator=last.coordinator,
            members={**last.members, after.name: after},
            rotations={after.name: signature},
        )
        return SignedRoster(version, sign_version(version, self._identity.key), {})

    def add(self, name: str, signature: str) -> Missing:
        """Take a member's signature over the candidate; keep it as a version once it is complete.

        Returns:
            What it lacks after this.

        Raises:
            ProtocolRefusalError: It is not this member's signature (rule `roster_signature`).
            LinkError: There is no candidate any more, or the member is in neither version.
        """
        chain = self.candidate()
        if chain is None:
            msg = f"{name} signed a version of the roster that nobody asks for any more"
            raise LinkError(msg)
        signed, before = chain.versions[-1], chain.before_last
        newcomers = changes_of(before, signed.version).newcomers
        rows = signed.version.members if name in newcomers or before is None else before.members
        if name not in rows:
            msg = f"{name} signed a version of the roster in which it is not"
            raise LinkError(msg)
        about = f"the signature of {name} over version {signed.version.number} of the roster"
        require_signature(rows[name].identity_key(), signature, signed.version.message(), about)
        signed = signed.with_signature(name, signature)
        missing = missing_signatures(before, signed)
        if missing.nothing:
            self._store.versions.add(signed)
        else:
            self._store.versions.propose(signed)
        return missing


class RosterSigning:
    """Asks the lenders that are online for their signatures, while a job gathers."""

    def __init__(self, exchange: Exchange, book: RosterBook, job_id: str, say: Say) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            book: The versions.
            job_id: The job that gathers.
            say: Told of every step.
        """
        self._exchange = exchange
        self._book = book
        self._job_id = job_id
        self._say = say
        self._ask_at: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()

    def chain(self) -> RosterChain | None:
        """Return the complete versions, or None before the first."""
        return self._book.chain()

    def waits_for(self) -> tuple[str, ...]:
        """Return whose approval the next version waits for, sorted; empty where there is none."""
        candidate = self._book.candidate()
        return () if candidate is None else candidate.missing().names

    def ask(self, online: Collection[str]) -> None:
        """Ask those who are online and have not signed the next version, each again after `ASK_S`."""
        chain = self._book.candidate()
        if chain is None:
            return
        digest, now = chain.last.digest(), time.monotonic()
        if (digest, "") not in self._told:
            self._told.add((digest, ""))
            self._ask_at.clear()
            self._say({"event": "roster_proposed", **_about(chain)})
        names = [
            name
            for name in chain.missing().names
            # who is taken off the roster is not asked whether it agrees
            if name in online and name in chain.last.members and self._ask_at.get(name, 0.0) <= now
        ]
        if not names:
            return
        question = ShowRoster(self._job_id, chain.to_json())
        answers = self._exchange.ask(dict.fromkeys(names, question), RosterSigned, deadline_s=_ANSWER_S)
        self._ask_at |= dict.fromkeys(names, time.monotonic() + ASK_S)
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, RosterSigned):
                self._take(name, reply)
            elif isinstance(reply, Refused) and (digest, name) not in self._told:
                self._told.add((digest, name))
                self._say({"event": "roster_waits", "lender": name, "reason": reply.reason})
        self._tell_complete(chain.last.number)

    def _take(self, name: str, reply: RosterSigned) -> None:
        try:
            self._book.add(name, reply.signature)
        except (ProtocolRefusalError, LinkError) as error:
            self._say({"event": "unanswered", "lender": name, "reason": str(error)})

    def _tell_complete(self, number: int) -> None:
        chain = self._book.chain()
        if chain is not None and chain.last.number == number:
            self._say({"event": "roster_complete", **_about(chain)})


def versions_document(book: RosterBook) -> dict[str, Any]:
    """Return the last complete version and the one that waits, for `fedfin server roster`; None where there is none."""
    chain, candidate = book.chain(), book.candidate()
    return {
        "version": None if chain is None else _about(chain),
        "waiting": None
        if candidate is None
        else {**_about(candidate), "waits_for": list(candidate.missing().names)},
    }


def member_row(member: Member) -> RosterMember:
    """Return a member's row in the roster.

    Raises:
        ConfigError: Its row in federation.db is damaged.
    """
    try:
        identity, witness, node = (
            load_pem_public_key(pem.encode())
            for pem in (member.identity_key, member.witness_key, member.node_key)
        )
        tls = x509.load_pem_x509_certificate(member.certificate.encode()).public_key()
        assert isinstance(identity, Ed25519PublicKey)  # noqa: S101  (checked at enrolment, as are the others)
        assert isinstance(witness, Ed25519PublicKey)  # noqa: S101
        assert isinstance(node, ec.EllipticCurvePublicKey)  # noqa: S101
        assert isinstance(tls, ec.EllipticCurvePublicKey)  # noqa: S101
    except (ValueError, AssertionError) as error:
        msg = f"the keys of {member.name} in federation.db are damaged; restore it, or remove {member.name}"
        raise ConfigError(msg) from error
    return RosterMember(
        member.name,
        identity.public_bytes_raw().hex(),
        witness.public_bytes_raw().hex(),
        key_fingerprint(node),
        key_fingerprint(tls),
    )


def _about(chain: RosterChain) -> dict[str, Any]:
    """Return what is told of a chain's last version."""
    version, changes = chain.last, changes_of(chain.before_last, chain.last)
    return {
        "number": version.number,
        "digest": version.digest(),
        "previous": version.previous,
        "members": list(version.members),
        "signed_by": sorted(chain.versions[-1].signatures),
        "added": list(changes.added),
        "removed": list(changes.removed),
        "changed": sorted((*changes.rotated, *changes.replaced)),
    }

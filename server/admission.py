"""Who may speak to the SuperLink: the members of now; and what the federation's log says when that changes."""

import time
from collections.abc import Callable
from threading import Lock
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedfin.audit.events import Event, Revocation, RosterVersion, Rotation, bounded
from fedfin.audit.log import AuditLog
from fedfin.identity import key_fingerprint
from fedfin.roster_chain import SignedRoster
from fedfin.server.renewal import Rotated
from fedfin.server.roster import FederationStore, Member
from fedfin.server.roster_signing import member_row

__all__ = ["MemberKeys", "log_rotation", "revoke"]

_FRESH_S: Final = 1.0


class MemberKeys:
    """The members' node and TLS keys, looked up again every second: a removed member is shut out within it."""

    def __init__(self, store: FederationStore, to_bytes: Callable[[Member], bytes]) -> None:
        """Prepare; `to_bytes` gives a member's node key as requests carry it."""
        self._store = store
        self._to_bytes = to_bytes
        self._keys: dict[bytes, str] = {}
        self._looked_at = -_FRESH_S
        self._lock = Lock()

    def knows(self, key: bytes, certificate: bytes) -> bool:
        """Tell whether a member has this node key now, and this certificate's key.

        Args:
            key: As requests carry it.
            certificate: What the connection showed, DER, verified against the root; empty where it showed none.

        Raises:
            LinkError: federation.db cannot be read: nobody is let in.
        """
        with self._lock:
            if time.monotonic() - self._looked_at >= _FRESH_S:
                members = self._store.members()
                self._keys = {self._to_bytes(member): member_row(member).tls for member in members}
                self._looked_at = time.monotonic()
            return bool(certificate) and key in self._keys and self._keys[key] == _tls_of(certificate)

    def forget(self) -> None:
        """Look again at the next request: a member came, or has a new key."""
        with self._lock:
            self._looked_at = -_FRESH_S


def _tls_of(certificate: bytes) -> str:
    key = x509.load_der_x509_certificate(certificate).public_key()
    return key_fingerprint(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""


def revoke(store: FederationStore, log: AuditLog, name: str, reason: str) -> None:
    """Take a member off: it is asked and let in no more; the entry comes first.

    Args:
        store: The federation's.
        log: The federation's, open.
        name: The member.
        reason: For the log, in words; no person's name.

    Raises:
        EnrolmentError: Nobody of that name is enrolled.
        AuditError: It cannot be logged, and so is not done.
    """
    if name in {member.name for member in store.members()}:
        log.append(Revocation(member=name, reason=bounded(reason)))
    store.remove(name)


def log_rotation(log: AuditLog, rotated: Rotated) -> None:
    """Log a member's new keys, and the version of the roster that they made."""
    before, after = member_row(rotated.before), member_row(rotated.after)
    kinds: tuple[Literal["identity", "witness", "node", "tls"], ...] = ("identity", "witness", "node", "tls")
    events: list[Event] = [
        Rotation(
            member=after.name,
            key=kind,
            old=getattr(before, kind),
            new=getattr(after, kind),
            proof=rotated.proof if kind == "identity" else None,
        )
        for kind in kinds
    ]
    if rotated.version is not None:
        events.append(_event_of(rotated.version, after.name))
    log.append_many(events)


def _event_of(signed: SignedRoster, changed: str) -> RosterVersion:
    version = signed.version
    return RosterVersion(
        action="signed",
        number=version.number,
        digest=version.digest(),
        previous=version.previous or None,
        num_members=len(version.members),
        changed=(changed,),
    )

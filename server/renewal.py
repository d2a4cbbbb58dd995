"""A member's new keys, and new certificates of members and of the server itself: `/v1/enrol/rotate`, `/v1/enrol/renew`.

New keys are signed by the old identity key, and make a version of the roster at once, which needs nobody else's word.
A certificate is renewed for the TLS key that the roster names.
"""

import dataclasses
from collections.abc import Callable

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from fedfin.enrolling import RenewalRequest, RotationRequest
from fedfin.errors import EnrolmentError, LinkError, ProtocolRefusalError
from fedfin.identity import CertificateAuthority, key_fingerprint, verify_signature
from fedfin.roster_chain import SignedRoster
from fedfin.roster_versions import require_signature, rotation_message
from fedfin.server.enrolled_keys import check_possession, keys_of
from fedfin.server.roster import FederationStore, Member
from fedfin.server.roster_signing import RosterBook, member_row

__all__ = ["RenewalDesk", "Rotated"]


@dataclasses.dataclass(frozen=True, slots=True)
class Rotated:
    """What a rotation changed.

    Attributes:
        before: The member with its old keys.
        after: The same lender with its new ones.
        proof: The old identity key's signature, hex.
        version: The version of the roster that it made; None before the first.
    """

    before: Member
    after: Member
    proof: str
    version: SignedRoster | None


class RenewalDesk:
    """Checks a member's requests; `log` logs new keys before they count, `on_rotated` tells the SuperLink of them."""

    def __init__(
        self,
        store: FederationStore,
        authority: CertificateAuthority,
        book: RosterBook,
        federation: str,
        on_rotated: Callable[[Rotated], None],
        *,
        log: Callable[[Rotated], None],
    ) -> None:
        self._store = store
        self._authority = authority
        self._book = book
        self._federation = federation
        self._on_rotated = on_rotated
        self._log = log

    def rotate(self, body: bytes) -> str:
        """Take over a member's new keys.

        Args:
            body: A `RotationRequest` as JSON.

        Returns:
            The certificate of the new TLS key, PEM.

        Raises:
            EnrolmentError: The request is malformed, a key's possession is not proved, the old identity key did not
                sign it, or a key is another member's.
            AuditError: It cannot be logged, and so is not done.
        """
        try:
            request = RotationRequest.model_validate_json(body)
            wanted = x509.load_pem_x509_csr(request.certificate_request.encode())
            keys = keys_of(request)
        except (ValidationError, UnsupportedAlgorithm, ValueError) as error:
            msg = "the request for new keys is malformed; both sides must run the same release of fedfin"
            raise EnrolmentError(msg) from error
        before = self._member(request.name)
        check_possession(request, keys)
        if (before.node_key, before.identity_key, before.witness_key) == tuple(keys.values()):
            self._require_same_key(before, wanted)
            return before.certificate  # the first answer was lost on its way, and is given again
        certificate = self._authority.issue_lender(wanted, request.name)
        after = dataclasses.replace(
            before,
            node_key=request.node_key,
            certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            identity_key=request.identity_key,
            witness_key=request.witness_key,
            signature=request.signatures["identity"],
        )
        self._check_new(before, after)
        old, new = member_row(before), member_row(after)
        try:
            message = rotation_message(self._federation, old, new)
            require_signature(
                old.identity_key(), request.rotation, message, "the signature over the new keys"
            )
            version = self._book.rotation(old, new, request.rotation)
            rotated = Rotated(before, after, request.rotation, version)
            self._store.replace_keys(before, after, version, lambda: self._log(rotated))
        except (ProtocolRefusalError, LinkError) as error:
            raise EnrolmentError(str(error)) from error
        self._on_rotated(rotated)
        return after.certificate

    def renew(self, body: bytes) -> str:
        """Renew a member's certificate.

        Args:
            body: A `RenewalRequest` as JSON.

        Returns:
            The new certificate, PEM.

        Raises:
            EnrolmentError: The request is malformed, its sender is no member, did not sign it, or asks for another key.
        """
        try:
            request = RenewalRequest.model_validate_json(body)
            wanted = x509.load_pem_x509_csr(request.certificate_request.encode())
            signature = bytes.fromhex(request.signatures["identity"])
        except (ValidationError, UnsupportedAlgorithm, ValueError, KeyError) as error:
            msg = "the request for a certificate is malformed; both sides must run the same release of fedfin"
            raise EnrolmentError(msg) from error
        member = self._member(request.name)
        verify_signature(member.identity_key, signature, request.transcript())
        self._require_same_key(member, wanted)
        certificate = self._authority.issue_lender(wanted, request.name)
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        self._store.replace_keys(member, dataclasses.replace(member, certificate=pem), None)
        return pem

    def _member(self, name: str) -> Member:
        for member in self._store.members():
            if member.name == name:
                return member
        msg = f"{name} is not a member of this federation: it was removed or never joined; ask for an invitation"
        raise EnrolmentError(msg)

    def _check_new(self, before: Member, after: Member) -> None:
        """Refuse a key that is in use: the old ones must not stay, nor may two lenders have one."""
        known = {key for member in self._store.members() for key in _all_keys(member)} | _all_keys(before)
        if known & _all_keys(after):
            msg = f"a new key of {after.name} is in use already; make new keys again (`fedfin client rotate`)"
            raise EnrolmentError(msg)

    @staticmethod
    def _require_same_key(member: Member, wanted: x509.CertificateSigningRequest) -> None:
        key = wanted.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key_fingerprint(key) != member_row(member).tls:
            msg = (
                f"the certificate is asked for another key than {member.name} is enrolled with; new keys are made by"
                " `fedfin client rotate`"
            )
            raise EnrolmentError(msg)


def _all_keys(member: Member) -> set[str]:
    return {member.node_key, member.identity_key, member.witness_key, member_row(member).tls}

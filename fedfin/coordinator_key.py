"""The coordinator's identity key: what signs rosters, its log's checkpoints and finished runs, stated by the authority.

Lenders know the federation by the fingerprint of its root certificate. The root's key signs one statement that names
the coordinator's Ed25519 key, so that a lender holds everything the coordinator signs against what its token carried.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.errors import LinkError, ProtocolRefusalError
from fedfin.identity import CertificateAuthority, fingerprint_of, key_fingerprint

__all__ = ["CoordinatorIdentity", "CoordinatorStatement", "parse_key"]

_DOMAIN: Final = b"fedfin coordinator 1\n"
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class CoordinatorStatement:
    """The federation's authority says which identity key is the coordinator's.

    Attributes:
        federation: The federation's name.
        root: SHA-256 of the root certificate, hex.
        key: The coordinator's Ed25519 public key, 32 bytes, hex.
        signature: ECDSA with SHA-256 by the root's key, DER, hex.
    """

    federation: str
    root: str
    key: str
    signature: str = field(repr=False)

    @classmethod
    def make(
        cls, authority: CertificateAuthority, federation: str, key: Ed25519PublicKey
    ) -> "CoordinatorStatement":
        """Return the statement, signed by the authority's key."""
        raw = key.public_bytes_raw().hex()
        signature = authority.key.sign(
            _message(federation, authority.fingerprint, raw), ec.ECDSA(hashes.SHA256())
        )
        return cls(federation, authority.fingerprint, raw, signature.hex())

    def public_key(self) -> Ed25519PublicKey:
        """Return the coordinator's key."""
        return parse_key(self.key, "the coordinator's key")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the coordinator's key as PEM, hex: the figure that people compare."""
        return key_fingerprint(self.public_key())

    def verify(self, root: x509.Certificate, federation: str) -> None:
        """Hold the statement against the federation's root.

        Args:
            root: The root certificate that this side pinned.
            federation: The name of the federation that this side is in.

        Raises:
            ProtocolRefusalError: It is of another federation, or the root's key did not sign it (rule
                `coordinator_key`).
        """
        mend = "ask the coordinator's operator, on another way, which fingerprint its root has; do not go on before"
        if self.root != fingerprint_of(root) or self.federation != federation:
            what = f"the coordinator's key is stated for another federation or root than {federation}; {mend}"
            raise ProtocolRefusalError("coordinator_key", what)
        key = root.public_key()
        try:
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise InvalidSignature  # noqa: TRY301  (a root of another kind signed nothing of ours)
            message = _message(self.federation, self.root, self.key)
            key.verify(bytes.fromhex(self.signature), message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            what = f"the coordinator's key is not signed by the federation's authority; {mend}"
            raise ProtocolRefusalError("coordinator_key", what) from error

    def to_json(self) -> str:
        """Return the statement as canonical JSON text."""
        return json.dumps(self.to_document(), sort_keys=True, separators=(",", ":"))

    def to_document(self) -> dict[str, str]:
        """Return the statement as a JSON object."""
        return {
            "federation": self.federation,
            "key": self.key,
            "root": self.root,
            "signature": self.signature,
        }

    @classmethod
    def from_json(cls, text: str) -> "CoordinatorStatement":
        """Return the statement that `to_json` wrote.

        Raises:
            LinkError: The text is nothing of the kind.
        """
        try:
            return cls.from_document(json.loads(text))
        except (ValueError, RecursionError) as error:
            msg = (
                "the statement of the coordinator's key does not parse; both sides must run the same release"
            )
            raise LinkError(msg) from error

    @classmethod
    def from_document(cls, document: Any) -> "CoordinatorStatement":  # noqa: ANN401  (parsed JSON, checked here)
        """Return the statement of a JSON object; errors as `from_json`."""
        names = ("federation", "root", "key", "signature")
        if (
            not isinstance(document, dict)
            or set(document) != set(names)
            or not all(isinstance(value, str) for value in document.values())
            or not set(document["signature"]) <= _HEX
            or len(document["signature"]) % 2
        ):
            msg = (
                "the statement of the coordinator's key does not parse; both sides must run the same release"
            )
            raise LinkError(msg)
        statement = cls(**document)
        statement.public_key()
        return statement


@dataclass(frozen=True, slots=True)
class CoordinatorIdentity:
    """The coordinator's identity key, which only it holds, with the authority's statement of it."""

    statement: CoordinatorStatement
    key: Ed25519PrivateKey = field(repr=False)


def parse_key(text: str, what: str) -> Ed25519PublicKey:
    """Return an Ed25519 public key of 64 hexadecimal digits; `what` names it in the error.

    Raises:
        LinkError: The text is nothing of the kind.
    """
    if len(text) != 64 or not set(text) <= _HEX:
        msg = f"{what} is not 32 bytes in hexadecimal digits; both sides must run the same release"
        raise LinkError(msg)
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def _message(federation: str, root: str, key: str) -> bytes:
    body = {"federation": federation, "key": key, "root": root}
    return _DOMAIN + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

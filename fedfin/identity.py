"""Keys, certificates and fingerprints.

A federation has one certificate authority, made by `fedfin server init` and known by the SHA-256 fingerprint
of its root certificate. A lender has four keys, made on its own machine and never leaving it: P-256 for TLS,
P-384 for Flower's node authentication, Ed25519 for its identity (signs what it says) and Ed25519 for
witnessing (a separate key, since a cosignature does not name the log it is for).

Source: RFC 5280 (certificates), RFC 8032 (Ed25519), `flwr.supercore.primitives.asymmetric` (node keys).
"""

import datetime as dt
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfin.errors import ConfigError, EnrolmentError
from fedfin.files import write_private

__all__ = [
    "LEAF_DAYS",
    "RENEW_DAYS",
    "CertificateAuthority",
    "LenderKeys",
    "certificate_request",
    "create_authority",
    "create_identity_key",
    "create_lender_keys",
    "fingerprint_of",
    "is_due",
    "key_fingerprint",
    "load_authority",
    "load_identity_key",
    "load_lender_keys",
    "private_pem",
    "public_pem",
    "save_lender_keys",
    "verify_signature",
]


_ROOT_DAYS: Final = 3650


LEAF_DAYS: Final = 30
"""How long a certificate is valid: whoever holds it renews it by itself."""

RENEW_DAYS: Final = 10
"""A certificate with fewer days left is renewed."""


@dataclass(frozen=True, slots=True)
class LenderKeys:
    """The four private keys of a lender; the repr shows none of them."""

    tls: ec.EllipticCurvePrivateKey = field(repr=False)
    node: ec.EllipticCurvePrivateKey = field(repr=False)
    identity: ed25519.Ed25519PrivateKey = field(repr=False)
    witness: ed25519.Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """The federation's root: its certificate, and the key that signs with it."""

    root: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the root certificate, hex: what lenders pin."""
        return fingerprint_of(self.root)

    def issue_server(self, key: ec.EllipticCurvePrivateKey, hosts: tuple[str, ...]) -> x509.Certificate:
        """Return a server certificate for `key`, valid for each of `hosts` (names or addresses)."""
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        return self._issue(key.public_key(), hosts[0], names, ExtendedKeyUsageOID.SERVER_AUTH)

    def issue_lender(self, request: x509.CertificateSigningRequest, name: str) -> x509.Certificate:
        """Return a client certificate for the key of `request`, in the name of the lender.

        Raises:
            EnrolmentError: The request is not signed by its own key, or its key is not P-256.
        """
        try:
            key, signed = request.public_key(), request.is_signature_valid
        except (UnsupportedAlgorithm, ValueError):
            key, signed = None, False
        if not signed:
            msg = "the certificate request is not signed by its own key; run `fedfin client join` again"
            raise EnrolmentError(msg)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            msg = "the TLS key is not P-256; run `fedfin client join` with this release of fedfin"
            raise EnrolmentError(msg)
        return self._issue(key, name, [x509.DNSName(name)], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        alternatives: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.root.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # A day early: a lender's clock an hour slow must reach the message that says so.
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=LEAF_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )


def create_authority(name: str) -> CertificateAuthority:
    """Return a new root for the federation `name`: P-256, valid ten years, path length 0."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedfin federation"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    root = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=_ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificateAuthority(root=root, key=key)


def load_authority(root_path: Path, key_path: Path) -> CertificateAuthority:
    """Read the root and its key.

    Raises:
        ConfigError: A file is missing, unreadable or of the wrong kind.
    """
    try:
        root = x509.load_pem_x509_certificate(_read(root_path, "`fedfin server init`"))
    except ValueError as error:
        msg = f"{root_path} is no PEM certificate; restore it from the backup of the folder"
        raise ConfigError(msg) from error
    key = _load_key(key_path, "`fedfin server init`")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        msg = f"{key_path} does not hold the key of {root_path}; restore both from the backup of the folder"
        raise ConfigError(msg)
    return CertificateAuthority(root=root, key=key)


def create_lender_keys() -> LenderKeys:
    """Return four fresh keys."""
    return LenderKeys(
        tls=ec.generate_private_key(ec.SECP256R1()),
        node=ec.generate_private_key(ec.SECP384R1()),
        identity=ed25519.Ed25519PrivateKey.generate(),
        witness=ed25519.Ed25519PrivateKey.generate(),
    )


def create_identity_key() -> ed25519.Ed25519PrivateKey:
    """Return a fresh identity key, as the coordinator has one."""
    return ed25519.Ed25519PrivateKey.generate()


def load_identity_key(path: Path, maker: str) -> ed25519.Ed25519PrivateKey:
    """Read an identity key; `maker` is the command that made it.

    Raises:
        ConfigError: It is missing, unreadable by this user, readable by others, or of another kind.
    """
    key = _load_key(path, maker)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        msg = f"{path} holds no Ed25519 key; restore it from the backup of the folder"
        raise ConfigError(msg)
    return key


def save_lender_keys(keys: LenderKeys, directory: Path) -> None:
    """Write the four keys to `directory`, each file with mode 0600; an existing file is never replaced."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("tls", "node", "identity", "witness"):
        write_private(directory / f"{name}.key", private_pem(getattr(keys, name)))


def load_lender_keys(directory: Path) -> LenderKeys:
    """Read the four keys.

    Raises:
        ConfigError: A key is missing, unreadable by this user, readable by others, or of the wrong kind.
    """
    tls, node, identity, witness = (
        _load_key(directory / f"{name}.key", "`fedfin client join`")
        for name in ("tls", "node", "identity", "witness")
    )
    if not (
        isinstance(tls, ec.EllipticCurvePrivateKey)
        and isinstance(tls.curve, ec.SECP256R1)
        and isinstance(node, ec.EllipticCurvePrivateKey)
        and isinstance(node.curve, ec.SECP384R1)
        and isinstance(identity, ed25519.Ed25519PrivateKey)
        and isinstance(witness, ed25519.Ed25519PrivateKey)
    ):
        msg = (
            f"a key under {directory} is of the wrong kind; restore the folder from its backup, or join again"
        )
        raise ConfigError(msg)
    return LenderKeys(tls=tls, node=node, identity=identity, witness=witness)


def is_due(certificate: x509.Certificate) -> bool:
    """Whether it is time to renew a certificate."""
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    return left < dt.timedelta(days=RENEW_DAYS)


def certificate_request(name: str, key: ec.EllipticCurvePrivateKey) -> str:
    """Return a request for a certificate of this key in the name of a lender, PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the certificate's DER encoding, hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_fingerprint(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    """Return the SHA-256 of the public key's PEM, hex: the figure that people compare."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_pem(key).encode())
    return digest.finalize().hex()


def private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    """Return the key as unencrypted PKCS#8 PEM; for `write_private` only."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    """Return the public key as PEM text."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def verify_signature(public_key_pem: str, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 or ECDSA-SHA256 signature.

    Raises:
        EnrolmentError: The key cannot be read, is of another kind, or did not sign `message`.
    """
    try:
        key = serialization.load_pem_public_key(public_key_pem.encode())
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        else:
            msg = "the key is neither Ed25519 nor ECDSA"
            raise EnrolmentError(msg)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError) as error:
        msg = "the sender does not hold the private key of the public key it sent; run `fedfin client join` again"
        raise EnrolmentError(msg) from error


def _load_key(path: Path, maker: str) -> object:
    content = _read(path, maker)
    if path.stat().st_mode & 0o077:
        msg = f"{path} can be read by others (mode {path.stat().st_mode & 0o777:o}); run `chmod 600 {path}`"
        raise ConfigError(msg)
    try:
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        msg = f"{path} is no PEM private key; restore it from the backup of the folder, or make it anew with {maker}"
        raise ConfigError(msg) from error


def _read(path: Path, maker: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); it is made by {maker}"
        raise ConfigError(msg) from error

"""The public listener's certificate: valid for 30 days, and renewed by the coordinator itself before it ends."""

import contextlib
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedfin.errors import ConfigError
from fedfin.files import write_public
from fedfin.identity import CertificateAuthority, is_due

__all__ = ["CHECK_S", "issue", "renew_if_due", "serve_renewed"]

CHECK_S: Final = 24 * 3600.0
"""A running coordinator looks at its certificate this often."""

_LOCAL: Final = ("localhost", "127.0.0.1")


def issue(authority: CertificateAuthority, key: ec.EllipticCurvePrivateKey, address: str) -> x509.Certificate:
    """Return a certificate for the host of `address` (host:port) and for this machine's own names."""
    host = address.rpartition(":")[0].strip("[]")
    return authority.issue_server(key, tuple(dict.fromkeys((host, *_LOCAL))))


def renew_if_due(
    path: Path, key_path: Path, authority: Callable[[], CertificateAuthority], address: str
) -> bool:
    """Write a new certificate for the same key where the one at `path` has fewer than ten days left.

    The authority is read only then.

    Returns:
        Whether there is a new one.

    Raises:
        ConfigError: A file does not parse, or cannot be written.
    """
    try:
        if not is_due(x509.load_pem_x509_certificate(path.read_bytes())):
            return False
        key = load_pem_private_key(key_path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        msg = f"{path} or {key_path} cannot be read ({error}); restore both from the backup of the folder"
        raise ConfigError(msg) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        msg = f"{key_path} holds a key of another kind; restore it from the backup of the folder"
        raise ConfigError(msg)
    write_public(path, issue(authority(), key, address).public_bytes(serialization.Encoding.PEM))
    return True


def serve_renewed(
    context: ssl.SSLContext,
    path: Path,
    key_path: Path,
    authority: Callable[[], CertificateAuthority],
    address: str,
) -> None:
    """Renew the certificate of a running listener whenever it is due; a thread's whole life.

    New connections are served with the new certificate at once. A renewal that fails is tried again the next day: ten
    times before the certificate ends, and `fedfin server` says why when it is started.
    """
    while True:
        time.sleep(CHECK_S)
        with contextlib.suppress(ConfigError, ssl.SSLError, OSError):
            if renew_if_due(path, key_path, authority, address):
                context.load_cert_chain(path, key_path)

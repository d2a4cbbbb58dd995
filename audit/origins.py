"""The names of a federation's logs: what stands in every checkpoint, and under which nobody else's log can pass."""

from pathlib import Path
from typing import Final

from cryptography import x509

from fedfin.errors import ConfigError
from fedfin.identity import fingerprint_of

__all__ = ["COORDINATOR", "coordinator_origin", "lender_origin", "root_fingerprint"]

COORDINATOR: Final = "coordinator"
"""The coordinator's name as an actor; no lender has it."""

_PREFIX_LENGTH: Final = 16


def coordinator_origin(federation: str, root: str) -> str:
    """Return the origin of the coordinator's log.

    Args:
        federation: The federation's name.
        root: Fingerprint of its root certificate, hex: two federations may have one name.
    """
    return f"fedfin/{federation}/{root[:_PREFIX_LENGTH]}/{COORDINATOR}"


def lender_origin(federation: str, root: str, name: str) -> str:
    """Return the origin of a lender's log; arguments as `coordinator_origin`."""
    return f"fedfin/{federation}/{root[:_PREFIX_LENGTH]}/lender/{name}"


def root_fingerprint(path: Path) -> str:
    """Return the fingerprint of the root certificate in a file.

    Raises:
        ConfigError: The file is missing or no certificate.
    """
    try:
        return fingerprint_of(x509.load_pem_x509_certificate(path.read_bytes()))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); it is made when the folder is: restore it from the backup"
        raise ConfigError(msg) from error

"""The federation's log as the coordinator's code writes it: `audit.db` beside federation.db, of all jobs.

Several processes append to it: the SuperLink's, where lenders enrol, the ServerApp's, where jobs run, and commands.
What happens in a stage is noted, and written together before the next questions leave, with one sync of the disk.
"""

import contextlib
import importlib.metadata
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.events import Founding
from fedfin.audit.log import AuditLog
from fedfin.audit.noting import Noting
from fedfin.audit.origins import COORDINATOR, coordinator_origin
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Journal", "open_federation_log"]


class Journal(Noting):
    """Notes events and writes them to a log that is open already."""

    def __init__(self, log: AuditLog) -> None:
        super().__init__()
        self._log = log

    @property
    def log(self) -> AuditLog:
        """The log that was given."""
        return self._log


def open_federation_log(path: Path, key: Ed25519PrivateKey, *, federation: str, root: str) -> AuditLog:
    """Open the federation's log, made where there is none: a new federation, or one of an older release.

    Args:
        path: The file.
        key: The coordinator's identity key.
        federation: The federation's name.
        root: Fingerprint of its root certificate.

    Raises:
        AuditError: It cannot be made or opened, or is another's.
    """
    if not path.exists():
        origin = coordinator_origin(federation, root)
        with contextlib.suppress(AuditError):  # another process was quicker, or opening it says what is wrong
            AuditLog.create(path, origin=origin, actor=COORDINATOR, key=key, side="coordinator").close()
    log = AuditLog.open(path, key=key)
    founding = Founding(
        federation=federation,
        root=root,
        identity=key_fingerprint(key.public_key()),
        release=importlib.metadata.version("fedfin"),
    )
    try:
        log.append_first(founding)
    except BaseException:
        log.close()
        raise
    return log

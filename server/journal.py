"""The federation's log as the coordinator's code writes it: `audit.db` beside federation.db, of all jobs.

Several processes append to it: the SuperLink's, where lenders enrol, the ServerApp's, where jobs run, and commands.
What happens in a stage is noted, and written together before the next questions leave, with one sync of the disk.
"""

import contextlib
import importlib.metadata
from pathlib import Path
from threading import RLock

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.events import Event, Founding
from fedfin.audit.log import AuditLog
from fedfin.audit.origins import COORDINATOR, coordinator_origin
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Journal", "open_federation_log"]


class Journal:
    """Notes events and writes them to an open log; safe for several threads."""

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self._noted: list[Event] = []
        self._lock = RLock()

    def note(self, *events: Event) -> None:
        """Take events that happened; they are in the log once `flush` returns."""
        with self._lock:
            self._noted += events

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            AuditError: It could not be logged; it stays noted, and the job must not go on.
        """
        with self._lock:
            if self._noted:
                self.log.append_many(self._noted)
                self._noted = []

    def write(self, *events: Event) -> None:
        """Log events now, after those that were noted; errors as `flush`."""
        with self._lock:
            self._noted += events
            self.flush()


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

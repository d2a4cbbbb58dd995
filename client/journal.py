"""A lender's log as its code writes it: noted as things happen, on the disk before anything leaves.

It is the signed `fedfin.audit.log`, in `audit.db` of the lender's folder, made at its first entry. An answer's entries
are written together, with one sync of the disk, before the answer leaves: what cannot be logged is not answered.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.checkpoint import Checkpoint, sign
from fedfin.audit.events import Founding
from fedfin.audit.log import AuditLog
from fedfin.audit.noting import Noting
from fedfin.audit.origins import lender_origin, root_fingerprint
from fedfin.errors import AuditError
from fedfin.identity import key_fingerprint

__all__ = ["Journal"]


class Journal(Noting):
    """Writes one lender's log, beside other processes that write it too."""

    def __init__(
        self, directory: Path, *, name: str, federation: str, identity: Callable[[], Ed25519PrivateKey]
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            directory: The lender's folder.
            name: The lender.
            federation: The federation's name.
            identity: Reads the lender's identity key.
        """
        super().__init__()
        self.path = directory / "audit.db"
        self._directory = directory
        self._name = name
        self._federation = federation
        self._identity = identity
        self._log: AuditLog | None = None
        self._key: Ed25519PrivateKey | None = None

    def checkpoint(self) -> str:
        """Return the present state of the log as a note signed by the lender's identity key; errors as `flush`."""
        with self._lock:
            self.flush()
            log = self.log
            assert self._key is not None  # noqa: S101  (read when the log was opened)
            with log.snapshot():
                checkpoint = Checkpoint(log.origin, log.size, log.root())
            return sign(checkpoint, self._key)

    @property
    def log(self) -> AuditLog:
        """The open log, made where there was none.

        Raises:
            AuditError: It cannot be made or opened, or is gone.
            ConfigError: The key or the root certificate cannot be read.
        """
        with self._lock:
            if self._log is None:
                self._key = self._identity()
                self._log = self._made(self._key) if not self.path.exists() else self._opened(self._key)
            return self._log

    def close(self) -> None:
        """Close the log; the next event opens it again."""
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = self._key = None

    def _opened(self, key: Ed25519PrivateKey) -> AuditLog:
        log = AuditLog.open(self.path, key=key)
        try:
            log.append_first(self._founding(key))  # where its maker was stopped before it
        except BaseException:
            log.close()
            raise
        return log

    def _made(self, key: Ed25519PrivateKey) -> AuditLog:
        # An approval is logged before it is kept, and every member gave one: so there was a log.
        if (self._directory / "roster.approved.json").exists():
            msg = (
                f"the log {self.path} is gone, and with it what this lender cosigned of its coordinator's log: restore"
                " the newest copy from the backup. Without one, have the coordinator remove this lender, and join anew"
            )
            raise AuditError(msg)
        root = root_fingerprint(self._directory / "ca.pem")
        origin = lender_origin(self._federation, root, self._name)
        try:
            log = AuditLog.create(self.path, origin=origin, actor=self._name, key=key, side="lender")
        except AuditError:
            if not self.path.exists():
                raise
            return self._opened(key)  # another process made it in this moment
        log.append_first(self._founding(key))
        return log

    def _founding(self, key: Ed25519PrivateKey) -> Founding:
        earlier = self._directory / "log.jsonl"
        return Founding(
            federation=self._federation,
            root=root_fingerprint(self._directory / "ca.pem"),
            identity=key_fingerprint(key.public_key()),
            release=importlib.metadata.version("fedfin"),
            earlier=hashlib.sha256(earlier.read_bytes()).hexdigest() if earlier.exists() else None,
        )

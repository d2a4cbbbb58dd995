"""Events noted as they happen and written together, with one sync of the disk, before what they are about goes on."""

from abc import ABC, abstractmethod
from threading import RLock

from fedfin.audit.events import Event
from fedfin.audit.log import AuditLog

__all__ = ["Noting"]


class Noting(ABC):
    """Notes events and writes them to a log; safe for several threads."""

    def __init__(self) -> None:
        self._noted: list[Event] = []
        self._lock = RLock()

    @property
    @abstractmethod
    def log(self) -> AuditLog:
        """The open log.

        Raises:
            AuditError: It cannot be opened.
        """

    def note(self, *events: Event) -> None:
        """Take events that happened; they are in the log once `flush` returns."""
        with self._lock:
            self._noted += events

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            AuditError: It could not be logged; it stays noted, and what it is about must not go on.
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

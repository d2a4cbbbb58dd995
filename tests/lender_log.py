"""What a lender's log says, for tests: its events, read as anyone may."""

from pathlib import Path

from fedfin.audit.events import Event
from fedfin.audit.reading import open_log


def logged(directory: Path, kind: type[Event] | None = None) -> list[Event]:
    """The events of a folder's audit.db, all or of one kind, in their order; none where there is no log yet."""
    path = directory / "audit.db"
    if not path.exists():
        return []
    with open_log(path) as log:
        events = [entry.event for _, entry in log.entries() if entry is not None]
    return [event for event in events if kind is None or isinstance(event, kind)]


def types_of(directory: Path) -> list[str]:
    """The events' types in their order, without the log's own first entry."""
    return [event.type for event in logged(directory)[1:]]

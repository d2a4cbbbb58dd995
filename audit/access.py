"""Finds the log that a path means, and logs that it was read or given out, where its owner does so.

The owner is whoever has the key that signs the log, beside it in `keys/identity.key`. A copy in a run directory or a
pack has no key beside it: reading it is nobody's business.
"""

from pathlib import Path
from typing import Final

from fedfin.audit.events import Event
from fedfin.audit.log import AuditLog
from fedfin.errors import AuditError
from fedfin.identity import load_identity_key

__all__ = ["LOG_FILE", "cover", "find_log", "owners_key", "record"]

LOG_FILE: Final = "audit.db"

_KEY: Final = Path("keys") / "identity.key"
_MADE_BY: Final = "`fedfin server init` or `fedfin client join`"


def find_log(path: Path) -> Path:
    """Return the log's file: the path itself, or the one in a folder, a run directory or an unpacked pack.

    Raises:
        AuditError: There is none.
    """
    candidates = (path,) if path.is_file() else (path / LOG_FILE, path / "run" / LOG_FILE)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        msg = f"{path} holds no log ({LOG_FILE}); name a log, a lender's or coordinator's folder, or a run directory"
        raise AuditError(msg)
    if found.suffix == ".zip":
        msg = f"{path} is a zip file; take it apart first, and name the folder"
        raise AuditError(msg)
    return found


def owners_key(log: Path) -> Path | None:
    """Return the key beside a log; None where it is a copy."""
    found = log.parent / _KEY
    return found if found.is_file() else None


def cover(log: Path) -> None:
    """Have a checkpoint cover the whole log, where its owner's key is at hand; a copy stays as it is.

    A lender's checkpoints are kept by its coordinator, so its log has none of its own until then.

    Raises:
        AuditError: It could not be stored, or the key is not the log's.
        ConfigError: The key cannot be read.
    """
    path = owners_key(log)
    if path is not None:
        with AuditLog.open(log, key=load_identity_key(path, _MADE_BY)) as opened:
            opened.checkpoint()


def record(log: Path, event: Event) -> bool:
    """Log something about the log in itself, where its owner's key is at hand; tell whether it was.

    Raises:
        AuditError: It could not be logged, or the key is not the log's: what it is about must not go on.
        ConfigError: The key cannot be read.
    """
    path = owners_key(log)
    if path is None:
        return False
    with AuditLog.open(log, key=load_identity_key(path, _MADE_BY)) as opened:
        opened.append(event)
    return True

"""How the federation's log stands: its entries, its last checkpoint, who cosigned it, and what is final."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedfin.audit.checkpoint import parse_checkpoint, signature_lines
from fedfin.audit.reading import open_log
from fedfin.roster_versions import quorum_of

__all__ = ["log_status"]


def log_status(path: Path, members: Collection[str]) -> dict[str, Any] | None:
    """Return a document about the log; None where there is none yet.

    Args:
        path: The federation's `audit.db`.
        members: Who may cosign it.

    Raises:
        AuditError: It cannot be read.
    """
    if not path.exists():
        return None
    with open_log(path) as log:
        last = log.latest_checkpoint()
        quorum = quorum_of(len(members)) if members else 0
        final = log.final_checkpoint(quorum) if quorum else None
        return {
            "entries": log.size,
            "checkpoint": None if last is None else parse_checkpoint(last).size,
            "cosigned_by": []
            if last is None
            else sorted({name for name, _ in signature_lines(last)} & set(members)),
            "quorum": quorum,
            "final": None if final is None else parse_checkpoint(final).size,
        }

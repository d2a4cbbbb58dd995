"""Logs for tests: one of a coordinator with a few rounds, and files changed behind its back."""

import contextlib
import sqlite3

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit.events import Event, RoundCompleted, real
from fedfin.audit.log import AuditLog

__all__ = ["ORIGIN", "changed", "new_log", "round_event", "rows"]

ORIGIN = "fedfin/credit-2026/coordinator"


def round_event(number: int = 1) -> Event:
    return RoundCompleted(
        job="job-1",
        round=number,
        cohort=("bank-a", "bank-b", "bank-c"),
        dropped=("micro-d",),
        seconds=real(1.25),
        model_before=f"{number:064x}",
        model_after=f"{number + 1:064x}",
    )


def new_log(path, key=None, *, num_entries=0, side="coordinator", actor="coordinator", origin=ORIGIN):
    log = AuditLog.create(
        path, origin=origin, actor=actor, key=key or Ed25519PrivateKey.generate(), side=side
    )
    if num_entries:
        log.append_many([round_event(number) for number in range(num_entries)])
    return log


@contextlib.contextmanager
def changed(path):
    """Give the closed file's database with its triggers out of the way, and put them back: what an intruder does."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        yield db
        for _, statement in triggers:
            with contextlib.suppress(sqlite3.OperationalError):  # its table may be gone
                db.execute(statement)


def rows(path, query, *values):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query, values).fetchall()

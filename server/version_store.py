"""The signed versions of the roster in federation.db: the complete ones, and the one that collects signatures."""

import contextlib
import datetime as dt
import json
import sqlite3
from collections.abc import Callable

from fedfin.errors import LinkError
from fedfin.roster_chain import SignedRoster

__all__ = ["VersionStore"]

_Transaction = Callable[[], contextlib.AbstractContextManager[sqlite3.Connection]]


class VersionStore:
    """The part of `FederationStore` that keeps rosters; every method is one transaction of it."""

    def __init__(self, reading: _Transaction, writing: _Transaction) -> None:
        self._reading = reading
        self._writing = writing

    def complete(self) -> tuple[SignedRoster, ...]:
        """Return all complete versions, from the first on."""
        with self._reading() as db:
            rows = db.execute("SELECT signed FROM roster_versions ORDER BY number").fetchall()
        return tuple(_parse(text) for (text,) in rows)

    def candidate(self) -> SignedRoster | None:
        """Return the version that collects signatures, or None."""
        with self._reading() as db:
            row = db.execute("SELECT signed FROM roster_candidate").fetchone()
        return None if row is None else _parse(row[0])

    def propose(self, candidate: SignedRoster) -> None:
        """Let this version collect signatures, and no other any more."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO roster_candidate VALUES (1, ?)", (_text(candidate),))

    def withdraw(self) -> None:
        """Let no version collect signatures: the members are those of the last complete one."""
        with self._writing() as db:
            db.execute("DELETE FROM roster_candidate")

    def add(self, signed: SignedRoster) -> None:
        """Keep a complete version, checked by the caller.

        Raises:
            LinkError: It does not follow on the last one that is kept: another process was quicker.
        """
        with self._writing() as db:
            self.add_within(db, signed)

    @staticmethod
    def add_within(db: sqlite3.Connection, signed: SignedRoster) -> None:
        """Do what `add` does, within a transaction of the caller; errors likewise."""
        row = db.execute("SELECT signed FROM roster_versions ORDER BY number DESC LIMIT 1").fetchone()
        last = None if row is None else _parse(row[0]).version
        number, previous = (1, "") if last is None else (last.number + 1, last.digest())
        if (signed.version.number, signed.version.previous) != (number, previous):
            msg = (
                f"version {signed.version.number} of the roster came too late: another one is kept; try again"
            )
            raise LinkError(msg)
        db.execute(
            "INSERT INTO roster_versions VALUES (?, ?, ?)",
            (number, _text(signed), dt.datetime.now(dt.UTC).isoformat()),
        )
        db.execute("DELETE FROM roster_candidate")


def _text(signed: SignedRoster) -> str:
    return json.dumps(signed.to_document(), sort_keys=True, separators=(",", ":"))


def _parse(text: str) -> SignedRoster:
    return SignedRoster.from_document(json.loads(text))

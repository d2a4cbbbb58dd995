"""Fixtures that more than one test file uses."""

import os
from collections.abc import Iterator

import pytest
from postgres import PostgresServer, find_initdb, running, unprivileged_user

# Before torch is imported: default threading is up to 100 times slower where processes outnumber cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Rich keeps the width that stands in COLUMNS when the console is made; a test's own COLUMNS must decide, whichever
# test of the process comes first.
os.environ.pop("COLUMNS", None)
import fedfin.cli_output  # noqa: F401


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL server, started when a test first asks for it."""
    initdb, user = find_initdb(), unprivileged_user()
    if initdb is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
    with running(initdb, user) as server:
        yield server

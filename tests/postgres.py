"""A PostgreSQL server of our own for the tests: a fresh cluster on the loopback, gone afterwards."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pg8000.dbapi


@dataclass(frozen=True)
class PostgresServer:
    """A running server with the database `postgres` and its owner."""

    port: int
    user: str
    password: str

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/postgres"

    def run(self, *statements: str) -> None:
        connection = pg8000.dbapi.connect(
            self.user, host="127.0.0.1", port=self.port, database="postgres", password=self.password
        )
        try:
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            connection.commit()
        finally:
            connection.close()


def find_initdb() -> Path | None:
    """Return initdb, looked for in PATH and where Debian and pg_config keep it."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve()
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    pg_config = shutil.which("pg_config")
    if pg_config:
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        folders.append(Path(answer.stdout.strip()))
    return next((folder / "initdb" for folder in folders if (folder / "initdb").is_file()), None)


def unprivileged_user() -> str | None:
    """Return whom the server runs as: ourselves, or for root somebody else, as PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def running(initdb: Path, system_user: str) -> Iterator[PostgresServer]:
    """Start a server whose owner has a password that is asked for (scram-sha-256)."""
    account = pwd.getpwnam(system_user)
    identity = {}
    if os.geteuid() == 0:
        identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    # Not under pytest's folder, which another user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="fedfin-postgres-"))
    try:
        (folder / "password").write_text("correct horse\n")
        for path in (folder, folder / "password"):
            os.chown(path, account.pw_uid, account.pw_gid)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
        subprocess.run(
            [
                *(
                    initdb,
                    "--pgdata",
                    folder / "data",
                    "--username",
                    "owner",
                    "--pwfile",
                    folder / "password",
                ),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            **identity,
        )
        server = PostgresServer(_free_port(), "owner", "correct horse")
        command = [initdb.with_name("postgres"), "-D", folder / "data", "-p", str(server.port), "-k", folder]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "-h", "127.0.0.1", "-c", "fsync=off"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                **identity,
            )
        try:
            _wait_until_it_answers(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # the fast shutdown, which waits for no client
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_it_answers(server: PostgresServer, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            server.run("SELECT 1")
        except pg8000.dbapi.Error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)
        else:
            return

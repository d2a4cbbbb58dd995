"""Flower 1.41 as it comes: the peer that `round_latency.py` measures our rounds against.

A stock SuperLink, stock SuperNodes with TLS and node authentication, and Flower's own FedAvg, all on
loopback and started as an operator would: `flower-superlink`, `flwr supernode register`, `flower-supernode`,
`flwr run`. The ClientApp does no work, so what a round takes is what it takes beyond training. Three things
differ from the defaults, none of them in a round's path: no telemetry, no update check, no `uv sync` of the
app's dependencies.

Source: the commands, flags and connection file of flwr 1.41.0, read in
`flwr/superlink/cli/flower_superlink.py`, `flwr/supernode/cli/flower_supernode.py` and
`flwr/cli/flower_config.py`.
"""

import datetime as dt
import ipaddress
import json
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
CONNECTION = "stock"
OPERATOR = "operator"
POLL_S = 0.2
NUM_LOG_LINES = 20

# Generous: a whole process is started for every lender in every round, and the cores are shared.
START_LIMIT_S = 60.0
START_LIMIT_PER_LENDER_S = 15.0
ROUND_LIMIT_PER_LENDER_S = 10.0

APP_PROJECT = """\
[project]
name = "stock-peer"
version = "1.0.0"
description = "FedAvg over one flat vector, without training"
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "fedfin"

[tool.flwr.app.components]
serverapp = "stock_peer.server_app:app"
clientapp = "stock_peer.client_app:app"

[tool.flwr.app.config]
num-lenders = 2
num-rounds = 1
num-parameters = 1
round-limit-s = 60.0
result-path = ""
"""

CLIENT_APP = """\
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    vector = message.content["arrays"]["flat"].numpy()
    reply = {
        "arrays": ArrayRecord({"flat": Array(vector + 1)}),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(reply), reply_to=message)
"""

SERVER_APP = """\
import json
import time
import traceback
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    def __init__(self, num_lenders: int) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=num_lenders,
            min_available_nodes=num_lenders,
        )
        self.num_lenders = num_lenders
        self.ends = [time.monotonic()]

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        failures = [reply.error.reason for reply in replies if reply.has_error()]
        if failures or len(replies) != self.num_lenders:
            raise RuntimeError(f"{len(replies)} of {self.num_lenders} replies, {failures=}")
        aggregate = super().aggregate_train(server_round, replies)
        self.ends.append(time.monotonic())
        return aggregate


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    try:
        strategy = TimedFedAvg(config["num-lenders"])
        vector = np.zeros(config["num-parameters"], dtype=np.float32)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({"flat": Array(vector)}),
            num_rounds=config["num-rounds"],
            timeout=config["round-limit-s"],
        )
        total = float(result.arrays["flat"].numpy().sum(dtype=np.float64))
        report = {"ends": strategy.ends, "total": total}
    except Exception:
        report = {"error": traceback.format_exc()}
    path = Path(config["result-path"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report))
    part.rename(path)
"""


class StockFlowerError(RuntimeError):
    """Stock Flower did not start, failed, or took too long; the message ends with its logs."""


@dataclass(frozen=True, slots=True)
class StockTiming:
    """What stock Flower's rounds took, in seconds."""

    first_round_s: float
    """From the ServerApp's start to the first aggregate: the lenders fetch and unpack the app in it."""
    round_s: tuple[float, ...]
    """From one aggregate to the next, for every later round."""


def measure(num_lenders: int, num_rounds: int, num_parameters: int, *, directory: Path) -> StockTiming:
    """Run Flower's own FedAvg on stock processes over loopback and return what its rounds took.

    Args:
        num_lenders: SuperNodes; >= 1. Every one is sampled in every round.
        num_rounds: Rounds; >= 2, since the first is reported apart.
        num_parameters: Length of the float32 vector that goes to every lender and comes back; >= 1.
        directory: A folder for keys, logs and every process's FLWR_HOME; new or empty, and left behind.

    Raises:
        StockFlowerError: A process ended, a lender failed, the average came out wrong or a limit passed.

    Nothing that was started is alive afterwards, whether this returns, raises or is stopped by SIGTERM.
    """
    if num_lenders < 1 or num_rounds < 2 or num_parameters < 1:
        raise ValueError(
            f"num_lenders={num_lenders}, num_rounds={num_rounds}, num_parameters={num_parameters}: "
            "give at least 1 lender, 2 rounds and 1 parameter"
        )
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"directory={directory} is not empty: give a new folder for each measurement")

    superlink_port, *lender_ports = _free_ports(1 + num_lenders)
    superlink_address = f"{HOST}:{superlink_port}"
    pki = directory / "pki"
    _write_pki(pki, num_lenders)
    _write_connection(directory / OPERATOR, superlink_address, pki / "ca.crt")
    _write_app(directory / "app")
    result_path = directory / "result.json"
    start_limit_s = START_LIMIT_S + START_LIMIT_PER_LENDER_S * num_lenders
    round_limit_s = ROUND_LIMIT_PER_LENDER_S * num_lenders

    with _Processes(directory) as processes:
        superlink = processes.start(
            "superlink",
            "flower-superlink",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            f"--host={HOST}",
            f"--port={superlink_port}",
            f"--ssl-ca-certfile={pki / 'ca.crt'}",
            f"--ssl-certfile={pki / 'server.crt'}",
            f"--ssl-keyfile={pki / 'server.key'}",
        )
        processes.wait("the SuperLink", lambda: _listens(superlink_port), start_limit_s, [superlink])

        processes.run_all(
            [
                ("flwr", "supernode", "register", str(pki / f"lender{lender}.pub"), CONNECTION)
                for lender in range(num_lenders)
            ],
            start_limit_s,
        )
        nodes = [
            processes.start(
                f"lender{lender}",
                "flower-supernode",
                f"--superlink={superlink_address}",
                f"--root-certificates={pki / 'ca.crt'}",
                f"--auth-supernode-private-key={pki / f'lender{lender}'}",
                f"--host={HOST}",
                f"--port={port}",
            )
            for lender, port in enumerate(lender_ports)
        ]
        alive = [superlink, *nodes]
        processes.wait(
            "every SuperNode to be admitted",
            lambda: all("SuperNode ID: " in node.log_path.read_text() for node in nodes),
            start_limit_s,
            alive,
        )

        settings = {
            "num-lenders": num_lenders,
            "num-rounds": num_rounds,
            "num-parameters": num_parameters,
            "round-limit-s": round_limit_s,
            "result-path": str(result_path),
        }
        overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        processes.run_all(
            [("flwr", "run", str(directory / "app"), CONNECTION, f"--run-config={overrides}")], start_limit_s
        )
        run_limit_s = start_limit_s + num_rounds * round_limit_s
        processes.wait(f"{num_rounds} rounds to end", result_path.exists, run_limit_s, alive)
        return _read_result(result_path, num_rounds, num_parameters, processes)


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    handle: subprocess.Popen[bytes]
    log_path: Path


class _Processes:
    """The processes of one measurement: each leads its own process group, and none outlives the block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[_Process] = []
        self._previous_handler: signal.Handlers | Callable[..., object] | int | None = None

    def __enter__(self) -> Self:
        # SIGTERM would end Python without unwinding, and nine processes would go on polling for ever.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # SIGKILL at once: the state is in memory and thrown away, and a SuperLink with an open TLS connection
        # takes over 15 s to heed SIGTERM.
        for group in _groups_of({process.handle.pid for process in self._started}):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._started:
            process.handle.wait()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def start(self, name: str, *command: str) -> _Process:
        """Start an installed command that is to stay up, with a FLWR_HOME of its own."""
        return self._launch(name, command, home=self._directory / name)

    def run_all(self, commands: list[tuple[str, ...]], limit_s: float) -> None:
        """Run the operator's commands side by side and wait until all have succeeded."""
        home = self._directory / OPERATOR
        first = len(self._started)
        running = [
            self._launch(f"{OPERATOR}{number}", command, home=home)
            for number, command in enumerate(commands, first)
        ]
        what = " ".join(commands[0][:3])
        self.wait(what, lambda: all(process.handle.poll() is not None for process in running), limit_s, [])
        for process in running:
            if process.handle.returncode:
                raise self.error(f"{process.name} ({what}) ended with status {process.handle.returncode}")

    def wait(self, what: str, is_done: Callable[[], bool], limit_s: float, alive: list[_Process]) -> None:
        """Wait until `is_done()`; raise when `limit_s` passes or one of `alive` ends first."""
        end = time.monotonic() + limit_s
        while not is_done():
            for process in alive:
                if process.handle.poll() is not None:
                    status = process.handle.returncode
                    raise self.error(f"{process.name} ended with status {status} while waiting for {what}")
            if time.monotonic() > end:
                raise self.error(f"gave up after {limit_s:.0f} s of waiting for {what}")
            time.sleep(POLL_S)

    def error(self, message: str) -> StockFlowerError:
        """Return the error to raise, with the last lines of every log."""
        tails = [f"--- {process.log_path}\n{_tail(process.log_path)}" for process in self._started]
        return StockFlowerError("\n".join([message, *tails]))

    def _launch(self, name: str, command: tuple[str, ...], *, home: Path) -> _Process:
        home.mkdir(exist_ok=True)
        log_path = self._directory / f"{name}.log"
        scripts = sysconfig.get_path("scripts")
        # Flower settings of whoever runs the benchmark would make the peer something else than stock.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
        environment = inherited | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": HOST,
            "OMP_NUM_THREADS": "1",
            # Flower starts its own helpers by their bare names.
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        with log_path.open("wb") as log:
            handle = subprocess.Popen(
                [str(Path(scripts) / command[0]), *command[1:]],
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = _Process(name, handle, log_path)
        self._started.append(process)
        return process


def _read_result(path: Path, num_rounds: int, num_parameters: int, processes: _Processes) -> StockTiming:
    report = json.loads(path.read_text())
    if "error" in report:
        raise processes.error(f"the ServerApp failed:\n{report['error']}")
    # Every lender adds 1 to every parameter in every round.
    if not math.isclose(report["total"], num_rounds * num_parameters, rel_tol=1e-5):  # float32 weights of 1/n
        raise processes.error(
            f"the parameters sum to {report['total']} after {num_rounds} rounds, "
            f"not {num_rounds * num_parameters}: FedAvg lost an update"
        )
    first_round_s, *round_s = (
        end - start for start, end in zip(report["ends"][:-1], report["ends"][1:], strict=True)
    )
    return StockTiming(first_round_s, tuple(round_s))


def _write_app(directory: Path) -> None:
    package = directory / "stock_peer"
    package.mkdir(parents=True)
    (directory / "pyproject.toml").write_text(APP_PROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT_APP)
    (package / "server_app.py").write_text(SERVER_APP)


def _write_connection(home: Path, superlink_address: str, ca_path: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{superlink_address}"\nroot-certificates = "{ca_path}"\n'
    )


def _write_pki(directory: Path, num_lenders: int) -> None:
    """Write a CA, the SuperLink's certificate for 127.0.0.1, and a P-384 key pair for each lender."""
    directory.mkdir()
    now = dt.datetime.now(dt.UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark CA")])
    server_key = ec.generate_private_key(ec.SECP256R1())
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])

    def unsigned(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )

    ca = unsigned(ca_name, ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    server = unsigned(server_name, server_key).add_extension(names, critical=False)
    for name, builder in (("ca", ca), ("server", server)):
        certificate = builder.sign(ca_key, hashes.SHA256())
        (directory / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "server.key").write_bytes(_private_bytes(server_key, serialization.PrivateFormat.PKCS8))
    for lender in range(num_lenders):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (directory / f"lender{lender}").write_bytes(_private_bytes(key, serialization.PrivateFormat.OpenSSH))
        (directory / f"lender{lender}.pub").write_bytes(public)


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _free_ports(num_ports: int) -> list[int]:
    # All are held at once, so that they differ. Linux gives bind() and connect() ports of different parity,
    # so a connection made before Flower binds does not take one of them.
    sockets = [socket.socket() for _ in range(num_ports)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def _groups_of(leaders: set[int]) -> set[int]:
    """Return the process groups of `leaders` and of all that descends from them.

    The SuperLink gives its SuperExec a session of its own, so killing the SuperLink's group would miss it.
    """
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except OSError:  # ended while we looked
            continue
        # pid (command) state ppid pgrp ...; the command may hold spaces and brackets.
        _, parent, group, *_ = stat.rpartition(")")[2].split()
        pid = int(path.parent.name)
        parents[pid], groups[pid] = int(parent), int(group)
    family = set(leaders)
    while new := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= new
    return leaders | {groups[pid] for pid in family if pid in groups}


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:])


def main() -> None:
    """Print the timing of 8 lenders, 4 rounds and 10,000 parameters."""
    with tempfile.TemporaryDirectory(prefix="stock-flower-") as directory:
        print(measure(8, 4, 10_000, directory=Path(directory)))


if __name__ == "__main__":
    main()

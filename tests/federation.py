"""A real federation for tests: founded, enrolled and run as people would, with processes that can be killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from lender_log import logged

from fedfin.audit.events import Event, Exchange
from fedfin.client.approving import approve
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import pending

ROOT = Path(__file__).parent.parent
LOANS = ROOT / "simulation" / "credit_data.csv.gz"
SCHEMA = ROOT / "simulation" / "credit_data.yaml"

#: Summed in clear, which two lenders are enough for; evaluations have tests of their own.
QUICK_JOB = {
    "name": "test",
    "aggregation": "plain",
    "training": {"rounds": 3, "local_steps": 2, "learning_rate": 0.1},
    "privacy": {"epsilon": 3.0},
    "cohort": {"min_lenders": 2, "round_deadline_s": 20.0},
    "evaluation": {"times": 0},
}
#: The default: summed under secure aggregation.
SECURE_JOB = {
    **QUICK_JOB,
    "aggregation": "secure",
    "cohort": {"min_lenders": 3, "round_deadline_s": 20.0},
    "evaluation": {"times": 1},
}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        merged[key] = merge(base.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@dataclass
class Federation:
    """A coordinator's folder and its lenders' folders under one directory."""

    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    #: Whether every lender's engineer signs each version of the roster that is shown.
    engineers: bool = True
    _signing: set[str] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def config(self) -> Path:
        return self.directory / "coordinator" / "federation.yaml"

    @property
    def address(self) -> str:
        return str(yaml.safe_load(self.config.read_text())["address"])

    def bank(self, name: str) -> Path:
        return self.directory / name / "bank.yaml"

    def fedfin(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fedfin", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env=_environment(self.directory / "flower-cli"),
            cwd=self.directory,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def found(self, job: dict[str, Any]) -> None:
        self.directory.mkdir(exist_ok=True)
        self.fedfin(
            "server", "init", self.config.parent, "--address", f"127.0.0.1:{free_port()}", "--schema", SCHEMA
        )
        config = yaml.safe_load(self.config.read_text())
        config["job"] = job
        self.config.write_text(yaml.safe_dump(config))

    def start_server(self, *options: str) -> None:
        self.start("server", "server", "--config", self.config, *options, log=self.directory / "server.out")
        self.wait(
            lambda: self.reachable() or self.processes["server"].poll() is not None, "the public port opens"
        )

    def reachable(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    def enrol(self, name: str, rows: "np.ndarray[Any, Any]", **policy: object) -> None:
        """Invite, join, and give the lender these rows of the demo's loans; its policy allows the job's aggregation."""
        token = self.fedfin("server", "invite", name, "--config", self.config).stdout.strip()
        self.fedfin("client", "join", token, "--dir", self.directory / name)
        table = pd.read_csv(LOANS, dtype=str, keep_default_na=False)
        table.iloc[rows].to_csv(self.directory / name / "loans.csv", index=False)
        bank = yaml.safe_load(self.bank(name).read_text())
        bank["data"] = {"path": "loans.csv"}
        job = yaml.safe_load(self.config.read_text()).get("job", {})
        if job.get("aggregation") == "plain":
            policy = {"allow_plain_aggregation": True, **policy}
        bank["policy"] = merge(bank.get("policy", {}), dict(policy))
        self.bank(name).write_text(yaml.safe_dump(bank))

    def _sign_rosters(self, name: str) -> None:
        """What a lender's engineer does by hand: look at the roster, compare it with the others', sign it."""
        folder = LenderFolder(self.bank(name))
        while not self._stopped.wait(0.2):
            change = pending(folder) if self.engineers else None
            if change is not None and not change.signature:
                approve(folder, change)
                folder.journal.close()

    def start_lender(self, name: str, *options: str) -> None:
        if name not in self._signing:
            self._signing.add(name)
            threading.Thread(target=self._sign_rosters, args=(name,), daemon=True).start()
        self.start(
            name, "client", "--config", self.bank(name), *options, log=self.directory / name / "client.out"
        )

    def start(self, key: str, *arguments: object, log: Path) -> None:
        with log.open("ab") as out:
            self.processes[key] = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedfin", *map(str, arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(self.directory / f"flower-{key}"),
            )

    def kill(self, key: str) -> None:
        """Kill without warning, as a power cut would."""
        self.processes[key].kill()
        self.processes[key].wait()

    def child(self, module: str) -> int:
        """Return the process id of the running coordinator's link or app."""
        server = self.processes["server"].pid
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError):
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                command = (status.parent / "cmdline").read_text()
                if parent == server and module in command:
                    return int(status.parent.name)
        raise AssertionError(f"{module} does not run: {self.tail('server')}")

    def run_path(self) -> Path:
        (run,) = (self.config.parent / "runs").iterdir()
        return run

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for path in self.config.parent.glob("runs/*/rounds.jsonl"):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line["event"] == kind]

    def rounds_done(self) -> int:
        return max((line["round"] for line in self.events("round_done")), default=0)

    def journal(self, name: str, kind: type[Event]) -> list[Event]:
        return logged(self.directory / name, kind)

    def released(self, name: str) -> set[str]:
        """The stages of which an answer left this lender."""
        events = self.journal(name, Exchange)
        return {
            event.stage
            for event in events
            if isinstance(event, Exchange) and event.step in {"masked", "released"}
        }

    def output(self, key: str) -> str:
        path = self.directory / "server.out" if key == "server" else self.directory / key / "client.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def tail(self, key: str) -> str:
        return "\n".join(self.output(key).splitlines()[-15:])

    def wait(self, done: Callable[[], object], what: str, *, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > until:
                tails = {key: self.tail(key) for key in self.processes}
                raise AssertionError(
                    f"waited {timeout_s:g} s in vain: {what}\n"
                    + "\n".join(f"--- {k}\n{v}" for k, v in tails.items())
                )
            time.sleep(0.05)

    def wait_for_end(self, key: str, *, timeout_s: float = 90.0) -> int:
        self.wait(lambda: self.processes[key].poll() is not None, f"{key} ends", timeout_s=timeout_s)
        return int(self.processes[key].returncode)

    def stop(self) -> None:
        self._stopped.set()
        for process in self.processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def federation(directory: Path, job: dict[str, Any] | None = None, **changes: Any) -> Iterator[Federation]:
    """Found a federation; everything it started ends with the block."""
    built = Federation(directory / "federation")
    try:
        built.found(merge(job or QUICK_JOB, changes))
        yield built
    finally:
        built.stop()


def shares(num_lenders: int, loans_each: int = 120) -> list["np.ndarray[Any, Any]"]:
    """Return disjoint rows of the demo's table for each lender."""
    order = np.random.default_rng(7).permutation(4454)
    return [np.sort(order[i * loans_each : (i + 1) * loans_each]) for i in range(num_lenders)]


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home),
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }

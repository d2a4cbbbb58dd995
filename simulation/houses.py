"""The processes of a demo's federation on this machine: the coordinator's two, and one for each lender.

Every lender is invited and enrolled as a person would do it, and gets its loans and its bank.yaml in a folder of its
own. Nothing here knows what the demo shows of the outcome.
"""

import contextlib
import gzip
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from fedfin.client.approving import approve
from fedfin.client.folder import LenderFolder
from fedfin.client.joining import join
from fedfin.client.pinning import pending
from fedfin.errors import ConfigError, LinkError
from fedfin.files import write_public
from fedfin.invitation import Invitation
from fedfin.plan import JobPlan
from fedfin.server.founding import Federation, found
from fedfin.server.supervisor import supervise
from fedfin.simulation.demo_job import demo_quorum
from fedfin.simulation.partition import DemoSplit, LenderRows

__all__ = ["Houses", "Say", "demo_schema_text", "run_houses"]

_END_S: Final = 10.0
_JUDGE_S: Final = 600.0

Say = Callable[[Mapping[str, Any]], None]


def demo_schema_text() -> str:
    """Return the schema of the demo's loans, YAML."""
    return (resources.files("fedfin.simulation") / "credit_data.yaml").read_text(encoding="utf-8")


def run_houses(
    directory: Path, split: DemoSplit, plan: JobPlan, *, say: Say, stop: threading.Event, judge: bool = True
) -> "Houses":
    """Found a federation of these lenders, run its job, and end every process.

    Args:
        directory: A new or empty folder.
        split: Each lender's loans, and those held out.
        plan: The job; its quorum and the lenders it waits for are set to these.
        say: Told of the coordinator's events and of the demo's own (`stage`, `judged`).
        stop: When set, all processes end and the call raises KeyboardInterrupt.
        judge: Whether each lender's own judgement of the model is waited for.

    Raises:
        ConfigError: The folder is not empty.
        LinkError: A process could not start or ended early; says where its log is.
    """
    if directory.exists() and any(directory.iterdir()):
        msg = f"{directory} is not empty; the demo overwrites nothing: give a new folder with --dir"
        raise ConfigError(msg)
    plan = _for_all(plan, len(split.lenders))
    directory.mkdir(parents=True, exist_ok=True)
    federation = found(
        directory / "coordinator",
        name="demo",
        address=f"127.0.0.1:{_free_port()}",
        schema_text=demo_schema_text(),
        job=plan.model_dump(mode="python"),
        keep_transcripts=True,  # a supervisor can do every round of the demo again
    )
    houses = Houses(directory, federation, split, plan, say)
    try:
        houses.run(stop, judge=judge)
    finally:
        houses.end()
    return houses


class Houses:
    """The processes of the demo: the coordinator's two, and one for each lender."""

    def __init__(
        self, directory: Path, federation: Federation, split: DemoSplit, plan: JobPlan, say: Say
    ) -> None:
        self.directory = directory
        self.federation = federation
        self.run_path: Path | None = None
        self._split = split
        self.plan = plan
        self._say = say
        self._lenders: dict[str, subprocess.Popen[bytes]] = {}
        self._listening = threading.Event()
        self._stop_coordinator = threading.Event()
        self._agreed: set[str] = set()
        self._failure: list[BaseException] = []
        self._coordinator = threading.Thread(target=self._coordinate, daemon=True)

    def run(self, stop: threading.Event, *, judge: bool) -> None:
        """Start everything and wait until the job is done and, if asked to, every lender has judged the model."""
        self._coordinator.start()
        self._wait(self._listening.is_set, stop)
        self._say({"event": "stage", "text": "enrolling the lenders"})
        raw = _raw_table()
        write_public(self.directory / "holdout.csv", _csv(raw, self._split.held_out))
        for lender in self._split.lenders:
            self._enrol(lender, raw)
        for lender in self._split.lenders:
            self._start(lender.name)
        self._say({"event": "stage", "text": "starting the lenders"})
        self._wait(self._engineers_agree, stop)
        self._raise_failure()
        if not judge:
            return
        self._say({"event": "stage", "text": "each lender judges the model"})
        self._wait(
            lambda: all(process.poll() is not None for process in self._lenders.values()), stop, judging=True
        )
        self._check_lenders()

    def _engineers_agree(self) -> bool:
        """Sign the roster in every house once it is shown there, as people do; return whether the job has ended."""
        for name in self._lenders:
            if name not in self._agreed:
                folder = LenderFolder(self.lender_directory(name) / "bank.yaml")
                change = pending(folder)
                # all founders: an earlier one would be of some of them only
                if change is not None and len(change.proposed.members) == len(self._lenders):
                    approve(folder, change)
                    folder.journal.close()
                    self._agreed.add(name)
        return not self._coordinator.is_alive()

    def end(self) -> None:
        """End every process that still runs."""
        self._stop_coordinator.set()
        for process in self._lenders.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _END_S
        for process in self._lenders.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._coordinator.join(_END_S)

    def lender_directory(self, name: str) -> Path:
        """Return the folder of a lender."""
        return self.directory / "lenders" / name

    def _coordinate(self) -> None:
        try:
            supervise(self.federation, new_job=False, on_event=self._hear, stop=self._stop_coordinator)
        except BaseException as error:  # noqa: BLE001  (handed to the main thread, which raises it)
            self._failure.append(error)
        finally:
            self._listening.set()

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "listening":
            self._listening.set()
        if "run" in event:
            self.run_path = Path(event["run"])
        if event["event"] == "refused":
            self._failure.append(LinkError(f"{event['lender']} refused the job: {event['reason']}"))
        self._say(event)

    def _enrol(self, lender: LenderRows, raw: pd.DataFrame) -> None:
        config = self.federation.config
        invitation = Invitation.create(lender.name, config.address, self.federation.authority().fingerprint)
        self.federation.store.invite(invitation)
        folder = join(invitation.to_token(), self.lender_directory(lender.name))
        write_public(folder.directory / "loans.csv", _csv(raw, lender.rows), mode=0o600)
        bank = yaml.safe_load(folder.config_path.read_text(encoding="utf-8"))
        bank["data"] = {"path": "loans.csv"}
        bank["holdout"] = {"source": {"path": "../../holdout.csv"}}
        private = self.plan.privacy.mode != "none"
        plain = self.plan.aggregation == "plain"
        bank["policy"] = {
            "epsilon_limit": self.plan.privacy.epsilon if private else 3.0,
            "allow_no_privacy": not private,
            "allow_plain_aggregation": plain,
            "max_rounds": max(200, self.plan.training.rounds),
            **({} if plain else {"min_cohort": self.plan.cohort.min_lenders}),
        }
        header = "# Written by `fedfin demo`. The held-out loans are common to all lenders, so that the arms compare.\n"
        write_public(folder.config_path, (header + yaml.safe_dump(bank, sort_keys=False)).encode())

    def _start(self, name: str) -> None:
        folder = self.lender_directory(name)
        with (folder / "client.out").open("ab") as out:
            self._lenders[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "fedfin",
                    "client",
                    "--config",
                    str(folder / "bank.yaml"),
                    "--once",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # One thread each: default threading is up to 100 times slower when processes outnumber cores.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "FLWR_HOME": str(folder / "flower"),
                    "COLUMNS": "200",
                },
            )

    def _wait(self, done: Callable[[], bool], stop: threading.Event, *, judging: bool = False) -> None:
        judged: set[str] = set()
        until = time.monotonic() + _JUDGE_S
        while not done():
            if judging and time.monotonic() > until:
                late = sorted(set(self._lenders) - judged)
                msg = f"{', '.join(late)} did not judge the model within {_JUDGE_S:g} s; see {self.directory}/lenders"
                raise LinkError(msg)
            if stop.wait(0.1):
                raise KeyboardInterrupt
            self._raise_failure()
            if not judging:
                for name, process in self._lenders.items():
                    # Before the model is out, a lender has no reason to end.
                    if process.poll() not in {None, 0}:
                        raise LinkError(self._ended(name))
            for name, process in self._lenders.items():
                if judging and name not in judged and process.poll() is not None:
                    judged.add(name)
                    self._say(
                        {"event": "judged", "lender": name, "count": len(judged), "of": len(self._lenders)}
                    )

    def _check_lenders(self) -> None:
        for name, process in self._lenders.items():
            if process.returncode != 0:
                raise LinkError(self._ended(name))

    def _ended(self, name: str) -> str:
        log = self.lender_directory(name) / "client.out"
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        return f"the lender {name} ended early: {tail[0]} (its output is in {log})"

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure[0]


def _for_all(plan: JobPlan, num_lenders: int) -> JobPlan:
    secure = plan.aggregation == "secure"
    quorum = demo_quorum(num_lenders) if secure else max(2, (num_lenders + 1) // 2)
    # Every lender is waited for: a demo that quietly left one out would show something else.
    cohort = plan.cohort.model_copy(update={"min_lenders": quorum, "wait_for": num_lenders})
    return plan.model_copy(update={"cohort": cohort})


def _raw_table() -> pd.DataFrame:
    """Return the demo's table as text, so that each lender's file says what the source says."""
    with (
        resources.as_file(resources.files("fedfin.simulation") / "credit_data.csv.gz") as path,
        gzip.open(path, "rt", encoding="utf-8") as file,
    ):
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def _csv(raw: pd.DataFrame, rows: Any) -> bytes:  # noqa: ANN401  (positions, an integer array)
    return str(raw.iloc[rows].to_csv(index=False)).encode()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""`fedfin demo`: a whole federation on this machine, of real processes, over TLS, on real loans.

The demo founds a federation, invites and enrols every lender as a person would, writes each lender's loans and
bank.yaml into a folder of its own, starts a `fedfin client` process for each and the coordinator's two
processes, and waits. Each lender judges the model by itself; the demo, which plays all houses, then joins what
they wrote and trains the pooled model that no federation could.
"""

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from fedfin.client.evaluation import EVALUATION_FILE, arm_metrics
from fedfin.client.joining import join
from fedfin.client.status import status_of
from fedfin.errors import ConfigError, FedfinError, LinkError
from fedfin.files import write_public
from fedfin.invitation import Invitation
from fedfin.plan import JobPlan
from fedfin.server.founding import Federation, found
from fedfin.server.supervisor import supervise
from fedfin.simulation.arms import take_rows, train_pooled
from fedfin.simulation.demo_job import demo_quorum
from fedfin.simulation.evaluation_view import last_evaluation
from fedfin.simulation.partition import DemoSplit, LenderRows, demo_loans, split_demo

__all__ = ["ArmMetrics", "DemoResult", "LenderResult", "check_lenders", "demo_schema_text", "run_demo"]

MIN_LENDERS: Final = 2
MAX_LENDERS: Final = 8
_END_S: Final = 10.0
_JUDGE_S: Final = 600.0

Say = Callable[[Mapping[str, Any]], None]
ArmMetrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class LenderResult:
    """One lender's line of the table: metrics of the three arms on the common held-out loans.

    `alone`, `federated` and `pooled` map auc, ks, brier and calibration to figures; `gain` is federated minus
    alone in AUROC, with its 95% bootstrap interval.
    """

    name: str
    kind: str
    n_train: int
    alone_kind: str
    alone: ArmMetrics
    federated: ArmMetrics
    pooled: ArmMetrics
    gain: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo showed; `epsilon` is None without privacy, `evaluation` where too few lenders took part in it."""

    lenders: tuple[LenderResult, ...]
    plan: JobPlan
    seed: int
    num_holdout: int
    bad_rate: float
    seconds: float
    directory: Path
    run: Path
    rounds: tuple[Mapping[str, Any], ...]
    budget: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None

    @property
    def epsilon(self) -> float | None:
        """Epsilon of the job, None without privacy."""
        return None if self.plan.privacy.mode == "none" else self.plan.privacy.epsilon

    def to_json(self) -> dict[str, Any]:
        """Return the document of `fedfin demo --json`."""
        return {
            "lenders": [
                {
                    "name": lender.name,
                    "kind": lender.kind,
                    "n_train": lender.n_train,
                    **{
                        metric: {
                            "alone": lender.alone[metric],
                            "federated": lender.federated[metric],
                            "pooled": lender.pooled[metric],
                        }
                        for metric in ("auc", "ks", "brier")
                    },
                    "gain": dict(zip(("auc", "low", "high"), lender.gain, strict=True)),
                }
                for lender in self.lenders
            ],
            "evaluation": self.evaluation,
            "rounds": self.plan.training.rounds,
            "aggregation": self.plan.aggregation,
            "mode": self.plan.privacy.mode,
            "epsilon": self.epsilon,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "run": str(self.run),
            "report": str(self.directory / "report.html"),
        }


def demo_schema_text() -> str:
    """Return the schema of the demo's loans, YAML."""
    return (resources.files("fedfin.simulation") / "credit_data.yaml").read_text(encoding="utf-8")


def check_lenders(num_lenders: int) -> None:
    """Refuse a number of lenders that the demo's loans are not split for.

    Raises:
        ConfigError: It is out of range.
    """
    if not MIN_LENDERS <= num_lenders <= MAX_LENDERS:
        msg = f"--lenders is {num_lenders}; the demo's loans are split for {MIN_LENDERS} to {MAX_LENDERS} lenders"
        raise ConfigError(msg)


def run_demo(
    directory: Path,
    plan: JobPlan,
    *,
    num_lenders: int,
    seed: int,
    say: Say,
    stop: threading.Event,
) -> DemoResult:
    """Run the demo to its end.

    Args:
        directory: A new or empty folder.
        plan: The job; its quorum and the lenders it waits for are set to the demo's.
        num_lenders: 2 to 8; about three eighths of them are banks.
        seed: Of the split of the loans; never of any noise.
        say: Told of the coordinator's events and of the demo's own (`stage`, `judged`).
        stop: When set, all processes end and the call raises KeyboardInterrupt.

    Raises:
        ConfigError: The folder is not empty, or the number of lenders is out of range.
        LinkError: A process could not start or ended early; says where its log is.
    """
    check_lenders(num_lenders)
    if directory.exists() and any(directory.iterdir()):
        msg = f"{directory} is not empty; the demo overwrites nothing: give a new folder with --dir"
        raise ConfigError(msg)
    started = time.monotonic()
    say({"event": "stage", "text": "splitting the loans"})
    loans, _ = demo_loans()
    split = _first(split_demo(loans, seed), num_lenders)
    plan = _for_all(plan, num_lenders)
    directory.mkdir(parents=True, exist_ok=True)
    federation = found(
        directory / "coordinator",
        name="demo",
        address=f"127.0.0.1:{_free_port()}",
        schema_text=demo_schema_text(),
        job=plan.model_dump(mode="python"),
    )
    houses = _Houses(directory, federation, split, plan, say)
    try:
        houses.run(stop)
    finally:
        houses.end()
    say({"event": "stage", "text": "training the pooled model, which no federation could"})
    return _result(houses, split, plan, seed, time.monotonic() - started)


class _Houses:
    """The processes of the demo: the coordinator's two, and one for each lender."""

    def __init__(
        self, directory: Path, federation: Federation, split: DemoSplit, plan: JobPlan, say: Say
    ) -> None:
        self.directory = directory
        self.federation = federation
        self.run_path: Path | None = None
        self._split = split
        self._plan = plan
        self._say = say
        self._lenders: dict[str, subprocess.Popen[bytes]] = {}
        self._listening = threading.Event()
        self._stop_coordinator = threading.Event()
        self._failure: list[BaseException] = []
        self._coordinator = threading.Thread(target=self._coordinate, daemon=True)

    def run(self, stop: threading.Event) -> None:
        """Start everything and wait until every lender has judged the model."""
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
        self._wait(lambda: not self._coordinator.is_alive(), stop)
        self._raise_failure()
        self._say({"event": "stage", "text": "each lender judges the model"})
        self._wait(
            lambda: all(process.poll() is not None for process in self._lenders.values()), stop, judging=True
        )
        self._check_lenders()

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
        private = self._plan.privacy.mode != "none"
        plain = self._plan.aggregation == "plain"
        bank["policy"] = {
            "epsilon_limit": self._plan.privacy.epsilon if private else 3.0,
            "allow_no_privacy": not private,
            "allow_plain_aggregation": plain,
            "max_rounds": max(200, self._plan.training.rounds),
            **({} if plain else {"min_cohort": self._plan.cohort.min_lenders}),
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
    quorum = demo_quorum(num_lenders) if secure else max(MIN_LENDERS, (num_lenders + 1) // 2)
    # Every lender is waited for: a demo that quietly left one out would show something else.
    cohort = plan.cohort.model_copy(update={"min_lenders": quorum, "wait_for": num_lenders})
    return plan.model_copy(update={"cohort": cohort})


def _first(split: DemoSplit, num_lenders: int) -> DemoSplit:
    num_banks = min(len(split.banks), max(1, round(num_lenders * len(split.banks) / MAX_LENDERS)))
    return DemoSplit(
        held_out=split.held_out,
        banks=split.banks[:num_banks],
        small_lenders=split.small_lenders[: num_lenders - num_banks],
    )


def _result(houses: _Houses, split: DemoSplit, plan: JobPlan, seed: int, seconds: float) -> DemoResult:
    loans, schema = demo_loans()
    held_out = take_rows(loans, split.held_out)
    pooled = arm_metrics(held_out.labels, train_pooled(loans, split, schema, seed).predict(held_out.frame))
    lenders: list[LenderResult] = []
    for lender in split.lenders:
        (path,) = houses.lender_directory(lender.name).glob(f"models/*/{EVALUATION_FILE}")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["n_train"] != len(lender.rows) or found["n_holdout"] != len(held_out):
            msg = f"{path} was not made on this demo's loans; run the demo in a new folder"
            raise FedfinError(msg)
        lenders.append(
            LenderResult(
                name=lender.name,
                kind="bank" if lender in split.banks else "small",
                n_train=found["n_train"],
                alone_kind=found["alone_kind"],
                alone=found["arms"]["alone"],
                federated=found["arms"]["federated"],
                pooled=pooled,
                gain=(found["gain"]["auc"], found["gain"]["low"], found["gain"]["high"]),
            )
        )
    run = houses.run_path
    assert run is not None  # noqa: S101  (a completed job has named its run)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    snapshots = status_of(houses.lender_directory(split.lenders[0].name) / "bank.yaml")["snapshots"]
    return DemoResult(
        lenders=tuple(lenders),
        plan=plan,
        seed=seed,
        num_holdout=len(held_out),
        bad_rate=float(held_out.labels.mean()),
        seconds=seconds,
        directory=houses.directory,
        run=run,
        rounds=tuple(line for line in lines if line["event"] == "round_done"),
        budget=next((snapshot for snapshot in snapshots if not snapshot["held_out"]), None),
        evaluation=last_evaluation(run),
    )


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

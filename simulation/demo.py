"""`fedfin demo`: a whole federation on this machine, of real processes, over TLS, on real loans.

The processes are those of `fedfin.simulation.houses`. Each lender judges the model by itself; the demo, which plays all
houses, then joins what they wrote and trains the pooled model that no federation could.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedfin.audit.evaluation_view import last_evaluation
from fedfin.client.evaluation import EVALUATION_FILE, arm_metrics
from fedfin.client.status import status_of
from fedfin.errors import ConfigError, FedfinError
from fedfin.plan import JobPlan
from fedfin.simulation.arms import take_rows, train_pooled
from fedfin.simulation.houses import Houses, Say, run_houses
from fedfin.simulation.partition import DemoSplit, demo_loans, split_demo

__all__ = ["ArmMetrics", "DemoResult", "LenderResult", "check_lenders", "run_demo"]

MIN_LENDERS: Final = 2
MAX_LENDERS: Final = 8

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
    started = time.monotonic()
    say({"event": "stage", "text": "splitting the loans"})
    loans, _ = demo_loans()
    split = _first(split_demo(loans, seed), num_lenders)
    houses = run_houses(directory, split, plan, say=say, stop=stop)
    say({"event": "stage", "text": "training the pooled model, which no federation could"})
    return _result(houses, split, seed, time.monotonic() - started)


def _first(split: DemoSplit, num_lenders: int) -> DemoSplit:
    num_banks = min(len(split.banks), max(1, round(num_lenders * len(split.banks) / MAX_LENDERS)))
    return DemoSplit(
        held_out=split.held_out,
        banks=split.banks[:num_banks],
        small_lenders=split.small_lenders[: num_lenders - num_banks],
    )


def _result(houses: Houses, split: DemoSplit, seed: int, seconds: float) -> DemoResult:
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
        plan=houses.plan,
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

"""Seconds a round beyond training, on loopback: against Flower's own FedAvg, or a secure round against a plain one.

Ours is the demo's federation (coordinator, SuperLink, lenders, TLS and node authentication, a durable checkpoint every
round) without differential privacy, about 10,000 parameters, one optimizer step on each lender's loans, which is
counted as if it were overhead. A round's time is from one aggregation's end to the next one's. Two sides are run in
turns; medians over all rounds but each run's first.

Without `--secure`: eight lenders, aggregation plain; the peer is stock: SuperLink, SuperNodes and FedAvg as they come,
with a ClientApp that does no work.

With `--secure`: ten lenders (the demo's, two of its banks in halves), aggregation secure against aggregation plain. The
first round of a secure run opens its keys by itself; from the second on open and share ride along, as the row says.

    python benchmarks/round_latency.py [--secure] [--json] [--lenders N] [--turns N]
"""

import argparse
import datetime as dt
import itertools
import json
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

from machine import document, print_document
from stock_flower import measure

from fedfin.plan import EvaluationPlan, JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.simulation.houses import run_houses
from fedfin.simulation.partition import DemoSplit, LenderRows, demo_loans, split_demo

OUR_ROUNDS = 9
STOCK_ROUNDS = 4
HIDDEN = 140  # with the demo's inputs this comes to about 10,000 parameters


def lenders_of(count: int) -> DemoSplit:
    """Return the demo's lenders, the largest ones in halves until there are enough, or the first ones."""
    split = split_demo(demo_loans()[0], seed=0)
    lenders = list(split.lenders)
    while len(lenders) < count:
        largest = max(lenders, key=lambda lender: len(lender.rows))
        lenders.remove(largest)
        lenders += [LenderRows(f"{largest.name}-{half}", largest.rows[half - 1 :: 2]) for half in (1, 2)]
    return DemoSplit(split.held_out, tuple(lenders[:count]), ())


def our_rounds(
    aggregation: Literal["plain", "secure"], num_lenders: int, directory: Path
) -> tuple[list[float], list[dict[str, Any]], int]:
    """Return the seconds between successive aggregations, the rounds as they are kept, and the number of parameters."""
    plan = JobPlan(
        name="latency",
        aggregation=aggregation,
        model=ModelPlan(kind="mlp", hidden=(HIDDEN,)),
        training=TrainingPlan(rounds=OUR_ROUNDS, local_steps=1, learning_rate=0.001),
        privacy=PrivacyPlan(mode="none"),
        evaluation=EvaluationPlan(times=0),
    )
    stop = threading.Event()
    run_houses(directory, lenders_of(num_lenders), plan, say=lambda _: None, stop=stop, judge=False)
    (run,) = (directory / "coordinator" / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round_done"]
    times = [dt.datetime.fromisoformat(line["time"]) for line in rounds]
    weights = (run / "model" / "model.safetensors").stat().st_size // 4
    seconds = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    return seconds, rounds, weights


def row_of(
    side: str, lenders: int, parameters: int, seconds: list[float], exchanges: float
) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "side": side,
        "lenders": lenders,
        "parameters": parameters,
        "rounds": len(seconds),
        "exchanges": exchanges,
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
    }


def against_flower(
    num_lenders: int, turns: int, directory: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the figure and the rows of a plain round against stock Flower's."""
    ours: list[float] = []
    stock: list[float] = []
    parameters = 0
    for turn in range(turns):
        seconds, _, parameters = our_rounds("plain", num_lenders, directory / f"ours-{turn}")
        ours += seconds
        timing = measure(num_lenders, STOCK_ROUNDS, parameters, directory=directory / f"stock-{turn}")
        stock += timing.round_s
    ratio = statistics.median(stock) / statistics.median(ours)
    rows = [
        row_of(side, num_lenders, parameters, seconds, 1)
        for side, seconds in (("fedfin", ours), ("stock Flower", stock))
    ]
    return {"round_latency.plain.flwr_over_ours": ratio}, rows


def secure_against_plain(
    num_lenders: int, turns: int, directory: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the figure and the rows of a secure round against a plain one."""
    seconds: dict[str, list[float]] = {"plain": [], "secure": []}
    exchanges: dict[str, list[int]] = {"plain": [], "secure": []}
    parameters = 0
    for turn in range(turns):
        for aggregation in ("plain", "secure"):
            found, rounds, parameters = our_rounds(
                aggregation, num_lenders, directory / f"{aggregation}-{turn}"
            )
            seconds[aggregation] += found
            exchanges[aggregation] += [line.get("exchanges", 1) for line in rounds[1:]]
    ratio = statistics.median(seconds["secure"]) / statistics.median(seconds["plain"])
    rows = [
        row_of(side, num_lenders, parameters, seconds[side], statistics.mean(exchanges[side]))
        for side in seconds
    ]
    return {"round_latency.secure.over_plain": ratio}, rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--secure", action="store_true", help="measure secure rounds against plain ones")
    parser.add_argument("--lenders", type=int, help="default: 8, with --secure 10")
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    compare = secure_against_plain if arguments.secure else against_flower
    num_lenders = arguments.lenders or (10 if arguments.secure else 8)
    with tempfile.TemporaryDirectory(prefix="fedfin-latency-") as temporary:
        figures, rows = compare(num_lenders, arguments.turns, Path(temporary))
    print_document(document("round_latency", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

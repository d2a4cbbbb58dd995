"""Seconds a round beyond training: fedfin's federation against Flower's own FedAvg, in the same run.

Eight lenders on loopback, TLS and node authentication at both sides, about 10,000 parameters. The peer is stock:
SuperLink, SuperNodes and FedAvg as they come, with a ClientApp that does no work. Ours is the demo's federation
(coordinator, SuperLink, eight lenders, a durable checkpoint every round) without privacy and with one optimizer
step on each lender's loans, which is counted as if it were overhead. A round's time is from one aggregation's
end to the next one's, at both sides. The two are run in turns; medians over all rounds but each run's first.

    python benchmarks/round_latency.py [--json] [--lenders N] [--turns N]
"""

import argparse
import datetime as dt
import itertools
import statistics
import tempfile
import threading
from pathlib import Path

from machine import document, print_document
from stock_flower import measure

from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.simulation.demo import run_demo

OUR_ROUNDS = 9
STOCK_ROUNDS = 4
HIDDEN = 140  # with the demo's inputs this comes to about 10,000 parameters


def our_rounds(num_lenders: int, directory: Path) -> tuple[list[float], int]:
    """Return the seconds between successive aggregations, and the number of parameters."""
    plan = JobPlan(
        name="latency",
        model=ModelPlan(kind="mlp", hidden=(HIDDEN,)),
        training=TrainingPlan(rounds=OUR_ROUNDS, local_steps=1, learning_rate=0.001),
        privacy=PrivacyPlan(mode="none"),
    )
    result = run_demo(
        directory, plan, num_lenders=num_lenders, seed=0, say=lambda _: None, stop=threading.Event()
    )
    times = [dt.datetime.fromisoformat(line["time"]) for line in result.rounds]
    weights = (result.run / "model" / "model.safetensors").stat().st_size // 4
    seconds = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    return seconds, weights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--lenders", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    ours: list[float] = []
    stock: list[float] = []
    num_parameters = 0
    with tempfile.TemporaryDirectory(prefix="fedfin-latency-") as temporary:
        for turn in range(arguments.turns):
            directory = Path(temporary)
            seconds, num_parameters = our_rounds(arguments.lenders, directory / f"ours-{turn}")
            ours += seconds
            timing = measure(
                arguments.lenders, STOCK_ROUNDS, num_parameters, directory=directory / f"stock-{turn}"
            )
            stock += timing.round_s
    ratio = statistics.median(stock) / statistics.median(ours)
    rows = [
        {
            "side": side,
            "lenders": arguments.lenders,
            "parameters": num_parameters,
            "rounds": len(times),
            "median_s": round(statistics.median(times), 3),
            "min_s": round(min(times), 3),
            "max_s": round(max(times), 3),
        }
        for side, times in (("fedfin", ours), ("stock Flower", stock))
    ]
    print_document(
        document("round_latency", {"round_latency.plain.flwr_over_ours": ratio}, rows), as_json=arguments.json
    )


if __name__ == "__main__":
    main()

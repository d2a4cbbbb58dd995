"""Which privacy mode serves the demo's small lenders better at the same stated guarantee: local, or shared?

The demo's own 4,454 loans and eight lenders (`fedfin.simulation.partition.split_demo`), in one process. Mode local
runs the plan's defaults, with each way to weigh lenders. Mode shared plans for 1 drop-out and for 2 colluders
(ceil(8/3) - 1, as many as the secure sum withstands); it runs with all answers there (`shared`), with one lender
missing in every sum, and with no drop-out planned. A seed draws split, batches, noise and drop-outs; the rows of a
seed are on the same lenders.

One model is judged twice: on all common held-out loans, which are the same for every lender, and, as `segments`, by
the mean over the five small lenders of the AUROC on those held-out loans that the lender serves.

`--choose` tries rounds and learning rates of mode shared, on the seeds 0, 1, ...; without it the chosen ones are
reported on the seeds 20, 21, ..., which nothing was chosen on.

    OMP_NUM_THREADS=1 python benchmarks/demo_modes.py [--choose] [--seeds N] [--epsilon E ...] [--json]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine import document, print_document

from fedfin.credit.metrics import auroc, brier, calibration_ratio, ks
from fedfin.plan import JobPlan
from fedfin.simulation.arms import federate, take_rows
from fedfin.simulation.partition import SEGMENTS, demo_loans, split_demo

NUM_LENDERS = 8
DROPOUTS, COLLUDERS = 1, 2
FIRST_REPORTED = 20
ROUNDS = (10, 20, 30, 40, 60)
LEARNING_RATES = (0.03, 0.05, 0.07, 0.1, 0.2, 0.3)
CHOSEN_ROUNDS, CHOSEN_RATE = 30, 0.07
MEASURES = ("auroc", "segments", "ks", "brier", "calibration")


def local_plan(epsilon: float, weighting: str) -> JobPlan:
    """Return the demo's job in mode local, with a way to weigh lenders."""
    return JobPlan.model_validate(
        {
            "training": {"weighting": weighting},
            "privacy": {"mode": "local", "epsilon": epsilon},
        }
    )


def shared_plan(
    epsilon: float, rounds: int, learning_rate: float, *, planned: int = DROPOUTS, missing: int = 0
) -> JobPlan:
    """Return the demo's job in mode shared, with drop-outs planned, of which some happen in every sum.

    The simulation lets every planned drop-out happen. Those that do not happen are planned as colluders instead: a
    lender's share of the noise is the same, and its answer is there.
    """
    return JobPlan.model_validate(
        {
            "training": {"rounds": rounds, "local_steps": 1, "learning_rate": learning_rate},
            "privacy": {
                "mode": "shared",
                "epsilon": epsilon,
                "planned_dropouts": missing,
                "planned_colluders": COLLUDERS + planned - missing,
            },
            "cohort": {"min_lenders": NUM_LENDERS},
        }
    )


def reported_plans(epsilon: float) -> dict[str, JobPlan]:
    """Return the jobs that are compared, by name; the first is the peer of all others."""
    return {
        "local, size": local_plan(epsilon, "size"),
        "local, sqrt": local_plan(epsilon, "sqrt"),
        "local, equal": local_plan(epsilon, "equal"),
        "shared": shared_plan(epsilon, CHOSEN_ROUNDS, CHOSEN_RATE),
        "shared, one missing": shared_plan(epsilon, CHOSEN_ROUNDS, CHOSEN_RATE, missing=1),
        "shared, no drop-out planned": shared_plan(epsilon, CHOSEN_ROUNDS, CHOSEN_RATE, planned=0),
    }


def candidate_plans(epsilon: float) -> dict[str, JobPlan]:
    """Return the jobs that the rounds and the learning rate of mode shared are chosen from, by name."""
    candidates = {
        f"shared {rounds} rounds at {rate:g}": shared_plan(epsilon, rounds, rate)
        for rounds in ROUNDS
        for rate in LEARNING_RATES
    }
    return {"local, size": local_plan(epsilon, "size"), **candidates}


def measure(plans: dict[str, JobPlan], seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Return every measure of every job on every seed, in the order of the seeds."""
    loans, schema = demo_loans()
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in MEASURES} for name in plans}
    for seed in seeds:
        split = split_demo(loans, seed)
        lenders = [take_rows(loans, lender.rows) for lender in split.lenders]
        held_out = take_rows(loans, split.held_out)
        served = [serves(held_out.frame) for _, serves in SEGMENTS]
        for name, plan in plans.items():
            scores = federate(lenders, schema, plan, seed).predict(held_out.frame)
            labels = held_out.labels
            values = (
                auroc(labels, scores),
                float(np.mean([auroc(labels[rows], scores[rows]) for rows in served])),
                ks(labels, scores),
                brier(labels, scores),
                calibration_ratio(labels, scores),
            )
            for key, value in zip(MEASURES, values, strict=True):
                found[name][key].append(value)
    return found


def table(found: dict[str, dict[str, list[float]]], epsilon: float) -> list[dict[str, Any]]:
    """Return one row a job: means over the seeds, paired differences to the first job and their standard errors."""
    peer = next(iter(found.values()))
    rows = []
    for name, values in found.items():
        row: dict[str, Any] = {"epsilon": epsilon, "job": name, "seeds": len(values["auroc"])}
        for key in MEASURES:
            row[key] = float(np.mean(values[key]))
            if key != "calibration":  # nearer to 1 is better: a difference says nothing
                row[f"{key}_gain"], row[f"{key}_gain_error"] = _paired(values[key], peer[key])
        rows.append(row)
    return rows


def _paired(values: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference and its standard error over the seeds."""
    differences = np.subtract(values, peer)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--choose", action="store_true", help="try rounds and learning rates instead")
    parser.add_argument("--seeds", type=int, default=12, help="splits, at least 2")
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="epsilons of the job"
    )
    arguments = parser.parse_args()
    first = 0 if arguments.choose else FIRST_REPORTED
    plans = candidate_plans if arguments.choose else reported_plans
    rows, figures = [], {}
    for epsilon in arguments.epsilon:
        found = table(measure(plans(epsilon), range(first, first + arguments.seeds)), epsilon)
        rows += found
        for row in found:
            if row["job"] == "shared":
                figures[f"demo_modes.eps{epsilon:g}.shared_minus_local"] = row["auroc_gain"]
                figures[f"demo_modes.eps{epsilon:g}.standard_error"] = row["auroc_gain_error"]
    print_document(document("demo_modes", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

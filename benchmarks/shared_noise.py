"""What noise in shares costs: AUROC of mode shared, of a trusted central run with its guarantee, and of mode local.

Taiwan's 30,000 card holders, the protected attributes not among the features: 80% train, 20% judge, drawn at random
within each outcome. The training loans are split over 50 lenders of very unequal size that serve different people
(`fedfin.simulation.partition.split_unequal`). Mode shared plans for 2 drop-outs and 2 colluders, and in every sum 2
lenders fail to answer; mode local runs the plan's defaults. A seed draws split, lenders and noise; the columns of a
row are on the same lenders, with noise of their own.

The table is read from FEDFIN_DATA_DIR (default ../shared/data).

    OMP_NUM_THREADS=1 python benchmarks/shared_noise.py [--seeds N] [--epsilon E ...] [--json]
"""

import argparse
from typing import Any

import numpy as np
from machine import document, print_document
from real_tables import read_tables, split_loans

from fedfin.credit.metrics import auroc
from fedfin.credit.schema import Schema
from fedfin.credit.source import Loans
from fedfin.plan import CohortPlan, JobPlan, PrivacyPlan, TrainingPlan
from fedfin.simulation.arms import federate, take_rows
from fedfin.simulation.partition import split_unequal
from fedfin.simulation.shared import central

NUM_LENDERS = 50
PREFERRED_COLUMNS = ("LIMIT_BAL", "BILL_AMT1", "PAY_AMT1")
TRAINING = TrainingPlan(rounds=40, local_steps=1, learning_rate=0.05)


def shared_plan(epsilon: float) -> JobPlan:
    """Return the job of mode shared; the trusted central run has the same."""
    privacy = PrivacyPlan(mode="shared", epsilon=epsilon, planned_dropouts=2, planned_colluders=2)
    return JobPlan(training=TRAINING, privacy=privacy, cohort=CohortPlan(min_lenders=NUM_LENDERS))


def measure(loans: Loans, schema: Schema, epsilon: float, seed: int) -> dict[str, Any]:
    """Return one row: every mode's AUROC on the held-out loans of one split."""
    train, held_out = split_loans(loans, seed)
    rng = np.random.default_rng(seed)
    parts = split_unequal(train.frame, NUM_LENDERS, PREFERRED_COLUMNS, rng)
    lenders = [take_rows(train, rows) for rows in parts]
    sizes = sorted(len(rows) for rows in parts)
    models = {
        "shared": federate(lenders, schema, shared_plan(epsilon), seed),
        "central": central(lenders, schema, shared_plan(epsilon), seed),
        "local": federate(lenders, schema, JobPlan(privacy=PrivacyPlan(epsilon=epsilon)), seed),
    }
    figures = {name: auroc(held_out.labels, model.predict(held_out.frame)) for name, model in models.items()}
    spread = {"smallest": sizes[0], "median": sizes[NUM_LENDERS // 2], "largest": sizes[-1]}
    return {"epsilon": epsilon, "seed": seed, **spread, **figures}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--seeds", type=int, default=5, help="splits, lenders and noises")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0], help="epsilons of the job")
    arguments = parser.parse_args()
    tables = read_tables()
    if "taiwan_default" not in tables:
        parser.exit(1, "taiwan_default.csv.gz is not in FEDFIN_DATA_DIR\n")
    loans, schema = tables["taiwan_default"]
    rows = [
        measure(loans, schema, epsilon, seed)
        for epsilon in arguments.epsilon
        for seed in range(arguments.seeds)
    ]
    figures: dict[str, float] = {}
    for epsilon in arguments.epsilon:
        gaps = [row["central"] - row["shared"] for row in rows if row["epsilon"] == epsilon]
        figures[f"shared_noise.eps{epsilon:g}.central_minus_shared"] = float(np.mean(gaps))
        figures[f"shared_noise.eps{epsilon:g}.largest_difference"] = float(np.abs(gaps).max())
    print_document(document("shared_noise", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

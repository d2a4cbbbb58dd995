"""How far `fedfin privacy plan` may be trusted: its estimate for a federation against a federation that was trained.

A real table is split at random into lenders of equal size and common held-out loans. What privacy costs the federation
is measured: AUROC of the product's own `federate` without privacy less that of the private job, which the first lender
cannot know. Beside it stand the two ends of the estimate that this lender is shown, from its own loans alone.
Every figure is a mean over the splits; the standard error is that of the measured cost over the splits. Plan: the
defaults but for epsilon and model. The Taiwanese table is read from FEDFIN_DATA_DIR (default ../shared/data) and left
out where it is not there.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py [--json]
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import document, print_document

from fedfin.client.forecast import Forecast, baseline_of, forecast
from fedfin.client.preparation import PreparedLoans
from fedfin.config import DataSource
from fedfin.credit.metrics import auroc
from fedfin.credit.schema import Schema
from fedfin.credit.source import Loans, read_loans
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan
from fedfin.privacy.accounting import calibrate
from fedfin.privacy.snapshot import snapshot_of
from fedfin.simulation.arms import federate, take_rows
from fedfin.simulation.partition import demo_loans

ROOT = Path(__file__).resolve().parents[1]
NUM_SPLITS = 4
NUM_DRAWS = 3  # of the federation's noise, for each split
MOST_LENDERS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    table: str
    num_loans: int  # of a lender
    model: Literal["logistic", "mlp"]
    epsilon: float
    num_lenders: int


def cases(tables: list[str]) -> Iterator[Case]:
    """Yield what is compared; the MLP is slow and stands for fewer."""
    for table, num_loans in (("demo", 389), ("taiwan", 500), ("taiwan", 2000)):
        if table in tables:
            for epsilon in (1.0, 3.0):
                for num_lenders in (2, MOST_LENDERS):
                    yield Case(table, num_loans, "logistic", epsilon, num_lenders)
                if num_loans <= 500:
                    yield Case(table, num_loans, "mlp", epsilon, MOST_LENDERS)


def measured(case: Case, lenders: list[Loans], held_out: Loans, schema: Schema, plan: JobPlan) -> float:
    """Return what privacy costs the federation in AUROC."""
    plain = plan.model_copy(update={"privacy": PrivacyPlan(mode="none")})

    def held_out_auroc(job: JobPlan, seed: int) -> float:
        model = federate(lenders[: case.num_lenders], schema, job, seed)
        return auroc(held_out.labels, model.predict(held_out.frame))

    return held_out_auroc(plain, 0) - float(
        np.mean([held_out_auroc(plan, seed) for seed in range(NUM_DRAWS)])
    )


def estimated(case: Case, own: Loans, held_out: Loans, schema: Schema, plan: JobPlan) -> Forecast:
    """Return what one lender is told."""
    loans = PreparedLoans(schema, own, held_out, snapshot_of(own.frame, own.labels, bytes(32)))
    noise = calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)
    baseline = baseline_of(loans, plan, lambda: None)
    return forecast(loans, plan, noise, baseline, num_lenders=case.num_lenders, done=lambda: None)


def compare(case: Case, loans: Loans, schema: Schema) -> dict[str, Any]:
    """Return one line: the measured cost, its standard error, and both ends of the estimate."""
    plan = JobPlan(model=ModelPlan(kind=case.model), privacy=PrivacyPlan(epsilon=case.epsilon))
    costs: list[float] = []
    ends: list[tuple[float, float]] = []
    for seed in range(NUM_SPLITS):
        order = np.random.default_rng(seed).permutation(len(loans))
        train, rest = np.split(order, [case.num_loans * MOST_LENDERS])
        held_out = take_rows(loans, rest[:6000])
        lenders = [take_rows(loans, rows) for rows in np.array_split(train, MOST_LENDERS)]
        costs.append(measured(case, lenders, held_out, schema, plan))
        told = estimated(case, lenders[0], held_out, schema, plan)
        ends.append((told.federation_low.estimate, told.federation_high.estimate))
    low, high = np.mean(ends, axis=0)
    return {
        "table": case.table,
        "loans": case.num_loans,
        "model": case.model,
        "epsilon": case.epsilon,
        "lenders": case.num_lenders,
        "cost": float(np.mean(costs)),
        "stderr": float(np.std(costs, ddof=1) / np.sqrt(NUM_SPLITS)),
        "from": float(low),
        "to": float(high),
        "outside": float(max(0.0, min(low, high) - np.mean(costs), np.mean(costs) - max(low, high))),
    }


def tables() -> dict[str, tuple[Loans, Schema]]:
    """Return the tables that are there."""
    found = {"demo": demo_loans()}
    folder = Path(os.environ.get("FEDFIN_DATA_DIR", ROOT.parent / "shared/data"))
    path = folder / "taiwan_default.csv.gz"
    if path.exists():
        schema_path = ROOT / "benchmarks/tables/taiwan_default.yaml"
        schema = Schema.from_yaml(schema_path.read_text("utf-8"), origin=str(schema_path))
        found["taiwan"] = (read_loans(DataSource(path=str(path)), schema, folder), schema)
    return found


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    found = tables()
    rows = [compare(case, *found[case.table]) for case in cases(list(found))]
    outside = [row["outside"] for row in rows]
    figures = {
        "forecast.share_inside": float(np.mean([value == 0.0 for value in outside])),
        "forecast.farthest_outside": max(outside),
    }
    print_document(document("forecast", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

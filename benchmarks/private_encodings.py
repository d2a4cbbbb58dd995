"""What the bins cost under privacy: AUROC by number of bins, by public grid and by the bins' share of epsilon.

Five real credit tables, each in one house (the product's own `federate` with one lender): 80% of the loans train, 20%
judge, drawn at random within each outcome. The bins come from a noisy histogram that is charged to the job like every
step; without privacy (epsilon "none") the same plan runs without noise. Every row changes one setting of the plan's
defaults or of the schema's grids; a cell is the mean AUROC over the split seeds 0, 1, ..., of which the large table
has two. A seed has the same split and starts the same stream of noise in every row.

A table that is not in the data folder is left out. The first rows, `taiwan`, are the bars: seeds 0 to 2, without and
with the protected attributes among the features.

    OMP_NUM_THREADS=1 python benchmarks/private_encodings.py [--full] [--json]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from machine import document, print_document
from real_tables import num_splits, read_tables, split_loans

from fedfin.credit.metrics import auroc
from fedfin.credit.schema import Column, NumericColumn, Schema
from fedfin.credit.source import Loans
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan
from fedfin.simulation.arms import federate

BAR_SEEDS = range(3)
DELTA = 1e-5
MAX_BINS = (3, 4, 6, 8, 12, 16)
GRID_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times every numeric column's grid_cells
BINS_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
KINDS = ("logistic", "mlp")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row's departure from the plan.

    Attributes:
        question: Which table of the report the row belongs to.
        value: What the question varies, as it is shown.
        max_bins: Bins per numeric column.
        grid_factor: Every numeric column's `grid_cells` times this, at least 2.
        bins_share: The bins' share of epsilon.
    """

    question: str
    value: float
    max_bins: int = ModelPlan().max_bins
    grid_factor: float = 1.0
    bins_share: float = PrivacyPlan().bins_share


def plan_of(kind: str, epsilon: float | None, setting: Setting) -> JobPlan:
    """Return the job of one cell; epsilon None trains without privacy."""
    privacy = (
        PrivacyPlan(mode="none")
        if epsilon is None
        else PrivacyPlan(epsilon=epsilon, delta=DELTA, bins_share=setting.bins_share)
    )
    model = ModelPlan.model_validate({"kind": kind, "max_bins": setting.max_bins})
    return JobPlan(model=model, privacy=privacy)


def with_grid(schema: Schema, factor: float) -> Schema:
    """Return the schema with every numeric column's grid finer or coarser, at least two cells."""

    def scaled(column: Column) -> Column:
        if not isinstance(column, NumericColumn):
            return column
        return column.model_copy(update={"grid_cells": min(4096, max(2, round(column.grid_cells * factor)))})

    return schema.model_copy(update={"columns": tuple(scaled(column) for column in schema.columns)})


def with_protected(schema: Schema) -> Schema:
    """Return the schema with the protected attributes among the features: for the comparison only."""
    reason = "benchmark: what leaving it out costs"
    columns = tuple(
        column.model_copy(update={"protected_as_feature": reason}) if column.protected else column
        for column in schema.columns
    )
    return schema.model_copy(update={"columns": columns})


def pooled_auroc(loans: Loans, schema: Schema, plan: JobPlan, seed: int) -> float:
    """Train on one split's 80% in one house and return the AUROC on its 20%."""
    train, held_out = split_loans(loans, seed)
    return auroc(held_out.labels, federate([train], schema, plan, seed).predict(held_out.frame))


def taiwan_rows(loans: Loans, schema: Schema) -> Iterator[dict[str, Any]]:
    """Yield the bars' rows: each kind of model and epsilon, without and with the protected attributes."""
    plain = Setting("taiwan", 0.0)
    for kind in KINDS:
        for epsilon in (1.0, 4.0, None):
            aucs = {
                used: [
                    pooled_auroc(loans, columns, plan_of(kind, epsilon, plain), seed) for seed in BAR_SEEDS
                ]
                for used, columns in (("without", schema), ("with", with_protected(schema)))
            }
            yield {
                "question": "taiwan",
                "kind": kind,
                "epsilon": epsilon or "none",
                "taiwan_default": float(np.mean(aucs["without"])),
                "lowest_seed": min(aucs["without"]),
                "highest_seed": max(aucs["without"]),
                "with_protected": float(np.mean(aucs["with"])),
                "difference": float(np.mean(aucs["with"]) - np.mean(aucs["without"])),
            }


def settings_of(*, full: bool) -> Iterator[tuple[str, float | None, Setting]]:
    """Yield kind, epsilon and setting of every row; the compact set has the ends and the middle of each range."""
    for kind in KINDS:
        for epsilon in (1.0, 4.0):
            for cells in MAX_BINS if full else (3, 6, 12):
                yield kind, epsilon, Setting("max_bins", cells, max_bins=cells)
            for factor in GRID_FACTORS if full else (0.25, 4.0):
                yield kind, epsilon, Setting("grid_cells", factor, grid_factor=factor)
            for share in BINS_SHARES if full else (0.05, 0.5):
                yield kind, epsilon, Setting("bins_share", share, bins_share=share)
        for cells in MAX_BINS if full else (6,):
            yield kind, None, Setting("max_bins", cells, max_bins=cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--full", action="store_true", help="every setting, ten seeds a table (about an hour)"
    )
    arguments = parser.parse_args()
    num_seeds = 10 if arguments.full else 4
    tables = read_tables()
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    if "taiwan_default" in tables:
        rows += taiwan_rows(*tables["taiwan_default"])
        for row in rows:
            if row["epsilon"] != "none":
                figures[f"private_encodings.taiwan.{row['kind']}.eps{row['epsilon']:g}"] = row[
                    "taiwan_default"
                ]
                figures[f"private_encodings.taiwan.{row['kind']}.eps{row['epsilon']:g}_protected_adds"] = row[
                    "difference"
                ]
    for kind, epsilon, setting in settings_of(full=arguments.full):
        plan = plan_of(kind, epsilon, setting)
        row = {
            "question": setting.question,
            "kind": kind,
            "epsilon": epsilon or "none",
            "value": setting.value,
        }
        for name, (loans, schema) in tables.items():
            seeds = range(num_splits(name, num_seeds))
            grid = with_grid(schema, setting.grid_factor)
            row[name] = float(np.mean([pooled_auroc(loans, grid, plan, seed) for seed in seeds]))
        rows.append(row)
    rows.sort(key=lambda row: str(row["question"]))  # one table after the other
    print_document(document("private_encodings", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

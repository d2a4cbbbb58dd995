"""Do the plan's defaults work on tables they were not tuned on? Regret, one table left out at a time.

The defaults were tuned on one table, the demo's (docs/decisions/0009-defaults-of-the-plan.md). Here every candidate
changes one of them; each is trained on five real tables (see `real_tables.py`), in one house (`pooled`) and in a
federation of seven lenders (`federated`), with the bins charged. Two questions for each table
and epsilon:

- How far is the default from the best candidate for that very table (`regret_default`)? The best of many is partly
  luck, so that this is an upper estimate.
- Had the other four tables chosen (the candidate with the best mean gain over the default there, over both arms), how
  would their choice have done on the fifth (`gain_chosen`, over the default)? If it does not beat the default, the
  default needs no change.

The seven lenders of `federated`: four small ones share 15% of the training loans evenly and at random; each other loan
goes to one of three banks, with odds that grow as exp(3 r), r its rank in the bank's column (the first numeric
features of the schema). Cells are means over the split seeds 0, 1, ...; a seed has the same split, lenders and streams
of noise for every candidate, so that the columns are paired.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py --kind logistic|mlp [--seeds N] [--epsilon E ...] [--json]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine import document, print_document
from real_tables import num_splits, read_tables, split_loans

from fedfin.credit.metrics import auroc
from fedfin.credit.schema import NumericColumn, Schema
from fedfin.credit.source import Loans
from fedfin.plan import JobPlan
from fedfin.simulation.arms import federate, take_rows

EPSILONS = (1.0, 3.0, 4.0)
ARMS = ("pooled", "federated")
SMALL_LENDERS = 4
SMALL_SHARE = 0.15
NUM_BANKS = 3
BANK_PREFERENCE = 3.0
# A candidate changes these keys of the plan, by section; every other number is the default.
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "clipping_bound 0.5": {"privacy": {"clipping_bound": 0.5}},
    "clipping_bound 1": {"privacy": {"clipping_bound": 1.0}},
    "clipping_bound 4": {"privacy": {"clipping_bound": 4.0}},
    "learning_rate .01": {"training": {"learning_rate": 0.01}},
    "learning_rate .06": {"training": {"learning_rate": 0.06}},
    "bins_share .1": {"privacy": {"bins_share": 0.1}},
    "bins_share .35": {"privacy": {"bins_share": 0.35}},
    "max_bins 4": {"model": {"max_bins": 4}},
    "max_bins 10": {"model": {"max_bins": 10}},
    "5 rounds of 10": {"training": {"rounds": 5, "local_steps": 10}},
    "1 round of 100": {"training": {"rounds": 1, "local_steps": 100}},
}


def plan_of(kind: str, epsilon: float, changes: dict[str, dict[str, Any]]) -> JobPlan:
    """Return the default job with a candidate's changes."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"kind": kind},
        "training": {},
        "privacy": {"epsilon": epsilon},
    }
    return JobPlan.model_validate(
        {name: defaults | changes.get(name, {}) for name, defaults in sections.items()}
    )


def lenders_of(loans: Loans, schema: Schema, seed: int) -> list[Loans]:
    """Return the training loans of three banks and four small lenders; every loan has one owner."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(loans))
    num_small = round(SMALL_SHARE * len(loans))
    small, rest = np.array_split(order[:num_small], SMALL_LENDERS), order[num_small:]
    numeric = [column.name for column in schema.features if isinstance(column, NumericColumn)]
    ranks = np.stack(
        [
            loans.frame.iloc[rest][numeric[bank % len(numeric)]].rank(pct=True).fillna(0.5).to_numpy()
            for bank in range(NUM_BANKS)
        ],
        axis=1,
    )
    if len(numeric) < NUM_BANKS:
        ranks[:, len(numeric) :] = (
            1 - ranks[:, : NUM_BANKS - len(numeric)]
        )  # who the first bank does not like
    odds = np.exp(BANK_PREFERENCE * ranks)
    shares = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    bank_of = (rng.random((len(rest), 1)) > shares[:, :-1]).sum(axis=1)
    groups = [rest[bank_of == bank] for bank in range(NUM_BANKS)] + list(small)
    return [take_rows(loans, np.sort(group)) for group in groups]


def measure(
    kind: str, tables: dict[str, tuple[Loans, Schema]], epsilons: Sequence[float], num_seeds: int
) -> list[dict[str, Any]]:
    """Return one row for each candidate, epsilon and arm, with the mean AUROC on every table."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for name, (loans, schema) in tables.items():
        splits[name] = []
        for seed in range(num_splits(name, num_seeds)):
            train, held_out = split_loans(loans, seed)
            splits[name].append(
                {"pooled": [train], "federated": lenders_of(train, schema, seed)} | {"test": held_out}
            )
    rows = []
    for candidate, changes in CANDIDATES.items():
        for epsilon in epsilons:
            plan = plan_of(kind, epsilon, changes)
            for arm in ARMS:
                row: dict[str, Any] = {"kind": kind, "candidate": candidate, "epsilon": epsilon, "arm": arm}
                for name, (_, schema) in tables.items():
                    row[name] = float(
                        np.mean(
                            [
                                auroc(
                                    split["test"].labels,
                                    federate(split[arm], schema, plan, seed).predict(split["test"].frame),
                                )
                                for seed, split in enumerate(splits[name])
                            ]
                        )
                    )
                rows.append(row)
    return rows


def regrets(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each epsilon and table what the default lacks, and what the other tables' choice would have gained."""

    def gain(candidate: str, epsilon: float, name: str) -> float:
        """Return a candidate's mean gain over the default on one table, over the arms."""
        at = [row for row in rows if row["epsilon"] == epsilon]
        own, default = (
            [row[name] for row in at if row["candidate"] == which] for which in (candidate, "default")
        )
        return float(np.mean(own) - np.mean(default))

    def best_of(epsilon: float, judges: Sequence[str]) -> str:
        return max(
            CANDIDATES, key=lambda candidate: np.mean([gain(candidate, epsilon, name) for name in judges])
        )

    summary = []
    for epsilon in sorted({row["epsilon"] for row in rows}):
        for name in names:
            best = best_of(epsilon, [name])
            chosen = best_of(epsilon, [other for other in names if other != name])
            summary.append(
                {
                    "table": name,
                    "epsilon": epsilon,
                    "best": best,
                    "regret_default": gain(best, epsilon, name),
                    "chosen": chosen,
                    "gain_chosen": gain(chosen, epsilon, name),
                }
            )
    return summary


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--kind", choices=("logistic", "mlp"), default="logistic", help="which model")
    parser.add_argument("--seeds", type=int, default=5, help="splits of each small table")
    parser.add_argument("--epsilon", type=float, nargs="+", default=EPSILONS, help="epsilons of the job")
    arguments = parser.parse_args()
    tables = read_tables()
    rows = measure(arguments.kind, tables, arguments.epsilon, arguments.seeds)
    summary = regrets(rows, list(tables))
    prefix = f"defaults.{arguments.kind}"
    figures = {
        f"{prefix}.regret_default": float(np.mean([row["regret_default"] for row in summary])),
        f"{prefix}.gain_chosen": float(np.mean([row["gain_chosen"] for row in summary])),
    }
    print_document(document("defaults", figures, rows + summary), as_json=arguments.json)


if __name__ == "__main__":
    main()

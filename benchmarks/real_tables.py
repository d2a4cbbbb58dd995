"""The five real credit tables of the benchmarks: where they are, their schemas, and how they are split.

The tables are read from FEDFIN_DATA_DIR (default ../shared/data) and never shipped; the one that the package ships
has the package's own schema. Sources and licences stand in the schemas.
"""

import os
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from fedfin.config import DataSource
from fedfin.credit.schema import Schema
from fedfin.credit.source import Loans, read_loans
from fedfin.simulation.arms import take_rows

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_PATHS = {
    "taiwan_default": ROOT / "benchmarks/tables/taiwan_default.yaml",
    "south_german_credit": ROOT / "benchmarks/tables/south_german_credit.yaml",
    "sba_small_business_ca": ROOT / "benchmarks/tables/sba_small_business_ca.yaml",
    "hmda_boston_denial": ROOT / "benchmarks/tables/hmda_boston_denial.yaml",
    "credit_data_spain": ROOT / "simulation/credit_data.yaml",
}
HELD_OUT_SHARE = 0.2
TAIWAN_SEEDS = 2
"""Splits of Taiwan where other tables have more: it is six to thirty times as large, and as much steadier."""


def read_tables() -> dict[str, tuple[Loans, Schema]]:
    """Return the loans and the schema of every table that the data folder has."""
    folder = ROOT / os.environ.get("FEDFIN_DATA_DIR", "../shared/data")
    tables = {}
    for name, schema_path in SCHEMA_PATHS.items():
        path = (folder / f"{name}.csv.gz").resolve()
        if path.is_file():
            schema = Schema.from_yaml(schema_path.read_text("utf-8"), schema_path.name)
            tables[name] = (read_loans(DataSource(path=str(path)), schema, ROOT), schema)
    return tables


def split_loans(loans: Loans, seed: int) -> tuple[Loans, Loans]:
    """Return 80% of the loans to train on and 20% to judge by, each outcome in its proportion."""
    train, held_out = train_test_split(
        np.arange(len(loans)), test_size=HELD_OUT_SHARE, random_state=seed, stratify=loans.labels
    )
    return take_rows(loans, np.sort(train)), take_rows(loans, np.sort(held_out))


def num_splits(name: str, num_seeds: int) -> int:
    """Return on how many split seeds, 0, 1, ..., a table is measured when the small ones have `num_seeds`."""
    return min(num_seeds, TAIWAN_SEEDS) if name == "taiwan_default" else num_seeds

"""What summed counts tell of a model: AUROC of 64 or 32 cells of the score, by how the cells are cut, and under noise.

Five real credit tables: 80% of the loans train, split at random over eight lenders (the product's own `federate`,
without privacy and at epsilon 3), 20% judge. Beside them 20,000 made-up loans of which 1% are bad. Each row is one way
to cut the score: `off` is the AUROC of the cells less that of the loans, `noised` the root mean square error with the
noise of epsilon 3 on the counts, once (mode shared), as for two protected columns; empty where the number of bad loans
is itself lost in noise. A table that is not in the data folder is left out.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_cells.py [--json]
"""

import argparse
from typing import Any

import numpy as np
from machine import document, print_document
from numpy.typing import NDArray
from real_tables import read_tables, split_loans

from fedfin.credit.metrics import auroc
from fedfin.privacy.accounting import calibrate_releases
from fedfin.simulation.arms import demo_plan, federate, take_rows

NUM_LENDERS = 8
EPSILON, DELTA = 3.0, 1e-5
NUM_PROTECTED = 2
NUM_DRAWS = 300
FEWEST = 4.0  # bad loans, in standard errors of their noisy number: with fewer the figure has no meaning


def edges_of(way: str, num_cells: int) -> NDArray[np.float64]:
    """Return the probabilities that bound the cells, shape (num_cells + 1,)."""
    places = np.linspace(0.0, 1.0, num_cells + 1)
    match way:
        case "arcsine":
            return np.sin(places * np.pi / 2) ** 2
        case "log_odds":
            edges = 1.0 / (1.0 + np.exp(8.0 - 16.0 * places))
            edges[0], edges[-1] = 0.0, 1.0
            return edges
        case _:
            return places


def binned_auroc(good: NDArray[np.float64], bad: NDArray[np.float64]) -> float:
    """Return the AUROC of counts per cell, ties half."""
    return float(bad @ (np.cumsum(good) - good / 2) / (bad.sum() * good.sum()))


def row_of(
    way: str, num_cells: int, labels: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> tuple[float, float | None]:
    """Return what the cells are off without noise, and the root mean square error with it."""
    cells = np.clip(
        np.searchsorted(edges_of(way, num_cells), probabilities, side="right") - 1, 0, num_cells - 1
    )
    good, bad = (
        np.bincount(cells[labels == side], minlength=num_cells).astype(np.float64) for side in (0, 1)
    )
    exact = auroc(labels, probabilities)
    noise = calibrate_releases(EPSILON, DELTA, 1) * np.sqrt(1.0 + NUM_PROTECTED)
    rng = np.random.default_rng(0)
    if bad.sum() < FEWEST * noise * np.sqrt(num_cells):
        return binned_auroc(good, bad) - exact, None
    errors = [
        binned_auroc(good + rng.normal(0, noise, num_cells), bad + rng.normal(0, noise, num_cells)) - exact
        for _ in range(NUM_DRAWS)
    ]
    return binned_auroc(good, bad) - exact, float(np.sqrt(np.mean(np.square(errors))))


def scored() -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Return labels and probabilities of the held-out loans, by table and privacy."""
    found: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    for name, (loans, schema) in read_tables().items():
        train, held_out = split_loans(loans, 0)
        parts = np.array_split(np.random.default_rng(1).permutation(len(train)), NUM_LENDERS)
        lenders = [take_rows(train, np.sort(part)) for part in parts]
        for epsilon in (None, EPSILON):
            model = federate(lenders, schema, demo_plan(epsilon), 0)
            found[f"{name}, epsilon {epsilon or 'none'}"] = held_out.labels, model.predict(held_out.frame)
    rng = np.random.default_rng(0)
    probabilities = 1.0 / (1.0 + np.exp(-rng.normal(-5.3, 1.2, 20_000)))
    found["made up, 1% bad"] = (rng.random(20_000) < probabilities).astype(np.int64), probabilities
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (labels, probabilities) in scored().items():
        for num_cells in (64, 32):
            for way in ("probability", "log_odds", "arcsine"):
                off, noised = row_of(way, num_cells, labels, probabilities)
                rows.append(
                    {
                        "loans": name,
                        "num": len(labels),
                        "cells": num_cells,
                        "cut": way,
                        "off": f"{off:+.4f}",
                        "noised": "" if noised is None else f"{noised:.4f}",
                    }
                )
    print_document(document("evaluation_cells", {}, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

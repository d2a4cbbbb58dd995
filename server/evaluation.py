"""What the federation learns of a model: figures of merit of all held-out loans, from the sum of the lenders' counts.

Only sums are here. Each figure has the standard error that the lenders' noise gives it, and one of which noise leaves
nothing is named and not shown.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfin.credit.count_metrics import LARGEST_ERRORS, calibration_table, figures_of
from fedfin.credit.fairness import fairness_of
from fedfin.credit.schema import Schema
from fedfin.credit.score_counts import evaluation_cells, evaluation_sensitivity, split_counts
from fedfin.plan import JobPlan
from fedfin.privacy.evaluation_noise import evaluation_event, evaluation_scheme
from fedfin.privacy.shares import ShareScheme

__all__ = [
    "evaluation_rounds",
    "evaluation_sum",
    "local_noise",
    "metrics_from",
    "scheme_for",
    "shared_noise",
]


def evaluation_rounds(plan: JobPlan) -> tuple[int, ...]:
    """Return after which rounds the model is evaluated, ascending: entry k - 1 is evaluation k, the last the last one.

    The plan holds that there are no more evaluations than rounds, so no round is named twice.
    """
    times, rounds = plan.evaluation.times, plan.training.rounds
    return tuple(-(-number * rounds // times) for number in range(1, times + 1))


def local_noise(plan: JobPlan, schema: Schema, num_lenders: int) -> float:
    """Return the standard deviation of the noise in each cell of the sum, in loans; modes local and none.

    Args:
        plan: The job, with an evaluation at least.
        schema: The columns.
        num_lenders: Lenders in the sum, each with its own noise.
    """
    if plan.privacy.mode == "none":
        return 0.0
    one = evaluation_event(plan).noise_multiplier * evaluation_sensitivity(schema)
    return one * float(np.sqrt(num_lenders))


def scheme_for(plan: JobPlan, schema: Schema, num_lenders: int) -> ShareScheme:
    """Return how the lenders of a sum in mode shared round and add noise; the same at every one of them.

    Raises:
        PrivacyParameterError: As `privacy.evaluation_noise.evaluation_scheme`.
    """
    return evaluation_scheme(
        plan,
        num_lenders=num_lenders,
        num_cells=evaluation_cells(schema),
        sensitivity=evaluation_sensitivity(schema),
    )


def shared_noise(scheme: ShareScheme, num_answers: int) -> float:
    """Return the standard deviation of the noise in each cell of a sum in mode shared, in loans."""
    return scheme.share_stddev * float(np.sqrt(num_answers)) / scheme.scale


def evaluation_sum(
    counts: NDArray[np.float64],
    schema: Schema,
    *,
    number: int,
    plan: JobPlan,
    num_lenders: int,
    noise_stddev: float,
) -> dict[str, Any]:
    """Return one evaluation as it stands in metrics.json.

    Args:
        counts: The sum of the lenders' counts, noise included, shape (evaluation_cells(schema),).
        schema: The columns.
        number: Of the evaluation, from 1.
        plan: The job.
        num_lenders: Lenders in the sum.
        noise_stddev: Standard deviation of the sum's noise in each cell, in loans; 0.0 without privacy.

    Raises:
        SchemaMismatchError: The counts are not of this schema.
    """
    return {
        "evaluation": number,
        "round": evaluation_rounds(plan)[number - 1],
        "lenders": num_lenders,
        "cutoff": plan.evaluation.cutoff,
        **metrics_from(counts, schema, noise_stddev),
    }


def metrics_from(counts: NDArray[np.float64], schema: Schema, noise_stddev: float) -> dict[str, Any]:
    """Return the figures of summed counts as a JSON document.

    Args:
        counts: As for `evaluation_sum`.
        schema: The columns.
        noise_stddev: As for `evaluation_sum`.

    Returns:
        `noise_stddev`; `figures`, by name with value and noise_error; `hidden_by_noise`, the names of those left out;
        `calibration`, in tenths of the loans; `fairness`, by protected column.

    Raises:
        SchemaMismatchError: The counts are not of this schema.
    """
    parts = split_counts(counts, schema)
    figures = figures_of(parts, noise_stddev)
    document: dict[str, Any] = {
        "noise_stddev": noise_stddev,
        "figures": {name: asdict(estimate) for name, estimate in figures.items()},
        "hidden_by_noise": [name for name in LARGEST_ERRORS if name not in figures],
        "calibration": [asdict(decile) for decile in calibration_table(parts, noise_stddev)],
        "fairness": [asdict(column) for column in fairness_of(parts.groups, schema, noise_stddev)],
    }
    rounded: dict[str, Any] = _rounded(document)
    return rounded


def _rounded(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """Return a document without digits that nobody needs."""
    match value:
        case float():
            return round(value, 6)
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list() | tuple():
            return [_rounded(part) for part in value]
        case _:
            return value

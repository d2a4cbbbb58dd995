"""The vectors that leave a lender in a job, by number and length, from its plan alone.

They are sized by the layouts of the sums themselves, for the model with as many bins as the plan allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedfin.client.costs import Costs
from fedfin.client.scoring import scheme_of_evaluation
from fedfin.credit.binning import histogram_sensitivity, histogram_size
from fedfin.credit.models import largest_model
from fedfin.credit.schema import Schema
from fedfin.credit.score_counts import evaluation_cells
from fedfin.plan import JobPlan
from fedfin.privacy.encoding import Layout
from fedfin.strategies.sums import (
    bins_layout,
    bins_scheme,
    counts_layout,
    round_layout,
    round_scheme,
    shares_layout,
)

__all__ = ["Departure", "departures_of"]


@dataclass(frozen=True, slots=True)
class Departure:
    """One kind of vector that leaves.

    Attributes:
        stage: `bins`, `round` or `evaluation`.
        times: How often, at most.
        values: Numbers in it, at most.
        bytes: Length of each, at most, without the message around it; keys and signatures of a secure
            sum come on top.
    """

    stage: str
    times: int
    values: int
    bytes: int


def departures_of(
    plan: JobPlan, schema: Schema, num_lenders: int, costs: Costs | None, *, evaluates: bool
) -> Iterator[Departure]:
    """Yield what leaves in a job, stage by stage.

    Args:
        plan: The job's.
        schema: The federation's.
        num_lenders: Lenders of the largest cohort: the more, the more bits a value may need.
        costs: The job's; None without privacy, or where no noise meets the plan: mode shared then has no vector.
        evaluates: Whether this lender takes part in the evaluations.
    """
    cells, parameters, scores = (
        histogram_size(schema),
        largest_model(plan.model, schema),
        evaluation_cells(schema),
    )
    rounds, times = plan.training.rounds, plan.evaluation.times if evaluates else 0
    if plan.aggregation == "plain":
        stages = [("bins", 1, cells, 8 * cells), ("round", rounds, parameters, 4 * parameters)]
        stages.append(("evaluation", times, scores, 8 * scores))
    elif plan.privacy.mode == "shared" and (costs is None or costs.sums is None):
        return  # no noise meets the plan: there is no such sum
    else:
        layouts = _layouts(plan, schema, num_lenders, costs)
        stages = [
            (stage, count, layout.size, layout.size * layout.ring_bits // 8)
            for (stage, count), layout in zip(
                (("bins", 1), ("round", rounds), ("evaluation", times)), layouts, strict=True
            )
        ]
    for stage, count, values, size in stages:
        if count:
            yield Departure(stage, count, values, size)


def _layouts(
    plan: JobPlan, schema: Schema, num_lenders: int, costs: Costs | None
) -> tuple[Layout, Layout, Layout]:
    """Return the layouts of bins, a round and an evaluation, under secure aggregation."""
    cells, parameters = histogram_size(schema), largest_model(plan.model, schema)
    if costs is not None and costs.sums is not None:
        evaluation = (
            shares_layout(scheme_of_evaluation(plan, schema, num_lenders))
            if plan.evaluation.times
            else counts_layout(evaluation_cells(schema), num_lenders)
        )
        return (
            shares_layout(bins_scheme(costs.noise, costs.sums, num_lenders)),
            shares_layout(round_scheme(costs.noise, costs.sums, parameters, num_lenders)),
            evaluation,
        )
    noise = 0.0 if costs is None else costs.noise.bins_noise_multiplier * histogram_sensitivity(schema)
    return (
        bins_layout(plan, cells, num_lenders, noise),
        round_layout(plan, parameters, num_lenders),
        counts_layout(evaluation_cells(schema), num_lenders),
    )

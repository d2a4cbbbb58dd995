"""Fairness of a cut-off, from counts of loans per protected group: shares accepted, and how far groups are apart.

Accepted is a loan whose probability of default is below the cut-off. Demographic parity compares the share accepted of
all loans of a group; equal opportunity compares the share accepted of those that were paid back (Hardt, Price & Srebro,
"Equality of Opportunity in Supervised Learning", NeurIPS 2016). Each group is compared to the largest of its column.

Two errors stand beside a rate: what noise in the counts does to it, and what as many loans drawn at random would do. A
group whose rates noise hides is left out, by name.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.credit.count_metrics import Estimate, estimate_rate
from fedfin.credit.groups import CELLS_OF_A_GROUP, groups
from fedfin.credit.schema import Schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ColumnFairness", "GroupFairness", "Rate", "fairness_of"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of a group's loans, or the difference of two.

    Attributes:
        value: In [0, 1]; a difference in [-1, 1].
        noise_error: Standard error from noise in the counts; 0.0 for exact counts.
        sampling_error: Standard error of as many loans drawn at random.
    """

    value: float
    noise_error: float
    sampling_error: float


@dataclass(frozen=True, slots=True)
class GroupFairness:
    """One group at the cut-off.

    Attributes:
        label: The group's value or band.
        loans: How many loans it has.
        accepted: Share of them that the cut-off accepts.
        good_accepted: Share accepted of those that were paid back; None where noise hides it.
        parity: `accepted` minus that of the reference.
        opportunity: `good_accepted` minus that of the reference; None where noise hides one of them.
    """

    label: str
    loans: Estimate
    accepted: Rate
    good_accepted: Rate | None
    parity: Rate
    opportunity: Rate | None


@dataclass(frozen=True, slots=True)
class ColumnFairness:
    """A protected column at the cut-off.

    Attributes:
        column: Its name.
        reference: The group with the most loans, to which the others are compared; empty where noise hides all.
        groups: Those that noise leaves something of, in the schema's order.
        hidden: Labels of the others.
    """

    column: str
    reference: str
    groups: tuple[GroupFairness, ...]
    hidden: tuple[str, ...]


def fairness_of(
    counts: "NDArray[np.float64]", schema: Schema, noise_stddev: float
) -> tuple[ColumnFairness, ...]:
    """Return the fairness of the cut-off by which the loans were counted, for each protected column.

    Args:
        counts: Of the whole federation, shape (group_cells(schema),); `ScoreCounts.groups`.
        schema: The columns.
        noise_stddev: Standard deviation of the noise in each cell, in loans; 0 for exact counts.
    """
    rows = counts.reshape(-1, CELLS_OF_A_GROUP)
    labels: dict[str, list[str]] = {column.name: [] for column in schema.protected}
    cells: dict[str, list[NDArray[np.float64]]] = {column.name: [] for column in schema.protected}
    for group, row in zip(groups(schema), rows, strict=True):
        labels[group.column].append(group.label)
        cells[group.column].append(row)
    return tuple(_column(name, labels[name], cells[name], noise_stddev) for name in labels)


def _column(
    name: str, labels: list[str], cells: "list[NDArray[np.float64]]", noise_stddev: float
) -> ColumnFairness:
    reference = int(np.argmax([row.sum() for row in cells]))
    base_accepted, base_good = _accepted(cells[reference], noise_stddev)
    if base_accepted is None:
        return ColumnFairness(name, "", (), tuple(labels))
    found: list[GroupFairness] = []
    for position, (label, row) in enumerate(zip(labels, cells, strict=True)):
        accepted, good = _accepted(row, noise_stddev)
        if accepted is None:
            continue
        same = position == reference
        found.append(
            GroupFairness(
                label=label,
                loans=Estimate(float(row.sum()), noise_stddev * math.sqrt(CELLS_OF_A_GROUP)),
                accepted=accepted,
                good_accepted=good,
                parity=_difference(accepted, base_accepted, same=same),
                opportunity=(
                    None if good is None or base_good is None else _difference(good, base_good, same=same)
                ),
            )
        )
    shown = {group.label for group in found}
    hidden = tuple(
        label
        for label, row in zip(labels, cells, strict=True)
        if label not in shown and (noise_stddev > 0.0 or row.sum() > 0.0)
    )
    return ColumnFairness(name, labels[reference], tuple(found), hidden)


def _accepted(row: "NDArray[np.float64]", noise_stddev: float) -> tuple[Rate | None, Rate | None]:
    """Return the share accepted of all loans of a group and of its good ones."""
    good, good_rejected, bad, bad_rejected = row
    return (
        _rate(np.array([good, bad]), np.array([good_rejected, bad_rejected]), noise_stddev),
        _rate(np.array([good]), np.array([good_rejected]), noise_stddev),
    )


def _rate(inside: "NDArray[np.float64]", outside: "NDArray[np.float64]", noise_stddev: float) -> Rate | None:
    estimate = estimate_rate(inside, outside, noise_stddev)
    if estimate is None:
        return None
    loans = float(inside.sum() + outside.sum())
    plain = (estimate.value * loans + 1.0) / (loans + 2.0)  # of a few loans all accepted, not certain either
    sampling = math.sqrt(plain * (1.0 - plain) / loans)
    return Rate(estimate.value, estimate.noise_error, sampling)


def _difference(rate: Rate, base: Rate, *, same: bool) -> Rate:
    if same:
        return Rate(0.0, 0.0, 0.0)
    return Rate(
        rate.value - base.value,
        math.hypot(rate.noise_error, base.noise_error),
        math.hypot(rate.sampling_error, base.sampling_error),
    )

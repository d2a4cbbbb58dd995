"""What the lenders add up: the layout of each stage's vector, made by the same function at both sides.

A stage's vector has parts ("update", "weight"), and all that a layout says is public: it follows from the plan, the
schema and the number of lenders in the cohort, never from a loan or from the model's weights, so that a secure sum can
be prepared while the round before is still going on. How a lender's values become a vector, and how the sum becomes a
`CohortSum`, stand here as well, so that a sum under secure aggregation and one in clear mean the same.

Steps are powers of two: whatever the sum, decoding it rounds nothing.
"""

import hashlib
import hmac
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.errors import TrainingError
from fedfin.privacy.encoding import Layout, Segment
from fedfin.privacy.shares import make_scheme
from fedfin.strategies.strategy import CohortSum, lender_weight, public_size, weight_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fedfin.plan import JobPlan, TrainingPlan
    from fedfin.privacy.accounting import CalibratedNoise
    from fedfin.privacy.shared_accounting import SharedSums
    from fedfin.privacy.shares import ShareScheme

__all__ = [
    "bins_layout",
    "bins_scheme",
    "blurred_weight",
    "capped_histogram",
    "check_round",
    "cohort_sum",
    "column_totals",
    "counts_layout",
    "largest_move",
    "largest_weight",
    "round_layout",
    "round_parts",
    "round_scheme",
    "shares_layout",
    "total_loans",
]

_SMALL_RING: Final = 24
_LARGE_RING: Final = 32
_COUNT_STEP: Final = 2.0**-4  # of a loan: what capping makes of a count is no whole number
_ROOT_STEP: Final = 2.0**-10  # of the square root of loans
_MOVE_SHARE: Final = 2.0**-8  # of what one local step moves a weight, for a lender of the smallest weight
_INITIAL_WEIGHT: Final = 8.0  # no initial weight is further from zero
_TAIL: Final = 8.0  # standard deviations that noise does not pass, but with a chance of 1e-15
_WORD: Final = 2.0**64


def bins_layout(plan: "JobPlan", num_cells: int, num_lenders: int, noise_stddev: float = 0.0) -> Layout:
    """Return the layout of stage `bins`, modes local and none: one part, `counts`.

    Args:
        plan: The job.
        num_cells: Cells of the histogram of all feature columns.
        num_lenders: Lenders of the cohort; n.
        noise_stddev: Standard deviation of one lender's noise in one cell, in loans; 0 without privacy.
    """
    bound = 2.0 * (plan.training.weight_cap + _TAIL * noise_stddev)
    return _layout([("counts", num_cells, bound, _COUNT_STEP)], num_lenders)


def round_layout(plan: "JobPlan", num_parameters: int, num_lenders: int) -> Layout:
    """Return the layout of a round, modes local and none: `update`, weight times update, and `weight`, one value.

    Where all lenders count alike (weighting equal) there is no part `weight`.

    Args:
        plan: The job.
        num_parameters: Parameters of the model, d.
        num_lenders: Lenders of the cohort; n.
    """
    training = plan.training
    largest, smallest = largest_weight(training), weight_of(training.weight_bucket, training)
    step = training.learning_rate * smallest * _MOVE_SHARE
    parts = [("update", num_parameters, largest * largest_move(training), step)]
    if training.weighting != "equal":
        parts.append(("weight", 1, largest, 1.0 if training.weighting == "size" else _ROOT_STEP))
    return _layout(parts, num_lenders)


def counts_layout(num_cells: int, num_lenders: int) -> Layout:
    """Return a layout of whole counts, one part `counts`, as large as the ring allows for this many lenders."""
    bound = float((2 ** (_LARGE_RING - 1) - 1) // num_lenders)
    return _layout([("counts", num_cells, bound, 1.0)], num_lenders)


def bins_scheme(noise: "CalibratedNoise", sums: "SharedSums", num_lenders: int) -> "ShareScheme":
    """Return how the lenders of one cohort round and noise their histograms in mode shared.

    Args:
        noise: Calibrated for `sums`.
        sums: What the job adds up, for all members of its roster.
        num_lenders: Lenders of this sum's cohort, n: each adds an n-th of the noise, planned losses apart.
    """
    cohort = replace(sums.cohort, num_lenders=num_lenders)
    return make_scheme(noise.bins_noise_multiplier, cohort, sums.histogram)


def round_scheme(
    noise: "CalibratedNoise", sums: "SharedSums", num_parameters: int, num_lenders: int
) -> "ShareScheme":
    """Return the same for a round's gradients, of a model with so many parameters."""
    cohort = replace(sums.cohort, num_lenders=num_lenders)
    return make_scheme(noise.training_noise_multiplier, cohort, sums.gradient_of(num_parameters))


def shares_layout(scheme: "ShareScheme") -> Layout:
    """Return the layout of a sum of mode shared: one part `noised`, integers that already hold a share of the noise."""
    bound = float(scheme.largest_answer)
    return Layout((Segment("noised", scheme.shape.size, bound, 1.0),), scheme.cohort.num_lenders, _LARGE_RING)


def round_parts(
    update: "NDArray[np.float32]", weight: float, training: "TrainingPlan"
) -> "dict[str, NDArray[np.float64]]":
    """Return the parts of a lender's vector in a round; `update` has shape (d,) and is not changed."""
    parts = {"update": weight * update.astype(np.float64)}
    if training.weighting != "equal":
        parts["weight"] = np.array([weight])
    return parts


def cohort_sum(parts: "Mapping[str, NDArray[np.float64]]", num_lenders: int) -> CohortSum:
    """Return a round's sum from its decoded parts.

    Args:
        parts: As `round_parts`, summed over the lenders.
        num_lenders: Lenders in the sum; where there is no part `weight`, the sum of their weights.

    Raises:
        TrainingError: The weights' sum is not positive: no cohort's.
    """
    weight = float(parts["weight"][0]) if "weight" in parts else float(num_lenders)
    return CohortSum(values=parts["update"], weight=weight, num_lenders=num_lenders)


def check_round(
    parts: "Mapping[str, NDArray[np.float64]]", num_lenders: int, training: "TrainingPlan", layout: Layout
) -> None:
    """Refuse a round's sum that no lenders' updates and weights add up to.

    What is masked is not looked at, so that a single lender can add any ring element. Of a sum that passes it can be
    the author, but the model moves no further by it than by the plan's own steps.

    Args:
        parts: As `round_parts`, summed over the lenders.
        num_lenders: Lenders in the sum.
        training: The plan's.
        layout: The vectors': half a step of each lender is rounding.

    Raises:
        TrainingError: The weights' sum, or that of an update in the place where it is largest, is out of reach.
    """
    rounding = {segment.name: num_lenders * segment.step / 2 for segment in layout.segments}
    weight = float(parts["weight"][0]) if "weight" in parts else float(num_lenders)
    spare = rounding.get("weight", 0.0)
    least = num_lenders * weight_of(training.weight_bucket, training) - spare
    most = num_lenders * largest_weight(training) + spare
    moved = float(np.abs(parts["update"]).max(initial=0.0))
    reach = largest_move(training) * (weight + spare) + rounding["update"]
    if not (least <= weight <= most and moved <= reach):
        msg = (
            f"the sum of {num_lenders} lenders has weight {weight:g}, where {least:g} to {most:g} is possible, and an"
            f" update of up to {moved:g}: no lenders' answers add up to it, the round is void. One of them sent what is"
            " no update, and masks hide which. Find it with the lenders and run `fedfin server remove NAME`, then"
            " `fedfin server --new-job`: of this model this job may ask"
            " the same lenders only"
        )
        raise TrainingError(msg)


def largest_weight(training: "TrainingPlan") -> float:
    """Return the weight that no lender passes."""
    return weight_of(public_size(training.weight_cap, training), training)


def largest_move(training: "TrainingPlan") -> float:
    """Return how far one weight can move in a round: what passes it was not made by the plan's AdamW.

    The weights themselves matter through weight decay only, and move in the whole job no further than this each round.

    Source: Kingma & Ba 2015, section 2.1: a step is at most lr * (1 - beta1) / sqrt(1 - beta2), 3.17 lr here.
    """
    steps = training.local_steps * training.learning_rate
    furthest = _INITIAL_WEIGHT + 4.0 * steps * training.rounds
    return steps * (4.0 + training.weight_decay * furthest)


def blurred_weight(num_loans: int, training: "TrainingPlan", salt: bytes, bucket: int) -> float:
    """Return a lender's weight under secure aggregation: of its bucketed size, off by a secret number of buckets.

    The difference of two sums whose cohorts differ by one lender shows that lender's weight. So its size is blurred by
    two-sided geometric noise of one bucket's scale, P(k) proportional to exp(-|k|), which is fixed for a lender and a
    size: a coordinator that sees it many times, over rounds and jobs, sees the same each time and averages nothing.
    The bucket of the noise is the lender's own and not the plan's, which comes on top: plans with other buckets show
    other roundings of the one blurred size.

    Args:
        num_loans: The lender's training loans; >= 1.
        training: States weighting, cap and bucket.
        salt: A secret of the lender, 16 bytes or more, kept as long as its loans are.
        bucket: The smallest `weight_bucket` that the lender accepts; >= 1.

    Raises:
        TrainingError: The lender has no loans, or the salt is too short to be a secret.

    Source: Ghosh, Roughgarden & Sundararajan, "Universally Utility-Maximizing Privacy Mechanisms" (STOC 2009).
    """
    if num_loans < 1 or len(salt) < 16:
        msg = (
            f"a lender with {num_loans} training loans and a secret of {len(salt)} bytes has no blurred weight; leave"
            " it out of the round, or mend its folder"
        )
        raise TrainingError(msg)
    size = max(bucket, num_loans // bucket * bucket)
    words = hmac.digest(salt, f"fedfin weight 1 {bucket} {size}".encode(), hashlib.sha256)
    # a difference of two geometric numbers is two-sided geometric
    up, down = (
        math.floor(-math.log((int.from_bytes(words[at : at + 8], "big") + 1) / _WORD)) for at in (0, 8)
    )
    return lender_weight(max(bucket, size + bucket * (up - down)), training)


def capped_histogram(
    counts: "NDArray[np.float64]", column_cells: "Sequence[int]", weight_cap: int
) -> "NDArray[np.float64]":
    """Return a lender's histogram scaled down to the weight cap, so that no lender alone places the bins.

    Args:
        counts: Of all feature columns, one after the other, shape (sum of column_cells,), noise included; not changed.
        column_cells: Cells of each column.
        weight_cap: Loans above this count no further.
    """
    total = float(np.mean(column_totals(counts, column_cells)))
    return counts * min(1.0, weight_cap / max(total, 1.0))


def total_loans(counts: "NDArray[np.float64]", column_cells: "Sequence[int]") -> float:
    """Return the loans in a noisy histogram, at least 1: each column counts all of them, few cells less noisily."""
    weights = 1.0 / np.asarray(column_cells, dtype=np.float64)
    return max(1.0, float(np.average(column_totals(counts, column_cells), weights=weights)))


def column_totals(counts: "NDArray[np.float64]", column_cells: "Sequence[int]") -> "NDArray[np.float64]":
    """Return the loans that each column of a histogram counts, shape (columns,); infinite where they overflow."""
    with np.errstate(over="ignore", invalid="ignore"):  # absurd counts become what is refused
        return np.array([part.sum() for part in np.split(counts, np.cumsum(column_cells)[:-1])])


def _layout(parts: "Sequence[tuple[str, int, float, float]]", num_lenders: int) -> Layout:
    """Return the layout of these (name, size, bound, finest step wanted), in the smaller ring where that holds them.

    Where not even the larger ring holds a part at the step wanted, its step is the next power of two that it holds.
    """
    room = (2 ** (_LARGE_RING - 1) - 1) // num_lenders
    segments = tuple(
        Segment(
            name, size, bound, 2.0 ** max(math.floor(math.log2(step)), math.ceil(math.log2(bound / room)))
        )
        for name, size, bound, step in parts
    )
    small = (2 ** (_SMALL_RING - 1) - 1) // num_lenders
    fits = all(segment.bound / segment.step <= small for segment in segments)
    return Layout(segments, num_lenders, _SMALL_RING if fits else _LARGE_RING)

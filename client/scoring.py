"""What a lender releases of a model's quality: counts of its held-out loans, under its own noise where the mode asks.

Nothing here is a figure of merit: AUROC and the like are made by the coordinator, of the sum over all lenders.
"""

from typing import TYPE_CHECKING

from fedfin.credit.binning import Bins, encode
from fedfin.credit.models import Architecture, encoding_of, predict
from fedfin.credit.score_counts import count_scores, evaluation_sensitivity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.credit.source import Loans
    from fedfin.privacy.noise import NoiseSource

__all__ = ["evaluation_counts", "noisy_evaluation"]


def evaluation_counts(
    architecture: Architecture,
    weights: "NDArray[np.float32]",
    bins: Bins,
    holdout: "Loans",
    schema: "Schema",
    cutoff: float,
) -> "NDArray[np.int64]":
    """Return the counts of held-out loans by outcome, score and protected group; whole numbers, nothing else.

    A lender whose held-out loans lack an outcome counts what it has: only the sum over lenders must have both.

    Args:
        architecture: The model's.
        weights: Its flat vector, shape (d,), checked by the caller.
        bins: The job's.
        holdout: Checked loans; not changed.
        schema: The columns.
        cutoff: The plan's `evaluation.cutoff`.

    Returns:
        Shape (evaluation_cells(schema),).
    """
    inputs = encode(holdout.frame, schema, bins, encoding_of(architecture.kind))
    probabilities = predict(architecture, weights, inputs)
    return count_scores(holdout.frame, holdout.labels, probabilities, schema, cutoff)


def noisy_evaluation(
    counts: "NDArray[np.int64]", schema: "Schema", noise_multiplier: float, noise: "NoiseSource"
) -> "NDArray[np.float64]":
    """Return the counts plus Gaussian noise, for mode local; shape as `counts`, which are not changed.

    Args:
        counts: From `evaluation_counts`.
        schema: The columns: they say what one loan moves.
        noise_multiplier: Standard deviation over the counts' L2 sensitivity to one loan; > 0.
        noise: The lender's own.
    """
    return counts + noise.normal(counts.shape, noise_multiplier * evaluation_sensitivity(schema))

"""What a lender releases for the bins: its histogram, under its own noise in a private job."""

from typing import TYPE_CHECKING

import numpy as np

from fedfin.credit.binning import histogram, histogram_sensitivity

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.privacy.noise import NoiseSource

__all__ = ["noisy_histogram"]


def noisy_histogram(
    frame: "pd.DataFrame", schema: "Schema", noise_multiplier: float | None, noise: "NoiseSource"
) -> "NDArray[np.float64]":
    """Return the counts per cell plus Gaussian noise, shape (histogram_size(schema),).

    Args:
        frame: Checked loans; not changed.
        schema: The columns.
        noise_multiplier: Standard deviation over the histogram's L2 sensitivity to one loan; None adds no noise.
        noise: The lender's own.
    """
    counts = histogram(frame, schema).astype(np.float64)
    if noise_multiplier is not None:
        counts += noise.normal(counts.shape, noise_multiplier * histogram_sensitivity(schema))
    return counts

"""The audit's look at the histogram release: how far one loan moves it, and whether its noise is as planned."""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.client.histograms import noisy_histogram
from fedfin.credit.binning import histogram_sensitivity
from fedfin.privacy.noise_checks import Check, repeat_check, scale_check, shape_check

if TYPE_CHECKING:
    import pandas as pd

    from fedfin.credit.schema import Schema
    from fedfin.privacy.noise import NoiseSource

__all__ = ["bins_checks"]

_NUM_RELEASES: Final = 100
_NUM_LEFT_OUT: Final = 50
_ROUNDING: Final = 1e-9


def bins_checks(
    frame: "pd.DataFrame", schema: "Schema", noise_multiplier: float, noise: "NoiseSource", error: float
) -> tuple[Check, ...]:
    """Release a table's histogram many times on a twin that is thrown away, and check it.

    Args:
        frame: Checked loans, two at least; not changed.
        schema: The columns.
        noise_multiplier: Planned.
        noise: The lender's own.
        error: Chance that an honest release fails the check of the noise's scale, and again that of its shape.

    Returns:
        Sensitivity (exact, loans left out one by one), scale, shape and repetition of the noise.
    """
    sensitivity = histogram_sensitivity(schema)
    counts = noisy_histogram(frame, schema, None, noise)
    reach = max(
        float(np.linalg.norm(counts - noisy_histogram(frame.drop(frame.index[row]), schema, None, noise)))
        for row in range(min(_NUM_LEFT_OUT, len(frame)))
    )
    releases = [noisy_histogram(frame, schema, noise_multiplier, noise) for _ in range(_NUM_RELEASES)]
    noises = (np.array(releases) - counts) / (noise_multiplier * sensitivity)
    text = f"one loan moves the histogram by {reach / sensitivity:.4g} times its sensitivity"
    found = (
        Check("sensitivity", reach <= sensitivity + _ROUNDING, reach / sensitivity, 1.0, text),
        scale_check(noises, error),
        shape_check(noises, error),
        repeat_check([noises]),
    )
    return tuple(replace(check, name=f"histogram, {check.name}") for check in found)

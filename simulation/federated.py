"""What a simulated federation releases, whatever its mode."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.credit.binning import Bins, encode
from fedfin.credit.models import Architecture, encoding_of, predict
from fedfin.privacy.noise import SimulatedNoise

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema

__all__ = ["FederatedModel", "lender_noises"]


@dataclass(frozen=True, slots=True)
class FederatedModel:
    """What the federation releases: weights and all that gives them a meaning."""

    schema: "Schema"
    bins: Bins
    architecture: Architecture
    weights: "NDArray[np.float32]"

    def predict(self, frame: "pd.DataFrame") -> "NDArray[np.float64]":
        """Return each loan's probability of default, shape (n,)."""
        loans = encode(frame, self.schema, self.bins, encoding_of(self.architecture.kind))
        return predict(self.architecture, self.weights, loans)


def lender_noises(seed: int, num: int) -> list[SimulatedNoise]:
    """Return a source of noise for each of `num` lenders; no two share a stream, nor do those of other seeds."""
    # any 63 bits: streams of neighbouring seeds must not meet those of neighbouring lenders
    seeds = np.random.SeedSequence(seed).generate_state(num, np.uint64) >> np.uint64(1)
    return [SimulatedNoise(int(lender_seed)) for lender_seed in seeds]

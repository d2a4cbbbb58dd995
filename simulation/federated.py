"""What a simulated federation releases, whatever its mode."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedfin.credit.binning import Bins, encode
from fedfin.credit.models import Architecture, encoding_of, predict

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema

__all__ = ["FederatedModel"]


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

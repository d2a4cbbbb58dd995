"""The two credit models, as one flat float32 vector each: what lenders exchange and the coordinator averages.

- `logistic`: one weight per input and an intercept; on one-hot bins it is a scorecard.
- `mlp`: blocks of Linear, LayerNorm, ReLU and a last Linear. No BatchNorm: it mixes the loans of a batch, and
  per-loan clipping needs each loan's gradient to be its own (Opacus refuses it).

A vector means something only together with its schema, bins and architecture: `model_fingerprint` names the
three, and both sides check it before they use a vector.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from fedfin.credit.binning import Bins, num_inputs
from fedfin.errors import SchemaMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.plan import ModelPlan

__all__ = [
    "Architecture",
    "architecture_of",
    "build",
    "encoding_of",
    "flatten",
    "initial_weights",
    "load_weights",
    "model_fingerprint",
    "num_parameters",
    "predict",
    "require_same_fingerprint",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape.

    Attributes:
        kind: `logistic` or `mlp`.
        num_inputs: Columns of the encoded loans, p >= 1.
        hidden: Widths of the MLP's hidden layers; empty for logistic.
    """

    kind: Literal["logistic", "mlp"]
    num_inputs: int
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_inputs < 1 or any(width < 1 for width in self.hidden):
            msg = f"an architecture needs widths of at least 1; found inputs {self.num_inputs}, hidden {self.hidden}"
            raise SchemaMismatchError(msg)
        if self.kind == "logistic" and self.hidden:
            msg = (
                f"a logistic model has no hidden layers; found {self.hidden}: leave hidden empty, or use mlp"
            )
            raise SchemaMismatchError(msg)


def encoding_of(kind: Literal["logistic", "mlp"]) -> Literal["one_hot", "piecewise_linear"]:
    """Return which encoding of `fedfin.credit.binning.encode` a kind of model takes."""
    return "one_hot" if kind == "logistic" else "piecewise_linear"


def architecture_of(model: "ModelPlan", schema: "Schema", bins: Bins) -> Architecture:
    """Return the shape that a plan's model takes over these bins; hidden widths count for an MLP only."""
    return Architecture(
        model.kind,
        num_inputs(schema, bins, encoding_of(model.kind)),
        model.hidden if model.kind == "mlp" else (),
    )


def build(architecture: Architecture) -> nn.Sequential:
    """Return a module that maps (n, p) float32 loans to (n, 1) logits; its weights are undefined until loaded."""
    layers: list[nn.Module] = []
    width = architecture.num_inputs
    for next_width in architecture.hidden:
        layers += [_linear(width, next_width), nn.LayerNorm(next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, _linear(width, 1))


def num_parameters(architecture: Architecture) -> int:
    """Return d, the length of the architecture's flat vector."""
    widths = (architecture.num_inputs, *architecture.hidden)
    hidden = sum((below + 3) * above for below, above in pairwise(widths))
    return hidden + widths[-1] + 1


def initial_weights(architecture: Architecture, seed: int) -> "NDArray[np.float32]":
    """Return the public weights from which round 1 starts, shape (d,).

    Logistic starts at zero. The MLP's hidden layers are He-normal, its LayerNorms the identity and its last
    layer zero, so that every loan starts at a probability of one half.

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015), equation 10.
    """
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.float32]] = []
    width = architecture.num_inputs
    for next_width in architecture.hidden:
        weights = rng.normal(0.0, np.sqrt(2.0 / width), next_width * width).astype(np.float32)
        zeros, ones = np.zeros(next_width, np.float32), np.ones(next_width, np.float32)
        parts += [weights, zeros, ones, zeros]
        width = next_width
    return np.concatenate([*parts, np.zeros(width + 1, np.float32)])


def flatten(module: nn.Module) -> "NDArray[np.float32]":
    """Return a copy of the module's parameters as one vector, shape (d,), in the module's own order."""
    with torch.no_grad():
        return torch.cat([parameter.reshape(-1) for parameter in module.parameters()]).numpy().copy()


def load_weights(module: nn.Module, weights: "NDArray[np.float32]") -> None:
    """Set the module's parameters from a flat vector; changes the module, not the vector.

    Raises:
        SchemaMismatchError: The vector's length is not the module's.
    """
    expected = sum(parameter.numel() for parameter in module.parameters())
    if weights.shape != (expected,):
        msg = f"the weights have shape {weights.shape}, the model takes ({expected},); compare model fingerprints"
        raise SchemaMismatchError(msg)
    start = 0
    with torch.no_grad():
        for parameter in module.parameters():
            part = np.array(weights[start : start + parameter.numel()], dtype=np.float32)
            parameter.copy_(torch.from_numpy(part).view_as(parameter))
            start += parameter.numel()


def predict(
    architecture: Architecture, weights: "NDArray[np.float32]", loans: "NDArray[np.float32]"
) -> "NDArray[np.float64]":
    """Return each loan's probability of default, shape (n,), in [0, 1].

    Args:
        architecture: The model's shape.
        weights: Its flat vector, shape (d,).
        loans: Encoded loans, shape (n, p).

    Raises:
        SchemaMismatchError: Weights or loans do not fit the architecture.
    """
    if loans.ndim != 2 or loans.shape[1] != architecture.num_inputs:
        msg = f"loans have shape {loans.shape}, the model takes (n, {architecture.num_inputs}); use the model's bins"
        raise SchemaMismatchError(msg)
    module = build(architecture)
    load_weights(module, weights)
    with torch.no_grad():
        logits = module(torch.from_numpy(np.ascontiguousarray(loans, dtype=np.float32))).squeeze(1)
        return torch.sigmoid(logits.double()).numpy()


def model_fingerprint(schema_fingerprint: str, bins_fingerprint: str, architecture: Architecture) -> str:
    """Return the SHA-256, hex, of all that gives a flat vector its meaning."""
    meaning = {
        "schema": schema_fingerprint,
        "bins": bins_fingerprint,
        "kind": architecture.kind,
        "num_inputs": architecture.num_inputs,
        "hidden": architecture.hidden,
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require_same_fingerprint(own: str, theirs: str) -> None:
    """Refuse a vector made under another schema, bins or architecture.

    Raises:
        SchemaMismatchError: The fingerprints differ.
    """
    if own != theirs:
        msg = (
            f"the other side's model fingerprint is {theirs[:16]}, this side's is {own[:16]}; use the coordinator's"
            " schema file and this job's bins on both sides"
        )
        raise SchemaMismatchError(msg)


def _linear(width: int, next_width: int) -> nn.Module:
    # without torch's own initial weights: they are overwritten, and would draw from its global generator
    layer: nn.Module = nn.utils.skip_init(nn.Linear, width, next_width)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return layer

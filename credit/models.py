"""The credit models, as one flat float32 vector each: what lenders exchange and the coordinator averages.

- `logistic`: one weight per input and an intercept; on one-hot bins it is a scorecard.
- `mlp`: blocks of Linear, LayerNorm, ReLU and a last Linear. No BatchNorm: it mixes the loans of a batch, and
  per-loan clipping needs each loan's gradient to be its own (the private step refuses it).
- `attention`: every column of the schema is a token, and the tokens attend to each other once; a small
  FT-Transformer (Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021, section 3.3)
  with a mean over the tokens in the place of its extra token. Built of plain Linear layers and LayerNorm, so that
  per-loan gradients come in closed form; `nn.MultiheadAttention` would not.

A vector means something only together with its schema, bins and architecture: `model_fingerprint` names the
three, and both sides check it before they use a vector.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedfin.credit.binning import Bins, inputs
from fedfin.credit.schema import NumericColumn
from fedfin.errors import SchemaMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.plan import ModelPlan

__all__ = [
    "Architecture",
    "Kind",
    "architecture_of",
    "build",
    "encoding_of",
    "flatten",
    "initial_weights",
    "largest_model",
    "load_weights",
    "log_odds",
    "model_fingerprint",
    "num_parameters",
    "predict",
    "require_same_fingerprint",
]


Kind: TypeAlias = Literal["logistic", "mlp", "attention"]

_HEADS: Final = 4


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape.

    Attributes:
        kind: `logistic`, `mlp` or `attention`.
        num_inputs: Columns of the encoded loans, p >= 1.
        hidden: Widths of the MLP's hidden layers; the attention's token width, a multiple of 4, and its
            feed-forward width, twice the token width where it is not given; empty for logistic.
        blocks: How many inputs each column of the schema has, for attention; they add up to `num_inputs`.
    """

    kind: Kind
    num_inputs: int
    hidden: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_inputs < 1 or any(width < 1 for width in (*self.hidden, *self.blocks)):
            msg = (
                f"an architecture needs widths of at least 1; found inputs {self.num_inputs}, hidden {self.hidden},"
                f" blocks {self.blocks}"
            )
            raise SchemaMismatchError(msg)
        if self.kind == "logistic" and self.hidden:
            msg = (
                f"a logistic model has no hidden layers; found {self.hidden}: leave hidden empty, or use mlp"
            )
            raise SchemaMismatchError(msg)
        if self.kind == "attention" and (len(self.hidden) not in {1, 2} or self.hidden[0] % _HEADS):
            msg = (
                f"attention takes hidden = [token width, feed-forward width], the first a multiple of {_HEADS}; found"
                f" {self.hidden}: try [32]"
            )
            raise SchemaMismatchError(msg)
        if sum(self.blocks) != (self.num_inputs if self.kind == "attention" else 0):
            msg = (
                f"the blocks {self.blocks} do not add up to the {self.num_inputs} inputs; give attention one width per"
                " column, and other models none"
            )
            raise SchemaMismatchError(msg)


def encoding_of(kind: Kind) -> Literal["one_hot", "piecewise_linear"]:
    """Return which encoding of `fedfin.credit.binning.encode` a kind of model takes."""
    return "one_hot" if kind == "logistic" else "piecewise_linear"


def architecture_of(model: "ModelPlan", schema: "Schema", bins: Bins) -> Architecture:
    """Return the shape that a plan's model takes over these bins; hidden widths do not count for logistic."""
    described = inputs(schema, bins, encoding_of(model.kind))
    blocks = tuple(len(list(column)) for _, column in groupby(described, key=lambda one: one.column))
    return Architecture(
        model.kind,
        len(described),
        () if model.kind == "logistic" else model.hidden,
        blocks if model.kind == "attention" else (),
    )


def build(architecture: Architecture) -> nn.Module:
    """Return a module that maps (n, p) float32 loans to (n, 1) logits; its weights are undefined until loaded."""
    if architecture.kind == "attention":
        return _Attention(architecture.blocks, *architecture.hidden)
    layers: list[nn.Module] = []
    width = architecture.num_inputs
    for next_width in architecture.hidden:
        layers += [_linear(width, next_width), nn.LayerNorm(next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, _linear(width, 1))


def num_parameters(architecture: Architecture) -> int:
    """Return d, the length of the architecture's flat vector."""
    if architecture.kind == "attention":
        width = architecture.hidden[0]
        inner = architecture.hidden[1] if len(architecture.hidden) == 2 else 2 * width
        tokens = (architecture.num_inputs + len(architecture.blocks)) * width
        # four maps of the attention, two of the feed-forward part, three norms of two vectors, the last map
        return tokens + 4 * width * (width + 1) + (2 * width + 1) * inner + width + 6 * width + width + 1
    widths = (architecture.num_inputs, *architecture.hidden)
    hidden = sum((below + 3) * above for below, above in pairwise(widths))
    return hidden + widths[-1] + 1


def largest_model(model: "ModelPlan", schema: "Schema") -> int:
    """Return the parameters of the plan's model where every numeric column has as many bins as it may."""
    edges = tuple(float(edge) for edge in range(model.max_bins + 1))
    columns = [column.name for column in schema.features if isinstance(column, NumericColumn)]
    return num_parameters(architecture_of(model, schema, Bins(tuple((name, edges) for name in columns))))


def initial_weights(architecture: Architecture, seed: int) -> "NDArray[np.float32]":
    """Return the public weights from which round 1 starts, shape (d,).

    Logistic starts at zero. The MLP's hidden layers are He-normal, the attention's keep the variance of what comes
    in; LayerNorms are the identity and the last layer zero, so that every loan starts at a probability of one half.

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015), equation 10.
    """
    rng = np.random.default_rng(seed)
    gain = 1.0 if architecture.kind == "attention" else 2.0
    layers = [layer for layer in build(architecture).modules() if isinstance(layer, nn.Linear | nn.LayerNorm)]
    parts: list[NDArray[np.float32]] = []
    for layer in layers:
        if isinstance(layer, nn.LayerNorm):
            weights = np.ones(layer.weight.numel(), np.float32)
        elif layer is layers[-1]:
            weights = np.zeros(layer.weight.numel(), np.float32)
        else:
            stddev = np.sqrt(gain / layer.in_features)
            weights = rng.normal(0.0, stddev, layer.weight.numel()).astype(np.float32)
        parts += [weights, np.zeros(layer.bias.numel(), np.float32)]
    return np.concatenate(parts)


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


def log_odds(
    architecture: Architecture, weights: "NDArray[np.float32]", loans: "NDArray[np.float32]"
) -> "NDArray[np.float64]":
    """Return each loan's log odds of default, shape (n,), within 28 of zero; arguments and errors as `predict`."""
    bad = np.clip(predict(architecture, weights, loans), 1e-12, 1.0 - 1e-12)
    return np.log(bad) - np.log1p(-bad)


def model_fingerprint(schema_fingerprint: str, bins_fingerprint: str, architecture: Architecture) -> str:
    """Return the SHA-256, hex, of all that gives a flat vector its meaning."""
    meaning: dict[str, object] = {
        "schema": schema_fingerprint,
        "bins": bins_fingerprint,
        "kind": architecture.kind,
        "num_inputs": architecture.num_inputs,
        "hidden": architecture.hidden,
    }
    if architecture.blocks:
        meaning["blocks"] = architecture.blocks
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


class _Attention(nn.Module):
    """One token per column, one block of attention with its LayerNorms before, and a mean over the tokens."""

    def __init__(self, blocks: tuple[int, ...], width: int, inner: int | None = None) -> None:
        super().__init__()
        inner = 2 * width if inner is None else inner
        self._blocks = list(blocks)
        self.tokens = nn.ModuleList([_linear(block, width) for block in blocks])
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = _linear(width, 3 * width)
        self.mix = _linear(width, width)
        self.norm_forward = nn.LayerNorm(width)
        self.expand, self.contract = _linear(width, inner), _linear(inner, width)
        self.norm_out = nn.LayerNorm(width)
        self.out = _linear(width, 1)

    def forward(self, loans: Tensor) -> Tensor:
        parts = torch.split(loans, self._blocks, dim=1)
        tokens = torch.stack([token(part) for token, part in zip(self.tokens, parts, strict=True)], dim=1)
        tokens = tokens + self._attend(self.norm_attention(tokens))
        tokens = tokens + self.contract(nn.functional.relu(self.expand(self.norm_forward(tokens))))
        logits: Tensor = self.out(self.norm_out(tokens.mean(dim=1)))
        return logits

    def _attend(self, tokens: Tensor) -> Tensor:
        """Return (n, t, width) after multi-head attention among each loan's tokens."""
        num_loans, length, width = tokens.shape
        split = self.queries_keys_values(tokens).view(num_loans, length, 3, _HEADS, width // _HEADS)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        attended: Tensor = self.mix(mixed.transpose(1, 2).reshape(num_loans, length, width))
        return attended


def _linear(width: int, next_width: int) -> nn.Module:
    # without torch's own initial weights: they are overwritten, and would draw from its global generator
    layer: nn.Module = nn.utils.skip_init(nn.Linear, width, next_width)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return layer

"""A lender's own training: the steps of one round, and the best model it could make without the others.

From the round's weights a lender takes `local_steps` AdamW steps (Loshchilov & Hutter, "Decoupled Weight Decay
Regularization", ICLR 2019) on Poisson-sampled batches and returns the change of its weights. The optimizer
starts afresh in every round, so a lender keeps nothing between rounds. In a private job every step is
`fedfin.privacy.gradients.private_gradient`; what AdamW then does with it is post-processing. Where noise dominates,
AdamW's division by the root mean square takes the place of tuning the learning rate to the noise.

`train_alone` is what joining is compared with, so it tries as hard as a careful analyst would: its own bins, a
logistic model over a range of penalties and an MLP, chosen by the lender's own cross-validation. It is never private
and nothing of it leaves the lender.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedfin.credit.binning import Bins, bins_from_histogram, encode, histogram
from fedfin.credit.metrics import auroc
from fedfin.credit.models import (
    Architecture,
    build,
    encoding_of,
    flatten,
    initial_weights,
    load_weights,
    predict,
)
from fedfin.errors import TrainingError
from fedfin.privacy.gradients import PerLoanGradients, private_gradient

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.plan import TrainingPlan
    from fedfin.privacy.noise import NoiseSource

__all__ = ["LocalPrivacy", "LoneModel", "train_alone", "train_locally"]

NUM_FOLDS = 5
# below this many loans a fold holds a handful of bad ones: repeats steady the choice
SMALL = 300
NUM_REPEATS = 3
LONE_MAX_BINS = (3, 5, 8, 12)
LONE_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
LONE_HIDDEN = (16,)
LONE_EPOCHS = (10, 20, 40)


@dataclass(frozen=True, slots=True)
class LocalPrivacy:
    """The noise of one step.

    Attributes:
        noise_multiplier: Standard deviation of the sum's noise over the clipping bound; > 0.
        clipping_bound: L2 bound of one loan's gradient; > 0.
    """

    noise_multiplier: float
    clipping_bound: float


@dataclass(frozen=True, slots=True)
class LoneModel:
    """The model that a lender makes of its own loans.

    Attributes:
        architecture: The winner's shape; its `kind` says which won.
        weights: Its flat vector, shape (d,).
        bins: The lender's own bins.
        schema: The columns.
        logistic_auroc: Cross-validated AUROC of the best logistic model.
        mlp_auroc: Cross-validated AUROC of the best MLP.
    """

    architecture: Architecture
    weights: "NDArray[np.float32]"
    bins: Bins
    schema: "Schema"
    logistic_auroc: float
    mlp_auroc: float

    def predict(self, frame: "pd.DataFrame") -> "NDArray[np.float64]":
        """Return each loan's probability of default, shape (n,)."""
        loans = encode(frame, self.schema, self.bins, encoding_of(self.architecture.kind))
        return predict(self.architecture, self.weights, loans)


def train_locally(
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    *,
    architecture: Architecture,
    training: "TrainingPlan",
    privacy: LocalPrivacy | None,
    noise: "NoiseSource",
) -> "NDArray[np.float32]":
    """Train one round and return the change of the weights.

    Args:
        weights: The round's global weights, shape (d,); not changed.
        loans: The lender's encoded loans, shape (n, p), n >= 1.
        labels: 1 = bad, shape (n,).
        architecture: The model's shape.
        training: Local steps, sample rate, learning rate and weight decay.
        privacy: The step's noise; None trains without privacy, on the same kind of batches.
        noise: Draws the batches and, in a private job, the noise. In production its stream is secret: who
            knows the draw loses the amplification by sampling.

    Returns:
        New weights minus old, shape (d,), finite.

    Raises:
        SchemaMismatchError: The weights do not fit the architecture.
        TrainingError: There are no loans, an input is not finite, or training diverged.
    """
    if len(loans) == 0:
        msg = "the lender has no loans to train on; check data.query and the filters of bank.yaml"
        raise TrainingError(msg)
    module = build(architecture)
    load_weights(module, weights)
    gradient = _gradient_of(module, training.sample_rate * len(loans), privacy, noise)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    for _ in range(training.local_steps):
        batch = noise.bernoulli(len(loans), training.sample_rate)
        _set_gradient(module, gradient(loans[batch], labels[batch]))
        optimizer.step()
    # differences in float64: both terms are float32, so the only rounding is the last
    update = (flatten(module).astype(np.float64) - weights).astype(np.float32)
    if not np.isfinite(update).all():
        msg = f"the update is not finite after {training.local_steps} steps; lower training.learning_rate"
        raise TrainingError(msg)
    return update


def train_alone(
    frame: "pd.DataFrame", labels: "NDArray[np.int64]", schema: "Schema", rng: np.random.Generator
) -> LoneModel:
    """Return the better of a logistic model and an MLP, by stratified cross-validation on these loans.

    Args:
        frame: The lender's checked loans; not changed.
        labels: 1 = bad, shape (n,); at least two of each outcome.
        schema: The columns.
        rng: Draws the folds and the MLP's initial weights and batches.

    Returns:
        The winner, trained on all loans.

    Raises:
        TrainingError: Fewer than two good or two bad loans.
    """
    if min(int(labels.sum()), int(len(labels) - labels.sum())) < 2:
        msg = (
            f"{int(labels.sum())} of {len(labels)} loans are bad; cross-validation needs two of each outcome"
        )
        raise TrainingError(msg)
    folds = _folds(labels, rng)
    counts = histogram(frame, schema)
    candidates: list[_Candidate] = []
    for max_bins in LONE_MAX_BINS:
        bins = bins_from_histogram(counts, schema, max_bins)
        candidates += _logistic_candidates(encode(frame, schema, bins, "one_hot"), labels, bins, folds)
    best_logistic = max(candidates, key=lambda candidate: candidate.auroc)
    bins = bins_from_histogram(counts, schema, 4 if len(labels) < SMALL else 8)
    loans = encode(frame, schema, bins, "piecewise_linear")
    best_mlp = max(_mlp_candidates(loans, labels, bins, folds, rng), key=lambda candidate: candidate.auroc)
    best = max(best_logistic, best_mlp, key=lambda candidate: candidate.auroc)
    return LoneModel(
        best.architecture, best.fit_all(), best.bins, schema, best_logistic.auroc, best_mlp.auroc
    )


def _gradient_of(
    module: nn.Module, expected_batch_size: float, privacy: LocalPrivacy | None, noise: "NoiseSource"
) -> "Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]":
    """Return the function from a batch to the gradient of its step."""
    if privacy is None:
        return lambda loans, labels: _plain_sum(module, loans, labels) / expected_batch_size
    per_loan = PerLoanGradients(module)
    return lambda loans, labels: private_gradient(
        per_loan,
        loans,
        labels,
        clipping_bound=privacy.clipping_bound,
        noise_multiplier=privacy.noise_multiplier,
        expected_batch_size=expected_batch_size,
        noise=noise,
    )


def _plain_sum(
    module: nn.Module, loans: "NDArray[np.float32]", labels: "NDArray[np.int64]"
) -> "NDArray[np.float64]":
    """Return the sum of the loans' loss gradients, shape (d,)."""
    parameters = list(module.parameters())
    targets = torch.from_numpy(np.asarray(labels, dtype=np.float32))
    logits = module(torch.from_numpy(np.ascontiguousarray(loans, dtype=np.float32))).squeeze(1)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.reshape(-1) for gradient in gradients]).double().numpy()


def _set_gradient(module: nn.Module, gradient: "NDArray[np.float64]") -> None:
    """Put a flat gradient where torch's optimizer looks for it."""
    start = 0
    for parameter in module.parameters():
        part = torch.from_numpy(gradient[start : start + parameter.numel()])
        parameter.grad = part.to(torch.float32).view_as(parameter)
        start += parameter.numel()


@dataclass(frozen=True, slots=True)
class _Candidate:
    auroc: float
    bins: Bins
    architecture: Architecture
    fit_all: "Callable[[], NDArray[np.float32]]"


def _folds(labels: "NDArray[np.int64]", rng: np.random.Generator) -> "list[NDArray[np.int64]]":
    """Return the loans left out in turn: a stratified partition, several for a small lender."""
    num_folds = min(NUM_FOLDS, int(labels.sum()), int(len(labels) - labels.sum()))
    left_out: list[NDArray[np.int64]] = []
    for _ in range(NUM_REPEATS if len(labels) < SMALL else 1):
        order = rng.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        left_out += [order[fold::num_folds] for fold in range(num_folds)]
    return left_out


def _mean_auroc(
    labels: "NDArray[np.int64]", folds: "list[NDArray[np.int64]]", scores: "list[NDArray[np.float64]]"
) -> float:
    return float(np.mean([auroc(labels[fold], score) for fold, score in zip(folds, scores, strict=True)]))


def _logistic_candidates(
    loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", bins: Bins, folds: "list[NDArray[np.int64]]"
) -> "list[_Candidate]":
    """Return one candidate per penalty."""
    inputs = np.hstack([loans.astype(np.float64), np.ones((len(loans), 1))])
    architecture = Architecture("logistic", loans.shape[1])
    candidates = []
    scores: dict[float, list[NDArray[np.float64]]] = {penalty: [] for penalty in LONE_PENALTIES}
    for fold in folds:
        kept = np.setdiff1d(np.arange(len(labels)), fold)
        weights = np.zeros(inputs.shape[1])
        for penalty in sorted(
            LONE_PENALTIES, reverse=True
        ):  # the strongest first: each start is near its end
            weights = _fit_logistic(inputs[kept], labels[kept], penalty, weights)
            scores[penalty].append(inputs[fold] @ weights)
    for penalty in LONE_PENALTIES:

        def fit_all(penalty: float = penalty) -> "NDArray[np.float32]":
            return _fit_logistic(inputs, labels, penalty, np.zeros(inputs.shape[1])).astype(np.float32)

        candidates.append(
            _Candidate(_mean_auroc(labels, folds, scores[penalty]), bins, architecture, fit_all)
        )
    return candidates


def _fit_logistic(
    inputs: "NDArray[np.float64]", labels: "NDArray[np.int64]", penalty: float, start: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """Minimise the summed log loss plus penalty / 2 times the squared weights (not the last, the intercept).

    Newton's method; with the penalty the Hessian is positive definite.
    """
    ridge = np.full(inputs.shape[1], penalty)
    ridge[-1] = 1e-6
    weights = start
    for _ in range(30):
        probabilities = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (probabilities - labels) + ridge * weights
        curvature = (inputs.T * (probabilities * (1 - probabilities))) @ inputs + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-4:
            break
    return weights


def _mlp_candidates(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    bins: Bins,
    folds: "list[NDArray[np.int64]]",
    rng: np.random.Generator,
) -> "list[_Candidate]":
    """Return one candidate per number of epochs."""
    architecture = Architecture("mlp", loans.shape[1], LONE_HIDDEN)
    scores: dict[int, list[NDArray[np.float64]]] = {epochs: [] for epochs in LONE_EPOCHS}
    for fold in folds:
        kept = np.setdiff1d(np.arange(len(labels)), fold)
        for epochs, weights in _fit_mlp(loans[kept], labels[kept], architecture, LONE_EPOCHS, rng):
            scores[epochs].append(predict(architecture, weights, loans[fold]))
    candidates = []
    for epochs in LONE_EPOCHS:

        def fit_all(epochs: int = epochs) -> "NDArray[np.float32]":
            return _fit_mlp(loans, labels, architecture, (epochs,), rng)[-1][1]

        candidates.append(_Candidate(_mean_auroc(labels, folds, scores[epochs]), bins, architecture, fit_all))
    return candidates


def _fit_mlp(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    architecture: Architecture,
    epochs: tuple[int, ...],
    rng: np.random.Generator,
) -> "list[tuple[int, NDArray[np.float32]]]":
    """Train one MLP by AdamW on shuffled batches; return its weights after each of the given epochs."""
    module = build(architecture)
    load_weights(module, initial_weights(architecture, int(rng.integers(2**31))))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.005, weight_decay=0.01)
    inputs, targets = torch.from_numpy(loans), torch.from_numpy(labels.astype(np.float32))
    batch_size = 32 if len(loans) < SMALL else 64
    snapshots: list[tuple[int, NDArray[np.float32]]] = []
    for epoch in range(1, max(epochs) + 1):
        for batch in torch.from_numpy(rng.permutation(len(loans))).split(batch_size):
            loss = nn.functional.binary_cross_entropy_with_logits(
                module(inputs[batch]).squeeze(1), targets[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in epochs:
            snapshots.append((epoch, flatten(module)))
    return snapshots

"""The model that a lender makes without the others: what joining the federation is compared with.

It is the better of the federation's two families of models, by the lender's own stratified cross-validation: a
logistic model on the lender's own quantile bins, over a range of bins and penalties, and an MLP on piecewise-linear
encoding, stopped after several numbers of epochs. It is never private and nothing of it leaves the lender.

It is not the best that a lender could do. With 90 loans a penalised logistic regression on standardised columns does
better, by .019 AUROC on the demo's loans, and a gain over `train_alone` overstates the gain over that by as much:
`benchmarks/alone_arm.py` measures it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.client.training import train_mlp
from fedfin.credit.binning import Bins, bins_from_histogram, encode, histogram
from fedfin.credit.metrics import auroc
from fedfin.credit.models import Architecture, encoding_of, predict
from fedfin.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema

__all__ = ["LoneModel", "train_alone"]

NUM_FOLDS = 5
# below this many loans a fold holds a handful of bad ones: repeats steady the choice
SMALL = 300
NUM_REPEATS = 3
MAX_BINS = (3, 5, 8, 12)
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
HIDDEN = (16,)
EPOCHS = (10, 20, 40)


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
    for max_bins in MAX_BINS:
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
    scores: dict[float, list[NDArray[np.float64]]] = {penalty: [] for penalty in PENALTIES}
    for fold in folds:
        kept = np.setdiff1d(np.arange(len(labels)), fold)
        weights = np.zeros(inputs.shape[1])
        for penalty in sorted(PENALTIES, reverse=True):  # the strongest first: each start is near its end
            weights = _fit_logistic(inputs[kept], labels[kept], penalty, weights)
            scores[penalty].append(inputs[fold] @ weights)
    for penalty in PENALTIES:

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
    architecture = Architecture("mlp", loans.shape[1], HIDDEN)
    batch_size = 32 if len(loans) < SMALL else 64
    scores: dict[int, list[NDArray[np.float64]]] = {epochs: [] for epochs in EPOCHS}
    for fold in folds:
        kept = np.setdiff1d(np.arange(len(labels)), fold)
        for epochs, weights in train_mlp(loans[kept], labels[kept], architecture, EPOCHS, batch_size, rng):
            scores[epochs].append(predict(architecture, weights, loans[fold]))
    candidates = []
    for epochs in EPOCHS:

        def fit_all(epochs: int = epochs) -> "NDArray[np.float32]":
            return train_mlp(loans, labels, architecture, (epochs,), batch_size, rng)[-1][1]

        candidates.append(_Candidate(_mean_auroc(labels, folds, scores[epochs]), bins, architecture, fit_all))
    return candidates

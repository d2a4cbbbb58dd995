"""A lender's own training: the steps of one round, and an MLP of its loans alone.

From the round's weights a lender takes `local_steps` AdamW steps (Loshchilov & Hutter, "Decoupled Weight Decay
Regularization", ICLR 2019) on Poisson-sampled batches and returns the change of its weights. The optimizer
starts afresh in every round, so a lender keeps nothing between rounds. In a private job every step's gradient is
one of `fedfin.privacy.gradients.PrivateEngine`; what AdamW then does with it is post-processing. Where noise
dominates, AdamW's division by the root mean square takes the place of tuning the learning rate to the noise.
The proximal term is FedProx's (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, eq. 2).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedfin.credit.models import Architecture, build, flatten, initial_weights, load_weights
from fedfin.errors import TrainingError
from fedfin.privacy.gradients import PerLoanGradients, PrivateEngine
from fedfin.strategies.strategy import public_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fedfin.plan import TrainingPlan
    from fedfin.privacy.noise import NoiseSource

__all__ = ["LocalPrivacy", "clipped_gradient", "train_locally", "train_mlp", "train_rounds"]


@dataclass(frozen=True, slots=True)
class LocalPrivacy:
    """The noise of one step.

    Attributes:
        noise_multiplier: Standard deviation of the sum's noise over the clipping bound; > 0.
        clipping_bound: L2 bound of one loan's gradient; > 0.
    """

    noise_multiplier: float
    clipping_bound: float


def train_locally(
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    *,
    architecture: Architecture,
    training: "TrainingPlan",
    privacy: LocalPrivacy | None,
    noise: "NoiseSource",
    watch: "Callable[[NDArray[np.float64]], None] | None" = None,
) -> "NDArray[np.float32]":
    """Train one round and return the change of the weights.

    Args:
        weights: The round's global weights, shape (d,); not changed.
        loans: The lender's encoded loans, shape (n, p), n >= 1.
        labels: 1 = bad, shape (n,).
        architecture: The model's shape.
        training: Local steps, sample rate, learning rate, weight decay and the proximal term: the gradient of
            proximal / 2 * |weights - round's weights|^2 is added to every step's, after the noise.
        privacy: The step's noise; None trains without privacy, on the same kind of batches.
        noise: Draws the batches and, in a private job, the noise. In production its stream is secret: who
            knows the draw loses the amplification by sampling.
        watch: Called with every step's noisy mean gradient, shape (d,): what the privacy audit attacks.

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
    flat = _as_one_vector(module)
    start = flat.detach().clone()
    # The accounting does not cover the number of loans: the private sum is divided by its bucket.
    size = len(loans) if privacy is None else public_size(min(len(loans), training.weight_cap), training)
    gradient = _gradient_of(module, training.sample_rate * size, privacy, noise)
    optimizer = torch.optim.AdamW([flat], lr=training.learning_rate, weight_decay=training.weight_decay)
    for _ in range(training.local_steps):
        batch = noise.bernoulli(len(loans), training.sample_rate)
        step_gradient = gradient(*_take(loans, labels, batch))
        if watch is not None:
            watch(step_gradient)
        flat.grad = torch.from_numpy(step_gradient.astype(np.float32))
        if training.proximal > 0:
            # after the noise: it knows nothing of the loans, and in the loss it would be clipped with them or lost
            flat.grad.add_(flat.detach() - start, alpha=training.proximal)
        optimizer.step()
    # differences in float64: both terms are float32, so the only rounding is the last
    update = (flatten(module).astype(np.float64) - weights).astype(np.float32)
    if not np.isfinite(update).all():
        msg = f"the update is not finite after {training.local_steps} steps; lower training.learning_rate"
        raise TrainingError(msg)
    return update


def clipped_gradient(
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    *,
    architecture: Architecture,
    sample_rate: float,
    clipping_bound: float,
    noise: "NoiseSource",
) -> "NDArray[np.float64]":
    """Return the sum of clipped gradients of one Poisson batch, without noise: what a round of mode shared sums.

    Args:
        weights: The round's global weights, shape (d,); not changed.
        loans: The lender's encoded loans, shape (n, p).
        labels: 1 = bad, shape (n,).
        architecture: The model's shape.
        sample_rate: Chance of each loan to be in the batch.
        clipping_bound: L2 bound of one loan's gradient; > 0.
        noise: Draws the batch, in secret.

    Returns:
        Shape (d,), in gradient units; finite.

    Raises:
        SchemaMismatchError: The weights do not fit the architecture.
        TrainingError: An input is not finite.
    """
    module = build(architecture)
    load_weights(module, weights)
    batch = noise.bernoulli(len(loans), sample_rate)
    return PerLoanGradients(module).clipped_sum(*_take(loans, labels, batch), clipping_bound)


def train_rounds(
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    *,
    architecture: Architecture,
    training: "TrainingPlan",
    privacy: LocalPrivacy | None,
    noise: "NoiseSource",
) -> "NDArray[np.float32]":
    """Return the weights after all the plan's rounds with this lender alone; arguments as `train_locally`."""
    for _ in range(training.rounds):
        weights = weights + train_locally(
            weights,
            loans,
            labels,
            architecture=architecture,
            training=training,
            privacy=privacy,
            noise=noise,
        )
    return weights


def train_mlp(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    architecture: Architecture,
    epochs: tuple[int, ...],
    batch_size: int,
    rng: np.random.Generator,
) -> "list[tuple[int, NDArray[np.float32]]]":
    """Train one MLP by AdamW on shuffled batches, without privacy.

    Args:
        loans: Encoded loans, shape (n, p); not changed.
        labels: 1 = bad, shape (n,).
        architecture: The model's shape.
        epochs: After which epochs the weights are wanted; one training serves all.
        batch_size: Loans of a step; >= 1.
        rng: Draws the initial weights and the batches.

    Returns:
        Each of the epochs, ascending, with the weights after it, shape (d,).
    """
    module = build(architecture)
    load_weights(module, initial_weights(architecture, int(rng.integers(2**31))))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.005, weight_decay=0.01)
    inputs, targets = torch.from_numpy(loans), torch.from_numpy(labels.astype(np.float32))
    snapshots: list[tuple[int, NDArray[np.float32]]] = []
    for epoch in range(1, max(epochs) + 1):
        for batch in torch.split(torch.from_numpy(rng.permutation(len(loans))), batch_size):
            loss = nn.functional.binary_cross_entropy_with_logits(
                module(inputs[batch]).squeeze(1), targets[batch]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        if epoch in epochs:
            snapshots.append((epoch, flatten(module)))
    return snapshots


def _gradient_of(
    module: nn.Module, expected_batch_size: float, privacy: LocalPrivacy | None, noise: "NoiseSource"
) -> "Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]":
    """Return the function from a batch to the gradient of its step."""
    if privacy is None:
        return lambda loans, labels: _plain_sum(module, loans, labels) / expected_batch_size
    return PrivateEngine(
        module,
        noise_multiplier=privacy.noise_multiplier,
        clipping_bound=privacy.clipping_bound,
        expected_batch_size=expected_batch_size,
        noise=noise,
    ).gradient


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


def _take(
    loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", batch: "NDArray[np.bool_]"
) -> "tuple[NDArray[np.float32], NDArray[np.int64]]":
    """Return the batch's loans and labels; the lender's own arrays, not copies, where it takes them all."""
    if batch.all():
        return loans, labels
    rows = np.flatnonzero(batch)
    return loans[rows], labels[rows]


def _as_one_vector(module: nn.Module) -> nn.Parameter:
    """Make the module's parameters views of one vector, which an optimizer can move in one go, and return that."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return nn.Parameter(flat)

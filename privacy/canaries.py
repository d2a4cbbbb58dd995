"""Canaries: made-up loans whose trace in a noisy sum of gradients is known, so that an auditor can look for it.

Every canary has an input column of its own, with a value so large that its gradient is clipped to the bound and lies
almost whole in that column's weights; in all other columns it is zero, as all other loans are in its column. What a
step releases about canary i is then `present * bound + noise` along one known direction, the worst case that the
clipping allows, and the canaries do not disturb each other. In the columns of absent canaries the release is noise
and nothing else.

Source: the gradient canaries of Nasr et al., "Tight Auditing of Differentially Private Machine Learning" (USENIX
Security 2023), put into the table instead of into the optimizer, so that the very training code is what is attacked.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import nn

from fedfin.errors import PrivacyParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "CANARY_LABEL",
    "CANARY_VALUE",
    "CanaryTrace",
    "canary_trace",
    "guess_balanced",
    "guess_extremes",
    "hostile_loans",
    "log_likelihood_ratio",
    "with_canaries",
]

CANARY_VALUE: Final = 1e5  # the share of the gradient outside of the own column is one over this
CANARY_LABEL: Final = 0
_LARGEST_FLOAT32: Final = 3e38


@dataclass(frozen=True, slots=True)
class CanaryTrace:
    """What a canary does to the clipped sum of the first layer's weights.

    Attributes:
        direction: Of its gradient within its own column, one value per output of the first layer, shape (h,),
            of length 1; the same for all canaries, because all see the same activations.
        reach: Length of its clipped gradient along that direction, over the clipping bound; in [0, 1].
    """

    direction: "NDArray[np.float64]"
    reach: float


def with_canaries(
    loans: "NDArray[np.float32]", labels: "NDArray[np.int64]", present: "NDArray[np.bool_]", column: int
) -> "tuple[NDArray[np.float32], NDArray[np.int64]]":
    """Return a table with one more column for each canary and one more loan for each present one.

    Args:
        loans: Encoded loans, shape (n, p); not changed.
        labels: 1 = bad, shape (n,).
        present: Which canaries are in the table, shape (m,).
        column: Where their columns are put in, 0 to p.

    Returns:
        Loans, shape (n + present, p + m), the canaries last and in their order, and labels.
    """
    (num_loans, num_inputs), num_canaries = loans.shape, len(present)
    where = np.flatnonzero(present)
    table = np.zeros((num_loans + len(where), num_inputs + num_canaries), np.float32)
    table[:num_loans, :column] = loans[:, :column]
    table[:num_loans, column + num_canaries :] = loans[:, column:]
    table[num_loans + np.arange(len(where)), column + where] = CANARY_VALUE
    return table, np.concatenate([labels, np.full(len(where), CANARY_LABEL, labels.dtype)])


def canary_trace(module: nn.Module, num_inputs: int, column: int, clipping_bound: float) -> CanaryTrace:
    """Return the trace of the canary in `column`, from its own gradient in float64.

    Args:
        module: The model at the weights from which the step starts, its canary columns zero; not changed. Its first
            parameter is the matrix that takes the canary's column, shape (h, inputs), from input 0 on.
        num_inputs: Of the model.
        column: The canary's input.
        clipping_bound: L2 bound of one loan's gradient; > 0.
    """
    twin = copy.deepcopy(module).double()
    loan = torch.zeros((1, num_inputs), dtype=torch.float64)
    loan[0, column] = CANARY_VALUE
    target = torch.full((1,), float(CANARY_LABEL), dtype=torch.float64)
    loss = nn.functional.binary_cross_entropy_with_logits(twin(loan).reshape(1), target)
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    own = gradients[0][:, column].numpy()
    length = float(np.linalg.norm(own))
    norm = float(np.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    if not np.isfinite(norm) or length == 0.0:  # it leaves no trace at these weights
        return CanaryTrace(np.zeros(len(own)), 0.0)
    return CanaryTrace(own / length, length * min(1.0, clipping_bound / norm) / clipping_bound)


def hostile_loans(num_inputs: int) -> "tuple[NDArray[np.float32], NDArray[np.int64]]":
    """Return loans made to break a clipping: huge, all-huge, tiny, empty, negative, overflowing; with both outcomes.

    Args:
        num_inputs: Columns, p >= 1.

    Returns:
        Loans, shape (14, p), finite, and labels, shape (14,).
    """
    kinds = np.zeros((7, num_inputs), np.float32)
    kinds[0, 0] = CANARY_VALUE
    kinds[1, :] = CANARY_VALUE
    kinds[2, 0] = -CANARY_VALUE
    kinds[3, :] = 1e-3
    kinds[4, :] = 1.0
    kinds[5, 0] = _LARGEST_FLOAT32
    # kinds[6] stays empty
    return np.repeat(kinds, 2, axis=0), np.tile(np.array([0, 1], np.int64), len(kinds))


def guess_balanced(
    observed: "NDArray[np.float64]", present: "NDArray[np.bool_]", threshold: float, rng: np.random.Generator
) -> tuple[int, int]:
    """Guess from one release who took part in it, about as many that did as did not.

    Args:
        observed: Each canary's release along its direction, over the clipping bound, shape (m,).
        present: Whether the canary's gradient is in the sum, shape (m,).
        threshold: Above it the guess is "present"; fixed beforehand.
        rng: Draws whom to leave out of the larger side, before anything is looked at.

    Returns:
        Right guesses and all guesses.
    """
    inside, outside = np.flatnonzero(present), np.flatnonzero(~present)
    num = min(len(inside), len(outside))
    inside, outside = rng.choice(inside, num, replace=False), rng.choice(outside, num, replace=False)
    right = int((observed[inside] > threshold).sum()) + int((observed[outside] <= threshold).sum())
    return right, 2 * num


def guess_extremes(scores: "NDArray[np.float64]", members: "NDArray[np.bool_]", num_guesses: int) -> int:
    """Guess that the highest scores are members and the lowest are not; return how many guesses are right.

    Args:
        scores: One per canary, shape (m,).
        members: The secret coins, shape (m,).
        num_guesses: Even, at most m, fixed beforehand; the others are abstained from.
    """
    if num_guesses % 2 or not 0 < num_guesses <= len(scores):
        msg = f"num_guesses is {num_guesses} for {len(scores)} canaries; it must be even, above 0 and at most that"
        raise PrivacyParameterError(msg)
    order = np.argsort(scores, kind="stable")
    half = num_guesses // 2
    return int(members[order[-half:]].sum() + (~members[order[:half]]).sum())


def log_likelihood_ratio(
    observed: "NDArray[np.float64]", reach: float, noise_multiplier: float, sample_rate: float
) -> "NDArray[np.float64]":
    """Return how much likelier each release is for a member than for a stranger, not knowing the step's draw.

    Args:
        observed: Over the clipping bound, any shape.
        reach: Shift of a drawn member, over the clipping bound.
        noise_multiplier: Standard deviation of the noise over the clipping bound; > 0.
        sample_rate: Chance that a member is drawn, in (0, 1].

    Returns:
        log((1 - q) + q exp((reach x - reach^2 / 2) / sigma^2)), of the shape of `observed`.
    """
    drawn = (reach * observed - reach * reach / 2.0) / noise_multiplier**2
    if sample_rate == 1.0:
        return drawn
    return np.asarray(np.logaddexp(np.log1p(-sample_rate), np.log(sample_rate) + drawn))

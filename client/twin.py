"""A twin of a private job, for the audit to attack: the very training code, on loans with canaries among them.

Everything goes through `fedfin.client.training.train_locally`; what is seen of it is what it hands to its watcher, the
noisy mean gradient of every step. Nothing of a twin is sent or kept.

The columns of the canaries come last among the inputs of the model's first matrix. In `canary_job` their weights are
set back to zero before each step and the training is asked for one step at a time, so that the canaries never
saturate; the other weights go on training. In `noise_of` the training is asked for whole rounds, as in the job.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from fedfin.client.audit_noise import Silence, WatchedDraws
from fedfin.client.training import LocalPrivacy, train_locally
from fedfin.credit.models import Architecture, build, initial_weights, load_weights
from fedfin.privacy.canaries import (
    canary_trace,
    guess_balanced,
    hostile_loans,
    log_likelihood_ratio,
    with_canaries,
)
from fedfin.privacy.draw_checks import DrawPairs, count_pairs
from fedfin.strategies.strategy import public_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fedfin.plan import TrainingPlan
    from fedfin.privacy.noise import NoiseSource

__all__ = ["CanaryJob", "JobNoise", "Twin"]

_Float = TypeVar("_Float", np.float32, np.float64)

_NUM_NOISE_VALUES: Final = 1000  # of each step, or one column's where that has more
_MOST_NOISE_STEPS: Final = 1000  # of a lender, but two whole rounds at least
_NUM_LOANS_FOR_CLIPPING: Final = 20
_SMALL_SHARE: Final = 0.01  # of the bound: so small a bound clips what a model keeps within the plan's
_START_SPREAD: Final = 0.1  # the MLP's public start has a zero last layer, behind which no canary would show
_THRESHOLD: Final = 0.5  # halfway between an absent canary and one clipped to the bound


@dataclass(frozen=True, slots=True)
class JobNoise:
    """The noise of one lender's rounds.

    Attributes:
        noise: Over its planned standard deviation, shape (steps, values).
        steps_a_round: Most steps that were seen in a round.
    """

    noise: "NDArray[np.float64]"
    steps_a_round: int


@dataclass(frozen=True, slots=True)
class CanaryJob:
    """What the auditor saw of the canaries in one twin of the job.

    Attributes:
        members: The secret coins, shape (m,).
        scores: How likely each canary is a member, by all steps and without the draws, shape (m,).
        num_correct: Right guesses about single steps, knowing the draws.
        num_guesses: Guesses, half about canaries in the step's sum, half about others.
        shift_sums: Sum of what was observed of canaries in the sum and of others, over the bound.
        shift_counts: How many of each.
        draws: What steps drew one after the other.
        num_drawn: Members drawn for a step.
        num_draws: Members that could be.
    """

    members: "NDArray[np.bool_]"
    scores: "NDArray[np.float64]"
    num_correct: int
    num_guesses: int
    shift_sums: tuple[float, float]
    shift_counts: tuple[int, int]
    draws: DrawPairs
    num_drawn: int
    num_draws: int


class Twin:
    """Trains as the job does, on loans of the lender's; holds no state between calls."""

    def __init__(
        self,
        loans: "NDArray[np.float32]",
        labels: "NDArray[np.int64]",
        *,
        architecture: Architecture,
        training: "TrainingPlan",
        privacy: LocalPrivacy,
    ) -> None:
        """Take what the job has.

        Args:
            loans: Encoded loans, shape (n, p), n >= 20.
            labels: 1 = bad, shape (n,).
            architecture: The job's model, with p inputs.
            training: The plan's.
            privacy: The noise and the bound of the job's steps.
        """
        self._loans, self._labels = loans, labels
        self._architecture, self._training, self._privacy = architecture, training, privacy
        # the model's first matrix: all inputs of it, but for attention only those of the first column's token
        self._height = architecture.hidden[0] if architecture.hidden else 1
        self._width = architecture.blocks[0] if architecture.blocks else architecture.num_inputs
        start = initial_weights(architecture, 0)
        if architecture.hidden:
            spread = np.random.default_rng(0).normal(0.0, _START_SPREAD, len(start))
            start = (start + spread).astype(np.float32)
        self._start = start

    @property
    def num_noise_rounds(self) -> int:
        """Rounds of `noise_of`."""
        return max(2, min(self._training.rounds, _MOST_NOISE_STEPS // self._training.local_steps))

    def clipping_reach(self) -> float:
        """Return how far one hostile loan moves a step's sum, over the bound, with the noise switched off.

        Tables with and without the loan go through the training code; the largest distance (L2) is returned, under
        the plan's bound and under a hundredth of it: a model with LayerNorm may need no clipping at the plan's.
        """
        loans, labels = self._loans[:_NUM_LOANS_FOR_CLIPPING], self._labels[:_NUM_LOANS_FOR_CLIPPING]
        hostile = list(zip(*hostile_loans(self._architecture.num_inputs), strict=True))
        reach = 0.0
        for share in (1.0, _SMALL_SHARE):
            privacy = replace(self._privacy, clipping_bound=share * self._privacy.clipping_bound)
            without = self._whole_sum(loans, labels, privacy, Silence()) / share
            for loan, label in hostile:
                more, more_labels = np.vstack([loans, loan[None]]), np.append(labels, label)
                moved = self._whole_sum(more, more_labels, privacy, Silence()) / share - without
                reach = max(reach, float(np.linalg.norm(moved)))
        return reach

    def whole_noise(self, noise: "NoiseSource", num_pairs: int) -> "NDArray[np.float64]":
        """Return noise in every value of a step, over its planned standard deviation, shape (pairs, d).

        The same step is taken twice, with all of the same loans, so that in the difference only noise is left.

        Args:
            noise: The lender's own.
            num_pairs: >= 1.
        """
        loans, labels = self._loans[:_NUM_LOANS_FOR_CLIPPING], self._labels[:_NUM_LOANS_FOR_CLIPPING]
        differences = [
            self._whole_sum(loans, labels, self._privacy, noise)
            - self._whole_sum(loans, labels, self._privacy, noise)
            for _ in range(num_pairs)
        ]
        return np.array(differences) / (math.sqrt(2.0) * self._privacy.noise_multiplier)

    def noise_of(self, noise: "NoiseSource", tick: "Callable[[], None]") -> JobNoise:
        """Train whole rounds as the plan says and return the noise in columns in which no loan has anything.

        Args:
            noise: The lender's own.
            tick: Called after every round.
        """
        num_columns = max(1, _NUM_NOISE_VALUES // self._height)
        table, labels = with_canaries(self._loans, self._labels, np.zeros(num_columns, np.bool_), self._width)
        weights = self._widened(num_columns)
        steps: list[NDArray[np.float64]] = []
        most = 0
        for _ in range(self.num_noise_rounds):
            update, seen = self._train(weights, table, labels, self._training, num_columns, noise)
            weights = weights + update
            steps += [block.ravel() for block in seen]
            most = max(most, len(seen))
            tick()
        return JobNoise(np.array(steps) / self._privacy.noise_multiplier, most)

    def canary_job(
        self,
        noise: "NoiseSource",
        *,
        num_canaries: int,
        num_steps: int,
        rng: np.random.Generator,
        tick: "Callable[[], None]",
    ) -> CanaryJob:
        """Train step by step with canaries, each in the table by a fair coin, and guess.

        Args:
            noise: The lender's own.
            num_canaries: m >= 2.
            num_steps: Steps, >= 1.
            rng: Tosses the coins.
            tick: Called after every step.
        """
        members = rng.random(num_canaries) < 0.5
        table, labels = with_canaries(self._loans, self._labels, members, self._width)
        training = self._training.model_copy(update={"local_steps": 1})
        watched = WatchedDraws(noise)
        weights = self._widened(num_canaries)
        module = build(self._widened_architecture(num_canaries))
        scores = np.zeros(num_canaries)
        correct = guesses = drawn_members = 0
        sums, counts = np.zeros(2), np.zeros(2, np.int64)
        draws, before = DrawPairs(len(table)), None
        for _ in range(num_steps):
            load_weights(module, weights)
            trace = canary_trace(module, table.shape[1], self._width, self._privacy.clipping_bound)
            update, seen = self._train(weights, table, labels, training, num_canaries, watched)
            observed = trace.direction @ seen[0]
            scores += log_likelihood_ratio(
                observed, 1.0, self._privacy.noise_multiplier, training.sample_rate
            )
            present = np.zeros(num_canaries, np.bool_)
            drawn = watched.drawn(len(table))
            # in disjoint pairs of steps: their counts are independent
            draws, before = (draws, drawn) if before is None else (count_pairs(draws, before, drawn), None)
            present[members] = drawn[len(self._loans) :]
            right, num = guess_balanced(observed, present, _THRESHOLD, rng)
            correct, guesses, drawn_members = (
                correct + right,
                guesses + num,
                drawn_members + int(present.sum()),
            )
            for position, side in enumerate((present, ~present)):
                sums[position] += observed[side].sum()
                counts[position] += side.sum()
            weights = weights + update
            self._canary_columns(weights, num_canaries)[:] = 0.0
            tick()
        return CanaryJob(
            members,
            scores,
            correct,
            guesses,
            (float(sums[0]), float(sums[1])),
            (int(counts[0]), int(counts[1])),
            draws,
            drawn_members,
            int(members.sum()) * num_steps,
        )

    def _train(
        self,
        weights: "NDArray[np.float32]",
        table: "NDArray[np.float32]",
        labels: "NDArray[np.int64]",
        training: "TrainingPlan",
        num_columns: int,
        noise: "NoiseSource",
    ) -> "tuple[NDArray[np.float32], list[NDArray[np.float64]]]":
        """Train a round; return the update and every step's sum in the last columns, over the bound, (h, columns)."""
        unit = self._unit(len(table), training)
        seen: list[NDArray[np.float64]] = []

        def watch(gradient: "NDArray[np.float64]") -> None:
            seen.append(self._canary_columns(gradient, num_columns) * unit)

        update = train_locally(
            weights,
            table,
            labels,
            architecture=self._widened_architecture(num_columns),
            training=training,
            privacy=self._privacy,
            noise=noise,
            watch=watch,
        )
        return update, seen

    def _whole_sum(
        self,
        loans: "NDArray[np.float32]",
        labels: "NDArray[np.int64]",
        privacy: LocalPrivacy,
        noise: "NoiseSource",
    ) -> "NDArray[np.float64]":
        """Return a step's sum of all these loans, over the plan's bound, shape (d,)."""
        training = self._training.model_copy(update={"sample_rate": 1.0, "local_steps": 1})
        unit = self._unit(len(loans), training)
        seen: list[NDArray[np.float64]] = []
        train_locally(
            self._start,
            loans,
            labels,
            architecture=self._architecture,
            training=training,
            privacy=privacy,
            noise=noise,
            watch=lambda gradient: seen.append(gradient * unit),
        )
        return seen[0]

    def _unit(self, num_loans: int, training: "TrainingPlan") -> float:
        """Return what turns a mean gradient into a sum in units of the bound: the divisor is public."""
        size = public_size(min(num_loans, training.weight_cap), training)
        return training.sample_rate * size / self._privacy.clipping_bound

    def _widened_architecture(self, num_columns: int) -> Architecture:
        blocks = self._architecture.blocks
        return replace(
            self._architecture,
            num_inputs=self._architecture.num_inputs + num_columns,
            blocks=(blocks[0] + num_columns, *blocks[1:]) if blocks else (),
        )

    def _widened(self, num_columns: int) -> "NDArray[np.float32]":
        """Return the start weights with zeros for `num_columns` more inputs."""
        size = self._height * self._width
        first = self._start[:size].reshape(self._height, self._width)
        wide = np.hstack([first, np.zeros((self._height, num_columns), np.float32)])
        return np.concatenate([wide.ravel(), self._start[size:]])

    def _canary_columns(self, vector: "NDArray[_Float]", num_columns: int) -> "NDArray[_Float]":
        """Return the canaries' part of a flat vector, as a view, shape (h, num_columns)."""
        width = self._width + num_columns
        return vector[: self._height * width].reshape(self._height, width)[:, self._width :]

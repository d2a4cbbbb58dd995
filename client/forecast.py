"""What AUROC a private job would cost, measured on the lender's own loans before anything is spent.

The plan's own model is trained by the very code of a round (`train_locally`), several times with simulated noise of
the plan's size and once without, and judged on the held-out loans. Nothing leaves, so it costs no budget; nothing of
it is private, so it stays at the lender.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedfin.client.histograms import noisy_histogram
from fedfin.client.preparation import PreparedLoans
from fedfin.client.training import LocalPrivacy, train_rounds
from fedfin.credit.binning import bins_from_histogram, encode
from fedfin.credit.metrics import Interval, auroc, bootstrap_gain
from fedfin.credit.models import architecture_of, encoding_of, initial_weights, log_odds
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import CalibratedNoise
from fedfin.privacy.noise import SimulatedNoise

__all__ = ["Baseline", "Forecast", "baseline_of", "forecast", "num_seeds"]

_SEEDS: Final = 8
_SEEDS_OF_ATTENTION: Final = 4  # one of its trainings takes as long as fifty of the others'
_STUDENT_T: Final = {8: 2.365, 4: 3.182}  # 97.5% quantile, by the number of seeds
_NO_NOISE: Final = 1e-12  # the private step without its noise: the engine takes no multiplier of 0
_BOOTSTRAP_SEED: Final = 20_240_101

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The same model and plan without noise, on the held-out loans.

    Attributes:
        scores: Its scores, log odds, shape (n_holdout,).
        auroc: Without clipping.
        clipped_auroc: With every loan's gradient clipped to the plan's bound: the difference is what clipping costs.
    """

    scores: Scores
    auroc: float
    clipped_auroc: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the noise of one plan costs; intervals are 95%, over the seeds of the noise.

    Attributes:
        alone_auroc: Mean AUROC of this lender's model with the plan's clipping and noise, no other lender beside it.
        alone_loss: The baseline without clipping and noise less that.
        held_out_margin: How far other held-out loans could move `alone_loss`: half of its 95% bootstrap interval.
        num_lenders: K, of the estimate for a federation of lenders like this one; its loss lies about between the two.
        federation_low: The baseline less the mean AUROC at the federation's noise. Too small where noise cures the
            overfitting of one lender's few loans: a federation has K times as many.
        federation_high: What only the scatter of the noise costs, as if it cured nothing.
    """

    alone_auroc: float
    alone_loss: Interval
    held_out_margin: float
    num_lenders: int
    federation_low: Interval
    federation_high: Interval


def num_seeds(plan: JobPlan) -> int:
    """Return the number of trainings with noise behind each figure."""
    return _SEEDS_OF_ATTENTION if plan.model.kind == "attention" else _SEEDS


def baseline_of(loans: PreparedLoans, plan: JobPlan, done: Callable[[], None]) -> Baseline:
    """Train the plan's model without noise: once as without privacy, once clipped.

    Args:
        loans: The lender's own.
        plan: Mode local.
        done: Called after each training, twice in all.

    Raises:
        TrainingError: Training diverged.
    """
    scores = _scores(loans, plan, None, 0)
    done()
    clipped = _scores(loans, plan, CalibratedNoise(0.0, _NO_NOISE), 0)
    done()
    labels = loans.holdout.labels
    return Baseline(scores, auroc(labels, scores), auroc(labels, clipped))


def forecast(
    loans: PreparedLoans,
    plan: JobPlan,
    noise: CalibratedNoise,
    baseline: Baseline,
    *,
    num_lenders: int,
    done: Callable[[], None],
) -> Forecast:
    """Return what the plan's noise costs this lender alone and a federation of lenders like it.

    In such a federation a step's mean gradient carries the noise of K lenders over K times the loans, as if one
    lender trained with the noise multiplier over sqrt(K). The averaging of updates after AdamW's local steps is not
    imitated, nor what the other lenders' loans add. `benchmarks/forecast.py` holds both ends against federations.

    Args:
        loans: The lender's own.
        plan: Mode local.
        noise: Its calibrated noise.
        baseline: Of the same loans and plan.
        num_lenders: K >= 1.
        done: Called after each training, 2 * `num_seeds` times in all.

    Raises:
        TrainingError: Training diverged.
    """
    labels = loans.holdout.labels

    def trained(factor: float) -> list[Scores]:
        scaled = CalibratedNoise(
            noise.bins_noise_multiplier * factor, noise.training_noise_multiplier * factor
        )
        runs: list[Scores] = []
        for seed in range(num_seeds(plan)):
            runs.append(_scores(loans, plan, scaled, seed))
            done()
        return runs

    alone, together = trained(1.0), trained(1.0 / math.sqrt(num_lenders))
    losses = _losses(labels, baseline, alone)
    median = alone[int(np.argsort(losses)[len(losses) // 2])]
    around = bootstrap_gain(labels, baseline.scores, median, np.random.default_rng(_BOOTSTRAP_SEED))
    return Forecast(
        alone_auroc=float(baseline.auroc - losses.mean()),
        alone_loss=_mean_interval(losses),
        held_out_margin=(around.high - around.low) / 2,
        num_lenders=num_lenders,
        federation_low=_mean_interval(_losses(labels, baseline, together)),
        federation_high=_scatter_loss(labels, together),
    )


def _losses(labels: NDArray[np.int64], baseline: Baseline, runs: Sequence[Scores]) -> NDArray[np.float64]:
    return baseline.auroc - np.array([auroc(labels, scores) for scores in runs])


def _mean_interval(losses: NDArray[np.float64]) -> Interval:
    return _interval(float(losses.mean()), float(losses.std(ddof=1) / math.sqrt(len(losses))), len(losses))


def _scatter_loss(labels: NDArray[np.int64], runs: Sequence[Scores]) -> Interval:
    """Return the AUROC of the mean score less the mean AUROC, with a jackknife interval over the draws.

    The mean score of S draws still carries 1/S of the noise's variance, which S / (S - 1) makes good where the loss
    is quadratic in the noise.
    """
    aurocs = np.array([auroc(labels, scores) for scores in runs])
    total = np.sum(runs, axis=0)
    num = len(runs)

    def loss(mean_score: Scores, mean_auroc: float, count: int) -> float:
        return (auroc(labels, mean_score) - mean_auroc) * count / (count - 1)

    estimate = loss(total / num, float(aurocs.mean()), num)
    without = np.array(
        [
            loss((total - scores) / (num - 1), float((aurocs.sum() - one) / (num - 1)), num - 1)
            for scores, one in zip(runs, aurocs, strict=True)
        ]
    )
    stderr = math.sqrt((num - 1) / num * float(((without - without.mean()) ** 2).sum()))
    return _interval(estimate, stderr, num)


def _interval(estimate: float, stderr: float, num_draws: int) -> Interval:
    margin = _STUDENT_T[num_draws] * stderr
    return Interval(estimate, estimate - margin, estimate + margin)


def _scores(loans: PreparedLoans, plan: JobPlan, noise: CalibratedNoise | None, seed: int) -> Scores:
    """Train a whole job at one lender and return the held-out loans' log odds; without noise, without clipping."""
    schema, train = loans.schema, loans.train
    source = SimulatedNoise(seed)
    counts = noisy_histogram(
        train.frame, schema, None if noise is None else noise.bins_noise_multiplier, source
    )
    bins = bins_from_histogram(counts, schema, plan.model.max_bins)
    architecture = architecture_of(plan.model, schema, bins)
    encoding = encoding_of(plan.model.kind)
    inputs = encode(train.frame, schema, bins, encoding)
    privacy = (
        None if noise is None else LocalPrivacy(noise.training_noise_multiplier, plan.privacy.clipping_bound)
    )
    weights = train_rounds(
        initial_weights(architecture, plan.model.seed),
        inputs,
        train.labels,
        architecture=architecture,
        training=plan.training,
        privacy=privacy,
        noise=source,
    )
    return log_odds(architecture, weights, encode(loans.holdout.frame, schema, bins, encoding))

"""Membership inference against a released model, as anyone who has the model could try it.

The attack is LiRA: shadow models are trained on random halves of the lender's loans, under the plan of the released
model; for each loan, the confidence that shadows give it is fitted by a Gaussian where they trained on it and by
another where they did not, and the released model's confidence is held against both. The lender knows who is a
member, so it can see how well that works.

It is a black-box attack, weaker than the audit in `fedfin.client.auditing`: it sees one model and not every step, and
ordinary loans and not the worst ones. It can show a leak; it cannot show that there is none. Nothing of it leaves.

Source: Carlini et al., "Membership Inference Attacks From First Principles" (IEEE S&P 2022), algorithm 1 with one
variance for all loans (section VI-A, for few shadow models).
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.client.training import LocalPrivacy, train_rounds
from fedfin.credit.binning import encode
from fedfin.credit.export import ReleasedModel, load_model
from fedfin.credit.metrics import bootstrap_gain
from fedfin.credit.models import Architecture, architecture_of, encoding_of, initial_weights, log_odds
from fedfin.errors import DataError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import calibrate
from fedfin.privacy.lower_bounds import clopper_pearson
from fedfin.privacy.noise import SimulatedNoise

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fedfin.credit.source import Loans

__all__ = ["AtFalsePositives", "MembershipReport", "attack", "attack_kept", "attack_released", "train_job"]

NUM_SHADOWS: Final = 64
_MOST_LOANS: Final = 2000  # of each side: enough for a rate of .001
_FEWEST_LOANS: Final = 20  # of each side
_FALSE_POSITIVES: Final = (0.01, 0.001)
_SIDE_ERROR: Final = 0.025  # 95% intervals
_SEED: Final = 20_240_101  # of shadows and resamples, which reveal nothing: the result stays here


@dataclass(frozen=True, slots=True)
class AtFalsePositives:
    """How many members the attack finds where it may accuse this share of the others wrongly.

    Attributes:
        false_positive_rate: Allowed; an attack by chance finds as many members.
        true_positive_rate: Found.
        low: Lower end of the 95% interval, at this threshold.
        high: Upper end.
    """

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MembershipReport:
    """How well members can be told from others by the released model.

    Attributes:
        num_members: Loans that trained it.
        num_others: Loans that did not.
        num_shadows: Shadow models.
        auroc: Of the attack; 0.5 is chance, 1 is certainty.
        low: Lower end of its 95% interval (bootstrap over loans).
        high: Upper end.
        rates: At small shares of false positives; without those for which there are too few other loans.
        seconds: Of the attack.
        caveats: Why the figures may not be about this model's own loans, in words.
    """

    num_members: int
    num_others: int
    num_shadows: int
    auroc: float
    low: float
    high: float
    rates: tuple[AtFalsePositives, ...]
    seconds: float
    caveats: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """The result in words."""
        if self.low > 0.5:
            found = (
                "The attack tells loans that trained the model from loans that did not better than chance: the model"
                " remembers loans. Lower privacy.epsilon, or train fewer steps"
            )
        else:
            found = "The attack is no better than chance, as far as this many loans can tell"
        return (
            f"{found}. This is what a stranger with the model and like loans of its own can do, and weaker than the"
            " audit of the training itself (`fedfin privacy audit` without --model-dir): it can show a leak, and never"
            " that there is none."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report for --json."""
        return {**asdict(self), "confidence": 1.0 - 2.0 * _SIDE_ERROR, "meaning": self.meaning}


def attack_kept(
    folder: LenderFolder, directory: Path, *, progress: "Callable[[int, int], None] | None" = None
) -> MembershipReport:
    """Attack a model that the lender received, on its training and held-out loans as they are now.

    Args:
        folder: The lender's.
        directory: The model's, `models/<digest>`.
        progress: Called with the shadow models trained and all of them.

    Raises:
        ConfigError: The model or a source cannot be read.
        DataError: The loans break the schema, or are too few.
    """
    model = load_model(directory)
    loans = prepare(folder, looking=True)
    caveats: list[str] = []
    accepted = folder.job(model.job_id).accepted() or {}
    if accepted.get("snapshot") != loans.snapshot.digest:
        caveats.append(
            f"the training loans are not those that job {model.job_id} trained on: not all that count as members are"
        )
    if folder.config.holdout.source is not None:
        caveats.append(
            "the held-out loans come from another source: where they differ in kind, that difference is measured too"
        )
    report = attack_released(model, loans.train, loans.holdout, progress=progress)
    return replace(report, caveats=tuple(caveats))


def attack_released(
    model: "ReleasedModel",
    train: "Loans",
    holdout: "Loans",
    *,
    progress: "Callable[[int, int], None] | None" = None,
) -> MembershipReport:
    """Attack a released model on the lender's own loans.

    Args:
        model: The released one.
        train: Loans that trained it; at most 2000 of them are looked at.
        holdout: Loans that did not, of the same kind; at most 2000.
        progress: Called with the shadow models trained and all of them.

    Raises:
        DataError: There are too few loans on one side.
    """
    rng = np.random.default_rng(_SEED)
    plan = JobPlan.model_validate_json(model.plan)
    encoded: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    for side in (train, holdout):
        rows = rng.permutation(len(side))[:_MOST_LOANS]
        frame = side.frame.iloc[rows].reset_index(drop=True)
        encoded.append(encode(frame, model.schema, model.bins, encoding_of(plan.model.kind)))
        labels.append(side.labels[rows])
    return attack(
        model.weights,
        np.vstack(encoded),
        np.concatenate(labels),
        np.arange(len(labels[0]) + len(labels[1])) < len(labels[0]),
        architecture=architecture_of(plan.model, model.schema, model.bins),
        plan=plan,
        rng=rng,
        progress=progress,
    )


def attack(
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    members: "NDArray[np.bool_]",
    *,
    architecture: Architecture,
    plan: JobPlan,
    rng: np.random.Generator,
    num_shadows: int = NUM_SHADOWS,
    progress: "Callable[[int, int], None] | None" = None,
) -> MembershipReport:
    """Attack a model on encoded loans.

    Args:
        weights: The released model's, shape (d,).
        loans: Members and others, shape (n, p); not changed.
        labels: 1 = bad, shape (n,).
        members: Which loans trained the model, shape (n,); 20 of each side at least.
        architecture: The model's.
        plan: How it was trained; the shadows are trained so.
        rng: Draws the halves, the shadows' noise and the resamples.
        num_shadows: Even, >= 2.
        progress: Called with the shadow models trained and all of them.

    Raises:
        DataError: There are too few loans on one side.
    """
    started = time.monotonic()
    num_members, num_others = int(members.sum()), int((~members).sum())
    if min(num_members, num_others) < _FEWEST_LOANS:
        msg = (
            f"the attack compares {num_members} loans that trained the model with {num_others} that did not; it needs"
            f" {_FEWEST_LOANS} of each: raise holdout.fraction in bank.yaml, or wait for more loans"
        )
        raise DataError(msg)
    inside, confidences = _shadows(loans, labels, architecture, plan, rng, num_shadows, progress)
    scores = _likelihood_ratios(_confidence(architecture, weights, loans, labels), inside, confidences)
    gain = bootstrap_gain(members.astype(np.int64), scores, np.zeros(len(scores)), rng)  # over a coin
    return MembershipReport(
        num_members,
        num_others,
        num_shadows,
        0.5 + gain.estimate,
        0.5 + gain.low,
        0.5 + gain.high,
        tuple(_at(scores, members, rate) for rate in _FALSE_POSITIVES if num_others * rate >= 1.0 - 1e-9),
        time.monotonic() - started,
    )


def train_job(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    architecture: Architecture,
    plan: JobPlan,
    noise: SimulatedNoise,
) -> "NDArray[np.float32]":
    """Return the weights that a whole job on one lender's loans ends with, shape (d,).

    Args:
        loans: Encoded, shape (n, p).
        labels: 1 = bad, shape (n,).
        architecture: The plan's model.
        plan: The job; its noise is the lender's own in mode `local`, and none in any other.
        noise: Seeded: what is trained here never leaves.
    """
    privacy = None
    if plan.privacy.mode == "local":
        calibrated = calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)
        privacy = LocalPrivacy(calibrated.training_noise_multiplier, plan.privacy.clipping_bound)
    return train_rounds(
        initial_weights(architecture, plan.model.seed),
        loans,
        labels,
        architecture=architecture,
        training=plan.training,
        privacy=privacy,
        noise=noise,
    )


def _shadows(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    architecture: Architecture,
    plan: JobPlan,
    rng: np.random.Generator,
    num_shadows: int,
    progress: "Callable[[int, int], None] | None",
) -> "tuple[NDArray[np.bool_], NDArray[np.float64]]":
    """Return which loans each shadow trained on and its confidences, both (shadows, n).

    Shadows come in pairs, one on each half, so that every loan is in half of them.
    """
    inside: list[NDArray[np.bool_]] = []
    confidences: list[NDArray[np.float64]] = []
    for number in range(num_shadows):
        if number % 2:
            half = ~inside[-1]
        else:
            half = np.zeros(len(loans), np.bool_)
            half[rng.permutation(len(loans))[: len(loans) // 2]] = True
        noise = SimulatedNoise(int(rng.integers(2**63)))
        weights = train_job(loans[half], labels[half], architecture, plan, noise)
        inside.append(half)
        confidences.append(_confidence(architecture, weights, loans, labels))
        if progress is not None:
            progress(number + 1, num_shadows)
    return np.array(inside), np.array(confidences)


def _confidence(
    architecture: Architecture,
    weights: "NDArray[np.float32]",
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
) -> "NDArray[np.float64]":
    """Return the log odds that the model gives each loan's own outcome, shape (n,)."""
    of_bad = log_odds(architecture, weights, loans)
    return np.where(labels == 1, of_bad, -of_bad)


def _likelihood_ratios(
    observed: "NDArray[np.float64]", inside: "NDArray[np.bool_]", confidences: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """Return each loan's log likelihood as a member over that as another, shape (n,)."""
    likelihoods: list[NDArray[np.float64]] = []
    for side in (inside, ~inside):
        counts = side.sum(axis=0)
        means = (confidences * side).sum(axis=0) / counts
        # one variance for all loans: a loan's own would rest on a few dozen shadows
        variance = float((((confidences - means) * side) ** 2).sum() / side.sum()) + 1e-12
        likelihoods.append(-((observed - means) ** 2) / (2.0 * variance) - 0.5 * np.log(variance))
    return likelihoods[0] - likelihoods[1]


def _at(scores: "NDArray[np.float64]", members: "NDArray[np.bool_]", rate: float) -> AtFalsePositives:
    others = np.sort(scores[~members])[::-1]
    threshold = others[int(rate * len(others) + 1e-9)]  # so many others score above it
    found, num = int((scores[members] > threshold).sum()), int(members.sum())
    low, high = clopper_pearson(found, num, _SIDE_ERROR)
    return AtFalsePositives(rate, found / num, low, high)

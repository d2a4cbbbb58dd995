"""The three arms of the comparison, in one process: each lender alone, the federation, and all loans pooled.

The federation here calls the very functions that client and server call over the network (histograms, bins,
local training, FedAvg), so its figures are those of the real one up to the order of additions and the noise,
which is seeded here. `alone` and `pooled` are `fedfin.client.alone.train_alone`, on one lender's loans and on all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfin.client.alone import LoneModel, train_alone
from fedfin.client.histograms import noisy_histogram
from fedfin.client.training import LocalPrivacy, train_locally
from fedfin.credit.binning import bins_from_histogram, encode, histogram_size
from fedfin.credit.metrics import auroc
from fedfin.credit.models import (
    architecture_of,
    encoding_of,
    initial_weights,
    num_parameters,
)
from fedfin.plan import JobPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy.accounting import calibrate
from fedfin.simulation.federated import FederatedModel, lender_noises
from fedfin.simulation.shared import federate_shared
from fedfin.strategies.fedavg import fedavg
from fedfin.strategies.strategy import CohortSum, ModelState, lender_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.credit.source import Loans
    from fedfin.simulation.partition import DemoSplit

__all__ = [
    "Arms",
    "FederatedModel",
    "LenderArm",
    "compare_arms",
    "demo_plan",
    "federate",
    "take_rows",
    "train_pooled",
]


@dataclass(frozen=True, slots=True)
class LenderArm:
    """One lender without the others: its name, its number of training loans, its AUROC on the held-out loans."""

    name: str
    num_loans: int
    auroc: float


@dataclass(frozen=True, slots=True)
class Arms:
    """AUROC of every arm on the same held-out loans.

    Attributes:
        banks: The large lenders alone.
        small_lenders: The small lenders alone.
        federated: The one model of the federation.
        pooled: What nobody may do: `train_alone` on all lenders' loans together.
    """

    banks: tuple[LenderArm, ...]
    small_lenders: tuple[LenderArm, ...]
    federated: float
    pooled: float

    @property
    def small_lender_gain(self) -> float:
        """Mean over the small lenders of federated minus alone."""
        return self.federated - float(np.mean([lender.auroc for lender in self.small_lenders]))


def demo_plan(epsilon: float | None = 3.0, rounds: int | None = None) -> JobPlan:
    """Return a job with the plan's defaults, mode local unless epsilon is None, for the arms in one process.

    What `fedfin demo` itself runs is `fedfin.simulation.demo_job.demo_job`.

    Args:
        epsilon: Of the whole job, at delta 1e-5; None trains without privacy.
        rounds: None takes the plan's default.
    """
    training = TrainingPlan() if rounds is None else TrainingPlan(rounds=rounds)
    privacy = PrivacyPlan(mode="none") if epsilon is None else PrivacyPlan(epsilon=epsilon)
    return JobPlan(name="demo", training=training, privacy=privacy)


def federate(lenders: "list[Loans]", schema: "Schema", plan: JobPlan, seed: int) -> FederatedModel:
    """Run a whole job in this process: bins from summed histograms, then all rounds with every lender.

    Args:
        lenders: Each lender's training loans; not changed.
        schema: The columns.
        plan: The job.
        seed: Draws each lender's batches and noise; two lenders never share a stream.
    """
    if plan.privacy.mode == "shared":
        return federate_shared(lenders, schema, plan, seed)
    noises = lender_noises(seed, len(lenders))
    calibrated = (
        None
        if plan.privacy.mode == "none"
        else calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)
    )
    counts = np.zeros(histogram_size(schema))
    for loans, noise in zip(lenders, noises, strict=True):
        counts += noisy_histogram(
            loans.frame, schema, None if calibrated is None else calibrated.bins_noise_multiplier, noise
        )
    bins = bins_from_histogram(counts, schema, plan.model.max_bins)
    encoding = encoding_of(plan.model.kind)
    architecture = architecture_of(plan.model, schema, bins)
    encoded = [encode(loans.frame, schema, bins, encoding) for loans in lenders]
    privacy = (
        None
        if calibrated is None
        else LocalPrivacy(calibrated.training_noise_multiplier, plan.privacy.clipping_bound)
    )
    state = ModelState(initial_weights(architecture, plan.model.seed), 0)
    for _ in range(plan.training.rounds):
        values, weight = np.zeros(num_parameters(architecture)), 0.0
        for inputs, loans, noise in zip(encoded, lenders, noises, strict=True):
            update = train_locally(
                state.weights,
                inputs,
                loans.labels,
                architecture=architecture,
                training=plan.training,
                privacy=privacy,
                noise=noise,
            )
            own_weight = lender_weight(len(loans), plan.training)
            values += own_weight * update.astype(np.float64)
            weight += own_weight
        state = fedavg(state, CohortSum(values, weight, len(lenders)))
    return FederatedModel(schema, bins, architecture, state.weights)


def take_rows(loans: "Loans", rows: "NDArray[np.int64]") -> "Loans":
    """Return the loans at these positions, in this order."""
    return type(loans)(loans.frame.iloc[rows].reset_index(drop=True), loans.labels[rows])


def train_pooled(loans: "Loans", split: "DemoSplit", schema: "Schema", seed: int) -> LoneModel:
    """Return the model of a lender that had all training loans of the split."""
    rows = np.sort(np.concatenate([lender.rows for lender in split.lenders]))
    pooled = take_rows(loans, rows)
    return train_alone(pooled.frame, pooled.labels, schema, np.random.default_rng(seed))


def compare_arms(loans: "Loans", split: "DemoSplit", schema: "Schema", plan: JobPlan, seed: int) -> Arms:
    """Train every arm and return its AUROC on the split's held-out loans.

    Args:
        loans: The whole table; not changed.
        split: Who trains on what.
        schema: The columns.
        plan: The federation's job.
        seed: Draws noise, batches and folds.
    """
    held_out = take_rows(loans, split.held_out)

    def held_out_auroc(model: LoneModel | FederatedModel) -> float:
        return auroc(held_out.labels, model.predict(held_out.frame))

    alone: list[LenderArm] = []
    for position, lender in enumerate(split.lenders):
        own = take_rows(loans, lender.rows)
        model = train_alone(own.frame, own.labels, schema, np.random.default_rng([seed, position]))
        alone.append(LenderArm(lender.name, len(own), held_out_auroc(model)))
    federated = federate([take_rows(loans, lender.rows) for lender in split.lenders], schema, plan, seed)
    pooled = train_pooled(loans, split, schema, seed)
    num_banks = len(split.banks)
    return Arms(
        tuple(alone[:num_banks]), tuple(alone[num_banks:]), held_out_auroc(federated), held_out_auroc(pooled)
    )

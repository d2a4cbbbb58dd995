"""Mode `shared` in one process: noise in shares on plain integer sums, and the trusted central run beside it.

Every lender's part is the code it would run in a federation: its histogram, its clipped sum of gradients, the encoding
and its share of the noise; only the secure aggregation around the sum of integers is not there. Noise is seeded.

The trusted central run is what the mode is measured against: someone who may see all loans adds continuous noise once
to the very same sums. It has the same guarantee, and needs a trust that no federation has.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fedfin.credit.binning import (
    bins_from_histogram,
    encode,
    histogram,
    histogram_sensitivity,
    histogram_size,
)
from fedfin.credit.drift import num_cells
from fedfin.credit.models import (
    architecture_of,
    build,
    encoding_of,
    initial_weights,
    largest_model,
    load_weights,
)
from fedfin.privacy.accounting import calibrate
from fedfin.privacy.gradients import PerLoanGradients
from fedfin.privacy.noise import SimulatedNoise
from fedfin.privacy.shared_accounting import SharedSums, calibrate_shared, shared_sums
from fedfin.privacy.shares import ShareScheme, add_share, encode_sum, make_scheme, publish
from fedfin.simulation.federated import FederatedModel, lender_noises
from fedfin.strategies.fedsgd import fedsgd
from fedfin.strategies.strategy import CohortSum, ModelState
from fedfin.strategies.sums import total_loans

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.credit.source import Loans
    from fedfin.plan import JobPlan

__all__ = ["central", "federate_shared", "sums_of"]

_Values: TypeAlias = "NDArray[np.float64]"
Publish: TypeAlias = "Callable[[Sequence[_Values]], _Values]"
"""Turns the lenders' sums into the noisy sum that everyone sees."""


def federate_shared(
    lenders: "Sequence[Loans]", schema: "Schema", plan: "JobPlan", seed: int
) -> FederatedModel:
    """Run a whole job of mode `shared`: bins from one noisy sum, then one noisy sum of gradients a round.

    In each sum as many lenders as the plan allows fail to answer, drawn at random; the colluders it allows answer.

    Args:
        lenders: Each lender's training loans; not changed.
        schema: The columns.
        plan: The job; mode `shared`.
        seed: Draws batches, drop-outs and every lender's noise; two lenders never share a stream.

    Raises:
        PrivacyParameterError: There are fewer lenders than the plan's quorum, or no noise meets the plan.
    """
    sums = sums_of(schema, plan, len(lenders))
    noise = calibrate_shared(
        plan.privacy, sums, sample_rate=plan.training.sample_rate, num_rounds=plan.training.rounds
    )
    sources = lender_noises(seed, len(lenders))
    dropouts = np.random.default_rng([seed, len(lenders)])

    def publish_histogram(counts: Sequence[_Values]) -> _Values:
        return _share_and_publish(
            counts, make_scheme(noise.bins_noise_multiplier, sums.cohort, sums.histogram), sources, dropouts
        )

    def publish_gradient(gradients: Sequence[_Values]) -> _Values:
        shape = sums.gradient_of(len(gradients[0]))
        scheme = make_scheme(noise.training_noise_multiplier, sums.cohort, shape)
        return _share_and_publish(gradients, scheme, sources, dropouts)

    return _train(lenders, schema, plan, sources, publish_histogram, publish_gradient)


def central(lenders: "Sequence[Loans]", schema: "Schema", plan: "JobPlan", seed: int) -> FederatedModel:
    """Run the same job as someone trusted with all loans would: continuous noise once on each sum.

    Args:
        lenders: As in `federate_shared`.
        schema: The columns.
        plan: As there; what it says of drop-outs and colluders has no meaning here.
        seed: Draws batches and noise.
    """
    training, privacy = plan.training, plan.privacy
    local = privacy.model_copy(update={"mode": "local"})
    noise = calibrate(local, sample_rate=training.sample_rate, num_steps=training.rounds)
    *sources, trusted = lender_noises(seed, len(lenders) + 1)

    def publish_with(stddev: float, sums: Sequence[_Values]) -> _Values:
        total: _Values = np.sum(sums, axis=0)
        return total + trusted.normal(len(total), stddev)

    return _train(
        lenders,
        schema,
        plan,
        sources,
        partial(publish_with, noise.bins_noise_multiplier * histogram_sensitivity(schema)),
        partial(publish_with, noise.training_noise_multiplier * privacy.clipping_bound),
    )


def sums_of(schema: "Schema", plan: "JobPlan", num_lenders: int) -> SharedSums:
    """Return what a job adds up, before its bins are known."""
    return shared_sums(
        plan,
        num_lenders=num_lenders,
        num_cells=histogram_size(schema),
        num_features=len(schema.features),
        num_parameters=largest_model(plan.model, schema),
    )


def _train(
    lenders: "Sequence[Loans]",
    schema: "Schema",
    plan: "JobPlan",
    sources: Sequence[SimulatedNoise],
    publish_histogram: Publish,
    publish_gradient: Publish,
) -> FederatedModel:
    """Run the job with these ways to publish a sum; each lender draws its batches from its own source."""
    training = plan.training
    counts = publish_histogram([histogram(loans.frame, schema).astype(np.float64) for loans in lenders])
    bins = bins_from_histogram(counts, schema, plan.model.max_bins)
    architecture = architecture_of(plan.model, schema, bins)
    encoded = [encode(loans.frame, schema, bins, encoding_of(architecture.kind)) for loans in lenders]
    column_cells = [num_cells(column) for column in schema.features]
    expected = training.sample_rate * total_loans(counts, column_cells)
    module = build(architecture)
    per_loan = PerLoanGradients(module)
    state = ModelState(initial_weights(architecture, plan.model.seed), 0)
    for _ in range(training.rounds):
        load_weights(module, state.weights)
        gradients: list[_Values] = []
        for inputs, loans, source in zip(encoded, lenders, sources, strict=True):
            batch = source.bernoulli(len(inputs), training.sample_rate)
            gradients.append(
                per_loan.clipped_sum(inputs[batch], loans.labels[batch], plan.privacy.clipping_bound)
            )
        cohort_sum = CohortSum(publish_gradient(gradients), expected, len(lenders))
        state = fedsgd(state, cohort_sum, training)
    return FederatedModel(schema, bins, architecture, state.weights)


def _share_and_publish(
    values: Sequence[_Values],
    scheme: ShareScheme,
    sources: Sequence[SimulatedNoise],
    dropouts: np.random.Generator,
) -> _Values:
    """Return the noisy sum of the lenders that answer; integers are added as the ring would add them."""
    answering = np.sort(dropouts.permutation(len(values))[scheme.cohort.num_dropouts :])
    total = np.zeros(scheme.shape.size, dtype=np.int64)
    for position in answering:
        total += add_share(encode_sum(values[position], scheme), scheme, sources[position])
    return publish(total, len(answering), scheme)

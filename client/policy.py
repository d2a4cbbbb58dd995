"""What a lender agrees to. The coordinator's word is never enough: every proposal passes here first.

Each rule names its key of bank.yaml, so that a refusal, the log and `fedfin client dry-run` speak of the same thing.
What depends on the clock or on people stands in `hours` and `job_approval`, what on the budget in the ledger.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedfin.config import LenderPolicy
from fedfin.credit.models import largest_model
from fedfin.credit.schema import Schema
from fedfin.errors import PolicyRefusalError
from fedfin.plan import JobPlan

__all__ = [
    "MAX_WEIGHT",
    "Breach",
    "breaches",
    "check_colluders",
    "check_plan",
    "check_schema",
    "check_size",
    "check_weights",
    "colluder_breaches",
    "schema_breaches",
]

MAX_WEIGHT: Final = 1e4
"""Larger weights serve no model; crafted ones make chosen loans overflow."""


@dataclass(frozen=True, slots=True)
class Breach:
    """One rule that a job breaks.

    Attributes:
        key: The key of `policy` in bank.yaml.
        reason: What was seen and what would be accepted, in one sentence.
    """

    key: str
    reason: str


def check_plan(plan: JobPlan, policy: LenderPolicy) -> None:
    """Hold a proposed plan against the lender's policy.

    Raises:
        PolicyRefusalError: Names the first key that the policy does not allow, its value, and what would.
    """
    _raise_first(breaches(plan, policy))


def check_schema(plan: JobPlan, schema: Schema, policy: LenderPolicy) -> None:
    """Hold what a plan does with the schema's columns against the policy; errors as `check_plan`."""
    _raise_first(schema_breaches(plan, schema, policy))


def check_colluders(plan: JobPlan, num_members: int, policy: LenderPolicy) -> None:
    """Hold the colluders that a plan's noise stands against to the policy; says nothing of modes but shared.

    Args:
        plan: The plan.
        num_members: Members of the roster.
        policy: The lender's.

    Raises:
        PolicyRefusalError: With so few colluders planned for, lenders that the masks withstand could take off noise.
    """
    _raise_first(colluder_breaches(plan, num_members, policy))


def check_size(num_parameters: int, policy: LenderPolicy) -> None:
    """Hold a model's size against the policy.

    Raises:
        PolicyRefusalError: The model has more parameters than the lender accepts.
    """
    if num_parameters > policy.max_parameters:
        msg = f"the model has {num_parameters} parameters, and this lender accepts at most {policy.max_parameters}"
        raise PolicyRefusalError(msg)


def check_weights(weights: NDArray[np.float32]) -> None:
    """Refuse weights that no training makes, without looking at a loan.

    Raises:
        PolicyRefusalError: A weight is not finite or beyond `MAX_WEIGHT`.
    """
    if not np.abs(weights).max(initial=0.0) <= MAX_WEIGHT:
        msg = f"the coordinator's model has weights beyond {MAX_WEIGHT:g}; it has diverged: start a new job"
        raise PolicyRefusalError(msg)


def breaches(plan: JobPlan, policy: LenderPolicy) -> Iterator[Breach]:
    """Yield every rule that a plan breaks by itself, whatever the schema and the roster."""
    if not any(fnmatchcase(plan.name, pattern) for pattern in policy.jobs):
        yield Breach("jobs", f"job.name is {plan.name}, and this lender accepts {', '.join(policy.jobs)}")
    yield from _privacy_breaches(plan, policy)
    if plan.model.kind not in policy.models:
        yield Breach(
            "models",
            f"model.kind is {plan.model.kind}, and this lender accepts {', '.join(policy.models)}; change it",
        )
    training = plan.training
    if training.rounds > policy.max_rounds:
        yield Breach(
            "max_rounds",
            f"training.rounds is {training.rounds}, and this lender accepts {policy.max_rounds}; lower it",
        )
    if training.local_steps > policy.max_local_steps:
        yield Breach(
            "max_local_steps",
            f"training.local_steps is {training.local_steps}, and this lender accepts {policy.max_local_steps}; lower"
            " it",
        )
    if training.weight_bucket < policy.min_weight_bucket:
        yield Breach(
            "min_weight_bucket",
            f"training.weight_bucket is {training.weight_bucket}, which would tell this lender's size too exactly; it"
            f" accepts {policy.min_weight_bucket} and more",
        )
    if plan.aggregation == "secure" and plan.cohort.min_lenders < policy.min_cohort:
        yield Breach(
            "min_cohort",
            f"cohort.min_lenders is {plan.cohort.min_lenders}, and this lender joins cohorts of {policy.min_cohort} and"
            " more only; raise it, or the lender lowers policy.min_cohort in its bank.yaml and restarts",
        )


def _privacy_breaches(plan: JobPlan, policy: LenderPolicy) -> Iterator[Breach]:
    privacy = plan.privacy
    if privacy.mode == "none" and not policy.allow_no_privacy:
        yield Breach(
            "allow_no_privacy",
            "privacy.mode is none, and this lender's policy.allow_no_privacy is false; use mode local",
        )
    if privacy.mode != "none" and privacy.mode not in policy.privacy_modes:
        accepted = " or ".join(policy.privacy_modes) or "none of the private modes"
        yield Breach("privacy_modes", f"privacy.mode is {privacy.mode}, and this lender accepts {accepted}")
    if plan.aggregation == "plain" and not policy.allow_plain_aggregation:
        yield Breach(
            "allow_plain_aggregation",
            "aggregation is plain, which shows the coordinator this lender's answers by themselves, and this lender's"
            " policy.allow_plain_aggregation is false; use aggregation secure",
        )
    if privacy.mode == "none":
        return
    if privacy.delta > policy.max_delta:
        yield Breach(
            "max_delta",
            f"privacy.delta is {privacy.delta:g}, and this lender accepts at most {policy.max_delta:g}; lower it",
        )
    most = policy.max_epsilon_per_job
    if most is not None and privacy.epsilon > most:
        yield Breach(
            "max_epsilon_per_job",
            f"privacy.epsilon is {privacy.epsilon:g}, and this lender accepts at most {most:g} for one job; lower it",
        )


def schema_breaches(plan: JobPlan, schema: Schema, policy: LenderPolicy) -> Iterator[Breach]:
    """Yield every rule that a plan breaks with this schema.

    Protected attributes of the schema itself are no features unless it says why (`Schema.features`); the lender's own
    list holds it to those that it does not mark.
    """
    features = {column.name: column for column in schema.features}
    if policy.columns is not None and (others := [name for name in features if name not in policy.columns]):
        yield Breach(
            "columns",
            f"the schema's features {', '.join(others)} are not among those that this lender lets a job use; take them"
            " out of the schema, or the lender adds them to policy.columns in its bank.yaml and restarts",
        )
    for name in policy.protected:
        column = features.get(name)
        if column is not None and column.protected_as_feature is None:
            yield Breach(
                "protected",
                f"the schema makes {name} a feature, and this lender holds it to be a protected attribute; mark it"
                " protected in the schema, with the reason in words (protected_as_feature) if it is to be a feature",
            )
    largest = largest_model(plan.model, schema)
    if largest > policy.max_parameters:
        yield Breach(
            "max_parameters",
            f"the plan's model has up to {largest} parameters, and this lender accepts at most"
            f" {policy.max_parameters}; lower model.max_bins or model.hidden",
        )


def colluder_breaches(plan: JobPlan, num_members: int, policy: LenderPolicy) -> Iterator[Breach]:
    """Yield the rule of `check_colluders`, where a plan breaks it."""
    least = policy.min_planned_colluders
    if least is None:
        least = max(0, math.ceil(num_members / 3) - 1)
    if plan.privacy.mode == "shared" and plan.privacy.planned_colluders < least:
        yield Breach(
            "min_planned_colluders",
            f"privacy.planned_colluders is {plan.privacy.planned_colluders}, and this lender wants noise that"
            f" stands against {least} of {num_members} lenders that tell their shares; raise it",
        )


def _raise_first(found: Iterator[Breach]) -> None:
    breach = next(found, None)
    if breach is not None:
        raise PolicyRefusalError(breach.reason)

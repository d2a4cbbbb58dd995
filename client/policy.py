"""What a lender agrees to. The coordinator's word is never enough: every proposal passes here first."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedfin.config import LenderPolicy
from fedfin.errors import PolicyRefusalError
from fedfin.plan import JobPlan

__all__ = ["MAX_WEIGHT", "check_colluders", "check_plan", "check_size", "check_weights"]

MAX_WEIGHT: Final = 1e4
"""Larger weights serve no model; crafted ones make chosen loans overflow."""


def check_plan(plan: JobPlan, policy: LenderPolicy) -> None:
    """Hold a proposed plan against the lender's policy.

    Raises:
        PolicyRefusalError: Names the first key that the policy does not allow, its value, and what would.
    """
    privacy = plan.privacy
    if privacy.mode == "none" and not policy.allow_no_privacy:
        msg = "privacy.mode is none, and this lender's policy.allow_no_privacy is false; use mode local"
        raise PolicyRefusalError(msg)
    if plan.aggregation == "plain" and not policy.allow_plain_aggregation:
        msg = (
            "aggregation is plain, which shows the coordinator this lender's answers by themselves, and this lender's"
            " policy.allow_plain_aggregation is false; use aggregation secure"
        )
        raise PolicyRefusalError(msg)
    if privacy.mode != "none" and privacy.delta > policy.max_delta:
        msg = f"privacy.delta is {privacy.delta:g}, and this lender accepts at most {policy.max_delta:g}; lower it"
        raise PolicyRefusalError(msg)
    if plan.model.kind not in policy.models:
        msg = (
            f"model.kind is {plan.model.kind}, and this lender accepts {', '.join(policy.models)}; change it"
        )
        raise PolicyRefusalError(msg)
    if plan.training.rounds > policy.max_rounds:
        msg = f"training.rounds is {plan.training.rounds}, and this lender accepts {policy.max_rounds}; lower it"
        raise PolicyRefusalError(msg)
    if plan.training.local_steps > policy.max_local_steps:
        msg = (
            f"training.local_steps is {plan.training.local_steps}, and this lender accepts {policy.max_local_steps};"
            " lower it"
        )
        raise PolicyRefusalError(msg)
    if plan.training.weight_bucket < policy.min_weight_bucket:
        msg = (
            f"training.weight_bucket is {plan.training.weight_bucket}, which would tell this lender's size too exactly;"
            f" it accepts {policy.min_weight_bucket} and more"
        )
        raise PolicyRefusalError(msg)
    if plan.aggregation == "secure" and plan.cohort.min_lenders < policy.min_cohort:
        msg = (
            f"cohort.min_lenders is {plan.cohort.min_lenders}, and this lender joins cohorts of {policy.min_cohort}"
            " and more only; raise it, or the lender lowers policy.min_cohort in its bank.yaml and restarts"
        )
        raise PolicyRefusalError(msg)


def check_colluders(plan: JobPlan, num_members: int, policy: LenderPolicy) -> None:
    """Hold the colluders that a plan's noise stands against to the policy; says nothing of modes but shared.

    Args:
        plan: The plan.
        num_members: Members of the roster.
        policy: The lender's.

    Raises:
        PolicyRefusalError: With so few colluders planned for, lenders that the masks withstand could take off noise.
    """
    least = policy.min_planned_colluders
    if least is None:
        least = max(0, math.ceil(num_members / 3) - 1)
    if plan.privacy.mode == "shared" and plan.privacy.planned_colluders < least:
        msg = (
            f"privacy.planned_colluders is {plan.privacy.planned_colluders}, and this lender wants noise that"
            f" stands against {least} of {num_members} lenders that tell their shares; raise it"
        )
        raise PolicyRefusalError(msg)


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

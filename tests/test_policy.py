"""What a lender agrees to: each refusal names the key, its value and what would be accepted."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfin.client.policy import check_plan, check_size
from fedfin.config import LenderPolicy
from fedfin.errors import PolicyRefusalError
from fedfin.plan import JobPlan


def plan_with(**sections):
    return JobPlan.model_validate(sections)


def test_the_default_plan_passes_the_default_policy():
    check_plan(JobPlan(), LenderPolicy())


@pytest.mark.parametrize(
    ("plan", "policy", "refusal"),
    [
        (
            {"privacy": {"mode": "none"}},
            {},
            "privacy.mode is none, and this lender's policy.allow_no_privacy is false; use mode local",
        ),
        (
            {"privacy": {"mode": "shared"}, "training": {"local_steps": 1}},
            {},
            (
                "privacy.mode is shared, and this release of fedfin has no secure aggregation: a share of the noise"
                " alone does not protect these loans; use mode local"
            ),
        ),
        (
            {"privacy": {"delta": 2e-5}},
            {"max_delta": 1e-5},
            "privacy.delta is 2e-05, and this lender accepts at most 1e-05; lower it",
        ),
        (
            {"model": {"kind": "mlp"}},
            {"models": ("logistic",)},
            "model.kind is mlp, and this lender accepts logistic; change it",
        ),
        (
            {"training": {"rounds": 21}},
            {"max_rounds": 20},
            "training.rounds is 21, and this lender accepts 20; lower it",
        ),
        (
            {"cohort": {"min_lenders": 2}},
            {"min_cohort": 3},
            "cohort.min_lenders is 2, and this lender joins cohorts of 3 and more only; raise it",
        ),
    ],
    ids=["no-privacy", "shared", "delta", "model", "rounds", "cohort"],
)
def test_a_plan_outside_the_policy_is_refused_by_key_value_and_mend(plan, policy, refusal):
    with pytest.raises(PolicyRefusalError, match=f"^{re.escape(refusal)}$"):
        check_plan(plan_with(**plan), LenderPolicy(**policy))


@pytest.mark.parametrize(
    ("plan", "policy"),
    [
        ({"privacy": {"mode": "none"}}, {"allow_no_privacy": True}),
        ({"privacy": {"mode": "none", "delta": 9e-3}}, {"allow_no_privacy": True, "max_delta": 1e-6}),
        ({"privacy": {"delta": 1e-5}}, {"max_delta": 1e-5}),
        ({"model": {"kind": "mlp"}}, {"models": ("mlp",)}),
        ({"training": {"rounds": 20}}, {"max_rounds": 20}),
        ({"cohort": {"min_lenders": 3}}, {"min_cohort": 3}),
    ],
    ids=["no-privacy", "no-privacy-has-no-delta", "delta", "model", "rounds", "cohort"],
)
def test_the_mend_that_a_refusal_names_is_enough(plan, policy):
    check_plan(plan_with(**plan), LenderPolicy(**policy))


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 100), st.integers(1, 100))
def test_a_plan_passes_exactly_when_every_limit_holds(rounds, max_rounds, min_lenders, min_cohort):
    plan = plan_with(training={"rounds": rounds}, cohort={"min_lenders": min_lenders})
    policy = LenderPolicy(max_rounds=max_rounds, min_cohort=min_cohort)
    if rounds <= max_rounds and min_lenders >= min_cohort:
        check_plan(plan, policy)
    else:
        with pytest.raises(PolicyRefusalError):
            check_plan(plan, policy)


def test_permission_for_no_privacy_does_not_loosen_private_jobs():
    with pytest.raises(PolicyRefusalError, match=r"privacy\.delta is 0\.001"):
        check_plan(plan_with(privacy={"delta": 1e-3}), LenderPolicy(allow_no_privacy=True))


def test_a_model_larger_than_the_policys_is_refused():
    check_size(100, LenderPolicy(max_parameters=100))
    with pytest.raises(
        PolicyRefusalError, match=r"^the model has 101 parameters, and this lender accepts at most 100$"
    ):
        check_size(101, LenderPolicy(max_parameters=100))

"""What a lender agrees to: each refusal names the key, its value and what would be accepted."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedfin.client.policy import check_colluders, check_plan, check_size
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
            {"aggregation": "plain"},
            {},
            (
                "aggregation is plain, which shows the coordinator this lender's answers by themselves, and this"
                " lender's policy.allow_plain_aggregation is false; use aggregation secure"
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
            {"cohort": {"min_lenders": 4}},
            {},
            (
                "cohort.min_lenders is 4, and this lender joins cohorts of 5 and more only; raise it, or the lender"
                " lowers policy.min_cohort in its bank.yaml and restarts"
            ),
        ),
    ],
    ids=["no-privacy", "plain", "delta", "model", "rounds", "cohort"],
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
        ({"privacy": {"mode": "shared"}, "training": {"local_steps": 1}}, {}),
        ({"aggregation": "plain"}, {"allow_plain_aggregation": True}),
        ({"aggregation": "plain", "cohort": {"min_lenders": 1}}, {"allow_plain_aggregation": True}),
    ],
    ids=[
        *("no-privacy", "no-privacy-has-no-delta", "delta", "model", "rounds", "cohort", "shared", "plain"),
        "plain-has-no-cohort",
    ],
)
def test_the_mend_that_a_refusal_names_is_enough(plan, policy):
    check_plan(plan_with(**plan), LenderPolicy(**policy))


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(3, 100), st.integers(3, 100))
def test_a_plan_passes_exactly_when_every_limit_holds(rounds, max_rounds, min_lenders, min_cohort):
    plan = plan_with(training={"rounds": rounds}, cohort={"min_lenders": min_lenders})
    policy = LenderPolicy(max_rounds=max_rounds, min_cohort=min_cohort)
    if rounds <= max_rounds and min_lenders >= min_cohort:
        check_plan(plan, policy)
    else:
        with pytest.raises(PolicyRefusalError):
            check_plan(plan, policy)


@pytest.mark.parametrize("min_cohort", [0, 1, 2])
def test_no_policy_lets_a_lender_into_a_sum_of_two(min_cohort):
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        LenderPolicy(min_cohort=min_cohort)


def test_permission_for_no_privacy_does_not_loosen_private_jobs():
    with pytest.raises(PolicyRefusalError, match=r"privacy\.delta is 0\.001"):
        check_plan(plan_with(privacy={"delta": 1e-3}), LenderPolicy(allow_no_privacy=True))


def test_a_model_larger_than_the_policys_is_refused():
    check_size(100, LenderPolicy(max_parameters=100))
    with pytest.raises(
        PolicyRefusalError, match=r"^the model has 101 parameters, and this lender accepts at most 100$"
    ):
        check_size(101, LenderPolicy(max_parameters=100))


@pytest.mark.parametrize(("num_members", "least"), [(3, 0), (4, 1), (6, 1), (7, 2), (8, 2), (10, 3)])
def test_shared_noise_stands_against_as_many_as_the_masks_do(num_members, least):
    def plan(colluders):
        privacy = {"mode": "shared", "planned_colluders": colluders}
        return plan_with(privacy=privacy, training={"local_steps": 1})

    check_colluders(plan(least), num_members, LenderPolicy())
    if least:
        with pytest.raises(PolicyRefusalError, match=f"against {least} of {num_members} lenders"):
            check_colluders(plan(least - 1), num_members, LenderPolicy())


def test_a_lender_may_want_more_colluders_planned_for_or_fewer():
    plan = plan_with(privacy={"mode": "shared", "planned_colluders": 1}, training={"local_steps": 1})
    check_colluders(plan, 30, LenderPolicy(min_planned_colluders=1))
    with pytest.raises(PolicyRefusalError, match="against 2 of 3 lenders that tell their shares; raise it"):
        check_colluders(plan, 3, LenderPolicy(min_planned_colluders=2))
    check_colluders(plan_with(), 30, LenderPolicy())  # mode local rests on nobody

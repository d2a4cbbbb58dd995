"""What a lender agrees to: each refusal names the key, its value and what would be accepted."""

import hashlib
import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedfin.approver import public_line
from fedfin.client.policy import (
    breaches,
    check_colluders,
    check_plan,
    check_schema,
    check_size,
    schema_breaches,
)
from fedfin.config import LenderPolicy
from fedfin.credit.models import largest_model
from fedfin.credit.schema import Schema
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
        (
            {"name": "marketing"},
            {"jobs": ("credit", "credit-*")},
            "job.name is marketing, and this lender accepts credit, credit-*",
        ),
        (
            {"privacy": {"mode": "shared"}, "training": {"local_steps": 1}},
            {"privacy_modes": ("local",)},
            "privacy.mode is shared, and this lender accepts local",
        ),
        (
            {},
            {"privacy_modes": ()},
            "privacy.mode is local, and this lender accepts none of the private modes",
        ),
        (
            {"privacy": {"epsilon": 2.0}},
            {"max_epsilon_per_job": 1.5},
            "privacy.epsilon is 2, and this lender accepts at most 1.5 for one job; lower it",
        ),
    ],
    ids=[
        *("no-privacy", "plain", "delta", "model", "rounds", "cohort"),
        *("job", "mode", "no-mode", "epsilon"),
    ],
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
        ({"name": "credit-2026"}, {"jobs": ("marketing", "credit-????")}),
        ({"privacy": {"mode": "shared"}, "training": {"local_steps": 1}}, {"privacy_modes": ("shared",)}),
        ({"privacy": {"epsilon": 1.5}}, {"max_epsilon_per_job": 1.5}),
        ({"privacy": {"mode": "none", "epsilon": 9}}, {"allow_no_privacy": True, "max_epsilon_per_job": 1.5}),
        ({"privacy": {"mode": "none"}}, {"allow_no_privacy": True, "privacy_modes": ()}),
    ],
    ids=[
        *("no-privacy", "no-privacy-has-no-delta", "delta", "model", "rounds", "cohort", "shared", "plain"),
        *("plain-has-no-cohort", "job", "mode", "epsilon", "no-privacy-has-no-epsilon", "no-privacy-apart"),
    ],
)
def test_the_mend_that_a_refusal_names_is_enough(plan, policy):
    check_plan(plan_with(**plan), LenderPolicy(**policy))


def test_every_breach_is_found_and_named_by_its_key():
    plan = plan_with(
        name="marketing",
        aggregation="plain",
        model={"kind": "mlp"},
        training={"rounds": 9, "local_steps": 9, "weight_bucket": 1},
        privacy={"epsilon": 9.0, "delta": 1e-3},
    )
    policy = LenderPolicy(
        jobs=("credit",),
        privacy_modes=("shared",),
        models=("logistic",),
        max_rounds=8,
        max_local_steps=8,
        max_epsilon_per_job=1.0,
    )
    assert [breach.key for breach in breaches(plan, policy)] == [
        *("jobs", "privacy_modes", "allow_plain_aggregation", "max_delta", "max_epsilon_per_job", "models"),
        *("max_rounds", "max_local_steps", "min_weight_bucket"),
    ]


SCHEMA = """
label: {name: bad, bad: 1, good: 0, definition: 90 days past due}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 8}
  - {name: home, kind: categorical, categories: [owner, rent]}
  - {name: sex, kind: categorical, categories: [f, m], SEX}
"""


def schema_with(sex="protected: false"):
    return Schema.from_yaml(SCHEMA.replace("SEX", sex), "schema.yaml")


def schema_keys(schema, **policy):
    return [breach.key for breach in schema_breaches(JobPlan(), schema, LenderPolicy(**policy))]


def test_a_schema_with_a_feature_that_the_lender_does_not_lend_is_refused():
    assert schema_keys(schema_with(), columns=("income", "home", "sex", "not_in_the_schema")) == []
    assert schema_keys(schema_with("protected: true"), columns=("income", "home")) == []  # sex is no feature
    with pytest.raises(
        PolicyRefusalError, match=r"^the schema's features home, sex are not among .*policy\.columns"
    ):
        check_schema(JobPlan(), schema_with(), LenderPolicy(columns=("income",)))


def test_what_a_lender_holds_to_be_protected_is_a_feature_only_where_the_schema_says_why():
    assert schema_keys(schema_with("protected: true"), protected=("sex",)) == []
    reason = "protected: true, protected_as_feature: the law of the land asks for it"
    assert schema_keys(schema_with(reason), protected=("sex",)) == []
    assert schema_keys(schema_with(), protected=("age", "sex")) == ["protected"]
    with pytest.raises(
        PolicyRefusalError, match=r"^the schema makes sex a feature, and this lender holds it to be"
    ):
        check_schema(JobPlan(), schema_with(), LenderPolicy(protected=("sex",)))


def test_a_plan_whose_largest_model_is_too_large_is_refused_before_anything_is_spent():
    largest = largest_model(JobPlan().model, schema_with())
    assert schema_keys(schema_with(), max_parameters=largest) == []
    assert schema_keys(schema_with(), max_parameters=largest - 1) == ["max_parameters"]


def test_a_policys_digest_tells_every_change_and_no_order_of_keys():
    assert LenderPolicy().digest() == LenderPolicy.model_validate({"jobs": ["*"], "max_rounds": 200}).digest()
    found = {
        LenderPolicy(**change).digest()
        for change in ({}, {"max_rounds": 199}, {"hours": "01:00-02:00", "time_zone": "UTC"})
    }
    assert len(found) == 3
    canonical = json.dumps(LenderPolicy().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    assert LenderPolicy().digest() == hashlib.sha256(canonical.encode()).hexdigest()


KEY = public_line(Ed25519PrivateKey.generate().public_key())
OTHER = public_line(Ed25519PrivateKey.generate().public_key())


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"hours": "22:00-06:00"}, "hours and time_zone go together"),
        ({"time_zone": "UTC"}, "hours and time_zone go together"),
        ({"hours": "22:00-22:00", "time_zone": "UTC"}, "either none or all"),
        ({"hours": "24:00-06:00", "time_zone": "UTC"}, "should match pattern"),
        ({"hours": "22:00-06:00", "time_zone": "Atlantis"}, "'Atlantis' is not known here"),
        ({"hours": "22:00-06:00", "time_zone": "../../etc/passwd"}, "is not known here"),
        ({"columns": ["income; drop"]}, "no name that a column of a schema can have"),
        ({"approvals_needed": 1}, "approvals_needed is 1, and approvers names 0"),
        ({"approvals_needed": 3}, "less than or equal to 2"),
        ({"approvers": [{"name": "a", "key": KEY}, {"name": "b", "key": KEY}]}, "have the same key"),
        ({"approvers": [{"name": "a", "key": KEY}, {"name": "a", "key": OTHER}]}, "have the same name"),
        (
            {"approvers": [{"name": "a", "key": "ed25519:abc"}]},
            "is the word that `fedfin client make-approver` prints",
        ),
        # the last digit of base64 has bits to spare: the same 32 bytes under another word
        ({"approvers": [{"name": "a", "key": "ed25519:" + "A" * 42 + "B="}]}, "is the word that"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused_with_its_mend(keys, complaint):
    with pytest.raises(ValidationError, match=re.escape(complaint)):
        LenderPolicy.model_validate(keys)


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

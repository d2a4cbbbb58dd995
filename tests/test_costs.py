"""What a private job costs a lender: in mode shared the reservation covers every cohort that may be asked."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lenders import schema
from secure_lenders import JOB, NAMES, Cohort, secure_plan, write_folders

from fedfin.client.costs import costs_of, covering, require_covered
from fedfin.errors import PrivacyParameterError
from fedfin.privacy.accounting import GaussianEvent, epsilon_rdp, job_events
from fedfin.privacy.evaluation_noise import evaluation_job
from fedfin.privacy.events import merge_events
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.shared_events import shared_event
from fedfin.strategies.sums import bins_scheme, round_scheme


def test_in_mode_local_a_job_costs_its_own_noise():
    plan = secure_plan("local")
    costs = costs_of(plan, schema(), 0)
    assert costs.whole == job_events(costs.noise, plan.training.sample_rate, plan.num_steps)
    assert merge_events([costs.bins, *[costs.round] * plan.training.rounds]) == merge_events(costs.whole)


@settings(max_examples=5, deadline=None)
@given(st.integers(5, 30), st.integers(0, 2), st.integers(0, 2), st.floats(0.5, 8.0))
def test_in_mode_shared_every_cohort_costs_at_most_what_is_reserved(
    num_members, dropouts, colluders, epsilon
):
    privacy = {
        "mode": "shared",
        "epsilon": epsilon,
        "planned_dropouts": dropouts,
        "planned_colluders": colluders,
    }
    plan = secure_plan("shared", privacy=privacy)
    costs = costs_of(plan, schema(), num_members)
    for num_lenders in range(5, num_members + 1):
        one = shared_event(bins_scheme(costs.noise, costs.sums, num_lenders))
        require_covered(one, costs.bins)
        for size in {1, 20, costs.sums.gradient.size}:
            scheme = round_scheme(costs.noise, costs.sums, size, num_lenders)
            require_covered(shared_event(scheme, sample_rate=plan.training.sample_rate), costs.round)
    assert epsilon_rdp(costs.whole, plan.privacy.delta) <= epsilon * (1 + 1e-6)


def test_what_may_cost_more_than_the_reservation_is_refused():
    costs = costs_of(secure_plan("shared"), schema(), 6)
    for change in (
        {"noise_multiplier": costs.round.noise_multiplier * 0.999},
        {"sample_rate": 0.6},
        {"count": 2},
        {"share_stddev": 1000},
        {"num_lenders": 10**6},
    ):
        with pytest.raises(PrivacyParameterError, match="more than what is reserved"):
            require_covered(replace(costs.round, **change), costs.round)
    with pytest.raises(PrivacyParameterError, match="more than what is reserved"):
        require_covered(costs.bins, GaussianEvent(costs.bins.noise_multiplier))
    require_covered(replace(costs.round, noise_multiplier=costs.round.noise_multiplier * 2), costs.round)


def test_a_covering_event_is_no_cheaper_than_any_of_its_own():
    costs = costs_of(secure_plan("shared"), schema(), 6)
    schemes = [bins_scheme(costs.noise, costs.sums, n) for n in (5, 6)]
    worst = covering(schemes)
    assert worst.noise_multiplier == min(scheme.noise_multiplier for scheme in schemes)
    assert epsilon_rdp([worst], 1e-5) >= max(epsilon_rdp([shared_event(one)], 1e-5) for one in schemes)


def test_a_roster_below_the_quorum_has_no_cost():
    with pytest.raises(PrivacyParameterError, match=r"cohort\.min_lenders is 5"):
        costs_of(secure_plan("shared"), schema(), 4)


def test_a_lender_charges_what_it_reserved_whatever_the_cohort(tmp_path):
    """Bins of six lenders, a round of five: the ledger takes both out of the one reservation."""
    job = Cohort(write_folders(tmp_path), secure_plan("shared")).accept()
    bins = job.start(job.bins_question())
    model = job.model(bins.counts(bins.whole()))
    job.start(job.train_question(1, model), NAMES[:5]).whole()
    job.start(job.evaluate_question(1, model), NAMES[:5]).whole()
    costs = costs_of(job.plan, schema(), len(NAMES))
    with Ledger(job.banks["bank-a"].parent / "ledger.db") as ledger:
        entries = ledger.entries()
    reserved = {entry.job_id: entry.events for entry in entries if entry.kind == "reserve"}
    charged = {entry.stage: (entry.job_id, entry.events) for entry in entries if entry.kind == "commit"}
    assert reserved[JOB] == merge_events(costs.whole)
    assert charged["bins"] == (JOB, (costs.bins,))
    assert charged["round 1"] == (JOB, (costs.round,))
    assert charged["evaluation 1"] == (evaluation_job(JOB), reserved[evaluation_job(JOB)])

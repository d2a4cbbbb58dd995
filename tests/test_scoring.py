"""A lender's part in an evaluation: whole counts of its held-out loans, charged to these loans and to no others."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from federation import LOANS as LOANS_PATH
from federation import shares
from hypothesis import given, settings
from hypothesis import strategies as st
from lender_log import logged
from lenders import JOB, PLAN, lender_folder, open_lender, proposal, train_request
from typer.testing import CliRunner

from fedfin.audit.events import Consent
from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.client.scoring import (
    evaluation_counts,
    event_of_evaluation,
    noisy_evaluation,
    reserve_evaluations,
    scheme_of_evaluation,
)
from fedfin.client.status import status_of
from fedfin.credit.binning import Bins, encode
from fedfin.credit.models import architecture_of, encoding_of, predict
from fedfin.credit.score_counts import (
    NUM_SCORE_CELLS,
    cell_centres,
    cell_edges,
    count_scores,
    evaluation_cells,
    evaluation_sensitivity,
    split_counts,
)
from fedfin.errors import BudgetSpentError, DataError, PrivacyParameterError
from fedfin.plan import EvaluationPlan, JobPlan, PrivacyPlan
from fedfin.privacy.accounting import epsilon_rdp
from fedfin.privacy.evaluation_noise import evaluation_event, evaluation_job, evaluation_scheme
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.noise import SecureNoise, SimulatedNoise
from fedfin.privacy.shared_events import shared_event
from fedfin.simulation.partition import demo_loans
from fedfin.update import (
    Accepted,
    AskHistogram,
    Evaluate,
    Finish,
    Refused,
    Scores,
    Train,
    Update,
    decode,
)
from fedfin.update import encode as encode_message

LOANS, SCHEMA = demo_loans()
NUM_PROTECTED = 2
JUDGED = PLAN.model_copy(update={"evaluation": EvaluationPlan(times=2, cutoff=0.3)})
LIMIT = {"epsilon_limit": 2.0}  # PLAN asks for all of it


def entries(bank):
    with LenderFolder(bank).ledger() as ledger:
        return [(entry.kind, entry.job_id, entry.stage) for entry in ledger.entries()]


def configure(bank, **sections):
    config = yaml.safe_load(bank.read_text())
    bank.write_text(yaml.safe_dump({**config, **sections}))


def write_loans(path, rows):
    table = pd.read_csv(LOANS_PATH, dtype=str, keep_default_na=False)
    table.iloc[rows].to_csv(path, index=False)


def with_held_out_file(bank, rows, **source):
    write_loans(bank.parent / "held_out.csv", rows)
    configure(bank, holdout={"source": {"path": "held_out.csv", **source}})


@pytest.fixture
def bank(tmp_path):
    return lender_folder(tmp_path / "north-bank", **LIMIT)


@pytest.fixture
def lender(bank):
    """A lender that has accepted `JUDGED`."""
    opened = open_lender(bank)
    decode(opened.answer(proposal(JUDGED)), Accepted)
    yield opened
    opened.close()


def evaluate_request(lender, number, *, shift=0.0, job=JOB):
    """The question of an evaluation, with bins of the lender's own histogram."""
    train = decode(
        train_request(lender.answer(encode_message(AskHistogram(job))), 1, JUDGED, shift=shift), Train
    )
    return Evaluate(job, number, train.bins, train.fingerprint, train.weights)


def ask(lender, question):
    return lender.answer(encode_message(question))


# Counts


@st.composite
def scored(draw):
    """Rows of the demo's table, with probabilities of any kind."""
    rows = draw(st.lists(st.integers(0, len(LOANS) - 1), min_size=2, max_size=30))
    probability = st.one_of(
        st.sampled_from([0.0, 1.0, 0.2, np.nan, *map(float, cell_edges()[:5])]), st.floats(0.0, 1.0)
    )
    probabilities = draw(st.lists(probability, min_size=len(rows), max_size=len(rows)))
    return LOANS.frame.iloc[rows], LOANS.labels[rows], np.array(probabilities)


@given(scored(), st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_one_loan_more_moves_the_counts_by_exactly_the_stated_sensitivity(loans, cutoff):
    frame, labels, probabilities = loans
    whole = count_scores(frame, labels, probabilities, SCHEMA, cutoff)
    less = count_scores(frame.iloc[1:], labels[1:], probabilities[1:], SCHEMA, cutoff)
    assert evaluation_sensitivity(SCHEMA) == math.sqrt(1 + NUM_PROTECTED)
    assert np.linalg.norm(whole - less) == pytest.approx(evaluation_sensitivity(SCHEMA))
    assert sorted((whole - less)[whole != less]) == [1] * (1 + NUM_PROTECTED)


@given(scored())
@settings(max_examples=40)
def test_a_loan_is_counted_in_the_cell_of_its_outcome_and_probability(loans):
    frame, labels, probabilities = loans
    counts = split_counts(count_scores(frame, labels, probabilities, SCHEMA, 0.2).astype(float), SCHEMA)
    edges, sure = cell_edges(), np.where(np.isnan(probabilities), 1.0, probabilities)
    for cell in range(NUM_SCORE_CELLS):
        upper = sure <= 1.0 if cell == NUM_SCORE_CELLS - 1 else sure < edges[cell + 1]
        inside = (sure >= edges[cell]) & upper
        assert (counts.good[cell], counts.bad[cell]) == (
            (inside & (labels == 0)).sum(),
            (inside & (labels == 1)).sum(),
        )


def test_cells_are_finer_where_probabilities_are_small():
    edges, centres = cell_edges(), cell_centres()
    assert (edges[0], edges[-1], len(edges)) == (0.0, 1.0, NUM_SCORE_CELLS + 1)
    assert ((edges[:-1] < centres) & (centres < edges[1:])).all()
    widths = np.diff(edges)
    assert widths[np.searchsorted(edges, 0.2) - 1] == pytest.approx(0.02, abs=0.001)
    assert widths[np.searchsorted(edges, 0.01) - 1] == pytest.approx(0.005, abs=0.001)


def test_a_probability_that_is_no_number_counts_as_certain_and_rejected():
    """Weights can be crafted to make it so for chosen loans; an error would tell without noise that they are there."""
    frame, labels = LOANS.frame.iloc[:1], np.array([0])
    crafted = count_scores(frame, labels, np.array([np.nan]), SCHEMA, 0.2)
    assert (crafted == count_scores(frame, labels, np.array([1.0]), SCHEMA, 0.2)).all()


def test_a_lender_counts_its_held_out_loans_as_the_model_scores_them(bank, lender):
    loans = prepare(LenderFolder(bank))
    question = evaluate_request(lender, 1)
    bins = Bins.from_json(question.bins)
    arch = architecture_of(JUDGED.model, SCHEMA, bins)
    counts = evaluation_counts(arch, question.weights, bins, loans.counted, SCHEMA, 0.3)
    inputs = encode(loans.holdout.frame, SCHEMA, bins, encoding_of(arch.kind))
    probabilities = predict(arch, question.weights, inputs)
    expected = count_scores(loans.holdout.frame, loans.holdout.labels, probabilities, SCHEMA, 0.3)
    assert (counts == expected).all()
    assert counts.sum() == (1 + NUM_PROTECTED) * len(loans.holdout)


# Noise


def test_the_noise_is_the_multiplier_times_what_one_loan_moves():
    counts = np.zeros(evaluation_cells(SCHEMA), dtype=np.int64)
    noised = np.concatenate(
        [noisy_evaluation(counts, SCHEMA, 2.0, SimulatedNoise(seed)) for seed in range(100)]
    )
    assert noised.std() == pytest.approx(2.0 * math.sqrt(3), rel=0.03)
    first, second = (noisy_evaluation(counts, SCHEMA, 2.0, SecureNoise()) for _ in range(2))
    assert (first != second).all()


@pytest.mark.parametrize("times", [1, 2, 10])
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_all_evaluations_of_a_job_together_meet_its_epsilon(times, epsilon):
    job = JobPlan(privacy=PrivacyPlan(epsilon=epsilon), evaluation=EvaluationPlan(times=times))
    whole = replace(evaluation_event(job), count=times)
    assert 0.994 * epsilon <= epsilon_rdp([whole], job.privacy.delta) <= epsilon
    assert (whole.sample_rate, whole.sampler) == (1.0, "none")


def shared_job(times, min_lenders=3, **privacy):
    return JobPlan.model_validate(
        {
            "privacy": {"mode": "shared", "epsilon": 1.0, "planned_dropouts": 1, **privacy},
            "training": {"local_steps": 1},
            "cohort": {"min_lenders": min_lenders},
            "evaluation": {"times": times},
        }
    )


@pytest.mark.parametrize(("times", "num_members"), [(1, 3), (3, 20)])
def test_in_mode_shared_what_is_reserved_covers_every_cohort_of_the_roster(times, num_members):
    job = shared_job(times)
    reserved = event_of_evaluation(job, SCHEMA, num_members)
    assert 0.99 <= epsilon_rdp([replace(reserved, count=times)], job.privacy.delta) <= 1.0
    for num_lenders in range(3, num_members + 1):
        event = shared_event(scheme_of_evaluation(job, SCHEMA, num_lenders))
        assert event.noise_multiplier >= reserved.noise_multiplier
        assert event.round_gap <= reserved.round_gap


def test_a_plan_whose_smallest_and_largest_cohort_are_too_far_apart_is_refused(monkeypatch):
    monkeypatch.setattr("fedfin.client.scoring.epsilon_rdp", lambda events, delta: 1.001)
    with pytest.raises(PrivacyParameterError, match=r"any 3 to 5 lenders may cost epsilon 1\.001"):
        event_of_evaluation(shared_job(1), SCHEMA, 5)


@pytest.mark.parametrize(
    "job",
    [JobPlan(), shared_job(0), JobPlan(privacy=PrivacyPlan(mode="none"))],
    ids=["local", "no times", "none"],
)
def test_noise_in_shares_is_for_mode_shared_and_jobs_that_evaluate(job):
    with pytest.raises(
        PrivacyParameterError, match="this noise is for mode shared and one evaluation at least"
    ):
        evaluation_scheme(job, num_lenders=5, num_cells=10, sensitivity=1.0)
    with pytest.raises(PrivacyParameterError, match="this noise is for mode local"):
        evaluation_event(shared_job(1))


# The ledger


def test_evaluations_are_reserved_and_charged_to_the_held_out_loans_alone(bank, lender):
    decode(ask(lender, evaluate_request(lender, 1)), Scores)
    assert entries(bank) == [
        ("reserve", JOB, ""),
        ("reserve", evaluation_job(JOB), ""),
        ("commit", JOB, "bins"),
        ("commit", evaluation_job(JOB), "evaluation 1"),
    ]
    loans = lender.loans
    with LenderFolder(bank).ledger() as ledger:
        training, held_out = loans.snapshot, loans.counted.snapshot
        one = replace(evaluation_event(JUDGED), count=1)
        assert ledger.spent(held_out, 1e-5).events == (one,)
        assert ledger.held(held_out, 1e-5).epsilon_rdp == pytest.approx(2.0, rel=0.006)
        # each side has the whole limit for itself
        assert ledger.held(training, 1e-5).epsilon_rdp == pytest.approx(2.0, rel=0.006)
        assert one not in ledger.held(training, 1e-5).events


def test_the_loans_of_the_two_snapshots_are_disjoint_and_all_there(lender):
    def rows(snapshot):
        return {snapshot.rows[at : at + 16] for at in range(0, len(snapshot.rows), 16)}

    training, held_out = rows(lender.loans.snapshot), rows(lender.loans.counted.snapshot)
    assert training & held_out == set()
    assert len(training) + len(held_out) == 178
    assert lender.loans.snapshot.scheme == lender.loans.counted.snapshot.scheme


def test_an_evaluation_leaves_once_and_a_repeated_question_gets_the_same_answer(bank, lender):
    question = evaluate_request(lender, 1)
    first = ask(lender, question)
    assert ask(lender, question) == first
    assert "one answer" in decode(ask(lender, evaluate_request(lender, 1, shift=0.5)), Refused).reason
    second = decode(ask(lender, evaluate_request(lender, 2)), Scores)
    assert (second.counts != decode(first, Scores).counts).all()
    assert [stage for kind, _, stage in entries(bank) if kind == "commit"].count("evaluation 1") == 1


@pytest.mark.parametrize("number", [0, 3, -1])
def test_an_evaluation_that_the_plan_does_not_have_is_refused(bank, lender, number):
    reason = decode(ask(lender, evaluate_request(lender, number)), Refused).reason
    assert f"evaluation {number} is not one of the plan's 2" in reason
    assert "evaluation" not in "".join(stage for _, _, stage in entries(bank))


def test_what_a_finished_job_did_not_use_of_the_held_out_loans_is_free_again(bank, lender):
    ask(lender, evaluate_request(lender, 1))
    ask(lender, Finish(JOB, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32)))
    assert ("release", evaluation_job(JOB), "") in entries(bank)
    with LenderFolder(bank).ledger() as ledger:
        assert ledger.reserved(lender.loans.counted.snapshot, 1e-5).events == ()


def test_without_evaluations_nothing_is_reserved_of_the_held_out_loans(bank):
    lender = open_lender(bank)
    decode(lender.answer(proposal(PLAN)), Accepted)
    assert entries(bank) == [("reserve", JOB, "")]
    reason = decode(ask(lender, evaluate_request(lender, 1)), Refused).reason
    assert "evaluation 1 is not one of the plan's 0" in reason
    lender.close()


def test_without_privacy_the_counts_are_exact_and_nothing_is_charged(tmp_path):
    bank = lender_folder(tmp_path / "north-bank", allow_no_privacy=True)
    lender = open_lender(bank)
    plan = JUDGED.model_copy(update={"privacy": PrivacyPlan(mode="none")})
    decode(lender.answer(proposal(plan)), Accepted)
    counts = decode(ask(lender, evaluate_request(lender, 1)), Scores).counts
    assert counts.sum() == (1 + NUM_PROTECTED) * len(lender.loans.holdout)
    assert (counts == np.round(counts)).all()
    assert entries(bank) == []
    lender.close()


def test_a_lender_whose_held_out_loans_have_nothing_left_trains_and_declines_the_evaluations(bank):
    """Its training loans are new; its held-out loans were judged in an earlier job."""
    first, second, held_out = shares(3, 600)
    with_held_out_file(bank, held_out)
    for job, rows, takes_part in (("first-1", first, True), ("second-2", second, False)):
        write_loans(bank.parent / "loans.csv", rows)
        lender = open_lender(bank)
        decode(lender.answer(proposal(JUDGED, job=job)), Accepted)
        question = evaluate_request(lender, 1, job=job)
        if takes_part:
            for number in (1, 2):
                decode(ask(lender, replace(question, number=number)), Scores)
        else:
            assert "takes no part in the evaluations" in decode(ask(lender, question), Refused).reason
            train = Train(job, 1, question.bins, question.fingerprint, question.weights)
            decode(ask(lender, train), Update)
        ask(lender, Finish(job, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32)))
        lender.close()
    declined = [event for event in logged(bank.parent, Consent) if event.decision == "evaluations declined"]
    assert [event.job for event in declined] == ["second-2"]
    assert "policy.epsilon_limit" in declined[0].reason


def after_a_job_that_ended(bank, lender, question, fraction):
    """The lender's loans under another split, after a job in which it answered one question."""
    ask(lender, question)
    ask(lender, Finish(JOB, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32)))
    configure(bank, holdout={"fraction": fraction})
    return prepare(LenderFolder(bank))


def test_loans_that_trained_before_the_split_changed_bring_their_spend_to_the_held_out_side(bank, lender):
    loans = after_a_job_that_ended(bank, lender, AskHistogram(JOB), 0.6)
    assert len(loans.holdout) > len(lender.loans.holdout)
    with LenderFolder(bank).ledger() as ledger:
        (bins,) = [entry for entry in ledger.entries() if entry.stage == "bins"]
        assert ledger.spent(loans.counted.snapshot, 1e-5).events == bins.events
        with pytest.raises(BudgetSpentError, match="other snapshots that hold the same loans"):
            reserve_evaluations(ledger, "next-2", JUDGED, loans, LenderFolder(bank).config.policy, 0)


def test_loans_that_were_judged_before_the_split_changed_bring_their_spend_to_the_training_side(bank, lender):
    loans = after_a_job_that_ended(bank, lender, evaluate_request(lender, 1), 0.05)
    assert len(loans.train) > len(lender.loans.train)
    with LenderFolder(bank).ledger() as ledger:
        # the loan that has given most was judged, which is more than the bins of those that trained
        assert ledger.spent(loans.snapshot, 1e-5).events == (evaluation_event(JUDGED),)
    again = open_lender(bank)
    assert "budget" in decode(again.answer(proposal(JUDGED, job="next-2")), Refused).reason
    again.close()


def test_a_held_out_file_is_counted_without_the_loans_that_train_as_well(bank):
    """They would flatter the model, and be charged twice: once as training loans and once as judges."""
    own, others = shares(1, 178)[0], shares(2, 400)[1]
    with_held_out_file(bank, np.concatenate([own[:30], others]))
    loans = prepare(LenderFolder(bank))
    assert len(loans.holdout) == 30 + len(others)
    assert len(loans.counted.loans) == len(others) - len(set(own) & set(others))
    with Ledger(bank.parent / "empty.db") as ledger:
        policy = LenderFolder(bank).config.policy
        ledger.reserve(
            JOB,
            loans.snapshot,
            (evaluation_event(JUDGED),) * 2,
            delta=1e-5,
            epsilon_limit=2.0,
            max_delta=1e-5,
        )
        assert reserve_evaluations(ledger, JOB, JUDGED, loans, policy, 0) == loans.counted


def test_a_held_out_file_of_training_loans_only_judges_nothing(bank):
    with_held_out_file(bank, shares(1, 178)[0][:60])
    loans = prepare(LenderFolder(bank))
    assert loans.counted is None
    lender = open_lender(bank)
    decode(lender.answer(proposal(JUDGED)), Accepted)
    with (
        LenderFolder(bank).ledger() as ledger,
        pytest.raises(DataError, match="that do not train in holdout"),
    ):
        reserve_evaluations(ledger, "next-2", JUDGED, loans, LenderFolder(bank).config.policy, 0)
    assert [entry[1] for entry in entries(bank)] == [JOB]
    lender.close()


def test_held_out_loans_that_are_read_in_another_way_count_as_training_loans(bank):
    """What cannot be compared counts as the same loan: such a lender declines, and its log says what to mend."""
    with_held_out_file(bank, shares(2, 400)[1], columns={"Amount": "Price", "Price": "Amount"})
    lender = open_lender(bank)
    decode(lender.answer(proposal(JUDGED)), Accepted)
    (declined,) = [event for event in logged(bank.parent, Consent) if event.reason is not None]
    assert (
        "give holdout.source the same loan_id, or without one the same columns, values and missing"
        in declined.reason
    )
    assert [entry[1] for entry in entries(bank)] == [JOB]
    lender.close()


def test_held_out_loans_that_changed_since_the_proposal_are_not_counted(bank):
    rows = shares(2, 400)[1]
    with_held_out_file(bank, rows)
    lender = open_lender(bank)
    decode(lender.answer(proposal(JUDGED)), Accepted)
    lender.close()
    write_loans(bank.parent / "held_out.csv", rows[:-5])
    lender = open_lender(bank)
    reason = decode(ask(lender, evaluate_request(lender, 1)), Refused).reason
    assert "held-out loans changed since" in reason
    lender.close()


def test_evaluations_without_a_noise_are_refused_before_anything_is_reserved(bank, monkeypatch):
    def no_noise(*_):
        msg = "no noise"
        raise PrivacyParameterError(msg)

    lender = open_lender(bank)
    monkeypatch.setattr("fedfin.client.scoring.evaluation_event", no_noise)
    decode(lender.answer(proposal(JUDGED)), Refused)
    assert entries(bank) == []
    lender.close()


def test_status_and_ledger_tell_the_held_out_loans_apart(bank, lender):
    decode(ask(lender, evaluate_request(lender, 1)), Scores)
    lender.close()
    held_out = {one["snapshot"]: one["held_out"] for one in status_of(bank)["snapshots"]}
    assert held_out == {lender.loans.snapshot.digest: False, lender.loans.counted.snapshot.digest: True}
    shown = CliRunner().invoke(app, ["privacy", "ledger", "--config", str(bank)]).output
    assert f"held-out loans of snapshot {lender.loans.counted.snapshot.digest[:12]}" in shown
    assert f"\nloans of snapshot {lender.loans.snapshot.digest[:12]}" in f"\n{shown}"
    (released,) = [line for line in shown.splitlines() if "evaluation 1" in line and JOB in line]
    assert len(released) <= 80

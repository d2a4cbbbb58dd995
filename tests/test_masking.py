"""A lender in secure sums: whole jobs end in the exact sum, and what breaks this lender's rules is refused by name."""

import json
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from lender_log import logged
from lenders import lender_folder, open_lender, proposal
from numpy.testing import assert_allclose, assert_array_equal
from secure_lenders import JOB, NAMES, Cohort, refusal_of, secure_plan, write_folders

from fedfin.audit.events import Refusal
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.client.training import train_locally
from fedfin.credit.binning import Bins
from fedfin.credit.models import architecture_of
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.participant import Participant
from fedfin.strategies.sums import blurred_weight
from fedfin.update import (
    Accepted,
    Confirmed,
    Done,
    Finish,
    Masked,
    Open,
    Refused,
    Unmasked,
    decode,
    encode,
)

WITHOUT_LAST = NAMES[:5]
FOLDERS = []


@pytest.fixture
def masked(monkeypatch):
    """Every vector as it was before it was masked, by stage and lender."""
    seen = defaultdict(dict)
    mask = Participant.mask

    def recorded(self, values, threads=1):
        seen[self._context.stage][self._name] = values.copy()
        return mask(self, values, threads)

    monkeypatch.setattr(Participant, "mask", recorded)
    return seen


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """Six lenders' folders, made once and copied for each test; a copy's loans are prepared once as well."""
    directory = tmp_path_factory.mktemp("folders")
    banks = write_folders(directory)
    prepared = {}

    def prepare_once(folder):
        key = (folder.config.name, folder.salt())
        if key not in prepared:
            prepared[key] = prepare(folder)
        return prepared[key]

    for bank in banks.values():
        LenderFolder(bank).salt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedfin.client.lender.prepare", prepare_once)
        FOLDERS.append(directory)
        yield
        FOLDERS.clear()


def cohort(tmp_path, mode="local", **plan):
    shutil.copytree(FOLDERS[0], tmp_path, dirs_exist_ok=True)
    banks = {name: tmp_path / name / "bank.yaml" for name in NAMES}
    return Cohort(banks, secure_plan(mode, **plan)).accept()


def rule_in_log(banks, name):
    return logged(banks[name].parent, Refusal)[-1].rule


def charges(banks, name):
    with Ledger(banks[name].parent / "ledger.db") as ledger:
        return [entry.stage for entry in ledger.entries() if entry.kind == "commit"]


def plain_sum(vectors, survivors, layout):
    total = np.zeros(layout.size, np.uint32)
    for name in survivors:
        total += vectors[name]
    return layout.decode_integers(total)


# Whole jobs


@pytest.mark.parametrize("mode", ["local", "none", "shared"])
def test_a_whole_job_sums_exactly_whoever_is_killed(tmp_path, masked, mode):
    """Bins, two rounds and an evaluation; one lender dies before it masks, another after."""
    job = cohort(tmp_path, mode)
    bins = job.start(job.bins_question())
    totals = {bins: bins.whole()}
    model = job.model(bins.counts(totals[bins]))

    first = job.start(job.train_question(1, model)).open().share()
    job.dead = {"bank-b"}
    first.mask()
    assert first.combiner.survivors == set(NAMES) - {"bank-b"}
    second = job.start(job.train_question(2, model, moved(first)), first.combiner.survivors)
    first.confirm(second)
    totals[first] = first.unmask(second).total()

    job.dead = set()
    second.mask()
    job.dead = {"bank-c"}
    totals[second] = second.confirm().unmask().total()
    assert second.combiner.survivors == set(NAMES) - {"bank-b"}

    job.dead = set()
    scores = job.start(job.evaluate_question(1, model), second.combiner.survivors)
    totals[scores] = scores.whole()
    assert scores.counts(totals[scores]).sum() > 0
    for one, total in totals.items():
        wanted = plain_sum(masked[one.context.stage], one.combiner.survivors, one.layout)
        for name, values in one.layout.decode_integers(total).items():
            assert_array_equal(values, wanted[name])
    stages = ["bins", "round 1", "round 2", "evaluation 1"]
    assert charges(job.banks, "bank-a") == ([] if mode == "none" else stages)
    ask = first.question
    finish = Finish(JOB, "completed", 3, ask.bins, ask.fingerprint, ask.weights)
    for name in NAMES:
        decode(job.lenders[name].answer(encode(finish)), Done)
        assert not (job.banks[name].parent / "jobs" / JOB / "sums").exists()


@pytest.mark.parametrize("weighting", ["size", "sqrt", "equal"])
def test_a_rounds_sum_is_that_of_the_updates_within_half_a_quantum_a_lender(tmp_path, monkeypatch, weighting):
    updates = []

    def recorded(*arguments, **options):
        updates.append(train(*arguments, **options))
        return updates[-1]

    job = cohort(tmp_path, "none", training={"weighting": weighting})
    model = counted_model(job)
    from fedfin.client import stages

    train = stages.train_locally
    monkeypatch.setattr(stages, "train_locally", recorded)
    one = job.start(job.train_question(1, model))
    parts = one.parts(one.whole())
    weights = [weight_of(job, name) for name in NAMES]
    wanted = np.sum(
        [weight * update.astype(np.float64) for weight, update in zip(weights, updates, strict=True)], 0
    )
    step = one.layout.segments[0].step
    assert_allclose(parts["update"], wanted, rtol=0, atol=len(NAMES) / 2 * step)
    if weighting == "size":
        assert parts["weight"][0] == sum(weights)
    else:
        assert ("weight" in parts) == (weighting == "sqrt")


def test_nothing_of_one_lender_is_in_clear(tmp_path):
    """The proposal's answer has no weight, and a vector looks like no other: all of it is masked."""
    job = cohort(tmp_path, "none")
    assert decode(job.lenders["bank-a"].answer(encode(job.proposal())), Accepted).weight == 0.0
    one = job.start(job.bins_question()).open().share()
    answer = decode(job.lenders["bank-a"].answer(encode(one.mask_message("bank-a"))), Masked)
    bytes_seen = np.bincount(answer.values, minlength=256)
    # a histogram's bytes are mostly zero; of a masked one's about one in 256
    assert bytes_seen.max() < 10 * answer.values.size / 256


# Weights


def test_a_weight_is_blurred_and_the_same_in_every_round_and_after_a_restart(tmp_path, masked):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    for number in (1, 2):
        one = job.start(job.train_question(number, model, moved_by(job, model, number)))
        one.whole()
        for name in NAMES:
            assert masked[f"round {number}"][name][-1] == weight_of(job, name)
        job.restart("bank-a")


def test_two_lenders_of_one_size_have_weights_of_their_own(tmp_path):
    names = tuple(f"bank-{number:02}" for number in range(20))
    salts = [LenderFolder(lender_folder(tmp_path / name, name=name)).salt() for name in names]
    plan = secure_plan("none").training
    assert len({blurred_weight(178, plan, salt, 50) for salt in salts}) > 1


# Repetition and restarts


def test_a_repeated_question_gets_the_same_answer_and_another_one_ends_the_sum(tmp_path):
    job = cohort(tmp_path, "local")
    lender = job.lenders["bank-a"]
    one = job.start(job.bins_question())
    following = job.start(job.bins_question())
    asked = [one.open_message()]
    one.open()
    asked.append(one.share_message())
    one.share()
    asked.append(one.mask_message("bank-a"))
    one.mask()
    asked.append(one.confirm_message())
    one.confirm()
    asked.append(one.unmask_message())
    first = [lender.answer(encode(message)) for message in asked]
    one.unmask().total()
    assert [lender.answer(encode(message)) for message in asked] == first
    assert charges(job.banks, "bank-a") == ["bins"]
    assert following.context.attempt == 1
    assert refusal_of(lender, replace(asked[3], survivors=WITHOUT_LAST)).startswith("once: ")
    assert refusal_of(lender, asked[4]).startswith("unknown_sum: ")


@pytest.mark.parametrize("step", ["share", "mask", "confirm", "unmask"])
def test_a_lender_that_was_restarted_declines_the_rest_of_a_sum_and_takes_part_in_the_next(tmp_path, step):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    steps = ["open", "share", "mask", "confirm", "unmask"]
    one = job.start(job.train_question(1, model))
    for before in steps[: steps.index(step)]:
        getattr(one, before)()
    job.restart("bank-a")
    for after in steps[steps.index(step) :]:
        getattr(one, after)()
    assert one.refused["bank-a"].startswith("unknown_sum: ")
    assert rule_in_log(job.banks, "bank-a") == "unknown_sum"
    one.total()
    assert ("bank-a" in one.combiner.survivors) == (step in {"confirm", "unmask"})
    second = job.start(job.train_question(2, model, moved(one)))
    second.whole()
    assert second.combiner.survivors == set(NAMES)


def test_an_attempt_that_was_opened_before_a_restart_is_not_opened_again(tmp_path):
    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question()).open()
    job.restart("bank-a")
    assert refusal_of(job.lenders["bank-a"], one.open_message()).startswith("attempt: ")
    assert rule_in_log(job.banks, "bank-a") == "attempt"


# What leaves is charged


def test_opening_and_sharing_cost_nothing_and_are_tried_again(tmp_path):
    job = cohort(tmp_path, "local")
    job.start(job.bins_question()).open().share()
    assert charges(job.banks, "bank-a") == []
    again = job.start(job.bins_question())
    again.whole()
    assert again.context.attempt == 1
    assert charges(job.banks, "bank-a") == ["bins"]


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_what_left_in_a_private_job_is_not_made_again(tmp_path, mode):
    job = cohort(tmp_path, mode)
    one = job.start(job.bins_question())
    two = job.start(job.bins_question())
    one.open().share()
    two.open().share()  # both are held, as far as before their masks
    one.mask()
    two.mask()
    assert all(reason.startswith("charged: ") for reason in two.refused.values())
    assert refusal_of(job.lenders["bank-a"], job.start(job.bins_question()).open_message()).startswith(
        "charged: "
    )
    assert charges(job.banks, "bank-a") == ["bins"]


@pytest.mark.parametrize("mode", ["local", "shared", "none"])
def test_work_that_fails_is_charged_in_a_private_job_and_the_lender_drops_out(tmp_path, monkeypatch, mode):
    job = cohort(tmp_path, mode)
    one = job.start(job.bins_question()).open().share()

    def fails(*_args, **_kwargs):
        raise FloatingPointError("row 17")

    question = encode(one.mask_message("bank-a"))
    with monkeypatch.context() as patch:
        patch.setattr("fedfin.client.stages.noisy_histogram", fails)
        if mode == "none":
            with pytest.raises(FloatingPointError):
                job.lenders["bank-a"].answer(question)
        else:
            first = job.lenders["bank-a"].answer(question)
            assert "row 17" not in decode(first, Refused).reason
            assert job.lenders["bank-a"].answer(question) == first
    assert charges(job.banks, "bank-a") == ([] if mode == "none" else ["bins"])
    job.dead = {"bank-a"}
    one.mask().confirm().unmask().total()
    assert one.combiner.survivors == set(NAMES) - {"bank-a"}


@pytest.mark.parametrize(
    "dies", ["before the marker", "before it is logged", "before the charge", "before it is sent"]
)
def test_killed_at_any_step_a_vector_leaves_only_after_its_marker_and_its_charge(tmp_path, monkeypatch, dies):
    class Killed(BaseException):
        pass

    def die(*_args, **_kwargs):
        raise Killed

    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question()).open().share()
    target = {
        "before the marker": "fedfin.client.sum_log.SumLog.release",
        "before it is logged": "fedfin.client.journal.Journal.flush",
        "before the charge": "fedfin.privacy.ledger.Ledger.commit",
        "before it is sent": "fedfin.client.witnessing.Witness.attach",
    }[dies]
    with monkeypatch.context() as patch:
        patch.setattr(target, die)
        with pytest.raises(Killed):
            job.lenders["bank-a"].answer(encode(one.mask_message("bank-a")))
    job.restart("bank-a")
    assert charges(job.banks, "bank-a") == (["bins"] if dies == "before it is sent" else [])
    other = job.start(job.bins_question(), WITHOUT_LAST)
    rule = {"before the marker": None, "before it is sent": "charged"}.get(dies, "differencing")
    other.open().share()
    if rule == "charged":
        assert other.refused["bank-a"].startswith("charged: ")
        return
    answer = decode(job.lenders["bank-a"].answer(encode(other.mask_message("bank-a"))), Masked, Refused)
    if rule is None:
        assert isinstance(answer, Masked)
    else:
        # it may have left for all this lender knows: only the same cohort gets it again
        assert answer.reason.startswith("differencing: ")


# The differencing rule


def lost(job, question, names=None, *, confirm=False):
    """A sum that got its vectors, and perhaps its confirmations, and was never unmasked as far as lenders know."""
    one = job.start(question, names).open().share().mask()
    return one.confirm() if confirm else one


def last_reasons(one):
    assert one.refused
    return {reason.partition(":")[0] for reason in one.refused.values()}


@pytest.mark.parametrize("mode", ["none", "local", "shared"])
@pytest.mark.parametrize("nearly", [0.0, 0.9e-5])
def test_an_answered_model_is_answered_again_for_the_identical_cohort_only(tmp_path, mode, nearly):
    job = cohort(tmp_path, mode)
    model = counted_model(job)
    weights = moved_by(job, model, 1)
    lost(job, job.train_question(1, model, weights))
    near = (weights * np.float32(1.0 + nearly)).astype(np.float32)
    other = lost(job, job.train_question(2, model, near), WITHOUT_LAST)
    assert last_reasons(other) == {"differencing"}
    assert set(other.refused) == set(WITHOUT_LAST)
    assert rule_in_log(job.banks, "bank-a") == "differencing"
    assert charges(job.banks, "bank-a") == ([] if mode == "none" else ["bins", "round 1"])
    same = job.start(job.train_question(2, model, near))
    same.whole()
    assert same.refused == {}


@pytest.mark.parametrize("how", ["a bin without loans", "a hair from zero"])
def test_a_model_that_only_looks_like_another_one_is_not_answered_for_another_cohort(tmp_path, how):
    job = cohort(tmp_path, "none")
    bins, arch = counted_model(job)
    first = job.train_question(1, (bins, arch))
    assert not first.weights.any()
    lost(job, first)
    if how == "a bin without loans":
        (name, edges), *others = bins.edges
        wider = Bins(((name, (*edges[:-1], 1e9, 2e9)), *others))
        second = job.train_question(2, (wider, architecture_of(job.plan.model, job.schema, wider)))
        assert second.weights.size == first.weights.size + 1
    else:
        second = job.train_question(2, (bins, arch), first.weights + np.float32(1e-30))
    other = lost(job, second, WITHOUT_LAST)
    assert last_reasons(other) == {"differencing"}
    assert set(other.refused) == set(WITHOUT_LAST)


def test_an_ordinary_drop_out_between_ordinary_rounds_stops_nothing(tmp_path):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    weights = moved_by(job, model, 1)
    lost(job, job.train_question(1, model, weights), confirm=True)
    step = np.linalg.norm(weights) * 1.1e-5 / np.sqrt(weights.size)
    other = job.start(job.train_question(2, model, weights + np.float32(step)), WITHOUT_LAST)
    other.whole()
    assert other.refused == {}


def test_the_rule_holds_where_two_questions_come_at_once(tmp_path, monkeypatch):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    sums = [
        job.start(job.train_question(number, model), names).open().share()
        for number, names in ((1, NAMES), (2, WITHOUT_LAST))
    ]

    def train_slowly(*args, **kwargs):
        time.sleep(0.3)
        return train_locally(*args, **kwargs)

    monkeypatch.setattr("fedfin.client.stages.train_locally", train_slowly)
    asked = [encode(one.mask_message("bank-a")) for one in sums]
    with ThreadPoolExecutor(2) as pool:
        answers = [decode(data, Masked, Refused) for data in pool.map(job.lenders["bank-a"].answer, asked)]
    (refused,) = [answer.reason for answer in answers if isinstance(answer, Refused)]
    assert refused.startswith("differencing: ")


def test_the_rule_holds_after_a_restart(tmp_path):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    lost(job, job.train_question(1, model))
    for name in NAMES:
        job.restart(name)
    assert last_reasons(lost(job, job.train_question(2, model), WITHOUT_LAST)) == {"differencing"}


def test_other_survivors_of_an_answered_model_are_not_confirmed(tmp_path):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    lost(job, job.train_question(1, model), confirm=True)
    again = job.start(job.train_question(2, model)).open().share()
    job.dead = {"bank-f"}  # it shares its keys, and its vector is said not to have arrived
    again.mask().confirm()
    assert last_reasons(again) == {"differencing"}
    assert rule_in_log(job.banks, "bank-a") == "differencing"


def test_an_evaluation_of_a_trained_model_is_no_second_answer(tmp_path):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    lost(job, job.train_question(1, model))
    judged = job.start(job.evaluate_question(1, model), WITHOUT_LAST)
    judged.whole()
    assert judged.refused == {}


def test_without_privacy_a_stage_is_answered_for_one_model_and_one_cohort(tmp_path):
    job = cohort(tmp_path, "none")
    model = counted_model(job)
    assert last_reasons(lost(job, job.bins_question(), WITHOUT_LAST)) == {"differencing"}
    job.start(job.bins_question()).whole()
    lost(job, job.train_question(1, model))
    other = lost(job, job.train_question(1, model, moved_by(job, model, 1)))
    assert last_reasons(other) == {"one_model"}
    assert rule_in_log(job.banks, "bank-a") == "one_model"


# The other rules of this lender


def test_a_cohort_smaller_than_the_policys_is_not_opened(tmp_path):
    job = cohort(tmp_path, "local")
    small = job.start(job.bins_question(), NAMES[:4]).open
    with pytest.raises(Exception, match="0 lenders opened"):
        small().share()
    for name in NAMES[:4]:
        assert rule_in_log(job.banks, name) == "cohort_size"


def test_the_policy_is_held_against_a_sum_even_where_the_plan_asks_less(tmp_path):
    banks = write_folders(tmp_path, min_cohort=6)
    job = Cohort(banks, secure_plan("local"))
    reason = refusal_of(job.lenders["bank-a"], job.proposal())
    assert "this lender joins cohorts of 6 and more only" in reason


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"stage": "round 4"}, "stage"),
        ({"stage": "round 0"}, "stage"),
        ({"stage": "round 01"}, "stage"),
        ({"stage": "evaluation 2"}, "stage"),
        ({"stage": "statistics"}, "stage"),
        ({"federation": "other"}, "other_job"),
        ({"job_id": "other"}, "other_job"),
        ({"plan": "0" * 64}, "other_job"),
        ({"roster": "0" * 64}, "roster"),
        ({"threshold": 2}, "threshold"),
    ],
)
def test_a_sum_that_is_not_of_the_accepted_job_is_not_opened(tmp_path, changes, rule):
    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question(), **changes)
    assert refusal_of(job.lenders["bank-a"], one.open_message()).startswith(f"{rule}: ")
    assert rule_in_log(job.banks, "bank-a") == rule
    assert charges(job.banks, "bank-a") == []


def test_a_context_that_does_not_parse_is_refused(tmp_path):
    job = cohort(tmp_path, "local")
    for text in ("", "{}", "\u00e9", job.start(job.bins_question()).context.to_bytes().decode() + " "):
        assert refusal_of(job.lenders["bank-a"], Open(JOB, text)).startswith("malformed: ")


@pytest.mark.parametrize("what", ["another stage", "another job", "no question", "no message"])
def test_a_question_that_is_not_the_sums_is_refused_before_a_loan_is_looked_at(tmp_path, what):
    job = cohort(tmp_path, "local")
    model = counted_model(job)
    one = job.start(job.train_question(1, model)).open().share()
    data = {
        "another stage": encode(job.train_question(2, model)),
        "another job": encode(replace(job.train_question(1, model), job_id="other")),
        "no question": encode(one.open_message()),
        "no message": b"weights",
    }[what]
    assert refusal_of(job.lenders["bank-a"], one.mask_message("bank-a", data)).startswith("question: ")
    assert rule_in_log(job.banks, "bank-a") == "question"
    assert charges(job.banks, "bank-a") == ["bins"]


def test_a_vector_laid_out_otherwise_is_refused_and_costs_nothing(tmp_path):
    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question(), layout="0" * 64).open().share()
    assert refusal_of(job.lenders["bank-a"], one.mask_message("bank-a")).startswith("layout: ")
    assert charges(job.banks, "bank-a") == []


def test_a_model_that_no_training_makes_is_refused_and_costs_nothing(tmp_path):
    job = cohort(tmp_path, "local")
    model = counted_model(job)
    question = job.train_question(1, model)
    one = job.start(replace(question, weights=question.weights + np.float32(3e38))).open().share()
    assert "beyond" in refusal_of(job.lenders["bank-a"], one.mask_message("bank-a"))
    assert charges(job.banks, "bank-a") == ["bins"]


def test_in_mode_shared_no_more_are_lost_than_the_noise_was_planned_for(tmp_path):
    job = cohort(tmp_path, "shared", privacy={"mode": "shared", "epsilon": 2.0, "planned_colluders": 1})
    one = job.start(job.bins_question()).open()
    job.dead = {"bank-f"}
    one.share()
    assert refusal_of(job.lenders["bank-a"], one.mask_message("bank-a")).startswith("planned_noise: ")
    assert rule_in_log(job.banks, "bank-a") == "planned_noise"
    job.dead = set()
    two = job.start(job.bins_question()).open().share()
    job.dead = {"bank-f"}
    two.mask().confirm()
    assert last_reasons(two) == {"too_few_survivors"}


def test_a_secure_job_answers_no_question_in_clear_and_a_plain_one_none_in_a_sum(tmp_path):
    job = cohort(tmp_path, "local")
    model = counted_model(job)
    for question in (job.bins_question(), job.train_question(1, model), job.evaluate_question(1, model)):
        assert refusal_of(job.lenders["bank-a"], question).startswith("aggregation: ")
        assert rule_in_log(job.banks, "bank-a") == "aggregation"
    plain = open_lender(lender_folder(tmp_path / "plain"))
    plain.answer(proposal())
    assert refusal_of(plain, Open("credit-1234", "")).startswith("aggregation: ")


def test_a_plain_plan_is_refused_unless_the_policy_allows_it(tmp_path):
    lender = open_lender(lender_folder(tmp_path / "bank", allow_plain_aggregation=False))
    assert "policy.allow_plain_aggregation is false" in decode(lender.answer(proposal()), Refused).reason


def test_a_lender_that_takes_no_part_in_evaluations_declines_them_by_rule_and_trains(tmp_path):
    """Its held-out loans have no budget left: an earlier job took it."""
    job = cohort(tmp_path, "local")
    first = job.start(job.bins_question())
    model = job.model(first.counts(first.whole()))
    path = job.banks["bank-a"].parent / "jobs" / JOB / "job.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "counted": ""}))
    job.restart("bank-a")
    one = job.start(job.evaluate_question(1, model))
    assert refusal_of(job.lenders["bank-a"], one.open_message()).startswith("stage: ")
    job.start(job.train_question(1, model)).whole()


# Riding along


def test_what_cannot_be_prepared_keeps_nobody_from_finishing_this_sum(tmp_path):
    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question()).open().share().mask()
    message = replace(one.confirm_message(), next="nonsense")
    for name in NAMES:
        answer = decode(job.lenders[name].answer(encode(message)), Confirmed)
        assert answer.advert == b""
        one.combiner.add_confirmation(name, answer.signature)
    assert rule_in_log(job.banks, "bank-a") == "malformed"
    unmask = replace(one.unmask_message(), adverts={"bank-a": b"nonsense"})
    for name in NAMES:
        answer = decode(job.lenders[name].answer(encode(unmask)), Unmasked)
        assert answer.sealed == {}
        one.combiner.add_shares(name, answer.shares)
    assert one.counts(one.total()).sum() > 0


def test_a_prepared_sum_whose_adverts_break_a_rule_is_dropped_alone(tmp_path):
    job = cohort(tmp_path, "local")
    one = job.start(job.bins_question()).open().share().mask()
    model_less = job.start(job.bins_question())  # any stage: it is dropped before its turn
    following = replace(model_less.context, stage="round 1", attempt=0)
    text = following.to_bytes().decode()
    message = replace(one.confirm_message(), next=text)
    adverts = {}
    for name in NAMES:
        answer = decode(job.lenders[name].answer(encode(message)), Confirmed)
        adverts[name] = answer.advert
        one.combiner.add_confirmation(name, answer.signature)
    swapped = {**adverts, "bank-b": adverts["bank-c"]}
    unmask = replace(one.unmask_message(), adverts=swapped)
    answer = decode(job.lenders["bank-a"].answer(encode(unmask)), Unmasked)
    assert answer.sealed == {}
    assert len(answer.shares) == len(NAMES)
    assert rule_in_log(job.banks, "bank-a") in {"repeated_keys", "advert_signature"}


# What the tests above share


def counted_model(job):
    bins = job.start(job.bins_question())
    return job.model(bins.counts(bins.whole()))


def moved_by(job, model, amount):
    return job.train_question(1, model).weights + np.float32(amount)


def moved(one):
    return one.question.weights + np.float32(0.25)


def weight_of(job, name):
    loans = len(job.lenders[name].loans.train)
    folder = LenderFolder(job.banks[name])
    return blurred_weight(loans, job.plan.training, folder.salt(), folder.config.policy.min_weight_bucket)

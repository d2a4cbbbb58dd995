"""Whole jobs under secure aggregation over real lenders: who drops out when, what is tried again, what is used up."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from secure_house import AWAY, EXCHANGES, MUTE, Killed, SecureHouse, hurry, job_of
from secure_lenders import NAMES

from fedfin.errors import QuorumError
from fedfin.privacy.participant import Participant
from fedfin.roster_chain import RosterChain
from fedfin.server import unmasking
from fedfin.server.roster import FederationStore
from fedfin.strategies.fedavg import fedavg
from fedfin.strategies.strategy import ModelState
from fedfin.strategies.sums import cohort_sum, round_layout
from fedfin.update import (
    Accepted,
    AskHistogram,
    Confirm,
    Evaluate,
    Mask,
    Open,
    Propose,
    Refused,
    ShareKeys,
    Train,
    Unmask,
)

LAST = NAMES[-1]
OTHERS = NAMES[:-1]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def house(tmp_path):
    built = SecureHouse(tmp_path)
    yield built
    built.close()


@pytest.fixture
def encoded(monkeypatch):
    """Every vector as it was before it was masked, by stage and lender."""
    seen = defaultdict(dict)
    mask = Participant.mask

    def recorded(self, values, threads=1):
        seen[self._context.stage][self._name] = values.copy()
        return mask(self, values, threads)

    monkeypatch.setattr(Participant, "mask", recorded)
    return seen


def failing(what, names, kind, stage, times=1):
    """A fault of these lenders at one exchange of one stage, so many times each."""
    left = dict.fromkeys(names, times)

    def fault(name, question, of_stage):
        if isinstance(question, kind) and of_stage == stage and left.get(name, 0) > 0:
            left[name] -= 1
            return what
        return None

    return fault


# The whole walk


@pytest.mark.parametrize("mode", ["none", "local", "shared"])
def test_a_job_ends_with_a_model_and_its_evaluations_and_every_stage_left_each_lender_once(house, mode):
    final = house.run(job_of(mode, times=2))
    assert final.round == 3
    assert [evaluation["evaluation"] for evaluation in house.judged] == [1, 2]
    stages = {"bins", "round 1", "round 2", "round 3", "evaluation 1", "evaluation 2"}
    for name in NAMES:
        assert house.released(name) == dict.fromkeys(stages, 1)
        assert house.charges(name) == (dict.fromkeys(stages, 1) if mode != "none" else {})
    assert len(final.moments) == (2 if mode == "shared" else 0)


def test_each_model_is_the_one_before_plus_the_decoded_sum_of_what_the_lenders_encoded(house, encoded):
    plan = job_of(rounds=1)
    final = house.run(plan)
    layout = round_layout(plan, len(final.weights), len(NAMES))
    total = np.sum(list(encoded["round 1"].values()), axis=0, dtype=np.uint32)
    state = ModelState(np.zeros_like(final.weights), 0)
    assert_array_equal(final.weights, fedavg(state, cohort_sum(layout.decode(total), len(NAMES))).weights)


def test_all_propose_at_once_with_the_same_roster_when_everyone_waited_for_is_online(house):
    house.away = set(NAMES[:2])

    def back(event):
        house.events.append(event)
        if event["event"] == "waiting":
            assert house.asked == []
            house.away.clear()

    house.say = back
    house.run(job_of(rounds=1))
    (first,) = [asked.names for asked in house.asked if asked.kind is Propose]
    assert first == NAMES
    (job,) = house.store.jobs()
    assert list(RosterChain.from_json(house.store.roster(job.job_id)).last.members) == list(NAMES)


def test_who_enrols_in_the_middle_waits_for_the_next_job_and_is_told_so(house):
    """A member that was not there when the roster was frozen is in no sum of the job."""
    house.store.remove(LAST)
    house.found(OTHERS)
    house.away.add(LAST)

    def enrol(event):
        house.events.append(event)
        if event["event"] == "round_done" and event["round"] == 1:
            house.enrol(LAST)
            house.away.clear()

    house.say = enrol
    house.run(job_of())
    assert house.said("next_job") == [{"event": "next_job", "lender": LAST}]
    assert set(house.cohorts().values()) == {OTHERS}
    assert all(LAST not in asked.names for asked in house.asked)


def test_a_member_that_comes_late_takes_part_from_the_next_round(house):
    house.away.add(LAST)

    def back(event):
        house.events.append(event)
        if event["event"] == "round_done" and event["round"] == 1:
            house.away.clear()

    house.say = back
    house.run(job_of())
    assert house.cohorts() == {1: OTHERS, 2: NAMES, 3: NAMES}


# No weight, no single figure


def test_nothing_of_one_lender_is_said_or_kept(house):
    house.run(job_of("local", times=1))
    (job,) = house.store.jobs()
    assert house.store.weights(job.job_id) == dict.fromkeys(NAMES, 0.0)
    for line in house.said("round_done"):
        assert set(line) == {
            *("event", "round", "of", "cohort", "missing", "seconds"),
            *("failed_after", "exchanges", "answer_bytes"),
            *("model_before", "model"),
        }


def test_a_lender_that_states_its_weight_is_not_taken(house):
    house.spoil = lambda name, reply: (
        Accepted(reply.job_id, 90.0) if isinstance(reply, Accepted) and name == LAST else reply
    )
    house.run(job_of(rounds=1))
    (line,) = house.said("unanswered")
    assert (line["lender"], "must not leave it" in line["reason"]) == (LAST, True)
    assert house.cohorts() == {1: OTHERS}


# Riding along


def test_a_steady_round_is_three_exchanges_and_only_the_first_two_sums_open_by_themselves(house):
    house.run(job_of(times=3))
    assert [line["exchanges"] for line in house.said("round_done")] == [5, 3, 3]
    assert [line["exchanges"] for line in house.said("evaluated")] == [3, 3, 3]
    kinds = [asked.kind for asked in house.asked][1:-1]
    assert kinds == [*EXCHANGES, *EXCHANGES, *(Mask, Confirm, Unmask) * 5]


def test_a_preparation_that_does_not_fit_is_dropped_and_made_anew_as_the_next_attempt(house):
    def leave(event):
        house.events.append(event)
        if event["event"] == "round_done" and event["round"] == 1:
            house.away.add(LAST)

    house.say = leave
    house.run(job_of())
    assert house.cohorts() == {1: NAMES, 2: OTHERS, 3: OTHERS}
    assert house.opened("round 2") == [1]  # attempt 0 rode along with round 1
    assert house.opened("round 3") == []


# Drop-outs


@pytest.mark.parametrize("what", [AWAY, MUTE])
@pytest.mark.parametrize("kind", [Open, ShareKeys, Mask])
def test_a_lender_that_fails_before_its_vector_is_here_is_left_out(house, kind, what):
    house.fault = failing(what, [LAST], kind, "bins")
    final = house.run(job_of())
    (bins,) = house.said("bins")
    assert (bins["lenders"], list(bins["missing"])) == (5, [LAST])
    assert final.round == 3
    assert set(house.cohorts().values()) == {NAMES}


@pytest.mark.parametrize("what", [AWAY, MUTE])
@pytest.mark.parametrize("kind", [Confirm, Unmask])
def test_a_lender_that_fails_while_the_sum_is_unmasked_is_in_it_all_the_same(house, encoded, kind, what):
    house.fault = failing(what, [LAST], kind, "round 2")
    house.run(job_of())
    line = house.said("round_done")[1]
    assert (line["cohort"], line["missing"], list(line["failed_after"])) == (list(NAMES), {}, [LAST])
    assert set(house.cohorts().values()) == {NAMES}
    assert house.opened("round 3") == [1]  # what was prepared was not whole


@pytest.mark.parametrize("kind", [Mask, Confirm, Unmask])
def test_the_sum_is_exact_with_a_lender_lost_at_any_exchange(house, encoded, kind):
    house.fault = failing(AWAY, [LAST], kind, "round 1")
    plan = job_of(rounds=1)
    final = house.run(plan)
    survivors = house.cohorts()[1]
    total = np.sum([encoded["round 1"][name] for name in survivors], axis=0, dtype=np.uint32)
    parts = round_layout(plan, len(final.weights), len(NAMES)).decode(total)
    state = ModelState(np.zeros_like(final.weights), 0)
    assert_array_equal(final.weights, fedavg(state, cohort_sum(parts, len(survivors))).weights)


def test_a_bad_contribution_is_put_down_to_its_lender(house):
    def spoil(name, reply):
        if name == LAST and hasattr(reply, "values"):
            return dataclasses.replace(reply, values=reply.values[:-3])
        return reply

    house.spoil = spoil
    house.run(job_of(rounds=1))
    (line,) = house.said("round_done")
    assert line["cohort"] == list(OTHERS)
    assert line["missing"][LAST].startswith("malformed: a vector has")


def test_an_answer_of_another_sum_is_put_down_to_its_lender(house):
    def spoil(name, reply):
        return (
            dataclasses.replace(reply, sum="0" * 64) if name == LAST and hasattr(reply, "values") else reply
        )

    house.spoil = spoil
    house.run(job_of(rounds=1))
    assert house.said("round_done")[0]["missing"] == {LAST: "it answered for another sum"}


def test_a_lying_helper_is_named_and_routed_around(house):
    def spoil(name, reply):
        if name == LAST and hasattr(reply, "shares"):
            owner = NAMES[0]
            wrong = bytes([reply.shares[owner][0] ^ 1]) + reply.shares[owner][1:]
            return dataclasses.replace(reply, shares={**reply.shares, owner: wrong})
        return reply

    house.spoil = spoil
    final = house.run(job_of(rounds=1))
    assert final.round == 1
    assert {tuple(line["lenders"]) for line in house.said("sum_liars")} == {(LAST,)}
    assert house.said("round_done")[0]["failed_after"][LAST].startswith("lying_helper: ")


# Refusals


def test_a_refusal_by_a_rule_is_recorded_with_it_and_ends_no_lenders_part(house):
    refusal = Refused("", "one_model: round 2 was answered for another model already")

    def fault(name, question, stage):
        refused = name == LAST and isinstance(question, Mask) and stage == "round 2"
        return dataclasses.replace(refusal, job_id=question.job_id) if refused else None

    house.fault = fault
    house.run(job_of())
    (line,) = house.said("sum_refused")
    assert (line["stage"], line["lender"], line["rule"]) == ("round 2", LAST, "one_model")
    assert house.cohorts() == {1: NAMES, 2: OTHERS, 3: NAMES}
    assert house.said("refused") == []


def test_a_refusal_for_another_reason_ends_that_lenders_part(house):
    def fault(name, question, stage):
        refused = name == LAST and isinstance(question, Mask) and stage == "round 2"
        return Refused(question.job_id, "its privacy ledger cannot record") if refused else None

    house.fault = fault
    house.run(job_of())
    assert [line["lender"] for line in house.said("refused")] == [LAST]
    assert house.cohorts() == {1: NAMES, 2: OTHERS, 3: OTHERS}


def test_lenders_that_refuse_a_stage_again_and_again_are_asked_no_more_and_the_others_go_on(house):
    refuse = NAMES[:2]  # below the threshold of six, not of four

    def fault(name, question, stage):
        refused = name in refuse and isinstance(question, Open) and stage == "round 1"
        return Refused(question.job_id, "attempt: it was opened before") if refused else None

    house.fault = fault
    final = house.run(job_of())
    assert final.round == 3
    assert house.cohorts() == {1: NAMES[2:], 2: NAMES, 3: NAMES}
    assert len(house.said("round_short")) == 3


def test_a_stage_that_no_quorum_answers_ends_the_job_with_the_reasons_and_the_mend(house):
    house.fault = lambda name, question, stage: (
        Refused(question.job_id, "charged: it has left")
        if isinstance(question, Open) and stage == "round 1"
        else None
    )
    expected = (
        r"too many lenders refuse round 1 each time .*\(bank-a: charged: it has left; .* then start again"
    )
    with pytest.raises(QuorumError, match=expected):
        house.run(job_of())


def test_lenders_that_take_no_part_in_evaluations_are_left_out_of_those_alone(house):
    house.fault = lambda name, question, stage: (
        Refused(question.job_id, "stage: this lender takes no part in the job's evaluations")
        if name in NAMES[:2] and isinstance(question, Open) and stage.startswith("evaluation")
        else None
    )
    # what rode along had everybody's keys: the lenders that decline do so in an attempt of its own
    house.spoil = lambda name, reply: (
        dataclasses.replace(reply, advert=b"") if name in NAMES[:2] and hasattr(reply, "signature") else reply
    )
    house.run(job_of(times=1))
    assert house.judged[0]["lenders"] == 4
    assert house.said("refused") == []
    assert house.cohorts()[3] == NAMES


# Below the threshold


def test_too_few_before_masks_is_tried_again_with_fresh_keys_and_costs_nothing(house):
    house.fault = failing(MUTE, NAMES[:2], ShareKeys, "bins")
    house.run(job_of("local", rounds=1))
    (line,) = house.said("bins_short")
    assert sorted(line["missing"]) == list(NAMES[:2])
    assert house.opened("bins") == [0, 1]
    assert all(house.charges(name) == {"bins": 1, "round 1": 1} for name in NAMES)


@pytest.mark.parametrize("kind", [Mask, Confirm, Unmask])
def test_a_round_that_is_lost_after_masks_is_used_up_and_the_next_goes_on_with_the_same_cohort(house, kind):
    house.fault = failing(MUTE, NAMES[:2], kind, "round 2")
    final = house.run(job_of("local"))
    (line,) = house.said("round_lost")
    assert (line["round"], sorted(line["missing"])) == (2, list(NAMES[:2]))
    assert "4 lenders" in line["reason"]
    assert final.round == 2
    assert house.cohorts() == {1: NAMES, 3: NAMES}
    train = [house.questions(Mask, f"round {number}") for number in (1, 2, 3)]
    assert train == [[NAMES]] * 3
    stages = {"bins": 1, "round 1": 1, "round 2": 1, "round 3": 1}
    assert all(house.charges(name) == stages for name in NAMES)


def test_the_round_after_a_lost_one_waits_for_everyone_of_its_cohort(house):
    house.fault = failing(MUTE, NAMES[:2], Mask, "round 2")

    def say(event):
        house.events.append(event)
        if event["event"] == "round_lost":
            house.away.add(LAST)
        if event["event"] == "waiting" and event["for"] == [LAST]:
            house.away.clear()

    house.say = say
    final = house.run(job_of())
    assert final.round == 2
    assert house.cohorts()[3] == NAMES


def test_a_cohort_that_does_not_come_back_ends_the_job_and_names_the_mend(house):
    house.fault = failing(MUTE, NAMES[:2], Mask, "round 2")

    def say(event):
        house.events.append(event)
        if event["event"] == "round_lost":
            house.away.add(LAST)

    house.say = say
    expected = (
        r"an earlier sum like round 3 was lost; .* identical cohort only, and bank-f did not come back in time"
        r" \(cohort\.start_timeout_s\)\. Bring them back and start again, or run `fedfin server --new-job`"
    )
    with pytest.raises(QuorumError, match=expected):
        house.run(job_of())
    house.away.clear()
    assert house.run(job_of()).round == 2  # the same job goes on when it is there again
    assert house.cohorts() == {1: NAMES, 3: NAMES}


def test_who_was_not_confirmed_before_is_not_asked_for_another_vector(house):
    """Lenders confirm the same survivors again for the same model, and no others."""
    mask, confirm = failing(AWAY, [LAST], Mask, "round 2"), failing(MUTE, NAMES[:1], Confirm, "round 2")
    house.fault = lambda *asked: mask(*asked) or confirm(*asked)
    final = house.run(job_of())
    assert [line["round"] for line in house.said("round_lost")] == [2]
    assert house.questions(Mask, "round 3") == [OTHERS]
    assert house.cohorts() == {1: NAMES, 3: OTHERS}
    assert house.said("sum_refused") == []
    assert final.round == 2


def test_a_job_of_which_every_round_is_lost_releases_nothing(house):
    house.fault = lambda name, question, stage: (
        MUTE if name in NAMES[:2] and isinstance(question, Mask) and stage.startswith("round") else None
    )
    with pytest.raises(QuorumError, match=r"all 2 rounds of job .* were lost: .* `fedfin server --new-job`"):
        house.run(job_of(rounds=2))


def test_bins_that_are_lost_are_asked_for_again_without_privacy_and_end_a_private_job(house):
    house.fault = failing(MUTE, NAMES[:2], Mask, "bins")
    assert house.run(job_of(rounds=1)).round == 1
    assert [line["event"] for line in house.events if line["event"].startswith("bins")] == [
        "bins_lost",
        "bins",
    ]
    house.fault = failing(MUTE, NAMES[:2], Mask, "bins")
    with pytest.raises(
        QuorumError, match="they answer it once; start another job with `fedfin server --new-job`"
    ):
        house.run(job_of("local", rounds=1))


def test_in_mode_shared_a_sum_with_less_noise_than_planned_is_lost(house):
    house.fault = failing(MUTE, NAMES[:2], Mask, "round 2")
    final = house.run(job_of("shared", min_lenders=3))
    assert [line["round"] for line in house.said("round_lost")] == [2]
    assert final.round == 2


def test_an_evaluation_that_is_lost_is_not_made_again(house):
    house.fault = failing(MUTE, NAMES[:2], Mask, "evaluation 1")
    final = house.run(job_of(times=1))
    assert final.round == 3
    assert len(house.said("evaluation_lost")) == 1
    assert house.judged == []


# Large vectors


def test_large_vectors_are_asked_for_a_few_at_a_time(house, monkeypatch):
    monkeypatch.setattr(unmasking, "_AT_ONCE", 6000)
    final = house.run(job_of(rounds=1))
    waves = house.questions(Mask, "round 1")
    assert sum(waves, ()) == NAMES
    assert max(map(len, waves)) < len(NAMES)
    assert final.round == 1


# A coordinator that is killed


def clear_questions(house):
    return [asked.kind for asked in house.asked if asked.kind in (AskHistogram, Train, Evaluate)]


def killed_at(house, plan, step):
    """Run the job with the process killed at its `step`-th step; tell whether it came that far."""
    count = [0]

    def die():
        count[0] += 1
        if count[0] == step:
            raise Killed

    house.on_step = die
    try:
        house.run(plan)
    except Killed:
        return True
    finally:
        house.on_step = lambda: None
    return False


def assert_resumed_soundly(house, plan):
    """The job ends, or says how to start another; whatever happened, each stage left a lender once at most."""
    said = ""
    try:
        final = house.run(plan)
    except QuorumError as error:
        said = str(error)
    assert ("--new-job" in said) if said else (plan.training.rounds - final.round <= 1)
    assert house.said("sum_refused") == []
    assert clear_questions(house) == []
    for name in house.names:
        assert set(house.released(name).values()) <= {1}
        assert set(house.charges(name).values()) <= {1}


@pytest.mark.parametrize("step", [30, 45, 60])
def test_a_coordinator_that_is_killed_goes_on_and_asks_no_lender_twice_for_a_stage(tmp_path, step):
    house = SecureHouse(tmp_path, names=NAMES[:3])
    plan = job_of("local", rounds=2, min_lenders=3)
    assert killed_at(house, plan, step)
    assert_resumed_soundly(house, plan)
    house.close()


@pytest.mark.slow
def test_a_coordinator_may_be_killed_at_every_single_step(tmp_path):
    plan = job_of("local", rounds=2, min_lenders=3)
    step, delivered = 0, False
    while not delivered:
        step += 1
        house = SecureHouse(tmp_path / str(step), names=NAMES[:3])
        assert killed_at(house, plan, step)
        (job,) = house.store.jobs() or (None,)
        delivered = job is not None and job.status == "completed" and not house.store.undelivered(job.job_id)
        if not delivered:
            assert_resumed_soundly(house, plan)
        house.close()
    assert step > 80


def test_a_killed_coordinators_lost_sum_is_used_up_and_known_from_its_store(house):
    def die(event):
        house.events.append(event)
        if event["event"] == "round" and event["round"] == 2:
            house.fault = lambda name, question, stage: (_ for _ in ()).throw(Killed)

    house.say = die
    with pytest.raises(Killed):
        house.run(job_of())
    (job,) = house.store.jobs()
    lost = FederationStore(house.path).asked_sums(job.job_id)[-1]
    assert (lost.stage, lost.base, lost.sharers, lost.survivors) == ("round 2", 1, frozenset(NAMES), None)
    house.say, house.fault = house.events.append, lambda *_: None
    assert house.run(job_of()).round == 2
    assert house.cohorts() == {1: NAMES, 3: NAMES}

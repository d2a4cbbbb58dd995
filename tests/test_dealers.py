"""A lender that deals shares that do not open: who names it, when it is left out, what is asked again without it."""

import pytest
from secure_house import MUTE, Killed, SecureHouse, hurry, job_of
from secure_lenders import NAMES

from fedfin.errors import ProtocolRefusalError, QuorumError
from fedfin.privacy.participant import Participant
from fedfin.privacy.shamir import split
from fedfin.privacy.sum_rules import RULES, refusal
from fedfin.privacy.sum_shares import SEALED_BYTES, accused, unseal
from fedfin.server.dealers import bad_dealers
from fedfin.update import Mask, Refused

DEALER = NAMES[-1]
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
def deal_badly(monkeypatch):
    """Have a lender seal what does not open, in the stages named, for these receivers."""
    dealt = Participant._dealt

    def begin(*stages, to=OTHERS, dealer=DEALER):
        def bad(self, own, receiver, pair):
            out = dealt(self, own, receiver, pair)
            if self._name == dealer and receiver in to and self._context.stage in stages:
                return out[:-1] + bytes([out[-1] ^ 1])
            return out

        monkeypatch.setattr(Participant, "_dealt", bad)

    return begin


@pytest.fixture
def deal_falsely(monkeypatch):
    """Have lenders deal shares that open and match their commitments, of no secret of theirs, in the stages named."""
    dealt = Participant._dealt

    def begin(*stages, dealers=(DEALER,)):
        def bad(self, own, receiver, pair):
            if self._name in dealers and self._context.stage in stages:
                pair = tuple(split(bytes(32), 1, 2)[0] for _ in pair)
            return dealt(self, own, receiver, pair)

        monkeypatch.setattr(Participant, "_dealt", bad)

    return begin


def no_share(dealer):
    """The reason of a lender that was sent what does not open."""
    with pytest.raises(ProtocolRefusalError) as refused:
        unseal(bytes(SEALED_BYTES), bytes(32), b"context", dealer, "bank-x")
    return str(refused.value)


# Whom a refusal names


def test_a_refusal_of_a_share_names_its_dealer():
    assert accused(no_share(DEALER), NAMES) == DEALER
    other = refusal("share_commitment", f"{DEALER} sealed a share that is not the one it committed to")
    assert accused(str(other), NAMES) == DEALER


@pytest.mark.parametrize(
    "reason",
    [
        "",
        "sealed_share: ",
        f"sealed_share: {DEALER}",
        no_share("bank-nobody"),
        no_share(DEALER) + " ",
        no_share(DEALER).replace("sealed_share", "malformed", 1),
        str(refusal("malformed", f"the sealed share of {DEALER} has 3 bytes, not {SEALED_BYTES}")),
        f"its disk is full; the share of {DEALER} fails authentication",
    ],
)
def test_no_other_text_names_anybody(reason):
    assert accused(reason, NAMES) is None


def test_both_refusals_are_rules_of_the_sum():
    assert {"sealed_share", "share_commitment", "too_few_sharers"} <= set(RULES)


# How many must


def judged(refusals, *, asked=NAMES, sharers=NAMES):
    return bad_dealers(refusals, asked=asked, sharers=sharers, num_lenders=len(NAMES))


def test_a_third_of_the_cohort_is_enough_and_fewer_are_not():
    reason = no_share(DEALER)
    assert judged(dict.fromkeys(NAMES[:1], reason)).named_by == {}
    assert judged(dict.fromkeys(NAMES[:2], reason)).named_by == {DEALER: frozenset(NAMES[:2])}
    seven = bad_dealers(dict.fromkeys(NAMES[:2], reason), asked=NAMES, sharers=NAMES, num_lenders=7)
    assert seven.named_by == {}


def test_nobody_testifies_against_itself_or_against_who_sent_nothing():
    reason = no_share(DEALER)
    assert judged({NAMES[0]: reason, DEALER: reason}).named_by == {}
    assert judged(dict.fromkeys(OTHERS, reason), sharers=OTHERS).named_by == {}


def test_nothing_is_left_only_where_all_others_refused_in_the_receiving_step():
    all_but_one = dict.fromkeys(OTHERS[1:], no_share(DEALER))
    assert not judged(all_but_one).nothing_left  # one sent a vector, or did not answer
    assert not judged(all_but_one | {OTHERS[0]: "unknown_sum: nothing is held here"}).nothing_left
    assert not judged(all_but_one | {OTHERS[0]: "its privacy ledger cannot record"}).nothing_left
    assert judged(all_but_one | {OTHERS[0]: no_share(DEALER)}).nothing_left
    assert judged(all_but_one | {OTHERS[0]: "too_few_sharers: 5 lenders shared, not 6"}).nothing_left
    assert judged(all_but_one | {OTHERS[0]: no_share(OTHERS[1])}).nothing_left


def test_nothing_is_taken_back_where_no_dealer_is_found():
    each_names_another = {name: no_share(NAMES[at - 1]) for at, name in enumerate(NAMES)}
    found = judged(each_names_another)
    assert (found.named_by, found.nothing_left) == ({}, False)


def test_two_dealers_are_both_found_and_are_no_witnesses():
    refusals = {name: no_share(DEALER) for name in NAMES[:2]} | {
        name: no_share(NAMES[4]) for name in NAMES[2:4]
    }
    found = judged(refusals | {NAMES[4]: no_share(DEALER)})
    assert set(found.named_by) == {NAMES[4], DEALER}
    assert found.witnesses == set(NAMES[:4])
    assert found.nothing_left


# A whole job


@pytest.mark.parametrize("mode", ["none", "local", "shared"])
def test_the_round_is_made_without_the_dealer_and_costs_the_others_once(house, deal_badly, mode):
    deal_badly("round 1", "round 2", "round 3")
    final = house.run(job_of(mode))
    assert final.round == 3
    assert house.cohorts() == {1: OTHERS, 2: OTHERS, 3: OTHERS}
    assert house.said("round_lost") == []
    assert house.said("sum_liars") == [
        {"event": "sum_liars", "stage": "round 1", "rule": "sealed_share", "lenders": [DEALER]}
    ]
    reason = "it dealt shares that do not open, as 5 of 6 lenders say"
    assert house.said("refused") == [{"event": "refused", "lender": DEALER, "reason": f"left out: {reason}"}]
    (line,) = house.said("round_short")
    assert (line["cohort"], line["missing"]) == (list(OTHERS), {DEALER: reason})
    stages = {"bins", "round 1", "round 2", "round 3"}
    for name in OTHERS:
        assert house.released(name) == dict.fromkeys(stages, 1)
        assert house.charges(name) == (dict.fromkeys(stages, 1) if mode != "none" else {})


def test_who_refuses_such_a_share_is_charged_nothing(house, deal_badly):
    """Seen at the moment of the refusals, before the round is asked again."""
    deal_badly("round 1")
    charged = {}

    def say(event):
        house.events.append(event)
        if event["event"] == "sum_liars":
            charged.update({name: house.charges(name) for name in NAMES})

    house.say = say
    house.run(job_of("local", rounds=1))
    assert charged == {name: {"bins": 1} for name in OTHERS} | {DEALER: {"bins": 1, "round 1": 1}}


def test_private_bins_are_asked_again_without_the_dealer(house, deal_badly):
    deal_badly("bins")
    final = house.run(job_of("local", rounds=1))
    assert final.round == 1
    assert house.opened("bins") == [0, 1]
    assert all(house.charges(name) == {"bins": 1, "round 1": 1} for name in OTHERS)


def test_an_evaluation_is_made_without_the_dealer(house, deal_badly):
    deal_badly("evaluation 1")
    house.run(job_of("local", times=1))
    (figures,) = house.judged
    assert figures["lenders"] == len(OTHERS)


def test_one_that_is_named_by_too_few_stays(house, deal_badly):
    """As many as may collude could name an honest lender."""
    deal_badly("round 1", to=NAMES[:1])
    house.run(job_of())
    assert house.said("refused") == house.said("sum_liars") == []
    assert house.cohorts() == {1: NAMES[1:], 2: NAMES, 3: NAMES}


def test_a_lender_that_invents_a_bad_share_harms_nobody_but_itself(house):
    def fault(name, question, stage):
        framing = name == NAMES[0] and isinstance(question, Mask) and stage == "round 1"
        return Refused(question.job_id, no_share(DEALER)) if framing else None

    house.fault = fault
    house.run(job_of())
    assert house.said("refused") == house.said("sum_liars") == []
    assert house.cohorts() == {1: NAMES[1:], 2: NAMES, 3: NAMES}


# Where another lender's vector left


@pytest.mark.parametrize("other", ["answers", "is silent"])
def test_where_another_lender_may_have_answered_the_job_ends_and_names_the_dealer_and_the_mend(
    house, deal_badly, other
):
    deal_badly("round 2", "round 3", to=OTHERS[1:] if other == "answers" else OTHERS)
    if other == "is silent":
        house.fault = lambda name, question, stage: (
            MUTE if name == OTHERS[0] and isinstance(question, Mask) and stage == "round 2" else None
        )
    expected = (
        rf"an earlier sum like round 3 was lost; .* identical cohort only, and {DEALER} takes no part any more\."
        rf" {DEALER} was left out, since it dealt shares that do not open, as 4 of 6 lenders say\."
        rf" Run `fedfin server remove {DEALER}`, then `fedfin server --new-job`"
    )
    with pytest.raises(QuorumError, match=expected):
        house.run(job_of("local"))
    assert [line["round"] for line in house.said("round_lost")] == [2]
    with pytest.raises(QuorumError, match=expected):  # nor does it go on when it is started again
        house.run(job_of("local"))
    house.store.remove(DEALER)  # what the message says works
    assert house.run(job_of("local"), new_job=True).round == 3
    assert house.cohorts()[3] == OTHERS


def test_a_quorum_that_is_lost_with_the_dealer_says_what_works(house, deal_badly):
    deal_badly("round 1")
    expected = rf"too many lenders refused to go on \({DEALER}: left out: .* Run `fedfin server remove {DEALER}`, then"
    with pytest.raises(QuorumError, match=expected):
        house.run(job_of(min_lenders=6))
    with pytest.raises(QuorumError, match=expected):  # nor does it go on when it is started again
        house.run(job_of(min_lenders=6))
    assert len(house.store.jobs()) == 1


# Shares that open, and give no secret

NO_SECRET = "the shares that it dealt give no secret of its advert"


@pytest.mark.parametrize("mode", ["none", "local", "shared"])
def test_who_deals_shares_of_no_secret_loses_one_round_and_is_left_out(house, deal_falsely, mode):
    """Before, every round of the job was lost by it, and charged."""
    deal_falsely("round 2", "round 3")
    expected = (
        rf"an earlier sum like round 3 was lost; .* and {DEALER} takes no part any more\."
        rf" {DEALER} was left out, since {NO_SECRET}\."
        rf" Run `fedfin server remove {DEALER}`, then `fedfin server --new-job`"
    )
    with pytest.raises(QuorumError, match=expected):
        house.run(job_of(mode))
    (lost,) = house.said("round_lost")
    assert (lost["round"], lost["missing"]) == (2, {DEALER: NO_SECRET})
    (found,) = house.said("sum_liars")
    assert found == {"event": "sum_liars", "stage": "round 2", "rule": "false_dealer", "lenders": [DEALER]}
    assert house.said("refused") == [
        {"event": "refused", "lender": DEALER, "reason": f"left out: {NO_SECRET}"}
    ]
    spent = {"bins": 1, "round 1": 1, "round 2": 1} if mode != "none" else {}
    assert all(house.charges(name) == spent for name in NAMES)


def test_a_judgement_that_such_a_dealer_spoils_is_left_out_and_the_rounds_go_on_without_it(
    house, deal_falsely
):
    deal_falsely("evaluation 1", "round 3")
    house.run(job_of("local", times=2))
    assert [line["evaluation"] for line in house.said("evaluation_lost")] == [1]
    assert house.cohorts()[3] == OTHERS
    assert house.said("round_lost") == []
    assert [line["stage"] for line in house.said("sum_liars")] == ["evaluation 1"]


def test_all_who_deal_so_are_left_out_after_one_sum(house, deal_falsely):
    both = (NAMES[0], DEALER)
    deal_falsely("round 1", "round 2", dealers=both)
    with pytest.raises(QuorumError, match=f"remove {NAMES[0]}`, `fedfin server remove {DEALER}`"):
        house.run(job_of("local"))
    assert [line["lenders"] for line in house.said("sum_liars")] == [list(both)]


def test_a_job_without_such_a_dealer_is_made(house, deal_falsely):
    """What the message says works."""
    deal_falsely("round 1", "round 2", "round 3")
    with pytest.raises(QuorumError):
        house.run(job_of("local"))
    house.store.remove(DEALER)
    assert house.run(job_of("local"), new_job=True).round == 3
    assert house.cohorts() == {1: OTHERS, 2: OTHERS, 3: OTHERS}


# A coordinator that is killed


def killed_where(house, plan, is_there):
    """Run the job and kill the coordinator at the first step of which `is_there` says so."""

    def die():
        if is_there():
            raise Killed

    house.on_step = die
    with pytest.raises(Killed):
        house.run(plan)
    house.on_step = lambda: None


def asked(house):
    (job,) = house.store.jobs()
    return [sum_.stage for sum_ in house.store.asked_sums(job.job_id)]


def left_out(house):
    (job,) = house.store.jobs()
    return list(house.store.left_out(job.job_id))


@pytest.mark.parametrize("place", ["mark taken back", "dealer left out", "asked again"])
def test_a_coordinator_that_is_killed_in_between_leaves_the_dealer_out_all_the_same(house, deal_badly, place):
    deal_badly("round 1", "round 2")
    refused = lambda: bool(house.said("sum_refused"))  # noqa: E731
    places = {
        "mark taken back": lambda: refused() and asked(house) == ["bins"] and not left_out(house),
        "dealer left out": lambda: refused() and bool(left_out(house)),
        "asked again": lambda: len(house.questions(Mask, "round 1")) == 2,
    }
    plan = job_of("local", rounds=2)
    killed_where(house, plan, places[place])
    asked_again = place == "asked again"  # then the round's masks were asked for: it is used up
    final = house.run(plan)
    assert final.round == (1 if asked_again else 2)
    assert set(house.cohorts().values()) == {OTHERS}
    assert left_out(house) == [DEALER]
    assert all(set(house.charges(name).values()) == {1} for name in OTHERS)


def test_one_that_was_left_out_is_not_proposed_to_again_by_a_coordinator_that_was_restarted(
    house, deal_badly
):
    deal_badly("round 1")
    killed_where(house, job_of(), lambda: bool(house.said("round_done")))
    before = len(house.asked)
    house.run(job_of())
    cohort = house.said("cohort")[-1]
    assert (cohort["lenders"], list(cohort["refused"])) == (list(OTHERS), [DEALER])
    assert all(set(sent.names) <= set(OTHERS) for sent in house.asked[before:] if issubclass(sent.kind, Mask))


def test_killed_before_the_refusals_are_known_the_job_ends_with_the_dealers_name_and_spends_nothing(
    house, deal_badly
):
    """Nobody can tell then whether a vector left."""
    deal_badly("round 1", "round 2")
    killed_where(house, job_of("local"), lambda: bool(house.questions(Mask, "round 1")))
    with pytest.raises(
        QuorumError, match=rf"Run `fedfin server remove {DEALER}`, then `fedfin server --new-job`"
    ):
        house.run(job_of("local"))
    assert all(house.charges(name) == {"bins": 1} for name in OTHERS)


def test_killed_when_such_shares_have_lost_a_round_it_finds_out_again(house, deal_falsely):
    deal_falsely("round 1", "round 2", "round 3")
    lost = lambda: bool(house.said("sum_liars"))  # noqa: E731
    killed_where(house, job_of("local"), lost)
    assert left_out(house) == []
    with pytest.raises(QuorumError, match=f"{DEALER} was left out, since {NO_SECRET}"):
        house.run(job_of("local"))
    assert left_out(house) == [DEALER]
    assert [line["stage"] for line in house.said("sum_liars")] == ["round 1", "round 2"]

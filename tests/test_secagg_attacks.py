"""Every attack on a secure sum ends in a refusal that names its rule, and reveals nothing."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from cohorts import (
    QUESTION,
    context_of,
    identity_of,
    names_of,
    new_sum,
    refused,
    roster_of,
    secrets_of,
    turned_away,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedfin.errors import PrivacyParameterError, ProtocolRefusalError
from fedfin.privacy import participant, sum_shares
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.privacy.sum_messages import Advert, sign_confirmation
from fedfin.privacy.sum_rules import RULES, refusal
from fedfin.privacy.sum_shares import seal

ME, OTHER, THIRD = "bank-01", "bank-02", "bank-03"


def public_key():
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def resigned(advert, context, name, **changes):
    """The advert as its own lender could sign it with other contents."""
    changed = replace(Advert.from_bytes(advert), **changes)
    return changed.signed(context.digest(), name, identity_of(name)).to_bytes()


# Before anything is opened


def test_a_cohort_smaller_than_the_lenders_policy_is_refused():
    names = names_of(6)
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(context_of(names), ME, identity_of(ME), roster_of(names), 7)
    assert caught.value.rule == "cohort_size"
    Participant(context_of(names), ME, identity_of(ME), roster_of(names), 6)


def test_no_policy_allows_fewer_than_three_lenders():
    with pytest.raises(PrivacyParameterError, match="at least 3"):
        Participant(context_of(names_of(5)), ME, identity_of(ME), roster_of(names_of(5)), 2)
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(context_of(names_of(2)), ME, identity_of(ME), roster_of(names_of(2)), 3)
    assert caught.value.rule == "cohort_size"


@pytest.mark.parametrize("threshold", [1, 4, 6])
def test_a_weak_threshold_or_another_is_refused(threshold):
    with pytest.raises(ProtocolRefusalError) as caught:
        new_sum(6, threshold=threshold)
    assert caught.value.rule == "threshold"
    assert threshold_of(6) == 5


def test_a_lender_outside_the_cohort_takes_no_part():
    names = names_of(5)
    roster = roster_of((*names, "bank-99"))
    context = context_of(names, roster=roster_digest(roster))
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(context, "bank-99", identity_of("bank-99"), roster, 3)
    assert caught.value.rule == "membership"


def test_a_roster_with_another_key_for_this_lender_is_refused():
    names = names_of(5)
    roster = roster_of(names) | {ME: identity_of("somebody").public_key()}
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(context_of(names, roster=roster_digest(roster)), ME, identity_of(ME), roster, 3)
    assert caught.value.rule == "membership"


def test_a_sum_that_rests_on_another_roster_is_refused():
    names = names_of(5)
    swapped = roster_of(names) | {OTHER: identity_of("somebody").public_key()}
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(
            context_of(names, roster=roster_digest(swapped)), ME, identity_of(ME), roster_of(names), 3
        )
    assert caught.value.rule == "roster"


def test_a_cohort_with_an_unenrolled_lender_is_refused():
    names = names_of(5)
    context = context_of((*names, "invented"), roster=roster_digest(roster_of(names)))
    with pytest.raises(ProtocolRefusalError) as caught:
        Participant(context, ME, identity_of(ME), roster_of(names), 3)
    assert caught.value.rule == "roster"


# Adverts


def test_a_swapped_key_is_refused():
    running = new_sum().upto("share")
    swapped = replace(Advert.from_bytes(running.adverts[OTHER]), mask_key=public_key()).to_bytes()
    mine = running.participants[ME]
    refused("advert_signature", mine, mine.share, running.adverts | {OTHER: swapped})


def test_an_advert_signed_by_somebody_else_is_refused():
    running = new_sum().upto("share")
    advert = Advert.from_bytes(running.adverts[OTHER])
    forged = advert.signed(context_of(running.names).digest(), OTHER, identity_of(THIRD)).to_bytes()
    mine = running.participants[ME]
    refused("advert_signature", mine, mine.share, running.adverts | {OTHER: forged})


def test_adverts_of_two_lenders_exchanged_are_refused():
    running = new_sum().upto("share")
    mine = running.participants[ME]
    exchanged = {OTHER: running.adverts[THIRD], THIRD: running.adverts[OTHER]}
    refused("advert_signature", mine, mine.share, running.adverts | exchanged)


def test_a_node_that_is_not_enrolled_is_refused():
    running = new_sum().upto("share")
    mine = running.participants[ME]
    adverts = running.adverts | {"invented": running.adverts[OTHER]}
    refused("unenrolled", mine, mine.share, adverts)


@pytest.mark.parametrize("who", [ME, None], ids=["altered", "left out"])
def test_the_lenders_own_advert_must_come_back_unaltered(who):
    running = new_sum().upto("share")
    mine = running.participants[ME]
    own = resigned(running.adverts[ME], context_of(running.names), ME, mask_key=public_key())
    adverts = {name: data for name, data in running.adverts.items() if name != ME} | (
        {ME: own} if who else {}
    )
    refused("own_advert", mine, mine.share, adverts)


@pytest.mark.parametrize("key", ["mask_key", "channel_key"])
def test_repeated_keys_are_refused(key):
    running = new_sum().upto("share")
    taken = Advert.from_bytes(running.adverts[THIRD]).mask_key
    copied = resigned(running.adverts[OTHER], context_of(running.names), OTHER, **{key: taken})
    mine = running.participants[ME]
    refused("repeated_keys", mine, mine.share, running.adverts | {OTHER: copied})


@pytest.mark.parametrize(
    "weak",
    [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little"), b"\xff" * 32],
    ids=["zero", "one", "minus one", "not canonical"],
)
@pytest.mark.parametrize("key", ["mask_key", "channel_key"])
def test_a_key_whose_secret_everybody_knows_is_refused(key, weak):
    running = new_sum().upto("share")
    spoilt = resigned(running.adverts[OTHER], context_of(running.names), OTHER, **{key: weak})
    mine = running.participants[ME]
    refused("weak_key", mine, mine.share, running.adverts | {OTHER: spoilt})


def test_too_few_adverts_for_the_threshold_or_the_policy_are_refused():
    running = new_sum(6).upto("share")
    mine = running.participants[ME]
    refused("too_few_adverts", mine, mine.share, {name: running.adverts[name] for name in names_of(4)})
    strict = new_sum(6, min_cohort=6).upto("share")
    mine = strict.participants[ME]
    refused("too_few_adverts", mine, mine.share, {name: strict.adverts[name] for name in names_of(5)})


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "round 2"},
        {"attempt": 1},
        {"job_id": "job-2"},
        {"federation": "another"},
        {"plan": "c" * 64},
        {"layout": "c" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_advert_from_another_sum_is_refused(change):
    earlier = new_sum(**change).upto("share")
    running = new_sum().upto("share")
    mine = running.participants[ME]
    refused("advert_signature", mine, mine.share, running.adverts | {OTHER: earlier.adverts[OTHER]})


def test_an_advert_of_a_sum_with_another_cohort_is_refused():
    larger = new_sum(7).upto("share")
    running = new_sum(6).upto("share")
    mine = running.participants[ME]
    refused("advert_signature", mine, mine.share, running.adverts | {OTHER: larger.adverts[OTHER]})


# Shares


def test_an_altered_share_is_refused_wherever_it_was_altered():
    for place in (0, 40, 70, 120, -1):  # either commitment, either share, the tag
        running = new_sum().upto("mask")
        sealed = running.sealed_for(ME)
        data = bytearray(sealed[OTHER])
        data[place] ^= 1
        mine = running.participants[ME]
        refused("sealed_share", mine, mine.receive, sealed | {OTHER: bytes(data)}, QUESTION)


def test_a_share_that_was_sealed_for_somebody_else_is_refused():
    running = new_sum().upto("mask")
    mine = running.participants[ME]
    sealed = running.sealed_for(ME) | {OTHER: running.sealed_for(THIRD)[OTHER]}
    refused("sealed_share", mine, mine.receive, sealed, QUESTION)


def test_a_share_that_comes_back_to_its_sender_is_refused():
    running = new_sum().upto("mask")
    mine = running.participants[ME]
    sealed = running.sealed_for(ME) | {OTHER: running.sealed_for(OTHER)[ME]}
    refused("sealed_share", mine, mine.receive, sealed, QUESTION)


@pytest.mark.parametrize("change", [{"stage": "round 2"}, {"attempt": 1}, {"job_id": "job-2"}])
def test_a_share_from_another_sum_is_refused(change):
    earlier, running = new_sum(**change).upto("mask"), new_sum().upto("mask")
    mine = running.participants[ME]
    sealed = running.sealed_for(ME) | {OTHER: earlier.sealed_for(ME)[OTHER]}
    refused("sealed_share", mine, mine.receive, sealed, QUESTION)


def test_a_sharer_who_did_not_open_is_refused():
    running = new_sum()
    running.open(names_of(5))
    running.share(names_of(5))
    running.ask()
    mine = running.participants[ME]
    sealed = running.sealed_for(ME)
    refused("unenrolled", mine, mine.receive, sealed | {"bank-05": sealed[OTHER]}, QUESTION)


def test_too_few_sharers_for_the_threshold_or_the_policy_are_refused():
    for min_cohort, others in ((3, 3), (6, 4)):
        running = new_sum(6, min_cohort=min_cohort).upto("mask")
        mine = running.participants[ME]
        few = dict(sorted(running.sealed_for(ME).items())[:others])
        refused("too_few_sharers", mine, mine.receive, few, QUESTION)


def test_a_sharer_that_seals_what_it_did_not_commit_to_is_named(monkeypatch):
    running = new_sum().upto("share")
    liar, context = running.participants[OTHER], context_of(running.names).digest()
    running.share()
    running.ask()
    with monkeypatch.context() as patched:
        patched.setattr(sum_shares, "share_commitments", lambda *_: bytes(64))
        wrong = seal((bytes(33), bytes(33)), liar._secrets.channels[ME], context, OTHER, ME)
    mine = running.participants[ME]
    sealed = running.sealed_for(ME) | {OTHER: wrong}
    assert OTHER in refused("share_commitment", mine, mine.receive, sealed, QUESTION)


def test_a_committed_share_that_is_no_element_of_the_field_is_refused():
    running = new_sum().upto("mask")
    liar, context = running.participants[OTHER], context_of(running.names).digest()
    beyond = seal((b"\xff" * 33, bytes(33)), liar._secrets.channels[ME], context, OTHER, ME)
    mine = running.participants[ME]
    refused("share_commitment", mine, mine.receive, running.sealed_for(ME) | {OTHER: beyond}, QUESTION)


# The model, the survivors, the confirmations


def test_a_lender_that_was_shown_another_model_confirms_nothing_that_others_accept():
    running = new_sum().upto("mask")
    for name in running.names:
        question = b"train from crafted weights" if name == OTHER else QUESTION
        running.participants[name].receive(running.sealed_for(name), question)
        running.combiner.fold(name, running.participants[name].mask(np.zeros(running.size, np.uint32)))
    survivors = running.combiner.settle()
    confirmed = {name: running.participants[name].confirm(survivors) for name in running.names}
    turned_away("confirmation", running.combiner.add_confirmation, OTHER, confirmed[OTHER])
    for name in (ME, OTHER):
        mine = running.participants[name]
        refused("confirmation", mine, mine.unmask, confirmed)


def test_two_sharer_sets_shown_confirm_nothing_that_others_accept():
    running = new_sum().upto("mask")
    for name in running.names:
        sealed = running.sealed_for(name)
        if name == OTHER:
            del sealed["bank-05"]
        running.participants[name].receive(sealed, QUESTION)
        running.participants[name].mask(np.zeros(4, np.uint32))
    survivors = names_of(5)
    confirmed = {name: running.participants[name].confirm(survivors) for name in survivors}
    mine = running.participants[ME]
    refused("confirmation", mine, mine.unmask, confirmed)


def test_two_adverts_of_one_lender_shown_confirm_nothing_that_others_accept():
    """A lender in league with the coordinator signs two adverts; whoever sees another one is in another sum."""
    running = new_sum().upto("share")
    second = resigned(running.adverts[OTHER], context_of(running.names), OTHER, commitment=bytes(32))
    for name in running.names:
        adverts = running.adverts | ({OTHER: second} if name == THIRD else {})
        running.combiner.add_sealed(name, running.participants[name].share(adverts))
    running.ask()
    for name in running.names:
        running.participants[name].receive(running.sealed_for(name), QUESTION)
        running.participants[name].mask(np.zeros(4, np.uint32))
    confirmed = {name: running.participants[name].confirm(running.names) for name in running.names}
    mine = running.participants[ME]
    refused("confirmation", mine, mine.unmask, confirmed)


def test_a_second_question_in_a_sum_is_refused():
    running = new_sum().upto("mask")
    mine = running.participants[ME]
    mine.receive(running.sealed_for(ME), QUESTION)
    refused("once", mine, mine.receive, running.sealed_for(ME), b"train from other weights")


def test_split_survivor_sets_are_refused():
    running = new_sum(6).upto("confirm")
    everyone, without = running.names, tuple(name for name in running.names if name != "bank-05")
    first = {name: running.participants[name].confirm(everyone) for name in names_of(3)}
    rest = {name: running.participants[name].confirm(without) for name in ("bank-03", "bank-04")}
    for name in (ME, "bank-03"):
        mine = running.participants[name]
        refused("confirmation", mine, mine.unmask, first | rest)


def test_a_second_survivor_set_is_not_confirmed():
    running = new_sum().upto("confirm")
    mine = running.participants[ME]
    mine.confirm(running.names)
    refused("once", mine, mine.confirm, names_of(5))


def test_both_secrets_of_one_lender_are_never_given():
    """Unmasking gives one share of each owner; asked again, as if the owner had dropped out, it gives nothing."""
    running = new_sum().upto("confirm")
    mine = running.participants[ME]
    held = dict(mine._secrets.held)
    dropped = "bank-05"
    survivors = [name for name in running.names if name != dropped]
    confirmed = {name: running.participants[name].confirm(survivors) for name in survivors}
    given = mine.unmask(confirmed)
    assert given == {owner: held[owner][owner == dropped] for owner in running.names}
    with pytest.raises(ProtocolRefusalError) as caught:
        mine.unmask(confirmed)
    assert caught.value.rule == "once"
    assert mine._secrets is None


def test_survivors_without_oneself_are_not_confirmed():
    running = new_sum().upto("confirm")
    mine = running.participants[ME]
    refused("survivor_set", mine, mine.confirm, [name for name in running.names if name != ME])


def test_a_survivor_who_did_not_share_is_not_confirmed():
    running = new_sum()
    running.open()
    running.share(names_of(5))
    running.ask()
    running.mask()
    mine = running.participants[ME]
    refused("survivor_set", mine, mine.confirm, running.names)


@pytest.mark.parametrize(
    ("min_cohort", "planned"), [(3, 0), (6, 0), (3, 6)], ids=["threshold", "policy", "noise"]
)
def test_too_few_survivors_are_not_confirmed(min_cohort, planned):
    running = new_sum(6, min_cohort=min_cohort).upto("confirm")
    mine = running.participants[ME]
    few = names_of(4) if (min_cohort, planned) == (3, 0) else names_of(5)
    refused("too_few_survivors", mine, mine.confirm, few, planned)


def test_a_survivor_named_twice_is_refused():
    running = new_sum().upto("confirm")
    mine = running.participants[ME]
    refused("malformed", mine, mine.confirm, [*names_of(4), ME])


def test_too_few_confirmations_open_nothing():
    running = new_sum(6).upto("confirm")
    confirmed = {name: running.participants[name].confirm(running.names) for name in running.names}
    mine = running.participants[ME]
    refused("too_few_confirmations", mine, mine.unmask, {name: confirmed[name] for name in names_of(4)})


def test_a_forged_confirmation_opens_nothing():
    running = new_sum(6).upto("confirm")
    confirmed = {name: running.participants[name].confirm(running.names) for name in running.names}
    forger = sign_confirmation(b"asked", frozenset(running.names), identity_of("somebody"))
    for forged in (confirmed[THIRD], forger, bytes(64)):
        mine = next(one for one in running.participants.values() if one._secrets is not None)
        refused("confirmation", mine, mine.unmask, confirmed | {OTHER: forged})


def test_a_forged_confirmation_in_a_lenders_own_name_opens_nothing():
    """It knows its own again without verifying it; anything else in its name is verified."""
    running = new_sum(6).upto("confirm")
    confirmed = {name: running.participants[name].confirm(running.names) for name in running.names}
    for name, forged in (
        (ME, confirmed[OTHER]),
        (OTHER, bytes(64)),
        (THIRD, confirmed[THIRD][:-1] + b"\x80"),
    ):
        mine = running.participants[name]
        refused("confirmation", mine, mine.unmask, confirmed | {name: forged})


def test_a_confirmation_from_outside_the_survivors_opens_nothing():
    running = new_sum(6).upto("confirm")
    survivors = names_of(5)
    confirmed = {name: running.participants[name].confirm(survivors) for name in survivors}
    outside = sign_confirmation(running.participants[ME]._asked, frozenset(survivors), identity_of("bank-05"))
    mine = running.participants[ME]
    refused("confirmation", mine, mine.unmask, confirmed | {"bank-05": outside})


@pytest.mark.parametrize("change", [{"stage": "round 2"}, {"attempt": 1}, {"job_id": "job-2"}])
def test_confirmations_from_another_sum_open_nothing(change):
    earlier, running = new_sum(**change).upto("confirm"), new_sum().upto("confirm")
    confirmed = {name: earlier.participants[name].confirm(earlier.names) for name in earlier.names}
    mine = running.participants[ME]
    mine.confirm(running.names)
    refused("confirmation", mine, mine.unmask, confirmed)


# The order of the steps


def test_a_step_before_its_turn_is_refused():
    for step, call in (
        ("open", lambda one: one.share({})),
        ("share", lambda one: one.receive({}, QUESTION)),
        ("share", lambda one: one.confirm([])),
        ("mask", lambda one: one.mask(np.zeros(4, np.uint32))),
        ("mask", lambda one: one.unmask({})),
        ("confirm", lambda one: one.unmask({})),
    ):
        mine = new_sum().upto(step).participants[ME]
        refused("order", mine, call, mine)


def test_a_step_a_second_time_is_refused():
    running = new_sum().upto("confirm")
    for name, call in (
        ("bank-00", lambda one: one.open()),
        ("bank-01", lambda one: one.share(running.adverts)),
        ("bank-02", lambda one: one.mask(np.zeros(4, np.uint32))),
    ):
        mine = running.participants[name]
        refused("once", mine, call, mine)


def test_of_two_requests_at_the_same_time_one_is_answered(monkeypatch):
    running = new_sum().upto("confirm")
    mine, sets = running.participants[ME], [running.names, names_of(5)]

    def slow(*arguments):
        time.sleep(0.05)
        return sign_confirmation(*arguments)

    monkeypatch.setattr(participant, "sign_confirmation", slow)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(mine.confirm, survivors) for survivors in sets]
    refusals = [one.exception().rule for one in asked if one.exception() is not None]
    assert refusals == ["once"]


def test_whatever_fails_in_a_step_ends_the_sum():
    running = new_sum().upto("mask")
    mine = running.participants[ME]
    mine.receive(running.sealed_for(ME), QUESTION)
    with pytest.raises(ValueError, match="cannot be masked"):
        mine.mask(np.zeros(4, np.float32))
    assert mine._secrets is None
    turned_away("ended", mine.mask, np.zeros(4, np.uint32))


def test_a_forgotten_sum_is_not_gone_on_with():
    running = new_sum().upto("confirm")
    mine = running.participants[ME]
    own = mine._secrets
    mine.forget()
    mine.forget()
    assert (own.held, own.masks, own.own, own.mask_private) == ({}, [], b"", b"")
    turned_away("ended", mine.confirm, running.names)


# Malformed messages to a lender


def test_messages_of_another_length_are_refused():
    for cut in (b"", bytes(159), bytes(161)):
        running = new_sum().upto("share")
        mine = running.participants[ME]
        refused("malformed", mine, mine.share, running.adverts | {OTHER: cut})
    for cut in (b"", bytes(64), bytes(145), bytes(147)):
        running = new_sum().upto("mask")
        mine = running.participants[ME]
        refused("malformed", mine, mine.receive, running.sealed_for(ME) | {OTHER: cut}, QUESTION)
    for cut in (b"", bytes(63), bytes(65)):
        running = new_sum().upto("confirm")
        confirmed = {name: running.participants[name].confirm(running.names) for name in running.names}
        mine = running.participants[ME]
        refused("malformed", mine, mine.unmask, confirmed | {OTHER: cut})


@pytest.mark.parametrize(
    "change",
    [
        {"federation": ""},
        {"stage": "round\n1"},
        {"job_id": "ß"},
        {"plan": "A" * 64},
        {"roster": "a" * 63},
        {"attempt": -1},
        {"attempt": True},
        {"threshold": 0},
        {"threshold": 7},
        {"cohort": tuple(reversed(names_of(6)))},
        {"cohort": ("bank-00",) * 6},
        {"cohort": tuple(f"b{number:04}" for number in range(1001))},
    ],
    ids=str,
)
def test_a_context_out_of_form_is_refused(change):
    assert "malformed" in turned_away("malformed", lambda: context_of(names_of(6), **change))


def test_a_context_is_read_back_from_its_own_bytes_only():
    context = context_of(names_of(4))
    data = context.to_bytes()
    assert SumContext.from_bytes(data) == context
    for other in (
        b"",
        b"[" * 100_000,
        b"{}",
        b"null",
        data + b" ",
        data.replace(b'"attempt":0', b'"attempt":0,"attempt":0'),
        data.replace(b'"attempt":0', b'"attempt":0.0'),
        data.replace(b'"attempt":0', b'"attempt":NaN'),
        data.replace(b'"attempt":0', b'"attempt":' + b"9" * 5000),
        data.replace(b'"attempt":0', b'"also":0,"attempt":0'),
        data.replace(b'["bank-00"', b'[["bank-00"]'),
        data.replace(b'"cohort":[', b'"cohort":"').replace(b'],"fed', b'","fed'),
        data.decode().encode("utf-16"),
        b" " * 400_001,
    ):
        turned_away("malformed", SumContext.from_bytes, other)


# What shows


def test_no_repr_shows_a_secret_and_no_copy_is_made():
    running = new_sum().upto("mask")
    mine = running.participants[ME]
    mine.receive(running.sealed_for(ME), QUESTION)
    shown = repr(mine) + repr(mine._secrets) + repr(mine._secrets.masks) + repr(running.combiner)
    assert len(secrets_of(mine)) > 10
    assert [one for one in secrets_of(mine) if one.hex() in shown or repr(one)[2:-1] in shown] == []
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            copying(mine)


def test_a_refusal_names_its_rule_and_what_the_rule_asks():
    for rule, asks in RULES.items():
        error = refusal(rule, "something was seen")
        assert error.rule == rule
        assert str(error) == f"{rule}: something was seen; the rule is that {asks}"

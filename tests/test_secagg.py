"""A secure sum is the sum, to the last bit, or it aborts; what the coordinator holds until then is noise."""

import tracemalloc

import numpy as np
import pytest
from cohorts import (
    QUESTION,
    context_of,
    finest_step,
    identity_of,
    names_of,
    new_sum,
    roster_of,
    secrets_of,
    turned_away,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from fedfin.errors import RoundAbortedError
from fedfin.privacy import participant, shamir, sum_keys
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.encoding import Layout, Segment, pack, unpack
from fedfin.privacy.noise import SecureNoise
from fedfin.privacy.shamir import PRIME, combine
from fedfin.privacy.sum_context import asked_digest, framed, roster_digest, threshold_of
from fedfin.privacy.sum_messages import Advert, secret_commitment
from fedfin.privacy.sum_shares import share_commitments

ME, OTHER = "bank-01", "bank-02"
REJECTED = 1e-6
STEPS = ("open", "share", "mask", "confirm", "unmask")


def run_sum(running, staying, vectors, ring_bits=32, threads=1):
    """Run a sum in which only `staying[step]` answer a step, packed as on the wire; returns its total."""
    running.open(staying["open"])
    running.share(staying["share"])
    running.ask()
    for name in sorted(staying["mask"]):
        one = running.participants[name]
        assert one.receive(running.sealed_for(name), QUESTION) == staying["share"]
        sent = pack(one.mask(vectors[name].copy(), threads), ring_bits)
        running.combiner.fold(name, unpack(sent, running.size, ring_bits))
    assert running.combiner.survivors == staying["mask"]
    running.confirm(staying["confirm"])
    running.unmask(staying["unmask"])
    return running.combiner.total(threads)


@st.composite
def dropping_out(draw, names):
    """Who answers each step: everybody who answered the one before but a few, none of them more often than not."""
    staying, left = {}, frozenset(names)
    for step in STEPS:
        most = max(0, len(left) - threshold_of(len(names)) + 1)  # one too many at times
        num = draw(st.one_of(st.just(0), st.integers(0, most)))
        left -= frozenset(draw(st.permutations(sorted(left)))[:num])
        staying[step] = left
    return staying


def check_sum(data, num):
    size = data.draw(st.integers(1, 40))
    ring_bits = data.draw(st.sampled_from([24, 32]))
    step = finest_step(1.0, num, ring_bits)
    layout = Layout((Segment("update", size, 1.0, step),), num, ring_bits)
    names = names_of(num)
    draws = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stochastic = SecureNoise() if data.draw(st.booleans()) else None
    values = {name: draws.normal(scale=0.5, size=size) for name in names}
    vectors = {name: layout.encode({"update": values[name]}, stochastic) for name in names}
    staying = data.draw(dropping_out(names))
    running = new_sum(num, size=size)
    below = any(len(staying[step]) < threshold_of(num) for step in STEPS)
    if below:
        with pytest.raises(RoundAbortedError, match="nothing was unmasked"):
            run_sum(running, staying, vectors, ring_bits)
        return
    total = layout.decode(run_sum(running, staying, vectors, ring_bits, data.draw(st.integers(1, 2))))
    # the oracle: whole numbers of quanta, added in 64 bits, never masked
    expected = sum(vectors[name].view(np.int32).astype(np.int64) for name in staying["mask"])
    assert_array_equal(total["update"], expected * step)
    assert running.combiner.liars == running.combiner.false_dealers == ()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_sum_is_the_plaintext_sum_to_the_last_bit_or_the_round_aborts(data):
    check_sum(data, data.draw(st.integers(3, 40)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=600, deadline=None)
@given(st.data())
def test_so_it_is_in_many_more_cohorts(data):
    check_sum(data, data.draw(st.integers(3, 40)))


@pytest.mark.parametrize("num", [3, 4, 5, 6, 10])
@pytest.mark.parametrize("step", STEPS)
def test_the_threshold_is_the_least_that_finishes_a_sum(num, step):
    names = names_of(num)
    vectors = {name: np.full(3, 1, np.uint32) for name in names}
    for fewer in (0, 1):
        left = frozenset(names[: threshold_of(num) - fewer])
        at = STEPS.index(step)
        staying = {one: frozenset(names) if index < at else left for index, one in enumerate(STEPS)}
        running = new_sum(num, size=3)
        if fewer:
            with pytest.raises(RoundAbortedError):
                run_sum(running, staying, vectors)
        else:
            assert_array_equal(
                run_sum(running, staying, vectors), np.full(3, len(staying["mask"]), np.uint32)
            )


def test_two_quorums_have_more_than_the_colluders_in_common():
    for num in range(3, 200):
        colluders = -(-num // 3) - 1
        assert 2 * threshold_of(num) - num > colluders
        assert threshold_of(num) <= num


# Lying helpers and cheating sharers


def given_back(running):
    confirmations = running.combiner.confirmations()
    return {name: running.participants[name].unmask(confirmations) for name in running.combiner.survivors}


def summed(num=6, dropped=(), size=5):
    """A sum up to unmasking, its dropped lenders having shared but sent no vector; with the vectors' sum."""
    running = new_sum(num, size=size).upto("mask")
    vectors = {name: np.full(size, 7 + number, np.uint32) for number, name in enumerate(running.names)}
    staying = [name for name in running.names if name not in dropped]
    running.mask(staying, vectors)
    running.confirm()
    return running, sum(vectors[name] for name in staying)


@pytest.mark.parametrize("dropped", [(), ("bank-05",)], ids=["own mask", "mask key"])
@pytest.mark.parametrize("owner", ["bank-00", "bank-05"])
def test_a_lying_helper_is_named_and_routed_around(dropped, owner):
    running, expected = summed(7, dropped)
    answers = given_back(running)
    number = int.from_bytes(answers[OTHER][owner], "little")
    answers[OTHER][owner] = ((number + 1) % PRIME).to_bytes(33, "little")
    for name, shares in answers.items():
        if name == OTHER:
            said = turned_away("lying_helper", running.combiner.add_shares, name, shares)
            assert OTHER in said
            assert owner in said
        else:
            running.combiner.add_shares(name, shares)
    assert running.combiner.liars == (OTHER,)
    assert_array_equal(running.combiner.total(), expected)


def test_as_many_liars_as_may_drop_out_are_found_without_a_search():
    running, expected = summed(40)
    answers = given_back(running)
    liars = names_of(40)[: 40 - threshold_of(40)]
    for name, shares in answers.items():
        if name in liars:
            lies = {owner: bytes([number]) + bytes(32) for number, owner in enumerate(shares)}
            turned_away("lying_helper", running.combiner.add_shares, name, lies)
        else:
            running.combiner.add_shares(name, shares)
    assert running.combiner.liars == liars
    assert_array_equal(running.combiner.total(), expected)


def test_everybody_may_lie_about_somebody_as_long_as_enough_shares_are_right():
    running, expected = summed(7)
    for number, (name, shares) in enumerate(sorted(given_back(running).items())):
        shares[running.names[(number + 3) % 7]] = bytes(33)
        turned_away("lying_helper", running.combiner.add_shares, name, shares)
    assert len(running.combiner.liars) == 7
    assert_array_equal(running.combiner.total(), expected)


def test_a_share_of_the_other_secret_is_a_lie():
    """A helper that gives the share of the mask key for a survivor is not believed."""
    running = new_sum().upto("confirm")
    other_kind = running.participants[OTHER]._secrets.held["bank-00"][1]
    running.confirm()
    shares = running.participants[OTHER].unmask(running.combiner.confirmations())
    turned_away("lying_helper", running.combiner.add_shares, OTHER, shares | {"bank-00": other_kind})


def test_one_lie_too_many_aborts_and_opens_nothing():
    running, expected = summed(6)
    masked = running.combiner._sum.copy()
    for number, (name, shares) in enumerate(sorted(given_back(running).items())):
        if number < 2:
            turned_away("lying_helper", running.combiner.add_shares, name, shares | {"bank-03": bytes(33)})
        else:
            running.combiner.add_shares(name, shares)
    with pytest.raises(RoundAbortedError, match="gave back a right share of bank-03"):
        running.combiner.total()
    assert_array_equal(running.combiner._sum, masked)
    assert not np.array_equal(masked, expected)


def dealt_falsely(monkeypatch, dealers, dropped=(), num=6):
    """A sum that is confirmed, where these lenders dealt shares that open and match, and are of no secret of theirs."""
    running = new_sum(num)
    running.open()
    for name in running.names:
        with monkeypatch.context() as patched:
            if name in dealers:
                patched.setattr(participant, "split", lambda _, t, n: shamir.split(bytes(32), t, n))
            running.combiner.add_sealed(name, running.participants[name].share(running.adverts))
    running.ask()
    running.mask([name for name in running.names if name not in dropped])
    running.confirm()
    return running


@pytest.mark.parametrize("dropped", [(), (OTHER,)], ids=["own mask", "mask key"])
def test_a_sharer_whose_shares_give_no_secret_is_named_and_the_round_aborts(monkeypatch, dropped):
    running = dealt_falsely(monkeypatch, {OTHER}, dropped)
    running.unmask()
    masked = running.combiner._sum.copy()
    with pytest.raises(RoundAbortedError, match=f"try again without {OTHER}"):
        running.combiner.total()
    assert running.combiner.false_dealers == (OTHER,)
    assert running.combiner.liars == ()  # nobody gave back what was not handed out
    assert_array_equal(running.combiner._sum, masked)


def test_every_dealer_at_fault_is_known_after_one_sum(monkeypatch):
    running = dealt_falsely(monkeypatch, {"bank-01", "bank-04"})
    running.unmask()
    with pytest.raises(RoundAbortedError, match="try again without bank-01, bank-04"):
        running.combiner.total()
    assert running.combiner.false_dealers == ("bank-01", "bank-04")


def test_a_helper_that_lies_about_a_dealer_at_fault_is_told_apart_from_it(monkeypatch):
    running = dealt_falsely(monkeypatch, {"bank-04"})
    for name, shares in given_back(running).items():
        if name == "bank-01":
            turned_away("lying_helper", running.combiner.add_shares, name, shares | {"bank-04": bytes(33)})
        else:
            running.combiner.add_shares(name, shares)
    with pytest.raises(RoundAbortedError, match="try again without bank-04"):
        running.combiner.total()
    assert running.combiner.liars == ("bank-01",)
    assert running.combiner.false_dealers == ("bank-04",)


def test_helpers_that_lie_cannot_make_a_sharer_look_at_fault():
    """Not even as many as abort the sum: what they give back is not what it committed to."""
    running, _ = summed(7)
    for name, shares in given_back(running).items():
        turned_away("lying_helper", running.combiner.add_shares, name, shares | {"bank-03": bytes(33)})
    with pytest.raises(RoundAbortedError, match="0 lenders gave back a right share of bank-03"):
        running.combiner.total()
    assert running.combiner.false_dealers == ()


# What the coordinator turns away, one lender at a time


def test_one_spoilt_advert_is_turned_away_and_the_sum_goes_on_without_it():
    running = new_sum(6)
    adverts = {name: one.open() for name, one in running.participants.items()}
    digest, roster = context_of(running.names).digest(), running.combiner

    def signed(name, **changes):
        fields = {
            field: getattr(Advert.from_bytes(adverts[name]), field) for field in ("channel_key", "mask_key")
        }
        return (
            Advert(**(fields | changes), commitment=bytes(32))
            .signed(digest, name, identity_of(name))
            .to_bytes()
        )

    roster.add_advert("bank-00", adverts["bank-00"])
    taken = Advert.from_bytes(adverts["bank-00"]).mask_key
    own = Advert.from_bytes(adverts[ME]).mask_key
    for rule, name, advert in (
        ("once", "bank-00", adverts["bank-00"]),
        ("unenrolled", "invented", adverts[ME]),
        ("malformed", ME, adverts[ME][:-1]),
        ("advert_signature", ME, adverts[OTHER]),
        ("repeated_keys", ME, signed(ME, mask_key=taken)),
        ("repeated_keys", ME, signed(ME, channel_key=own)),
        ("weak_key", ME, signed(ME, channel_key=bytes(32))),
    ):
        turned_away(rule, running.combiner.add_advert, name, advert)
    for name in names_of(6)[2:]:
        running.combiner.add_advert(name, adverts[name])
    assert set(running.combiner.adverts()) == set(names_of(6)) - {ME}
    turned_away("order", running.combiner.add_advert, ME, adverts[ME])


def test_spoilt_shares_are_turned_away():
    running = new_sum(6)
    running.open(names_of(6)[:5])
    good = running.participants["bank-00"].share(running.adverts)
    for rule, name, sealed in (
        ("unenrolled", "bank-05", good),
        ("malformed", "bank-00", {}),
        ("malformed", "bank-00", good | {"bank-05": good[ME]}),
        ("malformed", "bank-00", good | {ME: good[ME][:-1]}),
        ("malformed", "bank-00", good | {"bank-00": b""}),
    ):
        turned_away(rule, running.combiner.add_sealed, name, sealed)
    running.combiner.add_sealed("bank-00", good)
    turned_away("once", running.combiner.add_sealed, "bank-00", good)
    running.share(names_of(5)[1:])
    running.ask()
    turned_away("once", running.combiner.ask, QUESTION)
    turned_away("order", running.combiner.add_sealed, "bank-01", good)
    turned_away("unenrolled", running.combiner.sealed_for, "bank-05")


def test_spoilt_vectors_are_turned_away():
    running = new_sum(6, size=4)
    turned_away("order", running.combiner.fold, ME, np.zeros(4, np.uint32))
    running.open()
    running.share(names_of(5))
    running.ask()
    for name, vector in (
        ("bank-05", np.zeros(4, np.uint32)),
        (ME, np.zeros(5, np.uint32)),
        (ME, np.zeros((4, 1), np.uint32)),
        (ME, np.zeros(4, np.int32)),
    ):
        turned_away("vector", running.combiner.fold, name, vector)
    running.mask()
    turned_away("vector", running.combiner.fold, ME, np.zeros(4, np.uint32))
    assert running.combiner.settle() == frozenset(names_of(5))
    turned_away("order", running.combiner.fold, ME, np.zeros(4, np.uint32))


def test_spoilt_confirmations_and_shares_given_back_are_turned_away():
    running = new_sum(6, size=4).upto("mask")
    running.mask(names_of(5))
    turned_away("order", running.combiner.add_confirmation, ME, bytes(64))
    turned_away("order", running.combiner.add_shares, ME, {})
    survivors = running.combiner.settle()
    confirmed = {name: running.participants[name].confirm(survivors) for name in survivors}
    for rule, name, confirmation in (
        ("confirmation", "bank-05", confirmed[ME]),
        ("confirmation", ME, confirmed[OTHER]),
        ("malformed", ME, confirmed[ME] + b"0"),
    ):
        turned_away(rule, running.combiner.add_confirmation, name, confirmation)
    for name in survivors:
        running.combiner.add_confirmation(name, confirmed[name])
    turned_away("once", running.combiner.add_confirmation, ME, confirmed[ME])
    assert len(running.combiner.confirmations()) == threshold_of(6)
    shares = running.participants[ME].unmask(running.combiner.confirmations())
    for rule, name, wrong in (
        ("unenrolled", "bank-05", shares),
        ("malformed", ME, {}),
        ("malformed", ME, shares | {"invented": bytes(33)}),
        ("malformed", ME, shares | {OTHER: bytes(32)}),
        ("malformed", ME, shares | {OTHER: b"\xff" * 33}),
    ):
        turned_away(rule, running.combiner.add_shares, name, wrong)
    running.combiner.add_shares(ME, shares)
    turned_away("once", running.combiner.add_shares, ME, shares)


def test_shares_that_come_late_still_finish_a_sum():
    running, expected = summed(6)
    answers = sorted(given_back(running).items())
    for name, shares in answers[:4]:
        running.combiner.add_shares(name, shares)
    with pytest.raises(RoundAbortedError, match=r"'round 1', attempt 0: 4 lenders gave back.*5 of 6 must"):
        running.combiner.total()
    running.combiner.add_shares(*answers[4])
    assert_array_equal(running.combiner.total(), expected)
    assert_array_equal(running.combiner.total(), expected)
    assert running.combiner._shares == {}


def test_a_cohort_outside_the_roster_has_no_combiner():
    roster = roster_of(names_of(4))
    context = context_of(names_of(5), roster=roster_digest(roster))
    turned_away("roster", Combiner, context, roster, 3)


# The digests that bind a sum


def test_everything_in_a_context_is_in_its_digest():
    names = names_of(6)
    changes = [
        {},
        {"federation": "fed-2"},
        {"job_id": "job-2"},
        {"plan": "c" * 64},
        {"stage": "round 2"},
        {"attempt": 1},
        {"cohort": names[:5], "threshold": 5},
        {"roster": "c" * 64},
        {"layout": "c" * 64},
        {"threshold": 4},
    ]
    assert len({context_of(names, **change).digest() for change in changes}) == len(changes)


def test_the_question_the_sharers_and_their_adverts_are_in_the_whole_context():
    adverts = {"bank-00": b"advert 0", "bank-01": b"advert 1"}
    digests = {
        asked_digest(b"context", QUESTION, adverts),
        asked_digest(b"contexT", QUESTION, adverts),
        asked_digest(b"context", QUESTION + b".", adverts),
        asked_digest(b"context", QUESTION, adverts | {"bank-02": b""}),
        asked_digest(b"context", QUESTION, {"bank-00": b"advert 0"}),
        asked_digest(b"context", QUESTION, adverts | {"bank-01": b"advert 2"}),
    }
    assert len(digests) == 6
    backwards = dict(reversed(adverts.items()))
    assert asked_digest(b"context", QUESTION, backwards) == asked_digest(b"context", QUESTION, adverts)


def test_a_roster_digest_holds_names_and_keys():
    roster = roster_of(names_of(3))
    swapped = roster | {"bank-00": roster["bank-01"], "bank-01": roster["bank-00"]}
    digests = {roster_digest(one) for one in (roster, swapped, roster_of(names_of(4)))}
    assert len(digests) == 3
    assert roster_digest(dict(reversed(roster.items()))) == roster_digest(roster)


def test_parts_are_framed_so_that_none_runs_into_the_next():
    framings = {
        framed("label", b"ab", b"c"),
        framed("label", b"a", b"bc"),
        framed("label", b"abc"),
        framed("label", b"abc", b""),
        framed("labelabc"),
    }
    assert len(framings) == 5


def test_signatures_and_commitments_name_their_lender():
    advert = Advert(bytes(32), bytes(32), bytes(32))
    assert advert.body(b"context", ME) != advert.body(b"context", OTHER)
    assert secret_commitment(b"context", ME, bytes(32)) != secret_commitment(b"context", OTHER, bytes(32))
    pair = bytes(33), bytes(33)
    deals = {
        share_commitments(b"context", *names, pair) for names in ((ME, OTHER), (OTHER, ME), (ME, "bank-03"))
    }
    assert len(deals) == 3


def test_the_coordinator_refuses_exactly_the_keys_whose_exchange_gives_no_secret():
    """Held against OpenSSL, which looks at the secret: by every point of low order, its neighbours and other keys."""
    private = sum_keys.private_key(bytes(range(32)))
    low = {point: point.to_bytes(32, "little") for point in sum_keys._LOW_ORDER}
    for public in low.values():
        with pytest.raises(ValueError, match="Error computing shared key"):
            private.exchange(X25519PublicKey.from_public_bytes(public))
        turned_away("weak_key", sum_keys.check_public, public, ME)
    others = {abs(point + shift) for point in low for shift in (-3, -2, 2, 3)} - low.keys()
    for point in (point for point in others if point < sum_keys._CURVE_PRIME):
        public = point.to_bytes(32, "little")
        sum_keys.check_public(public, ME)
        assert sum_keys.exchanged(private, public, ME) != bytes(32)
    for point in (sum_keys._CURVE_PRIME, sum_keys._CURVE_PRIME + 1, 2**255, 2**256 - 1):
        turned_away("weak_key", sum_keys.check_public, point.to_bytes(32, "little"), ME)


def test_every_key_is_for_one_use_one_pair_and_one_sum():
    """All from one exchanged secret, which would be a fault of its own."""
    secret = bytes(32)
    keys = [
        sum_keys.channel_key(secret, b"sum 1", ME, OTHER),
        sum_keys.channel_key(secret, b"sum 1", OTHER, ME),
        sum_keys.channel_key(secret, b"sum 2", ME, OTHER),
        sum_keys.pair_mask(secret, b"sum 1", ME, OTHER).key,
        sum_keys.pair_mask(secret, b"sum 1", ME, "bank-03").key,
        sum_keys.pair_mask(secret, b"sum 2", ME, OTHER).key,
        sum_keys.own_mask(secret, b"sum 1", ME).key,
        sum_keys.own_mask(secret, b"sum 1", OTHER).key,
        sum_keys.own_mask(secret, b"sum 2", ME).key,
    ]
    assert len(set(keys)) == len(keys)
    both = sum_keys.pair_mask(secret, b"sum 1", ME, OTHER), sum_keys.pair_mask(secret, b"sum 1", OTHER, ME)
    assert both[1] == both[0].undone()


# What a coordinator sees before it has t shares


def masked_twice(size=400_000):
    """One lender's masked vectors of zeros in two rounds."""
    vectors = []
    for number in (1, 2):
        running = new_sum(5, size=size, stage=f"round {number}").upto("mask")
        one = running.participants[ME]
        one.receive(running.sealed_for(ME), QUESTION)
        vectors.append(one.mask(np.zeros(size, np.uint32)))
    return vectors


def chances(first, second):
    """P-values of what must hold: each vector uniform in bytes and in size, nothing of one seen in the other."""

    def uniform(words):
        bytes_seen = np.bincount(words.view(np.uint8), minlength=256)
        return [stats.chisquare(bytes_seen).pvalue, stats.kstest(words / 2**32, "uniform").pvalue]

    together = stats.pearsonr(first.astype(np.float64), second.astype(np.float64)).pvalue
    return [*uniform(first), *uniform(second), *uniform(second - first), *uniform(first ^ second), together]


def test_masked_vectors_are_uniform_and_independent_between_rounds():
    assert min(chances(*masked_twice())) > REJECTED


def test_a_planted_reused_mask_is_found(monkeypatch):
    """The same keys and secrets in both rounds, and masks that forget which round they are for."""
    derived = sum_keys._derived
    secrets = iter([bytes([number]) * 32 for _ in (1, 2) for number in range(3 * 5)])
    monkeypatch.setattr(sum_keys, "_derived", lambda secret, _, info: derived(secret, bytes(32), info))
    monkeypatch.setattr(participant.secrets, "token_bytes", lambda _: next(secrets))
    assert min(chances(*masked_twice())) < REJECTED


def test_the_same_keys_and_secrets_give_other_masks_for_another_round(monkeypatch):
    """The context alone keeps two rounds' masks apart, should a lender's randomness ever repeat."""
    secrets = iter([bytes([number]) * 32 for _ in (1, 2) for number in range(3 * 5)])
    monkeypatch.setattr(participant.secrets, "token_bytes", lambda _: next(secrets))
    assert min(chances(*masked_twice())) > REJECTED


def test_a_sum_short_of_one_share_is_still_uniform():
    """All but one of the own masks taken off: what is left is uniform."""
    running = new_sum(5, size=200_000).upto("confirm")
    masks = {
        name: sum_keys.own_mask(secret, running.combiner._asked, name)
        for name, secret in own_secrets(running)
    }
    left = running.combiner._sum.copy()
    participant.add_masks(left, [mask.undone() for name, mask in masks.items() if name != OTHER])
    assert stats.chisquare(np.bincount(left.view(np.uint8), minlength=256)).pvalue > REJECTED
    participant.add_masks(left, [masks[OTHER].undone()])
    assert_array_equal(left, np.zeros(200_000, np.uint32))


def own_secrets(running):
    for owner in running.names:
        held = {
            running.names.index(name) + 1: one._secrets.held[owner][0]
            for name, one in running.participants.items()
        }
        yield owner, combine(dict(list(held.items())[: threshold_of(len(running.names))]))


def test_fresh_keys_and_secrets_for_every_sum():
    first, second = (new_sum(attempt=0).upto("confirm").participants[ME] for _ in (1, 2))
    assert set(secrets_of(first)).isdisjoint(secrets_of(second))
    assert first._advert != second._advert


def test_secrets_are_forgotten_when_the_shares_are_given():
    running = new_sum().upto("unmask")
    one = running.participants[ME]
    own = one._secrets
    one.unmask(running.combiner.confirmations())
    assert one._secrets is None
    assert (own.channel_private, own.mask_private, own.own, own.keys) == (b"", b"", b"", ())
    assert (own.channels, own.pairs, own.held, own.masks) == ({}, {}, {}, [])


def test_secrets_are_dropped_as_soon_as_a_step_is_past():
    running = new_sum().upto("confirm")
    own = running.participants[ME]._secrets
    assert (own.channel_private, own.mask_private, own.own, own.keys) == (b"", b"", b"", ())
    assert (own.channels, own.pairs, own.masks) == ({}, {}, [])
    assert set(own.held) == set(running.names)


# Memory


def test_the_coordinator_holds_one_vector_however_many_lenders_there_are():
    """Here 20 lenders and a million values; benchmarks/secure_aggregation.py --memory measures 100 and 10 million."""
    size, num = 1_000_000, 20
    running = new_sum(num, size=size).upto("mask")
    for name in running.names:
        running.participants[name].receive(running.sealed_for(name), QUESTION)
    tracemalloc.start()
    for name in running.names[:-2]:
        vector = np.zeros(size, np.uint32)
        running.combiner.fold(name, running.participants[name].mask(vector))
        del vector
    running.confirm()
    running.unmask()
    total = running.combiner.total(threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_array_equal(total, np.zeros(size, np.uint32))
    assert peak < 2 * 4 * size + 2_000_000  # the accumulator, the vector that arrives, keystream and messages

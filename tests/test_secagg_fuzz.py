"""Messages of any kind: what is not exactly right is refused by a rule, nothing else is raised, nothing hangs.

Each test goes on for a few times half a second, or FEDFIN_FUZZ_S seconds; for ten minutes in all:
`FEDFIN_FUZZ_S=55 pytest tests/test_secagg_fuzz.py --timeout=0`.
"""

import json
import os
import time

import numpy as np
import pytest
from cohorts import QUESTION, context_of, names_of, new_sum
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from spoiling import spoilt_bytes, spoilt_map

from fedfin.errors import ProtocolRefusalError
from fedfin.privacy.encoding import unpack
from fedfin.privacy.sum_context import SumContext
from fedfin.privacy.sum_messages import Advert
from fedfin.privacy.sum_rules import RULES
from fedfin.privacy.sum_shares import COMMITMENTS_BYTES, SEALED_BYTES

FUZZ_S = float(os.environ.get("FEDFIN_FUZZ_S", ".5"))
NUM, ME = 4, "bank-01"
LEAST = 3
NAMES = names_of(NUM)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def for_a_while(check):
    end = time.monotonic() + FUZZ_S
    while True:
        check()
        if time.monotonic() > end:
            return


def fuzzing(max_examples):
    return settings(
        max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def accepted(call, *arguments):
    """Whether the call took it; whatever else it raises fails the test."""
    rule = None
    try:
        call(*arguments)
    except ProtocolRefusalError as error:
        rule = error.rule
    assert rule is None or rule in RULES
    return rule is None


# Parsers


def test_only_a_context_written_canonically_is_read():
    right = context_of(NAMES).to_bytes()

    @fuzzing(200)
    @given(spoilt_bytes(right) | st.binary(max_size=300))
    def bytes_of_any_kind(data):
        if accepted(SumContext.from_bytes, data):
            assert SumContext.from_bytes(data).to_bytes() == data

    @fuzzing(200)
    @given(st.sampled_from(sorted(json.loads(right))), JSON)
    def values_of_any_kind(key, value):
        data = json.dumps(json.loads(right) | {key: value}, sort_keys=True, separators=(",", ":")).encode()
        if accepted(SumContext.from_bytes, data):
            context = SumContext.from_bytes(data)
            assert context.to_bytes() == data
            assert type(getattr(context, key)) is (tuple if key == "cohort" else type(value))

    for_a_while(bytes_of_any_kind)
    for_a_while(values_of_any_kind)


def test_adverts_and_vectors_are_read_at_their_length_only():
    @fuzzing(200)
    @given(st.binary(max_size=400), st.integers(0, 40), st.sampled_from([24, 32]))
    def bytes_of_any_kind(data, size, ring_bits):
        assert accepted(Advert.from_bytes, data) == (len(data) == 160)
        assert accepted(unpack, data, size, ring_bits) == (len(data) == size * ring_bits // 8)

    for_a_while(bytes_of_any_kind)


# A lender


def is_right(given_messages, right, own, least):
    """Every message is the right one and enough are there; whoever is left out may have dropped out."""
    everyone = own is None or own in given_messages
    return everyone and len(given_messages) >= least and given_messages.items() <= right.items()


def check_lender(step, right_of, call, own, least):
    """A lender takes right messages only; after anything else it is dead."""

    @fuzzing(25)
    @given(st.data())
    def messages_of_any_kind(data):
        running = new_sum(NUM).upto(step)
        mine, right = running.participants[ME], right_of(running)
        sent = data.draw(spoilt_map(right, NAMES))
        assert accepted(call, mine, sent) == is_right(sent, right, own, least)
        assert (mine._secrets is None) == (step == "unmask" or not is_right(sent, right, own, least))

    for_a_while(messages_of_any_kind)


def test_a_lender_takes_right_adverts_only():
    check_lender("share", lambda running: running.adverts, lambda mine, sent: mine.share(sent), ME, LEAST)


def test_a_lender_takes_right_shares_only():
    def receive(mine, sent):
        mine.receive(sent, QUESTION)

    check_lender("mask", lambda running: running.sealed_for(ME), receive, None, LEAST - 1)


def test_a_lender_takes_right_confirmations_only():
    def confirmations(running):
        return {name: running.combiner._confirmations[name] for name in running.names}

    check_lender("unmask", confirmations, lambda mine, sent: mine.unmask(sent), None, LEAST)


def test_a_lender_confirms_right_survivors_only():
    @fuzzing(25)
    @given(st.lists(st.sampled_from(NAMES) | st.text(max_size=10), max_size=6))
    def survivors_of_any_kind(names):
        mine = new_sum(NUM).upto("confirm").participants[ME]
        right = ME in names and set(names) <= set(NAMES) and len(set(names)) == len(names) >= LEAST
        assert accepted(mine.confirm, names) == right
        assert (mine._secrets is None) != right

    for_a_while(survivors_of_any_kind)


# The coordinator


def never_taken(running, call, right, name, strategy):
    """Whatever is sent in this lender's name but the right message, the coordinator refuses."""

    @fuzzing(30)
    @given(strategy, st.just(name) | st.text(max_size=10))
    def anything(sent, sender):
        assume(sent != right or sender != name)
        assert not accepted(call, sender, sent)

    for_a_while(anything)


def test_spoilt_contributions_leave_the_coordinators_sum_as_it_is():
    running = new_sum(NUM, size=3)
    combiner, mine = running.combiner, running.participants[ME]
    others = [name for name in NAMES if name != ME]

    advert = mine.open()
    never_taken(running, combiner.add_advert, advert, ME, spoilt_bytes(advert))
    combiner.add_advert(ME, advert)
    running.open(others)

    sealed = mine.share(running.adverts)
    lengths = {name: COMMITMENTS_BYTES if name == ME else SEALED_BYTES for name in NAMES}
    out_of_form = spoilt_map(sealed, NAMES).filter(
        lambda sent: {name: len(sent[name]) for name in sent} != lengths
    )
    never_taken(running, combiner.add_sealed, sealed, ME, out_of_form)
    combiner.add_sealed(ME, sealed)
    running.share(others)

    running.ask()
    vectors = {name: np.full(3, number, np.uint32) for number, name in enumerate(NAMES)}
    running.mask(None, vectors)

    survivors = combiner.settle()
    confirmation = mine.confirm(survivors)
    never_taken(running, combiner.add_confirmation, confirmation, ME, spoilt_bytes(confirmation))
    combiner.add_confirmation(ME, confirmation)
    running.confirm(others)

    shares = mine.unmask(combiner.confirmations())
    running.unmask(others)
    never_taken(running, combiner.add_shares, shares, ME, spoilt_map(shares, NAMES))
    assert_array_equal(combiner.total(), np.full(3, 0 + 1 + 2 + 3, np.uint32))


@pytest.mark.parametrize("name", ["add_advert", "add_sealed", "add_confirmation", "add_shares"])
def test_contributions_of_nobody_are_refused(name):
    running = new_sum(NUM).upto("unmask" if name == "add_shares" else "confirm")
    if name == "add_confirmation":
        running.combiner.settle()
    assert not accepted(
        getattr(running.combiner, name), "nobody", {} if name in {"add_sealed", "add_shares"} else b""
    )

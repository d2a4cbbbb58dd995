"""The chain of roster versions: who enters by whose signatures, and that nobody else does."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosters import FEDERATION, authority, chain, coordinator, founded, keys_of, member, signed, version

from fedfin.errors import LinkError, ProtocolRefusalError
from fedfin.identity import create_authority, create_lender_keys, fingerprint_of
from fedfin.roster_chain import RosterChain, SignedRoster
from fedfin.roster_versions import RosterMember, RosterVersion, changes_of, quorum_of, rotation_message

SIX = tuple(f"bank-{letter}" for letter in "abcdef")
FIRST = signed(version(SIX), SIX)


def check(*versions, complete=True):
    chain(*versions).verify(authority().root, FEDERATION, complete=complete)


def refused(rule, *versions, complete=True, says=": "):
    with pytest.raises(ProtocolRefusalError, match=says) as caught:
        check(*versions, complete=complete)
    assert caught.value.rule == rule


# The quorum


@pytest.mark.parametrize(
    ("members", "quorum"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7)]
)
def test_a_quorum_is_more_than_two_thirds(members, quorum):
    assert quorum_of(members) == quorum


@given(st.integers(1, 1000))
def test_two_quorums_share_more_than_a_third(members):
    assert 2 * quorum_of(members) - members > members / 3 or members < 4


# The first version


def test_the_first_version_is_signed_by_all():
    check(FIRST)
    assert chain(FIRST).missing().nothing


@pytest.mark.parametrize("silent", SIX)
def test_a_first_version_that_one_did_not_sign_is_refused(silent):
    one = signed(FIRST.version, set(SIX) - {silent})
    refused("roster_quorum", one, says=f"{silent} did not sign to enter")
    check(one, complete=False)
    assert chain(one).missing().names == (silent,)


def test_a_signature_under_anothers_name_is_refused():
    swapped = FIRST.with_signature("bank-a", FIRST.signatures["bank-b"])
    refused("roster_signature", swapped, says="bank-a's signature")


def test_a_stranger_cannot_sign():
    refused("roster_signature", signed(FIRST.version, (*SIX, "invented")), says="invented signed")


def test_a_version_that_the_coordinator_did_not_sign_is_refused():
    forged = signed(FIRST.version, SIX, by=create_lender_keys().identity)
    refused("roster_signature", forged, says="the coordinator's signature")


# Who enters


def test_a_newcomer_enters_by_a_quorum_and_its_own_signature():
    second = version((*SIX, "bank-g"), FIRST.version)
    check(FIRST, signed(second, (*SIX[:5], "bank-g")))


def test_without_a_quorum_an_invented_lender_does_not_enter():
    second = version((*SIX, "invented"), FIRST.version)
    one = signed(second, (*SIX[:4], "invented"))
    refused("roster_quorum", FIRST, one, says="1 more of its earlier members")
    missing = chain(FIRST, one).missing()
    assert (missing.newcomers, missing.quorum, missing.members) == ((), 1, ("bank-e", "bank-f"))


def test_many_invented_lenders_vote_for_nobody():
    invented = tuple(f"invented-{number}" for number in range(20))
    second = version((*SIX, *invented), FIRST.version)
    refused("roster_quorum", FIRST, signed(second, invented), says="5 more")


def test_a_newcomer_that_did_not_sign_does_not_enter():
    second = version((*SIX, "bank-g"), FIRST.version)
    refused("roster_quorum", FIRST, signed(second, SIX), says="bank-g did not sign to enter")


def test_the_newcomer_of_one_version_votes_in_the_next():
    second = signed(version((*SIX, "bank-g"), FIRST.version), (*SIX[:5], "bank-g"))
    third = version((*SIX, "bank-g", "bank-h"), second.version)
    check(FIRST, second, signed(third, ("bank-g", *SIX[:4], "bank-h")))
    refused("roster_quorum", FIRST, second, signed(third, (*SIX[:4], "bank-h")))


# Who leaves


def test_a_member_is_removed_by_a_quorum():
    second = version(SIX[:5], FIRST.version)
    check(FIRST, signed(second, SIX[:5]))
    check(FIRST, signed(second, (*SIX[:4], "bank-f")))  # it may vote on its own removal
    refused("roster_quorum", FIRST, signed(second, SIX[:4]), says="1 more")


def test_a_quorum_that_was_removed_is_none():
    """The coordinator takes out those who would not sign, and counts what is left."""
    second = version((*SIX[:2], "invented"), FIRST.version)
    refused("roster_quorum", FIRST, signed(second, ("bank-a", "invented")), says="1 more")
    # everybody who is in it has signed it: those whom it leaves out do not go by it
    check(FIRST, signed(second, ("bank-a", "bank-b", "invented")))


def test_three_lenders_go_on_without_one_that_lost_its_keys():
    first = signed(version(SIX[:3]), SIX[:3])
    second = version(SIX[:2], first.version)
    check(first, signed(second, SIX[:2]))
    refused("roster_quorum", first, signed(second, SIX[:1]))


def test_a_version_of_newcomers_only_needs_the_quorum_of_those_who_left():
    second = version(("bank-x", "bank-y"), FIRST.version)
    refused("roster_quorum", FIRST, signed(second, ("bank-x", "bank-y")), says="5 more")


# New keys


def test_new_keys_that_the_old_one_signed_need_nobody_else():
    new = create_lender_keys()
    others = {name: keys_of(name) for name in SIX}
    second = version({**others, "bank-a": new}, FIRST.version, rotated={"bank-a": keys_of("bank-a")})
    assert changes_of(FIRST.version, second).is_rotation
    check(FIRST, signed(second, ()))


def test_new_keys_without_the_old_ones_word_are_a_newcomers():
    new = create_lender_keys()
    keys = {**{name: keys_of(name) for name in SIX}, "bank-a": new}
    second = version(keys, FIRST.version)
    assert changes_of(FIRST.version, second).replaced == ("bank-a",)
    refused("roster_quorum", FIRST, signed(second, {"bank-a": new}), says="5 more")
    check(FIRST, signed(second, keys))


def test_the_old_key_of_a_replaced_member_does_not_vote():
    keys = {**{name: keys_of(name) for name in SIX}, "bank-a": create_lender_keys()}
    second = version(keys, FIRST.version)
    refused("roster_signature", FIRST, signed(second, SIX), says="bank-a's signature")


@pytest.mark.parametrize("signer", ["another lender", "its new key"])
def test_new_keys_that_somebody_else_signed_are_refused(signer):
    new = create_lender_keys()
    wrong = {"another lender": keys_of("bank-b"), "its new key": new}[signer]
    message = rotation_message(FEDERATION, member("bank-a"), member("bank-a", new))
    second = version(
        {**{name: keys_of(name) for name in SIX}, "bank-a": new},
        FIRST.version,
        rotations={"bank-a": wrong.identity.sign(message).hex()},
    )
    refused("roster_signature", FIRST, signed(second, ()), says="bank-a's old key")


def test_a_rotation_serves_for_the_keys_it_names_and_no_others():
    new, other = create_lender_keys(), create_lender_keys()
    keys = {name: keys_of(name) for name in SIX}
    right = version({**keys, "bank-a": new}, FIRST.version, rotated={"bank-a": keys_of("bank-a")})
    second = version({**keys, "bank-a": other}, FIRST.version, rotations=dict(right.rotations))
    refused("roster_signature", FIRST, signed(second, ()))


def test_a_rotation_beside_a_newcomer_needs_the_quorum():
    keys = {**{name: keys_of(name) for name in SIX}, "bank-a": create_lender_keys()}
    second = version(
        {**keys, "bank-g": keys_of("bank-g")}, FIRST.version, rotated={"bank-a": keys_of("bank-a")}
    )
    refused("roster_quorum", FIRST, signed(second, ("bank-g",)))
    check(FIRST, signed(second, (*SIX[:5], "bank-g")))  # with the keys of the version before


def test_a_rotation_that_changes_nothing_is_refused():
    second = version((*SIX, "bank-g"), FIRST.version, rotated={"bank-b": keys_of("bank-b")})
    refused("roster_chain", FIRST, signed(second, (*SIX, "bank-g")))


# The chain


def test_a_version_that_follows_on_another_is_refused():
    other = version(SIX[:5])
    second = version((*SIX, "bank-g"), other)
    refused("roster_chain", FIRST, signed(second, (*SIX, "bank-g")), says="does not follow")


def test_a_version_left_out_or_out_of_its_place_is_refused():
    second = signed(version((*SIX, "bank-g"), FIRST.version), (*SIX, "bank-g"))
    third = signed(version(SIX, second.version), SIX)
    check(FIRST, second, third)
    refused("roster_chain", FIRST, third)
    refused("roster_chain", second)
    refused("roster_chain", FIRST, third, second)


def test_an_incomplete_version_carries_no_other():
    second = signed(version((*SIX, "bank-g"), FIRST.version), ("bank-g",))
    third = signed(version((*SIX, "bank-g", "bank-h"), second.version), (*SIX, "bank-g", "bank-h"))
    refused("roster_quorum", FIRST, second, third, complete=False)


def test_a_version_that_changes_nothing_is_refused():
    refused("roster_chain", FIRST, signed(version(SIX, FIRST.version), SIX), says="changes nothing")


@pytest.mark.parametrize(
    "change", [{"federation": "other"}, {"coordinator": keys_of("x").witness.public_key()}]
)
def test_a_version_of_another_federation_or_coordinator_is_refused(change):
    if "coordinator" in change:
        change = {"coordinator": change["coordinator"].public_bytes_raw().hex()}
    refused("roster_chain", signed(version(SIX, **change), SIX), says="another coordinator or federation")


def test_holds_tells_the_very_version():
    second = signed(version((*SIX, "bank-g"), FIRST.version), (*SIX, "bank-g"))
    both = chain(FIRST, second)
    assert both.holds(FIRST.version)
    assert both.holds(second.version)
    assert not both.holds(version((*SIX, "bank-h"), FIRST.version))
    assert not chain(FIRST).holds(second.version)
    assert both.last.quorum == 5


# The coordinator's key


def test_the_authority_states_the_coordinators_key():
    statement = coordinator().statement
    statement.verify(authority().root, FEDERATION)
    assert type(statement).from_json(statement.to_json()) == statement
    assert statement.root == fingerprint_of(authority().root)


@pytest.mark.parametrize("change", ["key", "federation", "root", "signature"])
def test_an_altered_statement_is_refused(change):
    statement = coordinator().statement
    other = create_authority(FEDERATION)
    changes = {
        "key": {"key": keys_of("x").identity.public_key().public_bytes_raw().hex()},
        "federation": {"federation": "other"},
        "root": {"root": other.fingerprint},
        "signature": {"signature": "00" * 70},
    }
    with pytest.raises(ProtocolRefusalError) as caught:
        replace(statement, **changes[change]).verify(authority().root, FEDERATION)
    assert caught.value.rule == "coordinator_key"
    if change == "root":
        with pytest.raises(ProtocolRefusalError):
            statement.verify(other.root, FEDERATION)


def test_a_chain_of_another_root_is_refused():
    with pytest.raises(ProtocolRefusalError) as caught:
        chain(FIRST).verify(create_authority(FEDERATION).root, FEDERATION)
    assert caught.value.rule == "coordinator_key"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"federation":1,"key":"","root":"","signature":""}', '{"a":' * 2000],
)
def test_what_is_no_statement_is_refused(text):
    with pytest.raises(LinkError):
        type(coordinator().statement).from_json(text)


# As text


def test_a_chain_arrives_as_it_was_stated():
    second = signed(version((*SIX, "bank-g"), FIRST.version), (*SIX[:5], "bank-g"))
    sent = chain(FIRST, second)
    arrived = RosterChain.from_json(sent.to_json())
    assert arrived == sent
    assert arrived.last.digest() == second.version.digest()
    assert list(arrived.last.roster().keys) == [*SIX, "bank-g"]
    assert arrived.last.witness_keys()["bank-a"] == keys_of("bank-a").witness.public_key()


@given(st.data())
def test_a_flipped_character_anywhere_is_refused(data):
    text = chain(FIRST).to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from('0123456789abcdef"{}[]:,')).replace(text[at], "g")
    with pytest.raises((LinkError, ProtocolRefusalError)):
        RosterChain.from_json(text[:at] + other + text[at + 1 :]).verify(authority().root, FEDERATION)


@pytest.mark.parametrize("spaced", [True, False])
def test_the_same_chain_written_otherwise_is_refused(spaced):
    document = json.loads(chain(FIRST).to_json())
    text = json.dumps(document) if spaced else json.dumps(document, separators=(",", ":"))[:-1] + "}}"
    with pytest.raises(LinkError):
        RosterChain.from_json(text)


@pytest.mark.parametrize("number", [True, 1.0, "1", 0, -1, None])
def test_a_number_that_is_none_is_refused(number):
    document = {**FIRST.version.to_document(), "number": number}
    with pytest.raises(LinkError):
        RosterVersion.from_document(document)


def test_two_members_with_one_key_are_refused():
    keys = {"bank-a": keys_of("bank-a"), "bank-b": keys_of("bank-a")}
    with pytest.raises(LinkError, match="two keys"):
        version(keys)
    own = member("bank-a")
    with pytest.raises(LinkError, match="two keys"):
        replace(version(("bank-a",)), members={"bank-a": replace(own, witness=own.identity)})


@pytest.mark.parametrize("field", ["identity", "witness", "node", "tls", "name"])
@pytest.mark.parametrize("value", ["", "0" * 63, "G" * 64, "A" * 64])
def test_a_member_that_does_not_parse_is_refused(field, value):
    with pytest.raises(LinkError):
        RosterMember(**{**member("bank-a").to_document(), field: value})


def test_no_repr_shows_a_key():
    shown = repr(founded(SIX)) + repr(coordinator())
    assert member("bank-a").identity not in shown
    assert FIRST.signatures["bank-a"] not in shown
    assert coordinator().statement.signature not in shown


def test_a_signed_version_that_does_not_parse_is_refused():
    document = FIRST.to_document()
    for broken in ({}, None, {**document, "more": 1}, {**document, "signatures": {"bank-a": 7}}):
        with pytest.raises(LinkError):
            SignedRoster.from_document(broken)

"""The roster as it travels: it arrives as it was stated, and what is not canonical is refused."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fedfin.errors import LinkError
from fedfin.identity import public_pem
from fedfin.roster import Roster

NORTH, SOUTH = (Ed25519PrivateKey.generate().public_key() for _ in range(2))
ROSTER = Roster.of({"south": public_pem(SOUTH), "north": public_pem(NORTH)})


def test_a_roster_arrives_as_it_was_stated():
    arrived = Roster.from_json(ROSTER.to_json())
    assert arrived == ROSTER
    assert list(arrived.keys) == ["north", "south"]
    assert arrived.public_keys() == {"north": NORTH, "south": SOUTH}
    assert arrived.digest() == ROSTER.digest()


def test_another_key_is_another_roster():
    other = Roster.of(
        {"north": public_pem(NORTH), "south": public_pem(Ed25519PrivateKey.generate().public_key())}
    )
    assert other.digest() != ROSTER.digest()
    assert other.fingerprints()["north"] == ROSTER.fingerprints()["north"]
    assert other.fingerprints()["south"] != ROSTER.fingerprints()["south"]


@pytest.mark.parametrize(
    "members",
    [
        [],
        [["north", public_pem(NORTH)]],
        [{"identity": public_pem(NORTH)}],
        [{"identity": public_pem(NORTH), "name": "North"}],
        [{"identity": public_pem(NORTH), "name": "north\n"}],
        [{"identity": public_pem(NORTH), "name": ["north"]}],
        [{"identity": public_pem(NORTH), "name": 7}],
        [{"identity": 7, "name": "north"}],
        [{"identity": "", "name": "north"}],
        [{"identity": public_pem(NORTH).strip(), "name": "north"}],
        [{"identity": public_pem(ec.generate_private_key(ec.SECP256R1()).public_key()), "name": "north"}],
        [{"identity": public_pem(NORTH), "name": "north", "vote": 2}],
        [{"identity": public_pem(NORTH), "name": name} for name in ("north", "south")],
        [{"identity": public_pem(key), "name": "north"} for key in (NORTH, SOUTH)],
        [{"identity": public_pem(key), "name": name} for name, key in (("south", SOUTH), ("north", NORTH))],
    ],
    ids=[
        *(
            "empty",
            "a-list",
            "no-name",
            "capital",
            "newline",
            "name-list",
            "name-number",
            "key-number",
            "no-key",
        ),
        *("another-pem", "another-kind", "a-key-too-many", "one-key-twice", "one-name-twice", "unsorted"),
    ],
)
def test_what_is_no_canonical_roster_is_refused(members):
    with pytest.raises(LinkError):
        Roster.from_json(json.dumps({"members": members}, separators=(",", ":")))


@given(st.text(max_size=50))
def test_any_other_text_is_refused(text):
    with pytest.raises(LinkError):
        Roster.from_json(text)


def test_the_same_members_written_otherwise_are_refused():
    with pytest.raises(LinkError, match="canonically"):
        Roster.from_json(json.dumps(json.loads(ROSTER.to_json())))


def test_the_repr_shows_no_key():
    assert "BEGIN" not in repr(ROSTER)
    assert public_pem(NORTH).splitlines()[1] not in repr(ROSTER)


def test_a_raw_key_is_no_pem():
    raw = NORTH.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    with pytest.raises(LinkError, match="key of north"):
        Roster.of({"north": raw})

"""The bytes of a job's messages: they come back as they were sent, and what does not fit exactly is a LinkError."""

import dataclasses
import json
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal

from fedfin import update
from fedfin.errors import LinkError
from fedfin.update import (
    Accepted,
    Advertised,
    AskHistogram,
    Confirm,
    Confirmed,
    Done,
    Evaluate,
    Finish,
    Histogram,
    Mask,
    Masked,
    Message,
    Open,
    Propose,
    Refused,
    RosterSigned,
    Scores,
    Shared,
    ShareKeys,
    ShowRoster,
    Train,
    Unmask,
    Unmasked,
    Update,
    decode,
    encode,
)

PLAIN = (Propose, Accepted, Refused, AskHistogram, Histogram, Train, Update, Evaluate, Scores, Finish, Done)
SECURE = (Open, Advertised, ShareKeys, Shared, Mask, Masked, Confirm, Confirmed, Unmask, Unmasked)
ROSTER = (ShowRoster, RosterSigned)
KINDS = (*PLAIN, *SECURE, *ROSTER)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def vectors(dtype, width):
    finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return arrays(dtype, st.integers(0, 5), elements=finite)


def values_of(item):
    """The values that a field of a message may have, from its annotation."""
    short = st.binary(max_size=20)
    by_type = {
        str: TEXTS,
        int: st.integers(-(2**63), 2**63 - 1),
        float: FLOATS,
        bytes: short,
        dict[str, bytes]: st.dictionaries(TEXTS, short, max_size=3),
        tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    }
    if item.type in by_type:
        return by_type[item.type]
    if "uint8" in str(item.type):
        return arrays(np.uint8, st.integers(0, 5))
    return vectors(np.float64, 64) if "float64" in str(item.type) else vectors(np.float32, 32)


def messages(*kinds):
    return st.one_of(
        st.builds(kind, **{item.name: values_of(item) for item in dataclasses.fields(kind)}) for kind in kinds
    )


def pack(header, *parts, length=None):
    """Bytes with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"".join([b"FFN1", struct.pack("<I", len(text) if length is None else length), text, *parts])


def header_of(data):
    (length,) = struct.unpack("<I", data[4:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assert_same_message(one, other):
    assert type(one) is type(other)
    for item in dataclasses.fields(one):
        mine, theirs = getattr(one, item.name), getattr(other, item.name)
        if isinstance(mine, np.ndarray):
            assert_array_equal(mine, theirs, strict=True)
        else:
            assert (type(mine), mine) == (type(theirs), theirs)


def decodes_or_refuses(data):
    """The only two outcomes of bytes from outside."""
    try:
        message = decode(data, *KINDS)
    except LinkError:
        return
    assert_same_message(decode(encode(message), *KINDS), message)


UPDATE = Update("job", 3, "f", np.array([1.5, -2.0], dtype=np.float32))


# What was sent arrives


def test_the_round_trip_below_is_of_every_kind_of_message():
    assert set(KINDS) == set(update._KINDS.values())
    public = {getattr(update, name) for name in update.__all__} - {
        Message,
        decode,
        encode,
        update.with_witness,
    }
    assert set(KINDS) == public


@given(messages(*KINDS))
def test_a_message_arrives_as_it_was_sent(message):
    assert_same_message(decode(encode(message), *KINDS), message)


@given(messages(*KINDS))
def test_equal_messages_have_equal_bytes(message):
    assert encode(message) == encode(dataclasses.replace(message))
    assert encode(decode(encode(message), *KINDS)) == encode(message)


def test_the_bytes_are_magic_header_and_little_endian_arrays():
    data = encode(UPDATE)
    header, body = header_of(data)
    assert data[:4] == b"FFN1"
    fields = {"job_id": "job", "round": 3, "fingerprint": "f", "delta": {"dtype": "float32", "size": 2}}
    assert header == {"kind": "Update", "fields": fields}
    assert body == struct.pack("<ff", 1.5, -2.0)


def test_byte_order_and_strides_of_the_sender_do_not_matter():
    strange = np.array([1.5, 0.0, -2.0, 0.0], dtype=">f4")[::2]
    assert encode(dataclasses.replace(UPDATE, delta=strange)) == encode(UPDATE)


def test_an_array_that_arrived_is_the_receivers_own():
    delta = decode(encode(UPDATE), Update).delta
    delta[0] = 7.0
    assert (delta.flags.writeable, delta.flags.owndata, delta.dtype) == (True, True, np.dtype("float32"))


@given(messages(Histogram, Train, Update, Evaluate, Scores, Finish, Mask, Masked))
def test_the_repr_shows_no_value_of_an_array(message):
    for item in dataclasses.fields(message):
        if isinstance(getattr(message, item.name), np.ndarray):
            assert item.name not in repr(message)


@given(messages(*KINDS), st.sampled_from(KINDS))
def test_a_message_that_was_not_due_is_refused(message, due):
    if isinstance(message, due):
        assert_same_message(decode(encode(message), due), message)
    else:
        with pytest.raises(LinkError, match=rf"sent {type(message).__name__} where {due.__name__} was due"):
            decode(encode(message), due)


# What does not fit is refused


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(LinkError):
        decode(data, *KINDS)


@given(st.binary(max_size=200))
def test_random_bytes_after_the_magic_are_refused(data):
    with pytest.raises(LinkError):
        decode(b"FFN1" + data, *KINDS)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_a_random_header_is_refused(header, body):
    with pytest.raises(LinkError):
        decode(pack(header, body), *KINDS)


@given(messages(*KINDS), st.data())
def test_cut_bytes_are_refused(message, data):
    whole = encode(message)
    with pytest.raises(LinkError, match=r"both sides must run the same release|send it again"):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))], *KINDS)


@given(messages(*KINDS), st.binary(min_size=1, max_size=9))
def test_bytes_beyond_the_end_are_refused(message, more):
    with pytest.raises(LinkError, match="holds more than it may"):
        decode(encode(message) + more, *KINDS)


@settings(max_examples=300)
@given(messages(*KINDS), st.data())
def test_an_altered_byte_is_refused_or_gives_another_whole_message(message, data):
    altered = bytearray(encode(message))
    altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(altered))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(messages(*KINDS), JSON, st.data())
def test_a_field_that_holds_something_else_is_refused_or_gives_another_whole_message(message, value, data):
    header, body = header_of(encode(message))
    header["fields"][data.draw(st.sampled_from(sorted(header["fields"])))] = value
    decodes_or_refuses(pack(header, body))


@given(JSON)
def test_a_header_of_any_json_is_refused(header):
    with pytest.raises(LinkError):
        decode(pack(header), *KINDS)
    with pytest.raises(LinkError):
        decode(pack({"kind": header, "fields": {}}), *KINDS)


@given(messages(*KINDS), st.data())
def test_a_message_without_one_of_its_fields_is_refused_by_the_fields_name(message, data):
    header, body = header_of(encode(message))
    gone = data.draw(st.sampled_from(sorted({*header["fields"]} - {"witness"})))
    del header["fields"][gone]
    with pytest.raises(LinkError, match=rf"{type(message).__name__} lacks {gone}; both sides"):
        decode(pack(header, body), *KINDS)


@given(messages(*KINDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_witness_is_put_on_a_messages_bytes_and_taken_off_and_changes_nothing_else(message, witness):
    bare = encode(dataclasses.replace(message, witness=""))
    carrying = update.with_witness(bare, witness)
    assert decode(carrying, *KINDS).witness == witness
    assert carrying == encode(dataclasses.replace(message, witness=witness))
    assert update.with_witness(carrying, "") == bare


@given(messages(*KINDS))
def test_a_field_or_header_too_many_is_refused(message):
    header, body = header_of(encode(message))
    for more in (
        {**header, "fields": {**header["fields"], "more": 1}},
        {**header, "more": 1},
    ):
        with pytest.raises(LinkError, match="holds more than it may"):
            decode(pack(more, body), *KINDS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_is_refused(value):
    for message in (
        Histogram("job", np.array([1.0, value])),
        Train("job", 1, "[]", "f", np.array([1.0, value], dtype=np.float32)),
        Update("job", 1, "f", np.array([value], dtype=np.float32)),
        Finish("job", "completed", 1, "[]", "f", np.array([value], dtype=np.float32)),
    ):
        with pytest.raises(LinkError, match="not finite; the sender must mend its training"):
            decode(encode(message), *KINDS)


@pytest.mark.parametrize("weight", [np.nan, np.inf, 10**400, -(10**400)])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(LinkError, match=r"Accepted\.weight is not a finite number; the sender must mend"):
        decode(pack({"kind": "Accepted", "fields": {"job_id": "job", "weight": weight}}), Accepted)


def test_a_whole_number_is_a_weight_too():
    header = {"kind": "Accepted", "fields": {"job_id": "job", "weight": 3}}
    weight = decode(pack(header), Accepted).weight
    assert (type(weight), weight) == (float, 3.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job_id", 7),
        ("job_id", None),
        ("round", 1.0),
        ("round", True),
        ("round", "1"),
        ("fingerprint", ["f"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_name(field, value):
    header, body = header_of(encode(UPDATE))
    header["fields"][field] = value
    with pytest.raises(LinkError, match=rf"Update\.{field} is not a (str|int); both sides"):
        decode(pack(header, body), Update)


def test_text_that_can_neither_be_kept_nor_shown_is_refused():
    header = {"kind": "Refused", "fields": {"job_id": "job", "reason": "\ud800"}}
    with pytest.raises(LinkError, match=r"Refused\.reason holds half a character"):
        decode(pack(header), Refused)


@pytest.mark.parametrize("value", ["0", "0g", "AB", "0x", " 00", "0\n", 7, None, ["00"], {"00": "00"}])
def test_bytes_that_are_not_hexadecimal_are_refused(value):
    header = {"kind": "Advertised", "fields": {"job_id": "job", "sum": "s", "advert": value}}
    with pytest.raises(LinkError, match=r"Advertised\.advert is not (bytes|written in hexadecimal digits)"):
        decode(pack(header), Advertised)


@pytest.mark.parametrize(
    "value", ["00", None, [["north", "00"]], {"north": "0"}, {"north": 0}, {"north": None}]
)
def test_a_map_that_is_not_of_bytes_is_refused(value):
    header = {"kind": "ShareKeys", "fields": {"job_id": "job", "sum": "s", "adverts": value}}
    with pytest.raises(LinkError, match=r"ShareKeys\.adverts is not (dict|written in hexadecimal digits)"):
        decode(pack(header), ShareKeys)


@pytest.mark.parametrize("value", ["north", {"north": "00"}, [7], [None], [["north"]], None])
def test_a_list_that_is_not_of_names_is_refused(value):
    header = {"kind": "Confirm", "fields": {"job_id": "job", "sum": "s", "survivors": value, "next": ""}}
    with pytest.raises(LinkError, match=r"Confirm\.survivors is not tuple\[str, \.\.\.\]; both sides"):
        decode(pack(header), Confirm)


def test_a_name_with_half_a_character_is_refused():
    header = {"kind": "ShareKeys", "fields": {"job_id": "job", "sum": "s", "adverts": {"\ud800": "00"}}}
    with pytest.raises(LinkError, match=r"ShareKeys\.adverts holds half a character"):
        decode(pack(header), ShareKeys)


@pytest.mark.parametrize(
    "header",
    [
        b'{"kind": "Open", "fields": {"job_id": "a", "job_id": "b", "context": ""}}',
        b'{"kind": "ShareKeys", "fields": {"job_id": "a", "sum": "s", "adverts": {"north": "00", "north": "01"}}}',
    ],
    ids=["field", "map"],
)
def test_a_name_that_stands_twice_is_refused(header):
    with pytest.raises(LinkError, match="a message of an unknown kind"):
        decode(pack(header), Open, ShareKeys)


def test_a_masked_vector_is_read_where_it_lies():
    data = encode(Masked("job", "s", np.arange(5, dtype=np.uint8)))
    assert np.shares_memory(decode(data, Masked).values, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    "claim",
    [
        {"dtype": "float64", "size": 1},
        {"dtype": "int32", "size": 2},
        {"dtype": "object", "size": 2},
        {"dtype": "float32", "size": 2.0},
        {"dtype": "float32", "size": True},
        {"dtype": "float32", "size": "2"},
        {"dtype": "float32"},
        {"dtype": "float32", "size": 2, "order": "C"},
        [1.5, -2.0],
        "float32",
        None,
    ],
)
def test_an_array_of_another_type_is_refused(claim):
    header, body = header_of(encode(UPDATE))
    header["fields"]["delta"] = claim
    with pytest.raises(LinkError, match=r"Update\.delta is no float32 array; both sides"):
        decode(pack(header, body), Update)


@pytest.mark.parametrize("size", [3, 2**31, 2**62, 2**64, 10**400, -1, -(2**62), -(10**400)])
def test_a_huge_or_negative_size_is_refused_before_any_memory_is_taken(size):
    header, body = header_of(encode(UPDATE))
    header["fields"]["delta"]["size"] = size
    with pytest.raises(LinkError, match=r"Update\.delta was cut on its way or is too long"):
        decode(pack(header, body), Update)


def test_more_values_than_any_model_has_are_refused(monkeypatch):
    monkeypatch.setattr(update, "_MAX_VALUES", 1)
    with pytest.raises(LinkError, match=r"Update\.delta was cut on its way or is too long"):
        decode(encode(UPDATE), Update)


@pytest.mark.parametrize("length", [2**32 - 1, 4 * 1024 * 1024 + 1, 9])
def test_a_header_longer_than_allowed_or_than_the_bytes_is_refused(length):
    with pytest.raises(LinkError, match="a message that was cut"):
        decode(pack(b"{}", length=length), Update)


@pytest.mark.parametrize("nest", [b"[", b'{"a":'])
def test_a_header_nested_without_end_is_refused(nest):
    with pytest.raises(LinkError, match="a message of an unknown kind"):
        decode(pack(nest * sys.getrecursionlimit() * 20), Update)


@pytest.mark.parametrize("kind", ["Message", "LinkError", "update", "", "__class__", None, 7, ["Update"], {}])
def test_an_unknown_kind_is_refused(kind):
    header, body = header_of(encode(UPDATE))
    header["kind"] = kind
    with pytest.raises(LinkError, match="a message of an unknown kind; both sides"):
        decode(pack(header, body), *KINDS)


def test_the_base_of_all_messages_is_no_message():
    with pytest.raises(LinkError, match="a message of an unknown kind"):
        decode(encode(Message("job")), Message)

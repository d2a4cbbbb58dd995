"""Flower's envelope around a message: one bytes value, and nothing else is taken for one."""

import io
import logging

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedfin.errors import LinkError
from fedfin.update import (
    AskHistogram,
    Confirm,
    Evaluate,
    Finish,
    Mask,
    Message,
    Open,
    Propose,
    ShareKeys,
    ShowRoster,
    Train,
    Unmask,
)
from fedfin.wire import MESSAGE_TYPES, from_record, plain_log, to_record

NOT_OURS = "Flower delivered a message that is not fedfin's; both sides must run fedfin"


@given(st.binary(max_size=100))
def test_a_messages_bytes_come_out_of_the_envelope_as_they_went_in(data):
    assert from_record(to_record(data)) == data


def test_the_envelope_is_one_bytes_value_in_one_config_record():
    record = to_record(b"message")
    assert list(record) == ["fedfin"]
    assert dict(record.config_records["fedfin"]) == {"message": b"message"}


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"message": b"m"})}),
        RecordDict({"fedfin": ConfigRecord({"other": b"m"})}),
        RecordDict({"fedfin": ConfigRecord({"message": "text"})}),
        RecordDict({"fedfin": ConfigRecord({"message": [b"m"]})}),
        RecordDict({"fedfin": ConfigRecord({"message": b"m", "more": b"m"})}),
        RecordDict({"fedfin": MetricRecord({"message": 1})}),
        RecordDict({"fedfin": ArrayRecord()}),
        RecordDict({"fedfin": ConfigRecord({"message": b"m"}), "more": MetricRecord({"loss": 1.0})}),
    ],
    ids=["empty", "name", "key", "text", "list", "more-values", "metrics", "arrays", "more-records"],
)
def test_any_other_record_is_refused(record):
    with pytest.raises(LinkError, match=NOT_OURS):
        from_record(record)


def test_every_request_and_no_answer_has_a_message_type_of_flower():
    asked = {Propose, AskHistogram, Train, Evaluate, Finish}
    assert set(MESSAGE_TYPES) == asked | {Open, ShareKeys, Mask, Confirm, Unmask, ShowRoster}
    assert len(set(MESSAGE_TYPES.values())) == len(MESSAGE_TYPES)
    assert {text.partition(".")[0] for text in MESSAGE_TYPES.values()} == {"query", "train", "evaluate"}
    assert all(issubclass(kind, Message) for kind in MESSAGE_TYPES)


def test_flowers_log_in_a_file_has_no_colours():
    """Told in words, since Flower's handler asks no NO_COLOR."""
    from flwr.supercore.logger import console_handler, log

    stream, coloured = console_handler.stream, console_handler.colored
    written = io.StringIO()
    try:
        console_handler.setStream(written)
        plain_log()
        log(logging.WARNING, "a node went away")
    finally:
        console_handler.setStream(stream)
        console_handler.colored = coloured
    assert "a node went away" in written.getvalue()
    assert "\x1b" not in written.getvalue()

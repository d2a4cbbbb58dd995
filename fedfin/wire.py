"""Flower's envelope around our bytes: one bytes value in one ConfigRecord.

One value and not one Array a tensor: a model of many tensors costs Flower one request an object (288 against
108 requests for three rounds, measured), and bytes in a ConfigRecord are the fewest objects of all.
"""

from collections.abc import Callable
from typing import Final

from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.logger import update_console_handler

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

__all__ = ["MESSAGE_TYPES", "THIN_BUNDLE_NAME", "from_record", "plain_log", "pull_soon", "to_record"]

_RECORD: Final = "fedfin"
_KEY: Final = "message"

MESSAGE_TYPES: Final[dict[type[Message], str]] = {
    Propose: "query.propose",
    AskHistogram: "query.histogram",
    Train: "train.round",
    Evaluate: "evaluate.round",
    Open: "query.open",
    ShareKeys: "query.share",
    Mask: "train.mask",
    Confirm: "query.confirm",
    Unmask: "query.unmask",
    Finish: "query.finish",
    ShowRoster: "query.roster",
}
"""Flower's message type for each request of ours."""

THIN_BUNDLE_NAME: Final = "fedfin-no-code"
"""Name of the bundle that Flower wants for a run; it carries no code and lenders never fetch it."""


def plain_log() -> None:
    """Let Flower log without the codes of colours, which would stand in a log file; it asks no environment variable."""
    update_console_handler(colored=False)


def pull_soon(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Pull a message's objects, looking again every 0.05 s and for ten seconds at most.

    Flower's own defaults look again after a whole second, which a round would feel, and for two hours, for which
    a lender that died while it was sending would hold up its coordinator.
    """
    return pull_objects(object_ids, pull_object_fn, initial_backoff=0.05, backoff_cap=0.4, max_time=10.0)


def to_record(data: bytes) -> RecordDict:
    """Wrap a message's bytes."""
    return RecordDict({_RECORD: ConfigRecord({_KEY: data})})


def from_record(record: RecordDict) -> bytes:
    """Unwrap a message's bytes.

    Raises:
        LinkError: The record is not one of ours.
    """
    try:
        ours = record.config_records[_RECORD]
        value = ours[_KEY]
    except KeyError as error:
        msg = "Flower delivered a message that is not fedfin's; both sides must run fedfin"
        raise LinkError(msg) from error
    if not isinstance(value, bytes) or len(record) != 1 or len(ours) != 1:
        msg = "Flower delivered a message that is not fedfin's; both sides must run fedfin"
        raise LinkError(msg)
    return value

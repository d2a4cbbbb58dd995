"""The messages of a job, as frozen types, and their bytes.

One message is one bytes value: four bytes of magic, four of header length, a JSON header, then the arrays one
after the other, little-endian. Both sides refuse what does not fit exactly; nothing is executed, nothing pickled.
Flower carries the bytes (`fedfin.wire`) and never looks into them.
"""

import dataclasses
import json
import re
import struct
import sys
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import LinkError

__all__ = [
    "Accepted",
    "AskHistogram",
    "Done",
    "Finish",
    "Histogram",
    "Message",
    "Propose",
    "Refused",
    "Train",
    "Update",
    "decode",
    "encode",
]

_MAGIC: Final = b"FFN1"
_MAX_HEADER: Final = 4 * 1024 * 1024
_MAX_VALUES: Final = 200_000_000
_MAX_FLOAT: Final = sys.float_info.max
_HALF_CHARACTER: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; `job_id` names the job (a coordinator's random id, the same over restarts)."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Propose(Message):
    """Coordinator: will you take part? `plan` is the JobPlan as JSON text."""

    plan: str
    schema_fingerprint: str


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """Lender: yes; the whole job is reserved in its ledger. `weight` is capped and bucketed."""

    weight: float


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Lender: no, and why, in words for the coordinator's operator."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskHistogram(Message):
    """Coordinator: count your loans on the schema's public grid."""


@dataclass(frozen=True, slots=True)
class Histogram(Message):
    """Lender: the counts of all feature columns, noised in mode local; float64, shape (cells,)."""

    counts: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Train(Message):
    """Coordinator: local steps from these weights. `bins` is the Bins as JSON text."""

    round: int
    bins: str = field(repr=False)
    fingerprint: str
    weights: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Update(Message):
    """Lender: what its local steps changed; float32, shape (d,)."""

    round: int
    fingerprint: str
    delta: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finish(Message):
    """Coordinator: the job is over. `status` is completed or abandoned; abandoned carries no weights.

    `reference` is the cohort's distribution of each column (credit/drift's Reference as JSON), or empty.
    """

    status: str
    rounds: int
    bins: str = field(repr=False)
    fingerprint: str
    weights: NDArray[np.float32] = field(repr=False)
    reference: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Done(Message):
    """Lender: the model is kept."""


_KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__: kind
    for kind in (Propose, Accepted, Refused, AskHistogram, Histogram, Train, Update, Finish, Done)
}
_SCALARS: Final = {"str": str, "int": int, "float": float}

MessageT = TypeVar("MessageT", bound=Message)


def encode(message: Message) -> bytes:
    """Return the message's bytes."""
    fields: dict[str, Any] = {}
    arrays: list[bytes] = []
    for item in dataclasses.fields(message):
        value = getattr(message, item.name)
        if isinstance(value, np.ndarray):
            little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            fields[item.name] = {"dtype": little.dtype.name, "size": int(little.size)}
            arrays.append(little.tobytes())
        else:
            fields[item.name] = value
    header = json.dumps({"kind": type(message).__name__, "fields": fields}, separators=(",", ":")).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *arrays])


def decode(data: bytes, *expected: type[MessageT]) -> MessageT:
    """Parse bytes into one of the `expected` messages.

    Raises:
        LinkError: The bytes are no message, a field is missing, unknown or of another type, an array is cut,
            too long or not finite, or the message is none of those expected here.
    """
    if len(data) < 8 or data[:4] != _MAGIC:
        msg = "the other side sent bytes that are no fedfin message; both sides must run the same release"
        raise LinkError(msg)
    (length,) = struct.unpack("<I", data[4:8])
    if length > _MAX_HEADER or 8 + length > len(data):
        msg = "the other side sent a message that was cut; both sides must run the same release"
        raise LinkError(msg)
    try:
        header = json.loads(data[8 : 8 + length])
        kind = _KINDS[header.pop("kind")]
        fields: dict[str, Any] = dict(header.pop("fields"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = "the other side sent a message of an unknown kind; both sides must run the same release"
        raise LinkError(msg) from error
    values: dict[str, Any] = {}
    offset = 8 + length
    for item in dataclasses.fields(kind):
        if item.name not in fields:
            msg = f"the other side's {kind.__name__} lacks {item.name}; both sides must run the same release"
            raise LinkError(msg)
        values[item.name], offset = _value(kind, item, fields.pop(item.name), data, offset)
    if header or fields or offset != len(data):
        msg = f"the other side's {kind.__name__} holds more than it may; both sides must run the same release"
        raise LinkError(msg)
    message = kind(**values)
    for wanted in expected:
        if isinstance(message, wanted):
            return message
    msg = f"the other side sent {kind.__name__} where {' or '.join(k.__name__ for k in expected)} was due"
    raise LinkError(msg)


def _value(
    kind: type[Message],
    item: "dataclasses.Field[Any]",
    raw: Any,  # noqa: ANN401  (parsed JSON, checked here)
    data: bytes,
    offset: int,
) -> tuple[Any, int]:
    where = f"{kind.__name__}.{item.name}"
    text = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
    if text in _SCALARS:
        wanted = _SCALARS[text]
        if isinstance(raw, bool) or not isinstance(raw, (int, float) if wanted is float else wanted):
            msg = f"{where} is not a {text}; both sides must run the same release"
            raise LinkError(msg)
        # JSON's whole numbers have no end, and it knows NaN.
        if wanted is float and isinstance(raw, (int, float)) and not abs(raw) <= _MAX_FLOAT:
            msg = f"{where} is not a finite number; the sender must mend its side"
            raise LinkError(msg)
        if isinstance(raw, str) and _HALF_CHARACTER.search(raw):
            msg = f"{where} holds half a character, which can be neither kept nor shown; the sender must mend its side"
            raise LinkError(msg)
        return wanted(raw), offset
    dtype = np.dtype("<f8" if "float64" in str(item.type) else "<f4")
    size = raw.get("size") if isinstance(raw, dict) else None
    if type(size) is not int or raw != {"dtype": dtype.name, "size": size}:
        msg = f"{where} is no {dtype.name} array; both sides must run the same release"
        raise LinkError(msg)
    end = offset + size * dtype.itemsize
    if not 0 <= size <= _MAX_VALUES or end > len(data):
        msg = f"{where} was cut on its way or is too long; the sender must send it again"
        raise LinkError(msg)
    values = np.frombuffer(data, dtype=dtype, count=size, offset=offset).astype(dtype.newbyteorder("="))
    if not np.isfinite(values).all():
        msg = f"{where} holds a value that is not finite; the sender must mend its training"
        raise LinkError(msg)
    return values, end

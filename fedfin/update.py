"""The messages of a job, as frozen types, and their bytes.

One message is one bytes value: four bytes of magic, four of header length, a JSON header, then the arrays one
after the other, little-endian. Both sides refuse what does not fit exactly; nothing is executed, nothing pickled.
Flower carries the bytes (`fedfin.wire`) and never looks into them.

A secure sum is five questions and their answers: `Open`, `ShareKeys`, `Mask`, `Confirm`, `Unmask`. Short bytes (keys,
sealed shares, signatures) stand in the header as hex; a masked vector and the question it answers are arrays of bytes.
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
    "Advertised",
    "AskHistogram",
    "Confirm",
    "Confirmed",
    "Done",
    "Evaluate",
    "Finish",
    "Histogram",
    "Mask",
    "Masked",
    "Message",
    "Open",
    "Propose",
    "Refused",
    "RosterSigned",
    "Scores",
    "ShareKeys",
    "Shared",
    "ShowRoster",
    "Train",
    "Unmask",
    "Unmasked",
    "Update",
    "decode",
    "encode",
    "with_witness",
]

_MAGIC: Final = b"FFN1"
_MAX_HEADER: Final = 4 * 1024 * 1024
_MAX_VALUES: Final = 200_000_000
_MAX_FLOAT: Final = sys.float_info.max
_HALF_CHARACTER: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; `job_id` names the job (a coordinator's random id, the same over restarts).

    `witness` pins the logs of the two sides to each other (`fedfin.witness`); empty where nothing is shown. It is no
    part of what is asked or answered: the same question with another witness has the same answer.
    """

    job_id: str
    witness: str = field(default="", repr=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Propose(Message):
    """Coordinator: will you take part? `plan` is the JobPlan as JSON text.

    `roster` is the chain of signed versions that the job rests on (`fedfin.roster_chain.RosterChain.to_json`). A job of
    plain aggregation may go without (empty): no sum of it rests on the members' keys.
    """

    plan: str
    schema_fingerprint: str
    roster: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """Lender: yes; the whole job is reserved in its ledger.

    `weight` is capped and bucketed for plain aggregation, and 0.0 for secure: there it leaves in no message.
    """

    weight: float


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Lender: no, and why, in words for the coordinator's operator.

    `waits` says what could still change the answer without anything new from the coordinator: `approval` (its people
    look at the job), `hours` (it is asked outside those of its policy); empty where there is nothing.
    """

    reason: str
    waits: str = ""


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
class Evaluate(Message):
    """Coordinator: score your held-out loans with these weights; evaluation `number` of the job, from 1."""

    number: int
    bins: str = field(repr=False)
    fingerprint: str
    weights: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Scores(Message):
    """Lender: its score histograms, noised in mode local; plain aggregation only; float64, shape (cells,)."""

    counts: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Open(Message):
    """Coordinator: make keys for this sum. `context` is `SumContext.to_bytes`, which is ASCII."""

    context: str


@dataclass(frozen=True, slots=True)
class Advertised(Message):
    """Lender: its signed keys for the sum. `sum` is the context's digest, hex, in every message of the sum."""

    sum: str
    advert: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ShareKeys(Message):
    """Coordinator: the adverts of all that opened the sum, by name."""

    sum: str
    adverts: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Shared(Message):
    """Lender: its secrets' shares, sealed, by the name of who may open them."""

    sum: str
    sealed: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Mask(Message):
    """Coordinator: answer under masks. `sealed` are the shares for this lender by their senders.

    `question` are the bytes of the AskHistogram, Train or Evaluate that the sum answers; uint8.
    """

    sum: str
    sealed: dict[str, bytes] = field(repr=False)
    question: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Masked(Message):
    """Lender: its masked vector, packed (`fedfin.privacy.encoding.pack`); uint8."""

    sum: str
    values: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Confirm(Message):
    """Coordinator: these answered; sign it. `next` is the context of the next sum, to be opened too, or empty."""

    sum: str
    survivors: tuple[str, ...]
    next: str


@dataclass(frozen=True, slots=True)
class Confirmed(Message):
    """Lender: its signature over the survivors, and its advert for the next sum (empty: none)."""

    sum: str
    signature: bytes = field(repr=False)
    advert: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unmask(Message):
    """Coordinator: the survivors' signatures by name; and the adverts of the next sum (empty: none)."""

    sum: str
    confirmations: dict[str, bytes] = field(repr=False)
    adverts: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unmasked(Message):
    """Lender: one share of each sharer, by owner; and its sealed shares for the next sum (empty: none)."""

    sum: str
    shares: dict[str, bytes] = field(repr=False)
    sealed: dict[str, bytes] = field(repr=False)


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


@dataclass(frozen=True, slots=True)
class ShowRoster(Message):
    """Coordinator: your engineer is to look at this version of the roster, and sign it.

    `chain` is `fedfin.roster_chain.RosterChain.to_json`; its last version may lack signatures.
    """

    chain: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RosterSigned(Message):
    """Lender: its engineer approved that version; `signature` is its identity key's over it, hex."""

    signature: str = field(repr=False)


_KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__: kind
    for kind in (
        *(Propose, Accepted, Refused, AskHistogram, Histogram, Train, Update, Evaluate, Scores, Finish, Done),
        *(Open, Advertised, ShareKeys, Shared, Mask, Masked, Confirm, Confirmed, Unmask, Unmasked),
        *(ShowRoster, RosterSigned),
    )
}
_SCALARS: Final = {"str": str, "int": int, "float": float}
_DTYPES: Final = {"float64": "<f8", "float32": "<f4", "uint8": "u1"}
_WITNESS: Final = "witness"
_HEX: Final = re.compile("(?:[0-9a-f]{2})*")

MessageT = TypeVar("MessageT", bound=Message)


def encode(message: Message) -> bytes:
    """Return the message's bytes."""
    fields: dict[str, Any] = {}
    arrays: list[bytes] = []
    for item in dataclasses.fields(message):
        value = getattr(message, item.name)
        if item.name == _WITNESS:
            continue
        if isinstance(value, np.ndarray):
            little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            fields[item.name] = {"dtype": little.dtype.name, "size": int(little.size)}
            arrays.append(little.tobytes())
        else:
            fields[item.name] = _to_json(value)
    if message.witness:
        fields[_WITNESS] = message.witness  # last, where `with_witness` puts it
    header = json.dumps({"kind": type(message).__name__, "fields": fields}, separators=(",", ":")).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *arrays])


def with_witness(data: bytes, witness: str) -> bytes:
    """Return a message's bytes with this witness in the place of its own; empty takes it away.

    Args:
        data: As `encode` gives them.
        witness: The text.
    """
    (length,) = struct.unpack("<I", data[4:8])
    header = json.loads(data[8 : 8 + length])
    if header["fields"].get(_WITNESS, "") == witness:
        return data
    header["fields"].pop(_WITNESS, None)
    if witness:
        header["fields"][_WITNESS] = witness
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, memoryview(data)[8 + length :]])


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
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repeats)
        kind = _KINDS[header.pop("kind")]
        fields: dict[str, Any] = dict(header.pop("fields"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = "the other side sent a message of an unknown kind; both sides must run the same release"
        raise LinkError(msg) from error
    values: dict[str, Any] = {}
    offset = 8 + length
    for item in dataclasses.fields(kind):
        if item.name == _WITNESS and item.name not in fields:
            continue
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
    text = item.type.__name__ if isinstance(item.type, type) else str(item.type)
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
    if "ndarray" not in text:
        return _short_value(raw, text, where), offset
    dtype = np.dtype(next(code for name, code in _DTYPES.items() if name in text))
    size = raw.get("size") if isinstance(raw, dict) else None
    if type(size) is not int or raw != {"dtype": dtype.name, "size": size}:
        msg = f"{where} is no {dtype.name} array; both sides must run the same release"
        raise LinkError(msg)
    end = offset + size * dtype.itemsize
    if not 0 <= size <= _MAX_VALUES or end > len(data):
        msg = f"{where} was cut on its way or is too long; the sender must send it again"
        raise LinkError(msg)
    values = np.frombuffer(data, dtype=dtype, count=size, offset=offset)
    if dtype.kind == "u":
        return values, end  # as it lies in the message, read-only: a cohort's vectors are not held twice
    if not np.isfinite(values).all():
        msg = f"{where} holds a value that is not finite; the sender must mend its training"
        raise LinkError(msg)
    return values.astype(dtype.newbyteorder("=")), end


def _to_json(value: Any) -> Any:  # noqa: ANN401  (a field of a message, and JSON)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: part.hex() for name, part in value.items()}
    return value


def _short_value(raw: Any, text: str, where: str) -> Any:  # noqa: ANN401  (parsed JSON, checked here)
    """Return bytes, bytes by name, or names, as the annotation `text` says."""
    parts: dict[str, Any]
    if text == "bytes" and isinstance(raw, str):
        parts = {"": raw}
    elif text == "dict[str, bytes]" and isinstance(raw, dict):
        parts = raw
    elif text == "tuple[str, ...]" and isinstance(raw, list) and all(isinstance(name, str) for name in raw):
        parts = dict.fromkeys(raw, "")
    else:
        msg = f"{where} is not {text}; both sides must run the same release"
        raise LinkError(msg)
    if not all(isinstance(part, str) and _HEX.fullmatch(part) for part in parts.values()):
        msg = f"{where} is not written in hexadecimal digits; the sender must mend its side"
        raise LinkError(msg)
    if any(_HALF_CHARACTER.search(name) for name in parts):
        msg = f"{where} holds half a character, which can be neither kept nor shown; the sender must mend its side"
        raise LinkError(msg)
    if text == "tuple[str, ...]":
        return tuple(raw)
    found = {name: bytes.fromhex(part) for name, part in parts.items()}
    return found[""] if text == "bytes" else found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; ValueError where a name stands twice, since a reader could take either."""
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name stands twice"
        raise ValueError(msg)
    return found

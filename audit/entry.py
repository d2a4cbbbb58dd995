"""One entry of a log: an event, when, by whom, at which place; canonical bytes and the actor's signature.

The leaf that is hashed is canonical JSON (RFC 8785: keys sorted, no spaces, UTF-8) of texts, whole numbers up to
2^53 - 1, booleans, lists and objects; there is no float and no null. What is signed is the same JSON without the
signature, after a label and the log's origin: an entry can be moved neither to another place nor to another log.
"""

import datetime as dt
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from fedfin.audit.events import EVENT_TYPES, Event, UnknownEvent
from fedfin.errors import AuditError
from fedfin.invitation import LENDER_NAME_PATTERN

__all__ = [
    "MAX_LEAF_BYTES",
    "Entry",
    "canonical_json",
    "event_json",
    "parse_leaf",
    "sign_entry",
    "signed_leaves",
    "signed_part",
    "utc_now",
]

MAX_LEAF_BYTES: Final = 256 * 1024
"""A leaf is at most this long: a cohort of a thousand names fits."""

_LABEL: Final = b"fedfin audit entry v1\n"
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_SIGNED_AT_ONCE: Final = 32  # so that who takes the leaves works while the next are signed
_SIGNED_BY_MANY: Final = 64  # fewer are signed before other threads have started
_KEYS: Final = frozenset({"actor", "event", "seq", "signature", "time"})
_LARGEST: Final = 2**53 - 1
_TIME_BYTES: Final = len(',"time":"2026-01-02T03:04:05.678Z"}')
_SIGNATURE_BYTES: Final = len(',"signature":""') + 128


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it is read back.

    Attributes:
        seq: Its index in the log, from 0.
        time: UTC, ISO 8601 with milliseconds and `Z`, by the clock of the actor.
        actor: Who says so: the owner of the log.
        event: What happened.
        signature: Ed25519, 64 bytes.
    """

    seq: int
    time: str
    actor: str
    event: Event
    signature: bytes = field(repr=False)

    def to_leaf(self) -> bytes:
        """Return the canonical bytes that are hashed into the tree.

        Raises:
            AuditError: The entry is too large.
        """
        return _with_signature(_text(self.seq, self.time, self.actor, event_json(self.event)), self.signature)

    def verify(self, key: Ed25519PublicKey, origin: str) -> None:
        """Check the signature.

        Args:
            key: The actor's identity key.
            origin: The log's.

        Raises:
            AuditError: The key did not sign this entry of this log.
        """
        try:
            text = _text(self.seq, self.time, self.actor, event_json(self.event))
            key.verify(self.signature, _message(text, origin))
        except InvalidSignature as error:
            msg = (
                f"entry {self.seq} is not signed by the key of {self.actor} for the log {origin}: it was changed"
                " or made by someone else; do not rely on it"
            )
            raise AuditError(msg) from error


def sign_entry(
    seq: int, time: str, actor: str, event: Event, *, key: Ed25519PrivateKey, origin: str
) -> Entry:
    """Return a signed entry."""
    text = _text(seq, time, actor, event_json(event))
    return Entry(seq=seq, time=time, actor=actor, event=event, signature=key.sign(_message(text, origin)))


def signed_leaves(
    first: int, time: str, actor: str, events: Sequence[str], *, key: Ed25519PrivateKey, origin: str
) -> Iterator[bytes]:
    """Give the leaves of signed entries, for a log that appends many; large batches are signed on all cores.

    Args:
        first: The index of the first entry.
        time: As `utc_now` gives it.
        actor: The log's owner.
        events: As `event_json` gives them.
        key: The actor's identity key.
        origin: The log's.

    Raises:
        AuditError: An entry is too large.
    """
    before, after = f'{{"actor":{_dump(actor)},"event":', f',"time":{_dump(time)}}}'
    texts = [f'{before}{event},"seq":{seq}{after}' for seq, event in enumerate(events, first)]
    label = _message("", origin)

    def leaves(part: Sequence[str]) -> list[bytes]:
        return [_with_signature(text, key.sign(label + text.encode())) for text in part]

    if len(texts) < _SIGNED_BY_MANY:
        yield from leaves(texts)
        return
    parts = [texts[start : start + _SIGNED_AT_ONCE] for start in range(0, len(texts), _SIGNED_AT_ONCE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # signing holds no lock of Python's
        for part in pool.map(leaves, parts):
            yield from part


def signed_part(leaf: bytes, origin: str) -> tuple[bytes, bytes]:
    """Return what the actor signed and its signature, of a leaf that `parse_leaf` has accepted."""
    cut = len(leaf) - _TIME_BYTES
    start = cut - _SIGNATURE_BYTES
    signature = bytes.fromhex(leaf[cut - 129 : cut - 1].decode())
    return _LABEL + origin.encode() + b"\n" + leaf[:start] + leaf[cut:], signature


def parse_leaf(leaf: bytes) -> Entry:
    """Return the entry that `to_leaf` wrote; anything else is refused, be it one space more.

    An event of a type or version that this release does not know becomes an `UnknownEvent`.

    Raises:
        AuditError: The bytes are no canonical entry.
    """
    try:
        entry = _parse(leaf)
        same = entry.to_leaf() == leaf
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # Not `from error`: pydantic's message quotes the value.
        msg = f"an entry does not parse ({_why(error)}); the log was changed, or is no log of fedfin"
        raise AuditError(msg) from None
    if not same:
        msg = "an entry is not written canonically; the log was changed, or is no log of fedfin"
        raise AuditError(msg)
    return entry


def utc_now() -> str:
    """Return the time as entries hold it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def canonical_json(value: object) -> bytes:
    """Return RFC 8785 JSON of texts, whole numbers, booleans, lists and objects with ASCII keys.

    Raises:
        ValueError: The value holds something else: a float, None, or a text that is no Unicode.
    """
    _check(value)
    return _dump(value).encode()


def _dump(value: object) -> str:
    return _ENCODER.encode(value)


def event_json(event: Event) -> str:
    """Return the event's canonical JSON."""
    return event.content if isinstance(event, UnknownEvent) else _dump(event.model_dump(exclude_none=True))


def _text(seq: int, time: str, actor: str, event_text: str) -> str:
    """Return an entry's JSON without its signature; the keys are in their order."""
    return f'{{"actor":{_dump(actor)},"event":{event_text},"seq":{seq},"time":{_dump(time)}}}'


def _message(text: str, origin: str) -> bytes:
    return _LABEL + origin.encode() + b"\n" + text.encode()


def _with_signature(text: str, signature: bytes) -> bytes:
    """Return the leaf: the signature's field has its place before the time, which is always as long."""
    cut = len(text) - _TIME_BYTES
    leaf = f'{text[:cut]},"signature":"{signature.hex()}"{text[cut:]}'.encode()
    if len(leaf) > MAX_LEAF_BYTES:
        msg = f"an entry of {len(leaf)} bytes is larger than {MAX_LEAF_BYTES}; log its digest and keep it in a file"
        raise AuditError(msg)
    return leaf


def _parse(leaf: bytes) -> Entry:
    if len(leaf) > MAX_LEAF_BYTES:
        msg = f"{len(leaf)} bytes"
        raise ValueError(msg)
    found = json.loads(leaf.decode(), parse_float=_no_float, parse_int=_int, parse_constant=_no_float)
    if not isinstance(found, dict) or found.keys() != _KEYS:
        msg = "its fields are others"
        raise ValueError(msg)
    seq, time, actor, signature = found["seq"], found["time"], found["actor"], found["signature"]
    if (
        type(seq) is not int
        or seq < 0
        or not _TIME.fullmatch(time)
        or not re.fullmatch(LENDER_NAME_PATTERN, actor)
        or not _SIGNATURE.fullmatch(signature)
    ):
        msg = "its place, time, actor or signature is malformed"
        raise ValueError(msg)
    dt.datetime.fromisoformat(time)
    return Entry(
        seq=seq, time=time, actor=actor, event=_event(found["event"]), signature=bytes.fromhex(signature)
    )


def _event(content: dict[str, Any]) -> Event:
    name, version = content["type"], content["version"]
    if not isinstance(name, str) or type(version) is not int or version < 1:
        msg = "its event has no type or version"
        raise ValueError(msg)
    known = EVENT_TYPES.get(name)
    if known is not None and version <= known.model_fields["version"].default:
        return known.model_validate(content)
    _check(content)
    return UnknownEvent(type=name, version=version, content=_dump(content))


def _check(value: object) -> None:
    match value:
        case bool() | str():
            return
        case int() if abs(value) <= _LARGEST:
            return
        case list() | tuple():
            for item in value:
                _check(item)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str) or not key.isascii():
                    msg = "a key is no ASCII text"
                    raise ValueError(msg)
                _check(item)
        case _:
            msg = f"a {type(value).__name__} has no canonical form here; give it as text or a whole number"
            raise ValueError(msg)


def _int(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > _LARGEST:
        msg = "a number is too large"
        raise ValueError(msg)
    return int(text)


def _no_float(_text: str) -> NoReturn:
    msg = "a number is not whole"
    raise ValueError(msg)


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in detail['loc'])}: {detail['type']}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "no JSON in UTF-8"
    return str(error) if type(error) is ValueError else "its fields are others"

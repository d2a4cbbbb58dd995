"""What pins the two sides' logs to each other, as it travels beside questions and answers.

The coordinator shows a checkpoint of its log with every question of weight, and proofs that the log only grew since any
checkpoint that a lender may have cosigned last: the same text for all lenders. A lender checks it, cosigns it, and
answers with that line and with the checkpoint of its own log.

Source: C2SP tlog-witness (the same exchange over HTTP), RFC 6962 section 2.1.2 (consistency proofs).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedfin.errors import LinkError
from fedfin.update import AskHistogram, Evaluate, Finish, Mask, Message, Propose, Train

__all__ = ["WITNESSED", "Shown", "Witnessed"]

WITNESSED: Final[tuple[type[Message], ...]] = (Propose, Mask, AskHistogram, Train, Evaluate, Finish)
"""The questions of weight: the coordinator shows a checkpoint with each, and a lender answers none without."""

_MAX_TEXT: Final = 1024 * 1024
_MAX_PROOFS: Final = 4096
_LATEST_MS: Final = 2**52
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,15}")
_HEX: Final = re.compile(r"(?:[0-9a-f]{128})?")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a coordinator shows with a question.

    Attributes:
        checkpoint: Its log's, a signed note.
        proofs: By the size of an earlier checkpoint: the consistency proof from there, hashes of 32 bytes.
        time_ms: The coordinator's clock, Unix milliseconds; not signed.
    """

    checkpoint: str = field(repr=False)
    proofs: Mapping[int, tuple[bytes, ...]] = field(repr=False)
    time_ms: int

    def to_json(self) -> str:
        """Return it as JSON text."""
        proofs = {str(size): [part.hex() for part in self.proofs[size]] for size in sorted(self.proofs)}
        fields = {"checkpoint": self.checkpoint, "proofs": proofs, "time_ms": self.time_ms}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Shown":
        """Return what `to_json` wrote.

        Raises:
            LinkError: The text is something else.
        """
        found = _object(text, {"checkpoint", "proofs", "time_ms"})
        checkpoint, proofs, time_ms = found["checkpoint"], found["proofs"], found["time_ms"]
        if (
            not isinstance(checkpoint, str)
            or not isinstance(proofs, dict)
            or len(proofs) > _MAX_PROOFS
            or type(time_ms) is not int
            or not 0 <= time_ms <= _LATEST_MS
            or not all(_SIZE.fullmatch(size) and _is_proof(proof) for size, proof in proofs.items())
        ):
            raise _malformed()
        parsed = {int(size): tuple(map(bytes.fromhex, proof)) for size, proof in proofs.items()}
        return cls(checkpoint, parsed, time_ms)


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What a lender says of logs with its answer; each part may be empty.

    Attributes:
        cosignature: Its line on the checkpoint that came with the question.
        checkpoint: Its own log's checkpoint, a signed note, taken before the answer left.
        held: The coordinator's checkpoint that it cosigned last, where it could not cosign the one that came.
        signature: By its identity key, over what it agreed to or confirmed (`fedfin.audit.consents`), hex.
    """

    cosignature: str = ""
    checkpoint: str = field(default="", repr=False)
    held: str = field(default="", repr=False)
    signature: str = ""

    def to_json(self) -> str:
        """Return it as JSON text."""
        fields = {
            "checkpoint": self.checkpoint,
            "cosignature": self.cosignature,
            "held": self.held,
            "signature": self.signature,
        }
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Witnessed":
        """Return what `to_json` wrote; nothing of an empty text.

        Raises:
            LinkError: The text is something else.
        """
        if not text:
            return cls()
        found = _object(text, {"checkpoint", "cosignature", "held", "signature"})
        if not all(isinstance(value, str) for value in found.values()) or not _HEX.fullmatch(
            found["signature"]
        ):
            raise _malformed()
        return cls(**found)


def _object(text: str, keys: set[str]) -> dict[str, Any]:
    try:
        found = json.loads(text) if len(text) <= _MAX_TEXT else None
    except (ValueError, RecursionError) as error:
        raise _malformed() from error
    if not isinstance(found, dict) or found.keys() != keys:
        raise _malformed()
    return found


def _is_proof(proof: object) -> bool:
    return (
        isinstance(proof, list)
        and len(proof) <= 128
        and all(isinstance(part, str) and _HASH.fullmatch(part) for part in proof)
    )


def _malformed() -> LinkError:
    return LinkError(
        "what the other side says of its log does not parse; both sides must run the same release"
    )

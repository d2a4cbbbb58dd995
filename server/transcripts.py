"""Transcripts of secure sums: everything that the coordinator saw of one, kept so that anyone can sum again.

A masked vector is uniformly random, and the shares that were given back open the cohort's sum and nothing else; who may
see the sum may see the transcript. `transcripts/STAGE.ATTEMPT.json` of the run holds the context, adverts, sealed
shares, confirmations and shares; the `.bin` beside it the question and the vectors of those who survived, four bytes a
value: 4 * n * m bytes for n lenders and m values, and about 700 * n**2 in the other file.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fedfin.errors import AuditError
from fedfin.files import write_public
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.sum_context import SumContext

__all__ = ["RecordedCombiner", "Transcript", "Transcripts"]

FORMAT: Final = "fedfin transcript 1"


class Transcripts:
    """The transcripts of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "transcripts"

    def record(
        self, context: SumContext, roster: Mapping[str, Ed25519PublicKey], size: int
    ) -> "RecordedCombiner":
        """Return a combiner of this sum that keeps what it is given."""
        return RecordedCombiner(self, context, roster, size)

    def path(self, stage: str, attempt: int) -> Path:
        """Return where an attempt at a stage is kept."""
        return self.folder / f"{stage.replace(' ', '-')}.{attempt}.json"

    def read(self, stage: str) -> "Transcript | None":
        """Return the transcript of a stage's sum; None where none is kept.

        Raises:
            AuditError: It is damaged.
        """
        by_attempt = {
            int(path.stem.rpartition(".")[2]): path
            for path in self.folder.glob(f"{stage.replace(' ', '-')}.*.json")
            if path.stem.rpartition(".")[2].isdecimal()
        }
        return Transcript.read(by_attempt[max(by_attempt)]) if by_attempt else None


class RecordedCombiner(Combiner):
    """A combiner whose sum can be done again by others."""

    def __init__(
        self, kept_in: Transcripts, context: SumContext, roster: Mapping[str, Ed25519PublicKey], size: int
    ) -> None:
        super().__init__(context, roster, size)
        self._kept_in = kept_in
        self._kept = Transcript(context)

    def add_advert(self, name: str, advert: bytes) -> None:
        """Take and keep it; errors as `Combiner`."""
        super().add_advert(name, advert)
        self._kept.adverts[name] = advert

    def add_sealed(self, name: str, sealed: Mapping[str, bytes]) -> None:
        """Take and keep them; errors as `Combiner`."""
        super().add_sealed(name, sealed)
        self._kept.sealed[name] = dict(sealed)

    def ask(self, question: bytes) -> None:
        """Bind and keep the question; errors as `Combiner`."""
        super().ask(question)
        self._kept.question = question

    def fold(self, name: str, values: NDArray[np.uint32]) -> None:
        """Add and keep a vector; errors as `Combiner`."""
        super().fold(name, values)
        self._kept.vectors[name] = values.copy()

    def add_confirmation(self, name: str, confirmation: bytes) -> None:
        """Take and keep it; errors as `Combiner`."""
        super().add_confirmation(name, confirmation)
        self._kept.confirmations[name] = confirmation

    def add_shares(self, name: str, shares: Mapping[str, bytes]) -> None:
        """Take and keep them, wrong ones too; errors as `Combiner`."""
        self._kept.shares[name] = dict(shares)
        super().add_shares(name, shares)

    def keep(self) -> str:
        """Write the transcript of the finished sum; return its SHA-256, hex.

        Raises:
            ConfigError: It cannot be written.
        """
        context = self._kept.context
        return self._kept.write(self._kept_in.path(context.stage, context.attempt))


@dataclass(slots=True)
class Transcript:
    """What the coordinator saw of one secure sum.

    Attributes:
        context: What the sum is about.
        question: Bytes of what every sharer was asked.
        adverts: By lender.
        sealed: Sealed shares by sender and receiver.
        vectors: Masked vectors of those who survived, shape (m,).
        confirmations: By survivor.
        shares: What each survivor gave back, by owner.
    """

    context: SumContext
    question: bytes = field(default=b"", repr=False)
    adverts: dict[str, bytes] = field(default_factory=dict[str, bytes], repr=False)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]], repr=False)
    vectors: dict[str, NDArray[np.uint32]] = field(default_factory=dict[str, NDArray[np.uint32]], repr=False)
    confirmations: dict[str, bytes] = field(default_factory=dict[str, bytes], repr=False)
    shares: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]], repr=False)
    digest: str = ""

    def write(self, path: Path) -> str:
        """Write both files; return the SHA-256 of the first, which names the second's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(self.vectors)
        arrays = [self.vectors[name].astype("<u4", copy=False).tobytes() for name in names]
        content = b"".join([self.question, *arrays])
        document = {
            "format": FORMAT,
            "context": self.context.to_bytes().decode("ascii"),
            "question_bytes": len(self.question),
            "vectors": names,
            "content": hashlib.sha256(content).hexdigest(),
            "adverts": _hex(self.adverts),
            "sealed": {name: _hex(parts) for name, parts in sorted(self.sealed.items())},
            "confirmations": _hex(self.confirmations),
            "shares": {name: _hex(parts) for name, parts in sorted(self.shares.items())},
        }
        text = (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()
        write_public(path.with_suffix(".bin"), content)
        write_public(path, text)
        return hashlib.sha256(text).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "Transcript":
        """Return what `write` wrote.

        Raises:
            AuditError: A file is missing, damaged or not the one that the other names.
        """
        try:
            text = path.read_bytes()
            content = path.with_suffix(".bin").read_bytes()
            found: dict[str, Any] = json.loads(text)
            if found["format"] != FORMAT or hashlib.sha256(content).hexdigest() != found["content"]:
                raise ValueError  # noqa: TRY301  (one message for all of it)
            start, names = int(found["question_bytes"]), list(found["vectors"])
            values = np.frombuffer(content, dtype="<u4", offset=start).reshape(len(names), -1)
            return cls(
                context=SumContext.from_bytes(found["context"].encode()),
                question=content[:start],
                adverts=_bytes(found["adverts"]),
                sealed={name: _bytes(parts) for name, parts in found["sealed"].items()},
                vectors={name: values[place].astype(np.uint32) for place, name in enumerate(names)},
                confirmations=_bytes(found["confirmations"]),
                shares={name: _bytes(parts) for name, parts in found["shares"].items()},
                digest=hashlib.sha256(text).hexdigest(),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{path} is missing or was changed; a transcript that is not whole shows nothing: ask for it again"
            raise AuditError(msg) from error

    @property
    def survivors(self) -> Collection[str]:
        """Whose vectors are in the sum."""
        return self.vectors.keys()


def _hex(parts: Mapping[str, bytes]) -> dict[str, str]:
    return {name: parts[name].hex() for name in sorted(parts)}


def _bytes(parts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in parts.items()}

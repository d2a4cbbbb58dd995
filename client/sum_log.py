"""What left this lender under masks in one job, durably, and the differencing rule that is held against it.

Two sums of (nearly) the same model over cohorts that differ by one lender differ by that lender's answer. So a model
that was answered once is answered again for the identical cohort only, and survivors are confirmed only if they are the
ones confirmed before. Any two quorums of a cohort have a lender in common, so it is enough that each lender holds to
what it saw itself.

`log.jsonl` gets one line for each opening, masked vector and confirmation, on the disk before anything leaves; the
weights that a vector answered lie beside it, for the comparison, until the job ends.
"""

import errno
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.errors import ConfigError
from fedfin.files import write_public

__all__ = ["NEARLY_EQUAL", "Released", "SumLog"]

NEARLY_EQUAL: Final = 1e-5
"""Models are as good as equal up to this distance: the difference of weights over the larger norm, or over 1, L2.

Over 1 at least: a job starts from weights of zero, and beside those a weight of 1e-30 is as far away as any.
"""


@dataclass(frozen=True, slots=True)
class Released:
    """A masked vector that left, or may have left.

    Attributes:
        stage: Of the job: `bins`, `round 3`, `evaluation 1`.
        attempt: At that stage.
        sharers: Whose masks were in it.
        norm: L2 norm of the weights it answered; 0 for none.
        size: Their number; 0 for none.
        survivors: Whom this lender confirmed, or None.
    """

    stage: str
    attempt: int
    sharers: frozenset[str]
    norm: float
    size: int
    survivors: frozenset[str] | None = None


class SumLog:
    """One job's log; the invariant: what is on the disk is never behind what left.

    Raises:
        ConfigError: From the constructor and every method: the log is damaged, or cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "log.jsonl"
        self._opened: set[tuple[str, int]] = set()
        self._released: dict[tuple[str, int], Released] = {}
        for line in self._lines():
            try:
                self._take(line)
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged("a line has not its form") from error

    @property
    def released(self) -> tuple[Released, ...]:
        """Every masked vector that left, oldest first."""
        return tuple(self._released.values())

    def was_opened(self, stage: str, attempt: int) -> bool:
        """Tell whether this attempt at a stage was opened before."""
        return (stage, attempt) in self._opened

    def open(self, stage: str, attempt: int) -> None:
        """Record an opening, before the advert leaves."""
        self._append({"what": "opened", "stage": stage, "attempt": attempt})

    def release(
        self, stage: str, attempt: int, sharers: Collection[str], weights: NDArray[np.float32]
    ) -> None:
        """Record a masked vector and the weights it answers, before it leaves; shape (d,), none for the bins."""
        if weights.size:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            little = np.ascontiguousarray(weights, dtype="<f4")
            write_public(self._weights_path(stage, attempt), little.tobytes(), mode=0o600)
        self._append(
            {
                "what": "released",
                "stage": stage,
                "attempt": attempt,
                "sharers": sorted(sharers),
                "norm": _norm(weights),
                "size": int(weights.size),
            }
        )

    def confirm(self, stage: str, attempt: int, survivors: Collection[str]) -> None:
        """Record a survivor set, before its confirmation leaves."""
        self._append(
            {"what": "confirmed", "stage": stage, "attempt": attempt, "survivors": sorted(survivors)}
        )

    def alike(self, stage: str, weights: NDArray[np.float32]) -> tuple[Released, ...]:
        """Return what left in answer to this question or one nearly equal to it; for the bins, to the same one.

        Stages of one kind are compared: an update and a score histogram of one model have nothing in common. A model
        of another size is taken for a nearly equal one: one more bin, without loans, makes no other model.

        Args:
            stage: Of the question.
            weights: The question's, shape (d,), finite; empty for the bins.
        """
        kind, norm = stage.split(maxsplit=1)[0], _norm(weights)
        return tuple(
            released
            for released in self._released.values()
            if released.stage.split(maxsplit=1)[0] == kind
            and (released.size != weights.size or self._is_near(released, weights, norm))
        )

    def _is_near(self, released: Released, weights: NDArray[np.float32], norm: float) -> bool:
        if not released.size:
            return True
        nearly = NEARLY_EQUAL * max(released.norm, norm, 1.0)
        # norms are no further apart than weights: most files need no reading
        if abs(released.norm - norm) > 1.001 * nearly:
            return False
        path = self._weights_path(released.stage, released.attempt)
        try:
            before = np.fromfile(path, dtype="<f4")
        except OSError as error:
            raise self._damaged(f"{path.name} cannot be read") from error
        if before.shape != weights.shape:
            raise self._damaged(f"{path.name} was cut")
        distance = float(np.linalg.norm(before.astype(np.float64) - weights))
        return distance <= nearly

    def _take(self, line: dict[str, Any]) -> None:
        key = (str(line["stage"]), int(line["attempt"]))
        match line["what"]:
            case "opened":
                self._opened.add(key)
            case "released":
                sharers = frozenset(map(str, line["sharers"]))
                self._released[key] = Released(*key, sharers, float(line["norm"]), int(line["size"]))
            case "confirmed":
                before = self._released[key]
                survivors = frozenset(map(str, line["survivors"]))
                self._released[key] = Released(*key, before.sharers, before.norm, before.size, survivors)
            case _:
                msg = "an unknown line"
                raise ValueError(msg)

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_new = not self._path.exists()
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, data) != len(data):
                    os.ftruncate(descriptor, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk takes a part
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                _sync(self._directory)
                _sync(self._directory.parent)
        except OSError as error:
            msg = (
                f"{self._path} cannot be written ({error.strerror}); free the disk: nothing leaves unrecorded"
            )
            raise ConfigError(msg) from error
        self._take(line)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            data = self._path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self._path, whole)  # cut off while it was written: nothing had left
            return [json.loads(line) for line in data[:whole].splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise self._damaged("it cannot be read") from error

    def _weights_path(self, stage: str, attempt: int) -> Path:
        return self._directory / f"{stage.replace(' ', '-')}.{attempt}.f32"

    def _damaged(self, how: str) -> ConfigError:
        return ConfigError(
            f"{self._path} is damaged ({how}); restore the job's folder from the backup, or end the job here with"
            " `fedfin client release`: this lender cannot tell what left it"
        )


def _norm(weights: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(weights.astype(np.float64)))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

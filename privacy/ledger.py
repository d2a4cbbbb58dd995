"""The lender's privacy ledger: what was promised and what has left, for each data snapshot.

A job is reserved whole before anything leaves, each stage is committed before its release leaves, and what a
finished job did not use is freed. Every method is one transaction that is on the disk when it returns, so a
crash neither forgets a release nor charges it twice. The limit is held against the RDP figure; whatever cannot
be recorded or read stops the work (`privacy/ledger_file.py`).

RDP composes adaptively at a fixed order (Feldman & Zrnic 2021). The figure here is the least over all orders,
which is exact for jobs whose noise does not depend on what earlier jobs released.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedfin.errors import BudgetSpentError, LedgerError, PrivacyParameterError
from fedfin.privacy.accounting import GaussianEvent, epsilon_pld, epsilon_rdp, merge_events
from fedfin.privacy.ledger_file import Entry, LedgerFile
from fedfin.privacy.snapshot import snapshot_of

__all__ = ["Entry", "Ledger", "Spent", "snapshot_of"]

_MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Spent:
    """Events and what they cost together; the neighbours differ by one loan added or removed."""

    epsilon_pld: float  # the tighter figure, for people
    epsilon_rdp: float  # the figure that limits hold
    events: tuple[GaussianEvent, ...]


class Ledger:
    """One lender's ledger; the invariant: entries only grow, and no reservation passes its limit.

    Several processes may open the same file: each method that writes holds the file's exclusive lock. One
    object serves the thread that made it.

    Args:
        path: The SQLite file; made with mode 0600 if it is not there. Its folder must be.

    Raises:
        LedgerError: From the constructor and every method: the file cannot be made, read, written or
            trusted; says why and the mend.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LedgerFile(path)

    def __repr__(self) -> str:
        return f"Ledger({str(self._path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was recorded is already on the disk."""
        self._file.close()

    def reserve(
        self, job_id: str, snapshot: str, events: Sequence[GaussianEvent], delta: float, epsilon_limit: float
    ) -> None:
        """Record a whole job's events before any of them leaves; a repetition changes nothing.

        Args:
            job_id: The job, unique in this ledger.
            snapshot: Digest of the table (`snapshot_of`).
            events: Everything the job may release; at least one.
            delta: In (0, 1).
            epsilon_limit: The lender's limit for all jobs on this snapshot; also checked on a repetition.

        Raises:
            BudgetSpentError: Committed, reserved and asked events together pass `epsilon_limit` by RDP.
            LedgerError: The id is taken by another job or a finished one, or nothing can be recorded.
            PrivacyParameterError: An argument has no meaning.
        """
        _check_names(job_id=job_id, snapshot=snapshot)
        if not epsilon_limit > 0.0:
            msg = f"policy.epsilon_limit is {epsilon_limit}; it must be above 0"
            raise PrivacyParameterError(msg)
        asked = _some(events)
        asked_epsilon = epsilon_rdp(asked, delta)
        with self._file.transaction():
            job = self._file.job(job_id)
            if job and (job[0].snapshot, job[0].events, job[0].delta) != (snapshot, asked, delta):
                msg = f"job {job_id} is already reserved in {self._path} with other content; give this job its own id"
                raise LedgerError(msg)
            if _is_over(job):
                msg = f"job {job_id} is over in {self._path}; give the new job its own id"
                raise LedgerError(msg)
            held = _held(entry for entry in self._file.of_snapshot(snapshot) if entry.job_id != job_id)
            total = epsilon_rdp([*held, *asked], delta)
            if not total <= epsilon_limit:
                msg = (
                    f"job {job_id} asks ε={asked_epsilon:.4g} of data snapshot {snapshot[:12]}, which has"
                    f" ε={epsilon_rdp(held, delta):.4g} spent or reserved; the total ε={total:.4g} (RDP,"
                    f" δ={delta:g}) passes the limit of {epsilon_limit:g}; ask the data officer to raise"
                    " policy.epsilon_limit in bank.yaml, or leave this job out"
                )
                raise BudgetSpentError(msg)
            if not job:
                self._file.append(
                    "reserve", job_id, snapshot, asked, delta=delta, epsilon_limit=epsilon_limit
                )

    def commit(self, job_id: str, stage: str, events: Sequence[GaussianEvent], release_digest: str) -> None:
        """Record that a stage's release is about to leave; a repetition with the same digest changes nothing.

        Args:
            job_id: A reserved job.
            stage: What leaves, such as "bins" or "round 7"; each leaves once.
            events: What the release costs; at least one, out of the reservation.
            release_digest: Digest of the bytes that leave.

        Raises:
            LedgerError: The stage has left with other content, the events pass what the reservation still
                holds, the job is unknown or over, or nothing can be recorded: the release must not leave.
            PrivacyParameterError: An argument has no meaning.
        """
        _check_names(job_id=job_id, stage=stage, release_digest=release_digest)
        charged = _some(events)
        with self._file.transaction():
            job = self._file.job(job_id)
            if not job:
                msg = f"job {job_id} is not reserved in {self._path}; reserve it before anything leaves"
                raise LedgerError(msg)
            for entry in job:
                if entry.kind == "commit" and entry.stage == stage:
                    if (entry.release_digest, entry.events) == (release_digest, charged):
                        return
                    msg = (
                        f"stage {stage} of job {job_id} has already left as {entry.release_digest[:12]}; a second"
                        " release would be a second charge: send the first one again"
                    )
                    raise LedgerError(msg)
            if _is_over(job):
                msg = f"job {job_id} is over, so stage {stage} may not leave; reserve a new job"
                raise LedgerError(msg)
            excess = _count(charged) - _left(job)
            if excess:
                msg = (
                    f"stage {stage} of job {job_id} releases more than is left of its reservation (too much:"
                    f" {_in_words(excess)}); reserve a new job with all its stages"
                )
                raise LedgerError(msg)
            self._file.append(
                "commit", job_id, job[0].snapshot, charged, stage=stage, release_digest=release_digest
            )

    def release(self, job_id: str) -> None:
        """Free what a finished or abandoned job reserved and did not commit.

        A job that holds nothing (released before, or never reserved) changes nothing.

        Raises:
            LedgerError: Nothing can be recorded.
        """
        with self._file.transaction():
            job = self._file.job(job_id)
            if job and not _is_over(job):
                self._file.append("release", job_id, job[0].snapshot, ())

    def committed(self, job_id: str, stage: str) -> str | None:
        """Return the digest under which a stage has left, or None if it has not."""
        digests = {
            entry.stage: entry.release_digest for entry in self._file.job(job_id) if entry.kind == "commit"
        }
        return digests.get(stage)

    def spent(self, snapshot: str, delta: float) -> Spent:
        """Return what has left of a snapshot, at `delta` in (0, 1); zero for an unknown snapshot."""
        entries = self._file.of_snapshot(snapshot)
        return _spent((event for entry in entries if entry.kind == "commit" for event in entry.events), delta)

    def reserved(self, snapshot: str, delta: float) -> Spent:
        """Return what open jobs on a snapshot still hold beyond what they have committed."""
        jobs = _by_job(self._file.of_snapshot(snapshot))
        open_jobs = [job for job in jobs if not _is_over(job)]
        return _spent((event for job in open_jobs for event in _events(_left(job))), delta)

    def entries(self, snapshot: str | None = None) -> tuple[Entry, ...]:
        """Return all entries, or those of one snapshot, oldest first."""
        return self._file.all_entries() if snapshot is None else self._file.of_snapshot(snapshot)

    def snapshots(self) -> tuple[str, ...]:
        """Return the snapshots with entries, oldest first."""
        return tuple(dict.fromkeys(entry.snapshot for entry in self.entries()))


def _check_names(**names: str) -> None:
    for setting, name in names.items():
        if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            msg = f"{setting} has {len(name)} characters; it must be a printable text of 1 to {_MAX_NAME}"
            raise PrivacyParameterError(msg)


def _some(events: Sequence[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    merged = merge_events(events)
    if not merged:
        msg = "no events were given; a release without an event has no privacy to record: state what it costs"
        raise PrivacyParameterError(msg)
    return merged


def _by_job(entries: Iterable[Entry]) -> list[tuple[Entry, ...]]:
    jobs: dict[str, list[Entry]] = {}
    for entry in entries:
        jobs.setdefault(entry.job_id, []).append(entry)
    return [tuple(job) for job in jobs.values()]


def _is_over(job: Sequence[Entry]) -> bool:
    return any(entry.kind == "release" for entry in job)


def _count(events: Iterable[GaussianEvent]) -> Counter[tuple[float, float]]:
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[event.noise_multiplier, event.sample_rate] += event.count
    return counts


def _events(counts: Counter[tuple[float, float]]) -> tuple[GaussianEvent, ...]:
    return tuple(GaussianEvent(*kind, count) for kind, count in sorted(counts.items()))


def _left(job: Sequence[Entry]) -> Counter[tuple[float, float]]:
    """Return what a job's reservation holds beyond its commitments."""
    committed = _count(event for entry in job[1:] for event in entry.events)
    return _count(job[0].events) - committed


def _held(entries: Iterable[Entry]) -> list[GaussianEvent]:
    """Return what counts against the limit: an open job whole, a finished one as far as it committed."""
    held: list[GaussianEvent] = []
    for job in _by_job(entries):
        for entry in job[1:] if _is_over(job) else job[:1]:
            held.extend(entry.events)
    return held


def _spent(events: Iterable[GaussianEvent], delta: float) -> Spent:
    merged = merge_events(events)
    return Spent(epsilon_pld(merged, delta), epsilon_rdp(merged, delta), merged)


def _in_words(counts: Counter[tuple[float, float]]) -> str:
    return ", ".join(
        f"{count} of noise_multiplier {noise_multiplier:.4g} at sample_rate {sample_rate:g}"
        for (noise_multiplier, sample_rate), count in sorted(counts.items())
    )

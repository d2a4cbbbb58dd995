"""Doing a job's secure sums again from their transcripts, and the models after them, and holding both to the log.

From the plan and the transcripts alone: bins, first model, round after round up to the one asked for. What was asked in
each round must be, to the bit, what the model before it gives; the sum and the model after it must have the digests
that the coordinator logged at the time, before anybody cosigned it.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.events import Exchange, RoundCompleted
from fedfin.audit.reading import open_log
from fedfin.audit.verifying import verify_log
from fedfin.credit.export import load_model
from fedfin.errors import AuditError, LinkError, ProtocolRefusalError, RoundAbortedError
from fedfin.plan import JobPlan
from fedfin.privacy.combiner import Combiner
from fedfin.roster_chain import RosterChain
from fedfin.server.stages import JobStages, digest_of
from fedfin.server.summing import CohortSums, Stage
from fedfin.server.transcripts import Transcript, Transcripts
from fedfin.update import encode

__all__ = ["Replayed", "last_round", "replay"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A round that was done again, and is the one that was logged.

    Attributes:
        round: Its number.
        survivors: Lenders in the sum.
        sum: SHA-256 of the cohort's sum, hex.
        model: Digest of the model after it.
        rounds: Rounds that were done again on the way, this one among them.
    """

    round: int
    survivors: tuple[str, ...]
    sum: str
    model: str
    rounds: int


@dataclass(slots=True)
class _Logged:
    sums: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    rounds: dict[int, RoundCompleted] = field(default_factory=dict[int, RoundCompleted])
    bins: str = ""


def last_round(run: Path) -> int:
    """Return the number of the last round that the run's log names; 0 for none."""
    return max(_read_log(run, _read_run(run)["job"]).rounds, default=0)


def replay(run: Path, number: int) -> Replayed:
    """Do a round again, and all before it that its model rests on.

    Args:
        run: A run directory with transcripts.
        number: The round.

    Raises:
        AuditError: The log does not hold, a transcript is missing or damaged, or a sum, a question or a model is not
            the one that was logged; says which.
    """
    document = _read_run(run)
    plan = JobPlan.model_validate(document["plan"])
    logged = _read_log(run, document["job"])
    if plan.aggregation != "secure" or number not in logged.rounds:
        msg = (
            f"round {number} of {run} cannot be done again: the log names rounds {sorted(logged.rounds)} and"
            f" aggregation {plan.aggregation}; transcripts are of secure sums that succeeded"
        )
        raise AuditError(msg)
    roster = _roster(run)
    stages = JobStages(
        document["job"],
        plan,
        load_model(run / "model").schema,
        num_members=len(roster),
        weight=lambda _: 0.0,
    )
    transcripts = Transcripts(run)
    _, sums = _sum_again(transcripts, stages.bins(), roster, logged, run)
    checkpoint = stages.first(sums)
    _require(digest_of(checkpoint) == logged.bins, run, "the first model, made of the bins,")
    digest, done = "", 0
    for one in sorted(known for known in logged.rounds if known <= number):
        entry = logged.rounds[one]
        _require(digest_of(checkpoint) == entry.model_before, run, f"the model before round {one}")
        digest, sums = _sum_again(transcripts, stages.round(one, checkpoint), roster, logged, run)
        checkpoint = stages.after(checkpoint, sums)
        _require(digest_of(checkpoint) == entry.model_after, run, f"the model after round {one}")
        _require(sums.survivors == entry.cohort, run, f"the cohort of round {one}")
        done += 1
    return Replayed(number, sums.survivors, digest, digest_of(checkpoint), done)


def _sum_again(
    transcripts: Transcripts,
    stage: Stage,
    roster: Mapping[str, Ed25519PublicKey],
    logged: _Logged,
    run: Path,
) -> tuple[str, CohortSums]:
    """Return a stage's sum from its transcript, and the sum's digest, which is the logged one."""
    kept = transcripts.read(stage.name)
    if kept is None:
        msg = f"{run} holds no transcript of {stage.name}; evidence.keep_transcripts of federation.yaml keeps them"
        raise AuditError(msg)
    _require(kept.question == encode(stage.question), run, f"the question of {stage.name}")
    layout = stage.upcoming.layout(kept.context.num_lenders)
    _require(layout.digest() == kept.context.layout, run, f"the layout of {stage.name}")
    try:
        total = _combine(kept, roster, layout.size)
    except (ProtocolRefusalError, RoundAbortedError) as error:
        msg = f"the transcript of {stage.name} in {run} gives no sum ({error}); it was changed: rely on none of it"
        raise AuditError(msg) from error
    digest = hashlib.sha256(total.astype("<u4", copy=False).tobytes()).hexdigest()
    _require(logged.sums.get((stage.name, kept.context.attempt)) == digest, run, f"the sum of {stage.name}")
    of_round = next((one for one in logged.rounds.values() if stage.name == f"round {one.round}"), None)
    if of_round is not None and of_round.transcript is not None:
        _require(of_round.transcript == kept.digest, run, f"the transcript of {stage.name}")
    return digest, CohortSums(
        parts=layout.decode(total),
        survivors=tuple(sorted(kept.survivors)),
        num_lenders=kept.context.num_lenders,
        missing={},
        failed_after={},
        seconds=0.0,
        exchanges=0,
    )


def _combine(kept: Transcript, roster: Mapping[str, Ed25519PublicKey], size: int) -> Any:  # noqa: ANN401  (an array)
    combiner = Combiner(kept.context, roster, size)
    for name, advert in kept.adverts.items():
        combiner.add_advert(name, advert)
    combiner.adverts()
    for name, sealed in kept.sealed.items():
        combiner.add_sealed(name, sealed)
    combiner.ask(kept.question)
    for name, values in kept.vectors.items():
        combiner.fold(name, values)
    combiner.settle()
    for name, confirmation in kept.confirmations.items():
        combiner.add_confirmation(name, confirmation)
    combiner.confirmations()
    for name, shares in kept.shares.items():
        with contextlib.suppress(ProtocolRefusalError):  # a helper that lied, as it did then
            combiner.add_shares(name, shares)
    return combiner.total()


def _read_run(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = document["job"], document["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} cannot be read ({error}); name a run directory of the coordinator"
        raise AuditError(msg) from error
    return document


def _read_log(run: Path, job: str) -> _Logged:
    path = run / "audit.db"
    # a run that goes on has no copy yet: the federation's own log lies two folders up
    path = path if path.exists() else run.parent.parent / "audit.db"
    if (wrong := verify_log(path).wrong) is not None:
        msg = f"{path} does not hold: {wrong.what}; nothing can be compared with it ({wrong.meaning})"
        raise AuditError(msg)
    found = _Logged()
    with open_log(path) as log:
        for _, entry in log.entries():
            match None if entry is None else entry.event:
                case Exchange(job=of, step="unmasked", digest=str(digest)) as event if of == job:
                    found.sums[event.stage, event.attempt - 1] = digest
                case Exchange(job=of, stage="bins", step="released", digest=str(digest)) if of == job:
                    found.bins = digest
                case RoundCompleted(job=of) as event if of == job:
                    found.rounds[event.round] = event
                case _:
                    pass
    return found


def _roster(run: Path) -> Mapping[str, Ed25519PublicKey]:
    path = run / "roster.json"
    try:
        return RosterChain.from_json(path.read_text(encoding="utf-8")).last.roster().public_keys()
    except (OSError, UnicodeDecodeError, LinkError) as error:
        msg = f"{path} cannot be read ({error}); a run that is finished and sealed has it"
        raise AuditError(msg) from error


def _require(holds: bool, run: Path, what: str) -> None:  # noqa: FBT001  (private, always by the same form)
    if not holds:
        msg = (
            f"{what} is not the one that was logged: {run} was changed, or the coordinator did something else"
        )
        raise AuditError(msg)

"""Summing under secure aggregation: the coordinator's side of the five exchanges, around `privacy.combiner`.

    open, share       keys and sealed secrets are relayed; nothing is used up yet, so a failure is tried again
    mask              recorded on disk first: from here on the stage is used up, at the lenders too (but where all
                      refuse one lender's shares: then it is tried again without that one)
    confirm, unmask   the survivors agree on who they are, then give back what takes the masks off the sum

The open and share of the following stage ride along with confirm and unmask, so that a steady round is three exchanges.
What was prepared and does not fit when its turn comes is dropped and made anew, as another attempt.

Vectors are folded into one sum as they arrive, and lenders with large ones are asked a few at a time, so that neither
the SuperLink nor this process holds many of them.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit.events import names_digest
from fedfin.errors import LinkError, ProtocolRefusalError, RoundAbortedError
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.encoding import Layout, unpack
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.server.dealers import FALSE_DEALER, bad_dealers
from fedfin.server.exchange import Exchange
from fedfin.server.jobs import Say
from fedfin.server.roster import LEFT_OUT, AskedSum, FederationStore
from fedfin.server.summing import CohortSums, Stage, SumLostError, SumShortError, Upcoming
from fedfin.server.transcripts import RecordedCombiner, Transcripts
from fedfin.update import (
    Advertised,
    Confirm,
    Confirmed,
    Mask,
    Masked,
    Message,
    Open,
    Refused,
    Shared,
    ShareKeys,
    Unmask,
    Unmasked,
    encode,
)

__all__ = ["JobContext", "SecureSums"]

_AT_ONCE: Final = 256 * 2**20  # bytes of questions and vectors that are on their way at the same time
_MAX_THREADS: Final = 8
_RULE: Final = re.compile(r"[a-z_]{3,40}(?=: )")

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class JobContext:
    """What every sum of a job is about.

    Attributes:
        federation: The federation's name.
        job_id: The job's id.
        plan_digest: SHA-256 of the plan, hex.
        roster: Identity keys of the members, as the job was first proposed.
        deadline_s: What an exchange waits.
    """

    federation: str
    job_id: str
    plan_digest: str
    roster: Mapping[str, Ed25519PublicKey] = field(repr=False)
    deadline_s: float


@dataclass(slots=True)
class _Sum:
    """One sum while it goes on."""

    context: SumContext
    layout: Layout
    combiner: Combiner
    ends_part: bool = False
    failures: dict[str, str] = field(default_factory=dict[str, str])
    refused: set[str] = field(default_factory=set[str])
    exchanges: int = 0

    @property
    def id(self) -> str:
        return self.context.digest().hex()


class SecureSums:
    """The `Summing` of aggregation secure."""

    def __init__(
        self,
        exchange: Exchange,
        store: FederationStore,
        job: JobContext,
        *,
        say: Say,
        refuse: Callable[[str, str], None],
        wait: Callable[[str, Refused], None],
        transcripts: Transcripts | None = None,
    ) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            store: Where attempts are counted and sums that were asked for are marked.
            job: What the sums are about.
            say: Told of rules by which a lender refused.
            refuse: Told of a lender whose part in the job ends, and why: it refused for another reason than a rule of
                the sum, or dealt shares that do not open or give no secret.
            wait: Told of a lender that says not yet: it stays in the job.
            transcripts: Where what is seen of each sum is kept; None keeps nothing.
        """
        self._exchange = exchange
        self._store = store
        self._job = job
        self._say = say
        self._refuse = refuse
        self._wait = wait
        self._transcripts = transcripts
        self._roster_digest = roster_digest(job.roster)
        self._prepared: _Sum | None = None

    def bound_to(self, stage: Stage) -> frozenset[str] | None:
        """Return who shared in an earlier sum of this model that was asked for and lost: nobody else may now.

        Two sums of one model over cohorts that differ would show, by their difference, single lenders' vectors.
        """
        earlier = self._earlier(stage)
        return earlier[0].sharers if earlier else None

    def sum(
        self,
        stage: Stage,
        names: Sequence[str],
        *,
        following: Upcoming | None = None,
        on_reply: Callable[[str], None] | None = None,
    ) -> CohortSums:
        """Return the sum of the survivors' vectors; errors as `Summing.sum`."""
        started = time.monotonic()
        run = self._taken(stage, names) or self._opened(stage, names)
        run.ends_part = stage.ends_part
        try:
            self._ask_masked(run, stage, on_reply)
            next_run = self._confirmed(run, following)
            total = self._unmasked(run, next_run)
        except RoundAbortedError as error:
            raise SumLostError(str(error), run.failures) from None
        self._prepared = next_run
        survivors = run.combiner.survivors
        transcript = run.combiner.keep() if isinstance(run.combiner, RecordedCombiner) else None
        return CohortSums(
            parts=run.layout.decode(total),
            survivors=tuple(sorted(survivors)),
            num_lenders=len(names),
            missing={name: reason for name, reason in run.failures.items() if name not in survivors},
            failed_after={name: reason for name, reason in run.failures.items() if name in survivors},
            seconds=time.monotonic() - started,
            exchanges=run.exchanges,
            answer_bytes=run.layout.size * run.layout.ring_bits // 8,
            transcript=transcript,
        )

    # The five exchanges

    def _opened(self, stage: Stage, names: Sequence[str]) -> _Sum:
        """Open a new attempt and share secrets; nothing is used up when it fails."""
        run = self._start(stage.upcoming, names)
        run.ends_part = stage.ends_part
        bound = self.bound_to(stage)
        enough = self._least(run, stage) if bound is None else len(bound)
        try:
            request = Open(self._job.job_id, run.context.to_bytes().decode("ascii"))
            self._each(
                run,
                dict.fromkeys(names, request),
                Advertised,
                lambda name, reply: run.combiner.add_advert(name, reply.advert),
                enough=enough,
            )
            adverts = run.combiner.adverts()
            self._note(run, "opened", len(adverts), _digest_of(adverts))
            share = ShareKeys(self._job.job_id, run.id, adverts)
            self._each(
                run,
                dict.fromkeys(adverts, share),
                Shared,
                lambda name, reply: run.combiner.add_sealed(name, reply.sealed),
                enough=enough,
            )
            self._note(run, "shared", len(run.combiner.sharers), names_digest(run.combiner.sharers))
            run.exchanges += 2
        except RoundAbortedError:
            raise SumShortError(run.failures, run.refused) from None
        return run

    def _ask_masked(self, run: _Sum, stage: Stage, on_reply: Callable[[str], None] | None) -> None:
        """Ask every sharer for its masked vector and fold them."""
        sharers, least = run.combiner.sharers, self._least(run, stage)
        bound = self._earlier(stage)
        if len(sharers) < least or any(sharers != earlier.sharers for earlier in bound):
            raise SumShortError(run.failures, run.refused)
        confirmed = [earlier.survivors for earlier in bound if earlier.survivors is not None]
        # Who was confirmed as a survivor once stays the only survivor: another set would be refused.
        asked = frozenset.intersection(sharers, *confirmed)
        question = encode(stage.question)
        try:
            sealed = {name: run.combiner.sealed_for(name) for name in sorted(asked)}
            run.combiner.ask(question)
        except RoundAbortedError:
            raise SumShortError(run.failures, run.refused) from None
        self._store.mark_asked(
            self._job.job_id, AskedSum(stage.name, run.context.attempt, stage.base, sharers, None)
        )
        layout = run.layout

        def fold(name: str, reply: Masked) -> None:
            run.combiner.fold(name, unpack(reply.values.tobytes(), layout.size, layout.ring_bits))
            if on_reply is not None:
                on_reply(name)

        asked_bytes = np.frombuffer(question, dtype=np.uint8)
        wave = max(1, _AT_ONCE // (len(question) + layout.size * layout.ring_bits // 8))
        for some in _in_waves(sorted(asked), wave):
            requests = {name: Mask(self._job.job_id, run.id, sealed[name], asked_bytes) for name in some}
            self._each(run, requests, Masked, fold)
        run.exchanges += 1
        self._note(run, "masked", len(run.combiner.survivors), hashlib.sha256(question).hexdigest())
        self._leave_out_dealers(run, asked)
        if len(run.combiner.survivors) < least:
            msg = (
                f"{stage.name}: {len(run.combiner.survivors)} lenders sent a masked vector, and {least} must; nothing"
                " was unmasked"
            )
            raise RoundAbortedError(msg)

    def _leave_out_dealers(self, run: _Sum, asked: frozenset[str]) -> None:
        """Leave out of the job who dealt shares that do not open; try the stage again if nobody else used it up.

        The mark goes first: killed in between, the coordinator asks again, and finds out again.
        """
        found = bad_dealers(
            {name: run.failures[name] for name in asked & run.refused},
            asked=asked,
            sharers=run.combiner.sharers,
            num_lenders=run.context.num_lenders,
        )
        if not found.named_by:
            return
        stage, attempt = run.context.stage, run.context.attempt
        if found.nothing_left:
            self._store.unmark_asked(self._job.job_id, stage, attempt)
        reasons = {
            name: f"it dealt shares that do not open, as {len(by)} of {run.context.num_lenders} lenders say"
            for name, by in found.named_by.items()
        }
        self._leave_out(run, reasons, rule=found.rule)
        if found.nothing_left:
            others = {name: why for name, why in run.failures.items() if name not in found.witnesses}
            raise SumShortError(others, run.refused - found.witnesses)

    def _leave_out(self, run: _Sum, reasons: Mapping[str, str], *, rule: str) -> None:
        """End these lenders' part in the job for good."""
        self._say(
            {"event": "sum_liars", "stage": run.context.stage, "rule": rule, "lenders": sorted(reasons)}
        )
        for name, reason in sorted(reasons.items()):
            run.failures[name] = reason
            self._refuse(name, f"{LEFT_OUT}{reason}")

    def _confirmed(self, run: _Sum, following: Upcoming | None) -> _Sum | None:
        """Have the survivors confirmed, and the following stage opened; return it, or None."""
        survivors = sorted(run.combiner.settle())
        self._store.mark_survivors(self._job.job_id, run.context.stage, run.context.attempt, survivors)
        next_run = None if following is None else self._start(following, survivors)
        opening = "" if next_run is None else next_run.context.to_bytes().decode("ascii")

        def take(name: str, reply: Confirmed) -> None:
            run.combiner.add_confirmation(name, reply.signature)
            if next_run is not None:
                # who does not prepare leaves the preparation unfit; that is no fault in this sum
                with contextlib.suppress(ProtocolRefusalError):
                    next_run.combiner.add_advert(name, reply.advert)

        request = Confirm(self._job.job_id, run.id, tuple(survivors), opening)
        self._each(run, dict.fromkeys(survivors, request), Confirmed, take, enough=run.context.threshold)
        run.exchanges += 1
        self._note(run, "confirmed", len(survivors), names_digest(survivors))
        return next_run

    def _unmasked(self, run: _Sum, next_run: _Sum | None) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
        """Have the shares given back, and those of the following stage sent; return the unmasked sum."""
        confirmations = run.combiner.confirmations()
        adverts: dict[str, bytes] = {}
        if next_run is not None:
            with contextlib.suppress(RoundAbortedError):
                adverts = next_run.combiner.adverts()

        def take(name: str, reply: Unmasked) -> None:
            if next_run is not None:
                with contextlib.suppress(ProtocolRefusalError):
                    next_run.combiner.add_sealed(name, reply.sealed)
            run.combiner.add_shares(name, reply.shares)

        helpers = [name for name in sorted(run.combiner.survivors) if name not in run.failures]
        request = Unmask(self._job.job_id, run.id, confirmations, adverts)
        self._each(run, dict.fromkeys(helpers, request), Unmasked, take, enough=run.context.threshold)
        run.exchanges += 1
        if liars := run.combiner.liars:
            event = {"event": "sum_liars", "stage": run.context.stage, "rule": "lying_helper"}
            self._say({**event, "lenders": list(liars)})
        try:
            total = run.combiner.total(min(_MAX_THREADS, os.cpu_count() or 1))
        except RoundAbortedError:
            # These masked vectors have left, so the sum stays lost; no later one is lost by the same lender.
            if dealers := run.combiner.false_dealers:
                self._leave_out(run, dict.fromkeys(dealers, FALSE_DEALER), rule="false_dealer")
            raise
        digest = hashlib.sha256(total.astype("<u4", copy=False).tobytes()).hexdigest()
        self._note(run, "unmasked", len(run.combiner.survivors), digest)
        return total

    # What they share

    def _note(self, run: _Sum, step: str, cohort_size: int, digest: str) -> None:
        """Tell the log of a step that was taken: both sides log the same context."""
        self._say(
            {
                "event": "exchange",
                "stage": run.context.stage,
                "attempt": run.context.attempt,
                "step": step,
                "cohort_size": cohort_size,
                "context": run.id,
                "digest": digest,
            }
        )

    def _start(self, upcoming: Upcoming, names: Sequence[str]) -> _Sum:
        layout = upcoming.layout(len(names))
        context = SumContext(
            federation=self._job.federation,
            job_id=self._job.job_id,
            plan=self._job.plan_digest,
            stage=upcoming.name,
            attempt=self._store.open_sum(self._job.job_id, upcoming.name),
            cohort=tuple(names),
            roster=self._roster_digest,
            layout=layout.digest(),
            threshold=threshold_of(len(names)),
        )
        make = Combiner if self._transcripts is None else self._transcripts.record
        return _Sum(context, layout, make(context, self._job.roster, layout.size))

    def _taken(self, stage: Stage, names: Sequence[str]) -> _Sum | None:
        """Return what was prepared for this stage along with the one before, if all of it fits."""
        prepared, self._prepared = self._prepared, None
        fits = (
            prepared is not None
            and prepared.context.stage == stage.name
            and prepared.context.cohort == tuple(names)
            and prepared.combiner.sharers == frozenset(names)
            and prepared.layout == stage.upcoming.layout(len(names))
        )
        return prepared if fits else None

    def _least(self, run: _Sum, stage: Stage) -> int:
        return max(run.context.threshold, stage.min_survivors(run.context.num_lenders))

    def _earlier(self, stage: Stage) -> list[AskedSum]:
        """Return the sums of the same kind that were asked for of the same model."""
        kind = stage.name.partition(" ")[0]
        return [
            asked
            for asked in self._store.asked_sums(self._job.job_id)
            if asked.stage.partition(" ")[0] == kind and asked.base == stage.base
        ]

    def _each(
        self,
        run: _Sum,
        requests: Mapping[str, Message],
        expected: type[MessageT],
        take: Callable[[str, MessageT], None],
        *,
        enough: int | None = None,
    ) -> None:
        """Ask each lender; a lender that fails, refuses or answers what may not be is a drop-out from here on."""

        def fold(name: str, reply: Message) -> None:
            if not isinstance(reply, expected) or getattr(reply, "sum", None) != run.id:
                msg = "it answered for another sum"
                raise LinkError(msg)
            take(name, reply)

        answers = self._exchange.ask(
            requests, expected, deadline_s=self._job.deadline_s, fold=fold, enough=enough
        )
        run.failures.update(answers.failures)
        for name, reply in sorted(answers.replies.items()):
            reason = reply.reason if isinstance(reply, Refused) else "it answered another question"
            run.failures[name] = reason
            if isinstance(reply, Refused) and reply.waits:
                self._wait(name, reply)
                continue
            if isinstance(reply, Refused):
                run.refused.add(name)
            if (rule := _RULE.match(reason)) is not None:
                self._say(
                    {
                        "event": "sum_refused",
                        "stage": run.context.stage,
                        "lender": name,
                        "rule": rule[0],
                        "reason": reason,
                    }
                )
            elif isinstance(reply, Refused) and run.ends_part:
                self._refuse(name, reason)


def _digest_of(parts: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of the parts by name."""
    return hashlib.sha256(b"".join(name.encode() + b"\n" + parts[name] for name in sorted(parts))).hexdigest()


def _in_waves(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for at in range(0, len(names), size):
        yield names[at : at + size]

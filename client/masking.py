"""A lender's side of its secure sums: what it answers in the five exchanges, and what it refuses.

`privacy.participant` holds to the protocol of one sum. What stands here belongs to this lender: that the sum is one of
the job it accepted, that no second answer to a model can be told from the first by another cohort, that what leaves is
charged. In that order: checks, work, masks, marker on the disk, charge, answer.

Two sums are held at most, the present one and the next, which is prepared along the way. They live in this object: a
node that was restarted declines the rest of a sum, as a drop-out would, and takes part in the next. A request repeated
to the byte gets the same answer again, as long as its sum is held.
"""

import datetime as dt
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedfin.audit.events import Exchange, names_digest
from fedfin.client.accepted import AcceptedJob
from fedfin.client.answers import charge_of, charged_failure
from fedfin.client.folder import LenderFolder
from fedfin.client.hours import GRACE, require_hours, utc_now
from fedfin.client.refusing import write_refusal
from fedfin.client.stages import Stages
from fedfin.client.sum_log import SumLog
from fedfin.client.sum_rules import refusal
from fedfin.client.work import Question, Work, account_of, stage_of
from fedfin.errors import FedfinError, LinkError
from fedfin.privacy.encoding import pack
from fedfin.privacy.ledger import Ledger
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext
from fedfin.update import (
    Advertised,
    AskHistogram,
    Confirm,
    Confirmed,
    Evaluate,
    Mask,
    Masked,
    Message,
    Open,
    Shared,
    ShareKeys,
    Train,
    Unmask,
    Unmasked,
    decode,
    encode,
)

__all__ = ["Masking", "SumQuestion"]

SumQuestion: TypeAlias = Open | ShareKeys | Mask | Confirm | Unmask
"""The coordinator's part of the five exchanges."""

SumStep: TypeAlias = Literal["opened", "shared", "masked", "confirmed", "unmasked", "released", "repeated"]

_QUESTIONS: Final[tuple[type[Question], ...]] = (AskHistogram, Train, Evaluate)
_MOST_HELD: Final = 2
_MAX_THREADS: Final = 8


@dataclass(slots=True)
class _Held:
    """One sum while it is held."""

    job: AcceptedJob
    context: SumContext
    participant: Participant
    advert: bytes = field(repr=False)
    following: str = ""  # the sum that was opened along with this one's confirmation
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    answered: dict[type[Message], tuple[bytes, bytes]] = field(
        default_factory=dict[type[Message], tuple[bytes, bytes]], repr=False
    )  # digest of the request, and the answer

    @property
    def min_survivors(self) -> int:
        """Fewest survivors that the planned noise needs; 0 where each lender has its own."""
        privacy = self.job.plan.privacy
        return self.context.num_lenders - privacy.planned_dropouts if privacy.mode == "shared" else 0


class Masking:
    """The secure sums of one lender."""

    def __init__(
        self,
        folder: LenderFolder,
        ledger: Ledger,
        identity: Ed25519PrivateKey,
        say: Callable[[str], None],
        now: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        """Prepare.

        Args:
            folder: The lender's.
            ledger: Its ledger.
            identity: Its enrolled identity key.
            say: Prints a line for people.
            now: The clock that the policy's hours are held against.
        """
        self._say = say
        self._now = now
        self._folder = folder
        self._ledger = ledger
        self._identity = identity
        self._held: dict[str, _Held] = {}  # by the context's digest, oldest first
        self._logs: dict[str, SumLog] = {}

    def answer(self, question: SumQuestion, data: bytes, job: AcceptedJob, stages: Stages) -> bytes:
        """Answer one question of a secure sum.

        Args:
            question: It.
            data: Its bytes.
            job: The job that it names, as it was accepted.
            stages: Computes what is summed.

        Raises:
            ProtocolRefusalError: It breaks a rule of `client.sum_rules` or `privacy.sum_rules`: this lender answers
                nothing of that sum any more, and nothing was revealed.
            FedfinError: Anything else that keeps it from answering, likewise.
        """
        if job.roster is None:
            raise refusal("aggregation", f"job {job.job_id} was accepted with aggregation plain")
        if isinstance(question, Open):
            return encode(Advertised(job.job_id, *self._open(question.context, job)))
        held = self._held.get(question.sum)
        if held is None or held.job.job_id != job.job_id:
            what = (
                f"nothing is held here of the sum {question.sum[:12]!r}: this lender was restarted since, refused it,"
                " or it is over"
            )
            raise refusal("unknown_sum", what)
        asked = hashlib.sha256(data).digest()
        before = held.answered.get(type(question))
        if before is not None and before[0] == asked:
            self._note("repeated", held.context)
            return before[1]
        try:
            answer = self._step(question, held, stages)
        except BaseException:
            self._forget(question.sum)
            raise
        held.answered[type(question)] = (asked, answer)
        return answer

    def end(self, job_id: str) -> None:
        """Forget every sum of a job that is over."""
        for name in [name for name, held in self._held.items() if held.job.job_id == job_id]:
            self._forget(name)
        self._logs.pop(job_id, None)

    def _step(self, question: ShareKeys | Mask | Confirm | Unmask, held: _Held, stages: Stages) -> bytes:
        job_id = held.job.job_id
        match question:
            case ShareKeys():
                sealed = held.participant.share(question.adverts)
                self._note("shared", held.context, len(question.adverts))
                return encode(Shared(job_id, question.sum, sealed))
            case Mask():
                return self._mask(question, held, stages)
            case Confirm():
                return encode(self._confirm(question, held))
            case Unmask():
                return encode(self._unmask(question, held))

    # The five exchanges

    def _open(self, text: str, job: AcceptedJob) -> tuple[str, bytes]:
        """Open a sum, once; return its context's digest and this lender's advert."""
        context = SumContext.from_bytes(text.encode())
        name = context.digest().hex()
        if (held := self._held.get(name)) is not None:
            return name, held.advert
        require_hours(self._folder.config.policy, self._now())
        self._check_context(context, job)
        assert job.roster is not None  # noqa: S101  (checked by the caller)
        config = self._folder.config
        least = max(config.policy.min_cohort, job.plan.cohort.min_lenders)
        participant = Participant(context, config.name, self._identity, job.roster.public_keys(), least)
        self._log(job).open(context.stage, context.attempt)
        held = _Held(job, context, participant, participant.open())
        self._held[name] = held
        self._note("opened", context)
        while len(self._held) > _MOST_HELD:
            self._forget(next(iter(self._held)))
        return name, held.advert

    def _mask(self, question: Mask, held: _Held, stages: Stages) -> bytes:
        """Check everything, then compute, mask, record, charge; the answer leaves last."""
        job, context = held.job, held.context
        require_hours(self._folder.config.policy, self._now(), grace=GRACE)
        asked = question.question.tobytes()
        self._require_uncharged(context.stage, job)
        work = stages.summand(_question_in(asked, context), job, context.num_lenders)
        layout = work.layout
        if layout is None or layout.digest() != context.layout:
            raise refusal("layout", f"the vector of {context.stage} would be laid out otherwise here")
        sharers = held.participant.receive(question.sealed, asked)
        if len(sharers) < held.min_survivors:
            what = (
                f"{len(sharers)} lenders shared, and the noise was planned for {held.min_survivors} at least"
            )
            raise refusal("planned_noise", what)
        self._require_no_difference(context.stage, work, sharers, self._log(job))
        try:
            values = work.run()
        except Exception as error:
            if not work.events:
                raise
            return self._fail(work, held, error)
        masked = held.participant.mask(values, min(_MAX_THREADS, os.cpu_count() or 1))
        packed = np.frombuffer(pack(masked, layout.ring_bits), dtype=np.uint8)
        answer = encode(Masked(job.job_id, question.sum, packed))
        held.weights = work.weights
        self._log(job).release(context.stage, context.attempt, sharers, work.weights)
        self._charge(work, held, answer, "masked", len(sharers))
        self._say(f"job {job.job_id}: {work.stage} answered, under masks")
        return answer

    def _confirm(self, question: Confirm, held: _Held) -> Confirmed:
        stage, attempt = held.context.stage, held.context.attempt
        log, survivors = self._log(held.job), frozenset(question.survivors)
        for earlier in log.alike(stage, held.weights):
            is_other = (earlier.stage, earlier.attempt) != (stage, attempt)
            if is_other and earlier.survivors not in {None, survivors}:
                what = f"{earlier.stage}, of (nearly) the same model, was confirmed with other survivors than {stage}"
                raise refusal("differencing", what)
        signature = held.participant.confirm(question.survivors, held.min_survivors)
        log.confirm(stage, attempt, survivors)
        self._note("confirmed", held.context, len(survivors), names_digest(survivors))
        advert = b""
        if question.next:
            try:
                held.following, advert = self._open(question.next, held.job)
            except FedfinError as error:  # what cannot be prepared keeps nobody from finishing this sum
                write_refusal(self._folder.journal, held.job.job_id, "Open", error)
        return Confirmed(held.job.job_id, question.sum, signature, advert)

    def _unmask(self, question: Unmask, held: _Held) -> Unmasked:
        shares = held.participant.unmask(question.confirmations)
        self._note("unmasked", held.context, len(shares))
        sealed: dict[str, bytes] = {}
        following = self._held.get(held.following)
        if question.adverts and following is not None:
            try:
                sealed = following.participant.share(question.adverts)
                self._note("shared", following.context, len(question.adverts))
            except FedfinError as error:  # as above
                write_refusal(self._folder.journal, held.job.job_id, "ShareKeys", error)
                self._forget(held.following)
        return Unmasked(held.job.job_id, question.sum, shares, sealed)

    # Rules of this lender

    def _check_context(self, context: SumContext, job: AcceptedJob) -> None:
        named = (context.federation, context.job_id, context.plan)
        if named != (self._folder.config.federation, job.job_id, job.plan.digest()):
            raise refusal("other_job", "the sum's context names another federation, job or plan")
        kind, _, number = context.stage.partition(" ")
        last = {"round": job.plan.training.rounds, "evaluation": job.plan.evaluation.times}.get(kind, 0)
        if context.stage != "bins" and number not in map(str, range(1, last + 1)):
            raise refusal("stage", f"{context.stage} is no stage of the plan")
        if kind == "evaluation" and not job.counted:
            raise refusal("stage", "this lender takes no part in the job's evaluations")
        if self._log(job).was_opened(context.stage, context.attempt):
            raise refusal("attempt", f"attempt {context.attempt} at {context.stage} was opened before")
        self._require_uncharged(context.stage, job)

    def _require_uncharged(self, stage: str, job: AcceptedJob) -> None:
        if job.is_private and self._ledger.committed(account_of(job.job_id, stage), stage) is not None:
            raise refusal("charged", f"{stage} of job {job.job_id} has left and was charged")

    @staticmethod
    def _require_no_difference(
        stage: str, work: Work[NDArray[np.uint32]], sharers: frozenset[str], log: SumLog
    ) -> None:
        alike = log.alike(stage, work.weights)
        if any(earlier.stage == stage and earlier not in alike for earlier in log.released):
            raise refusal("one_model", f"{stage} was answered for another model already")
        for earlier in alike:
            if earlier.sharers != sharers:
                what = (
                    f"the question of {stage} is (nearly) that of {earlier.stage}, which was answered for a cohort of"
                    f" {len(earlier.sharers)}; this one of {len(sharers)} is another"
                )
                raise refusal("differencing", what)

    # What leaves

    def _fail(self, work: Work[NDArray[np.uint32]], held: _Held, error: Exception) -> bytes:
        """Charge work that failed as if it had left; this lender is a drop-out of the sum."""
        held.participant.forget()
        answer = encode(charged_failure(held.job, work.stage, error, self._folder.journal, self._say))
        self._charge(work, held, answer, "released", 0)
        return answer

    def _charge(
        self, work: Work[NDArray[np.uint32]], held: _Held, answer: bytes, step: SumStep, cohort_size: int
    ) -> None:
        digest = hashlib.sha256(answer).hexdigest()
        if work.events:
            # on the disk first: nothing is spent that the log does not say. Killed in between, it is said again.
            self._folder.journal.write(*charge_of(held.job, work))
            self._ledger.commit(work.charged_to, work.stage, work.events, digest)
        self._note(step, held.context, cohort_size, digest)

    def _note(
        self, step: SumStep, context: SumContext, cohort_size: int | None = None, digest: str | None = None
    ) -> None:
        self._folder.journal.note(
            Exchange(
                job=context.job_id,
                stage=context.stage,
                attempt=context.attempt + 1,
                step=step,
                cohort_size=context.num_lenders if cohort_size is None else cohort_size,
                context=context.digest().hex(),
                digest=digest,
            )
        )

    def _log(self, job: AcceptedJob) -> SumLog:
        if job.job_id not in self._logs:
            self._logs[job.job_id] = SumLog(job.folder.sums_path)
        return self._logs[job.job_id]

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            held.participant.forget()


def _question_in(data: bytes, context: SumContext) -> Question:
    """Return the question that a sum is about."""
    try:
        question: Question = decode(data, *_QUESTIONS)
    except LinkError as error:
        raise refusal("question", f"what {context.stage} is to answer does not parse ({error})") from error
    stage = stage_of(question)
    if question.job_id != context.job_id or stage != context.stage:
        what = f"a sum of {context.stage} came with the question of {stage}, or of another job"
        raise refusal("question", what)
    return question

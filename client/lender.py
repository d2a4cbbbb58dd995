"""How a lender answers a coordinator: propose, histogram, train, finish. No Flower here.

Every answer that carries something of the loans is first kept on disk, then charged to the ledger, then sent. A
repeated question (the coordinator was restarted) gets the answer that was kept, so nothing is charged twice; an
answer that was kept but not charged never left, so it is made anew.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.client.evaluation import EVALUATION_FILE, evaluate, give_up
from fedfin.client.folder import JobFolder, LenderFolder
from fedfin.client.histograms import noisy_histogram
from fedfin.client.policy import check_plan, check_size, check_weights
from fedfin.client.preparation import PreparedLoans, prepare
from fedfin.client.training import LocalPrivacy, train_locally
from fedfin.credit.binning import Bins, encode
from fedfin.credit.drift import Reference
from fedfin.credit.export import ReleasedModel, load_model, model_digest, save_model
from fedfin.credit.models import (
    Architecture,
    architecture_of,
    encoding_of,
    model_fingerprint,
    num_parameters,
    require_same_fingerprint,
)
from fedfin.errors import (
    BudgetSpentError,
    ConfigError,
    DataError,
    FedfinError,
    LedgerError,
    LinkError,
    PolicyRefusalError,
    SchemaMismatchError,
    TrainingError,
)
from fedfin.files import write_public
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import CalibratedNoise, GaussianEvent, calibrate, job_events
from fedfin.privacy.noise import NoiseSource, SecureNoise, require_production
from fedfin.strategies.strategy import lender_weight
from fedfin.update import (
    Accepted,
    AskHistogram,
    Done,
    Finish,
    Histogram,
    Message,
    Propose,
    Refused,
    Train,
    Update,
    decode,
)
from fedfin.update import encode as encode_message

__all__ = ["Lender"]

# a folder and a line of the log on any machine
_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,79}")
_REASONS: Final[dict[type[FedfinError], str]] = {
    # What stays inside is in the lender's own log; the coordinator learns only what it needs to go on.
    BudgetSpentError: "its privacy budget does not allow the job",
    DataError: "its loans do not pass its own check",
    LedgerError: "its privacy ledger cannot record",
    TrainingError: "its training did not succeed",
    ConfigError: "its installation needs its engineer",
}


@dataclass(frozen=True, slots=True)
class _Work:
    """What a stage does, and what it is charged: known before a loan is looked at."""

    run: Callable[[], Message]
    events: tuple[GaussianEvent, ...]


class Lender:
    """Answers questions in the name of one lender; one question at a time."""

    def __init__(self, folder: LenderFolder, say: Callable[[str], None]) -> None:
        """Read the loans and open the ledger.

        Raises:
            ConfigError: bank.yaml, schema.yaml or a source does not hold.
            DataError: The loans break the schema; `fedfin client check` shows all faults.
            LedgerError: The ledger cannot be opened.
        """
        self._folder = folder
        self._say = say
        self._loans = prepare(folder)
        self._ledger = folder.ledger()
        self._noise: NoiseSource = require_production(SecureNoise())
        self._encoded: tuple[str, NDArray[np.float32]] | None = None
        self.job_id: str | None = None

    @property
    def loans(self) -> PreparedLoans:
        """The loans as read at the start or at the last proposal."""
        return self._loans

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def answer(self, data: bytes) -> bytes:
        """Answer a question's bytes with an answer's bytes; a refusal is an answer.

        Raises:
            LinkError: The bytes are no question of this release.
        """
        question = decode(data, Propose, AskHistogram, Train, Finish)
        if not _JOB_ID.fullmatch(question.job_id):
            msg = f"the coordinator named a job {question.job_id[:80]!r}; a job's id is letters, digits and dashes"
            raise LinkError(msg)
        try:
            return self._answer(question, data)
        except FedfinError as error:
            return encode_message(self._refuse(question, error))

    def evaluate_pending(self) -> int:
        """Judge every model that was received and not yet judged; return how many."""
        judged = 0
        for path in sorted(self._folder.models_path.glob("*/model.json")):
            if (path.parent / EVALUATION_FILE).exists():
                continue
            self._say(f"judging model {path.parent.name[:12]} on {len(self._loans.holdout)} held-out loans")
            try:
                model = load_model(path.parent)
                accepted = self._folder.job(model.job_id).accepted() or {}
                same = accepted.get("snapshot") == self._loans.snapshot.digest
                result = evaluate(model, self._loans.train, self._loans.holdout, path.parent, same_loans=same)
            except (ConfigError, DataError, TrainingError) as error:
                # One model that cannot be judged must not keep the others from it, nor be tried for ever.
                give_up(path.parent, str(error))
                result = f"model {path.parent.name[:12]} cannot be judged: {error}"
                self._folder.journal.write("evaluation_failed", model=path.parent.name, reason=str(error))
            else:
                self._folder.journal.write("model_evaluated", model=path.parent.name)
            self._say(result)
            judged += 1
        return judged

    def _answer(self, question: Message, data: bytes) -> bytes:
        match question:
            case Propose():
                answer: Message = self._propose(question)
            case Finish():
                answer = self._finish(question)
            case AskHistogram():
                return self._once("bins", question, data, self._histogram)
            case Train():
                return self._once(f"round {question.round}", question, data, self._train)
            case _:
                msg = f"{type(question).__name__} is no question"
                raise LinkError(msg)
        return encode_message(answer)

    def _refuse(self, question: Message, error: FedfinError) -> Refused:
        reason = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), str(error))
        self._folder.journal.write(
            "refused",
            job=question.job_id,
            asked=type(question).__name__,
            rule=type(error).__name__,
            reason=str(error),
        )
        self._say(f"refused {type(question).__name__} of job {question.job_id}: {error}")
        return Refused(question.job_id, reason)

    def _propose(self, question: Propose) -> Accepted:
        plan = _parse_plan(question.plan)
        if question.schema_fingerprint != self._loans.schema.fingerprint():
            msg = (
                "the coordinator's schema is not the one this lender enrolled with; compare schema.yaml at both sides,"
                " and replace the lender's copy only after its mapping in bank.yaml was checked"
            )
            raise SchemaMismatchError(msg)
        job = self._folder.job(question.job_id)
        accepted = job.accepted()
        if accepted is None:
            check_plan(plan, self._folder.config.policy)
            self._loans = prepare(self._folder)  # a new job takes the table as it is now
            self._encoded = None
            weight = lender_weight(len(self._loans.train), plan.training)
            if plan.privacy.mode == "local":
                noise = _noise_of(plan)
                policy = self._folder.config.policy
                self._ledger.reserve(
                    question.job_id,
                    self._loans.snapshot,
                    job_events(noise, plan.training.sample_rate, plan.num_steps),
                    delta=plan.privacy.delta,
                    epsilon_limit=policy.epsilon_limit,
                    max_delta=policy.max_delta,
                )
            # After the reservation: killed in between, the same proposal reserves the same thing again.
            job.accept(
                job=question.job_id,
                plan=question.plan,
                plan_digest=plan.digest(),
                snapshot=self._loans.snapshot.digest,
                weight=weight,
            )
            self._folder.journal.write(
                "job_accepted",
                job=question.job_id,
                plan=plan.digest(),
                mode=plan.privacy.mode,
                epsilon=plan.privacy.epsilon if plan.privacy.mode == "local" else None,
                weight=weight,
                snapshot=self._loans.snapshot.digest,
            )
            self._say(
                f"accepted job {question.job_id} ({plan.model.kind}, {plan.training.rounds} rounds, {_privacy(plan)})"
            )
            accepted = job.accepted() or {}
        elif job.is_over():
            msg = f"job {question.job_id} is over at this lender; start a new job"
            raise PolicyRefusalError(msg)
        elif accepted["plan_digest"] != plan.digest():
            msg = f"job {question.job_id} was accepted with another plan; a changed plan needs a new job"
            raise PolicyRefusalError(msg)
        self.job_id = question.job_id
        return Accepted(question.job_id, float(accepted["weight"]))

    def _once(
        self,
        stage: str,
        question: Message,
        data: bytes,
        make: Callable[[Any, JobPlan], "_Work"],
    ) -> bytes:
        """Answer a stage of a job: from what was kept, or by making it, keeping it and charging it.

        Whatever is refused before the work looks at no loan. In a private job the work itself always ends in an
        answer that is kept and charged, a failure too: an uncharged failure would tell what no noise covers.
        """
        job, plan = self._accepted_job(question.job_id)
        asked = hashlib.sha256(data).digest()
        kept = job.answer(stage)
        # Without privacy there is no charge: what was kept counts as sent.
        charged = plan.privacy.mode == "none" or self._ledger.committed(question.job_id, stage) is not None
        if kept is not None and charged:
            if kept[:32] != asked:
                msg = f"{stage} of job {question.job_id} was answered for another model already; a stage has one answer"
                raise PolicyRefusalError(msg)
            self._folder.journal.write("answer_repeated", job=question.job_id, stage=stage)
            return kept[32:]
        if charged and kept is None and plan.privacy.mode != "none":
            msg = f"{stage} of job {question.job_id} was charged but its answer is gone; it is not made twice"
            raise LedgerError(msg)
        work = make(question, plan)
        try:
            answer = work.run()
        except Exception as error:
            if not work.events:
                raise
            self._folder.journal.write("work_failed", job=question.job_id, stage=stage, reason=str(error))
            self._say(f"job {question.job_id}: {stage} failed, and is charged all the same: {error}")
            answer = Refused(question.job_id, _REASONS[TrainingError])
        encoded = encode_message(answer)
        job.keep_answer(stage, asked + encoded)
        digest = hashlib.sha256(encoded).hexdigest()
        if work.events:
            self._ledger.commit(question.job_id, stage, work.events, digest)
        self._folder.journal.write("released", job=question.job_id, stage=stage, digest=digest)
        self.job_id = question.job_id
        self._say(f"job {question.job_id}: {stage} answered")
        return encoded

    def _histogram(self, question: AskHistogram, plan: JobPlan) -> "_Work":
        schema = self._loans.schema
        private = plan.privacy.mode != "none"
        multiplier = _noise_of(plan).bins_noise_multiplier if private else 0.0

        def run() -> Histogram:
            frame = self._loans.train.frame
            counts = noisy_histogram(frame, schema, multiplier if private else None, self._noise)
            return Histogram(question.job_id, counts)

        return _Work(run, (GaussianEvent(multiplier),) if private else ())

    def _train(self, question: Train, plan: JobPlan) -> "_Work":
        training = plan.training
        if not 1 <= question.round <= training.rounds:
            msg = f"round {question.round} is not one of the plan's {training.rounds}"
            raise PolicyRefusalError(msg)
        bins, arch = self._model_of(question, plan)
        private = plan.privacy.mode != "none"
        multiplier = _noise_of(plan).training_noise_multiplier if private else 0.0

        def run() -> Update:
            delta = train_locally(
                question.weights,
                self._encode(bins, arch),
                self._loans.train.labels,
                architecture=arch,
                training=training,
                privacy=LocalPrivacy(multiplier, plan.privacy.clipping_bound) if private else None,
                noise=self._noise,
            )
            return Update(question.job_id, question.round, question.fingerprint, delta)

        events = (GaussianEvent(multiplier, training.sample_rate, training.local_steps),) if private else ()
        return _Work(run, events)

    def _finish(self, question: Finish) -> Done:
        job = self._folder.job(question.job_id)
        if job.accepted() is None:
            return Done(question.job_id)
        if question.status == "completed" and not self._has_model_of(question.job_id):
            _, plan = self._accepted_job(question.job_id, same_loans=False)
            bins, _ = self._model_of(question, plan)
            model = ReleasedModel(
                job_id=question.job_id,
                rounds=question.rounds,
                plan=plan.model_dump_json(),
                schema=self._loans.schema,
                bins=bins,
                fingerprint=question.fingerprint,
                weights=question.weights,
            )
            if question.reference:
                Reference.from_json(question.reference, self._loans.schema)  # refused before anything is kept
                write_public(self._folder.directory / "reference.json", question.reference.encode())
            save_model(model, self._folder.models_path / model.digest)
            self._folder.journal.write(
                "model_kept", job=question.job_id, model=model_digest(model.fingerprint, model.weights)
            )
            self._say(f"job {question.job_id}: model {model.digest[:12]} kept")
        self._ledger.release(question.job_id)
        job.close()
        self._folder.journal.write("job_ended", job=question.job_id, status=question.status)
        self.job_id = None
        return Done(question.job_id)

    def _has_model_of(self, job_id: str) -> bool:
        """Tell whether a model of this job is kept: a job has one."""
        for path in self._folder.models_path.glob("*/model.json"):
            if json.loads(path.read_text(encoding="utf-8"))["job"] == job_id:
                return True
        return False

    def _accepted_job(self, job_id: str, *, same_loans: bool = True) -> tuple[JobFolder, JobPlan]:
        job = self._folder.job(job_id)
        accepted = job.accepted()
        if accepted is None:
            msg = f"this lender did not accept job {job_id}; propose it first"
            raise PolicyRefusalError(msg)
        if same_loans and job.is_over():
            msg = f"job {job_id} is over at this lender; start a new job"
            raise PolicyRefusalError(msg)
        if same_loans and accepted["snapshot"] != self._loans.snapshot.digest:
            msg = (
                f"the loans changed since job {job_id} was accepted, and its budget is reserved for the earlier ones;"
                " restore the table and restart, or wait for the next job"
            )
            raise PolicyRefusalError(msg)
        return job, JobPlan.model_validate_json(accepted["plan"])

    def _model_of(self, question: Train | Finish, plan: JobPlan) -> tuple[Bins, Architecture]:
        """Rebuild the architecture from the lender's own schema; refuse what does not have its fingerprint."""
        schema = self._loans.schema
        try:
            bins = Bins.from_json(question.bins)
            arch = architecture_of(plan.model, schema, bins)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            msg = "the coordinator's bins do not fit this lender's schema; compare schema.yaml at both sides"
            raise SchemaMismatchError(msg) from error
        own = model_fingerprint(schema.fingerprint(), bins.fingerprint(), arch)
        require_same_fingerprint(own, question.fingerprint)
        check_size(num_parameters(arch), self._folder.config.policy)
        if question.weights.size != num_parameters(arch):
            msg = f"the coordinator sent {question.weights.size} weights for an architecture of {num_parameters(arch)}"
            raise SchemaMismatchError(msg)
        check_weights(question.weights)
        return bins, arch

    def _encode(self, bins: Bins, arch: Architecture) -> NDArray[np.float32]:
        key = f"{bins.fingerprint()} {arch.kind}"
        if self._encoded is None or self._encoded[0] != key:
            loans = encode(self._loans.train.frame, self._loans.schema, bins, encoding_of(arch.kind))
            self._encoded = (key, loans)
        return self._encoded[1]


def _parse_plan(text: str) -> JobPlan:
    try:
        return JobPlan.model_validate(json.loads(text))
    except ValueError as error:
        msg = "the proposed plan does not parse; both sides must run the same release of fedfin"
        raise LinkError(msg) from error


def _noise_of(plan: JobPlan) -> CalibratedNoise:
    return calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)


def _privacy(plan: JobPlan) -> str:
    if plan.privacy.mode == "none":
        return "no privacy"
    return f"epsilon {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}"

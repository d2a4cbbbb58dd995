"""How a lender answers a coordinator: propose, the stages of a job in clear or in secure sums, finish. No Flower here.

What is computed stands in `stages`; how it leaves by itself in `answers`, how in a sum that hides it in `masking`. Both
charge the ledger before a byte leaves.
"""

import datetime as dt
import json
import re
from collections.abc import Callable
from threading import Lock
from typing import Final

from fedfin.audit.consents import answer_of, sign_answer
from fedfin.audit.events import Budget, Evaluation, Failure, JobEnded, ModelKept, bounded, salted_digest
from fedfin.client.accepted import AcceptedJob, require_accepted
from fedfin.client.accepting import accept_job, check_proposal, parse_plan
from fedfin.client.answers import answer_once
from fedfin.client.evaluation import EVALUATION_FILE, evaluate, give_up
from fedfin.client.folder import LenderFolder
from fedfin.client.hours import require_hours, utc_now
from fedfin.client.job_approval import drop_held, require_approved
from fedfin.client.masking import Masking
from fedfin.client.pinning import own_row, show_roster
from fedfin.client.policy import check_plan, check_schema
from fedfin.client.preparation import PreparedLoans, prepare
from fedfin.client.refusing import reason_for, write_refusal
from fedfin.client.stages import Stages
from fedfin.client.sum_rules import refusal
from fedfin.client.witnessing import Witness
from fedfin.client.work import Question
from fedfin.credit.drift import Reference
from fedfin.credit.export import ReleasedModel, load_model, model_digest, save_model
from fedfin.errors import (
    ConfigError,
    DataError,
    FedfinError,
    LinkError,
    NotYetError,
    PolicyRefusalError,
    SchemaMismatchError,
    TrainingError,
)
from fedfin.files import write_public
from fedfin.plan import JobPlan
from fedfin.privacy.evaluation_noise import evaluation_job
from fedfin.update import (
    Accepted,
    AskHistogram,
    Confirm,
    Done,
    Evaluate,
    Finish,
    Mask,
    Message,
    Open,
    Propose,
    Refused,
    RosterSigned,
    ShareKeys,
    ShowRoster,
    Train,
    Unmask,
    decode,
    encode,
    with_witness,
)

__all__ = ["Lender"]

# a folder and a line of the log on any machine
_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,79}")
_ENDS: Final = ("completed", "abandoned")
_QUESTIONS: Final[tuple[type[Message], ...]] = (
    *(Propose, AskHistogram, Train, Evaluate, Finish),
    *(Open, ShareKeys, Mask, Confirm, Unmask, ShowRoster),
)


class Lender:
    """Answers questions in the name of one lender; one at a time: of two that come at once, one waits."""

    def __init__(
        self, folder: LenderFolder, say: Callable[[str], None], now: Callable[[], dt.datetime] = utc_now
    ) -> None:
        """Read the loans and open the ledger.

        Args:
            folder: The lender's.
            say: Prints a line for people.
            now: The clock that the policy's hours are held against; with its zone.

        Raises:
            ConfigError: bank.yaml, schema.yaml, a key or a source does not hold.
            DataError: The loans break the schema; `fedfin client check` shows all faults.
            LedgerError: The ledger cannot be opened.
        """
        self._folder = folder
        self._say = say
        self._now = now
        keys = folder.keys()
        self._own = own_row(folder.config.name, keys)
        self._identity = keys.identity
        self._witness = Witness(folder, keys)
        self._stages = Stages(folder, prepare(folder))
        self._ledger = folder.ledger()
        self._masking = Masking(folder, self._ledger, keys.identity, say, now)
        self._accepted: AcceptedJob | None = None
        self.job_id: str | None = None
        self._told: dict[str, str] = {}  # of each job, why it waits: the coordinator asks every few seconds
        self._lock = Lock()  # what one question is held against is what the one before it left

    @property
    def loans(self) -> PreparedLoans:
        """The loans as read at the start or at the last proposal."""
        return self._stages.loans

    def close(self) -> None:
        """Close the ledger and the log."""
        self._ledger.close()
        self._folder.journal.close()

    def answer(self, data: bytes) -> bytes:
        """Answer a question's bytes with an answer's bytes; a refusal is an answer.

        Raises:
            LinkError: The bytes are no question of this release.
            AuditError: What was done cannot be logged, and so nothing is answered.
        """
        question = decode(data, *_QUESTIONS)
        if not _JOB_ID.fullmatch(question.job_id):
            msg = f"the coordinator named a job {question.job_id[:80]!r}; a job's id is letters, digits and dashes"
            raise LinkError(msg)
        with self._lock:
            try:
                self._witness.check(question)
                # the same question with another checkpoint is the same question
                answer = self._answer(question, with_witness(data, ""))
            except FedfinError as error:
                answer = encode(self._refuse(question, error))
            self._folder.journal.flush()  # what is not logged does not leave
            return (
                self._witness.attach(answer, self._signature(question, answer))
                if question.witness
                else answer
            )

    def evaluate_pending(self) -> int:
        """Judge every model that was received and not yet judged; return how many."""
        judged = 0
        for path in sorted(self._folder.models_path.glob("*/model.json")):
            if (path.parent / EVALUATION_FILE).exists():
                continue
            self._say(f"judging model {path.parent.name[:12]} on {len(self.loans.holdout)} held-out loans")
            try:
                model = load_model(path.parent)
                accepted = self._folder.job(model.job_id).accepted() or {}
                same = accepted.get("snapshot") == self.loans.snapshot.digest
                result = evaluate(model, self.loans.train, self.loans.holdout, path.parent, same_loans=same)
            except (ConfigError, DataError, TrainingError) as error:
                # One model that cannot be judged must not keep the others from it, nor be tried for ever.
                give_up(path.parent, str(error))
                result = f"model {path.parent.name[:12]} cannot be judged: {error}"
                self._folder.journal.write(
                    Failure(stage=f"evaluation of {path.parent.name[:12]}", reason=bounded(str(error)))
                )
            else:
                kept = (path.parent / EVALUATION_FILE).read_bytes()
                self._folder.journal.write(
                    Evaluation(
                        job=model.job_id,
                        model=model_digest(model.fingerprint, model.weights),
                        cohort_size=1,
                        digest=salted_digest(self._folder.salt(), kept),
                    )
                )
            self._say(result)
            judged += 1
        return judged

    def _answer(self, question: Message, data: bytes) -> bytes:
        match question:
            case Propose():
                return encode(self._propose(question))
            case Finish():
                return encode(self._finish(question))
            case ShowRoster():
                signature = show_roster(self._folder, question.chain, self._own)
                return encode(RosterSigned(question.job_id, signature))
            case AskHistogram() | Train() | Evaluate():
                answer = self._in_clear(question, data)
            case Open() | ShareKeys() | Mask() | Confirm() | Unmask():
                answer = self._masking.answer(question, data, self._job(question.job_id), self._stages)
            case _:
                msg = f"{type(question).__name__} is no question"
                raise LinkError(msg)
        self.job_id = question.job_id
        return answer

    def _in_clear(self, question: Question, data: bytes) -> bytes:
        job = self._job(question.job_id)
        if job.roster is not None:
            raise refusal("aggregation", f"job {job.job_id} was accepted with aggregation secure")
        require_hours(self._folder.config.policy, self._now())
        work = self._stages.answer(question, job)
        return answer_once(data, job, work, self._ledger, self._folder.journal, self._say)

    def _refuse(self, question: Message, error: FedfinError) -> Refused:
        if isinstance(error, NotYetError):
            if self._told.get(question.job_id) != str(error):
                self._told[question.job_id] = str(error)
                write_refusal(self._folder.journal, question.job_id, type(question).__name__, error)
                self._say(f"job {question.job_id} waits: {error}")
            return Refused(question.job_id, reason_for(error), error.waits)
        write_refusal(self._folder.journal, question.job_id, type(question).__name__, error)
        self._say(f"refused {type(question).__name__} of job {question.job_id}: {error}")
        return Refused(question.job_id, reason_for(error))

    def _signature(self, question: Message, answer: bytes) -> str:
        """Return the identity key's signature over an answer of weight, hex, or nothing."""
        if not isinstance(question, Propose | Finish):
            return ""
        given = decode(answer, Accepted, Refused, Done)
        model = None
        if isinstance(question, Finish) and question.status == "completed":
            model = model_digest(question.fingerprint, question.weights)
        said = answer_of(self._folder.config.name, question, given, model=model)
        return "" if said is None else sign_answer(said, self._identity, self._witness.origin)

    def _propose(self, question: Propose) -> Accepted:
        plan = parse_plan(question.plan)
        if question.schema_fingerprint != self.loans.schema.fingerprint():
            msg = (
                "the coordinator's schema is not the one this lender enrolled with; compare schema.yaml at both sides,"
                " and replace the lender's copy only after its mapping in bank.yaml was checked"
            )
            raise SchemaMismatchError(msg)
        job = self._folder.job(question.job_id)
        accepted = job.accepted()
        if accepted is None:
            self._require_allowed(plan)
            num_members = check_proposal(question, plan, self._folder, self._own)
            approvers = require_approved(self._folder, question, plan, num_members)
            require_hours(self._folder.config.policy, self._now())
            self._stages = Stages(
                self._folder, prepare(self._folder)
            )  # a new job takes the table as it is now
            self._accepted = None
            accept_job(
                question,
                plan,
                num_members,
                self._folder,
                self._stages,
                self._ledger,
                self._say,
                approvers=approvers,
            )
            drop_held(self._folder, question.job_id)
            accepted = job.accepted() or {}
        elif job.is_over():
            msg = f"job {question.job_id} is over at this lender; start a new job"
            raise PolicyRefusalError(msg)
        elif accepted["plan_digest"] != plan.digest():
            msg = f"job {question.job_id} was accepted with another plan; a changed plan needs a new job"
            raise PolicyRefusalError(msg)
        elif plan.aggregation == "secure" and accepted.get("roster", "") != question.roster:
            what = f"job {question.job_id} was accepted with another; newcomers enter with the next job"
            raise refusal("roster_changed", what)
        self.job_id = question.job_id
        return Accepted(question.job_id, float(accepted["weight"]))

    def _job(self, job_id: str) -> AcceptedJob:
        """Return an open job of these loans; read once, since a secure round asks three times."""
        if self._accepted is None or self._accepted.job_id != job_id:
            accepted = require_accepted(self._folder, job_id, self.loans.snapshot.digest)
            self._require_allowed(accepted.plan)  # the policy as it is now, which may be narrower than it was
            self._accepted = accepted
        return self._accepted

    def _require_allowed(self, plan: JobPlan) -> None:
        policy = self._folder.config.policy
        check_plan(plan, policy)
        check_schema(plan, self.loans.schema, policy)

    def _finish(self, question: Finish) -> Done:
        job = self._folder.job(question.job_id)
        accepted = job.accepted()
        if accepted is None:
            drop_held(self._folder, question.job_id)
            return Done(question.job_id)
        if question.status not in _ENDS:
            msg = f"job {question.job_id} cannot end as {question.status[:80]!r}; both sides must run the same release"
            raise LinkError(msg)
        if question.status == "completed" and not self._has_model_of(question.job_id):
            plan = require_accepted(self._folder, question.job_id, None).plan
            if not 0 <= question.rounds <= plan.training.rounds:
                msg = f"a model of {question.rounds} rounds is not one of the plan's {plan.training.rounds}"
                raise PolicyRefusalError(msg)
            bins, _ = self._stages.model_of(question, plan)
            model = ReleasedModel(
                job_id=question.job_id,
                rounds=question.rounds,
                plan=plan.model_dump_json(),
                schema=self.loans.schema,
                bins=bins,
                fingerprint=question.fingerprint,
                weights=question.weights,
            )
            if question.reference:
                Reference.from_json(question.reference, self.loans.schema)  # refused before anything is kept
                write_public(self._folder.directory / "reference.json", question.reference.encode())
            save_model(model, self._folder.models_path / model.digest)
            self._folder.journal.note(
                ModelKept(job=question.job_id, model=model_digest(model.fingerprint, model.weights))
            )
            self._say(f"job {question.job_id}: model {model.digest[:12]} kept")
        self._ledger.release(question.job_id)
        self._ledger.release(evaluation_job(question.job_id))
        self._masking.end(question.job_id)
        self._accepted = None
        job.close()
        self._folder.journal.note(
            Budget(action="release", job=question.job_id, snapshot=accepted["snapshot"]),
            JobEnded(job=question.job_id, status=question.status),
        )
        self.job_id = None
        if question.status == "abandoned":
            self._say(
                f"job {question.job_id} is over without a model; what it had reserved of the budget and not spent is"
                " free again"
            )
        return Done(question.job_id)

    def _has_model_of(self, job_id: str) -> bool:
        """Tell whether a model of this job is kept: a job has one."""
        for path in self._folder.models_path.glob("*/model.json"):
            if json.loads(path.read_text(encoding="utf-8"))["job"] == job_id:
                return True
        return False

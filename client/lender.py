"""How a lender answers a coordinator: propose, the stages of a job in clear or in secure sums, finish. No Flower here.

What is computed stands in `stages`; how it leaves by itself in `answers`, how in a sum that hides it in `masking`. Both
charge the ledger before a byte leaves.
"""

import json
import re
from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from fedfin.client.accepted import AcceptedJob, require_accepted
from fedfin.client.answers import answer_once
from fedfin.client.evaluation import EVALUATION_FILE, evaluate, give_up
from fedfin.client.folder import LenderFolder
from fedfin.client.masking import RULES, Masking
from fedfin.client.pinning import accept_roster
from fedfin.client.policy import check_plan
from fedfin.client.preparation import PreparedLoans, prepare
from fedfin.client.refusing import reason_for, write_refusal
from fedfin.client.scoring import event_of_evaluation, reserve_evaluations
from fedfin.client.stages import Question, Stages
from fedfin.credit.drift import Reference
from fedfin.credit.export import ReleasedModel, load_model, model_digest, save_model
from fedfin.errors import (
    BudgetSpentError,
    ConfigError,
    DataError,
    FedfinError,
    LinkError,
    PolicyRefusalError,
    ProtocolRefusalError,
    SchemaMismatchError,
    TrainingError,
)
from fedfin.files import write_public
from fedfin.identity import public_pem
from fedfin.plan import JobPlan
from fedfin.privacy.evaluation_noise import evaluation_job
from fedfin.strategies.strategy import lender_weight
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
    ShareKeys,
    Train,
    Unmask,
    decode,
    encode,
)

__all__ = ["Lender"]

# a folder and a line of the log on any machine
_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,79}")
_QUESTIONS: Final[tuple[type[Message], ...]] = (
    *(Propose, AskHistogram, Train, Evaluate, Finish),
    *(Open, ShareKeys, Mask, Confirm, Unmask),
)


class Lender:
    """Answers questions in the name of one lender; one question at a time."""

    def __init__(self, folder: LenderFolder, say: Callable[[str], None]) -> None:
        """Read the loans and open the ledger.

        Raises:
            ConfigError: bank.yaml, schema.yaml, a key or a source does not hold.
            DataError: The loans break the schema; `fedfin client check` shows all faults.
            LedgerError: The ledger cannot be opened.
        """
        self._folder = folder
        self._say = say
        identity = folder.keys().identity
        self._own_key = public_pem(identity.public_key())
        self._stages = Stages(folder, prepare(folder))
        self._ledger = folder.ledger()
        self._masking = Masking(folder, self._ledger, identity, say)
        self._accepted: AcceptedJob | None = None
        self.job_id: str | None = None

    @property
    def loans(self) -> PreparedLoans:
        """The loans as read at the start or at the last proposal."""
        return self._stages.loans

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def answer(self, data: bytes) -> bytes:
        """Answer a question's bytes with an answer's bytes; a refusal is an answer.

        Raises:
            LinkError: The bytes are no question of this release.
        """
        question = decode(data, *_QUESTIONS)
        if not _JOB_ID.fullmatch(question.job_id):
            msg = f"the coordinator named a job {question.job_id[:80]!r}; a job's id is letters, digits and dashes"
            raise LinkError(msg)
        try:
            return self._answer(question, data)
        except FedfinError as error:
            return encode(self._refuse(question, error))

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
                self._folder.journal.write("evaluation_failed", model=path.parent.name, reason=str(error))
            else:
                self._folder.journal.write("model_evaluated", model=path.parent.name)
            self._say(result)
            judged += 1
        return judged

    def _answer(self, question: Message, data: bytes) -> bytes:
        match question:
            case Propose():
                return encode(self._propose(question))
            case Finish():
                return encode(self._finish(question))
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
            what = f"job {job.job_id} was accepted with aggregation secure; the rule is that {RULES['aggregation']}"
            raise ProtocolRefusalError("aggregation", what)
        work = self._stages.answer(question, job)
        return answer_once(data, job, work, self._ledger, self._folder.journal, self._say)

    def _refuse(self, question: Message, error: FedfinError) -> Refused:
        write_refusal(self._folder.journal, question.job_id, type(question).__name__, error)
        self._say(f"refused {type(question).__name__} of job {question.job_id}: {error}")
        return Refused(question.job_id, reason_for(error))

    def _propose(self, question: Propose) -> Accepted:
        plan = _parse_plan(question.plan)
        if question.schema_fingerprint != self.loans.schema.fingerprint():
            msg = (
                "the coordinator's schema is not the one this lender enrolled with; compare schema.yaml at both sides,"
                " and replace the lender's copy only after its mapping in bank.yaml was checked"
            )
            raise SchemaMismatchError(msg)
        job = self._folder.job(question.job_id)
        accepted = job.accepted()
        if accepted is None:
            self._accept(question, plan)
            accepted = job.accepted() or {}
        elif job.is_over():
            msg = f"job {question.job_id} is over at this lender; start a new job"
            raise PolicyRefusalError(msg)
        elif accepted["plan_digest"] != plan.digest():
            msg = f"job {question.job_id} was accepted with another plan; a changed plan needs a new job"
            raise PolicyRefusalError(msg)
        elif accepted.get("roster", "") != question.roster:
            what = (
                f"job {question.job_id} was accepted with another roster; newcomers enter with the next job"
            )
            raise ProtocolRefusalError("roster_changed", what)
        self.job_id = question.job_id
        return Accepted(question.job_id, float(accepted["weight"]))

    def _accept(self, question: Propose, plan: JobPlan) -> None:
        """Take a new job: within the policy, with its whole cost reserved, durably."""
        policy, job_id = self._folder.config.policy, question.job_id
        check_plan(plan, policy)
        num_members = self._members_of(question, plan)
        self._stages = Stages(self._folder, prepare(self._folder))  # a new job takes the table as it is now
        self._accepted = None
        snapshot = self.loans.snapshot
        # in a secure sum the weight leaves in no message, but in the sum
        weight = 0.0
        if plan.aggregation == "plain":
            weight = lender_weight(len(self.loans.train), plan.training)
        if plan.privacy.mode != "none":
            if plan.evaluation.times:
                # where it has no noise, the job is refused before anything of it is reserved
                event_of_evaluation(plan, self.loans.schema, num_members)
            self._ledger.reserve(
                job_id,
                snapshot,
                self._stages.costs(plan, num_members).whole,
                delta=plan.privacy.delta,
                epsilon_limit=policy.epsilon_limit,
                max_delta=policy.max_delta,
            )
        # After the reservation: killed in between, the same proposal reserves the same thing again.
        self._folder.job(job_id).accept(
            job=job_id,
            plan=question.plan,
            plan_digest=plan.digest(),
            snapshot=snapshot.digest,
            counted=self._reserve_evaluations(job_id, plan, num_members),
            roster=question.roster,
            weight=weight,
        )
        self._folder.journal.write(
            "job_accepted",
            job=job_id,
            plan=plan.digest(),
            aggregation=plan.aggregation,
            mode=plan.privacy.mode,
            epsilon=None if plan.privacy.mode == "none" else plan.privacy.epsilon,
            weight=weight,
            snapshot=snapshot.digest,
        )
        self._say(
            f"accepted job {job_id} ({plan.model.kind}, {plan.training.rounds} rounds, {_privacy(plan)})"
        )

    def _members_of(self, question: Propose, plan: JobPlan) -> int:
        """Return the roster's size, of a roster that this lender goes by; 0 for plain aggregation."""
        if plan.aggregation == "plain":
            if question.roster:
                msg = "a job of aggregation plain came with a roster; both sides must run the same release"
                raise LinkError(msg)
            return 0
        roster = accept_roster(self._folder, question.roster, self._own_key)
        if len(roster.keys) < plan.cohort.min_lenders:
            msg = (
                f"the roster has {len(roster.keys)} members, and cohort.min_lenders is {plan.cohort.min_lenders}; wait"
                " for more to join"
            )
            raise PolicyRefusalError(msg)
        return len(roster.keys)

    def _reserve_evaluations(self, job_id: str, plan: JobPlan, num_members: int) -> str:
        """Reserve the job's evaluations; return the digest of the loans they count, or "" where there are none.

        A lender that cannot evaluate trains all the same.
        """
        if not plan.evaluation.times:
            return ""
        policy = self._folder.config.policy
        try:
            counted = reserve_evaluations(self._ledger, job_id, plan, self.loans, policy, num_members)
        except (BudgetSpentError, DataError) as error:
            self._folder.journal.write("evaluations_declined", job=job_id, reason=str(error))
            self._say(f"job {job_id}: this lender trains, and takes no part in the evaluations: {error}")
            return ""
        return counted.snapshot.digest

    def _job(self, job_id: str) -> AcceptedJob:
        """Return an open job of these loans; read once, since a secure round asks three times."""
        if self._accepted is None or self._accepted.job_id != job_id:
            self._accepted = require_accepted(self._folder, job_id, self.loans.snapshot.digest)
        return self._accepted

    def _finish(self, question: Finish) -> Done:
        job = self._folder.job(question.job_id)
        if job.accepted() is None:
            return Done(question.job_id)
        if question.status == "completed" and not self._has_model_of(question.job_id):
            plan = require_accepted(self._folder, question.job_id, None).plan
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
            self._folder.journal.write(
                "model_kept", job=question.job_id, model=model_digest(model.fingerprint, model.weights)
            )
            self._say(f"job {question.job_id}: model {model.digest[:12]} kept")
        self._ledger.release(question.job_id)
        self._ledger.release(evaluation_job(question.job_id))
        self._masking.end(question.job_id)
        self._accepted = None
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


def _parse_plan(text: str) -> JobPlan:
    try:
        return JobPlan.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        msg = f"the proposed plan does not hold: {what}. Both sides must run the same release of fedfin"
        raise LinkError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = "the proposed plan does not parse; both sides must run the same release of fedfin"
        raise LinkError(msg) from error


def _privacy(plan: JobPlan) -> str:
    if plan.privacy.mode == "none":
        return "no privacy"
    return f"epsilon {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}"

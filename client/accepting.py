"""How a lender accepts a job: within its policy, with a roster it goes by, and with the whole cost reserved."""

import json
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from fedfin.audit.events import Approval, Budget, Consent, Event, PlanProposed, bounded, real
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import accept_chain
from fedfin.client.policy import check_colluders
from fedfin.client.scoring import event_of_evaluation, reserve_evaluations
from fedfin.client.stages import Stages
from fedfin.errors import BudgetSpentError, DataError, LinkError, PolicyRefusalError
from fedfin.plan import JobPlan
from fedfin.privacy.ledger import Ledger
from fedfin.roster_chain import RosterChain
from fedfin.roster_versions import RosterMember
from fedfin.strategies.strategy import lender_weight
from fedfin.update import Propose

__all__ = ["accept_job", "check_proposal", "parse_plan"]


def parse_plan(text: str) -> JobPlan:
    """Return the plan of a proposal.

    Raises:
        LinkError: The text does not parse, or the plan contradicts itself; says how.
    """
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


def check_proposal(question: Propose, plan: JobPlan, folder: LenderFolder, own: RosterMember) -> int:
    """Hold a new job against the policy and the pinned roster; return the roster's members, 0 for plain aggregation.

    Args:
        question: The proposal.
        plan: Its plan.
        folder: The lender's.
        own: This lender's row in the roster, with the keys that it holds.

    Raises:
        PolicyRefusalError: The policy does not allow the plan, or the roster is smaller than its quorum.
        ProtocolRefusalError: This lender does not go by the roster; see `accept_chain`.
        LinkError: The roster does not parse.
    """
    if plan.aggregation == "plain":
        if question.roster:  # nothing in clear rests on it; it is held to all the same, and pinned
            accept_chain(folder, question.roster, own)
        return 0
    # before the roster is pinned: a proposal that came too early must not bind this lender to a roster of few
    num_members = len(RosterChain.from_json(question.roster).last.members)
    if num_members < plan.cohort.min_lenders:
        msg = (
            f"the roster has {num_members} members, and cohort.min_lenders is {plan.cohort.min_lenders}; wait for more"
            " to join"
        )
        raise PolicyRefusalError(msg)
    check_colluders(plan, num_members, folder.config.policy)
    accept_chain(folder, question.roster, own)
    return num_members


def accept_job(
    question: Propose,
    plan: JobPlan,
    num_members: int,
    folder: LenderFolder,
    stages: Stages,
    ledger: Ledger,
    say: Callable[[str], None],
    *,
    approvers: Sequence[str] = (),
) -> None:
    """Reserve a new job's whole cost and keep what was agreed to, durably.

    Args:
        question: The proposal, checked.
        plan: Its plan.
        num_members: Members of its roster.
        folder: The lender's.
        stages: Of the loans as they are now.
        ledger: The lender's.
        say: Prints a line for people.
        approvers: Fingerprints of the keys that approved it, where the policy asks for that.

    Raises:
        BudgetSpentError: The training loans' budget does not allow the job.
        PrivacyParameterError: No noise meets the plan.
        LedgerError: Nothing can be recorded.
        ConfigError: What was agreed to cannot be kept.
    """
    policy, loans, job_id = folder.config.policy, stages.loans, question.job_id
    # in a secure sum the weight leaves in no message, but in the sum
    weight = lender_weight(len(loans.train), plan.training) if plan.aggregation == "plain" else 0.0
    if plan.privacy.mode != "none":
        if plan.evaluation.times:
            # where it has no noise, the job is refused before anything of it is reserved
            event_of_evaluation(plan, loans.schema, num_members)
        ledger.reserve(
            job_id,
            loans.snapshot,
            stages.costs(plan, num_members).whole,
            delta=plan.privacy.delta,
            epsilon_limit=policy.epsilon_limit,
            max_delta=policy.max_delta,
        )
    counted = _reserve_evaluations(job_id, plan, num_members, folder, stages, ledger, say)
    folder.journal.write(*_entries(question, plan, folder, loans.snapshot.digest, approvers))
    # After the reservation: killed in between, the same proposal reserves the same thing again.
    folder.job(job_id).accept(
        job=job_id,
        plan=question.plan,
        plan_digest=plan.digest(),
        snapshot=loans.snapshot.digest,
        counted=counted,
        roster=question.roster,
        weight=weight,
        approvers=" ".join(approvers),
    )
    say(f"accepted job {job_id} ({plan.model.kind}, {plan.training.rounds} rounds, {_privacy(plan)})")


def _entries(
    question: Propose, plan: JobPlan, folder: LenderFolder, snapshot: str, approvers: Sequence[str]
) -> tuple[Event, ...]:
    """Return what the log says of an accepted job: the plan, who approved it, what is reserved, the consent."""
    job_id, digest, private = question.job_id, plan.digest(), plan.privacy.mode != "none"
    epsilon, delta = (real(plan.privacy.epsilon), real(plan.privacy.delta)) if private else (None, None)
    reserved = Budget(
        action="reserve",
        job=job_id,
        snapshot=snapshot,
        epsilon=epsilon,
        delta=delta,
        relation="add_or_remove_one",
    )
    return (
        PlanProposed(
            job=job_id,
            digest=digest,
            model=plan.model.kind,
            strategy=plan.training.strategy,
            aggregation=plan.aggregation,
            mode=plan.privacy.mode,
            epsilon=epsilon,
            delta=delta,
            rounds=plan.training.rounds,
            least_cohort=plan.cohort.min_lenders,
        ),
        *(Approval(subject="job", job=job_id, digest=digest, approver=approver) for approver in approvers),
        *([reserved] if private else []),
        Consent(job=job_id, member=folder.config.name, plan=digest, decision="accepted"),
    )


def _reserve_evaluations(
    job_id: str,
    plan: JobPlan,
    num_members: int,
    folder: LenderFolder,
    stages: Stages,
    ledger: Ledger,
    say: Callable[[str], None],
) -> str:
    """Reserve the job's evaluations; return the digest of the loans they count, or "" where there are none.

    A lender that cannot evaluate trains all the same.
    """
    if not plan.evaluation.times:
        return ""
    try:
        counted = reserve_evaluations(ledger, job_id, plan, stages.loans, folder.config.policy, num_members)
    except (BudgetSpentError, DataError, PolicyRefusalError) as error:
        folder.journal.note(
            Consent(
                job=job_id,
                member=folder.config.name,
                plan=plan.digest(),
                decision="evaluations declined",
                reason=bounded(str(error)),
            )
        )
        say(f"job {job_id}: this lender trains, and takes no part in the evaluations: {error}")
        return ""
    return counted.snapshot.digest


def _privacy(plan: JobPlan) -> str:
    if plan.privacy.mode == "none":
        return "no privacy"
    return f"epsilon {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}"

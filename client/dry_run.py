"""`fedfin client dry-run`: everything that a job would ask of this lender, before it is asked; nothing is reserved.

What the job costs is found by the very code that accepts jobs, on a copy of the ledger that is thrown away: so what is
said here is what a proposal of the same plan would meet.
"""

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from fedfin.client.budgeting import Epsilon, budget_to_json, epsilon_of
from fedfin.client.costs import Costs, costs_of
from fedfin.client.departures import Departure, departures_of
from fedfin.client.folder import LenderFolder
from fedfin.client.policy import Breach, breaches, colluder_breaches, schema_breaches
from fedfin.client.preparation import PreparedLoans, prepare
from fedfin.client.scoring import event_of_evaluation, reserve_evaluations
from fedfin.client.spending import open_ledger
from fedfin.config import LenderPolicy
from fedfin.credit.drift import num_cells
from fedfin.credit.models import largest_model
from fedfin.credit.schema import Schema
from fedfin.errors import BudgetSpentError, DataError, PolicyRefusalError, PrivacyParameterError
from fedfin.plan import JobPlan
from fedfin.privacy.ledger import Budget, Ledger
from fedfin.privacy.snapshot import Snapshot
from fedfin.strategies.strategy import lender_weight

__all__ = ["AskedColumn", "DryRun", "Spend", "dry_run", "to_json"]

_JOB: Final = "dry-run"


@dataclass(frozen=True, slots=True)
class AskedColumn:
    """One column that the job reads.

    Attributes:
        name: The federation's name.
        local: This lender's.
        is_feature: Whether the model sees it; a protected attribute that is none serves the evaluations only.
        protected: Whether the schema marks it as protected.
        why_feature: The schema's reason, where a protected attribute is a feature.
        cells: Cells of its histogram; 0 where it is no feature.
    """

    name: str
    local: str
    is_feature: bool
    protected: bool
    why_feature: str | None
    cells: int


@dataclass(frozen=True, slots=True)
class Spend:
    """What would be reserved of one snapshot's loans.

    Attributes:
        snapshot: Digest of the loans.
        num_loans: How many they are.
        job: Epsilon of the job's own releases at the job's delta.
        after: Epsilon of all that was spent or is reserved, this job included, at the policy's `max_delta`.
        budget: How the limit stands after the reservation; as it is now where the job does not fit.
        refusal: Why it cannot be reserved; None where it can.
    """

    snapshot: str
    num_loans: int
    job: Epsilon
    after: Epsilon
    budget: Budget | None
    refusal: str | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """All that a job would ask.

    Attributes:
        plan: The job's plan.
        num_members: Members of the roster that the figures are for; for plain aggregation lenders of the cohort.
        columns: What is read.
        departures: What leaves.
        parameters: Parameters of the model, at most.
        told_weight: The weight that plain aggregation tells the coordinator; None in a secure sum.
        training: What is reserved of the training loans; None without privacy, or where nothing can be.
        held_out: The same of the held-out loans; None where the job has no evaluations, or this lender declines them.
        declines: Why this lender would train and take no part in the evaluations; None where it takes part.
        refusals: Every rule that would refuse the job, by its key; none where it would be accepted.
    """

    plan: JobPlan
    num_members: int
    columns: tuple[AskedColumn, ...]
    departures: tuple[Departure, ...]
    parameters: int
    told_weight: float | None
    training: Spend | None
    held_out: Spend | None
    declines: str | None
    refusals: tuple[Breach, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all vectors of the job, at most."""
        return sum(departure.times * departure.bytes for departure in self.departures)


def dry_run(plan: JobPlan, folder: LenderFolder, num_members: int) -> DryRun:
    """Return what a job would ask of a lender; nothing is made, reserved, logged or sent.

    Args:
        plan: The job's.
        folder: The lender's.
        num_members: Members of the roster that it would be proposed with, or so many lenders in clear; >= 1. Hours and
            approvals are not looked at here.

    Raises:
        ConfigError: A file of the folder does not hold.
        DataError: The loans could not take part.
        LedgerError: The ledger cannot be read.
    """
    loans, policy = prepare(folder, looking=True), folder.config.policy
    schema, members = loans.schema, max(num_members, plan.cohort.min_lenders)
    found = [*breaches(plan, policy), *schema_breaches(plan, schema, policy)]
    found += colluder_breaches(plan, members, policy)
    costs: Costs | None = None
    training: Spend | None = None
    held_out: Spend | None = None
    declines: str | None = None
    try:
        if plan.privacy.mode != "none":
            costs = costs_of(plan, schema, members)
            if plan.evaluation.times:
                event_of_evaluation(plan, schema, members)
    except PrivacyParameterError as error:
        found.append(Breach("privacy", str(error)))
    else:
        with _copy_of_ledger(folder) as ledger:
            if costs is not None:
                training = _reserve(ledger, loans, plan, costs, policy)
                if training.refusal is not None:
                    found.append(Breach("epsilon_limit", training.refusal))
            if training is None or training.refusal is None:
                held_out, declines = _reserve_held_out(ledger, loans, plan, members, policy)
    weight = lender_weight(len(loans.train), plan.training) if plan.aggregation == "plain" else None
    return DryRun(
        plan=plan,
        num_members=members,
        columns=tuple(_columns(plan, schema, folder)),
        departures=tuple(departures_of(plan, schema, members, costs, evaluates=declines is None)),
        parameters=largest_model(plan.model, schema),
        told_weight=weight,
        training=training,
        held_out=held_out,
        declines=declines,
        refusals=tuple(found),
    )


def to_json(run: DryRun) -> dict[str, Any]:
    """Return the document of `fedfin client dry-run --json`."""
    return {
        "plan": run.plan.model_dump(mode="json"),
        "plan_digest": run.plan.digest(),
        "members": run.num_members,
        "columns": [asdict(column) for column in run.columns],
        "departures": [asdict(departure) for departure in run.departures],
        "bytes": run.bytes,
        "parameters": run.parameters,
        "told_weight": run.told_weight,
        "training": None if run.training is None else _spend_to_json(run.training),
        "held_out": None if run.held_out is None else _spend_to_json(run.held_out),
        "declines": run.declines,
        "refusals": [asdict(breach) for breach in run.refusals],
    }


@contextmanager
def _copy_of_ledger(folder: LenderFolder) -> Generator[Ledger]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.db"
        with open_ledger(folder) as ledger:  # refuses one that lacks an accepted job
            if ledger is not None:
                with (
                    closing(sqlite3.connect(f"{folder.ledger_path.as_uri()}?mode=ro", uri=True)) as original,
                    closing(sqlite3.connect(path)) as copy,
                ):
                    original.backup(copy)
                path.chmod(0o600)
        with Ledger(path) as copied:
            yield copied


def _reserve(
    ledger: Ledger, loans: PreparedLoans, plan: JobPlan, costs: Costs, policy: LenderPolicy
) -> Spend:
    refusal = None
    try:
        ledger.reserve(
            _JOB,
            loans.snapshot,
            costs.whole,
            delta=plan.privacy.delta,
            epsilon_limit=policy.epsilon_limit,
            max_delta=policy.max_delta,
        )
    except BudgetSpentError as error:
        refusal = str(error)
    job = epsilon_of(costs.whole, plan.privacy.delta)
    return _spend(ledger, loans.snapshot, len(loans.train), job, policy, refusal)


def _reserve_held_out(
    ledger: Ledger, loans: PreparedLoans, plan: JobPlan, num_members: int, policy: LenderPolicy
) -> tuple[Spend | None, str | None]:
    """Return what the evaluations would reserve, and why this lender would decline them: at most one of the two."""
    if not plan.evaluation.times:
        return None, None
    try:
        counted = reserve_evaluations(ledger, _JOB, plan, loans, policy, num_members)
    except (BudgetSpentError, DataError, PolicyRefusalError) as error:
        return None, str(error)
    if plan.privacy.mode == "none":
        return None, None
    event = replace(event_of_evaluation(plan, loans.schema, num_members), count=plan.evaluation.times)
    job = epsilon_of([event], plan.privacy.delta)
    return _spend(ledger, counted.snapshot, len(counted.loans), job, policy, None), None


def _spend(
    ledger: Ledger,
    snapshot: Snapshot,
    num_loans: int,
    job: Epsilon,
    policy: LenderPolicy,
    refusal: str | None,
) -> Spend:
    try:
        budget = ledger.budget(snapshot, epsilon_limit=policy.epsilon_limit, max_delta=policy.max_delta)
    except BudgetSpentError:
        budget = None
    held = ledger.held(snapshot, policy.max_delta)
    after = Epsilon(held.epsilon_rdp, held.epsilon_pld)
    return Spend(snapshot.digest, num_loans, job, after, budget, refusal)


def _columns(plan: JobPlan, schema: Schema, folder: LenderFolder) -> Iterator[AskedColumn]:
    local = folder.config.data.columns
    for column in schema.columns:
        if column.is_feature or (column.protected and plan.evaluation.times):
            yield AskedColumn(
                name=column.name,
                local=local.get(column.name, column.name),
                is_feature=column.is_feature,
                protected=column.protected,
                why_feature=column.protected_as_feature,
                cells=num_cells(column) if column.is_feature else 0,
            )


def _spend_to_json(spend: Spend) -> dict[str, Any]:
    return {
        "snapshot": spend.snapshot,
        "num_loans": spend.num_loans,
        "relation": "add_or_remove_one",
        "job": asdict(spend.job),
        "after": asdict(spend.after),
        "budget": None if spend.budget is None else budget_to_json(spend.budget),
        "refusal": spend.refusal,
    }

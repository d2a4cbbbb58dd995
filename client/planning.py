"""`fedfin privacy plan`: what a job would cost this lender and its model, answered before anything is spent."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from fedfin.client.budgeting import Epsilon, JobCost, Standing, budget_to_json, cost_of, refusals, standing
from fedfin.client.folder import LenderFolder
from fedfin.client.forecast import Baseline, Forecast, baseline_of, forecast, num_seeds
from fedfin.client.preparation import prepare
from fedfin.client.spending import open_ledger
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import CalibratedNoise, calibrate, epsilon_pld, epsilon_rdp, job_events

__all__ = [
    "SWEEP",
    "Answer",
    "Setting",
    "View",
    "answer_for_anyone",
    "answer_for_lender",
    "num_trainings",
    "to_json",
]

SWEEP: Final = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
"""Epsilons that --sweep compares."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The same plan at another epsilon."""

    epsilon: float
    noise: CalibratedNoise
    job: Epsilon
    forecast: Forecast | None


@dataclass(frozen=True, slots=True)
class View:
    """What a lender's own folder adds to the arithmetic.

    Attributes:
        name: The lender.
        num_train: Its training loans.
        num_holdout: Its held-out loans.
        num_bad_holdout: The bad ones among them.
        standing: Its budget now and after the job.
        refusals: Why it would refuse the job; empty where it would accept.
        baseline: The model without noise; None where no AUROC was wanted.
        forecast: What the noise costs; None with `baseline`.
    """

    name: str
    num_train: int
    num_holdout: int
    num_bad_holdout: int
    standing: Standing
    refusals: tuple[str, ...]
    baseline: Baseline | None
    forecast: Forecast | None


@dataclass(frozen=True, slots=True)
class Answer:
    """All that the command says; `view` is None without a lender's folder, `sweep` is empty where not wanted."""

    plan: JobPlan
    cost: JobCost
    view: View | None
    sweep: tuple[Setting, ...]


def num_trainings(plan: JobPlan, *, with_sweep: bool) -> int:
    """Return how often `done` is called by `answer_for_lender` with an AUROC."""
    return 2 + 2 * num_seeds(plan) * (1 + (len(SWEEP) if with_sweep else 0))


def answer_for_anyone(plan: JobPlan, *, with_sweep: bool) -> Answer:
    """Return what a job costs any lender: arithmetic alone.

    Raises:
        PrivacyParameterError: The plan's mode is not local, or no noise meets its epsilon.
    """
    sweep = tuple(_setting(plan, epsilon) for epsilon in SWEEP) if with_sweep else ()
    return Answer(plan, cost_of(plan), None, sweep)


def answer_for_lender(
    plan: JobPlan,
    folder: LenderFolder,
    *,
    num_lenders: int,
    with_auroc: bool,
    with_sweep: bool,
    done: Callable[[], None],
) -> Answer:
    """Return what a job costs one lender; nothing is made, recorded or sent.

    Args:
        plan: The job.
        folder: The lender's.
        num_lenders: Lenders like this one in the estimate for a federation; >= 1.
        with_auroc: Train on the lender's loans for the expected AUROC.
        with_sweep: The same for every epsilon of `SWEEP`.
        done: Called after each training.

    Raises:
        ConfigError: A file of the folder does not hold.
        DataError: The loans could not take part.
        LedgerError: The ledger cannot be read.
        PrivacyParameterError: As `answer_for_anyone`.
        TrainingError: Training diverged.
    """
    cost = cost_of(plan)
    loans = prepare(folder, looking=True)
    policy = folder.config.policy
    with open_ledger(folder) as ledger:
        budget = standing(ledger, loans.snapshot, cost, policy)
    baseline = baseline_of(loans, plan, done) if with_auroc else None

    def forecast_at(setting_plan: JobPlan, noise: CalibratedNoise) -> Forecast | None:
        if baseline is None:
            return None
        return forecast(loans, setting_plan, noise, baseline, num_lenders=num_lenders, done=done)

    view = View(
        name=folder.config.name,
        num_train=len(loans.train),
        num_holdout=len(loans.holdout),
        num_bad_holdout=int(loans.holdout.labels.sum()),
        standing=budget,
        refusals=refusals(plan, policy, budget, loans.schema),
        baseline=baseline,
        forecast=forecast_at(plan, cost.noise),
    )
    sweep = tuple(_setting(plan, epsilon, forecast_at) for epsilon in SWEEP) if with_sweep else ()
    return Answer(plan, cost, view, sweep)


def to_json(answer: Answer) -> dict[str, Any]:
    """Return the document of `fedfin privacy plan --json`."""
    plan, cost, view = answer.plan, answer.cost, answer.view
    return {
        "plan": plan.model_dump(mode="json", include={"model", "training", "privacy"}),
        "relation": "add_or_remove_one",
        "delta": plan.privacy.delta,
        "noise": {**asdict(cost.noise), "num_steps": cost.num_steps},
        "epsilon": {
            "job": asdict(cost.job),
            "bins": asdict(cost.bins),
            "round_alone": asdict(cost.round_alone),
            "round_average": asdict(cost.round_average),
            "round_last": asdict(cost.round_last),
        },
        "borrower_pld": list(cost.borrower),
        "lender": None if view is None else _view_to_json(view, num_seeds(plan)),
        "sweep": [_setting_to_json(setting) for setting in answer.sweep],
    }


def _setting(
    plan: JobPlan,
    epsilon: float,
    forecast_at: Callable[[JobPlan, CalibratedNoise], Forecast | None] = lambda _plan, _noise: None,
) -> Setting:
    privacy = plan.privacy.model_copy(update={"epsilon": epsilon})
    changed = plan.model_copy(update={"privacy": privacy})
    rate, num_steps = plan.training.sample_rate, plan.num_steps
    noise = calibrate(privacy, sample_rate=rate, num_steps=num_steps)
    events = job_events(noise, rate, num_steps)
    job = Epsilon(epsilon_rdp(events, privacy.delta), epsilon_pld(events, privacy.delta))
    return Setting(epsilon, noise, job, forecast_at(changed, noise))


def _view_to_json(view: View, seeds: int) -> dict[str, Any]:
    now = view.standing
    baseline = view.baseline
    return {
        "name": view.name,
        "num_train": view.num_train,
        "num_holdout": view.num_holdout,
        "num_bad_holdout": view.num_bad_holdout,
        "would_accept": not view.refusals,
        "refusals": list(view.refusals),
        "budget": {
            "snapshot": now.snapshot,
            "delta": now.delta,
            "is_known": now.is_known,
            "spent": asdict(now.spent),
            "reserved": asdict(now.reserved),
            "after": asdict(now.after),
            "filter": None if now.budget is None else budget_to_json(now.budget),
        },
        "auc": None
        if baseline is None
        else {
            "noise": "simulated",
            "num_seeds": seeds,
            "plain": baseline.auroc,
            "clipped": baseline.clipped_auroc,
            "forecast": None if view.forecast is None else asdict(view.forecast),
        },
    }


def _setting_to_json(setting: Setting) -> dict[str, Any]:
    return {
        "epsilon": setting.epsilon,
        "noise": asdict(setting.noise),
        "job": asdict(setting.job),
        "forecast": None if setting.forecast is None else asdict(setting.forecast),
    }

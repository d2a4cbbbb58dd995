"""`fedfin privacy plan`: what a job would cost, before anything is spent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedfin.cli_output import (
    DebugOption,
    JsonOption,
    ProgressBar,
    console,
    guarded,
    print_json,
    print_table,
    say,
)
from fedfin.cli_privacy_job import EpsilonOption, JobOption, ModelOption, RoundsOption, chosen_plan
from fedfin.cli_privacy_ledger import RELATION, epsilon_row, show_bar

if TYPE_CHECKING:
    from fedfin.client.planning import Answer, Setting, View
    from fedfin.credit.metrics import Interval

__all__ = ["EPILOG", "plan"]

EPILOG: Final = "Example:  fedfin privacy plan --config north-bank/bank.yaml --epsilon 3 --rounds 20"


def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The lender's bank.yaml; without it only the arithmetic.", show_default=False
        ),
    ] = None,
    job: JobOption = None,
    epsilon: EpsilonOption = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Delta of the whole job; default: the plan's.")
    ] = None,
    rounds: RoundsOption = None,
    local_steps: Annotated[
        int | None, typer.Option("--local-steps", help="A lender's steps in a round; default: the plan's.")
    ] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option("--sample-rate", help="Chance of a loan to be in a step's batch; default: the plan's."),
    ] = None,
    model: ModelOption = None,
    lenders: Annotated[
        int | None,
        typer.Option(
            "--lenders",
            help="Lenders like this one in the estimate for a federation; default: the job's, or 5.",
            min=1,
        ),
    ] = None,
    no_auc: Annotated[bool, typer.Option("--no-auc", help="Train nothing: no expected AUROC.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also compare epsilon 0.5, 1, 2, 3, 5 and 8.")
    ] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a job would cost before anything is spent; exit 1 if this lender would refuse it.

    Nothing is recorded and nothing leaves the lender.
    """

    def work() -> None:
        from fedfin.client.folder import LenderFolder
        from fedfin.client.planning import answer_for_anyone, answer_for_lender, num_trainings, to_json

        changes = {
            "privacy.epsilon": epsilon,
            "privacy.delta": delta,
            "training.rounds": rounds,
            "training.local_steps": local_steps,
            "training.sample_rate": sample_rate,
            "model.kind": model,
        }
        job_plan, num_lenders = chosen_plan(job, config, changes, lenders)
        if config is None:
            answer = answer_for_anyone(job_plan, with_sweep=sweep)
        else:
            folder = LenderFolder(config)
            with ProgressBar(
                "training on your own loans, with simulated noise (--no-auc leaves it out)",
                quiet=json_out or no_auc,
                total=num_trainings(job_plan, with_sweep=sweep),
            ) as bar:
                answer = answer_for_lender(
                    job_plan,
                    folder,
                    num_lenders=num_lenders,
                    with_auroc=not no_auc,
                    with_sweep=sweep,
                    done=bar.advance,
                )
        if json_out:
            print_json(to_json(answer))
        else:
            _show_plan(answer)
        if answer.view is not None and answer.view.refusals:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


def _show_plan(answer: "Answer") -> None:
    job, cost = answer.plan, answer.cost
    training, privacy = job.training, job.privacy
    say(
        f"{job.model.kind}, {training.rounds} rounds of {training.local_steps} steps, sample rate"
        f" {training.sample_rate:g}: epsilon {privacy.epsilon:g} at delta {privacy.delta:g}",
        style="bold",
    )
    say(
        f"noise multiplier {cost.noise.training_noise_multiplier:.4g} of each of the {cost.num_steps} steps,"
        f" {cost.noise.bins_noise_multiplier:.4g} of the histograms for the bins"
    )
    console.print()
    rows = [
        ("the whole job", cost.job),
        ("the bins, if nothing else left", cost.bins),
        ("one round, if nothing else left", cost.round_alone),
        ("a round's average share: (job - bins) / rounds", cost.round_average),
        ("what the last round adds", cost.round_last),
    ]
    print_table(
        f"epsilon at delta {privacy.delta:g}, {RELATION}",
        ["", "RDP", "PLD"],
        [epsilon_row(name, epsilon) for name, epsilon in rows],
    )
    say("Plans are calibrated so that RDP meets the epsilon they state; PLD is the tighter figure.")
    one, two, three = cost.borrower
    say(f"A borrower known to 1, 2 or 3 lenders that all take part: {one:.3f}, {two:.3f}, {three:.3f} (PLD).")
    if answer.view is not None:
        console.print()
        _show_view(answer.view)
    if answer.sweep:
        console.print()
        _show_sweep(answer.sweep)
    if answer.view is not None:
        console.print()
        for reason in answer.view.refusals:
            say(f"{answer.view.name} would refuse this job: {reason}", style="bold red")
        if not answer.view.refusals:
            say(f"{answer.view.name} would accept this job", style="bold green")


def _show_view(view: "View") -> None:
    now = view.standing
    new = "" if now.is_known else ", no job on exactly these loans yet"
    say(f"budget of your {view.num_train} training loans, snapshot {now.snapshot[:12]}{new}", style="bold")
    if not now.is_known and max(now.spent.rdp, now.reserved.rdp) > 0.0:
        others = () if now.budget is None else now.budget.others
        names = f": {', '.join(name[:12] for name in others)}" if others else ""
        say(
            f"All that is spent or reserved is inherited from earlier snapshots that hold some of them{names}."
        )
    if now.budget is not None:
        budget = now.budget
        show_bar(
            [
                ("spent", budget.share(budget.spent), "red"),
                ("reserved", budget.share(budget.reserved), "yellow"),
                ("this job", budget.share(budget.asked), "blue"),
            ],
            budget,
            now.spent,
        )
    print_table(
        f"epsilon at your policy's delta {now.delta:g}, {RELATION}",
        ["", "RDP", "PLD"],
        [
            epsilon_row(name, epsilon)
            for name, epsilon in (
                ("spent", now.spent),
                ("reserved by open jobs", now.reserved),
                ("all, with this job", now.after),
            )
        ],
    )
    if view.baseline is None or view.forecast is None:
        return
    forecast = view.forecast
    print_table(
        f"AUROC on your {view.num_holdout} held-out loans ({view.num_bad_holdout} bad), with simulated noise",
        ["", "AUROC", "loss", "95%, over the noise"],
        [
            ["plan's model, you alone, no privacy", f"{view.baseline.auroc:.3f}", "-", "-"],
            [
                "clipping, no noise",
                f"{view.baseline.clipped_auroc:.3f}",
                f"{view.baseline.auroc - view.baseline.clipped_auroc:+.3f}",
                "-",
            ],
            [
                "clipping and noise",
                f"{forecast.alone_auroc:.3f}",
                f"{forecast.alone_loss.estimate:+.3f}",
                _interval(forecast.alone_loss),
            ],
            [
                f"federation of {forecast.num_lenders} like you: from about",
                "-",
                f"{forecast.federation_low.estimate:+.3f}",
                _interval(forecast.federation_low),
            ],
            [
                "to about",
                "-",
                f"{forecast.federation_high.estimate:+.3f}",
                _interval(forecast.federation_high),
            ],
        ],
    )
    say(
        "You alone is the plan's own model here, on these loans; the `alone` of `fedfin client status` and of the demo"
        " is the better of two model families by cross-validation, so the two may differ."
    )
    say(
        f"Other held-out loans could move the loss by {forecast.held_out_margin:.3f} either way. The federation is an"
        f" estimate: a step's mean gradient carries the noise of {forecast.num_lenders} lenders over"
        f" {forecast.num_lenders} times the loans, as your own would with the noise multiplier over"
        f" sqrt({forecast.num_lenders}). The first figure takes it that noise cures overfitting as it does on"
        " your loans alone, the second that it cures none. What the others' loans add to the AUROC is in neither."
    )


def _show_sweep(sweep: "tuple[Setting, ...]") -> None:
    rows: list[list[str]] = []
    for setting in sweep:
        forecast = setting.forecast
        rows.append(
            [
                f"{setting.epsilon:g}",
                f"{setting.noise.training_noise_multiplier:.4g}",
                f"{setting.noise.bins_noise_multiplier:.4g}",
                f"{setting.job.pld:.3f}",
                "-" if forecast is None else f"{forecast.alone_auroc:.3f}",
                "-" if forecast is None else f"{forecast.alone_loss.estimate:+.3f}",
                "-"
                if forecast is None
                else f"{forecast.federation_low.estimate:+.3f} .. {forecast.federation_high.estimate:+.3f}",
            ]
        )
    num = sweep[0].forecast.num_lenders if sweep[0].forecast is not None else 0
    columns = ["epsilon", "noise: steps", "bins", "PLD", "AUROC alone", "loss", f"loss, federation of {num}"]
    print_table("the same plan at other epsilons", columns, rows, numeric_from=0)


def _interval(interval: "Interval") -> str:
    return f"{interval.low:+.3f} .. {interval.high:+.3f}"

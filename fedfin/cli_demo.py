"""`fedfin demo`: the first thing anyone runs."""

import datetime as dt
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedfin.cli_output import console, guarded, print_json, print_table, say
from fedfin.config import LenderPolicy
from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from fedfin.plan import JobPlan
    from fedfin.simulation.demo import ArmMetrics, DemoResult, LenderResult

__all__ = ["EPILOG", "demo"]

EPILOG: Final = "Example:  fedfin demo --lenders 8 --rounds 20 --dir my-demo"


def demo(
    lenders: Annotated[
        int,
        typer.Option(
            "--lenders",
            help="Lenders, 2 to 8; 8 are three banks and five small. Of 2 the updates are not summed securely.",
        ),
    ] = 8,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Rounds; default: 30 with privacy, else 10.", min=1)
    ] = None,
    epsilon: Annotated[
        float,
        typer.Option("--epsilon", help="Epsilon of the whole job, above 0 and at most 100, at delta 1e-5."),
    ] = 3.0,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train without differential privacy.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the split of the loans (never of noise).", min=0)
    ] = 0,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="A new folder for all that the demo makes.", show_default=False),
    ] = None,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of text.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a whole federation on this machine: real processes, TLS, 4,454 real loans; ends with a report."""
    stop = threading.Event()

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)

    def work() -> None:
        from pydantic import ValidationError

        from fedfin.simulation.demo import check_lenders, run_demo
        from fedfin.simulation.demo_job import demo_job
        from fedfin.simulation.report import write_report

        check_lenders(lenders)
        try:
            plan = demo_job(lenders, None if no_privacy else epsilon, rounds)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = f"--{first['loc'][-1]}"  # options are named as the keys they set
            msg = f"{option} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}; change it"
            raise ConfigError(msg) from None
        if not json_out:
            _say_how_summed(plan, lenders)
        target = directory or Path(f"fedfin-demo-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}")
        with _View(quiet=json_out) as view:
            result = run_demo(
                target.resolve(),
                plan,
                num_lenders=lenders,
                seed=seed,
                say=view.show,
                stop=stop,
            )
        report = write_report(result)
        pack = _write_pack(result)
        if json_out:
            print_json({**result.to_json(), "evidence": str(pack)})
        else:
            _show(result, report, pack)

    guarded(work, json_out=json_out, debug=debug)


class _View:
    """One bar for the whole demo, with a word on what happens."""

    def __init__(self, *, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=quiet,
        )  # fmt: skip
        self._task = self._progress.add_task("starting the coordinator", total=None)
        self._quiet = quiet

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "stage":
                self._progress.update(self._task, description=event["text"])
            case "waiting":
                count = len(event["online"])
                self._progress.update(self._task, description=f"lenders online: {count} of {event['wanted']}")
            case "round":
                text = f"round {event['round']}: {len(event['lenders'])} lenders train on their own loans"
                self._progress.update(
                    self._task, description=text, total=event["of"], completed=event["round"] - 1
                )
            case "round_done":
                self._progress.update(self._task, completed=event["round"])
                if event["missing"] and not self._quiet:
                    say(f"round {event['round']}: missing {', '.join(event['missing'])}", style="yellow")
            case "refused" if not self._quiet:
                say(f"{event['lender']} does not take part: {event['reason']}", style="yellow")
            case "round_lost" | "round_short" | "bins_lost" | "bins_short" if not self._quiet:
                what = event["event"].replace("_", " ")
                say(
                    f"{what}: {event.get('reason', 'again')}; missing {', '.join(event['missing'])}",
                    style="yellow",
                )
            case "sum_refused" if not self._quiet:
                say(f"{event['lender']} refused in {event['stage']}: {event['reason']}", style="yellow")
            case "evaluation":
                text = f"{len(event['lenders'])} lenders count how the model does on held-out loans"
                self._progress.update(self._task, description=text)
            case "judged":
                self._progress.update(
                    self._task,
                    description="each lender judges the model",
                    total=event["of"],
                    completed=event["count"],
                )
            case _:
                pass


def _say_how_summed(plan: "JobPlan", num_lenders: int) -> None:
    """Say before anything runs what the coordinator will see."""
    if plan.aggregation == "plain":
        say(
            f"With {num_lenders} lenders the coordinator sees each update by itself: from the sum of two, each would"
            " learn the other's. Three lenders and more are summed under secure aggregation."
        )
        return
    say("Updates are summed under secure aggregation: the coordinator sees their sum, and no single one.")
    quorum, usual = plan.cohort.min_lenders, LenderPolicy.model_fields["min_cohort"].default
    if quorum < usual:
        say(
            f"These lenders accept sums of {quorum}; a lender's policy.min_cohort is {usual} unless its bank.yaml says"
            " otherwise."
        )


def _write_pack(result: "DemoResult") -> Path:
    """Write the run's evidence pack beside the report, with the gains that only a simulation knows."""
    from fedfin.audit.evidence import Gain
    from fedfin.cli_report import make_pack

    gains = [Gain(lender.name, *lender.gain) for lender in result.lenders]
    return make_pack(result.run, result.directory / "evidence", gains=gains, is_simulated=True).path


def _show(result: "DemoResult", report: Path, pack: Path) -> None:
    from fedfin.simulation.report import how_summed

    guarantee = "no privacy" if result.epsilon is None else f"epsilon {result.epsilon:g}, delta 1e-5"
    print_table(
        f"{len(result.lenders)} lenders, {result.plan.training.rounds} rounds, {guarantee}: AUC on the same"
        f" {result.num_holdout} held-out loans",
        ["lender", "loans", "alone", "federated", "pooled", "gain", "95% interval"],
        [
            [
                lender.name,
                str(lender.n_train),
                *(f"{arm['auc']:.3f}" for arm in _arms(lender)),
                f"{lender.gain[0]:+.3f}",
                f"{lender.gain[1]:+.3f} .. {lender.gain[2]:+.3f}",
            ]
            for lender in result.lenders
        ],
    )
    print_table(
        "KS (higher is better) and Brier score (lower is better)",
        ["lender", "KS: alone", "fed.", "pooled", "Brier: alone", "fed.", "pooled"],
        [
            [
                lender.name,
                *(f"{arm['ks']:.3f}" for arm in _arms(lender)),
                *(f"{arm['brier']:.3f}" for arm in _arms(lender)),
            ]
            for lender in result.lenders
        ],
    )
    say(how_summed(result))
    small = [lender for lender in result.lenders if lender.kind == "small"]
    if small:
        mean = sum(lender.gain[0] for lender in small) / len(small)
        say(f"A small lender gains {mean:+.3f} AUC on average. {result.seconds:.0f} s in all.", style="bold")
    first = result.directory / "lenders" / result.lenders[0].name / "bank.yaml"
    coordinator = result.directory / "coordinator" / "federation.yaml"
    say(f"report: {report}")
    say(f"evidence: {pack} (to read: {pack / 'report.html'})")
    say("try next:")
    say(f"    fedfin audit verify {pack}")
    say(f"    fedfin client status --config {first}")
    say(f"    fedfin client check --config {first}")
    say(f"    fedfin server status --config {coordinator}")
    say("    fedfin demo --no-privacy")
    say("    fedfin server init my-federation        # your own, with docs/coordinator.md")


def _arms(lender: "LenderResult") -> "tuple[ArmMetrics, ArmMetrics, ArmMetrics]":
    return lender.alone, lender.federated, lender.pooled

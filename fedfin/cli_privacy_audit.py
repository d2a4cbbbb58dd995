"""`fedfin privacy audit`: does the guarantee hold against an attack on the very code that gives it?"""

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
from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from fedfin.client.audit_report import AuditReport
    from fedfin.client.membership import MembershipReport
    from fedfin.plan import JobPlan

__all__ = ["EPILOG", "audit"]

EPILOG: Final = "Example:  fedfin privacy audit --epsilon 4"


def audit(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="The lender's bank.yaml; without it the demo's loans.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    job: JobOption = None,
    epsilon: EpsilonOption = None,
    rounds: RoundsOption = None,
    model: ModelOption = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            "--model-dir",
            help="Instead attack this released model as a stranger could: models/DIGEST beside bank.yaml.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack the training on a twin of the job, with canaries; exit 1 if it proves more than the ledger admits.

    The twin is thrown away: nothing is sent or charged, because nothing of it leaves. Takes about a minute.
    """

    def work() -> None:
        if model_dir is not None:
            _attack_model(config, model_dir, json_out=json_out)
            return
        from fedfin.client.auditing import audit_loans
        from fedfin.client.folder import LenderFolder
        from fedfin.client.preparation import prepare
        from fedfin.simulation.partition import demo_loans

        changes = {"privacy.epsilon": epsilon, "training.rounds": rounds, "model.kind": model}
        plan, _ = chosen_plan(job, config, changes)
        if config is None:
            whose, (loans, schema) = "the demo's", demo_loans()
        else:
            folder = LenderFolder(config)
            prepared = prepare(folder, looking=True)
            whose, loans, schema = f"{folder.config.name}'s", prepared.train, prepared.schema
        with ProgressBar("attacking a twin of the job", quiet=json_out) as bar:
            report = audit_loans(loans, schema, plan, progress=bar.show)
        if json_out:
            print_json({"loans": whose.removesuffix("'s"), **report.to_json()})
        else:
            _show(report, plan, whose)
        if not report.passed:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


def _show(report: "AuditReport", plan: "JobPlan", whose: str) -> None:
    from fedfin.client.audit_report import CONFIDENCE, THREAT_MODEL

    training = plan.training
    rounds = f"{training.rounds} round{'s' if training.rounds > 1 else ''}"
    say(
        f"{report.model}, {rounds} of {training.local_steps} steps, sample rate"
        f" {report.sample_rate:g}, epsilon {report.epsilon_plan:g} at delta {report.delta:g}, on {whose} loans",
        style="bold",
    )
    print_table(
        "epsilon of the whole job, for tables that differ by one loan added or removed",
        ["", "epsilon", "from"],
        [
            [
                "at most, by the ledger (RDP, to which plans are calibrated)",
                f"{report.claim_rdp:.3f}",
                "proof",
            ],
            ["at most, by the ledger (PLD, tighter)", f"{report.claim_pld:.3f}", "proof"],
            [
                "at least, by single steps",
                f"{report.epsilon_by_steps:.3f}",
                f"{report.num_correct:,} of {report.num_guesses:,} guesses right",
            ],
            [
                "at least, by one run",
                f"{report.epsilon_by_one_run:.3f}",
                f"{report.one_run_correct} of {report.one_run_guesses} guesses right",
            ],
        ],
    )
    for check in report.checks:
        say(
            f"{'holds' if check.holds else 'FAILS'}  {check.name}: {check.text}",
            style="" if check.holds else "red",
        )
    console.print()
    say(THREAT_MODEL)
    say(
        f"Code that keeps its promise fails this audit once in {1 / (1 - CONFIDENCE):.0f} times at most. The bounds"
        " are of the training, so the ledger's figures, which hold the histograms for the bins too, may be as far above"
        " as those cost. Nothing was charged, because nothing of the twin leaves."
    )
    console.print()
    if report.passed:
        share = report.epsilon_measured / report.claim_rdp
        say(
            f"passed: the attack proves {share:.0%} of the claimed epsilon and no more ({report.seconds:.0f} s)",
            style="bold green",
        )
    else:
        say("failed: " + "; ".join(report.failures), style="bold red")
        say("stop training with this installation and report what the audit printed", style="bold red")


def _attack_model(config: Path | None, model_dir: Path, *, json_out: bool) -> None:
    from fedfin.client.folder import LenderFolder
    from fedfin.client.membership import attack_kept
    from fedfin.credit.export import load_model

    if config is None:
        msg = f"--model-dir {model_dir} needs the loans that trained it; give the lender's bank.yaml with --config"
        raise ConfigError(msg)
    digest = load_model(model_dir).digest  # the folder may have any name
    with ProgressBar("training shadow models", quiet=json_out) as bar:
        report = attack_kept(LenderFolder(config), model_dir, progress=bar.show)
    if json_out:
        print_json({"model": digest, **report.to_json()})
    else:
        _show_attack(report, digest)


def _show_attack(report: "MembershipReport", digest: str) -> None:
    print_table(
        f"who trained model {digest[:12]}? {report.num_members} loans did, {report.num_others} did not,"
        f" {report.num_shadows} shadow models",
        ["", "found", "by chance", "95% interval"],
        [
            ["AUROC", f"{report.auroc:.3f}", "0.500", f"{report.low:.3f} .. {report.high:.3f}"],
            *(
                [
                    f"members found at {rate.false_positive_rate:.1%} false alarms",
                    f"{rate.true_positive_rate:.2%}",
                    f"{rate.false_positive_rate:.2%}",
                    f"{rate.low:.2%} .. {rate.high:.2%}",
                ]
                for rate in report.rates
            ),
        ],
    )
    for caveat in report.caveats:
        say(f"note: {caveat}", style="yellow")
    say(report.meaning)

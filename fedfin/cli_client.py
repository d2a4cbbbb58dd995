"""`fedfin client`: a lender's commands."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fedfin import cli_client_forks, cli_client_policy, cli_client_roster
from fedfin.cli_output import DebugOption, JsonOption, chosen, guarded, print_json, print_table, say

__all__ = ["app"]

app = typer.Typer(
    help="A lender: join a federation, check the loans, take part.",
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode="rich",
)

ConfigOption = Annotated[Path, typer.Option("--config", help="The lender's bank.yaml.", dir_okay=False)]

_DEFAULT = Path("bank.yaml")


@app.callback(epilog="Example:  fedfin client --config north-bank/bank.yaml")
def run(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    once: Annotated[
        bool, typer.Option("--once", help="End after one job's model was received and judged.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Take part: answer the coordinator's jobs within this lender's policy and budget, until stopped.

    Loans stay here. Lost connections are made again for as long as it runs.
    """
    if context.invoked_subcommand is not None:
        context.obj = config
        return
    guarded(lambda: _run(config, once=once), debug=debug)


@app.command(epilog="Example:  fedfin client join fedfin1_WyJub3J0aC1... --dir north-bank")
def join(
    token: Annotated[str, typer.Argument(help="What `fedfin server invite` printed.", show_default=False)],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="A new folder; default: the lender's name.")
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Join a federation: make the keys here, receive certificate and schema, write bank.yaml."""

    def work() -> None:
        from fedfin.client.joining import join as join_federation
        from fedfin.invitation import Invitation

        folder = join_federation(token, directory or Path(Invitation.from_token(token).name))
        if json_out:
            print_json({"config": str(folder.config_path), "name": folder.config.name})
            return
        say(
            f"{folder.config.name} is enrolled in {folder.config.federation}; its keys are in {folder.directory}/keys"
        )
        say(f"next: say under data in {folder.config_path} where your loans are, then")
        say(f"    fedfin client check --config {folder.config_path}")

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin client check --config north-bank/bank.yaml")
def check(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Look at the loans before anything is shared: every fault at once; exit 1 if the lender could not take part."""

    def work() -> None:
        from fedfin.client.checking import check_folder

        report, held_out = check_folder(chosen(context, config, _DEFAULT))
        can = report.can_take_part and (held_out is None or held_out.can_take_part)
        if json_out:
            print_json(
                {
                    **report.to_json(),
                    "can_take_part": can,
                    "holdout": None if held_out is None else held_out.to_json(),
                }
            )
        else:
            _show_report(report, "loans")
            if held_out is not None:
                _show_report(held_out, "held-out loans")
            if can:
                say("these loans can take part", style="bold green")
            else:
                say("these loans cannot take part until the errors above are mended", style="bold red")
        if not can:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin client status --config north-bank/bank.yaml")
def status(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show this lender's jobs, budget and models; nothing is sent. Exit 1 if a key of bank.yaml is wrong."""

    def work() -> None:
        from fedfin.client.status import status_of

        document = status_of(chosen(context, config, _DEFAULT))
        if json_out:
            print_json(document)
        else:
            _show_status(document)
        if document["config_error"]:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin client release credit-1a2b3c4d --config north-bank/bank.yaml")
def release(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="The job, as `fedfin client status` names it.")],
    config: ConfigOption = _DEFAULT,
    debug: DebugOption = False,
) -> None:
    """Free what is reserved for a job whose coordinator will not come back; what was spent stays spent."""

    def work() -> None:
        from fedfin.client.status import release_job

        release_job(chosen(context, config, _DEFAULT), job)
        say(f"what was reserved for {job} is free again; the job cannot go on at this lender")

    guarded(work, debug=debug)


app.command(name="approve-roster", epilog=cli_client_roster.ROSTER_EPILOG)(cli_client_roster.approve_roster)
app.command(name="approve-member", epilog=cli_client_roster.MEMBER_EPILOG)(cli_client_roster.approve_member)
app.command(name="clear-fork", epilog=cli_client_forks.EPILOG)(cli_client_forks.clear_fork)
app.command(name="rotate", epilog=cli_client_roster.ROTATE_EPILOG)(cli_client_roster.rotate)
app.command(name="dry-run", epilog=cli_client_policy.DRY_RUN_EPILOG)(cli_client_policy.dry_run)
app.command(name="make-approver", epilog=cli_client_policy.MAKE_EPILOG)(cli_client_policy.make_approver)
app.command(name="approve-job", epilog=cli_client_policy.APPROVE_EPILOG)(cli_client_policy.approve_job)


def _run(config: Path, *, once: bool) -> None:
    from fedfin.client.session import serve

    stop = threading.Event()

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    serve(config, once=once, stop=stop, say=say)


def _show_report(report: Any, what: str) -> None:  # noqa: ANN401  (fedfin.credit.quality, imported late so that --help is quick)
    rows = [
        [
            column.name,
            column.kind if column.present else "absent",
            "yes" if column.is_feature else "-",
            *(str(count) if count else "-" for count in _counts(column)),
            "-" if column.psi is None else f"{column.psi:.3f}",
        ]
        for column in report.columns
    ]
    print_table(
        f"{report.num_rows} {what}"
        + ("" if report.bad_rate is None else f", bad rate {report.bad_rate:.1%}"),
        ["column", "kind", "feature", "missing", "out of range", "wrong type", "unknown", "special", "PSI"],
        rows,
        numeric_from=3,
    )
    styles = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in report.findings:
        where = f"{finding.column}: " if finding.column else ""
        rows_text = f" (row {', '.join(map(str, finding.rows))}{', ...' if finding.count > len(finding.rows) else ''})"
        mend = "" if finding.mend.startswith("nothing") else f"; {finding.mend}"
        say(
            f"{finding.severity}: {where}{finding.message}{rows_text if finding.rows else ''}{mend}",
            style=styles[finding.severity],
        )


def _gain(model: dict[str, Any]) -> str:
    if model.get("error"):
        return "cannot be judged"
    return f"{model['gain']['auc']:+.3f}" if model.get("gain") else "not judged yet"


def _counts(column: Any) -> tuple[int, ...]:  # noqa: ANN401  (as above)
    return (
        column.num_missing,
        column.num_out_of_range,
        column.num_wrong_type + column.num_infinite + column.num_not_integer,
        column.num_unknown_category,
        sum(count for _, count in column.special),
    )


def _show_status(document: dict[str, Any]) -> None:
    say(f"{document['name']} in {document['federation']}, coordinator {document['coordinator']}")
    if document["config_error"]:
        say(
            f"{document['config_error']}. Until it is mended this lender takes no part and its limit is not known",
            style="bold red",
        )
    for what, fingerprint in document["trust"].items():
        if fingerprint is not None:
            say(f"fingerprint of the {'root certificate' if what == 'root' else what}: {fingerprint}")
    log = document["log"]
    say(f"log: {log['entries']} entries; cosigned last of the coordinator's: {log['cosigned'] or 'nothing'}")
    for fork in log["forks"]:
        say(f"the coordinator showed a log that cannot be its own ({fork}): `fedfin client clear-fork`")
    own, change = document["roster"]["pinned"], document["roster"]["pending"]
    if own is not None:
        say(f"pinned roster: version {own['number']}, {own['digest']}, {len(own['members'])} members")
    if change is not None and change["approved"]:
        waits = ", ".join(change["waits_for"])
        say(
            f"version {change['number']} of the roster is approved here; it waits for {waits or 'the coordinator'}"
        )
    elif change is not None:
        say(
            f"version {change['number']} of the roster, {change['digest']}, waits for approval: look at it and"
            " sign it with `fedfin client approve-roster`",
            style="yellow",
        )
    for job in document["held"]:
        say(
            f"{job['job']} waits for approval since {job['since']}, {job['given']} of {job['needed']} given: look at it"
            f" and approve it with `fedfin client approve-job {job['job']} --as NAME --key PATH`",
            style="yellow",
        )
    limit = "" if document["config_error"] else f" {document['epsilon_limit']:g}"
    for snapshot in document["snapshots"]:
        held = snapshot["filter"]
        used = (
            "not known until bank.yaml is mended"
            if document["config_error"]
            else "the limit admits nothing at any order"
            if held is None
            else held["why_nothing"]
            or f"{held['share_spent']:.1%} of the limit is spent and {held['share_reserved']:.1%} reserved (Renyi"
            f" filter of order {held['order']:g} at delta {held['delta']:g}"
            + (f", with {len(held['others'])} other tables of these loans" if held["others"] else "")
            + ")"
        )
        _, two, three = snapshot["borrower_pld"]
        say(
            f"budget of {'held-out loans' if snapshot['held_out'] else 'loans'} {snapshot['snapshot'][:12]}, epsilon"
            f" limit{limit}: {used}; spent so far: epsilon {snapshot['epsilon_pld']:.3f} by PLD"
            f" ({snapshot['epsilon_rdp']:.3f} by RDP), and"
            f" {snapshot['together_pld']:.3f} ({snapshot['together_rdp']:.3f}) with what is reserved, at delta"
            f" {snapshot['delta']:g}, for one loan added or removed; a borrower with a loan at 2 | 3 lenders:"
            f" {two:.3f} | {three:.3f} by PLD"
        )
    jobs = [[job["job"], job["mode"], "going on" if job["open"] else "over"] for job in document["jobs"]]
    print_table("jobs", ["job", "privacy", "state"], jobs)
    rows = [
        [
            model["model"][:12],
            *(
                f"{model['arms'][arm]['auc']:.3f}" if model.get("arms") else "-"
                for arm in ("alone", "federated")
            ),
            _gain(model),
        ]
        for model in document["models"]
    ]
    print_table("models", ["model", "AUROC alone", "AUROC federated", "gain"], rows)

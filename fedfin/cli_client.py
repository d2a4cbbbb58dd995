"""`fedfin client`: a lender's commands."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

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


@app.command("approve-roster", epilog="Example:  fedfin client approve-roster --config north-bank/bank.yaml")
def approve_roster(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show how the coordinator's roster differs from the pinned one, and go by the new one from the next proposal on.

    Compare the fingerprints with the members themselves, on another way than through the coordinator: it could invent
    a lender, or read the secure sums with keys of its own under lenders' names. --json alone approves nothing.
    """

    def work() -> None:
        from fedfin.client.folder import LenderFolder
        from fedfin.client.pinning import approve, pending

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        change = pending(folder)
        document = None if change is None else change.to_json()
        if json_out and not (yes and change):
            print_json({"pending": document, "approved": False})
            return
        if change is None or document is None:
            say("no roster waits for approval")
            return
        if not json_out:
            _show_change(document)
            if not (yes or _agreed("go by this roster?")):
                say("nothing was approved; this lender goes on with the pinned roster", style="bold red")
                raise SystemExit(1)
        approve(folder, change)
        if json_out:
            print_json({"pending": document, "approved": True})
        else:
            say(f"approved: this lender goes by the roster {document['digest']} now")

    guarded(work, json_out=json_out, debug=debug)


def _agreed(question: str) -> bool:
    """Ask on the terminal; no answer is a no."""
    try:
        return typer.confirm(question, default=False)
    except typer.Abort:
        return False


def _show_change(document: dict[str, Any]) -> None:
    kinds = {**dict.fromkeys(document["added"], "added"), **dict.fromkeys(document["changed"], "KEY CHANGED")}
    print_table(
        f"the coordinator's roster, {len(document['members'])} members",
        ["lender", "identity key (SHA-256)", "beside the pinned roster"],
        [[name, key[:32], kinds.get(name, "the same")] for name, key in document["members"].items()],
    )
    say(f"digest of this roster, to compare with the other members by telephone: {document['digest']}")
    for name in document["removed"]:
        say(f"{name} is no member any more", style="yellow")
    for name, keys in document["changed"].items():
        say(
            f"{name} had the key {keys['before'][:32]} before: ask {name} itself whether it enrolled anew, not the"
            " coordinator",
            style="bold red",
        )


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
    own, change = document["roster"]["pinned"], document["roster"]["pending"]
    if own is not None:
        say(f"pinned roster of {len(own['members'])} members, digest {own['digest']}")
    if change is not None:
        say(
            f"the coordinator stated another roster, digest {change['digest']}: look at it and approve it with"
            " `fedfin client approve-roster`; until then this lender refuses its jobs of secure sums",
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

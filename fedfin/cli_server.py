"""`fedfin server`: the coordinator's commands."""

import signal
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedfin.cli_output import DebugOption, JsonOption, chosen, console, guarded, print_json, print_table, say
from fedfin.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    help="The coordinator: found a federation, invite lenders, run the job.",
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode="rich",
)

ConfigOption = Annotated[
    Path,
    typer.Option("--config", help="The federation's federation.yaml.", show_default=True, dir_okay=False),
]

_DEFAULT = Path("federation.yaml")


@app.callback(
    epilog="Example:  fedfin server --config fed/federation.yaml",
)
def run(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    new_job: Annotated[
        bool,
        typer.Option(
            "--new-job",
            help="Abandon an unfinished job, or train a finished plan again (spends the lenders' budgets again).",
        ),
    ] = False,
    enrol_only: Annotated[
        bool, typer.Option("--enrol-only", help="Run no job: only let invited lenders join, until Ctrl-C.")
    ] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the federation: listen for lenders, run the job of federation.yaml, send every lender the model.

    Stopped (Ctrl-C) or killed at any point, it goes on from the last completed round when it is started again.
    """
    if context.invoked_subcommand is not None:
        context.obj = config
        return
    guarded(
        lambda: _run(config, new_job=new_job, enrol_only=enrol_only, json_out=json_out),
        json_out=json_out,
        debug=debug,
    )


@app.command(epilog="Example:  fedfin server init fed --name coop --address fed.example.org:9443")
def init(
    directory: Annotated[Path, typer.Argument(help="A new folder for the federation.")],
    name: Annotated[str, typer.Option(help="The federation's name: letters, digits, dashes.")] = "federation",
    address: Annotated[
        str, typer.Option(help="host:port under which lenders will reach the coordinator.")
    ] = "127.0.0.1:9443",
    schema: Annotated[
        Path | None,
        typer.Option(help="The federation's schema.yaml; default: that of the demo's loans, to start from."),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a federation's folder: authority, keys, schema.yaml, and a federation.yaml that runs as it is."""

    def work() -> None:
        from fedfin.credit.schema import Schema
        from fedfin.server.founding import found

        text = _read_schema(schema)
        Schema.from_yaml(text, origin=str(schema or "the demo's schema"))
        federation = found(directory, name=name, address=address, schema_text=text, job={})
        fingerprint = federation.authority().fingerprint
        if json_out:
            print_json(
                {"config": str(federation.config_path), "fingerprint": fingerprint, "address": address}
            )
            return
        say(f"made a federation named {name} in {directory}")
        say(f"root fingerprint (SHA-256): {fingerprint}")
        say(f"next: look at {federation.config_path} and schema.yaml, then invite each lender:")
        say(f"    fedfin server invite NAME --config {federation.config_path}")
        say(f"    fedfin server --config {federation.config_path}")

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin server invite north-bank --config fed/federation.yaml")
def invite(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The lender's name: letters, digits, dashes.")],
    config: ConfigOption = _DEFAULT,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print a token with which one lender can join: once, within 24 hours, under this name."""

    def work() -> None:
        import re

        from fedfin.audit.origins import COORDINATOR
        from fedfin.invitation import LENDER_NAME_PATTERN, Invitation
        from fedfin.server.founding import open_federation

        if not re.match(LENDER_NAME_PATTERN, name) or name == COORDINATOR:
            msg = f"{name!r} is no lender's name; use 1 to 40 small letters, digits and dashes, such as north-bank"
            raise ConfigError(msg)
        federation = open_federation(chosen(context, config, _DEFAULT))
        invitation = Invitation.create(name, federation.config.address, federation.authority().fingerprint)
        federation.store.invite(invitation)
        if json_out:
            print_json({"name": name, "token": invitation.to_token(), "address": invitation.address})
            return
        # The token alone on standard output, so that a script can take it.
        sys.stdout.write(invitation.to_token() + "\n")
        print(  # noqa: T201
            f"for {name}, once, within 24 hours, while `fedfin server` runs:  fedfin client join TOKEN",
            file=sys.stderr,
        )

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin server roster --config fed/federation.yaml")
def roster(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the enrolled lenders, the signed version of the roster, who has not signed the next, and the invitations."""

    def work() -> None:
        import hashlib

        from fedfin.server.founding import open_federation
        from fedfin.server.roster_signing import RosterBook, versions_document

        federation = open_federation(chosen(context, config, _DEFAULT))
        store = federation.store
        members = [
            {"name": m.name, "identity": hashlib.sha256(m.identity_key.encode()).hexdigest()}
            for m in store.members()
        ]
        versions = versions_document(RosterBook(store, federation.identity()))
        pending = [{"name": name, "expires": expires} for name, expires in store.pending_invitations()]
        if json_out:
            print_json({"members": members, "invitations": pending, **versions})
            return
        print_table(
            f"{len(members)} enrolled",
            ["lender", "identity key (SHA-256)"],
            [[m["name"], m["identity"][:32]] for m in members],
        )
        _show_versions(versions)
        if pending:
            print_table(
                "open invitations", ["lender", "until"], [[p["name"], p["expires"][:16]] for p in pending]
            )

    guarded(work, json_out=json_out, debug=debug)


@app.command(epilog="Example:  fedfin server remove north-bank --config fed/federation.yaml")
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The lender's name, as `fedfin server roster` lists it.")],
    config: ConfigOption = _DEFAULT,
    reason: Annotated[
        str, typer.Option("--reason", help="Why, for the log: no person's name.")
    ] = "removed by the coordinator",
    debug: DebugOption = False,
) -> None:
    """Revoke a lender: from this moment it is let in no more, and a running job goes on without it at its next round.

    The next version of the roster leaves it out, once its members have signed that. The name can be invited again.
    """

    def work() -> None:
        from fedfin.server.admission import revoke
        from fedfin.server.founding import open_federation

        federation = open_federation(chosen(context, config, _DEFAULT))
        with federation.log() as log:
            revoke(federation.store, log, name, reason)
        say(
            f"{name} is removed, at once; the next version of the roster leaves it out. The name can be invited again."
        )

    guarded(work, debug=debug)


@app.command(epilog="Example:  fedfin server status --config fed/federation.yaml")
def status(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the federation's jobs: how far each is or how it ended, who refused and why, who still waits for the end."""

    def work() -> None:
        from fedfin.server.founding import open_federation
        from fedfin.server.log_status import log_status
        from fedfin.server.status import status_of

        federation = open_federation(chosen(context, config, _DEFAULT))
        log = log_status(federation.log_path, [member.name for member in federation.store.members()])
        document = status_of(federation.store)
        if json_out:
            print_json({**document, "log": log})
            return
        if log is not None:
            final = "no checkpoint is" if log["final"] is None else f"{log['final']} are"
            say(
                f"log: {log['entries']} entries; {final} final ({log['quorum']} cosignatures); the last checkpoint, of"
                f" {log['checkpoint'] or 0}, has those of {', '.join(log['cosigned_by']) or 'nobody'}"
            )
        _show_jobs(document["jobs"])

    guarded(work, json_out=json_out, debug=debug)


def _show_jobs(jobs: list[dict[str, Any]]) -> None:
    """Print every job's line, and of the last one how it ended and who refused."""
    rows = [
        [
            job["job"],
            job["state"],
            f"{job['round'] if job['round'] is not None else '-'}/{job['of']}",
            str(len(job["lenders"])),
            str(len(job["refused"])),
            ", ".join(job["undelivered"]) or "-",
        ]
        for job in jobs
    ]
    print_table(
        "jobs", ["job", "state", "round", "lenders", "refused", "not told of the end"], rows, numeric_from=2
    )
    if not jobs:
        return
    last = jobs[-1]
    if last["reason"]:
        say(f"{last['job']} {last['state']}: {last['reason']}", style="yellow")
    for name, reason in last["refused"].items():
        say(f"{name} takes no part in {last['job']}: {reason}", style="yellow")


def _run(config: Path, *, new_job: bool, enrol_only: bool, json_out: bool) -> None:
    from fedfin.server.founding import open_federation
    from fedfin.server.supervisor import supervise

    federation = open_federation(config)
    # Both by hand: a process that a script started in the background would otherwise ignore SIGINT.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    events: list[Mapping[str, Any]] = []
    if json_out:
        supervise(federation, new_job=new_job, enrol_only=enrol_only, on_event=events.append)
        print_json({"events": events, "run": _last(events, "run"), "model": _last(events, "model")})
        return
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    )  # fmt: skip
    with progress:
        view = _View(progress)
        supervise(federation, new_job=new_job, enrol_only=enrol_only, on_event=view.show)


class _View:
    """Shows a job's events as they happen."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def show(self, event: Mapping[str, Any]) -> None:  # noqa: PLR0912  (one case for each event)
        match event["event"]:
            case "listening":
                self._line(f"listening on {event['address']}")
                self._describe("waiting for lenders")
            case "waiting":
                self._line(
                    f"waiting: {len(event['online'])} of {event['wanted']} lenders online"
                    + (f"; away: {', '.join(event['for'])}" if event["for"] else "")
                    + (f"; invited: {', '.join(event['invited'])}" if event.get("invited") else "")
                )
                if event.get("approvals"):
                    self._line(
                        f"the roster waits for the engineers of {', '.join(event['approvals'])} to sign it"
                        " (`fedfin client approve-roster`)"
                    )
            case "accepted":
                self._line(f"{event['lender']} takes part")
            case "refused" | "unanswered":
                self._line(f"{event['lender']} does not take part: {event['reason']}", style="yellow")
            case "held":
                self._line(f"{event['lender']} does not take part yet: {event['reason']}", style="yellow")
            case "cohort":
                self._line(f"cohort of {len(event['lenders'])}: {', '.join(event['lenders'])}")
            case "round":
                self._progress.update(self._task, total=event["of"], completed=event["round"] - 1)
                self._describe(f"round {event['round']}: {len(event['lenders'])} lenders train")
            case "round_done" | "round_short":
                self._progress.update(self._task, total=event["of"], completed=event["round"])
                missing = "".join(f"; missing {name} ({why})" for name, why in event["missing"].items())
                short = "; too few, again" if event["event"] == "round_short" else ""
                self._line(
                    f"round {event['round']:>3}/{event['of']}: {len(event['cohort'])} answered,"
                    f" {event['seconds']:.1f} s{short}{missing}",
                    style="yellow" if missing or short else "",
                )
            case "bins":
                self._line(f"bins placed from {event['lenders']} lenders' histograms")
            case "bins_short":
                missing = "; ".join(f"{name} ({why})" for name, why in event["missing"].items())
                self._line(
                    f"{len(event['cohort'])} histograms are too few for the bins, again: {missing}",
                    style="yellow",
                )
            case "delivering":
                self._line(f"the model waits for {', '.join(event['for'])}, {event['seconds']:.0f} s at most")
            case "giving_up":
                self._line(
                    f"waiting for {', '.join(event['for'])}, {event['seconds']:.0f} s at most, to tell them that the"
                    " job is over"
                )
            case "delivered" if event["missing"]:
                self._line(
                    f"still without the model: {', '.join(event['missing'])}; run `fedfin server` again later",
                    style="yellow",
                )
            case "link_died" | "app_died":
                self._line(f"{'the SuperLink' if event['event'] == 'link_died' else 'the ServerApp'} died"
                           f" (status {event['status']}); started again", style="yellow")  # fmt: skip
            case "started" | "resumed" | "abandoned":
                self._line(f"job {event['job']} {event['event']}")
            case "released":
                self._line(f"model {event['model'][:12]} released: {event['run']}/model", style="bold")
            case _:
                self._show_sum(event)

    def _show_sum(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "round_lost" | "bins_lost" | "evaluation_lost":
                what = event["event"].partition("_")[0]
                number = event.get("round", event.get("evaluation", ""))
                missing = "".join(f"; missing {name} ({why})" for name, why in event["missing"].items())
                self._line(f"{what} {number} is lost: {event['reason']}{missing}", style="yellow")
            case "sum_refused":
                self._line(
                    f"{event['lender']} refused in {event['stage']}: {event['reason']}", style="yellow"
                )
            case "sum_liars":
                names = ", ".join(event["lenders"])
                self._line(f"{event['stage']}: wrong shares came from {names}", style="yellow")
            case "next_job":
                self._line(
                    f"{event['lender']} enrolled after this job was proposed; it waits for the next one"
                )
            case "given_up":
                told = f"told {', '.join(event['told'])}" if event["told"] else "nobody had accepted it"
                away = (
                    f"; {', '.join(event['missing'])} will be when they are back" if event["missing"] else ""
                )
                self._line(f"job {event['job']} is given up; {told}{away}", style="yellow")
            case "evaluated":
                auroc = event["figures"].get("auroc")
                found = "noise hides the AUROC"
                if auroc is not None:
                    found = f"AUROC {auroc['value']:.3f}, ± {auroc['noise_error']:.3f} of noise"
                self._line(f"judged on the held-out loans of {len(event['cohort'])} lenders: {found}")
            case "evaluation_skipped":
                self._line(
                    f"evaluation {event['evaluation']} is left out: too few lenders take part", style="yellow"
                )
            case _:
                pass

    def _line(self, text: str, *, style: str = "") -> None:
        say(text, style=style)

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)


def _show_versions(document: Mapping[str, Any]) -> None:
    signed, waiting = document["version"], document["waiting"]
    if signed is not None:
        say(f"version {signed['number']} of the roster, {signed['digest']}: {', '.join(signed['members'])}")
    if waiting is not None:
        say(
            f"version {waiting['number']}, {waiting['digest'][:12]}, waits for {', '.join(waiting['waits_for'])}: their"
            " engineers look at it and sign it with `fedfin client approve-roster`, while the coordinator runs a job",
            style="yellow",
        )


def _read_schema(path: Path | None) -> str:
    if path is None:
        return (resources.files("fedfin.simulation") / "credit_data.yaml").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); give the federation's schema with --schema"
        raise ConfigError(msg) from error


def _last(events: list[Mapping[str, Any]], key: str) -> str | None:
    return next((event[key] for event in reversed(events) if key in event), None)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

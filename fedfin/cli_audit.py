"""`fedfin audit`: what happened, checked by anyone, offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedfin import cli_audit_files, cli_audit_replay, cli_audit_show
from fedfin.cli_output import DebugOption, JsonOption, ProgressBar, console, guarded, print_json, say

if TYPE_CHECKING:
    from fedfin.audit.inspecting import Inspection

__all__ = ["app", "verify"]

app = typer.Typer(
    help="The evidence: check a log, a run or a pack, read it, prove an entry, give it out.",
    epilog="Example:  fedfin audit verify credit-1a2b3c4d-evidence.zip --trust 93cd17c0...",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_KINDS: Final = {
    "log": "a log",
    "folder": "the folder of a log's owner",
    "run directory": "a run directory",
    "evidence pack": "an evidence pack",
    "export": "an export of a log",
    "proof": "a proof of one entry",
}


def _fingerprints(given: list[str] | None) -> list[str]:
    found = [text.strip().replace(":", "").lower() for text in given or []]
    for text in found:
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            msg = f"{text!r} is no fingerprint: SHA-256, 64 hexadecimal digits"
            raise typer.BadParameter(msg)
    return found


@app.command(epilog="Example:  fedfin audit verify credit-1a2b3c4d-evidence.zip --trust 93cd17c0...")
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A log (audit.db), a lender's or the coordinator's folder, a run directory, an evidence pack (folder"
            " or .zip), an export (.jsonl), or a proof (.json)."
        ),
    ],
    trust: Annotated[
        list[str] | None,
        typer.Option(
            "--trust",
            help="Fingerprint of the federation's root certificate or of the owner's identity key, got another way than"
            " with the file; may be given again.",
            show_default=False,
            callback=_fingerprints,
        ),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            help="What someone else holds of this log: a signed note, or the log of a lender that cosigned it; may be"
            " given again. It shows a log that was cut short, restored from a backup, or forked.",
            show_default=False,
            exists=True,
        ),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check evidence offline: say what was checked, by whom it is cosigned, and the first thing that is wrong.

    Exit status 0 where nothing is wrong, 1 where something is. Nothing is written and nothing is sent.
    """

    def work() -> None:
        from fedfin.audit.inspecting import anchors_of, inspect, origin_of
        from fedfin.audit.verifying import Trust

        origin = origin_of(path) if checkpoint else ""
        anchors = tuple(note for held in checkpoint or () for note in anchors_of(held, origin))
        with ProgressBar("checking entries", quiet=json_out or not console.is_terminal) as bar:
            found = inspect(path, Trust(fingerprints=frozenset(trust or ()), anchors=anchors), bar.show)
        if json_out:
            print_json(_to_json(found))
        else:
            _show(found)
        if not found.ok:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


app.command(name="show", epilog=cli_audit_show.EPILOG)(cli_audit_show.show)
app.command(name="prove", epilog=cli_audit_files.PROVE_EPILOG)(cli_audit_files.prove)
app.command(name="export", epilog=cli_audit_files.EXPORT_EPILOG)(cli_audit_files.export)
app.command(name="replay", epilog=cli_audit_replay.EPILOG)(cli_audit_replay.replay_command)
app.command(name="prune", epilog=cli_audit_files.PRUNE_EPILOG)(cli_audit_files.prune)


def _show(found: "Inspection") -> None:
    say(f"{found.path}: {_KINDS[found.kind]}", style="bold")
    for check in found.checked:
        say(f"  holds: {check.what}: {check.detail}")
    log = found.log
    if log is not None and log.anchored is not None:
        say(f"  cosigned up to entry {log.anchored.size - 1} by {', '.join(log.anchored.by)}")
    for note in found.notes:
        say(f"  note: {note}", style="yellow")
    if found.wrong is None:
        say("nothing is wrong", style="bold green")
        return
    where = f" ({found.where})" if found.where else ""
    say(f"WRONG{where}: {found.wrong.what}", style="bold red")
    say(f"  {found.wrong.meaning}")


def _to_json(found: "Inspection") -> dict[str, Any]:
    log, wrong = found.log, found.wrong
    return {
        "path": str(found.path),
        "kind": found.kind,
        "ok": found.ok,
        "checked": [{"what": check.what, "detail": check.detail} for check in found.checked],
        "notes": found.notes,
        "wrong": None
        if wrong is None
        else {"where": found.where, "entry": wrong.index, "what": wrong.what, "meaning": wrong.meaning},
        "log": None
        if log is None
        else {
            "origin": log.origin,
            "actor": log.actor,
            "size": log.size,
            "root": log.root.hex(),
            "erased": log.num_pruned,
            "cosigned": None
            if log.anchored is None
            else {"size": log.anchored.size, "by": list(log.anchored.by)},
        },
    }

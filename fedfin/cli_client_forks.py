"""`fedfin client clear-fork`: what a coordinator showed that cannot be its log, and how a lender answers again."""

from pathlib import Path
from typing import Annotated, Final

import typer

from fedfin.cli_output import DebugOption, JsonOption, agreed, chosen, guarded, print_json, say

__all__ = ["EPILOG", "clear_fork"]

EPILOG: Final = "Example:  fedfin client clear-fork --config north-bank/bank.yaml"

_DEFAULT: Final = Path("bank.yaml")


def clear_fork(
    context: typer.Context,
    config: Annotated[
        Path, typer.Option("--config", help="The lender's bank.yaml.", dir_okay=False)
    ] = _DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="Clear without asking.")] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the checkpoints that do not go together, and let this lender answer its coordinator again.

    Until then it answers nothing. Ask the other lenders which checkpoints they cosigned (`fedfin client status`), and
    the coordinator what happened: a copy restored from a backup looks the same as a history rewritten on purpose. The
    proof stays in forks/. --json alone clears nothing.
    """

    def work() -> None:
        import json

        from fedfin.client.folder import LenderFolder
        from fedfin.client.witnessing import clear_forks, open_forks

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        found = [{"file": str(path), **json.loads(path.read_text("utf-8"))} for path in open_forks(folder)]
        if json_out and not yes:
            print_json({"forks": found})
            return
        for fork in found:
            if not json_out:
                say(
                    f"{fork['file']}, {fork['time']}, {fork['question']} of job {fork['job']}: {fork['reason']}"
                )
                say(f"held:\n{fork['held'] or '(nothing yet)'}\nshown:\n{fork['shown']}")
        question = "did you find out why, and should this lender answer again?"
        if found and not yes and not agreed(question):
            say("nothing was cleared; this lender answers its coordinator nothing", style="bold red")
            raise SystemExit(1)
        cleared = clear_forks(folder)
        folder.journal.close()
        if json_out:
            print_json({"cleared": list(cleared)})
        else:
            say(f"{len(cleared)} cleared; the proof stays in {folder.forks_path}")

    guarded(work, json_out=json_out, debug=debug)

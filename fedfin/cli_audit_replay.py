"""`fedfin audit replay`: do a round again from what was kept of it, and compare digests bit for bit."""

from pathlib import Path
from typing import Annotated, Final

import typer

from fedfin.cli_output import DebugOption, JsonOption, guarded, print_json, say

__all__ = ["EPILOG", "replay_command"]

EPILOG: Final = "Example:  fedfin audit replay 3 --run coordinator/runs/credit-1a2b3c4d"


def replay_command(
    number: Annotated[
        int, typer.Argument(metavar="ROUND", min=1, help="Number of the round.", show_default=False)
    ],
    run: Annotated[Path, typer.Option(help="The run directory, with its transcripts.", file_okay=False)],
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sum a round's masked vectors again and make the model after it, from the run's transcripts alone.

    All rounds before it are done again too, since its question is their model. Exit 1 and the first difference where a
    sum, a question or a model is not the one that was logged. The coordinator keeps transcripts where its
    federation.yaml says evidence.keep_transcripts.
    """

    def work() -> None:
        from dataclasses import asdict

        from fedfin.server.replaying import replay

        done = replay(run, number)
        if json_out:
            print_json({**asdict(done), "survivors": list(done.survivors)})
            return
        say(f"round {done.round}: the sum of {len(done.survivors)} lenders is the logged one, {done.sum}")
        say(f"the model after it is the logged one, {done.model}; rounds done again: {done.rounds}")

    guarded(work, json_out=json_out, debug=debug)

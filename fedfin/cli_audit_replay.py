"""`fedfin audit replay`: do a round again from what was kept of it, and compare digests bit for bit."""

from pathlib import Path
from typing import Annotated

import typer

from fedfin.cli_output import print_json

__all__ = ["replay_command"]


def replay_command(
    number: Annotated[int, typer.Argument(metavar="ROUND", min=1, help="The round; its number in the job.")],
    run: Annotated[Path, typer.Option(help="The run directory, with its transcripts.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Sum a round's masked vectors again and make the model after it, from the run's transcripts and nothing else.

    All rounds before it are done again too, since its question is their model. Exit 1 and the first difference where
    a sum, a question or a model is not the one that was logged.
    """
    from dataclasses import asdict

    from fedfin.server.replaying import replay

    done = replay(run, number)
    if as_json:
        print_json({**asdict(done), "survivors": list(done.survivors)})
        return
    typer.echo(f"round {done.round}: the sum of {len(done.survivors)} lenders is the logged one ({done.sum})")
    typer.echo(f"the model after it is the logged one ({done.model}); {done.rounds} rounds were done again")

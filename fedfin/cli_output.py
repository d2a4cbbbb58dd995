"""How the commands speak: tables and bars for people, one JSON document with --json, one paragraph for an error."""

import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Self

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedfin.errors import FedfinError

__all__ = [
    "DebugOption",
    "JsonOption",
    "ProgressBar",
    "agreed",
    "chosen",
    "console",
    "fail",
    "guarded",
    "print_json",
    "print_table",
    "say",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# What moves the cursor or turns the direction of text: the other side's words must not change what a person reads.
_UNSEEN: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def chosen(context: typer.Context, config: Path, default: Path) -> Path:
    """Return --config of the subcommand, or the one given before it."""
    return context.obj if config == default and isinstance(context.obj, Path) else config


def agreed(question: str) -> bool:
    """Ask on the terminal; no answer is a no."""
    try:
        return typer.confirm(question, default=False)
    except typer.Abort:
        return False


class ProgressBar:
    """A bar for long work, or none beside a JSON document; gone when the work is done."""

    def __init__(self, text: str, *, quiet: bool, total: int | None = None) -> None:
        self._progress = Progress(
            TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=quiet,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """Show that so much is done."""
        self._progress.update(self._task, completed=done, total=total)

    def advance(self) -> None:
        """Show that one more is done."""
        self._progress.advance(self._task)


def say(text: str, *, style: str = "") -> None:
    """Print a line; brackets in it are text, not markup, and control characters are shown as unknown."""
    console.print(Text(_seen(text), style=style))


def _seen(text: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document and nothing else; what is not finite is null, which JSON has no number for."""
    sys.stdout.write(json.dumps(_finite(document), indent=1, default=str, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, columns: list[str], rows: list[list[str]], *, numeric_from: int = 1) -> None:
    """Print a table; columns from `numeric_from` on are set to the right; a column of dashes only is left out."""
    shown = [
        i for i in range(len(columns)) if i < numeric_from or not rows or any(row[i] != "-" for row in rows)
    ]
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index in shown:
        table.add_column(
            Text(columns[index]), justify="right" if index >= numeric_from else "left", no_wrap=index == 0
        )
    for row in rows:
        table.add_row(*(Text(_seen(row[index])) for index in shown))
    console.print(table)
    console.print()


def fail(message: str, *, json_out: bool = False) -> NoReturn:
    """Print an error as one paragraph (or as JSON) and exit 1."""
    if json_out:
        try:
            print_json({"error": message})
        except OSError:  # standard output itself is what fails
            json_out = False
    if not json_out:
        _errors.print(Text.assemble(("fedfin: ", "bold red"), _seen(message)))
    raise SystemExit(1)


def guarded(work: Callable[[], None], *, json_out: bool = False, debug: bool = False) -> None:
    """Run a command's work; an error that a user can mend ends it with one paragraph, Ctrl-C with a word.

    Args:
        work: What the command does.
        json_out: Errors as JSON on standard output, too.
        debug: Show the traceback; also with FEDFIN_DEBUG=1.
    """
    try:
        work()
    except FedfinError as error:
        if debug or os.environ.get("FEDFIN_DEBUG") == "1":
            traceback.print_exc()
        fail(str(error), json_out=json_out)
    except KeyboardInterrupt:
        _errors.print("\nstopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        if debug or os.environ.get("FEDFIN_DEBUG") == "1":
            traceback.print_exc()
        where = f" ({error.filename})" if error.filename else ""
        fail(f"the system refused: {error.strerror or error}{where}; free the disk or mend the permissions",
             json_out=json_out)  # fmt: skip
    except Exception as error:  # noqa: BLE001  (our own bug: say so in one paragraph, and how to see more)
        if debug or os.environ.get("FEDFIN_DEBUG") == "1":
            traceback.print_exc()
        fail(
            f"this is a bug of fedfin ({type(error).__name__}: {error}); run the command again with --debug and report"
            " what it prints",
            json_out=json_out,
        )

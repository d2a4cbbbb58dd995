"""docs/configuration.md and docs/commands.md, written from the code: `python -m fedfin.cli_reference docs`.

A test holds the files to what this writes, so that they cannot drift.
"""

import sys
from pathlib import Path

import click
import typer.main
from pydantic import BaseModel  # noqa: TC002  (kept plain: the only use is in annotations)

from fedfin.config import FederationConfig, LenderConfig
from fedfin.lender_policy import Approver
from fedfin.reference import reference

__all__ = ["commands_page", "configuration_page", "main"]


def configuration_page() -> str:
    """Return docs/configuration.md."""
    from fedfin.credit.schema import CategoricalColumn, Label, NumericColumn, Schema

    parts = [
        "# Configuration",
        "",
        (
            "Written from the code by `make docs`; unknown keys are refused, and a wrong value is answered with the"
            " file, the key, the value and the mend. Annotated examples of the first two files are written by"
            " `fedfin server init` and `fedfin client join`."
        ),
    ]
    files: list[tuple[str, str, type[BaseModel]]] = [
        ("federation.yaml", "The coordinator's file. Paths are relative to it.", FederationConfig),
        ("bank.yaml", "A lender's file. Paths are relative to it.", LenderConfig),
    ]
    for name, about, model in files:
        parts += ["", f"## {name}", "", about, "", *_table(reference(model))]
    parts += ["", "### policy.approvers, each", "", *_table(reference(Approver))]
    parts += [
        "",
        "## schema.yaml",
        "",
        "The federation's columns; the coordinator writes it, every lender receives it.",
        "",
    ]
    parts += _table([row for row in reference(Schema) if not row[0].startswith(("label.", "columns."))])
    for title, part in (
        ("### label", Label),
        ("### columns, kind numeric", NumericColumn),
        ("### columns, kind categorical", CategoricalColumn),
    ):
        parts += ["", title, "", *_table(reference(part))]
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """Return docs/commands.md."""
    from fedfin.cli import app

    root = typer.main.get_command(app)
    parts = [
        "# Commands",
        "",
        (
            "Written from the code by `make docs`. Exit status: 0 done, 1 failed or refused, 2 wrong usage, 130 stopped"
            " by Ctrl-C. Errors are one paragraph; a traceback only with `--debug`."
        ),
    ]
    parts += _command(root, "fedfin")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write both pages into the folder named on the command line."""
    folder = Path(sys.argv[1])
    (folder / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")


def _command(command: click.Command, path: str) -> list[str]:
    context = click.Context(command, info_name=path)
    help_text = " ".join((command.help or "").split())
    parts = ["", f"## {path}", "", help_text]
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = " ".join(p.make_metavar(context) for p in arguments)
    parts += ["", "```", " ".join(part for part in (path, words, "[options]") if part)]
    if command.epilog:
        parts.append(command.epilog.removeprefix("Example:").strip())
    parts += ["```", ""]
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        if parameter.name in {"help", "debug"} or not text:
            continue
        names = (
            ", ".join(parameter.opts)
            if isinstance(parameter, click.Option)
            else parameter.make_metavar(context)
        )
        default = parameter.default
        shown = "" if default in {None, False} or callable(default) else f" (default: {default})"
        parts.append(f"- `{names}`: {text}{shown}")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                parts += _command(child, f"{path} {name}")
    return parts


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| key | value | default | what |", "|---|---|---|---|"]
    for key, kind, default, about in rows:
        shown = (
            default if default in {"", "required"} else "not given" if default == "null" else f"`{default}`"
        )
        cells = [f"`{key}`", kind, shown, about]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    main()

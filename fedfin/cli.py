"""The `fedfin` command: the top of the house; the only place that prints and exits."""

import importlib.metadata
import os
from typing import Annotated

import typer

from fedfin import cli_audit, cli_client, cli_demo, cli_privacy, cli_report, cli_server

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedfin",
    help="Federated credit scoring for banks and microfinance lenders.",
    epilog="Example:  fedfin demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(cli_server.app, name="server")
app.add_typer(cli_client.app, name="client")
app.add_typer(cli_privacy.app, name="privacy")
app.add_typer(cli_audit.app, name="audit")
app.command(name="report", epilog=cli_report.EPILOG)(cli_report.report)
app.command(name="demo", epilog=cli_demo.EPILOG)(cli_demo.demo)


def _show_version(wanted: bool) -> None:  # noqa: FBT001  (Typer passes the flag so)
    if wanted:
        typer.echo(f"fedfin {importlib.metadata.version('fedfin')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Federated credit scoring for banks and microfinance lenders."""


def main() -> None:
    """Run the command line."""
    # Before a command imports torch: these models are small, and default threading was up to 100 times slower where
    # processes outnumber cores. OMP_NUM_THREADS in the environment says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()

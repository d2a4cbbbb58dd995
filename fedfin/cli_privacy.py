"""`fedfin privacy`: what a job would cost, what was spent, and whether the guarantee holds."""

import typer

from fedfin import cli_privacy_audit, cli_privacy_ledger, cli_privacy_plan

__all__ = ["app"]

app = typer.Typer(
    help="The privacy budget: what a job would cost, what was spent, and an attack on the guarantee.",
    epilog="Example:  fedfin privacy plan --config bank.yaml --epsilon 3 --rounds 20",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command(name="plan", epilog=cli_privacy_plan.EPILOG)(cli_privacy_plan.plan)
app.command(name="ledger", epilog=cli_privacy_ledger.EPILOG)(cli_privacy_ledger.ledger)
app.command(name="audit", epilog=cli_privacy_audit.EPILOG)(cli_privacy_audit.audit)

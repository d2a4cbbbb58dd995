"""`fedfin privacy ledger`: what was spent of the loans' privacy, on what, and what is left."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from fedfin.cli_output import DebugOption, JsonOption, console, guarded, print_json, print_table, say
from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from fedfin.client.budgeting import Epsilon
    from fedfin.client.spending import Spending
    from fedfin.privacy.ledger import Budget

__all__ = ["EPILOG", "RELATION", "epsilon_row", "ledger", "show_bar"]

EPILOG: Final = "Example:  fedfin privacy ledger --config north-bank/bank.yaml --plot spent.png"
RELATION: Final = "for tables that differ by one loan added or removed"
"""Stands beside every epsilon."""

_BAR_WIDTH: Final = 60
_JOB_COLOURS: Final = ("blue", "yellow", "green", "magenta", "red", "cyan")


def ledger(
    config: Annotated[Path, typer.Option("--config", help="The lender's bank.yaml.", dir_okay=False)] = Path(
        "bank.yaml"
    ),
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="Only the loans whose digest begins so.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw it, as a .png file.", show_default=False)
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what was spent of these loans' privacy, on what, and what is left; nothing is recorded or sent."""

    def work() -> None:
        from fedfin.client.folder import LenderFolder
        from fedfin.client.spending import choose, open_ledger, spendings_of, to_json

        folder = LenderFolder(config)
        if plot is not None:
            from fedfin.client.spending_plot import check_path

            check_path(plot)  # before the seconds of adding up
        with open_ledger(folder) as opened:
            if opened is None and snapshot is not None:
                choose((), snapshot)
            # PLDs take seconds
            with console.status("adding up what was spent") if not json_out else nullcontext():
                spendings = () if opened is None else spendings_of(opened, folder, snapshot)
        if plot is not None:
            if not spendings:
                msg = (
                    f"--plot {plot}: {folder.config.name} has spent nothing yet, so there is nothing to draw"
                )
                raise ConfigError(msg)
            from fedfin.client.spending_plot import write_plot

            write_plot(spendings, folder.config.name, plot)
        if json_out:
            print_json(
                {
                    "name": folder.config.name,
                    "epsilon_limit": folder.config.policy.epsilon_limit,
                    "snapshots": [to_json(spending) for spending in spendings],
                    "plot": None if plot is None else str(plot),
                }
            )
            return
        if not spendings:
            say(
                f"{folder.config.name} has no ledger yet: it accepted no private job, so its loans have given nothing;"
                f" the limit is epsilon {folder.config.policy.epsilon_limit:g}"
            )
        for spending in spendings:
            _show_spending(spending)
        if plot is not None:
            say(f"drawn: {plot}")

    guarded(work, json_out=json_out, debug=debug)


def show_bar(parts: list[tuple[str, float, str]], budget: "Budget", spent: "Epsilon") -> None:
    """Print what the limit admits as a bar, and its parts in words: of one loan's Renyi divergence they add up."""
    if not budget.capacity > 0.0:
        say(budget.why_nothing(spent.rdp, spent.pld), style="red")
        return
    bar, words = Text(), []
    cells = 0.0
    for name, share, colour in parts:
        if not share > 0.0:
            continue
        start, cells = round(min(cells, 1.0) * _BAR_WIDTH), cells + share
        bar.append("█" * max(0, round(min(cells, 1.0) * _BAR_WIDTH) - start), style=colour)
        words.append((f"{name} {share:.1%}", colour))
    bar.append("░" * (_BAR_WIDTH - len(bar)), style="bright_black")
    left = budget.share(budget.left)
    bar.append("  ")
    for text, colour in words:
        bar.append(f"{text}, ", style=colour)
    bar.append(f"left {left:.1%}" if left >= 0 else f"{-left:.1%} too much")
    console.print(bar)
    say(
        f"of what epsilon_limit {budget.epsilon_limit:g} admits, in Renyi divergence, which adds up over jobs"
        " as epsilon does not",
        style="dim",
    )


def epsilon_row(name: str, epsilon: "Epsilon") -> list[str]:
    """Return a table's row: the name and both figures."""
    return [name, f"{epsilon.rdp:.3f}", f"{epsilon.pld:.3f}"]


def _show_spending(spending: "Spending") -> None:
    from fedfin.privacy.evaluation_noise import job_of

    budget = spending.budget
    say(f"{'held-out ' if spending.held_out else ''}loans of snapshot {spending.snapshot[:12]}", style="bold")
    parts = [
        (
            f"{job.job_id}{' (inherited)' if job.is_inherited else ''}",
            job.share,
            _JOB_COLOURS[number % len(_JOB_COLOURS)],
        )
        for number, job in enumerate(spending.jobs)
    ]
    show_bar([*parts, ("reserved", budget.share(budget.reserved), "bright_black")], budget, spending.spent)
    print_table(
        f"epsilon at delta {spending.delta:g}, {RELATION}",
        ["", "RDP", "PLD"],
        [
            epsilon_row("spent", spending.spent),
            epsilon_row("reserved by open jobs", spending.reserved),
            epsilon_row("both together", spending.held),
        ],
    )
    one, two, three = spending.borrower
    say(
        f"Spent, for a borrower known to 1, 2 or 3 lenders that spent as much: {one:.3f}, {two:.3f}, {three:.3f} (PLD)."
    )
    say(
        f"The limit {budget.epsilon_limit:g} is held at Renyi order {budget.account.order:g} and delta"
        f" {budget.account.delta:g}: {budget.epsilon:.3f} with what is reserved."
    )
    if budget.others:
        names = ", ".join(name[:12] for name in budget.others)
        say(f"Some of these loans were in other snapshots too, and inherit what those spent: {names}.")
    console.print()
    # what is the same in every line stands in the title, or not at all: a terminal has 80 columns
    mechanisms = sorted({event.mechanism for charge in spending.charges for event in charge.entry.events})
    rows = []
    for charge in spending.charges:
        entry = charge.entry
        inherited = entry.snapshot[:12] if spending.is_inherited(charge) else "-"
        for number, event in enumerate(entry.events, start=1):
            last = number == len(entry.events)
            rows.append(
                [
                    entry.utc[:16].replace("T", " "),
                    job_of(entry.job_id),
                    entry.stage,
                    f"{event.noise_multiplier:.4g}",
                    f"{event.sample_rate:g}" if event.sample_rate < 1.0 else "-",
                    str(event.count),
                    f"{charge.epsilon_rdp:.3f}" if last else "",
                    "" if charge.epsilon_pld is None or not last else f"{charge.epsilon_pld:.3f}",
                    event.mechanism if len(mechanisms) > 1 else "-",
                    inherited,
                ]
            )
    print_table(
        f"releases ({', '.join(mechanisms)}), and epsilon of all up to each",
        ["UTC", "job", "stage", "noise", "rate", "count", "RDP", "PLD", "mechanism", "inherited from"],
        rows,
        numeric_from=3,
    )
    if any(charge.epsilon_pld is None for charge in spending.charges):
        say("PLD takes long to compute: with so many releases it stands beside some only, and the last.")

"""What a lender's loans have given away, as a drawing: epsilon after every release, the jobs in colours, the limit."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedfin.client.spending import Spending
from fedfin.errors import ConfigError
from fedfin.files import write_public

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_path", "write_plot"]

# Okabe & Ito's colours, which colour-blind readers tell apart
_JOB_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_MOST_JOBS_NAMED: Final = 8
_LINE: Final = "#3a4452"
_LIMIT: Final = "#b3261e"
_GREY: Final = "#8a94a3"
_STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
}


def check_path(path: Path) -> None:
    """Refuse a path that is no .png: ConfigError."""
    if path.suffix.lower() != ".png":
        msg = f"--plot is {path}; give a file that ends in .png"
        raise ConfigError(msg)


def write_plot(spendings: Sequence[Spending], name: str, path: Path) -> None:
    """Draw a panel for each snapshot and write them as PNG, whole or not at all.

    Args:
        spendings: At least one.
        name: The lender's, for the title.
        path: Ends in .png; an existing file is replaced.

    Raises:
        ConfigError: The path is no .png, or cannot be written.
    """
    check_path(path)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.0, 0.5 + 3.9 * len(spendings)), layout="constrained")
        panels = figure.subplots(len(spendings), squeeze=False)[:, 0]
        for axes, spending in zip(panels, spendings, strict=True):
            _draw(axes, spending)
        figure.suptitle(f"What the loans of {name} have given away", x=0.01, ha="left", weight="bold")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_public(path, png.getvalue(), mode=0o600)


def _draw(axes: "Axes", spending: Spending) -> None:
    rdp = [0.0, *(charge.epsilon_rdp for charge in spending.charges)]
    numbered = enumerate(spending.charges, start=1)
    pld = {0: 0.0} | {n: charge.epsilon_pld for n, charge in numbered if charge.epsilon_pld is not None}
    axes.step(range(len(rdp)), rdp, where="post", color=_LINE, linewidth=1.4, label="RDP, least over orders")
    axes.step(
        list(pld),
        list(pld.values()),
        where="post",
        color=_LINE,
        linewidth=1.2,
        linestyle=":",
        label="PLD, tighter",
    )
    _draw_jobs(axes, spending, rdp, pld)
    end, held = len(spending.charges), spending.budget.epsilon
    # at its one order the filter's figure starts high and ends near RDP's: only its end is of use to people
    axes.plot([end, end + 1], [rdp[-1], held], "--", color=_GREY, linewidth=1.2)
    label = f"held against the limit{', reserved included' if spending.reserved.rdp > 0 else ''}: {held:.2f}"
    axes.plot(end + 1, held, "D", color="white", markeredgecolor=_LINE, markersize=7, zorder=3, label=label)
    limit = spending.budget.epsilon_limit
    axes.axhline(limit, color=_LIMIT, linewidth=1.4, label=f"epsilon_limit {limit:g}")
    axes.set_xlim(0, (end + 1) * 1.03)
    axes.set_ylim(0, max(limit, held, rdp[-1]) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e8ecf1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("releases, oldest first")
    axes.set_ylabel(f"epsilon at delta {spending.delta:g}")
    axes.set_title(
        f"snapshot {spending.snapshot[:12]} (neighbours differ by one loan added or removed)",
        loc="left",
        fontsize=10,
        color=_LINE,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _draw_jobs(axes: "Axes", spending: Spending, rdp: list[float], pld: dict[int, float]) -> None:
    """Mark each job's releases on both lines; jobs on earlier snapshots as squares."""
    for position, job in enumerate(spending.jobs):
        own = [
            number
            for number, charge in enumerate(spending.charges, start=1)
            if charge.entry.job_id == job.job_id and spending.is_inherited(charge) == job.is_inherited
        ]
        added = sum(rdp[number] - rdp[number - 1] for number in own)
        label = f"{job.job_id}: +{added:.2f}" + (" (inherited)" if job.is_inherited else "")
        colour = _JOB_COLOURS[position % len(_JOB_COLOURS)]
        marker = "s" if job.is_inherited else "o"
        axes.plot(
            own,
            [rdp[number] for number in own],
            marker,
            color=colour,
            markersize=6,
            zorder=3,
            label=label if position < _MOST_JOBS_NAMED else None,
        )
        known = [number for number in own if number in pld]
        axes.plot(known, [pld[number] for number in known], marker, color=colour, markersize=3.5, zorder=3)

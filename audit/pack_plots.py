"""The plots of an evidence pack, as SVG that stands in the page itself: no network, no script, sharp on paper."""

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedfin.audit.run_record import Round

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "PLOT_STYLE",
    "calibration_plot",
    "epsilon_plot",
    "fairness_plot",
    "gain_plot",
    "report_style",
    "rounds_plot",
    "svg",
    "training_plot",
]

# Two hues that colour-blind readers tell apart; the marks differ in shape as well.
BLUE: Final = "#0b6e99"
ORANGE: Final = "#c98a00"
GREY: Final = "#8a94a3"
_LINE: Final = "#e8ecf1"

PLOT_STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GREY,
    "xtick.color": "#3a4452",
    "ytick.color": "#1c2430",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a category may hold dollar signs
    "svg.hashsalt": "fedfin",
}


def report_style() -> Markup:
    """Return the style sheet of every report."""
    return Markup((resources.files("fedfin.audit") / "report.css").read_text(encoding="utf-8"))  # noqa: S704  (ours)


def svg(figure: Figure) -> Markup:
    """Return a figure as an SVG element."""
    text = io.StringIO()
    with mpl.rc_context(PLOT_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])  # noqa: S704  (matplotlib's own drawing)


def rounds_plot(rounds: Sequence[Round]) -> Figure:
    """Draw for each attempt at a round who was in the sum, who was missing, and the seconds it took."""
    places = list(range(1, len(rounds) + 1))
    done = [0 if found.is_lost else len(found.cohort) for found in rounds]
    missing = [len(found.missing) for found in rounds]
    lost = [max(1, len(found.cohort)) if found.is_lost else 0 for found in rounds]
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.bar(places, done, color=BLUE, label="in the sum")
        if any(missing):
            above.bar(
                places,
                missing,
                bottom=[max(pair) for pair in zip(done, lost, strict=True)],
                color=ORANGE,
                hatch="//",
                edgecolor="white",
                label="missing",
            )
        if any(lost):
            above.bar(places, lost, color=_LINE, edgecolor=GREY, label="round lost, nothing published")
        above.set_ylabel("lenders")
        above.yaxis.set_major_locator(MaxNLocator(integer=True))
        above.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)
        below.plot(places, [found.seconds for found in rounds], "o-", color=BLUE, markersize=4, linewidth=1.4)
        below.set_ylim(bottom=0)
        below.set_ylabel("seconds")
        below.set_xlabel("round" if not any(lost) else "round, with the attempts that were lost")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        _grid(above, below)
        return figure


def training_plot(evaluations: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw log loss and AUROC after each evaluated round, with two standard errors of the noise.

    Args:
        evaluations: As metrics.json holds them; two and more.
    """
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 3.2), layout="constrained")
        for axes, key, name in zip(
            figure.subplots(1, 2), ("log_loss", "auroc"), ("log loss (lower is better)", "AUROC"), strict=True
        ):
            shown = [one for one in evaluations if key in one["figures"]]
            axes.errorbar(
                [one["round"] for one in shown],
                [one["figures"][key]["value"] for one in shown],
                yerr=[2 * one["figures"][key]["noise_error"] for one in shown],
                fmt="o-",
                color=BLUE,
                markersize=5,
                linewidth=1.6,
            )
            axes.set_xlabel("round")
            axes.set_title(name, fontsize=11, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _grid(axes)
        return figure


def calibration_plot(evaluation: Mapping[str, Any]) -> Figure:
    """Draw actual against predicted bad loans in tenths of the held-out loans, with what noise does to them.

    Args:
        evaluation: As it stands in metrics.json, with a calibration of one tenth at least.
    """
    tenths = evaluation["calibration"]
    predicted = [tenth["predicted"] for tenth in tenths]
    actual = [tenth["actual"]["value"] for tenth in tenths]
    errors = [tenth["actual"]["noise_error"] for tenth in tenths]
    largest = min(1.0, 1.1 * max(*predicted, *actual))
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.plot([0, largest], [0, largest], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
        axes.errorbar(
            predicted,
            actual,
            yerr=[2 * error for error in errors] if max(errors) > 0 else None,
            fmt="o-",
            color=BLUE,
            markersize=7,
            linewidth=1.6,
            elinewidth=2.2,
            label="federated" + (", ± 2 standard errors of the noise" if max(errors) > 0 else ""),
        )
        axes.set_xlabel("predicted share of bad loans")
        axes.set_ylabel("actual share")
        axes.legend(loc="upper left", frameon=False)
        return figure


def fairness_plot(evaluation: Mapping[str, Any]) -> Figure:
    """Draw how each protected group's accepted share differs from that of its column's largest group.

    Args:
        evaluation: As it stands in metrics.json, with a group that noise leaves something of.
    """
    rows: list[tuple[str, float, float]] = []
    for column in evaluation["fairness"]:
        for group in column["groups"]:
            parity = group["parity"]
            if group["label"] == column["reference"] or parity is None:
                continue
            error = (parity["noise_error"] ** 2 + parity["sampling_error"] ** 2) ** 0.5
            rows.append((f"{column['column']}: {group['label']}", 100 * parity["value"], 200 * error))
    rows.reverse()
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 1.2 + 0.38 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=GREY, linewidth=1.2, zorder=0)
        for place, (_, value, error) in enumerate(rows):
            axes.errorbar(value, place, xerr=error, fmt="o", color=BLUE, markersize=7, elinewidth=2.2)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(
            "accepted share less that of the largest group, percentage points (± 2 standard errors)"
        )
        axes.grid(axis="x", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        return figure


def epsilon_plot(planned: float, borrower: tuple[float, float, float], measured: float | None) -> Figure:
    """Draw the plan's epsilon, that of a borrower of one to three lenders, and what an attack showed.

    Args:
        planned: Epsilon of the plan, RDP.
        borrower: Of a borrower known to 1, 2, 3 lenders, PLD.
        measured: Lower bound by an audit; None where none was made.
    """
    rows = [
        ("the plan", planned, GREY),
        ("a borrower of 1 lender", borrower[0], BLUE),
        ("of 2 lenders", borrower[1], BLUE),
        ("of 3 lenders", borrower[2], BLUE),
    ]
    if measured is not None:
        rows.append(("shown by the attack (at least)", measured, ORANGE))
    rows.reverse()
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 0.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh(range(len(rows)), [value for _, value, _ in rows], color=[hue for _, _, hue in rows])
        axes.bar_label(bars, [f"{value:.2f}" for _, value, _ in rows], padding=4, fontsize=10)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel("epsilon (lower is better)")
        return figure


def gain_plot(gains: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Draw each lender's gain in AUROC over its own model, with its 95% interval.

    Args:
        gains: Name, gain, lower and upper end; where one party knows them all, as in a simulation.
    """
    rows = sorted(gains, key=lambda row: row[1])
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8.2, 1.2 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=GREY, linewidth=1.2, zorder=0)
        for place, (_, gain, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2.2, alpha=0.45)
            axes.plot(gain, place, "o", color=BLUE, markersize=8)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("gain in AUROC: federated minus alone")
        axes.grid(axis="x", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        return figure


def _grid(*found: Axes) -> None:
    for axes in found:
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)

"""The demo's report: one HTML file that opens without a network, with its plots."""

import io
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from fedfin.audit.evaluation_view import evaluation_view
from fedfin.audit.pack_plots import BLUE, GREY, ORANGE, PLOT_STYLE, calibration_plot, report_style, svg
from fedfin.client.costs import costs_of
from fedfin.files import write_public
from fedfin.privacy.accounting import borrower_epsilon
from fedfin.simulation.partition import RULE, demo_loans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedfin.simulation.demo import DemoResult, LenderResult

__all__ = ["arms_plot", "gain_plot", "how_summed", "write_report"]


def write_report(result: "DemoResult") -> Path:
    """Write report.html (and the plots as PNG files beside it) into the demo's folder; return its path.

    Raises:
        ConfigError: The folder cannot be written.
    """
    plots = {"arms": arms_plot(result), "gain": gain_plot(result)}
    if result.evaluation is not None and result.evaluation["calibration"]:
        plots["calibration"] = calibration_plot(result.evaluation)
    for name, figure in plots.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        write_public(result.directory / f"{name}.png", png.getvalue())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        (resources.files("fedfin.simulation") / "report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        style=report_style(),
        headline=_headline(result),
        summary=_summary(result),
        arms_plot=svg(plots["arms"]),
        gain_plot=svg(plots["gain"]),
        calibration_plot=svg(plots["calibration"]) if "calibration" in plots else None,
        evaluation=None if result.evaluation is None else evaluation_view(result.evaluation),
        lenders=result.lenders,
        num_holdout=result.num_holdout,
        budget=result.budget,
        borrower=_borrower(result),
        how_summed=how_summed(result),
        trust=_trust(result),
        plan=result.plan,
        rounds=result.rounds,
        round_seconds=median(line["seconds"] for line in result.rounds),
        missing=_missing(result),
        seconds=result.seconds,
        seed=result.seed,
        rule=" ".join(RULE.split()),
        next_commands=_next_commands(result),
    )
    path = result.directory / "report.html"
    write_public(path, page.encode())
    return path


def arms_plot(result: "DemoResult") -> Figure:
    """Draw each lender's AUROC alone and federated, joined by a line, with the pooled model as a dashed line."""
    lenders = _ordered(result)
    pooled = lenders[0].pooled["auc"]
    with mpl.rc_context(PLOT_STYLE):
        figure, axes = _figure(len(lenders))
        for row, lender in enumerate(lenders):
            alone, federated = lender.alone["auc"], lender.federated["auc"]
            axes.plot(
                [alone, federated], [row, row], color="#ccd3dc", linewidth=3, solid_capstyle="round", zorder=1
            )
            axes.plot(
                alone, row, "s", color=ORANGE, markersize=8, zorder=2, label="alone" if row == 0 else None
            )
            axes.plot(
                federated,
                row,
                "o",
                color=BLUE,
                markersize=9,
                zorder=3,
                label="federated" if row == 0 else None,
            )
        axes.axvline(pooled, color=GREY, linestyle="--", linewidth=1.2, zorder=0, label="all loans pooled")
        _rows(axes, lenders)
        axes.set_xlabel("AUROC on the held-out loans (higher is better)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=3, frameon=False)
        return figure


def gain_plot(result: "DemoResult") -> Figure:
    """Draw each lender's gain in AUROC with its 95% interval."""
    lenders = _ordered(result)
    with mpl.rc_context(PLOT_STYLE):
        figure, axes = _figure(len(lenders))
        axes.axvline(0, color=GREY, linewidth=1.2, zorder=0)
        for row, lender in enumerate(lenders):
            gain, low, high = lender.gain
            axes.plot([low, high], [row, row], color=BLUE, linewidth=2.2, alpha=0.45, solid_capstyle="round")
            axes.plot(gain, row, "o", color=BLUE, markersize=8)
            axes.annotate(
                f"{gain:+.3f}",
                (gain, row),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        _rows(axes, lenders)
        axes.set_xlabel("gain in AUROC: federated minus alone")
        return figure


def _figure(rows: int) -> "tuple[Figure, Axes]":
    figure = Figure(figsize=(8.2, 1.3 + 0.48 * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="x", color="#e8ecf1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _rows(axes: "Axes", lenders: "list[LenderResult]") -> None:
    axes.set_yticks(range(len(lenders)), [f"{lender.name}  ({lender.n_train} loans)" for lender in lenders])
    axes.set_ylim(-0.6, len(lenders) - 0.4)


def _ordered(result: "DemoResult") -> "list[LenderResult]":
    """Small lenders at the bottom, each group by what it gains."""
    return sorted(result.lenders, key=lambda lender: (lender.kind == "bank", lender.gain[0]))


def _small_gain(result: "DemoResult") -> float | None:
    gains = [lender.gain[0] for lender in result.lenders if lender.kind == "small"]
    return fmean(gains) if gains else None


def _headline(result: "DemoResult") -> str:
    gain = _small_gain(result)
    if gain is None:
        return f"{len(result.lenders)} lenders trained one model together"
    word = "gain" if gain >= 0 else "lose"
    return f"Small lenders {word} {abs(gain):.3f} AUROC by training with others"


def _summary(result: "DemoResult") -> str:
    guarantee = (
        "without differential privacy"
        if result.epsilon is None
        else f"with differential privacy (epsilon {result.epsilon:g}, delta {result.plan.privacy.delta:g})"
    )
    federated, pooled = result.lenders[0].federated["auc"], result.lenders[0].pooled["auc"]
    lowest = min(result.lenders, key=lambda lender: lender.gain[0])
    loser = (
        f" {lowest.name} does better alone, by {-lowest.gain[0]:.3f}."
        if lowest.gain[0] < 0
        else " Nobody does worse."
    )
    return (
        f"{len(result.lenders)} lenders trained one model {guarantee}, each on its own loans. It reaches an AUROC of"
        f" {federated:.3f}; a model of all loans pooled reaches {pooled:.3f}.{loser}"
    )


def _borrower(result: "DemoResult") -> list[tuple[int, float]]:
    plan = result.plan
    if result.epsilon is None:
        return []
    _, schema = demo_loans()
    events = costs_of(plan, schema, len(result.lenders)).whole
    return [(count, borrower_epsilon(events, plan.privacy.delta, num_lenders=count)) for count in (1, 2, 3)]


def how_summed(result: "DemoResult") -> str:
    """Return in a sentence or two what the coordinator saw of the updates, and what that took."""
    if result.plan.aggregation == "plain":
        return "The coordinator saw each lender's update by itself: a sum of two would tell each the other's."
    last = result.rounds[-1]
    vector = f"{last['answer_bytes'] / 1000:.1f} kB"
    return (
        "Updates were summed under secure aggregation: the coordinator saw sums over the lenders and no single update,"
        f" weight or figure. A round took {median(line['exchanges'] for line in result.rounds):.0f} exchanges with each"
        f" lender, and a masked update {vector}."
    )


def _trust(result: "DemoResult") -> str:
    """Return what the guarantee rests on."""
    privacy, num_lenders = result.plan.privacy, len(result.lenders)
    if privacy.mode == "local":
        return "Each lender adds the whole noise itself, and nobody else is trusted for its loans."
    if privacy.mode == "none":
        return ""
    colluders, dropouts = privacy.planned_colluders, privacy.planned_dropouts
    return (
        "Each lender adds a share of the noise, and the sum has it once. The figure holds while no more than"
        f" {colluders} of the {num_lenders} lenders tell others their share, and at least {num_lenders - dropouts}"
        " answer in each sum; a lender refuses to open a sum of fewer."
    )


def _missing(result: "DemoResult") -> str:
    times: dict[str, int] = {}
    for line in result.rounds:
        for name in line["missing"]:
            times[name] = times.get(name, 0) + 1
    return ", ".join(f"{name} ({count} rounds)" for name, count in sorted(times.items()))


def _next_commands(result: "DemoResult") -> str:
    lender: Any = result.directory / "lenders" / result.lenders[0].name / "bank.yaml"
    coordinator = result.directory / "coordinator" / "federation.yaml"
    return "\n".join(
        [
            f"fedfin client status --config {lender}",
            f"fedfin client check --config {lender}",
            f"fedfin server status --config {coordinator}",
            "fedfin demo --no-privacy",
            "fedfin server init my-federation",
        ]
    )

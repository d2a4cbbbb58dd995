"""The last evaluation of a run, in the words of a report: from metrics.json, which holds sums only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["EvaluationView", "FigureRow", "GroupRow", "evaluation_view", "last_evaluation"]

_NAMES: Final = {
    "auroc": ("AUROC", "%.3f"),
    "ks": ("KS", "%.3f"),
    "brier": ("Brier score", "%.3f"),
    "log_loss": ("log loss", "%.3f"),
    "bad_rate": ("share of bad loans", "%.3f"),
    "calibration_ratio": ("predicted / actual bad", "%.2f"),
}


@dataclass(frozen=True, slots=True)
class FigureRow:
    """A figure in words; `error` is empty for exact counts."""

    name: str
    value: str
    error: str


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A protected group's shares in words; what noise hides is "hidden"."""

    column: str
    group: str
    loans: str
    accepted: str
    parity: str
    good_accepted: str
    opportunity: str


@dataclass(frozen=True, slots=True)
class EvaluationView:
    """What the report shows of an evaluation.

    Attributes:
        lenders: Lenders in the sum.
        is_noisy: Whether the counts had noise.
        figures: Those that noise leaves something of.
        hidden: Names of the others.
        cutoff: Probability of default from which on a loan counts as rejected.
        groups: Every group that noise leaves something of.
        hidden_groups: The others, as "column: group".
    """

    lenders: int
    is_noisy: bool
    figures: tuple[FigureRow, ...]
    hidden: tuple[str, ...]
    cutoff: float
    groups: tuple[GroupRow, ...]
    hidden_groups: tuple[str, ...]


def last_evaluation(run: Path) -> Mapping[str, Any] | None:
    """Return the last evaluation of a run directory's metrics.json; None where none was made."""
    path = run / "metrics.json"
    if not path.exists():
        return None
    evaluations: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
    return evaluations[-1]


def evaluation_view(evaluation: Mapping[str, Any]) -> EvaluationView:
    """Return what the report shows of an evaluation, as it stands in metrics.json."""
    noisy = evaluation["noise_stddev"] > 0.0
    figures = evaluation["figures"]
    return EvaluationView(
        lenders=evaluation["lenders"],
        is_noisy=noisy,
        figures=tuple(
            FigureRow(
                name,
                form % figures[key]["value"],
                form % figures[key]["noise_error"] if noisy else "",
            )
            for key, (name, form) in _NAMES.items()
            if key in figures
        ),
        hidden=tuple(_NAMES[key][0] for key in evaluation["hidden_by_noise"]),
        cutoff=evaluation["cutoff"],
        groups=tuple(
            _group(column, group) for column in evaluation["fairness"] for group in column["groups"]
        ),
        hidden_groups=tuple(
            f"{column['column']}: {label}" for column in evaluation["fairness"] for label in column["hidden"]
        ),
    )


def _group(column: Mapping[str, Any], group: Mapping[str, Any]) -> GroupRow:
    reference = group["label"] == column["reference"]
    return GroupRow(
        column=column["column"],
        group=group["label"],
        loans=f"{group['loans']['value']:.0f}",
        accepted=_rate(group["accepted"]),
        parity="reference" if reference else _difference(group["parity"]),
        good_accepted=_rate(group["good_accepted"]),
        opportunity="reference" if reference else _difference(group["opportunity"]),
    )


def _rate(rate: Mapping[str, float] | None) -> str:
    return "hidden" if rate is None else f"{rate['value']:.1%}"


def _difference(rate: Mapping[str, float] | None) -> str:
    if rate is None:
        return "hidden"
    both = (rate["noise_error"] ** 2 + rate["sampling_error"] ** 2) ** 0.5
    return f"{100 * rate['value']:+.1f} ± {100 * both:.1f}"

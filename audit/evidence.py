"""What an evidence pack says: the report to read, the model card, and the same as one JSON document.

Everything is taken from the run directory and its log; what rests on the arithmetic of privacy, which this layer does
not know, is handed in. A section that the run holds nothing for is left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Final

import jinja2
from markupsafe import Markup

from fedfin.audit.evaluation_view import EvaluationView, evaluation_view
from fedfin.audit.log_story import LogStory
from fedfin.audit.obligations import OBLIGATIONS
from fedfin.audit.pack_plots import (
    calibration_plot,
    epsilon_plot,
    fairness_plot,
    gain_plot,
    report_style,
    rounds_plot,
    svg,
    training_plot,
)
from fedfin.audit.run_record import Round, RunRecord

__all__ = [
    "AuditBound",
    "ColumnCard",
    "Evidence",
    "Gain",
    "PrivacyFigures",
    "to_html",
    "to_json",
    "to_model_card",
]

_MOST_ROUNDS_SHOWN: Final = 40
_ENDS_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class PrivacyFigures:
    """What a job costs each loan of each lender.

    Attributes:
        mechanism: In words.
        delta: Of the plan.
        epsilon_rdp: Of the whole job on the training loans, by RDP.
        epsilon_pld: The same by PLD.
        borrower: Epsilon of a borrower with a loan at each of 1, 2, 3 lenders, PLD.
        bins_noise: Noise multiplier of the histograms.
        training_noise: Noise multiplier of a step.
        rests_on: Whom the guarantee trusts, in words.
    """

    mechanism: str
    delta: float
    epsilon_rdp: float
    epsilon_pld: float
    borrower: tuple[float, float, float]
    bins_noise: float
    training_noise: float
    rests_on: str


@dataclass(frozen=True, slots=True)
class AuditBound:
    """What an attack on the training code showed, by `fedfin privacy audit --json`.

    Attributes:
        measured: Lower bound on epsilon.
        claimed: Upper bound by the ledger, PLD.
        confidence: Of the verdict.
        passed: Whether nothing contradicted the claim.
    """

    measured: float
    claimed: float
    confidence: float
    passed: bool


@dataclass(frozen=True, slots=True)
class ColumnCard:
    """A column as the model card shows it; `use` is yes, no, or the reason why a protected one is an input."""

    name: str
    kind: str
    description: str
    use: str
    is_protected_input: bool = False


@dataclass(frozen=True, slots=True)
class Gain:
    """What a lender's own figures say of the federated model; known to one party in a simulation only."""

    lender: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a pack tells.

    Attributes:
        run: The run directory.
        story: What its log tells; None where it has none.
        privacy: None without privacy.
        audit: None where no audit was handed in.
        columns: Of the schema.
        label: What a bad loan is, in words; empty where the schema does not say.
        gains: In a simulation; empty in a federation.
        is_simulated: Whether one machine played every lender.
    """

    run: RunRecord
    story: LogStory | None
    privacy: PrivacyFigures | None
    audit: AuditBound | None = None
    columns: tuple[ColumnCard, ...] = ()
    label: str = ""
    gains: tuple[Gain, ...] = ()
    is_simulated: bool = False

    @property
    def evaluation(self) -> EvaluationView | None:
        """The last evaluation in words."""
        return evaluation_view(self.run.evaluations[-1]) if self.run.evaluations else None


def to_html(evidence: Evidence, name: str) -> str:
    """Return report.html: one page, no script, nothing loaded from elsewhere.

    Args:
        evidence: What to tell.
        name: Of the pack's folder or file, for the command that verifies it.
    """
    run = evidence.run
    return _render(
        "evidence.html.j2",
        style=report_style(),
        name=name,
        headline=_headline(run),
        summary=_summary(evidence),
        simulated=evidence.is_simulated,
        run=run,
        plan=run.plan,
        story=evidence.story,
        lenders=_lender_rows(evidence),
        shown_rounds=_shown(run.rounds),
        num_lost=sum(found.is_lost for found in run.rounds),
        missing=_missing(run.rounds),
        plots=_plots(evidence),
        evaluation=evidence.evaluation,
        protected_features=[column.name for column in evidence.columns if column.is_protected_input],
        privacy=evidence.privacy,
        audit=evidence.audit,
        lineage=_lineage(evidence),
        obligations=OBLIGATIONS,
    )


def to_model_card(evidence: Evidence) -> str:
    """Return model-card.md."""
    run = evidence.run
    return _render(
        "model-card.md.j2",
        run=run,
        plan=run.plan,
        evaluation=evidence.evaluation,
        privacy=evidence.privacy,
        columns=evidence.columns,
        label=evidence.label,
    )


def to_json(evidence: Evidence) -> str:
    """Return evidence.json: what the report says, for programs."""
    run = evidence.run
    document = {
        "format": "fedfin evidence 1",
        "job": run.job,
        "federation": run.federation,
        "simulated": evidence.is_simulated,
        "plan": run.plan.model_dump(mode="json"),
        "accepted": run.accepted,
        "refused": run.refused,
        "rounds": [asdict(found) for found in run.rounds],
        "evaluations": run.evaluations,
        "privacy": None
        if evidence.privacy is None
        else asdict(evidence.privacy) | {"relation": "add_or_remove_one"},
        "audit": None if evidence.audit is None else asdict(evidence.audit),
        "lineage": dict(_lineage(evidence)),
        "log": None if evidence.story is None else asdict(evidence.story),
        "gains": [asdict(gain) for gain in evidence.gains],
        "duties": [asdict(row) for row in OBLIGATIONS],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _headline(run: RunRecord) -> str:
    if run.model is None:
        return f"Job {run.job} of {run.federation}: no model was released"
    return f"Evidence of the model {run.model.digest[:12]} of {run.federation}"


def _summary(evidence: Evidence) -> str:
    run = evidence.run
    privacy = evidence.privacy
    guarantee = (
        "without differential privacy"
        if privacy is None
        else f"under differential privacy (epsilon {privacy.epsilon_rdp:.2f} at delta {privacy.delta:g} for each loan)"
    )
    seen = "seeing sums only" if run.plan.aggregation == "secure" else "seeing each lender's updates"
    story = evidence.story
    kept = (
        "This release kept no signed log of it."
        if story is None
        else f"What happened stands in a signed log of {story.size} entries"
        + (
            f", of which {len(story.cosigned_by)} lenders cosigned the first {story.covered}."
            if story.cosigned_by
            else ", which nobody cosigned."
        )
    )
    return (
        f"{len(run.accepted)} lenders trained one {run.plan.model.kind} model in {len(run.completed_rounds)} rounds"
        f" {guarantee}, the coordinator {seen}. {kept}"
    )


def _lender_rows(evidence: Evidence) -> list[Mapping[str, str]]:
    run, story = evidence.run, evidence.story
    names = {*run.accepted, *run.refused, *(() if story is None else story.members)}
    rows: list[Mapping[str, str]] = []
    for name in sorted(names):
        decision = "accepted" if name in run.accepted else "no part"
        if name in run.refused and name not in run.accepted:
            decision = f"refused: {run.refused[name]}"
        if story is not None and name in story.consents:
            logged, is_signed = story.consents[name]
            decision = logged if decision.startswith(logged) else f"{decision} (the log says {logged})"
            decision += ", signed by it" if is_signed else ""
        member = None if story is None else story.members.get(name)
        rows.append(
            {
                "name": name + (" (revoked)" if member and member.revoked else ""),
                "decision": decision,
                "identity": "" if member is None else member.identity,
                "witness": "" if member is None else member.witness or "",
            }
        )
    return rows


def _shown(rounds: Sequence[Round]) -> list[Round]:
    """All rounds, or of many the first and last and those in which something went wrong."""
    if len(rounds) <= _MOST_ROUNDS_SHOWN:
        return list(rounds)
    ends = {*range(_ENDS_SHOWN), *range(len(rounds) - _ENDS_SHOWN, len(rounds))}
    return [found for place, found in enumerate(rounds) if place in ends or found.is_lost or found.missing]


def _missing(rounds: Sequence[Round]) -> list[tuple[str, int]]:
    times: dict[str, int] = {}
    for found in rounds:
        for name in found.missing:
            times[name] = times.get(name, 0) + 1
    return sorted(times.items())


def _plots(evidence: Evidence) -> Mapping[str, Markup | None]:
    run = evidence.run
    last: Mapping[str, Any] = run.evaluations[-1] if run.evaluations else {}
    has_groups = any(
        group["parity"] is not None and group["label"] != column["reference"]
        for column in last.get("fairness", ())
        for group in column["groups"]
    )
    privacy = evidence.privacy
    measured = None if evidence.audit is None else evidence.audit.measured
    return {
        "rounds": svg(rounds_plot(run.rounds)) if run.rounds else None,
        "training": svg(training_plot(run.evaluations)) if len(run.evaluations) > 1 else None,
        "calibration": svg(calibration_plot(last)) if last.get("calibration") else None,
        "fairness": svg(fairness_plot(last)) if has_groups else None,
        "gain": svg(gain_plot([(one.lender, one.gain, one.low, one.high) for one in evidence.gains]))
        if evidence.gains
        else None,
        "epsilon": None
        if privacy is None
        else svg(epsilon_plot(privacy.epsilon_rdp, privacy.borrower, measured)),
    }


def _lineage(evidence: Evidence) -> list[tuple[str, str]]:
    run, story = evidence.run, evidence.story
    found = [
        ("federation: root certificate", run.root_fingerprint),
        ("plan of the job", run.plan_digest),
        ("schema: columns and label", run.schema_fingerprint),
    ]
    if run.model is not None:
        found.append(("schema, bins and architecture", run.model.fingerprint))
    if story is not None and story.models:
        found.append(("model before the first round", story.models[min(story.models)][0]))
    if run.model is not None:
        found += [("released model", run.model.digest), ("its weights, model.safetensors", run.model.weights)]
    return found


def _render(template: str, **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=jinja2.select_autoescape(("html.j2",)),  # Markdown has no escaping of its own
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _template(name: str) -> str:
    return (resources.files("fedfin.audit") / name).read_text(encoding="utf-8")

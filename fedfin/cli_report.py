"""`fedfin report`: the evidence pack of a finished run, one folder or file that a stranger can check alone."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedfin.cli_output import DebugOption, JsonOption, guarded, print_json, say
from fedfin.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedfin.audit.evidence import AuditBound, ColumnCard, Evidence, Gain, PrivacyFigures
    from fedfin.audit.pack import Pack
    from fedfin.audit.run_record import RunRecord
    from fedfin.credit.schema import Schema

__all__ = ["EPILOG", "evidence_of", "make_pack", "report"]

EPILOG: Final = "Example:  fedfin report fed/runs/credit-1a2b3c4d --zip"

_RESTS_ON: Final = {
    "local": "Each lender adds the whole noise itself, and nobody else is trusted for its loans.",
    "shared": (
        "Each lender adds a share of the noise, and the sum has it once. The figure holds while no more than"
        " {colluders} of the lenders tell others their share, and no more than {dropouts} are missing in a sum; a"
        " lender refuses to open a sum of fewer."
    ),
}
_MECHANISM: Final = {
    "local": "Gaussian noise on clipped gradients and on histograms, added by each lender for itself (DP-SGD)",
    "shared": "discrete Gaussian noise on clipped gradients and on histograms, in shares under secure aggregation",
}


def report(
    run: Annotated[
        Path, typer.Argument(help="The directory of a run, such as fed/runs/credit-1a2b3c4d.", exists=True)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The pack's folder; default: NAME-evidence beside the run.", show_default=False
        ),
    ] = None,
    as_zip: Annotated[bool, typer.Option("--zip", help="One zip file in place of a folder.")] = False,
    audit: Annotated[
        Path | None,
        typer.Option(
            "--audit",
            help="What `fedfin privacy audit --json` printed for this plan, to state it beside epsilon.",
            show_default=False,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a run's evidence pack: report, model card, the run's files and its log, under one manifest.

    It reads the run and changes nothing in it. Beside the coordinator's keys the manifest is signed, and the export
    logged; anywhere else the pack is made all the same, and only the seal of the run in it is signed.
    """

    def work() -> None:
        pack = make_pack(run, out, as_zip=as_zip, audit=audit)
        if json_out:
            print_json(
                {
                    "pack": str(pack.path),
                    "report": None if pack.report is None else str(pack.report),
                    "manifest": pack.manifest,
                    "signed": pack.is_signed,
                }
            )
            return
        say(f"evidence pack: {pack.path}")
        if pack.report is not None:
            say(f"to read: {pack.report}")
        say(f"to check, anywhere and without a network: fedfin audit verify {pack.path}")

    guarded(work, json_out=json_out, debug=debug)


def make_pack(
    run: Path,
    out: Path | None,
    *,
    as_zip: bool = False,
    audit: Path | None = None,
    gains: "Sequence[Gain]" = (),
    is_simulated: bool = False,
) -> "Pack":
    """Write the pack of a run.

    Args:
        run: The run directory.
        out: The pack; None puts it beside the run.
        as_zip: One file.
        audit: What `fedfin privacy audit --json` printed.
        gains: Of each lender, in a simulation.
        is_simulated: Whether one machine played every lender.

    Raises:
        AuditError: The run is not sealed, it or its log does not parse, the audit is of another plan, the pack exists.
        ConfigError: The pack cannot be written.
    """
    from fedfin.audit.access import LOG_FILE, owners_key, record
    from fedfin.audit.events import Export
    from fedfin.audit.pack import write_pack
    from fedfin.audit.sealing import is_sealed
    from fedfin.identity import load_identity_key

    if not is_sealed(run):
        msg = (
            f"{run} is not sealed: its job still runs, or ended without a model; nobody could verify a pack of it."
            " Its entries stand in the coordinator's log: `fedfin audit show` on its folder, with --job"
        )
        raise AuditError(msg)
    target = out or run.with_name(f"{run.resolve().name}-evidence" + (".zip" if as_zip else ""))
    log = (
        run.resolve().parent.parent / LOG_FILE
    )  # the run lies in runs/ of the coordinator's folder, or is a copy
    key = owners_key(log) if log.is_file() else None
    evidence = evidence_of(run, audit=audit, gains=gains, is_simulated=is_simulated)
    pack = write_pack(
        evidence,
        target,
        as_zip=as_zip,
        key=None if key is None else load_identity_key(key, "`fedfin server init`"),
    )
    if key is not None:
        try:
            record(log, Export(what="evidence pack", digest=pack.manifest))
        except BaseException:  # what was not logged is not given out
            target.unlink() if as_zip else shutil.rmtree(target)
            raise
    return pack


def evidence_of(
    run: Path, *, audit: Path | None = None, gains: "Sequence[Gain]" = (), is_simulated: bool = False
) -> "Evidence":
    """Return what the pack of a run tells; errors as `make_pack`."""
    from fedfin.audit.evidence import Evidence
    from fedfin.audit.log_story import read_story
    from fedfin.audit.run_record import read_run

    record = read_run(run)
    log = run / "audit.db"
    schema = _schema_of(record)
    return Evidence(
        run=record,
        story=read_story(log, record.job) if log.exists() else None,
        privacy=None if schema is None else _privacy_of(record, schema),
        audit=None if audit is None else _audit_of(audit, record),
        columns=() if schema is None else tuple(_columns(schema)),
        label="" if schema is None else schema.label.definition or "",
        gains=tuple(gains),
        is_simulated=is_simulated,
    )


def _schema_of(record: "RunRecord") -> "Schema | None":
    from fedfin.credit.schema import Schema

    if record.model is None:
        return None
    return Schema.from_yaml(record.model.schema, origin=str(record.path / "model" / "model.json"))


def _privacy_of(record: "RunRecord", schema: "Schema") -> "PrivacyFigures | None":
    from fedfin.audit.evidence import PrivacyFigures
    from fedfin.client.costs import costs_of
    from fedfin.privacy.accounting import borrower_epsilons, epsilon_pld, epsilon_rdp

    plan = record.plan
    privacy = plan.privacy
    if privacy.mode == "none":
        return None
    costs = costs_of(plan, schema, max(len(record.accepted), plan.cohort.min_lenders))
    return PrivacyFigures(
        mechanism=_MECHANISM[privacy.mode],
        delta=privacy.delta,
        epsilon_rdp=epsilon_rdp(costs.whole, privacy.delta),
        epsilon_pld=epsilon_pld(costs.whole, privacy.delta),
        borrower=borrower_epsilons(costs.whole, privacy.delta),
        bins_noise=costs.noise.bins_noise_multiplier,
        training_noise=costs.noise.training_noise_multiplier,
        rests_on=_RESTS_ON[privacy.mode].format(
            colluders=privacy.planned_colluders, dropouts=privacy.planned_dropouts
        ),
    )


def _audit_of(path: Path, record: "RunRecord") -> "AuditBound":
    from fedfin.audit.evidence import AuditBound

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        of = str(found["model"]), float(found["epsilon_plan"]), float(found["delta"]), int(found["num_steps"])
        bound = AuditBound(
            measured=float(found["epsilon_measured"]),
            claimed=float(found["claim_pld"]),
            confidence=float(found["confidence"]),
            passed=found["passed"] is True,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"--audit {path} is not what `fedfin privacy audit --json` prints; run it again and keep its output"
        raise AuditError(msg) from error
    plan = record.plan
    wanted = plan.model.kind, plan.privacy.epsilon, plan.privacy.delta, plan.num_steps
    if of != wanted:
        msg = (
            f"--audit {path} is of {of[0]}, epsilon {of[1]:g}, delta {of[2]:g}, {of[3]} steps, and this run's plan is"
            f" {wanted[0]}, epsilon {wanted[1]:g}, delta {wanted[2]:g}, {wanted[3]} steps; audit this plan"
        )
        raise AuditError(msg)
    return bound


def _columns(schema: "Schema") -> "Sequence[ColumnCard]":
    from fedfin.audit.evidence import ColumnCard

    return [
        ColumnCard(
            name=column.name,
            kind=column.kind,
            description=column.description,
            use=(
                "no: protected"
                if not column.is_feature
                else f"yes, though protected: {column.protected_as_feature}"
                if column.protected
                else "yes"
            ),
            is_protected_input=column.protected and column.is_feature,
        )
        for column in schema.columns
    ]

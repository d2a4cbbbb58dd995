"""`fedfin client check`: the lender's table against the federation's schema, before anything is shared."""

from dataclasses import replace
from pathlib import Path

from fedfin.client.folder import LenderFolder
from fedfin.credit.drift import Reference
from fedfin.credit.quality import Finding, QualityReport, check_source
from fedfin.credit.schema import Schema
from fedfin.errors import SchemaMismatchError

__all__ = ["check", "check_folder", "check_held_out"]

_NO_LOAN_ID = Finding(
    severity="note",
    rule="no_loan_id",
    column=None,
    rows=(),
    lines=(),
    count=1,
    message=(
        "no column numbers the loans, so the privacy budget takes a row that is edited later (a balance, an outcome)"
        " for a new loan that has given nothing yet"
    ),
    mend="if these loans are ever extracted again, name a column with a number of their own in data.loan_id",
)


def check_folder(config_path: Path) -> tuple[QualityReport, QualityReport | None]:
    """Read the tables named in bank.yaml and report every fault at once.

    Returns:
        The report on the loans, and that on holdout.source where there is one.

    Raises:
        ConfigError: bank.yaml or schema.yaml does not hold, or the source cannot be opened.
        DataError: The source holds no table at all.
    """
    folder = LenderFolder(config_path)
    schema = folder.schema()
    return check(folder, schema), check_held_out(folder, schema)


def check_held_out(folder: LenderFolder, schema: Schema) -> QualityReport | None:
    """Report on holdout.source of an open folder, or None where there is none; errors as `check_folder`."""
    source = folder.config.holdout.source
    if source is None:
        return None
    return check_source(source, schema, folder.directory, acknowledged=frozenset(source.accepted_leaks))


def check(folder: LenderFolder, schema: Schema) -> QualityReport:
    """Report on the table of an open folder; errors as `check_folder`."""
    data = folder.config.data
    report = check_source(
        data,
        schema,
        folder.directory,
        reference=_reference(folder, schema),
        acknowledged=frozenset(data.accepted_leaks),
    )
    return report if data.loan_id is not None else replace(report, findings=(*report.findings, _NO_LOAN_ID))


def _reference(folder: LenderFolder, schema: Schema) -> Reference | None:
    """Return the federation's reference distribution, where the coordinator gave one."""
    path = folder.directory / "reference.json"
    try:
        return Reference.from_json(path.read_text(encoding="utf-8"), schema) if path.exists() else None
    except (SchemaMismatchError, OSError, UnicodeDecodeError):
        return None  # of an earlier schema, or damaged: drift is left out, and keeps nobody from taking part

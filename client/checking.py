"""`fedfin client check`: the lender's table against the federation's schema, before anything is shared."""

from pathlib import Path

from fedfin.client.folder import LenderFolder
from fedfin.credit.drift import Reference
from fedfin.credit.quality import QualityReport, check_source
from fedfin.credit.schema import Schema
from fedfin.errors import SchemaMismatchError

__all__ = ["check", "check_folder", "check_held_out"]


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
    return check_source(
        data,
        schema,
        folder.directory,
        reference=_reference(folder, schema),
        acknowledged=frozenset(data.accepted_leaks),
    )


def _reference(folder: LenderFolder, schema: Schema) -> Reference | None:
    """Return the federation's reference distribution, where the coordinator gave one."""
    path = folder.directory / "reference.json"
    try:
        return Reference.from_json(path.read_text(encoding="utf-8"), schema) if path.exists() else None
    except (SchemaMismatchError, OSError, UnicodeDecodeError):
        return None  # of an earlier schema, or damaged: drift is left out, and keeps nobody from taking part

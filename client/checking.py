"""`fedfin client check`: the lender's table against the federation's schema, before anything is shared."""

from pathlib import Path

from fedfin.client.folder import LenderFolder
from fedfin.credit.drift import Reference
from fedfin.credit.quality import QualityReport, check_source
from fedfin.credit.schema import Schema

__all__ = ["check", "check_folder"]


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
    source = folder.config.holdout.source
    held_out = (
        None
        if source is None
        else check_source(source, schema, folder.directory, acknowledged=frozenset(source.accepted_leaks))
    )
    return check(folder, schema), held_out


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
    return Reference.from_json(path.read_text(encoding="utf-8"), schema) if path.exists() else None

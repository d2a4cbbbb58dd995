"""`fedfin client check`: the lender's table against the federation's schema, before anything is shared."""

from pathlib import Path

from fedfin.client.folder import LenderFolder
from fedfin.credit.quality import QualityReport, check_table
from fedfin.credit.source import load_table, refuse_unknown_names

__all__ = ["check_folder"]


def check_folder(config_path: Path) -> QualityReport:
    """Read the table named in bank.yaml and report every fault at once.

    Raises:
        ConfigError: bank.yaml or schema.yaml does not hold, or the source cannot be opened.
        DataError: The source holds no table at all.
    """
    folder = LenderFolder(config_path)
    schema = folder.schema()
    refuse_unknown_names(folder.config.data, schema)
    return check_table(load_table(folder.config.data, folder.directory), schema)

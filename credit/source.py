"""Loans from where a lender keeps them, under the federation's names and spellings.

`load_table` reads a file (`files`) or a database (`database`) and interprets nothing: a cell of a CSV file
stays text, so that a mistyped number is found at its place by `cells.parse_table` and never silently
coerced. `read_loans` gives the loans of a job, or refuses with the first fault.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedfin.config import DataSource
from fedfin.credit.cells import Fault, distinct_cells, parse_table, spelling
from fedfin.credit.database import read_database
from fedfin.credit.files import read_file
from fedfin.credit.loan_ids import parse_loan_ids
from fedfin.credit.schema import CategoricalColumn, Schema
from fedfin.errors import ConfigError, DataError

__all__ = ["Loans", "load_table", "place", "read_loans", "refuse_unknown_names"]


@dataclass(frozen=True, slots=True, repr=False)
class Loans:
    """The loans of one lender, every cell valid under the schema.

    Attributes:
        frame: n rows; all columns of the schema, protected ones too, in its order: float64 with NaN for
            missing, or object (str) with None for missing. The index is 0 to n - 1.
        labels: Shape (n,), int64: 1 bad, 0 good.
        loan_ids: Shape (n,), a distinct text for each loan; None where the source names no column of them.
    """

    frame: pd.DataFrame
    labels: NDArray[np.int64]
    loan_ids: NDArray[np.object_] | None = None

    def __post_init__(self) -> None:
        assert len(self.frame) == len(self.labels)  # noqa: S101  (our own bug)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Loans({len(self.frame.columns)} columns, rows not shown)"


def read_loans(source: DataSource, schema: Schema, base_dir: Path) -> Loans:
    """Read the lender's loans and check every cell.

    Args:
        source: Where the loans are.
        schema: The federation's schema.
        base_dir: Folder of the configuration file; relative paths start there.

    Raises:
        ConfigError: As `load_table`; or `source` translates a column that the schema does not have.
        DataError: As `load_table`; or the table is empty, or a loan's number is missing or not its own, or a cell
            breaks a rule: names the first one's row,
            column, rule and mend, and how many more there are. Never the value, except the spelling of an
            unknown category or outcome (see `cells`).
    """
    refuse_unknown_names(source, schema)
    table = load_table(source, base_dir)
    if table.empty:
        msg = f"{_origin(source)} holds no loans; correct data.path, data.table or data.query"
        raise DataError(msg)
    parsed = parse_table(table, schema)
    if parsed.faults:
        raise DataError(_first_fault(parsed.faults, table, _origin(source)))
    return Loans(parsed.frame(), parsed.labels, _loan_ids(table, source))


def load_table(source: DataSource, base_dir: Path) -> pd.DataFrame:
    """Read a lender's table as it is, under the federation's names and spellings.

    Args:
        source: Where the table is. A CSV file is UTF-8; its separator (comma, semicolon, tab or bar) is
            taken from the header line.
        base_dir: Folder of the configuration file; relative paths start there.

    Returns:
        One row a loan, all columns of the table, uninterpreted: text where the source has text, None or NaN
        where a value is missing. The index counts rows from 1 and is named `row`; for a CSV file it is named
        `line` and holds the line of the file on which each loan begins.

    Raises:
        ConfigError: The file, database, table or password is absent or refused, or nothing answers.
        DataError: The file's content cannot be read, or two columns have one name.
    """
    table = read_file(source.path, base_dir) if source.path is not None else read_database(source, base_dir)
    names = [str(name) for name in table.columns]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        msg = f"{_origin(source)} has more than one column named {min(twice)}; rename all but one"
        raise DataError(msg)
    return _translated(table, source)


def place(table: pd.DataFrame, row: int) -> str:
    """Return where data row `row` (from 1) of a table of `load_table` is, as `row 7 (line 8)`."""
    if table.index.name != "line":
        return f"row {row}"
    return f"row {row} (line {table.index[row - 1]})"


def refuse_unknown_names(source: DataSource, schema: Schema) -> None:
    """Check that `columns` and `values` of a source translate to what the schema has, each to one.

    Raises:
        ConfigError: Names the key, and what the schema knows.
    """
    translations = source.values  # noqa: PD011  (a setting, no frame)
    kinds = {column.name: column for column in schema.columns}
    known = {*kinds, schema.label.name}
    for key, names in (("columns", source.columns), ("values", translations)):
        for name in names:
            if name not in known:
                msg = f"data.{key} names {name}, which the schema lacks; it has {', '.join(sorted(known))}"
                raise ConfigError(msg)
    if source.loan_id is not None and source.loan_id in {*known, *source.columns.values()}:
        msg = f"data.loan_id is {source.loan_id}, which is a column of the schema; name one that only numbers the loans"
        raise ConfigError(msg)
    local_names = list(source.columns.values())
    for name, local in source.columns.items():
        if local_names.count(local) > 1:
            msg = f"data.columns maps {local} to {name} and to another column; map it to one of them"
            raise ConfigError(msg)
    for name, spellings in translations.items():
        column = kinds.get(name)
        if column is not None and not isinstance(column, CategoricalColumn):
            msg = (
                f"data.values.{name} is for spellings, and {name} is numeric; remove it, or use data.missing"
            )
            raise ConfigError(msg)
        allowed = column.categories if column is not None else schema.label.bad + schema.label.good
        for local, word in spellings.items():
            if word not in allowed:
                msg = f"data.values.{name}.{local} is {word}, no category of the schema; use one of {allowed}"
                raise ConfigError(msg)


def _loan_ids(table: pd.DataFrame, source: DataSource) -> NDArray[np.object_] | None:
    if source.loan_id is None:
        return None
    if source.loan_id not in table.columns:
        msg = f"{_origin(source)} has no column {source.loan_id}, which data.loan_id names; correct it"
        raise DataError(msg)
    numbers = parse_loan_ids(table[source.loan_id])
    for rows, what, mend in (
        (numbers.missing, "no loan number", "give every loan its own"),
        (numbers.repeated, "the number of an earlier row", "keep one row for each loan"),
    ):
        if len(rows):
            msg = (
                f"{_origin(source)}: {place(table, int(rows[0]))} has {what} in {source.loan_id} ({len(rows)} such"
                f" rows; `fedfin client check` lists more); {mend}, or take data.loan_id out of bank.yaml"
            )
            raise DataError(msg)
    return numbers.texts


def _first_fault(faults: tuple[Fault, ...], table: pd.DataFrame, origin: str) -> str:
    first = min(faults, key=lambda fault: int(fault.rows[0]) if len(fault.rows) else 0)
    where = f"{place(table, int(first.rows[0]))}, " if len(first.rows) else ""
    others = sum(max(len(fault.rows), 1) for fault in faults) - 1
    more = f" ({others} more; `fedfin client check` lists all)" if others else ""
    return f"{origin}: {where}column {first.column}: {first.message}; {first.mend}{more}"


def _origin(source: DataSource) -> str:
    """Name the table without anything secret, and without the query, which may hold a customer's number."""
    if source.path is not None:
        return source.path
    return f"table {source.table}" if source.table is not None else "the query's result"


def _translated(table: pd.DataFrame, source: DataSource) -> pd.DataFrame:
    local_names = [str(name) for name in table.columns]
    name_of = {local: name for name, local in source.columns.items()}
    # A column that has a federation's name by chance gives way to the one that is mapped to that name, even
    # where the mapped one is absent: reading another column in its place would be worse than a missing one.
    kept = {
        local: name_of.get(local, local)
        for local in local_names
        if local in name_of or local not in source.columns
    }
    missing = frozenset(source.missing)
    translations = source.values  # noqa: PD011  (a setting, no frame)
    translated = {
        name: _clean(table[local], missing, translations.get(name, {})) for local, name in kept.items()
    }
    return pd.DataFrame(translated, index=table.index)


def _clean(cells: pd.Series, missing: frozenset[str], spellings: Mapping[str, str]) -> pd.Series:
    """Return the cells with missing markers emptied and spellings translated; numbers stay as they are."""
    if not spellings and pd.api.types.is_numeric_dtype(cells.dtype):
        return cells
    codes, distinct = distinct_cells(cells)
    cleaned = np.empty(len(distinct) + 1, dtype=object)
    for position, cell in enumerate(distinct):
        is_missing = isinstance(cell, str) and cell.strip() in missing
        cleaned[position] = None if is_missing else spellings.get(spelling(cell), cell)
    return pd.Series(cleaned[codes], index=cells.index, dtype=object)

"""What the cells of a lender's table mean under the schema, and every rule that one of them breaks.

A table comes in as it was read: text from CSV, numbers or text from Parquet and databases, nothing where a
value is missing. Here each cell becomes a number, a category, a missing value, or a fault with its row, so
that `source.read_loans` can refuse at the first and `quality.check_table` can report all of them: one
reading, two uses.

A value of a loan is personal data, and an error may end up in a log. Faults therefore say row, column and
rule and never the value, with one exception: the spelling of an unknown category or label, without which
nobody could mend `data.values`; it is left out when there are so many spellings that the column must hold
something else, such as names.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedfin.credit.schema import CategoricalColumn, Column, NumericColumn, Schema

__all__ = ["Fault", "ParsedColumn", "ParsedTable", "Rule", "distinct_cells", "parse_table", "spelling"]

Rule = Literal[
    "missing_column",
    "wrong_type",
    "infinite",
    "not_integer",
    "out_of_range",
    "missing_value",
    "unknown_category",
    "missing_label",
    "unknown_label",
]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INFINITY = re.compile(r"[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
_MOST_SPELLINGS = 20  # more unknown spellings than this are not a category's: do not show them
_SHOWN_SPELLINGS = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule broken by one column, with every row that breaks it.

    Attributes:
        rule: Which rule.
        column: The federation's name of the column.
        rows: Shape (k,), data rows counted from 1, ascending; empty when the whole column is missing.
        message: What is wrong, without the place.
        mend: What to do.
    """

    rule: Rule
    column: str
    rows: NDArray[np.int64]
    message: str
    mend: str


@dataclass(frozen=True, slots=True, repr=False)
class ParsedColumn:
    """One column of n loans; faulty cells count as missing in `cells`.

    Attributes:
        column: The schema's column.
        cells: Shape (n,); float64 with NaN for missing, or object (str) with None for missing.
        missing: Shape (n,), bool: the cell is empty in the table.
        special: Shape (n,), bool: the cell holds a special code.
        faults: What is wrong, in the order of `Rule`.
    """

    column: Column
    cells: NDArray[np.float64] | NDArray[np.object_]
    missing: NDArray[np.bool_]
    special: NDArray[np.bool_]
    faults: tuple[Fault, ...]

    def __repr__(self) -> str:
        return f"ParsedColumn({self.column.name}, values not shown)"


@dataclass(frozen=True, slots=True, repr=False)
class ParsedTable:
    """A whole table of n loans.

    Attributes:
        columns: The schema's columns that the table has, in the schema's order.
        labels: Shape (n,), int64: 1 bad, 0 good, -1 unknown.
        faults: The faults of columns and labels, missing columns first.
    """

    columns: tuple[ParsedColumn, ...]
    labels: NDArray[np.int64]
    faults: tuple[Fault, ...]

    def __repr__(self) -> str:
        return f"ParsedTable({len(self.columns)} columns, rows not shown)"

    def frame(self) -> pd.DataFrame:
        """Return the columns under the federation's names: float64 with NaN, or object with None."""
        return pd.DataFrame(
            {
                parsed.column.name: pd.Series(parsed.cells, dtype=parsed.cells.dtype, copy=True)
                for parsed in self.columns
            },
            index=pd.RangeIndex(len(self.labels)),
        )


def parse_table(table: pd.DataFrame, schema: Schema) -> ParsedTable:
    """Read every cell of a table as the schema says, and find every fault.

    Args:
        table: n rows under the federation's names, as `source.load_table` gives them; columns that the schema
            does not know are left alone. Not changed.
        schema: The federation's schema.
    """
    absent: list[Fault] = []
    columns: list[ParsedColumn] = []
    for column in schema.columns:
        if column.name not in table.columns:
            absent.append(_absent(column.name, table))
        elif isinstance(column, NumericColumn):
            columns.append(_parse_numeric(table[column.name], column))
        else:
            columns.append(_parse_categorical(table[column.name], column))
    label_faults: tuple[Fault, ...] = ()
    labels = np.full(len(table), -1, dtype=np.int64)
    if schema.label.name not in table.columns:
        absent.append(_absent(schema.label.name, table))
    else:
        labels, label_faults = _parse_labels(table[schema.label.name], schema)
    faults = (*absent, *(fault for parsed in columns for fault in parsed.faults), *label_faults)
    return ParsedTable(tuple(columns), labels, faults)


def distinct_cells(cells: pd.Series) -> tuple[NDArray[np.intp], list[object]]:
    """Return for each cell the number of its distinct value, -1 where missing, and those values."""
    try:
        codes, distinct = pd.factorize(cells.astype(object))
    except TypeError:  # nested values of a Parquet file have no hash: none is a number or a category
        codes, distinct = pd.factorize(cells.map(repr, na_action="ignore").astype(object))
    return codes, list(distinct)


def spelling(cell: object) -> str:
    """Return the text that a cell which is not missing would be in a CSV file: 2 for 2.0, true for True."""
    if isinstance(cell, bool | np.bool_):
        return "true" if cell else "false"
    if isinstance(cell, float | Decimal | np.floating) and math.isfinite(cell) and cell == int(cell):
        return str(int(cell))  # a database gives a code of 2 as 2.0 when some cells are missing
    return str(cell).strip()


def _absent(name: str, table: pd.DataFrame) -> Fault:
    alike = [str(column) for column in table.columns if str(column).casefold() == name.casefold()]
    local = alike[0] if alike else "the name it has in your table"
    return Fault(
        rule="missing_column",
        column=name,
        rows=np.empty(0, dtype=np.int64),
        message="the table has no such column",
        mend=f"map it in data.columns, as {name}: {local}",
    )


def _parse_numeric(cells: pd.Series, column: NumericColumn) -> ParsedColumn:
    missing = cells.isna().to_numpy(dtype=bool)
    numbers = _numbers(cells)
    special = np.isin(numbers, column.special_values)
    wrong = np.isnan(numbers) & ~missing
    infinite = np.isinf(numbers)
    measured = ~(missing | wrong | infinite | special)
    out = measured & ((numbers < column.minimum) | (numbers > column.maximum))
    fractional = measured & ~out & (numbers != np.floor(numbers)) if column.integer else np.zeros_like(out)
    unit = f" {column.unit}" if column.unit else ""
    whole = " or by rounding it" if column.integer else ""
    faults = (
        _fault(
            "wrong_type",
            column.name,
            wrong,
            "not a number",
            "write a number, with a decimal point and no thousands separator, or leave the cell empty",
        ),
        _fault(
            "infinite", column.name, infinite, "an infinite number", "write a number or leave the cell empty"
        ),
        _fault(
            "not_integer", column.name, fractional, "not a whole number", f"correct it at its source{whole}"
        ),
        _fault(
            "out_of_range",
            column.name,
            out,
            f"outside the valid range {column.minimum:g} to {column.maximum:g}{unit}",
            "correct it at its source, or ask the coordinator to name it a special code or widen the range",
        ),
        _forbidden_missing(column, missing),
    )
    faulty = wrong | infinite | out | fractional
    values = np.where(faulty | missing, np.nan, numbers)
    return ParsedColumn(column, values, missing, special, tuple(fault for fault in faults if len(fault.rows)))


def _parse_categorical(cells: pd.Series, column: CategoricalColumn) -> ParsedColumn:
    missing = cells.isna().to_numpy(dtype=bool)
    words = _words(cells)
    unknown = ~missing & ~np.isin(words, np.array(column.categories, dtype=object))
    faults = (
        _forbidden_missing(column, missing),
        _fault(
            "unknown_category",
            column.name,
            unknown,
            f"a category that the schema does not know{_spellings(words[unknown])}",
            f"translate it in data.values.{column.name} to one of {_listing(column.categories)}",
        ),
    )
    words[unknown] = None
    special = np.zeros(len(cells), dtype=bool)
    return ParsedColumn(column, words, missing, special, tuple(fault for fault in faults if len(fault.rows)))


def _parse_labels(cells: pd.Series, schema: Schema) -> tuple[NDArray[np.int64], tuple[Fault, ...]]:
    label = schema.label
    missing = cells.isna().to_numpy(dtype=bool)
    words = _words(cells)
    labels = np.full(len(cells), -1, dtype=np.int64)
    labels[np.isin(words, np.array(label.bad, dtype=object))] = 1
    labels[np.isin(words, np.array(label.good, dtype=object))] = 0
    unknown = ~missing & (labels < 0)
    faults = (
        _fault(
            "missing_label",
            label.name,
            missing,
            "the outcome is missing",
            "leave loans without an outcome out of the table",
        ),
        _fault(
            "unknown_label",
            label.name,
            unknown,
            f"an outcome that is neither bad nor good{_spellings(words[unknown])}",
            f"translate it in data.values.{label.name} to one of {_listing(label.bad + label.good)},"
            " or leave such loans out of the table",
        ),
    )
    return labels, tuple(fault for fault in faults if len(fault.rows))


def _fault(rule: Rule, column: str, where: NDArray[np.bool_], message: str, mend: str) -> Fault:
    return Fault(rule, column, np.flatnonzero(where).astype(np.int64) + 1, message, mend)


def _forbidden_missing(column: Column, missing: NDArray[np.bool_]) -> Fault:
    where = np.zeros_like(missing) if column.nullable else missing
    mend = "fill it in, leave such loans out, or ask the coordinator to make the column nullable"
    return _fault("missing_value", column.name, where, "missing, which the schema does not allow", mend)


def _numbers(cells: pd.Series) -> NDArray[np.float64]:
    """Return each cell as a number; NaN where it is missing or not one. Shape (n,)."""
    if pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
        return cells.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    codes, distinct = distinct_cells(cells)
    numbers = np.fromiter((_number(cell) for cell in distinct), dtype=np.float64, count=len(distinct))
    return np.append(numbers, np.nan)[codes]  # code -1, a missing cell, takes the last


def _words(cells: pd.Series) -> NDArray[np.object_]:
    """Return each cell as the text that it would be in a CSV file; None where it is missing. Shape (n,)."""
    codes, distinct = distinct_cells(cells)
    words = np.empty(len(distinct) + 1, dtype=object)
    words[:-1] = [spelling(cell) for cell in distinct]
    return words[codes]


def _number(cell: object) -> float:
    if isinstance(cell, bool | np.bool_):
        return math.nan
    if isinstance(cell, int | float | Decimal | np.number):
        return float(cell)
    text = cell.strip() if isinstance(cell, str) else ""
    if _NUMBER.fullmatch(text) or _INFINITY.fullmatch(text):
        return float(text)
    return math.nan


def _spellings(words: NDArray[np.object_]) -> str:
    distinct = sorted({str(word) for word in words})
    if not distinct:
        return ""
    if len(distinct) > _MOST_SPELLINGS:
        return f", in {len(distinct)} spellings: this looks like another column"
    more = " and others" if len(distinct) > _SHOWN_SPELLINGS else ""
    return f" ({', '.join(_shortened(distinct[:_SHOWN_SPELLINGS]))}{more})"


def _shortened(words: list[str]) -> Iterator[str]:
    for word in words:
        yield repr(word if len(word) <= 40 else f"{word[:39]}…")


def _listing(words: tuple[str, ...]) -> str:
    return ", ".join(words[:12]) + (" and others" if len(words) > 12 else "")

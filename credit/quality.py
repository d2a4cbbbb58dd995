"""Whether a lender's table can take part, and everything that is wrong with it, all at once.

`fedfin client check` runs this at the lender, before any job. Findings name column, rule, the first rows
and the mend; errors keep the table out of a job, warnings and notes do not. Nothing of it leaves the
lender, and it holds counts and places, never a loan's values (see `cells` for the one exception).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedfin.config import DataSource
from fedfin.credit.binning import histogram
from fedfin.credit.cells import ParsedColumn, ParsedTable, Rule, parse_table
from fedfin.credit.drift import MIN_REFERENCE, PSI_NOTE, PSI_WARNING, Reference, chance_psi, num_cells, psi
from fedfin.credit.leakage import LEAK_AUC, MIN_CLASS_SIZE, single_column_auc
from fedfin.credit.loan_ids import parse_loan_ids
from fedfin.credit.schema import NumericColumn, Schema
from fedfin.credit.source import load_table, refuse_unknown_names

__all__ = ["MIN_LOANS", "ColumnSummary", "Finding", "QualityReport", "check_source", "check_table"]

MIN_LOANS = 20
"""Fewer loans than this cannot train: a batch would hold one or none."""

_SHOWN_ROWS = 5

Severity = Literal["error", "warning", "note"]
QualityRule = (
    Rule
    | Literal[
        "too_few_loans",
        "no_bad_loans",
        "no_good_loans",
        "duplicate_rows",
        "loan_id",
        "no_loan_id",
        "constant_column",
        "suspect_leak",
        "leak_not_checked",
        "extra_column",
        "drift",
    ]
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about the table.

    Attributes:
        severity: An error keeps the table out of a job.
        rule: Which rule.
        column: The column, or None for the table as a whole.
        rows: The first few data rows, from 1; empty where the finding is not about rows.
        lines: Where the table is a CSV file, the lines of these rows; otherwise empty.
        count: How many cells or rows.
        message: What is wrong.
        mend: What to do.
    """

    severity: Severity
    rule: QualityRule
    column: str | None
    rows: tuple[int, ...]
    lines: tuple[int, ...]
    count: int
    message: str
    mend: str


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """Counts of one column of the schema.

    Attributes:
        name: The federation's name.
        kind: numeric or categorical.
        is_feature: Whether the model may see it.
        present: Whether the table has it; if not, all counts are 0.
        num_missing: Empty cells.
        missing_rate: Empty cells per row, 0 to 1.
        num_wrong_type: Cells that are no number; so on for `num_infinite`, `num_not_integer`,
            `num_out_of_range` and `num_unknown_category`.
        special: Per special code: its meaning and its count.
        single_auc: What the column alone reaches against the outcome; None where not checked.
        psi: Population stability index against the reference; None where there is none.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    is_feature: bool
    present: bool
    num_missing: int = 0
    missing_rate: float = 0.0
    num_wrong_type: int = 0
    num_infinite: int = 0
    num_not_integer: int = 0
    num_out_of_range: int = 0
    num_unknown_category: int = 0
    special: tuple[tuple[str, int], ...] = ()
    single_auc: float | None = None
    psi: float | None = None


@dataclass(frozen=True, slots=True)
class QualityReport:
    """What `check_table` found.

    Attributes:
        num_rows: Loans in the table.
        num_bad: Loans with a bad outcome.
        num_good: Loans with a good outcome; the rest has none that the schema knows.
        columns: One per column of the schema, in order.
        findings: Errors first, then warnings, then notes; each group in the schema's order.
    """

    num_rows: int
    num_bad: int
    num_good: int
    columns: tuple[ColumnSummary, ...]
    findings: tuple[Finding, ...]

    @property
    def can_take_part(self) -> bool:
        """Whether nothing keeps the table out of a job."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def bad_rate(self) -> float | None:
        """Bad loans among those with an outcome; None where there are none."""
        labelled = self.num_bad + self.num_good
        return self.num_bad / labelled if labelled else None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values that json.dumps takes."""
        return {"can_take_part": self.can_take_part, "bad_rate": self.bad_rate} | asdict(self)


def check_source(
    source: DataSource,
    schema: Schema,
    base_dir: Path,
    *,
    reference: Reference | None = None,
    acknowledged: frozenset[str] = frozenset(),
) -> QualityReport:
    """Read a lender's table and check it; arguments and errors as `source.load_table` and `check_table`.

    Raises:
        ConfigError: The table cannot be reached, or `source` translates what the schema does not have.
        DataError: The file is no table. What is wrong within a table is a finding, not an error.
    """
    refuse_unknown_names(source, schema)
    table = load_table(source, base_dir)
    return check_table(table, schema, reference=reference, acknowledged=acknowledged, loan_id=source.loan_id)


def check_table(
    table: pd.DataFrame,
    schema: Schema,
    *,
    reference: Reference | None = None,
    acknowledged: frozenset[str] = frozenset(),
    loan_id: str | None = None,
) -> QualityReport:
    """Check a table against the schema, and against the federation where there is a reference.

    Args:
        table: Rows under the federation's names, as `source.load_table` gives them. Not changed.
        schema: The federation's schema.
        reference: Shares over all lenders, from `Reference.from_json`; None leaves drift out.
        acknowledged: Columns whose suspected leak the lender looked into and accepts: a warning then.
        loan_id: The column that numbers the loans, or None.
    """
    parsed = parse_table(table, schema)
    aucs = _single_aucs(parsed, schema)
    drifts = _drifts(parsed, schema, reference)
    findings = [
        *_faults(parsed, table),
        *_outcomes(parsed),
        *_duplicates(parsed, table),
        *_loan_numbers(table, loan_id),
        *_constants(parsed),
        *_leaks(parsed, aucs, acknowledged),
        *_moved(drifts),
        *_extras(table, schema, loan_id),
    ]
    order: list[Severity] = ["error", "warning", "note"]
    return QualityReport(
        num_rows=len(table),
        num_bad=int((parsed.labels == 1).sum()),
        num_good=int((parsed.labels == 0).sum()),
        columns=_summaries(parsed, schema, aucs, drifts),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
    )


def _finding(
    severity: Severity,
    rule: QualityRule,
    message: str,
    mend: str,
    *,
    column: str | None = None,
    count: int = 1,
    rows: NDArray[np.int64] | None = None,
    table: pd.DataFrame | None = None,
) -> Finding:
    first = rows[:_SHOWN_ROWS] if rows is not None else np.empty(0, dtype=np.int64)
    has_lines = table is not None and table.index.name == "line"
    lines = tuple(table.index[first - 1].tolist()) if table is not None and has_lines else ()
    return Finding(severity, rule, column, tuple(first.tolist()), lines, count, message, mend)


def _faults(parsed: ParsedTable, table: pd.DataFrame) -> list[Finding]:
    return [
        _finding(
            "error",
            fault.rule,
            fault.message,
            fault.mend,
            column=fault.column,
            count=max(len(fault.rows), 1),
            rows=fault.rows,
            table=table,
        )
        for fault in parsed.faults
    ]


def _outcomes(parsed: ParsedTable) -> list[Finding]:
    findings: list[Finding] = []
    num_rows = len(parsed.labels)
    if num_rows < MIN_LOANS:
        message = f"{num_rows} loans, fewer than {MIN_LOANS}"
        findings.append(
            _finding("error", "too_few_loans", message, "add loans, or join through a larger lender")
        )
    for outcome, rule in ((1, "no_bad_loans"), (0, "no_good_loans")):
        if not (parsed.labels == outcome).any():
            kind = "bad" if outcome else "good"
            message = f"no loan has a {kind} outcome, so there is nothing to tell apart"
            mend = "check the outcome's column and spellings, or take a longer period"
            findings.append(_finding("error", rule, message, mend))  # type: ignore[arg-type]  # a literal of the pair
    return findings


def _duplicates(parsed: ParsedTable, table: pd.DataFrame) -> list[Finding]:
    frame = parsed.frame().assign(**{"": parsed.labels})  # no column of a schema has the empty name
    sound = np.ones(len(frame), dtype=bool)
    for fault in parsed.faults:
        sound[fault.rows - 1] = False
    repeated = (frame.duplicated(keep="first").to_numpy() if len(parsed.columns) else ~sound) & sound
    if not repeated.any():
        return []
    rows = np.flatnonzero(repeated).astype(np.int64) + 1
    message = "rows equal to an earlier one in every column, outcome included"
    mend = "remove them if a loan was exported twice: a loan that counts twice is protected half as well"
    return [_finding("warning", "duplicate_rows", message, mend, count=len(rows), rows=rows, table=table)]


def _loan_numbers(table: pd.DataFrame, loan_id: str | None) -> list[Finding]:
    if loan_id is None:
        return []
    if loan_id not in table.columns:
        message, mend = "the table has no such column, which data.loan_id names", "correct data.loan_id"
        return [_finding("error", "loan_id", message, mend, column=loan_id)]
    numbers = parse_loan_ids(table[loan_id])
    return [
        _finding("error", "loan_id", message, mend, column=loan_id, count=len(rows), rows=rows, table=table)
        for rows, message, mend in (
            (numbers.missing, "loans without a number", "give every loan its own, or remove data.loan_id"),
            (
                numbers.repeated,
                "numbers that an earlier row has",
                "keep one row for each loan, or remove data.loan_id",
            ),
        )
        if len(rows)
    ]


def _constants(parsed: ParsedTable) -> list[Finding]:
    mend = "check the export; a column that never varies teaches the model nothing about these loans"
    return [
        _finding(
            "warning", "constant_column", "every loan has the same value", mend, column=column.column.name
        )
        for column in parsed.columns
        if len(column.cells) and len(pd.unique(pd.Series(column.cells, dtype=column.cells.dtype))) == 1
    ]


def _single_aucs(parsed: ParsedTable, schema: Schema) -> dict[str, float]:
    """Return the AUC of each present feature alone; empty where there are too few loans of a class."""
    labelled = parsed.labels >= 0
    labels = parsed.labels[labelled]
    if min((labels == 1).sum(), (labels == 0).sum()) < MIN_CLASS_SIZE:
        return {}
    return {
        column.column.name: single_column_auc(column.cells[labelled], labels)
        for column in parsed.columns
        if column.column in schema.features
    }


def _leaks(parsed: ParsedTable, aucs: dict[str, float], acknowledged: frozenset[str]) -> list[Finding]:
    if not aucs:
        message = f"fewer than {MIN_CLASS_SIZE} bad or {MIN_CLASS_SIZE} good loans: too few to look for leaks"
        return [
            _finding("note", "leak_not_checked", message, "nothing; larger lenders check the same columns")
        ]
    return [
        _finding(
            "warning" if name in acknowledged else "error",
            "suspect_leak",
            f"alone it tells bad from good with AUC {auc:.3f}, above {LEAK_AUC:g}: was it known beforehand?",
            "take it out of the federation's schema; or, if it was known at the application, name it in"
            " data.accepted_leaks of bank.yaml",
            column=name,
            count=len(parsed.labels),
        )
        for name, auc in aucs.items()
        if auc > LEAK_AUC
    ]


def _drifts(
    parsed: ParsedTable, schema: Schema, reference: Reference | None
) -> dict[str, tuple[float, float]]:
    """Return per present feature its PSI and what chance alone would give."""
    if reference is None or not len(parsed.labels):
        return {}
    frame = parsed.frame()
    for column in schema.features:
        if column.name not in frame:
            frame[column.name] = np.nan if isinstance(column, NumericColumn) else None
    ends = np.cumsum([num_cells(column) for column in schema.features])
    parts = np.split(histogram(frame, schema), ends[:-1])
    present = {column.column.name for column in parsed.columns}
    drifts: dict[str, tuple[float, float]] = {}
    for column, counts in zip(schema.features, parts, strict=True):
        known = reference.sample_size(column)
        if column.name in present and (reference.noise_stddev == 0 or known >= MIN_REFERENCE):
            index, num_bins = psi(counts, reference.of(column.name), column)
            drifts[column.name] = (index, chance_psi(len(frame), num_bins, known))
    return drifts


def _moved(drifts: dict[str, tuple[float, float]]) -> list[Finding]:
    return [
        _finding(
            "warning" if index > max(PSI_WARNING, chance) else "note",
            "drift",
            f"differs from the federation's loans: population stability index {index:.2f}",
            "check the column's unit, currency and period; if your loans do differ, judge the model on them",
            column=name,
        )
        for name, (index, chance) in drifts.items()
        if index > max(PSI_NOTE, chance)
    ]


def _extras(table: pd.DataFrame, schema: Schema, loan_id: str | None) -> list[Finding]:
    known = {schema.label.name, loan_id, *(column.name for column in schema.columns)}
    extra = [str(name) for name in table.columns if name not in known]
    if not extra:
        return []
    shown = ", ".join(extra[:_SHOWN_ROWS]) + (" and others" if len(extra) > _SHOWN_ROWS else "")
    message = f"columns that the schema does not have, so they are not read: {shown}"
    return [_finding("note", "extra_column", message, "nothing", count=len(extra))]


def _summaries(
    parsed: ParsedTable, schema: Schema, aucs: dict[str, float], drifts: dict[str, tuple[float, float]]
) -> tuple[ColumnSummary, ...]:
    of = {column.column.name: column for column in parsed.columns}
    return tuple(
        _summary(of[column.name], aucs.get(column.name), drifts.get(column.name, (None, 0.0))[0])
        if column.name in of
        else ColumnSummary(column.name, column.kind, column.is_feature, present=False)
        for column in schema.columns
    )


def _summary(parsed: ParsedColumn, auc: float | None, index: float | None) -> ColumnSummary:
    column = parsed.column
    counts: dict[Rule, int] = {fault.rule: len(fault.rows) for fault in parsed.faults}
    special: tuple[tuple[str, int], ...] = ()
    if isinstance(column, NumericColumn):
        special = tuple(
            (meaning, int((parsed.cells == code).sum())) for code, meaning in column.special_codes.items()
        )
    return ColumnSummary(
        name=column.name,
        kind=column.kind,
        is_feature=column.is_feature,
        present=True,
        num_missing=int(parsed.missing.sum()),
        missing_rate=float(parsed.missing.mean()) if len(parsed.missing) else 0.0,
        num_wrong_type=counts.get("wrong_type", 0),
        num_infinite=counts.get("infinite", 0),
        num_not_integer=counts.get("not_integer", 0),
        num_out_of_range=counts.get("out_of_range", 0),
        num_unknown_category=counts.get("unknown_category", 0),
        special=special,
        single_auc=auc,
        psi=index,
    )

"""The lender's loans, ready for jobs: read, checked, split into training and held-out loans."""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fedfin.client.checking import check, check_held_out
from fedfin.client.folder import LenderFolder
from fedfin.config import DataSource
from fedfin.credit.schema import Schema
from fedfin.credit.source import Loans, read_loans
from fedfin.errors import DataError
from fedfin.privacy.snapshot import Snapshot, loans_in, snapshot_of

__all__ = ["CountedLoans", "PreparedLoans", "prepare"]


@dataclass(frozen=True, slots=True)
class CountedLoans:
    """The held-out loans that the federation's evaluations count, under the digest by which the ledger knows them."""

    loans: Loans
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class PreparedLoans:
    """The loans that train, those that judge, and the digests under which the ledger knows both.

    Attributes:
        schema: The federation's.
        train: Training loans.
        holdout: Held-out loans: what this lender judges a model by, for itself.
        snapshot: The training loans' digests.
        counted: The held-out loans less those that train as well, which a `holdout.source` may hold: they would flatter
            the model, and be charged twice. None where none is left.
    """

    schema: Schema = field(repr=False)
    train: Loans
    holdout: Loans
    snapshot: Snapshot
    counted: CountedLoans | None = None


def prepare(folder: LenderFolder, *, looking: bool = False) -> PreparedLoans:
    """Read the lender's tables.

    Args:
        folder: The lender's.
        looking: Make nothing, not even the salt; what comes back serves no job.

    Raises:
        ConfigError: The source cannot be opened.
        DataError: A cell breaks the schema, or one side of the split lacks good or bad loans.
    """
    schema = folder.schema()
    salt = folder.salt(make=not looking)
    config = folder.config
    reports = [("", check(folder, schema))]
    if (held_out := check_held_out(folder, schema)) is not None:
        reports.append(("holdout.source: ", held_out))
    for source, report in reports:
        if report.can_take_part:
            continue
        errors = [finding for finding in report.findings if finding.severity == "error"]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        where = source + (f"{errors[0].column}: " if errors[0].column else "")
        msg = f"{where}{errors[0].message}{more}; {errors[0].mend}. `fedfin client check` shows all that is wrong"
        raise DataError(msg)
    loans = read_loans(config.data, schema, folder.directory)
    if config.holdout.source is not None:
        train, holdout = loans, read_loans(config.holdout.source, schema, folder.directory)
    else:
        train, holdout = _split(loans, config.holdout.fraction, salt)
    _refuse_one_outcome(train, "training", "data")
    _refuse_one_outcome(holdout, "held-out", "holdout")
    snapshot = _snapshot(train, config.data, schema, salt)
    counted = _counted(holdout, snapshot, config.holdout.source or config.data, schema, salt)
    return PreparedLoans(schema=schema, train=train, holdout=holdout, snapshot=snapshot, counted=counted)


def _counted(
    holdout: Loans, training: Snapshot, source: DataSource, schema: Schema, salt: bytes
) -> CountedLoans | None:
    trains = loans_in(
        training,
        holdout.frame,
        holdout.labels,
        salt,
        loan_ids=holdout.loan_ids,
        id_name=source.loan_id or "",
        reading=_reading(source, schema),
    )
    if trains.all():
        return None
    loans = _take(holdout, ~trains) if trains.any() else holdout
    return CountedLoans(loans, _snapshot(loans, source, schema, salt))


def _snapshot(loans: Loans, source: DataSource, schema: Schema, salt: bytes) -> Snapshot:
    return snapshot_of(
        loans.frame,
        loans.labels,
        salt,
        loan_ids=loans.loan_ids,
        id_name=source.loan_id or "",
        reading=_reading(source, schema),
    )


def _reading(source: DataSource, schema: Schema) -> str:
    """Return all that decides how a stored row is read: another one makes another row of the same loan."""
    columns = {name: local for name, local in source.columns.items() if name != local}
    settings = [schema.fingerprint(), columns, source.values, sorted(set(source.missing))]  # noqa: PD011
    return json.dumps(settings, sort_keys=True)


def _split(loans: Loans, fraction: float, salt: bytes) -> tuple[Loans, Loans]:
    """Split by a keyed hash of each loan's number, or else of its row: a loan is always on the same side."""
    key = hashlib.sha256(b"fedfin holdout\n" + salt).hexdigest()[:16]
    known_by = (
        loans.frame.assign(_label=loans.labels) if loans.loan_ids is None else pd.Series(loans.loan_ids)
    )
    hashes = pd.util.hash_pandas_object(known_by, index=False, hash_key=key)
    held = (hashes.to_numpy() / np.float64(2**64)) < fraction
    return _take(loans, ~held), _take(loans, held)


def _take(loans: Loans, rows: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Loans:
    ids = None if loans.loan_ids is None else loans.loan_ids[rows]
    return Loans(loans.frame[rows].reset_index(drop=True), loans.labels[rows], ids)


def _refuse_one_outcome(loans: Loans, side: str, key: str) -> None:
    bad = int(loans.labels.sum())
    if bad in {0, len(loans)}:
        kind = "bad" if bad == 0 else "good"
        msg = (
            f"none of the {len(loans)} {side} loans is {kind}: nothing can be learned or judged; widen {key} in"
            " bank.yaml to loans with both outcomes, or wait for more to mature"
        )
        raise DataError(msg)

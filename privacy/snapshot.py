"""A data snapshot: the digest that names a lender's table, and one digest for each of its loans.

Every job on the same records draws on one budget, and loans that were in an earlier table bring its spend along
(`privacy/overlap.py`). All digests are salted, because a table or a loan's number can be guessed. The table's
digest is the same for any order of rows and columns and any file or database it is read from; it covers the whole
table, so that one changed value is another snapshot. A loan's digest is of its number where the table has one
(`data.loan_id` of bank.yaml), and of the whole row where not: an edited row is then taken for a new loan. Digests
under another salt, or of rows that are read in another way, are never compared: no loan looks new by them.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fedfin.errors import DataError, PrivacyParameterError

__all__ = ["ROW_BYTES", "Snapshot", "loans_in", "snapshot_of"]

ROW_BYTES = 16
"""Of a loan's digest: among a billion loans two are mistaken for one with a chance of 1e-21."""

_MIN_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A table as the ledger knows it; neither a loan nor a loan's number can be read from it without the salt.

    Attributes:
        digest: SHA-256 of the table, hex.
        scheme: What the row digests are of. Those of two schemes cannot be compared: whoever holds two such
            snapshots must take every loan of one for a loan of the other.
        rows: The loans' digests, `ROW_BYTES` each, distinct, ascending, one after the other.
    """

    digest: str
    scheme: str
    rows: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert self.rows  # noqa: S101  (our own bug)
        assert len(self.rows) % ROW_BYTES == 0  # noqa: S101


def snapshot_of(
    frame: pd.DataFrame,
    labels: ArrayLike,
    salt: bytes,
    *,
    loan_ids: ArrayLike | None = None,
    id_name: str = "",
    reading: str = "",
) -> Snapshot:
    """Return the snapshot of a table.

    Args:
        frame: The lender's table, shape (n, p); columns by name. Numbers count as float64, all else as text.
        labels: Shape (n,).
        salt: The lender's own secret, at least 16 bytes; without it a guessed table could be checked.
        loan_ids: A distinct text for each loan, shape (n,); None where the table has none.
        id_name: With `loan_ids`: the name of their column.
        reading: Without `loan_ids`: whatever decides how a stored row becomes a row of `frame`; a change of it would
            make every loan look new.

    Raises:
        DataError: The table is empty, two columns share a name, or the labels are not one for each row.
        PrivacyParameterError: The salt is too short.
    """
    scheme, digests, of_loans = _digests(frame, labels, salt, loan_ids, id_name, reading)
    table = hashlib.sha256(_header(frame, salt) + b"".join(sorted(digests)))
    rows = b"".join(sorted({digest[:ROW_BYTES] for digest in of_loans}))
    return Snapshot(table.hexdigest(), scheme, rows)


def loans_in(
    snapshot: Snapshot,
    frame: pd.DataFrame,
    labels: ArrayLike,
    salt: bytes,
    *,
    loan_ids: ArrayLike | None = None,
    id_name: str = "",
    reading: str = "",
) -> NDArray[np.bool_]:
    """Tell which loans of a table are in a snapshot, shape (n,); none where their digests cannot be compared.

    Arguments and errors as `snapshot_of`.
    """
    scheme, _, of_loans = _digests(frame, labels, salt, loan_ids, id_name, reading)
    if scheme != snapshot.scheme:
        return np.zeros(len(frame), dtype=np.bool_)
    held = {snapshot.rows[at : at + ROW_BYTES] for at in range(0, len(snapshot.rows), ROW_BYTES)}
    return np.array([digest[:ROW_BYTES] in held for digest in of_loans])


def _digests(
    frame: pd.DataFrame,
    labels: ArrayLike,
    salt: bytes,
    loan_ids: ArrayLike | None,
    id_name: str,
    reading: str,
) -> tuple[str, list[bytes], list[bytes]]:
    """Return the scheme, the digests that make up the table's, and those of its loans, both in the rows' order."""
    if len(salt) < _MIN_SALT_BYTES:
        msg = f"the snapshot salt has {len(salt)} bytes; draw {_MIN_SALT_BYTES} or more with secrets.token_bytes"
        raise PrivacyParameterError(msg)
    names = [str(name) for name in frame.columns]
    if not len(frame) or len(set(names)) != len(names) or np.shape(labels) != (len(frame),):
        msg = (
            f"a table of shape {frame.shape} with labels of shape {np.shape(labels)} has no snapshot; it needs rows,"
            " one label for each, and a name of its own for every column"
        )
        raise DataError(msg)
    columns = [frame.iloc[:, names.index(name)] for name in sorted(names)]
    cells = [_cells(column) for column in [*columns, pd.Series(np.asarray(labels))]]
    header = _header(frame, salt)
    if loan_ids is None:
        # the columns and their kinds: a loan under another schema has another digest, and must not look new
        kinds = [column.shape[1] for column in cells]
        digests = _row_digests(header, cells)
        return f"row {_short((_short(salt), sorted(names), kinds, reading))}", digests, digests
    ids = pd.Series(np.asarray(loan_ids, dtype=object))
    assert len(ids) == len(frame)  # noqa: S101
    digests = _row_digests(header, [*cells, _cells(ids)])
    return (
        f"loan_id {_short((_short(salt), id_name))}",
        digests,
        _row_digests(b"fedfin loan\n" + salt, [_cells(ids)]),
    )


def _header(frame: pd.DataFrame, salt: bytes) -> bytes:
    return repr((len(salt), sorted(str(name) for name in frame.columns))).encode() + salt


def _row_digests(header: bytes, cells: list[NDArray[np.uint8]]) -> list[bytes]:
    digests: list[bytes] = []
    start = hashlib.sha256(header)
    for row in np.hstack(cells):
        digest = start.copy()
        digest.update(row.data)
        digests.append(digest.digest())
    return digests


def _short(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _cells(column: "pd.Series[Any]") -> NDArray[np.uint8]:
    """Return a column's canonical bytes, shape (n, 8) for numbers and (n, 32) for text."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan) + 0.0  # -0.0 is 0.0
        numbers[np.isnan(numbers)] = np.nan
        return np.ascontiguousarray(numbers.astype("<f8")).view(np.uint8).reshape(-1, 8)
    codes, uniques = pd.factorize(column.astype(object))
    # the last digest is that of a missing value, whose code is -1
    digests = [hashlib.sha256(str(value).encode()).digest() for value in uniques] + [bytes(32)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)[codes]

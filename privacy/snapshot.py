"""A digest that names a lender's table, so that every job on the same records draws on one budget.

The digest is salted, because a table can be guessed, and the same for any order of rows and columns and any
file or database it is read from. It covers the whole table: one changed value is another snapshot.
"""

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fedfin.errors import DataError, PrivacyParameterError

__all__ = ["snapshot_of"]

_MIN_SALT_BYTES = 16


def snapshot_of(frame: pd.DataFrame, labels: ArrayLike, salt: bytes) -> str:
    """Return the digest of a table, the same for any order of its rows and columns and any file it is read from.

    Args:
        frame: The lender's table, shape (n, p); columns by name. Numbers count as float64, all else as text.
        labels: Shape (n,).
        salt: The lender's own secret, at least 16 bytes; without it a guessed table could be checked.

    Returns:
        SHA-256, hex.

    Raises:
        DataError: The table is empty, two columns share a name, or the labels are not one for each row.
        PrivacyParameterError: The salt is too short.
    """
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
    cells = np.hstack([_cells(column) for column in [*columns, pd.Series(np.asarray(labels))]])
    header = hashlib.sha256(repr((len(salt), sorted(names))).encode() + salt)
    rows: list[bytes] = []
    for row in cells:
        digest = header.copy()
        digest.update(row.data)
        rows.append(digest.digest())
    table = header.copy()
    table.update(b"".join(sorted(rows)))
    return table.hexdigest()


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

"""Loans' numbers, by which the ledger knows a loan again after its balance or outcome was updated.

The column that `data.loan_id` of bank.yaml names is read here and nowhere else: it is no feature, and of it only
salted digests are kept (`privacy/snapshot.py`).
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedfin.credit.cells import spelling

__all__ = ["LoanIds", "canonical_id", "parse_loan_ids"]

_WHOLE_NUMBER = re.compile(r"([+-]?)0*([0-9]+?)(?:\.0*)?")


@dataclass(frozen=True, slots=True, repr=False)
class LoanIds:
    """The numbers of a table's loans, and where they are no numbers to go by.

    Attributes:
        texts: Shape (n,), canonical; "" for a missing one.
        missing: Data rows without a number, from 1.
        repeated: Data rows whose number an earlier row has, from 1.
    """

    texts: NDArray[np.object_]
    missing: NDArray[np.int64]
    repeated: NDArray[np.int64]


def parse_loan_ids(cells: "pd.Series") -> LoanIds:
    """Read the column of numbers of a table of `source.load_table`."""
    texts = pd.Series([canonical_id(cell) for cell in cells], dtype=object)
    missing = (texts == "").to_numpy(dtype=bool)
    repeated = texts.duplicated(keep="first").to_numpy(dtype=bool) & ~missing
    return LoanIds(texts.to_numpy(), np.flatnonzero(missing) + 1, np.flatnonzero(repeated) + 1)


def canonical_id(cell: object) -> str:
    """Return a loan's number as text, the same from a file and from a database; "" for a missing one.

    A whole number has no leading zeros and no decimals: 7, "7", 7.0 and "007" are one loan.
    """
    if cell is None or cell is pd.NA or cell != cell:  # noqa: PLR0124  (a missing number is not itself)
        return ""
    text = spelling(cell)
    whole = _WHOLE_NUMBER.fullmatch(text)
    return text if whole is None else whole[1].replace("+", "") + whole[2]

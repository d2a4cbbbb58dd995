"""The demo's loans and how they are split over eight lenders of different kinds; any table over unequal lenders.

Real lenders differ in whom they serve, not in how people default: the split skews the applicants (covariate
skew) and leaves the outcomes alone. The rule looks at features only, never at a loan's outcome.
"""

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from fedfin.config import DataSource
from fedfin.credit.schema import Schema
from fedfin.credit.source import Loans, read_loans
from fedfin.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["RULE", "SEGMENTS", "DemoSplit", "LenderRows", "demo_loans", "split_demo", "split_unequal"]

RULE = """\
30% of the loans, drawn at random within each outcome, are held out for the comparison; no lender trains on them.
Five small lenders come first, each with 90 of the remaining loans: 72 at random from the people it serves
(tenant-micro: tenants; family-micro: people who neither own nor rent their home; starter-micro: at most one year
in the job; freelance-micro: freelancers; basket-micro: loans of at most 700) and 18 at random from everybody.
All other loans go to three banks: the odds that a loan goes to city-bank grow with its income, to north-bank with
the assets and to union-bank with the seniority (exp(3 r), r the rank from 0 to 1 among those loans; unknown: 1/2).
The rule never looks at the outcome of a loan."""

HELD_OUT_SHARE = 0.3
SMALL_LENDER_LOANS = 90
FROM_OWN_SEGMENT = 72
BANK_PREFERENCE = 3.0


@dataclass(frozen=True, slots=True)
class LenderRows:
    """One lender's training loans, as positions in the table, ascending."""

    name: str
    rows: "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class DemoSplit:
    """Held-out loans and each lender's training loans; no row stands twice, and every row stands once.

    Attributes:
        held_out: Positions in the table, ascending.
        banks: Three large lenders.
        small_lenders: Five lenders of exactly 90 loans.
    """

    held_out: "NDArray[np.int64]"
    banks: tuple[LenderRows, ...]
    small_lenders: tuple[LenderRows, ...]

    @property
    def lenders(self) -> tuple[LenderRows, ...]:
        """All lenders, banks first."""
        return self.banks + self.small_lenders


def demo_loans() -> tuple[Loans, Schema]:
    """Return the 4,454 loans that ship with the package, and their schema."""
    folder = resources.files("fedfin.simulation")
    schema = Schema.from_yaml((folder / "credit_data.yaml").read_text("utf-8"), "credit_data.yaml")
    with resources.as_file(folder / "credit_data.csv.gz") as path:
        return read_loans(DataSource(path=str(path)), schema, path.parent), schema


def split_demo(loans: Loans, seed: int) -> DemoSplit:
    """Split the demo's loans by `RULE`.

    Args:
        loans: Those of `demo_loans`; not changed.
        seed: Draws everything that the rule leaves to chance.

    Raises:
        DataError: There are too few loans of a segment, or a lender would have one outcome only.
    """
    rng = np.random.default_rng(seed)
    held_out = np.sort(
        np.concatenate([_draw_share(np.flatnonzero(loans.labels == label), rng) for label in (0, 1)])
    )
    rest = np.setdiff1d(np.arange(len(loans)), held_out)
    banks, small_lenders = _share_out(loans.frame, rest, rng)
    for lender in banks + small_lenders:
        if len(np.unique(loans.labels[lender.rows])) < 2:
            msg = f"seed {seed} gives {lender.name} loans of one outcome only; choose another seed"
            raise DataError(msg)
    return DemoSplit(held_out, banks, small_lenders)


def split_unequal(
    frame: "pd.DataFrame", num_lenders: int, columns: "Sequence[str]", rng: np.random.Generator
) -> "tuple[NDArray[np.int64], ...]":
    """Split a table over lenders of very unequal size that serve different people, without a look at outcomes.

    A lender's attraction is log-normal with standard deviation 1 (95% of lenders differ by a factor of 50), and it
    prefers high or low values of one column: the odds that a loan goes to it are its attraction times exp(3 r) or
    exp(-3 r), r the loan's rank in that column from 0 to 1, unknown 1/2.

    Args:
        frame: Loans; not changed.
        num_lenders: Lenders, >= 1.
        columns: Numeric columns that lenders choose from, at least one.
        rng: Draws attractions, preferences and every loan's lender.

    Returns:
        Each lender's positions in the table, ascending; every row once, no lender empty.

    Raises:
        DataError: A lender got no loan.
    """
    ranks = np.stack([frame[column].rank(pct=True).fillna(0.5).to_numpy() for column in columns])
    attraction = rng.lognormal(0.0, 1.0, num_lenders)
    preference = rng.choice((-BANK_PREFERENCE, BANK_PREFERENCE), num_lenders)
    odds = attraction[:, None] * np.exp(
        preference[:, None] * ranks[rng.integers(0, len(columns), num_lenders)]
    )
    shares = np.cumsum(odds / odds.sum(axis=0), axis=0)
    owner = (rng.random(len(frame)) > shares[:-1]).sum(axis=0)
    parts = tuple(np.flatnonzero(owner == lender) for lender in range(num_lenders))
    if min(len(part) for part in parts) == 0:
        msg = f"{len(frame)} loans leave a lender of {num_lenders} without any; take fewer lenders or another seed"
        raise DataError(msg)
    return parts


_BANKS = (("city-bank", "Income"), ("north-bank", "Assets"), ("union-bank", "Seniority"))


def _tenants(loans: "pd.DataFrame") -> "NDArray[np.bool_]":
    return np.asarray(loans["Home"] == "rent")


def _neither_own_nor_rent(loans: "pd.DataFrame") -> "NDArray[np.bool_]":
    return np.asarray(loans["Home"].isin(["parents", "priv", "other", "ignore"]))


def _at_most_a_year_in_the_job(loans: "pd.DataFrame") -> "NDArray[np.bool_]":
    return np.asarray(loans["Seniority"] <= 1)


def _freelancers(loans: "pd.DataFrame") -> "NDArray[np.bool_]":
    return np.asarray(loans["Job"] == "freelance")


def _at_most_700(loans: "pd.DataFrame") -> "NDArray[np.bool_]":
    return np.asarray(loans["Amount"] <= 700)


SEGMENTS: "tuple[tuple[str, Callable[[pd.DataFrame], NDArray[np.bool_]]], ...]" = (
    ("tenant-micro", _tenants),
    ("family-micro", _neither_own_nor_rent),
    ("starter-micro", _at_most_a_year_in_the_job),
    ("freelance-micro", _freelancers),
    ("basket-micro", _at_most_700),
)
"""Whom each small lender serves, as a mask over a table; the first one chooses first."""


def _share_out(
    frame: "pd.DataFrame", rows: "NDArray[np.int64]", rng: np.random.Generator
) -> tuple[tuple[LenderRows, ...], tuple[LenderRows, ...]]:
    """Return the rows of the banks and of the small lenders; outcomes are no argument."""
    small_lenders: list[LenderRows] = []
    for name, serves in SEGMENTS:
        own = rows[serves(frame.iloc[rows])]
        if len(own) < FROM_OWN_SEGMENT:
            msg = f"{len(own)} loans are left for {name}, its segment needs {FROM_OWN_SEGMENT}; give the demo its table"
            raise DataError(msg)
        chosen = rng.choice(own, FROM_OWN_SEGMENT, replace=False)
        others = rng.choice(np.setdiff1d(rows, chosen), SMALL_LENDER_LOANS - FROM_OWN_SEGMENT, replace=False)
        small_lenders.append(LenderRows(name, np.sort(np.concatenate([chosen, others]))))
        rows = np.setdiff1d(rows, small_lenders[-1].rows)
    bank_of = _choose_bank(frame.iloc[rows], rng)
    banks = tuple(LenderRows(name, rows[bank_of == position]) for position, (name, _) in enumerate(_BANKS))
    return banks, tuple(small_lenders)


def _draw_share(rows: "NDArray[np.int64]", rng: np.random.Generator) -> "NDArray[np.int64]":
    return rng.choice(rows, round(HELD_OUT_SHARE * len(rows)), replace=False)


def _choose_bank(loans: "pd.DataFrame", rng: np.random.Generator) -> "NDArray[np.int64]":
    """Return the bank of each loan, 0 to 2, drawn with odds that grow with what the bank prefers."""
    ranks = np.stack([loans[column].rank(pct=True).fillna(0.5).to_numpy() for _, column in _BANKS], axis=1)
    odds = np.exp(BANK_PREFERENCE * ranks)
    shares = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    return np.asarray((rng.random((len(loans), 1)) > shares[:, :2]).sum(axis=1), dtype=np.int64)

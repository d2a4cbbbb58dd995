"""The filter that holds a lender's limit, however later jobs are chosen.

Feldman & Zrnic 2021, "Individual privacy accounting via a Renyi filter": at one Renyi order, fixed beforehand, the
divergences of releases may be added up and held against a bound although each release's noise was chosen after
seeing the earlier ones. The order of an account is the one at which its first job takes the least of the limit: that
job is known before anything of these loans has left, so the choice depends on no release (docs/decisions/0013).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedfin.errors import BudgetSpentError, PrivacyParameterError
from fedfin.privacy.accounting import ORDERS, checked_delta, divergences
from fedfin.privacy.events import Event, Gap, gap_of

__all__ = ["Account", "capacity", "divergence", "filter_epsilon", "least_limit", "open_account"]

_NO_GAP = Gap()


@dataclass(frozen=True, slots=True)
class Account:
    """What is fixed for a data snapshot when its first job is reserved.

    Attributes:
        order: The Renyi order at which the limit is held; one of `accounting.ORDERS`.
        delta: Delta of the guarantee for all jobs together, in (0, 1).
    """

    order: float
    delta: float

    def __post_init__(self) -> None:
        checked_delta(self.delta)
        if self.order not in ORDERS:
            msg = f"the Renyi order {self.order} is none of those at which divergences are known"
            raise PrivacyParameterError(msg)


def open_account(events: Sequence[Event], epsilon_limit: float, delta: float) -> Account:
    """Return the account whose order lets these events take the least share of the limit.

    Events that RDP puts at `epsilon_limit` or below (the least over all orders, as `accounting.calibrate` aims
    at) fit at that order, exactly.

    Args:
        events: The first job; at least one.
        epsilon_limit: The lender's limit; > 0.
        delta: In (0, 1).

    Raises:
        BudgetSpentError: The limit is so small that it holds at no order.
        PrivacyParameterError: `delta` or an event cannot be accounted for.
    """
    gap = gap_of(events)
    shares = {
        order: spent / room
        for order, spent in zip(ORDERS, divergences(events), strict=True)
        if (room := capacity(Account(order, delta), epsilon_limit, gap)) > 0.0
    }
    if not shares:
        msg = (
            f"policy.epsilon_limit {epsilon_limit:g} at delta {delta:g} leaves no room for any release; ask the"
            " data officer to raise policy.epsilon_limit in bank.yaml"
        )
        raise BudgetSpentError(msg)
    return Account(min(shares, key=lambda order: shares[order]), delta)


def divergence(events: Sequence[Event], order: float) -> float:
    """Return the Renyi divergence of the composition at one of `accounting.ORDERS`; 0.0 without events."""
    return divergences(events)[ORDERS.index(order)]


def capacity(account: Account, epsilon_limit: float, gap: Gap = _NO_GAP) -> float:
    """Return the divergence that may be spent in all at the account's order; below 0 where nothing may.

    Args:
        account: Order and delta.
        epsilon_limit: The lender's limit.
        gap: What noise in shares takes of the limit, of all that is spent.
    """
    left = gap.delta_left(account.delta)
    return gap.continuous(epsilon_limit) - _conversion(account.order, left) if left > 0.0 else -math.inf


def least_limit(account: Account, gap: Gap = _NO_GAP) -> float:
    """Return the epsilon at or below which a limit admits nothing at the account's order; inf: no limit admits any."""
    left = gap.delta_left(account.delta)
    return gap.epsilon(_conversion(account.order, left)) if left > 0.0 else math.inf


def filter_epsilon(account: Account, spent: float, gap: Gap = _NO_GAP) -> float:
    """Return the epsilon that a divergence of `spent` at the account's order guarantees at its delta.

    0.0 where nothing was spent. A first small job already costs the conversion's constant here, so as a figure
    for people the share of `capacity` or PLD says more.

    Source: Canonne, Kamath & Steinke 2020, proposition 12.
    """
    if spent == 0.0:
        return 0.0
    order, delta = account.order, gap.delta_left(account.delta)
    if delta <= 0.0:
        return math.inf
    # in the order of dp_accounting's sum: a plan that RDP puts at the limit must not miss it by a rounding
    return gap.epsilon(spent + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def _conversion(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

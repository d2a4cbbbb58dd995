"""The time of day in which a lender accepts jobs and works on its loans: `policy.hours`, by this machine's clock."""

import datetime as dt
from typing import Final

from fedfin.config import LenderPolicy
from fedfin.errors import NotYetError

__all__ = ["GRACE", "is_open", "next_opening", "require_hours", "utc_now"]

GRACE: Final = dt.timedelta(minutes=10)
"""A sum that was opened within the hours is answered so long after them: at the stroke all would be lost at once."""


def utc_now() -> dt.datetime:
    """Return the present time, with its zone."""
    return dt.datetime.now(dt.UTC)


def is_open(policy: LenderPolicy, now: dt.datetime) -> bool:
    """Tell whether a moment is within the lender's hours, the start included and the end not.

    What counts is the clock on the wall of the policy's zone: where that is put back, an hour comes twice.

    Args:
        policy: The lender's.
        now: A moment with a zone, any.
    """
    span = _span(policy)
    if span is None:
        return True
    (start, end), local = span, now.astimezone(policy.zone()).time()
    return start <= local < end if start < end else local >= start or local < end


def next_opening(policy: LenderPolicy, now: dt.datetime) -> dt.datetime | None:
    """Return when the hours begin next, in the policy's zone; None where they are open at `now`."""
    span = _span(policy)
    if span is None or is_open(policy, now):
        return None
    local = now.astimezone(policy.zone())
    day = local.date() if local.time() < span[0] else local.date() + dt.timedelta(days=1)
    return dt.datetime.combine(day, span[0], policy.zone())


def require_hours(policy: LenderPolicy, now: dt.datetime, *, grace: dt.timedelta = dt.timedelta()) -> None:
    """Refuse what may not be done at this hour.

    Args:
        policy: The lender's.
        now: A moment with a zone.
        grace: How long after the hours it may still be done.

    Raises:
        NotYetError: It is out of hours (waits for `hours`).
    """
    if not (is_open(policy, now) or is_open(policy, now - grace)):
        msg = f"this lender takes part between {policy.hours} {policy.time_zone} only (policy.hours); ask again then"
        raise NotYetError("hours", msg)


def _span(policy: LenderPolicy) -> tuple[dt.time, dt.time] | None:
    if policy.hours is None:
        return None
    start, end = (dt.time.fromisoformat(part) for part in policy.hours.split("-"))
    return start, end

"""How long a log keeps the bodies of its entries, by kind; the hashes stay for ever, and every proof with them.

An entry may go when its class has run out. What the rest of the log is checked with never goes: who the members are and
with which keys, roster versions, rotations, revocations, seals, erasures, forks. The periods are floors that most
readers of a credit model's records ask for, not advice: a lender's own law may ask for more, and then
`fedfin audit prune --years CLASS=YEARS` keeps them longer.
"""

import calendar
import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedfin.audit.reading import LogReader
from fedfin.errors import AuditError

__all__ = ["RETENTION", "Due", "RetentionClass", "class_of", "due"]


@dataclass(frozen=True, slots=True)
class RetentionClass:
    """Entries that are kept equally long.

    Attributes:
        name: As `fedfin audit prune` names it.
        years: After which the bodies may go; None keeps them for ever.
        types: Of the events.
        reason: Why so long, and for whom.
    """

    name: str
    years: int | None
    types: tuple[str, ...]
    reason: str


RETENTION: Final = (
    RetentionClass(
        "identity",
        None,
        ("founding", "enrolment", "roster", "rotation", "revocation", "fork", "pruned", "seal"),
        "the rest of the log is checked with them",
    ),
    RetentionClass(
        "decisions",
        10,
        (
            "policy",
            "plan",
            "consent",
            "receipt",
            "approval",
            "budget",
            "candidate",
            "evaluation",
            "gate",
            "release",
            "model_kept",
            "retirement",
            "incident",
            "job_ended",
        ),
        "the documentation of a model that is in use (EU AI Act, article 18: ten years; model inventories)",
    ),
    RetentionClass(
        "rounds",
        5,
        ("exchange", "round_completed", "round_lost", "refusal", "failure", "checkpoint"),
        "how a model came about, beyond the 25 months of Regulation B, 12 CFR 1002.12(b)",
    ),
    RetentionClass(
        "operation",
        2,
        ("service", "clock", "export", "log_access"),
        "automatic logs of the operation (EU AI Act, article 19: six months at least)",
    ),
)
"""Every event's class; an event that this release does not know is kept for ever."""


@dataclass(frozen=True, slots=True)
class Due:
    """What may be erased of one class.

    Attributes:
        retention: The class.
        ranges: First index and the one after the last; ascending, apart.
    """

    retention: RetentionClass
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_entries(self) -> int:
        """Entries in all ranges."""
        return sum(stop - start for start, stop in self.ranges)


def class_of(event_type: str) -> RetentionClass:
    """Return the retention class of an event's type; what is unknown is kept like what is kept longest."""
    return next((found for found in RETENTION if event_type in found.types), RETENTION[0])


def due(log: LogReader, now: dt.datetime, years: Mapping[str, int] | None = None) -> tuple[Due, ...]:
    """Return what may be erased at `now`, by class; nothing that lies after the last checkpoint.

    Args:
        log: Open to read.
        now: With its time zone.
        years: Longer periods of classes, by name.

    Raises:
        AuditError: A class has no such name, is kept for ever, or would be kept shorter than its floor.
    """
    limits = {found.name: _limit(found, now, years or {}) for found in RETENTION}
    unknown = sorted((years or {}).keys() - limits.keys())
    if unknown:
        msg = f"there is no retention class {unknown[0]}; name one of {', '.join(limits)}"
        raise AuditError(msg)
    # What no checkpoint covers yet is shown by nothing but its body.
    covered = max((size for size, _ in log.checkpoints()), default=0)
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in limits}
    for index, entry in log.entries(0, covered):
        if entry is None:
            continue
        name = class_of(entry.event.type).name
        limit = limits[name]
        if limit is None or entry.time >= limit:
            continue
        ranges = found[name]
        if ranges and ranges[-1][1] == index:
            ranges[-1] = ranges[-1][0], index + 1
        else:
            ranges.append((index, index + 1))
    return tuple(Due(kept, tuple(found[kept.name])) for kept in RETENTION if found[kept.name])


def _limit(kept: RetentionClass, now: dt.datetime, years: Mapping[str, int]) -> str | None:
    """Return the time before which entries of the class may go, as entries hold it."""
    asked = years.get(kept.name)
    if kept.years is None:
        if asked is not None:
            msg = f"the entries of class {kept.name} are kept for ever ({kept.reason}); leave it out"
            raise AuditError(msg)
        return None
    if asked is not None and asked < kept.years:
        msg = (
            f"class {kept.name} is kept {kept.years} years at least, not {asked} ({kept.reason}); give as many years"
            " or more"
        )
        raise AuditError(msg)
    then = now.astimezone(dt.UTC)
    year = then.year - (asked or kept.years)
    if year < 1:
        return ""
    day = min(then.day, calendar.monthrange(year, then.month)[1])
    return then.replace(year=year, day=day).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"

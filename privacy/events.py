"""What a release is to the accountant: typed events, and how the ledger names and rebuilds them.

An event holds a mechanism's parameters and never only an epsilon, so that every figure can be computed again,
together with what comes later. What is of no type listed here cannot be accounted for and is refused.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import TypeAlias

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.gaussian_event import GaussianEvent
from fedfin.privacy.shared_events import SharedNoiseEvent

__all__ = [
    "Event",
    "Gap",
    "GaussianEvent",
    "SharedNoiseEvent",
    "count_events",
    "event_of",
    "gap_of",
    "merge_events",
    "parameters_of",
]

Event: TypeAlias = GaussianEvent | SharedNoiseEvent
"""Every kind of event that can be accounted for."""

_TYPES = (GaussianEvent, SharedNoiseEvent)
_SHARED_PARAMETERS = ("size", "share_stddev", "num_shares", "num_lenders")
_LARGEST_EPSILON = 150.0  # beyond the largest plan; with shares, larger ones are inf


@dataclass(frozen=True, slots=True)
class Gap:
    """How far releases may be from those with continuous noise: H and D of the claim of `shared_events`."""

    eta: float = 0.0
    zeta: float = 0.0

    def delta_left(self, delta: float) -> float:
        """Return the delta at which the continuous releases must be accounted for; 0 or below: none is left."""
        if self == Gap():
            return delta
        if self.eta > 1.0:
            return -math.inf
        spare = self.zeta * (1.0 + math.exp(self.eta + _LARGEST_EPSILON))
        return math.exp(-self.eta) * (delta - spare)

    def epsilon(self, continuous: float) -> float:
        """Return the epsilon of the releases, from that of the continuous ones at `delta_left`."""
        if self == Gap():
            return continuous
        return continuous + 2.0 * self.eta if continuous <= _LARGEST_EPSILON else math.inf

    def continuous(self, epsilon: float) -> float:
        """Return the largest epsilon of the continuous releases with which these keep to `epsilon`."""
        return epsilon if self == Gap() else min(epsilon - 2.0 * self.eta, _LARGEST_EPSILON)


def gap_of(events: Iterable[Event]) -> Gap:
    """Return how far all these releases together may be from continuous ones; none without shares of noise."""
    gaps = [(event.count, *event.round_gap) for event in events]
    return Gap(sum(count * eta for count, eta, _ in gaps), sum(count * zeta for count, _, zeta in gaps))


def parameters_of(event: Event) -> str:
    """Return what a mechanism has beyond noise, rate and count, as JSON for the ledger."""
    if isinstance(event, GaussianEvent):
        return "{}"
    return json.dumps({name: getattr(event, name) for name in _SHARED_PARAMETERS})


def event_of(
    mechanism: str, noise_multiplier: float, sample_rate: float, count: int, parameters: str
) -> Event:
    """Return the event that the ledger recorded as these values.

    Raises:
        PrivacyParameterError: No mechanism of this version has that name, or a value is out of range.
    """
    event: Event | None = None
    try:
        known = json.loads(parameters)
        if mechanism == "gaussian" and known == {}:
            event = GaussianEvent(noise_multiplier, sample_rate, count)
        elif mechanism == "discrete_gaussian_shares" and tuple(known) == _SHARED_PARAMETERS:
            event = SharedNoiseEvent(noise_multiplier, sample_rate, count, *map(int, known.values()))
    except (ValueError, TypeError) as error:
        msg = f"the parameters of a mechanism {mechanism} do not parse"
        raise PrivacyParameterError(msg) from error
    if event is None:
        msg = f"a mechanism {mechanism} with parameters {parameters} is unknown to this version"
        raise PrivacyParameterError(msg)
    return event


def count_events(events: Iterable[Event]) -> Counter[Event]:
    """Return how many releases of each kind there are; a kind is an event of count 1.

    Raises:
        PrivacyParameterError: An event is of no type that can be accounted for.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        if type(event) not in _TYPES:
            msg = (
                f"an event of type {type(event).__name__} cannot be accounted for; describe every release as"
                f" {' or '.join(kind.__name__ for kind in _TYPES)}"
            )
            raise PrivacyParameterError(msg)
        counts[replace(event, count=1)] += event.count
    return counts


def merge_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return equal events as one with the sum of their counts, in a canonical order; errors as `count_events`."""
    counts = count_events(events)
    kinds = sorted(counts, key=lambda kind: (kind.mechanism, astuple(kind)))
    return tuple(replace(kind, count=counts[kind]) for kind in kinds)

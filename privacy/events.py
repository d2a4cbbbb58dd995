"""What a release is to the accountant: typed events, and how the ledger names and rebuilds them.

An event holds a mechanism's parameters and never only an epsilon, so that every figure can be computed again,
together with what comes later. What is of no type listed here cannot be accounted for and is refused.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedfin.errors import PrivacyParameterError

__all__ = ["Event", "GaussianEvent", "event_of", "merge_events"]

_MIN_NOISE_MULTIPLIER = 0.01  # epsilon is in the thousands below
_MIN_RATE_OVER_NOISE = 1e-5  # below, the divergence of a step drowns in float64's rounding and reads 0


@dataclass(frozen=True, slots=True, order=True)
class GaussianEvent:
    """`count` releases of a Gaussian mechanism on a Poisson sample of the loans, or on all of them.

    Attributes:
        noise_multiplier: Noise's standard deviation over the L2 sensitivity; >= 0.01, at most
            `sample_rate` * 1e5.
        sample_rate: Chance of each loan to be in a release's sample, in (0, 1]; 1 samples nothing.
        count: Releases; >= 1.

    Raises:
        PrivacyParameterError: A value is out of range, so that the event cannot be accounted for.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not (0.0 < self.sample_rate <= 1.0):
            msg = f"sample_rate is {self.sample_rate}; the chance of a loan to be sampled must be in (0, 1]"
            raise PrivacyParameterError(msg)
        least, largest = self.noise_range(self.sample_rate)
        if not (least <= self.noise_multiplier <= largest):
            msg = (
                f"noise_multiplier is {self.noise_multiplier} at sample_rate {self.sample_rate}; below"
                f" {least} it protects nothing and above {largest:g} its cost drowns in"
                " rounding: choose one between"
            )
            raise PrivacyParameterError(msg)
        if self.count < 1 or self.count != int(self.count):
            msg = f"count is {self.count!r}; an event stands for a whole number of releases, at least 1"
            raise PrivacyParameterError(msg)

    @staticmethod
    def noise_range(sample_rate: float) -> tuple[float, float]:
        """Return the least and the largest noise multiplier that can be accounted for at a rate."""
        return _MIN_NOISE_MULTIPLIER, sample_rate / _MIN_RATE_OVER_NOISE

    @property
    def mechanism(self) -> str:
        """The mechanism's name in the ledger."""
        return "gaussian"

    @property
    def sampler(self) -> str:
        """How a release's sample is drawn: "poisson", or "none" when it takes all loans."""
        return "poisson" if self.sample_rate < 1.0 else "none"

    @property
    def relation(self) -> str:
        """The neighbouring relation of every figure: two tables differ by one loan added or removed."""
        return "add_or_remove_one"

    @property
    def parameters(self) -> str:
        """What the mechanism has beyond noise, rate and count, as JSON for the ledger: nothing."""
        return "{}"


Event = GaussianEvent
"""Every kind of event that can be accounted for."""


def event_of(
    mechanism: str, noise_multiplier: float, sample_rate: float, count: int, parameters: str
) -> Event:
    """Return the event that the ledger recorded as these values.

    Raises:
        PrivacyParameterError: No mechanism of this version has that name, or a value is out of range.
    """
    if mechanism != "gaussian" or parameters != "{}":
        msg = f"a mechanism {mechanism} with parameters {parameters} is unknown to this version; install a newer one"
        raise PrivacyParameterError(msg)
    return GaussianEvent(noise_multiplier, sample_rate, count)


def merge_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return equal events as one with the sum of their counts, in a canonical order.

    Raises:
        PrivacyParameterError: An event is of no type that can be accounted for.
    """
    counts: Counter[Event] = Counter()
    for event in events:
        if type(event) is not GaussianEvent:
            msg = (
                f"an event of type {type(event).__name__} cannot be accounted for; describe every release as"
                " a GaussianEvent"
            )
            raise PrivacyParameterError(msg)
        counts[replace(event, count=1)] += event.count
    return tuple(replace(kind, count=count) for kind, count in sorted(counts.items()))

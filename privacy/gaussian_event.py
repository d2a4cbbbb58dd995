"""The event of Gaussian releases: what DP-SGD and noised histograms are to the accountant."""

from dataclasses import dataclass

from fedfin.errors import PrivacyParameterError

__all__ = ["GaussianEvent"]

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
    def gaussian(self) -> "GaussianEvent":
        """The releases with continuous noise that the accounting knows: these."""
        return self

    @property
    def round_gap(self) -> tuple[float, float]:
        """How far a release is from its continuous counterpart (`shared_events`): not at all."""
        return 0.0, 0.0

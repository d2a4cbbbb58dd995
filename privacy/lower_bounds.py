"""What an attack proves: from its successes to a lower bound of epsilon, at a stated confidence.

An accountant bounds epsilon from above by proof; an attack bounds it from below by experiment. Nothing here uses
`fedfin.privacy.accounting`: a fault there must not hide in its own audit. Only the standard library and numpy are
needed: the binomial tail is summed, and the Gaussian's is `math.erfc`.
"""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np

from fedfin.errors import PrivacyParameterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "binomial_tail",
    "clopper_pearson",
    "epsilon_at_least",
    "mu_at_least",
    "one_run_epsilon",
    "one_run_p_value",
]

_HALVINGS: Final = 60
_LARGEST_EPSILON: Final = 500.0  # beyond this a measured bound says "no protection" all the same
_LARGEST_GRID: Final = 2**22
_SINGLE_STEP_TAIL: Final = 9.0  # standard deviations of a step's noise; the rest counts at the outermost loss
_COMPOSED_TAIL: Final = 12.0
_FFT_ROUNDING: Final = 1e-16
_normal_tail = np.frompyfunc(lambda x: 0.5 * math.erfc(x / math.sqrt(2.0)), 1, 1)


def binomial_tail(count: int, num: int, chance: float) -> float:
    """Return P[Binomial(num, chance) >= count], summed term by term.

    Args:
        count: Any whole number.
        num: Trials; >= 0.
        chance: In [0, 1].
    """
    if count <= 0:
        return 1.0
    if count > num or chance <= 0.0:
        return 0.0
    if chance >= 1.0:
        return 1.0
    if count < num * chance:  # the smaller side keeps its digits
        return 1.0 - binomial_tail(num - count + 1, num, 1.0 - chance)
    log_first = (
        math.lgamma(num + 1.0)
        - math.lgamma(count + 1.0)
        - math.lgamma(num - count + 1.0)
        + count * math.log(chance)
        + (num - count) * math.log1p(-chance)
    )
    # each term is the one before times (num - k) / (k + 1) * odds, a factor below one from here on
    successes = np.arange(count, num, dtype=np.float64)
    if len(successes) > (most := 1000 + 60 * int(math.sqrt(num))):
        successes = successes[:most]
    ratios = (num - successes) / (successes + 1.0) * (chance / (1.0 - chance))
    return min(1.0, math.exp(log_first) * (1.0 + float(np.cumprod(ratios).sum())))


def clopper_pearson(count: int, num: int, error: float) -> tuple[float, float]:
    """Return the lower and the upper bound of a chance, each wrong with a chance of at most `error`.

    Args:
        count: Successes.
        num: Trials; >= 1.
        error: Of each side, in (0, 1).

    Source: Clopper & Pearson 1934, the exact binomial interval.
    """
    low = _last(lambda chance: binomial_tail(count, num, chance) <= error, 0.0, 1.0) if count else 0.0
    misses = num - count
    high = (
        1.0 - _last(lambda chance: binomial_tail(misses, num, chance) <= error, 0.0, 1.0) if misses else 1.0
    )
    return low, high


def mu_at_least(num_correct: int, num_guesses: int, error: float) -> float:
    """Return a lower bound of mu, where every guess told two neighbours of one release apart.

    A release with Gaussian noise of multiplier s is 1/s-Gaussian differentially private, and half of the guesses
    being about a canary that was there and half about one that was not, nobody guesses right with a chance above
    Phi(mu / 2). The number of correct guesses is then no larger than a binomial's (for unequal chances: Hoeffding
    1956, theorem 5), so Clopper and Pearson's bound of its chance bounds mu.

    Args:
        num_correct: Right guesses.
        num_guesses: All guesses, as many about present as about absent canaries, fixed beforehand; >= 1.
        error: Chance that the bound is above the true mu, in (0, 1).

    Source: Nasr et al., "Tight Auditing of Differentially Private Machine Learning" (USENIX Security 2023), section
        4; Dong, Roth & Su 2022, "Gaussian Differential Privacy", definition 3.
    """
    low, _ = clopper_pearson(num_correct, num_guesses, error)
    return 2.0 * NormalDist().inv_cdf(low) if low > 0.5 else 0.0


def epsilon_at_least(mu: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """Return an epsilon that `num_steps` steps, each at least mu-Gaussian on a Poisson sample, cannot be below.

    Without sampling this is the exact epsilon of the Gaussian mechanism. With sampling the privacy loss of removing
    a loan is discretised downwards and composed by FFT, so the figure errs below.

    Args:
        mu: Lower bound of one step's shift over its noise; >= 0.
        sample_rate: In (0, 1].
        num_steps: >= 1.
        delta: In (0, 1).

    Returns:
        Epsilon, at most 500.

    Source: Balle & Wang 2018, theorem 8; Koskela, Jaelkoe & Honkela 2020, "Computing tight differential privacy
        guarantees using FFT".
    """
    if not (mu >= 0.0 and 0.0 < sample_rate <= 1.0 and num_steps >= 1 and 0.0 < delta < 1.0):
        msg = (
            f"no epsilon follows from mu {mu}, sample_rate {sample_rate}, {num_steps} steps and delta {delta};"
            " mu must be at least 0, the rate in (0, 1], the steps 1 or more and delta in (0, 1)"
        )
        raise PrivacyParameterError(msg)
    if mu == 0.0:
        return 0.0
    if sample_rate == 1.0:
        total = mu * math.sqrt(num_steps)
        return _last(lambda epsilon: _gaussian_delta(total, epsilon) >= delta, 0.0, _LARGEST_EPSILON)
    losses, chances = _composed_losses(mu, sample_rate, num_steps)

    def still_above(epsilon: float) -> bool:
        above = losses > epsilon
        return float(chances[above] @ -np.expm1(epsilon - losses[above])) >= delta

    return _last(still_above, 0.0, _LARGEST_EPSILON)


def one_run_p_value(
    num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float
) -> float:
    """Return the largest chance of so many correct guesses, were the run (epsilon, delta)-private.

    Args:
        num_canaries: Each was in the run by its own fair coin.
        num_guesses: Canaries guessed about; the number is fixed beforehand.
        num_correct: Right guesses.
        epsilon: Claimed, >= 0.
        delta: Claimed, in [0, 1).

    Source: Steinke, Nasr & Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023), theorem 5.2.
    """
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    plain = binomial_tail(num_correct, num_guesses, chance)
    below = np.array([_binomial_term(count, num_guesses, chance) for count in range(num_correct)])
    if len(below) == 0:
        return 1.0
    within = np.cumsum(below[::-1]) / np.arange(1, num_correct + 1)
    return min(1.0, plain + 2.0 * num_canaries * delta * float(within.max()))


def one_run_epsilon(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, error: float
) -> float:
    """Return the largest epsilon that so many correct guesses refute, at confidence 1 - `error`; 0 for none."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(num_canaries, num_guesses, num_correct, epsilon, delta) <= error

    return _last(refuted, 0.0, 50.0)


def _last(holds: "Callable[[float], bool]", low: float, high: float) -> float:
    """Return about the largest value at which `holds`, true up to somewhere in [low, high]; never one where not."""
    if not holds(low):
        return low
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _binomial_term(count: int, num: int, chance: float) -> float:
    log_ways = math.lgamma(num + 1.0) - math.lgamma(count + 1.0) - math.lgamma(num - count + 1.0)
    if chance >= 1.0:
        return float(count == num)
    return math.exp(log_ways + count * math.log(chance) + (num - count) * math.log1p(-chance))


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta of a mu-Gaussian mechanism at epsilon."""
    far = 0.5 * math.erfc((epsilon / mu + mu / 2.0) / math.sqrt(2.0))
    near = 0.5 * math.erfc((epsilon / mu - mu / 2.0) / math.sqrt(2.0))
    return near - (math.exp(epsilon + math.log(far)) if far > 0.0 else 0.0)


def _composed_losses(
    mu: float, sample_rate: float, num_steps: int
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Return the positive values of the privacy loss of removing a loan, rounded down to a grid, and their chances.

    In units of the noise a step releases z ~ (1 - q) N(0, 1) + q N(mu, 1), and without the loan z ~ N(0, 1): the
    loss at z is log(1 - q + q exp(mu z - mu^2 / 2)), which grows with z.
    """
    lowest = math.log1p(-sample_rate)
    largest = _loss(mu + _SINGLE_STEP_TAIL, mu, sample_rate)
    mean, spread = _moments(mu, sample_rate)
    centre, width = num_steps * mean, _COMPOSED_TAIL * spread * math.sqrt(num_steps) + largest - lowest
    interval = max(0.01 / num_steps, 2.0 * width / _LARGEST_GRID)
    size = 2 ** math.ceil(math.log2(2.0 * width / interval))
    # the chance of each cell [loss, loss + interval), all of it counted at the cell's lower edge
    num_cells = min(size, math.ceil((largest - lowest) / interval))
    edges = lowest + interval * np.arange(1, num_cells)
    above_edges = _chance_above(edges, mu, sample_rate)
    cells = -np.diff(np.concatenate([[1.0], above_edges, [0.0]]))
    composed = np.fft.irfft(np.fft.rfft(cells, size) ** num_steps, size)
    # the FFT wraps around: place the window about the mean of the sum
    first = math.floor((centre - num_steps * lowest) / interval) - size // 2
    positions = first + (np.arange(size) - first) % size
    losses = num_steps * lowest + interval * positions
    # what is as small as the FFT's rounding is left out, which errs below
    kept = (losses > 0.0) & (composed > _FFT_ROUNDING)
    return losses[kept], composed[kept]


def _loss(z: float, mu: float, sample_rate: float) -> float:
    return math.log1p(-sample_rate) + float(
        np.logaddexp(0.0, mu * z - mu * mu / 2.0 + math.log(sample_rate) - math.log1p(-sample_rate))
    )


def _moments(mu: float, sample_rate: float) -> tuple[float, float]:
    """Return mean and standard deviation of one step's loss, by quadrature."""
    z = np.linspace(-10.0, mu + 10.0, 20_001)
    density = (1.0 - sample_rate) * np.exp(-(z**2) / 2.0) + sample_rate * np.exp(-((z - mu) ** 2) / 2.0)
    density /= density.sum()
    loss = np.log1p(-sample_rate) + np.logaddexp(
        0.0, mu * z - mu * mu / 2.0 + math.log(sample_rate) - math.log1p(-sample_rate)
    )
    mean = float(density @ loss)
    return mean, math.sqrt(float(density @ (loss - mean) ** 2))


def _chance_above(losses: "NDArray[np.float64]", mu: float, sample_rate: float) -> "NDArray[np.float64]":
    """Return P[loss >= each value] where the loan is in the table."""
    # inverse of the loss: z = (log((e^loss - 1 + q) / q) + mu^2 / 2) / mu
    z = (np.log1p(np.expm1(losses) / sample_rate) + mu * mu / 2.0) / mu
    tail = (1.0 - sample_rate) * _normal_tail(z) + sample_rate * _normal_tail(z - mu)
    return np.asarray(tail, dtype=np.float64)

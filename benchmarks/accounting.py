"""The ledger's epsilon against a ten times finer accountant, and against the closed form of the Gaussian mechanism.

Ours is `fedfin.privacy.accounting.epsilon_pld`, the figure that a lender reads; the peer is dp_accounting's PLD at
an interval of 1e-5, composed here event by event. Both are upper bounds, and a finer interval is the tighter one: ours
must never be below the peer, and hardly above it. Ten jobs: full batches, sampled ones, and several jobs on the same
loans, their rounds interleaved and given in alternating order. Three more have a closed form (Balle & Wang 2018,
theorem 8): compositions of Gaussian releases of all loans are one Gaussian release.

Every job is timed in a process of its own (CPU seconds, nothing computed before), so no figure comes from a cache.

    python benchmarks/accounting.py [--json]
"""

import argparse
import itertools
import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from machine import document, print_document

from fedfin.privacy.accounting import GaussianEvent, epsilon_pld, epsilon_rdp

DELTA = 1e-5
FINE_INTERVAL = 1e-5
COMPARED_FROM = 0.1  # the relative excess counts from this epsilon on


@dataclass(frozen=True, slots=True)
class Job:
    """Releases in the order in which they leave."""

    name: str
    events: tuple[GaussianEvent, ...]


def interleaved(*jobs: Sequence[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """Return the releases of several jobs in turns."""
    turns = itertools.zip_longest(*jobs)
    return tuple(event for turn in turns for event in turn if event is not None)


def rounds(noise_multiplier: float, sample_rate: float, num_rounds: int, steps: int) -> list[GaussianEvent]:
    """Return a job's rounds, one event each."""
    return [GaussianEvent(noise_multiplier, sample_rate, steps)] * num_rounds


def jobs() -> tuple[Job, ...]:
    """Return the ten jobs."""
    bins, wide_bins = GaussianEvent(9.0), GaussianEvent(25.0)
    return (
        Job("full batch, 10 rounds of 10", (bins, *rounds(16.0, 1.0, 10, 10))),
        Job("full batch, little noise", (GaussianEvent(4.0), *rounds(5.0, 1.0, 5, 10))),
        Job("sampled, 2343 steps", (GaussianEvent(1.0, 0.0128, 2343),)),
        Job("sampled with bins, 20 rounds", (bins, *rounds(2.4, 0.1, 20, 10))),
        Job("sampled, little noise", (bins, *rounds(0.7, 0.01, 20, 50))),
        Job("small epsilon", (GaussianEvent(200.0), *rounds(30.0, 0.05, 20, 10))),
        Job("two jobs in turns", interleaved(rounds(20.0, 1.0, 10, 5), rounds(3.0, 0.1, 10, 10))),
        Job(
            "three jobs in turns, two rates",
            interleaved(rounds(2.0, 0.02, 15, 20), rounds(6.0, 0.3, 10, 5), [bins, wide_bins]),
        ),
        Job(
            "every round its own noise",
            tuple(GaussianEvent(3.0 + 0.25 * number, 0.1 + 0.02 * (number % 3), 10) for number in range(12)),
        ),
        Job(
            "five jobs of a year in turns",
            interleaved(
                rounds(1.4, 0.01, 12, 50),
                rounds(40.0, 1.0, 12, 5),
                rounds(10.0, 0.5, 6, 5),
                rounds(2.5, 0.05, 12, 10),
                [wide_bins] * 3,
            ),
        ),
    )


def closed_forms() -> tuple[tuple[Job, float], ...]:
    """Return three jobs without sampling, each with the noise multiplier of the one release it amounts to."""
    given = (
        Job("one release", (GaussianEvent(4.0),)),
        Job("100 releases", (GaussianEvent(30.0, count=100),)),
        Job(
            "three kinds in turns",
            interleaved(rounds(16.0, 1.0, 10, 10), rounds(40.0, 1.0, 5, 5), [GaussianEvent(9.0)]),
        ),
    )
    return tuple(
        (job, sum(event.count / event.noise_multiplier**2 for event in job.events) ** -0.5) for job in given
    )


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian release, by bisection to float64's precision."""

    def normal_cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    def delta_at(epsilon: float) -> float:
        half, full = 0.5 / noise_multiplier, epsilon * noise_multiplier
        return normal_cdf(half - full) - math.exp(epsilon) * normal_cdf(-half - full)

    low, high = 0.0, 100.0
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if middle in {low, high}:
            break
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def fine_epsilon(events: Sequence[GaussianEvent], delta: float) -> float:
    """Return the peer's figure: PLD at 1e-5, equal events composed as one."""
    accountant = PLDAccountant(value_discretization_interval=FINE_INTERVAL)
    for noise_multiplier, sample_rate in dict.fromkeys((e.noise_multiplier, e.sample_rate) for e in events):
        count = sum(
            e.count for e in events if (e.noise_multiplier, e.sample_rate) == (noise_multiplier, sample_rate)
        )
        gaussian = dp_event.GaussianDpEvent(noise_multiplier)
        event = gaussian if sample_rate == 1.0 else dp_event.PoissonSampledDpEvent(sample_rate, gaussian)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def our_epsilon(events: Sequence[GaussianEvent], delta: float) -> tuple[float, float]:
    """Return our figure and the CPU seconds it took in a process that has computed nothing before."""
    start = time.process_time()
    epsilon = epsilon_pld(events, delta)
    return epsilon, time.process_time() - start


def in_a_new_process(events: Sequence[GaussianEvent]) -> tuple[float, float]:
    """Return what `our_epsilon` gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(our_epsilon, (events, DELTA))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows = []
    for job in jobs():
        ours, seconds = in_a_new_process(job.events)
        start = time.process_time()
        fine = fine_epsilon(job.events, DELTA)
        rows.append(
            {
                "job": job.name,
                "events": len(job.events),
                "releases": sum(event.count for event in job.events),
                "ours": ours,
                "pld_1e-5": fine,
                "shortfall": fine - ours,
                "excess": ours / fine - 1.0,
                "rdp": epsilon_rdp(job.events, DELTA),
                "ours_s": seconds,
                "pld_1e-5_s": time.process_time() - start,
            }
        )
    against_fine = list(rows)
    for job, noise_multiplier in closed_forms():
        ours, seconds = in_a_new_process(job.events)
        exact = analytic_epsilon(noise_multiplier, DELTA)
        rows.append(
            {
                "job": f"closed form: {job.name}",
                "events": len(job.events),
                "releases": sum(event.count for event in job.events),
                "ours": ours,
                "exact": exact,
                "shortfall": exact - ours,
                "excess": ours / exact - 1.0,
                "rdp": epsilon_rdp(job.events, DELTA),
                "ours_s": seconds,
            }
        )
    figures = {
        "accounting.below_pld": max(0.0, *(row["shortfall"] for row in against_fine)),
        "accounting.over_pld": max(row["excess"] for row in against_fine if row["pld_1e-5"] >= COMPARED_FROM),
        "accounting.slowest_s": max(row["ours_s"] for row in rows),
        "accounting.below_exact": max(0.0, *(row["shortfall"] for row in rows if "exact" in row)),
        "accounting.over_exact": max(row["excess"] for row in rows if "exact" in row),
    }
    print_document(document("accounting", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

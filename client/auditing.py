"""The privacy audit: attack the very training code on a twin of the job, and hold the result against the ledger.

The twin (`fedfin.client.twin`) runs the lender's training code under the plan's own noise, rate and bound, on at most
500 of its loans with canaries among them. It is thrown away: nothing of it is sent or kept, only the verdict is shown,
and only to the lender. So no borrower pays for it and no ledger is charged.

Four parts, each with its share of the error fixed beforehand:

1. clipping: with the noise switched off, one hostile loan more moves a step's sum by at most the bound, exactly;
2. noise: two lenders train as the plan says, with columns in which no loan has anything, so that what these release
   is noise alone: of the planned scale and shape, and new in every step, every round and at every lender; in the
   difference of two equal steps every other value is seen to have its noise too;
3. canaries: what the auditor tells apart of them bounds each step's epsilon from below and, by composition over the
   steps that were counted in part 2, the whole job's; the one-run theorem bounds it a second time. Both rest on
   batches drawn by coins, so the draws are looked at as well;
4. bins (`fedfin.client.bins_audit`): how far one loan moves the histogram, and its noise's scale and shape. It is not
   attacked: the bounds of part 3 are of the training alone, and so of the whole job too.

The bounds are in `fedfin.privacy.lower_bounds` and use none of the accountant's code: a fault there shows here.
"""

import math
import secrets
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from fedfin.client.audit_report import AuditReport
from fedfin.client.bins_audit import bins_checks
from fedfin.client.training import LocalPrivacy
from fedfin.client.twin import CanaryJob, Twin
from fedfin.credit.binning import bins_from_histogram, encode, histogram
from fedfin.credit.models import Architecture, architecture_of, encoding_of
from fedfin.errors import DataError, PrivacyParameterError
from fedfin.privacy import accounting
from fedfin.privacy.canaries import guess_extremes
from fedfin.privacy.draw_checks import again_check, size_check
from fedfin.privacy.events import GaussianEvent
from fedfin.privacy.ledger import Ledger, Spent
from fedfin.privacy.lower_bounds import clopper_pearson, epsilon_at_least, mu_at_least, one_run_epsilon
from fedfin.privacy.noise import NoiseSource, SecureNoise
from fedfin.privacy.noise_checks import (
    Check,
    between_check,
    everywhere_check,
    lag_check,
    repeat_check,
    scale_check,
    shape_check,
    tail_check,
    within_check,
)
from fedfin.privacy.snapshot import snapshot_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fedfin.credit.schema import Schema
    from fedfin.credit.source import Loans
    from fedfin.plan import JobPlan

__all__ = ["AuditSize", "audit_job", "audit_loans"]

# Together 1 - CONFIDENCE of the report: honest code fails no more often than that, whichever of these fails it.
_STEP_ERROR: Final = 2e-4
_ONE_RUN_ERROR: Final = 3e-4
_CHECK_ERROR: Final = 3.8e-5  # each of thirteen that chance can fail; the others are exact

_CLIPPING_ROUNDING: Final = 1e-4
_GUESSED_SHARE: Final = 0.8  # of the canaries, in the one-run bound
_NO_LIMIT: Final = 1e6  # of the twin's own ledger, whose figures are compared and not enforced
_MOST_COMMITS: Final = 200


@dataclass(frozen=True, slots=True)
class AuditSize:
    """How much is looked at; fixed before anything is seen.

    Attributes:
        num_canaries: Of each twin job, >= 100.
        num_loans: The lender's loans that train beside them, at most.
        mu_precision: Wanted standard error of a step's measured mu, as a share of the claimed one.
        most_steps: Single steps at most; above, the precision is less.
        num_whole_pairs: Pairs of steps whose noise is looked at in every value.
    """

    num_canaries: int = 1000
    num_loans: int = 500
    mu_precision: float = 0.015
    most_steps: int = 30_000
    num_whole_pairs: int = 200

    @classmethod
    def of(cls, architecture: Architecture) -> "AuditSize":
        """Return what takes minutes and not tens of them: a step of attention costs ten times another's."""
        if architecture.kind == "attention":
            return cls(num_canaries=2000, num_loans=100, mu_precision=0.02, most_steps=3000)
        return cls()


def audit_loans(
    loans: "Loans",
    schema: "Schema",
    plan: "JobPlan",
    *,
    progress: "Callable[[int, int], None] | None" = None,
) -> AuditReport:
    """Audit a plan on a lender's own loans.

    Args:
        loans: Checked loans; not changed. The twin's bins are made of them without noise: they do not leave.
        schema: The columns.
        plan: The job, in privacy mode `local`.
        progress: Called with the steps done and the steps in all.

    Raises:
        PrivacyParameterError: The plan has no noise of the lender's own to audit.
        DataError: There are too few loans.
    """
    bins = bins_from_histogram(histogram(loans.frame, schema), schema, plan.model.max_bins)
    encoded = encode(loans.frame, schema, bins, encoding_of(plan.model.kind))
    architecture = architecture_of(plan.model, schema, bins)
    report = audit_job(encoded, loans.labels, architecture, plan, progress=progress)
    multiplier = _calibrated(plan).bins_noise_multiplier
    checks = bins_checks(loans.frame, schema, multiplier, SecureNoise(), _CHECK_ERROR)
    return replace(report, checks=(*report.checks, *checks))


def audit_job(
    loans: "NDArray[np.float32]",
    labels: "NDArray[np.int64]",
    architecture: Architecture,
    plan: "JobPlan",
    *,
    make_noise: "Callable[[], NoiseSource]" = SecureNoise,
    size: AuditSize | None = None,
    rng: np.random.Generator | None = None,
    progress: "Callable[[int, int], None] | None" = None,
) -> AuditReport:
    """Audit a plan on encoded loans.

    Args:
        loans: Shape (n, p), n >= 20; not changed.
        labels: 1 = bad, shape (n,).
        architecture: The plan's model over these inputs.
        plan: The job, in privacy mode `local`.
        make_noise: Makes each lender's noise source, as the lender's process does.
        size: How much is looked at; None takes `AuditSize.of` the architecture.
        rng: Draws loans, coins and whom to guess about; None takes a fresh one.
        progress: Called with the steps done and the steps in all.

    Raises:
        PrivacyParameterError: The plan has no noise of the lender's own to audit.
        DataError: There are too few loans.
    """
    started = time.monotonic()
    size, rng = size or AuditSize.of(architecture), rng or np.random.default_rng()
    if plan.privacy.mode != "local":
        msg = (
            f"privacy.mode is {plan.privacy.mode}; the audit attacks each lender's own noise: set it to local"
        )
        raise PrivacyParameterError(msg)
    if len(loans) < 20:
        msg = f"the audit trains on the lender's loans and found {len(loans)}; it needs 20 at least"
        raise DataError(msg)
    training = plan.training
    calibrated = _calibrated(plan)
    claim = _claim(plan, calibrated)
    sigma = calibrated.training_noise_multiplier
    rows = rng.permutation(len(loans))[: size.num_loans]
    twin = Twin(
        loans[rows],
        labels[rows],
        architecture=architecture,
        training=training,
        privacy=LocalPrivacy(sigma, plan.privacy.clipping_bound),
    )
    num_jobs, steps_of_job = _canary_jobs(size, sigma, training.sample_rate, plan.num_steps)
    tick = _ticker(progress, 2 * twin.num_noise_rounds + num_jobs * steps_of_job)

    clipping = _clipping_check(twin)
    lenders = (make_noise(), make_noise())
    seen = [twin.noise_of(noise, tick) for noise in lenders]
    noises = [lender.noise for lender in seen]
    jobs = [
        twin.canary_job(
            lenders[job % 2], num_canaries=size.num_canaries, num_steps=steps_of_job, rng=rng, tick=tick
        )
        for job in range(num_jobs)
    ]
    whole = twin.whole_noise(lenders[0], size.num_whole_pairs)
    num_steps = plan.training.rounds * max(lender.steps_a_round for lender in seen)
    num_correct, num_guesses = sum(job.num_correct for job in jobs), sum(job.num_guesses for job in jobs)
    mu = mu_at_least(num_correct, num_guesses, _STEP_ERROR) if num_guesses else 0.0
    one_run_guesses = int(_GUESSED_SHARE * size.num_canaries) // 2 * 2
    one_run_correct = guess_extremes(jobs[0].scores, jobs[0].members, one_run_guesses)
    return AuditReport(
        model=architecture.kind,
        epsilon_plan=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        claim_pld=claim.epsilon_pld,
        claim_rdp=claim.epsilon_rdp,
        noise_multiplier=sigma,
        sample_rate=training.sample_rate,
        num_steps=num_steps,
        epsilon_by_steps=epsilon_at_least(mu, training.sample_rate, num_steps, plan.privacy.delta),
        mu_by_steps=mu,
        num_guesses=num_guesses,
        num_correct=num_correct,
        epsilon_by_one_run=one_run_epsilon(
            size.num_canaries, one_run_guesses, one_run_correct, plan.privacy.delta, _ONE_RUN_ERROR
        ),
        one_run_canaries=size.num_canaries,
        one_run_guesses=one_run_guesses,
        one_run_correct=one_run_correct,
        checks=(
            clipping,
            _shift_check(jobs, sigma),
            _sampling_check(jobs, training.sample_rate),
            again_check([job.draws for job in jobs], training.sample_rate, _CHECK_ERROR),
            size_check([job.draws for job in jobs], training.sample_rate, _CHECK_ERROR),
            everywhere_check(whole, _CHECK_ERROR),
            scale_check(np.concatenate(noises), _CHECK_ERROR),
            shape_check(np.concatenate(noises), _CHECK_ERROR),
            tail_check(np.concatenate(noises), _CHECK_ERROR),
            repeat_check(noises),
            within_check(noises, _CHECK_ERROR),
            between_check(noises[0], noises[1], _CHECK_ERROR),
            lag_check(noises, _CHECK_ERROR),
        ),
        seconds=time.monotonic() - started,
    )


def _calibrated(plan: "JobPlan") -> accounting.CalibratedNoise:
    return accounting.calibrate(plan.privacy, sample_rate=plan.training.sample_rate, num_steps=plan.num_steps)


def _claim(plan: "JobPlan", noise: accounting.CalibratedNoise) -> Spent:
    """Return what a ledger says of the job: a new one, in which it is reserved and committed as a lender does."""
    training, delta = plan.training, plan.privacy.delta
    snapshot = snapshot_of(pd.DataFrame({"twin": [0.0]}), [0], secrets.token_bytes(32))
    bins = GaussianEvent(noise.bins_noise_multiplier)
    steps = GaussianEvent(noise.training_noise_multiplier, training.sample_rate, training.local_steps)
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.db") as ledger:
        ledger.reserve(
            "twin",
            snapshot,
            accounting.job_events(noise, training.sample_rate, plan.num_steps),
            delta=delta,
            epsilon_limit=_NO_LIMIT,
            max_delta=delta,
        )
        ledger.commit("twin", "bins", (bins,), "bins")
        # each commit reads the job's entries again: of very many rounds the later ones stay reserved
        for number in range(1, min(training.rounds, _MOST_COMMITS) + 1):
            ledger.commit("twin", f"round {number}", (steps,), f"round {number}")
        return ledger.held(snapshot, delta)


def _canary_jobs(size: AuditSize, sigma: float, sample_rate: float, num_steps: int) -> tuple[int, int]:
    """Return how many twins of the job are attacked, and the steps of each.

    Of N guesses the error of the measured mu is 2 sqrt(pi / 2) / sqrt(N) where mu is small (half a guess's error
    over the normal density at 0).
    """
    wanted = 2.0 * math.pi * (sigma / size.mu_precision) ** 2
    steps = min(size.most_steps, math.ceil(wanted / (size.num_canaries * sample_rate)))
    of_job = min(num_steps, size.most_steps)
    return max(1, round(steps / of_job)), of_job


def _ticker(progress: "Callable[[int, int], None] | None", total: int) -> "Callable[[], None]":
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _clipping_check(twin: Twin) -> Check:
    reach, allowed = twin.clipping_reach(), 1.0 + _CLIPPING_ROUNDING
    text = f"without noise one hostile loan moves a step's sum by {reach:.4g} times the clipping bound"
    return Check("clipping, exact", reach <= allowed, reach, allowed, text)


def _shift_check(jobs: list[CanaryJob], sigma: float) -> Check:
    """Check that present canaries move the sum by the bound at most, beyond what noise of the planned scale does."""
    sums = [sum(job.shift_sums[side] for job in jobs) for side in (0, 1)]
    counts = [max(1, sum(job.shift_counts[side] for job in jobs)) for side in (0, 1)]
    shift = sums[0] / counts[0] - sums[1] / counts[1]
    error = sigma * math.sqrt(1.0 / counts[0] + 1.0 / counts[1])
    allowed = 1.0 + _CLIPPING_ROUNDING + NormalDist().inv_cdf(1.0 - _CHECK_ERROR) * error
    text = f"canaries moved the sum by {shift:.4g} times the clipping bound; up to {allowed:.4g} is chance"
    return Check("clipping, with noise", shift <= allowed, shift, allowed, text)


def _sampling_check(jobs: list[CanaryJob], sample_rate: float) -> Check:
    drawn, num = sum(job.num_drawn for job in jobs), sum(job.num_draws for job in jobs)
    low, high = clopper_pearson(drawn, num, _CHECK_ERROR / 2.0)
    share = drawn / num
    text = f"canaries were drawn with a chance of {share:.5g}, the plan says {sample_rate:g}"
    return Check("sample rate", low <= sample_rate <= high, share, sample_rate, text)

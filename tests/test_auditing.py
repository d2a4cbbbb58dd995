"""The audit passes the code as it is, and fails each fault that is planted around the very same code.

Twins are small here: a job of twenty steps at epsilon 8, so that a few hundred steps tell. The audit that the command
runs, at epsilon 4 with its full size, is the slow test.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

import fedfin.client.histograms
import fedfin.client.twin
import fedfin.privacy.gradients
from fedfin.client.audit_report import CONFIDENCE
from fedfin.client.auditing import AuditSize, audit_job, audit_loans
from fedfin.client.bins_audit import bins_checks
from fedfin.client.training import LocalPrivacy, train_locally
from fedfin.credit.binning import histogram
from fedfin.credit.models import Architecture
from fedfin.errors import DataError, PrivacyParameterError
from fedfin.plan import JobPlan, ModelPlan, PrivacyPlan, TrainingPlan
from fedfin.privacy import accounting
from fedfin.privacy.ledger import Ledger, Spent
from fedfin.privacy.noise import SecureNoise, SimulatedNoise
from fedfin.simulation.partition import demo_loans

LOGISTIC, MLP = Architecture("logistic", 6), Architecture("mlp", 6, (4,))
ATTENTION = Architecture("attention", 6, (4,), (2, 1, 3))
SMALL = AuditSize(num_canaries=200, num_loans=60, mu_precision=0.05, most_steps=400, num_whole_pairs=100)


def job(*, epsilon=8.0, **training):
    return JobPlan(
        training=TrainingPlan(**{"rounds": 4, "local_steps": 5, **training}),
        privacy=PrivacyPlan(epsilon=epsilon, clipping_bound=1.5),
    )


def audit(plan=None, *, architecture=LOGISTIC, source=None, make_noise=None, **more):
    """Audit a small twin; noise is seeded, so that what passes passes every time."""
    seeds = itertools.count()
    make_noise = make_noise or (lambda: (source or Around)(next(seeds)))
    rng = np.random.default_rng(0)
    loans = rng.random((80, 6)).astype(np.float32)
    labels = (loans[:, 0] + 0.3 * rng.normal(size=80) > 0.5).astype(np.int64)
    return audit_job(
        loans, labels, architecture, plan or job(), make_noise=make_noise, size=SMALL, rng=rng, **more
    )


def failed(report):
    return {check.name for check in report.checks if not check.holds}


class Around:
    """A noise source around a right one, of which a test breaks a part."""

    def __init__(self, seed):
        self.source = SimulatedNoise(seed)

    def normal(self, size, stddev):
        return self.source.normal(size, stddev)

    def bernoulli(self, num, rate):
        return self.source.bernoulli(num, rate)

    def words(self, num):
        return self.source.words(num)


@pytest.mark.parametrize(
    ("architecture", "sample_rate"),
    [(LOGISTIC, 1.0), (LOGISTIC, 0.3), (MLP, 1.0), (MLP, 0.3), (ATTENTION, 1.0)],
    ids=lambda value: value.kind if isinstance(value, Architecture) else str(value),
)
def test_the_code_as_it_is_passes_and_the_bound_is_near_the_claim(architecture, sample_rate):
    report = audit(job(sample_rate=sample_rate), architecture=architecture)
    assert report.failures == ()
    assert 0.6 * report.claim_rdp < report.epsilon_measured <= report.claim_pld <= report.claim_rdp <= 8.0


def test_half_the_noise_fails():
    class HalfNoise(Around):
        def normal(self, size, stddev):
            return super().normal(size, stddev / 2)

    report = audit(source=HalfNoise)
    assert report.epsilon_by_steps > report.claim_pld
    assert failed(report) >= {"noise scale", "noise shape"}


def with_bound(factor):
    """The very training code with another clipping bound and the noise of the planned one."""

    def train(*arguments, privacy, **more):
        other = LocalPrivacy(privacy.noise_multiplier / factor, privacy.clipping_bound * factor)
        return train_locally(*arguments, privacy=other, **more)

    return train


def test_no_clipping_fails(monkeypatch):
    monkeypatch.setattr(fedfin.client.twin, "train_locally", with_bound(1e9))
    report = audit()
    assert report.epsilon_by_steps > report.claim_pld
    assert failed(report) == {"clipping, exact", "clipping, with noise"}


def test_clipping_at_slightly_more_than_the_bound_fails(monkeypatch):
    monkeypatch.setattr(fedfin.client.twin, "train_locally", with_bound(1.01))
    assert failed(audit()) == {"clipping, exact"}


def test_clipping_each_layer_to_the_bound_fails_where_the_plans_bound_clips_nothing(monkeypatch):
    """LayerNorm keeps gradients small; three layers at the bound each are more than one bound."""
    add_clipped = fedfin.privacy.gradients.add_clipped

    def by_layer(books, num_loans, bound, total):
        for book in books:
            add_clipped([book], num_loans, bound, total)

    monkeypatch.setattr(fedfin.privacy.gradients, "add_clipped", by_layer)
    assert "clipping, exact" in failed(audit(architecture=MLP))


def test_noise_cut_off_at_three_standard_deviations_fails():
    class CutOff(Around):
        def normal(self, size, stddev):
            return np.clip(super().normal(size, stddev), -3.0 * stddev, 3.0 * stddev)

    assert failed(audit(source=CutOff)) == {"noise tails"}


@pytest.mark.parametrize("factor", [0.0, 0.4])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("architecture", [LOGISTIC, MLP])
def test_one_weight_or_bias_with_too_little_noise_fails(architecture, position, factor):
    """No canary lies in these values: they are seen in the difference of two equal steps."""

    class Uneven(Around):
        def normal(self, size, stddev):
            noise = super().normal(size, stddev)
            noise[position] *= factor
            return noise

    assert failed(audit(architecture=architecture, source=Uneven)) == {"noise everywhere"}


def test_the_same_noise_in_each_step_fails():
    class Repeated(Around):
        kept = None

        def normal(self, size, stddev):
            if self.kept is None or self.kept.shape != np.zeros(size).shape:
                self.kept = super().normal(size, stddev)
            return self.kept

    report = audit(source=Repeated)
    assert failed(report) >= {"noise repeated", "noise across steps and rounds", "noise at any distance"}
    assert "noise across lenders" not in failed(report)


def test_the_same_noise_in_each_round_fails(monkeypatch):
    """As if every round seeded its noise anew."""

    def train(*arguments, noise, **more):
        return train_locally(*arguments, noise=SimulatedNoise(3), **more)

    monkeypatch.setattr(fedfin.client.twin, "train_locally", train)
    report = audit()
    assert failed(report) >= {"noise repeated", "noise across steps and rounds"}


def test_the_same_noise_on_two_lenders_fails():
    report = audit(make_noise=lambda: SimulatedNoise(7))
    assert failed(report) == {"noise repeated", "noise across lenders", "noise at any distance"}


def test_the_noise_of_production_passes():
    assert audit(make_noise=SecureNoise).failures == ()


def test_an_accountant_that_forgets_rounds_fails(monkeypatch):
    """Every round accounted afresh: the ledger shows the epsilon of one."""
    held = Ledger.held

    def of_one_round(self, snapshot, delta):
        events = tuple(
            replace(event, count=min(event.count, 5)) for event in held(self, snapshot, delta).events
        )
        return Spent(accounting.epsilon_pld(events, delta), accounting.epsilon_rdp(events, delta), events)

    monkeypatch.setattr(Ledger, "held", of_one_round)
    report = audit()
    assert report.claim_rdp < 8.0
    assert report.epsilon_by_steps > report.claim_pld
    assert failed(report) == set()


def test_noise_calibrated_for_one_round_fails(monkeypatch):
    """The other side of the same fault: the noise is too little for what is claimed, and everything else agrees."""
    calibrate = accounting.calibrate

    def for_one_round(privacy, *, sample_rate, num_steps):
        return calibrate(privacy, sample_rate=sample_rate, num_steps=5)

    monkeypatch.setattr(accounting, "calibrate", for_one_round)
    monkeypatch.setattr(Ledger, "held", lambda self, snapshot, delta: Spent(8.0, 8.0, ()))
    report = audit()
    assert report.epsilon_by_steps > 8.0
    assert failed(report) == set()


def test_more_steps_than_the_plan_says_fail(monkeypatch):
    """The bound is composed over the steps that were seen in whole rounds."""

    def train(*arguments, training, **more):
        longer = training.model_copy(update={"local_steps": {5: 20, 1: 1}[training.local_steps]})
        return train_locally(*arguments, training=longer, **more)

    monkeypatch.setattr(fedfin.client.twin, "train_locally", train)
    report = audit()
    assert report.num_steps == 80
    assert report.epsilon_by_steps > report.claim_pld


def test_batches_drawn_more_often_than_the_plan_says_fail():
    class Greedy(Around):
        def bernoulli(self, num, rate):
            return super().bernoulli(num, min(1.0, 1.5 * rate))

    assert "sample rate" in failed(audit(job(sample_rate=0.3), source=Greedy))


class FixedSize(Around):
    def bernoulli(self, num, rate):
        drawn = np.zeros(num, bool)
        drawn[np.argsort(self.source.words(num))[: round(rate * num)]] = True
        return drawn


class InOrder(Around):
    """Batches of an epoch: each loan once before any comes again."""

    position = 0.0

    def bernoulli(self, num, rate):
        drawn = np.zeros(num, bool)
        end = self.position + rate * num
        drawn[np.arange(round(self.position), round(end)) % num] = True
        self.position = end
        return drawn


class SameBatch(Around):
    drawn = None

    def bernoulli(self, num, rate):
        if self.drawn is None or len(self.drawn) != num:
            self.drawn = super().bernoulli(num, rate)
        return self.drawn


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        (FixedSize, {"batch sizes"}),
        (InOrder, {"draws in two steps", "batch sizes"}),
        (SameBatch, {"draws in two steps", "batch sizes"}),
    ],
)
def test_batches_of_the_right_rate_that_no_coins_drew_fail(source, faults):
    assert (
        failed(audit(job(sample_rate=0.3), source=source)) & {"draws in two steps", "batch sizes"} == faults
    )


def test_batches_that_the_source_did_not_draw_fail(monkeypatch):
    def train(*arguments, noise, **more):
        return train_locally(*arguments, noise=SecureNoise(), **more)

    monkeypatch.setattr(fedfin.client.twin, "train_locally", train)
    assert "sample rate" in failed(audit(job(sample_rate=0.3)))


def histogram_failures(source=Around):
    loans, schema = demo_loans()
    checks = bins_checks(loans.frame, schema, 2.0, source(0), 1e-4)
    return {check.name for check in checks if not check.holds}


def test_the_histogram_release_as_it_is_passes():
    assert histogram_failures() == set()


def test_a_histogram_with_half_the_noise_fails():
    class HalfNoise(Around):
        def normal(self, size, stddev):
            return super().normal(size, stddev / 2)

    assert histogram_failures(HalfNoise) == {"histogram, noise scale", "histogram, noise shape"}


def test_a_histogram_that_counts_a_loan_twice_fails(monkeypatch):
    def twice(frame, schema):
        return 2 * histogram(frame, schema)

    monkeypatch.setattr(fedfin.client.histograms, "histogram", twice)
    assert histogram_failures() == {"histogram, sensitivity"}


def test_a_histogram_whose_noise_comes_again_fails():
    class Repeated(Around):
        def normal(self, size, stddev):
            return SimulatedNoise(3).normal(size, stddev)

    assert "histogram, noise repeated" in histogram_failures(Repeated)


def test_the_report_says_what_was_claimed_measured_and_assumed():
    report = audit()
    document = json.loads(json.dumps(report.to_json()))
    assert document["passed"] is True
    assert document["confidence"] == CONFIDENCE == 0.999
    assert document["measured_over_claim"] == report.epsilon_measured / report.claim_rdp
    assert "sees the noisy sum of every step" in document["threat_model"]
    assert (document["one_run_canaries"], document["one_run_guesses"]) == (200, 160)
    assert {check["name"] for check in document["checks"]} == {
        "clipping, exact",
        "clipping, with noise",
        "sample rate",
        "noise scale",
        "noise shape",
        "noise repeated",
        "noise across steps and rounds",
        "noise across lenders",
        "noise at any distance",
        "noise everywhere",
        "noise tails",
        "draws in two steps",
        "batch sizes",
    }


def test_progress_is_told_step_by_step_to_its_end():
    seen = []
    audit(progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_a_plan_without_own_noise_is_refused():
    with pytest.raises(PrivacyParameterError, match=r"privacy\.mode is none"):
        audit(JobPlan(privacy=PrivacyPlan(mode="none")))


def test_too_few_loans_are_refused():
    with pytest.raises(DataError, match="needs 20"):
        audit_job(np.zeros((19, 6), np.float32), np.zeros(19, np.int64), LOGISTIC, job())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logistic", "mlp", "attention"])
@pytest.mark.timeout(900)
def test_at_epsilon_4_the_bound_reaches_three_quarters_of_the_claim(kind):
    loans, schema = demo_loans()
    report = audit_loans(loans, schema, JobPlan(model=ModelPlan(kind=kind), privacy=PrivacyPlan(epsilon=4.0)))
    assert report.failures == ()
    assert report.epsilon_measured >= 0.75 * report.claim_rdp
    assert report.seconds < 600

"""What a stage of a job releases: computed from this lender's loans, to be seen by itself or only in a sum.

A stage is known whole before a loan is looked at: what it is charged, what it answers, how its vector is laid out.
What the coordinator sent is checked first, so that a refusal tells nothing of the loans and costs nothing.

What a stage computes (`_values`) is the same in clear and in a sum: with the lender's own noise in mode local, without
any in mode none. In mode shared it is a clipped sum, to which the share of the noise is added on the lattice.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedfin.client.accepted import AcceptedJob
from fedfin.client.costs import Costs, costs_of, require_covered
from fedfin.client.folder import LenderFolder
from fedfin.client.histograms import noisy_histogram
from fedfin.client.policy import check_size, check_weights
from fedfin.client.preparation import CountedLoans, PreparedLoans
from fedfin.client.scoring import (
    evaluation_counts,
    event_of_evaluation,
    noisy_evaluation,
    scheme_of_evaluation,
)
from fedfin.client.training import LocalPrivacy, clipped_gradient, train_locally
from fedfin.client.work import Question, ResultT, Work, account_of, stage_of
from fedfin.credit.binning import Bins, encode, histogram_sensitivity, histogram_size
from fedfin.credit.drift import num_cells
from fedfin.credit.models import (
    Architecture,
    architecture_of,
    encoding_of,
    model_fingerprint,
    num_parameters,
    require_same_fingerprint,
)
from fedfin.credit.score_counts import evaluation_cells
from fedfin.errors import PolicyRefusalError, SchemaMismatchError
from fedfin.plan import JobPlan
from fedfin.privacy.encoding import Layout
from fedfin.privacy.events import Event
from fedfin.privacy.noise import SecureNoise
from fedfin.privacy.shared_events import shared_event
from fedfin.privacy.shares import ShareScheme, add_share, encode_sum
from fedfin.strategies.sums import (
    bins_layout,
    bins_scheme,
    blurred_weight,
    capped_histogram,
    counts_layout,
    round_layout,
    round_parts,
    round_scheme,
    shares_layout,
)
from fedfin.update import AskHistogram, Evaluate, Finish, Histogram, Message, Scores, Train, Update

__all__ = ["Stages"]

_Model: TypeAlias = tuple[Bins, Architecture]


class Stages:
    """Computes stages from one state of this lender's loans; what it keeps between them are caches."""

    def __init__(self, folder: LenderFolder, loans: PreparedLoans) -> None:
        """Prepare; noise is drawn from a fresh secret key."""
        self._folder = folder
        self._loans = loans
        self._schema = loans.schema
        self._column_cells = [num_cells(column) for column in loans.schema.features]
        self._noise = SecureNoise()
        self._encoded: tuple[str, NDArray[np.float32]] | None = None

    @property
    def loans(self) -> PreparedLoans:
        """The loans."""
        return self._loans

    def costs(self, plan: JobPlan, num_members: int) -> Costs:
        """Return what a private job costs; errors as `costs_of`."""
        return costs_of(plan, self._schema, num_members)

    def answer(self, question: Question, job: AcceptedJob) -> Work[Message]:
        """Return how a question is answered in clear: with this lender's answer, seen by itself.

        Raises:
            PolicyRefusalError: The question is of no stage of the plan, its model is not one to train, or this lender
                does not evaluate.
            SchemaMismatchError: Its model is not of this lender's schema.
        """
        model = self._checked(question, job)

        def run() -> Message:
            values = self._values(question, job, model)
            match question:
                case AskHistogram():
                    return Histogram(job.job_id, values)
                case Train():
                    delta = values.astype(np.float32, copy=False)
                    return Update(job.job_id, question.round, question.fingerprint, delta)
                case Evaluate():
                    return Scores(job.job_id, values)

        return self._work(question, job, run)

    def summand(self, question: Question, job: AcceptedJob, num_lenders: int) -> Work[NDArray[np.uint32]]:
        """Return how a question is answered in a sum of `num_lenders`: with a vector that is never seen by itself.

        Raises:
            PolicyRefusalError, SchemaMismatchError: As `answer`.
            PrivacyParameterError: In mode shared: the sum would cost more than what is reserved for it.
        """
        model, training = self._checked(question, job), job.plan.training
        if job.plan.privacy.mode == "shared":
            scheme = self._scheme(question, job, model, num_lenders)
            layout = shares_layout(scheme)

            def run_shared() -> NDArray[np.uint32]:
                clipped = encode_sum(self._values(question, job, model), scheme)
                return layout.encode_integers({"noised": add_share(clipped, scheme, self._noise)})

            return self._work(question, job, run_shared, layout)
        layout = self._layout(question, job, model, num_lenders)
        bucket = self._folder.config.policy.min_weight_bucket
        weight = blurred_weight(len(self._loans.train), training, self._folder.salt(), bucket)

        def run() -> NDArray[np.uint32]:
            values = self._values(question, job, model)
            match question:
                case AskHistogram():
                    capped = capped_histogram(values, self._column_cells, training.weight_cap)
                    return layout.encode({"counts": capped})
                case Train():
                    return layout.encode(round_parts(values, weight, training))
                case Evaluate():
                    return layout.encode({"counts": values})

        return self._work(question, job, run, layout)

    def model_of(self, question: Train | Evaluate | Finish, plan: JobPlan) -> _Model:
        """Rebuild the architecture from the lender's own schema; refuse what does not have its fingerprint.

        Raises:
            SchemaMismatchError: Bins, fingerprint or weights are not of this schema and plan.
            PolicyRefusalError: The model is larger than the policy allows, or its weights are of no training.
        """
        try:
            bins = Bins.from_json(question.bins)
            arch = architecture_of(plan.model, self._schema, bins)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            msg = "the coordinator's bins do not fit this lender's schema; compare schema.yaml at both sides"
            raise SchemaMismatchError(msg) from error
        own = model_fingerprint(self._schema.fingerprint(), bins.fingerprint(), arch)
        require_same_fingerprint(own, question.fingerprint)
        check_size(num_parameters(arch), self._folder.config.policy)
        if question.weights.size != num_parameters(arch):
            msg = f"the coordinator sent {question.weights.size} weights for an architecture of {num_parameters(arch)}"
            raise SchemaMismatchError(msg)
        check_weights(question.weights)
        return bins, arch

    def _checked(self, question: Question, job: AcceptedJob) -> _Model | None:
        """Check a question without looking at a loan; return its model, or None for the bins."""
        match question:
            case AskHistogram():
                return None
            case Train():
                _require_within(question.round, "round", job.plan.training.rounds)
            case Evaluate():
                _require_within(question.number, "evaluation", job.plan.evaluation.times)
                self._counted(job)
        return self.model_of(question, job.plan)

    def _work(
        self, question: Question, job: AcceptedJob, run: Callable[[], ResultT], layout: Layout | None = None
    ) -> Work[ResultT]:
        stage, events = stage_of(question), self._charge(question, job)
        charged_to = account_of(job.job_id, stage)
        if isinstance(question, AskHistogram):
            return Work(stage, run, events, charged_to, layout=layout)
        return Work(stage, run, events, charged_to, question.weights, layout)

    def _charge(self, question: Question, job: AcceptedJob) -> tuple[Event, ...]:
        if not job.is_private:
            return ()
        if isinstance(question, Evaluate):
            return (event_of_evaluation(job.plan, self._schema, job.num_members),)
        costs = self.costs(job.plan, job.num_members)
        return (costs.bins if isinstance(question, AskHistogram) else costs.round,)

    # Looking at the loans

    def _values(self, question: Question, job: AcceptedJob, model: _Model | None) -> NDArray[Any]:
        """Return what a stage computes: counts in float64, or an update in float32; noised in mode local."""
        plan = job.plan
        costs = self.costs(plan, job.num_members) if plan.privacy.mode == "local" else None
        if isinstance(question, AskHistogram):
            own = None if costs is None else costs.noise.bins_noise_multiplier
            return noisy_histogram(self._loans.train.frame, self._schema, own, self._noise)
        assert model is not None  # noqa: S101  (only the bins come before it)
        if isinstance(question, Evaluate):
            counted = evaluation_counts(
                model[1], question.weights, model[0], self._counted(job), self._schema, plan.evaluation.cutoff
            )
            if costs is None:
                return counted.astype(np.float64)
            multiplier = event_of_evaluation(plan, self._schema, job.num_members).noise_multiplier
            return noisy_evaluation(counted, self._schema, multiplier, self._noise)
        if plan.privacy.mode == "shared":
            return clipped_gradient(
                question.weights,
                self._encode(*model),
                self._loans.train.labels,
                architecture=model[1],
                sample_rate=plan.training.sample_rate,
                clipping_bound=plan.privacy.clipping_bound,
                noise=self._noise,
            )
        private = None
        if costs is not None:
            private = LocalPrivacy(costs.noise.training_noise_multiplier, plan.privacy.clipping_bound)
        return train_locally(
            question.weights,
            self._encode(*model),
            self._loans.train.labels,
            architecture=model[1],
            training=plan.training,
            privacy=private,
            noise=self._noise,
        )

    def _counted(self, job: AcceptedJob) -> CountedLoans:
        """Return the held-out loans that the job's evaluations were reserved for."""
        counted = self._loans.counted
        if not job.counted or counted is None:
            msg = f"this lender takes no part in the evaluations of job {job.job_id}; its log says why"
            raise PolicyRefusalError(msg)
        if counted.snapshot.digest != job.counted:
            msg = (
                f"the held-out loans changed since job {job.job_id} was accepted, and its budget is reserved for the"
                " earlier ones; restore the table and restart, or wait for the next job"
            )
            raise PolicyRefusalError(msg)
        return counted

    def _encode(self, bins: Bins, arch: Architecture) -> NDArray[np.float32]:
        key = f"{bins.fingerprint()} {arch.kind}"
        if self._encoded is None or self._encoded[0] != key:
            loans = encode(self._loans.train.frame, self._schema, bins, encoding_of(arch.kind))
            self._encoded = (key, loans)
        return self._encoded[1]

    # Layouts and schemes: the coordinator makes the same

    def _layout(self, question: Question, job: AcceptedJob, model: _Model | None, num_lenders: int) -> Layout:
        """Return the layout of a stage's vector, modes local and none."""
        match question:
            case AskHistogram():
                noise = 0.0
                if job.is_private:
                    multiplier = self.costs(job.plan, job.num_members).noise.bins_noise_multiplier
                    noise = multiplier * histogram_sensitivity(self._schema)
                return bins_layout(job.plan, histogram_size(self._schema), num_lenders, noise)
            case Train():
                assert model is not None  # noqa: S101  (as above)
                return round_layout(job.plan, num_parameters(model[1]), num_lenders)
            case Evaluate():
                return counts_layout(evaluation_cells(self._schema), num_lenders)

    def _scheme(
        self, question: Question, job: AcceptedJob, model: _Model | None, num_lenders: int
    ) -> ShareScheme:
        """Return how a sum's values are noised in mode shared; never one that costs more than is reserved."""
        plan, costs = job.plan, self.costs(job.plan, job.num_members)
        assert costs.sums is not None  # noqa: S101  (mode shared)
        match question:
            case AskHistogram():
                scheme = bins_scheme(costs.noise, costs.sums, num_lenders)
                require_covered(shared_event(scheme), costs.bins)
            case Train():
                assert model is not None  # noqa: S101  (as above)
                scheme = round_scheme(costs.noise, costs.sums, num_parameters(model[1]), num_lenders)
                require_covered(shared_event(scheme, sample_rate=plan.training.sample_rate), costs.round)
            case Evaluate():
                scheme = scheme_of_evaluation(plan, self._schema, num_lenders)
                cost = event_of_evaluation(plan, self._schema, job.num_members)
                require_covered(shared_event(scheme), cost)
        return scheme


def _require_within(number: int, what: str, last: int) -> None:
    if not 1 <= number <= last:
        msg = f"{what} {number} is not one of the plan's {last}"
        raise PolicyRefusalError(msg)

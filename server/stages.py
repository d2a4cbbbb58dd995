"""What a job sums and what it makes of it: histograms to bins, updates to the next model, score counts to figures.

Each stage is stated once, for sums in clear and under secure aggregation. In clear the coordinator sees single answers
and checks each; under secure aggregation a lender caps and bounds its own, and nobody can check them one by one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.credit.binning import bins_from_histogram, histogram_sensitivity, histogram_size
from fedfin.credit.drift import Reference, num_cells
from fedfin.credit.export import model_digest
from fedfin.credit.models import architecture_of, initial_weights, largest_model, model_fingerprint
from fedfin.credit.schema import Schema
from fedfin.credit.score_counts import evaluation_cells
from fedfin.errors import DataError
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import CalibratedNoise, calibrate
from fedfin.privacy.encoding import Layout
from fedfin.privacy.shared_accounting import SharedSums, calibrate_shared, shared_sums
from fedfin.privacy.shares import ShareScheme, publish
from fedfin.server.evaluation import evaluation_sum, local_noise, scheme_for, shared_noise
from fedfin.server.roster import Checkpoint
from fedfin.server.summing import AnswerError, CohortSums, Parts, Stage, Upcoming
from fedfin.strategies.registry import sum_strategy, update_strategy
from fedfin.strategies.strategy import CohortSum, ModelState
from fedfin.strategies.sums import (
    bins_layout,
    bins_scheme,
    capped_histogram,
    check_round,
    cohort_sum,
    column_totals,
    counts_layout,
    largest_move,
    round_layout,
    round_parts,
    round_scheme,
    shares_layout,
    total_loans,
)
from fedfin.update import AskHistogram, Evaluate, Histogram, Message, Scores, Train, Update

__all__ = ["JobStages", "digest_of"]

_NOISE_TAIL: Final = 8.0  # standard deviations that noise does not pass, but with a chance of 1e-15


def digest_of(checkpoint: Checkpoint) -> str:
    """Return the digest of a checkpoint's model, hex: what the log names it by."""
    return model_digest(checkpoint.fingerprint, checkpoint.weights)


class JobStages:
    """The stages of one job."""

    def __init__(
        self, job_id: str, plan: JobPlan, schema: Schema, *, num_members: int, weight: Callable[[str], float]
    ) -> None:
        """Prepare.

        Args:
            job_id: The job's id.
            plan: Its plan.
            schema: The federation's schema.
            num_members: Members of the job's roster: mode shared calibrates its noise for them.
            weight: In clear: a lender's weight, by its name.
        """
        self._job_id = job_id
        self._plan = plan
        self._schema = schema
        self._weight = weight
        self._column_cells = [num_cells(column) for column in schema.features]
        self._shared: tuple[SharedSums, CalibratedNoise] | None = None
        self._cell_noise = 0.0  # of one lender's histogram, in loans; modes local and none
        privacy, training = plan.privacy, plan.training
        match privacy.mode:
            case "shared":
                sums = shared_sums(
                    plan,
                    num_lenders=num_members,
                    num_cells=histogram_size(schema),
                    num_features=len(schema.features),
                    num_parameters=largest_model(plan.model, schema),
                )
                noise = calibrate_shared(
                    privacy, sums, sample_rate=training.sample_rate, num_rounds=training.rounds
                )
                self._shared = sums, noise
            case "local":
                noise = calibrate(privacy, sample_rate=training.sample_rate, num_steps=plan.num_steps)
                self._cell_noise = noise.bins_noise_multiplier * histogram_sensitivity(schema)
            case "none":
                pass

    # Bins

    def bins(self) -> Stage:
        """Return the stage `bins`."""
        return Stage(
            upcoming=Upcoming("bins", self._bins_layout),
            question=AskHistogram(self._job_id),
            base=0,
            min_survivors=self._min_survivors,
            answer=Histogram,
            read=self._read_histogram,
        )

    def first(self, sums: CohortSums) -> Checkpoint:
        """Return the checkpoint before round 1: bins of the summed histogram, and initial weights.

        Raises:
            QuorumError: In mode shared: the sum does not have the planned noise.
        """
        num_loans, noise_stddev = 0.0, self._cell_noise * math.sqrt(len(sums.survivors))
        if self._shared is None:
            counts = sums.parts["counts"]
        else:
            scheme = self._bins_scheme(sums.num_lenders)
            counts = _published(sums, scheme)
            noise_stddev = scheme.share_stddev * math.sqrt(len(sums.survivors)) / scheme.scale
            num_loans = total_loans(counts, self._column_cells)
        bins = bins_from_histogram(counts, self._schema, self._plan.model.max_bins)
        arch = architecture_of(self._plan.model, self._schema, bins)
        return Checkpoint(
            round=0,
            bins=bins.to_json(),
            fingerprint=model_fingerprint(self._schema.fingerprint(), bins.fingerprint(), arch),
            weights=initial_weights(arch, self._plan.model.seed),
            reference=_reference(counts, self._schema, noise_stddev),
            num_loans=num_loans,
        )

    # Rounds

    def upcoming_round(self, number: int, before: Checkpoint) -> Upcoming:
        """Return what is known of a round before the model that it starts from."""
        return Upcoming(f"round {number}", lambda num_lenders: self._round_layout(before, num_lenders))

    def round(self, number: int, before: Checkpoint) -> Stage:
        """Return the stage of a round from this model."""
        return Stage(
            upcoming=self.upcoming_round(number, before),
            question=Train(self._job_id, number, before.bins, before.fingerprint, before.weights),
            base=before.round,
            min_survivors=self._min_survivors,
            answer=Update,
            read=lambda name, reply: self._read_update(name, reply, number, before),
            keeps_single=update_strategy(self._plan) is not None,
        )

    def after(self, before: Checkpoint, sums: CohortSums) -> Checkpoint:
        """Return the checkpoint after a round.

        Raises:
            TrainingError: The sum is no cohort's, or the next model is not finite.
            QuorumError: In mode shared: the sum does not have the planned noise.
        """
        state = ModelState(before.weights, before.round, before.moments)
        of_updates = update_strategy(self._plan)
        if of_updates is not None:
            after = of_updates(state, [parts["single"].astype(np.float32) for parts in sums.singles.values()])
        else:
            after = sum_strategy(self._plan)(state, self._cohort_sum(before, sums))
        return replace(before, round=after.round, weights=after.weights, moments=after.moments)

    # Evaluations

    def upcoming_evaluation(self, number: int) -> Upcoming:
        """Return what is known of an evaluation before the model that it judges."""
        return Upcoming(f"evaluation {number}", self._evaluation_layout)

    def evaluation(self, number: int, model: Checkpoint) -> Stage:
        """Return the stage of an evaluation of this model."""
        return Stage(
            upcoming=self.upcoming_evaluation(number),
            question=Evaluate(self._job_id, number, model.bins, model.fingerprint, model.weights),
            base=model.round,
            min_survivors=self._min_survivors,
            answer=Scores,
            read=self._read_scores,
            ends_part=False,
        )

    def judged(self, number: int, sums: CohortSums) -> dict[str, Any]:
        """Return one evaluation's figures, of sums only, as JSON.

        Raises:
            QuorumError: In mode shared: the sum does not have the planned noise.
        """
        num_lenders = len(sums.survivors)
        if self._shared is None:
            counts, noise_stddev = sums.parts["counts"], local_noise(self._plan, self._schema, num_lenders)
        else:
            scheme = scheme_for(self._plan, self._schema, sums.num_lenders)
            counts, noise_stddev = _published(sums, scheme), shared_noise(scheme, num_lenders)
        return evaluation_sum(
            counts,
            self._schema,
            number=number,
            plan=self._plan,
            num_lenders=num_lenders,
            noise_stddev=noise_stddev,
        )

    # Layouts

    def _bins_layout(self, num_lenders: int) -> Layout:
        if self._shared is not None:
            return shares_layout(self._bins_scheme(num_lenders))
        return bins_layout(self._plan, sum(self._column_cells), num_lenders, self._cell_noise)

    def _round_layout(self, before: Checkpoint, num_lenders: int) -> Layout:
        if self._shared is not None:
            return shares_layout(self._round_scheme(before, num_lenders))
        return round_layout(self._plan, len(before.weights), num_lenders)

    def _evaluation_layout(self, num_lenders: int) -> Layout:
        if self._shared is not None:
            return shares_layout(scheme_for(self._plan, self._schema, num_lenders))
        return counts_layout(evaluation_cells(self._schema), num_lenders)

    def _bins_scheme(self, num_lenders: int) -> ShareScheme:
        assert self._shared is not None  # noqa: S101  (asked for in mode shared only)
        sums, noise = self._shared
        return bins_scheme(noise, sums, num_lenders)

    def _round_scheme(self, before: Checkpoint, num_lenders: int) -> ShareScheme:
        assert self._shared is not None  # noqa: S101  (as above)
        sums, noise = self._shared
        return round_scheme(noise, sums, len(before.weights), num_lenders)

    def _min_survivors(self, num_lenders: int) -> int:
        quorum = self._plan.cohort.min_lenders
        if self._shared is None:
            return quorum
        return max(quorum, num_lenders - self._plan.privacy.planned_dropouts)

    def _cohort_sum(self, before: Checkpoint, sums: CohortSums) -> CohortSum:
        if self._shared is None:
            if self._plan.aggregation == "secure":  # in clear each answer was read by itself
                layout = self._round_layout(before, sums.num_lenders)
                check_round(sums.parts, len(sums.survivors), self._plan.training, layout)
            return cohort_sum(sums.parts, len(sums.survivors))
        scheme = self._round_scheme(before, sums.num_lenders)
        loans = self._plan.training.sample_rate * before.num_loans
        return CohortSum(_published(sums, scheme), loans, len(sums.survivors))

    # Single answers, in clear

    def _read_histogram(self, name: str, reply: Message) -> Parts:
        del name
        cells = histogram_size(self._schema)
        if not isinstance(reply, Histogram) or reply.counts.shape != (cells,):
            msg = f"its histogram does not have the schema's {cells} cells"
            raise AnswerError(msg)
        noise = self._cell_noise
        totals = column_totals(reply.counts, self._column_cells)
        spread = _NOISE_TAIL * noise * max(self._column_cells) ** 0.5 + 0.5
        if not np.isfinite(totals).all() or np.ptp(totals) > 2 * spread:
            msg = "the columns of its histogram do not count the same loans"
            raise AnswerError(msg)
        if reply.counts.min(initial=0.0) < -_NOISE_TAIL * noise - 0.5:
            msg = "its histogram has cells further below zero than noise puts them"
            raise AnswerError(msg)
        return {"counts": capped_histogram(reply.counts, self._column_cells, self._plan.training.weight_cap)}

    def _read_update(self, name: str, reply: Message, number: int, before: Checkpoint) -> Parts:
        if not isinstance(reply, Update) or reply.round != number:
            msg = "it answered another question"
            raise AnswerError(msg)
        if reply.fingerprint != before.fingerprint or reply.delta.shape != before.weights.shape:
            msg = "its update is for another schema or architecture"
            raise AnswerError(msg)
        if np.abs(reply.delta).max(initial=0.0) > largest_move(self._plan.training):
            msg = "its update is further away than the plan's steps can reach"
            raise AnswerError(msg)
        parts = round_parts(reply.delta, self._weight(name), self._plan.training)
        if update_strategy(self._plan) is not None:
            parts["single"] = reply.delta.astype(np.float64)
        return parts

    def _read_scores(self, name: str, reply: Message) -> Parts:
        del name
        cells = evaluation_cells(self._schema)
        if not isinstance(reply, Scores) or reply.counts.shape != (cells,):
            msg = f"its score counts do not have the schema's {cells} cells"
            raise AnswerError(msg)
        return {"counts": reply.counts}


def _published(sums: CohortSums, scheme: ShareScheme) -> NDArray[np.float64]:
    """Return the noised sum of mode shared in the unit of its values; refuses one without the planned noise."""
    return publish(sums.parts["noised"].astype(np.int64), len(sums.survivors), scheme)


def _reference(total: NDArray[np.float64], schema: Schema, noise_stddev: float) -> str:
    try:
        return Reference.from_histogram(total, schema, noise_stddev=noise_stddev).to_json()
    except DataError:
        return ""  # noise left a column without loans: there is nothing to compare with, and no harm

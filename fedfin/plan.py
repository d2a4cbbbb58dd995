"""What a job is: the plan that the coordinator states and every lender checks before it takes part.

The same types stand in federation.yaml (the edge) and in the proposal that travels to the lenders, so
there is one definition of each key. Field descriptions are the documentation: docs/configuration.md and
the annotated examples are written from them.
"""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["CohortPlan", "EvaluationPlan", "JobPlan", "ModelPlan", "PrivacyPlan", "TrainingPlan"]


class Section(BaseModel):
    """A section of a configuration file: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelPlan(Section):
    """The architecture, the same at every lender."""

    kind: Literal["logistic", "mlp", "attention"] = Field(
        default="logistic",
        description=(
            "logistic: one weight per bin, a scorecard. mlp: piecewise-linear encoding, LayerNorm, ReLU. attention: a"
            " small FT-Transformer, one token per column."
        ),
    )
    hidden: tuple[int, ...] = Field(
        default=(32,),
        description=(
            "Widths of the MLP's hidden layers. For attention the token width, a multiple of 4, and the feed-forward"
            " width (default: twice that). Ignored by logistic."
        ),
        max_length=4,
    )
    max_bins: int = Field(default=6, ge=2, le=64, description="Bins per numeric column, at most.")
    seed: int = Field(default=0, ge=0, description="Seed of the public initial weights (not of any noise).")

    @field_validator("hidden")
    @classmethod
    def _widths_count(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in hidden):
            msg = "a hidden layer has one unit at least; give widths of 1 and more"
            raise ValueError(msg)
        return hidden

    @model_validator(mode="after")
    def _attention_has_its_widths(self) -> "ModelPlan":
        if self.kind == "attention" and (len(self.hidden) not in {1, 2} or self.hidden[0] % 4):
            msg = "attention takes hidden: [token width, feed-forward width], the first a multiple of 4; try [32]"
            raise ValueError(msg)
        return self


class TrainingPlan(Section):
    """What each lender does between two messages, and how the coordinator puts the answers together."""

    strategy: Literal["fedavg", "median"] = Field(
        default="fedavg",
        description=(
            "fedavg: the weighted mean of the updates, which needs only their sum. median: the median of each"
            " coordinate, against lenders that send nonsense; it needs single updates, so aggregation must be plain."
        ),
    )
    rounds: int = Field(default=10, ge=1, le=10_000, description="Rounds of the job.")
    local_steps: int = Field(
        default=10, ge=1, le=10_000, description="Optimizer steps of a lender in a round."
    )
    sample_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Chance of each loan to be in a step's batch (Poisson sampling); 1 takes all. A rate, not a batch"
            " size, so that the noise multiplier is the same for all lenders and reveals no lender's size."
        ),
    )
    learning_rate: float = Field(
        default=0.03,
        gt=0,
        le=10,
        description="AdamW's learning rate, at the lender; in mode shared at the coordinator.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    proximal: float = Field(
        default=0.0, ge=0, le=100, description="FedProx's pull back to the round's weights."
    )
    weighting: Literal["size", "sqrt", "equal"] = Field(
        default="size",
        description="A lender's weight in the average: its number of loans, the square root of it, or one for all.",
    )
    weight_cap: int = Field(
        default=2000,
        ge=1,
        description=(
            "Loans above this count no further, so that no bank owns the model. In mode shared a lender's sum is"
            " scaled down to what this many loans could reach."
        ),
    )
    weight_bucket: int = Field(
        default=50,
        ge=1,
        description="Loans are rounded down to a multiple of this before they become a weight.",
    )


class PrivacyPlan(Section):
    """The guarantee that each lender gives for each of its own loans."""

    mode: Literal["local", "shared", "none"] = Field(
        default="local",
        description=(
            "local: each lender's releases are differentially private by its own noise. shared: each lender adds a"
            " share of the noise and only the cohort's sum is private; needs aggregation secure. none: no privacy;"
            " refused unless the lender's bank.yaml says allow_no_privacy too."
        ),
    )
    epsilon: float = Field(
        default=3.0, gt=0, le=100, description="Epsilon of the whole job, bins and all rounds together."
    )
    delta: float = Field(default=1e-5, gt=0, lt=1e-2, description="Delta of the whole job.")
    clipping_bound: float = Field(
        default=2.0, gt=0, le=1e6, description="L2 clipping bound of one loan's gradient."
    )
    bins_share: float = Field(
        default=0.2, gt=0, lt=1, description="Share of epsilon that the histograms for the bins may take."
    )
    planned_dropouts: int = Field(
        default=0,
        ge=0,
        description=(
            "Mode shared: lenders of a round's cohort that may fail to answer; with fewer left the round's sum is"
            " not published. Each one planned for adds noise."
        ),
    )
    planned_colluders: int = Field(
        default=0,
        ge=0,
        description=(
            "Mode shared: lenders of the cohort that may tell others their share of the noise without anyone's"
            " guarantee suffering. Each one planned for adds noise."
        ),
    )


class CohortPlan(Section):
    """Who must take part, and how long a round waits."""

    min_lenders: int = Field(
        default=5,
        ge=1,
        description=(
            "Quorum: fewer lenders online or answering, and the coordinator waits. At least 3 with aggregation secure:"
            " of two lenders each learns the other's part from the sum."
        ),
    )
    wait_for: int | None = Field(
        default=None,
        ge=1,
        description="Lenders that must have answered before the job starts; default: all enrolled or invited.",
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="After this the job starts with the quorum that is online, seconds."
    )
    round_deadline_s: float = Field(
        default=120.0,
        gt=0,
        description="A round ends without the lenders that have not answered by then, seconds.",
    )


class EvaluationPlan(Section):
    """How often the model is judged on all lenders' held-out loans together."""

    times: int = Field(
        default=1,
        ge=0,
        le=1000,
        description=(
            "Evaluations of a job: one after the last round, the others spread evenly before; 0 makes none. In mode"
            " local each is charged to the held-out loans, which train nothing: more of them mean more noise in each."
        ),
    )
    cutoff: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description=(
            "Probability of default from which on a loan counts as rejected, for the fairness figures; state the one"
            " that the lenders decide by. The default is about where interest stops paying for losses."
        ),
    )


class JobPlan(Section):
    """A whole training job."""

    name: str = Field(
        default="credit", pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="The job's name, for people."
    )
    aggregation: Literal["secure", "plain"] = Field(
        default="secure",
        description=(
            "secure: the coordinator learns sums over the cohort and no lender's part of one. plain: it sees each"
            " lender's answer by itself; refused unless the lender's bank.yaml says allow_plain_aggregation too."
        ),
    )
    model: ModelPlan = Field(default_factory=ModelPlan, description="The architecture.")
    training: TrainingPlan = Field(default_factory=TrainingPlan, description="Rounds and local steps.")
    privacy: PrivacyPlan = Field(default_factory=PrivacyPlan, description="The guarantee.")
    cohort: CohortPlan = Field(default_factory=CohortPlan, description="Quorum and deadlines.")
    evaluation: EvaluationPlan = Field(
        default_factory=EvaluationPlan, description="How often the model is judged on held-out loans."
    )

    @model_validator(mode="after")
    def _quorum_fits(self) -> "JobPlan":
        wait_for = self.cohort.wait_for
        if wait_for is not None and wait_for < self.cohort.min_lenders:
            msg = (
                f"cohort.wait_for is {wait_for}, below cohort.min_lenders {self.cohort.min_lenders}; raise it"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _aggregation_fits(self) -> "JobPlan":
        if self.aggregation == "secure" and self.cohort.min_lenders < 3:
            msg = (
                f"cohort.min_lenders is {self.cohort.min_lenders}, and a secure sum takes 3 lenders at least; raise it,"
                " or set aggregation to plain"
            )
            raise ValueError(msg)
        if self.aggregation == "secure" and self.training.strategy == "median":
            msg = (
                "training.strategy is median, which needs each lender's update by itself, and aggregation is secure,"
                " which shows the coordinator their sum only; set training.strategy to fedavg, or aggregation to plain"
            )
            raise ValueError(msg)
        if self.aggregation == "plain" and self.privacy.mode == "shared":
            msg = (
                "privacy.mode is shared and aggregation is plain: a share of the noise does not protect a lender whose"
                " answer is seen by itself; set aggregation to secure, or privacy.mode to local"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _evaluations_fit(self) -> "JobPlan":
        if self.evaluation.times > self.training.rounds:
            msg = (
                f"evaluation.times is {self.evaluation.times}, and the job has {self.training.rounds} rounds, each"
                " judged once at most; lower it"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _shared_noise_fits(self) -> "JobPlan":
        privacy, training = self.privacy, self.training
        lost = privacy.planned_dropouts + privacy.planned_colluders
        if privacy.mode != "shared" and lost:
            msg = (
                f"privacy.planned_dropouts {privacy.planned_dropouts} and privacy.planned_colluders"
                f" {privacy.planned_colluders} mean something in mode shared only, and privacy.mode is {privacy.mode};"
                " leave both out"
            )
            raise ValueError(msg)
        if privacy.mode == "shared" and lost >= self.cohort.min_lenders:
            msg = (
                f"privacy.planned_dropouts {privacy.planned_dropouts} and privacy.planned_colluders"
                f" {privacy.planned_colluders} together must be below cohort.min_lenders {self.cohort.min_lenders}, or"
                " nobody's share of the noise is sure to be there; lower them, or raise cohort.min_lenders"
            )
            raise ValueError(msg)
        if privacy.mode == "shared" and (training.local_steps != 1 or training.weighting != "size"):
            wrong = [
                f"training.{key} to {wanted} (it is {found})"
                for key, wanted, found in (
                    ("local_steps", 1, training.local_steps),
                    ("weighting", "size", training.weighting),
                )
                if wanted != found
            ]
            msg = (
                "privacy.mode shared publishes one sum of clipped gradients a round, of all loans alike; set"
                f" {' and '.join(wrong)}, and take more rounds instead"
            )
            raise ValueError(msg)
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one lender in the whole job."""
        return self.training.rounds * self.training.local_steps

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON of the plan, hex."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

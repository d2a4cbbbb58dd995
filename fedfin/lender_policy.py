"""`policy` of bank.yaml: what a lender agrees to, as types; the descriptions of the fields are the documentation.

The lender's own process holds every proposal and every question against it (`client/policy`, `client/hours`,
`client/job_approval`), and its log names it by its digest.
"""

import datetime as dt
import hashlib
import json
import re
import zoneinfo
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from fedfin.approver import public_key_of
from fedfin.invitation import LENDER_NAME_PATTERN
from fedfin.plan import Section

__all__ = ["Approver", "LenderPolicy"]

_COLUMN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class Approver(Section):
    """One person who may approve jobs for this lender."""

    name: str = Field(
        pattern=LENDER_NAME_PATTERN,
        description="A short name or an office, such as data-officer; it stays here.",
    )
    key: str = Field(
        description="The person's public key, the word that `fedfin client make-approver NAME --key PATH` prints."
    )

    @field_validator("key")
    @classmethod
    def _key_parses(cls, key: str) -> str:
        public_key_of(key)
        return key


class LenderPolicy(Section):
    """What this lender agrees to; a job outside it is refused, whatever the coordinator says."""

    jobs: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description=(
            "Names of jobs (`job.name` of federation.yaml) that may run here; * stands for any characters, ? for one."
        ),
    )
    epsilon_limit: float = Field(
        default=3.0,
        gt=0,
        le=1000,
        description=(
            "Epsilon that all jobs together may spend on a loan, in whatever tables it was; held by a Renyi filter."
        ),
    )
    max_epsilon_per_job: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="The largest epsilon of one job; default: what epsilon_limit leaves.",
    )
    max_delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1e-2,
        description="The largest delta accepted; keep it below one over the number of loans.",
    )
    privacy_modes: tuple[Literal["local", "shared"], ...] = Field(
        default=("local", "shared"),
        description="Privacy modes accepted; mode none has a key of its own, allow_no_privacy.",
    )
    allow_no_privacy: bool = Field(
        default=False,
        description=(
            "true lets jobs of privacy mode none run on these loans: what leaves then can reveal single loans."
            " For public or synthetic data only."
        ),
    )
    models: tuple[Literal["logistic", "mlp", "attention"], ...] = Field(
        default=("logistic", "mlp", "attention"), min_length=1, description="Architectures accepted."
    )
    max_parameters: int = Field(
        default=100_000,
        ge=1,
        description="The largest model accepted, in parameters, with as many bins as its plan may give it.",
    )
    columns: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Features that a job may use, by the federation's names: a schema with any other feature is refused."
            " Default: all of the schema."
        ),
    )
    protected: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns that this lender holds to be protected attributes, by the federation's names: a schema that makes"
            " one a feature is refused, unless it states the reason in words (protected_as_feature)."
        ),
    )
    allow_evaluations: bool = Field(
        default=True,
        description=(
            "false keeps the held-out loans out of the federation's evaluations: this lender then trains, and its"
            " loans are in no figure of the model's quality."
        ),
    )
    max_rounds: int = Field(default=200, ge=1, description="The most rounds of a job.")
    max_local_steps: int = Field(default=1000, ge=1, description="The most optimizer steps of a round.")
    min_weight_bucket: int = Field(
        default=50,
        ge=1,
        description="The smallest weight_bucket accepted: how exactly the coordinator may learn this lender's size.",
    )
    min_cohort: int = Field(
        default=5,
        ge=3,
        description=(
            "The fewest lenders in a secure sum: neither a plan with a smaller quorum (cohort.min_lenders) nor a single"
            " sum of fewer is answered."
        ),
    )
    min_planned_colluders: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Mode shared: the fewest privacy.planned_colluders accepted. Default: as many lenders as secure aggregation"
            " withstands, one less than a third of the roster, rounded up: the noise then stands against the same ones."
        ),
    )
    allow_plain_aggregation: bool = Field(
        default=False,
        description=(
            "true lets jobs of aggregation plain run on these loans: the coordinator then sees this lender's answers by"
            " themselves, as noisy as the plan's privacy makes them."
        ),
    )
    hours: str | None = Field(
        default=None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description=(
            'Time of day, such as "22:00-06:00" (between quotes), in which jobs are accepted and loans worked on; the'
            " end is not in it. A sum that was opened within it is answered up to ten minutes after. Default: always."
        ),
    )
    time_zone: str | None = Field(
        default=None, description="With hours: the zone that they are meant in, such as Europe/Madrid or UTC."
    )
    approvers: tuple[Approver, ...] = Field(
        default=(), description="People who may approve a job, each with a `name` and a `key`."
    )
    approvals_needed: int = Field(
        default=0,
        ge=0,
        le=2,
        description=(
            "How many different approvers must sign a new job with `fedfin client approve-job` before it is accepted;"
            " until then the lender keeps it waiting."
        ),
    )

    @field_validator("columns", "protected")
    @classmethod
    def _columns_are_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if not _COLUMN.fullmatch(name):
                msg = f"{name!r} is no name that a column of a schema can have; mend it"
                raise ValueError(msg)
        return names

    @model_validator(mode="after")
    def _hours_have_a_zone(self) -> "LenderPolicy":
        if (self.hours is None) != (self.time_zone is None):
            msg = "hours and time_zone go together; give both, or neither"
            raise ValueError(msg)
        if self.hours is None:
            return self
        start, _, end = self.hours.partition("-")
        if start == end:
            msg = f"hours {self.hours} are either none or all; leave the key out for always"
            raise ValueError(msg)
        try:
            self.zone()
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            msg = f"time_zone {self.time_zone!r} is not known here; give a name such as Europe/Madrid, or UTC"
            raise ValueError(msg) from None
        return self

    @model_validator(mode="after")
    def _approvers_suffice(self) -> "LenderPolicy":
        if self.approvals_needed > len(self.approvers):
            msg = (
                f"approvals_needed is {self.approvals_needed}, and approvers names {len(self.approvers)}; name more, or"
                " lower it: no job could ever run"
            )
            raise ValueError(msg)
        for what, values in (
            ("name", [approver.name for approver in self.approvers]),
            ("key", [approver.key for approver in self.approvers]),
        ):
            if len(set(values)) != len(values):
                msg = f"two approvers have the same {what}; each person has their own"
                raise ValueError(msg)
        return self

    def zone(self) -> dt.tzinfo:
        """Return the zone of `hours`; UTC where none is given.

        Raises:
            ZoneInfoNotFoundError: The zone is not known on this machine.
        """
        name = self.time_zone or "UTC"
        return dt.UTC if name == "UTC" else zoneinfo.ZoneInfo(name)

    def digest(self) -> str:
        """Return the SHA-256 of the policy's canonical JSON, defaults included, hex: what the lender's log names."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

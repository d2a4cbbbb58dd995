"""bank.yaml and federation.yaml, as types; the descriptions of the fields are the documentation.

`parsing` reads the files, `reference` writes the annotated examples and docs/configuration.md from here.
"""

import re

from pydantic import Field, field_validator, model_validator

from fedfin.invitation import LENDER_NAME_PATTERN
from fedfin.lender_policy import LenderPolicy
from fedfin.plan import JobPlan, Section

__all__ = [
    "DataSource",
    "EvidenceConfig",
    "FederationConfig",
    "HoldoutConfig",
    "LenderConfig",
    "LenderPolicy",
]


_ADDRESS = r"^[A-Za-z0-9_.:\[\]-]+:[0-9]{1,5}$"


class EvidenceConfig(Section):
    """What the coordinator keeps beyond the log, for those who check it."""

    keep_transcripts: bool = Field(
        default=False,
        description=(
            "Keep all that the coordinator sees of each secure sum in the run directory, so that `fedfin audit replay`"
            " can do it again: 4 bytes for each lender and value of the vector, and about 700 for each pair of lenders."
        ),
    )


class FederationConfig(Section):
    """federation.yaml: the coordinator's whole configuration; paths are relative to the file."""

    federation: str = Field(
        pattern=LENDER_NAME_PATTERN,
        description="The federation's name, in every lender's certificate folder.",
    )
    address: str = Field(
        pattern=_ADDRESS,
        description="host:port under which lenders reach the coordinator; the host is in its certificate.",
    )
    listen: str = Field(
        default="127.0.0.1",
        description="Address that the public TLS listener binds to; 0.0.0.0 for all interfaces of the machine.",
    )
    schema_path: str = Field(
        default="schema.yaml",
        description="The federation's schema: the columns that every lender maps its own to.",
    )
    evidence: EvidenceConfig = Field(
        default_factory=EvidenceConfig, description="What is kept for those who check a run."
    )
    job: JobPlan = Field(default_factory=JobPlan, description="The job that `fedfin server` runs.")

    @field_validator("address")
    @classmethod
    def _port_exists(cls, address: str) -> str:
        return _with_port(address)

    @property
    def port(self) -> int:
        """Port of the public listener."""
        return int(self.address.rpartition(":")[2])

    @property
    def host(self) -> str:
        """Host name or address in the server's certificate."""
        return self.address.rpartition(":")[0].strip("[]")


class DataSource(Section):
    """Where a lender's loans are; exactly one of path and url."""

    path: str | None = Field(
        default=None, description="A .csv, .csv.gz or .parquet file; relative to bank.yaml, or absolute."
    )
    url: str | None = Field(
        default=None,
        description=(
            "An SQLAlchemy URL without a password, such as postgresql://reader@db.bank.example/loans or"
            " sqlite:///loans.db; PostgreSQL is read through pg8000."
        ),
        repr=False,
    )
    table: str | None = Field(default=None, description="With url: the table or view to read.")
    query: str | None = Field(default=None, description="With url: a SELECT to read instead of a table.")
    password_env: str | None = Field(
        default=None,
        description="With url: the environment variable that holds the password, never the password.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="The federation's column name: this table's column name; only where they differ.",
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="For a category column: this table's spelling: the federation's spelling.",
    )
    accepted_leaks: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns that `fedfin client check` suspects to leak the outcome and that you looked at: each was known"
            " before the decision on the loan."
        ),
    )
    loan_id: str | None = Field(
        default=None,
        description=(
            "This table's column with a number or name of its own for each loan, the same in every extract. It is"
            " no feature and never leaves; the ledger keeps salted digests, so that a loan whose row was updated"
            " (a balance, its outcome) is charged as the loan it was. Without it an edited row counts as a new loan."
        ),
    )
    missing: tuple[str, ...] = Field(
        default=("", "NA", "N/A", "NaN", "nan", "null", "NULL"),
        description="Texts that mean a missing value in this table.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "DataSource":
        if (self.path is None) == (self.url is None):
            msg = "give exactly one of path and url"
            raise ValueError(msg)
        if self.path is not None and (self.table or self.query or self.password_env):
            msg = "table, query and password_env go with url, not with path; remove them"
            raise ValueError(msg)
        if self.url is not None and (self.table is None) == (self.query is None):
            msg = "with url, give exactly one of table and query"
            raise ValueError(msg)
        return self

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is not None and (
            re.search(r"//[^@]*:[^@]+@", url) or re.search(r"[?&][^=&]*(pass|pwd|secret|token)[^=&]*=", url)
        ):
            msg = "take the password out of the URL and name the environment variable that holds it in password_env"
            raise ValueError(msg)
        return url


class HoldoutConfig(Section):
    """The loans on which this lender judges models; they never train one."""

    fraction: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="Share of the loans held out, chosen by a secret hash of each row, so it stays the same.",
    )
    source: DataSource | None = Field(
        default=None, description="A table of its own with held-out loans, in place of the fraction."
    )


class LenderConfig(Section):
    """bank.yaml: a lender's whole configuration; paths are relative to the file."""

    name: str = Field(pattern=LENDER_NAME_PATTERN, description="The lender's name in the federation.")
    federation: str = Field(pattern=LENDER_NAME_PATTERN, description="The federation this lender joined.")
    coordinator: str = Field(pattern=_ADDRESS, description="host:port of the coordinator.")
    data: DataSource = Field(description="The loans that train the model.")
    holdout: HoldoutConfig = Field(default_factory=HoldoutConfig, description="The loans that judge it.")
    policy: LenderPolicy = Field(default_factory=LenderPolicy, description="What this lender agrees to.")

    @field_validator("coordinator")
    @classmethod
    def _port_exists(cls, coordinator: str) -> str:
        return _with_port(coordinator)


def _with_port(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= 65535:
        msg = "a port lies between 1 and 65535; mend it"
        raise ValueError(msg)
    return address

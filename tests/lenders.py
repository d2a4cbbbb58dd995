"""A lender's folder for tests, without a coordinator: real loans, real keys, a plan of a few steps."""

import hashlib
from pathlib import Path

import pandas as pd
import yaml
from cryptography.hazmat.primitives.serialization import Encoding
from federation import LOANS, SCHEMA, shares
from rosters import authority, coordinator

from fedfin.audit.checkpoint import Checkpoint, sign
from fedfin.audit.origins import coordinator_origin
from fedfin.client.folder import LenderFolder
from fedfin.client.lender import Lender
from fedfin.credit.binning import bins_from_histogram
from fedfin.credit.models import architecture_of, initial_weights, model_fingerprint
from fedfin.credit.schema import Schema
from fedfin.errors import LinkError
from fedfin.identity import create_lender_keys, save_lender_keys
from fedfin.plan import CohortPlan, EvaluationPlan, JobPlan, PrivacyPlan, TrainingPlan
from fedfin.update import Histogram, Message, Propose, Train, decode, encode, with_witness
from fedfin.witness import Shown

PLAN = JobPlan(
    aggregation="plain",
    training=TrainingPlan(rounds=3, local_steps=2, sample_rate=0.5),
    privacy=PrivacyPlan(epsilon=2.0),
    cohort=CohortPlan(min_lenders=2),
    evaluation=EvaluationPlan(times=0),
)
JOB = "credit-1234"


#: The root certificate of the federation `test`, whose key nobody needs.
AUTHORITY = authority()
ROOT = AUTHORITY.root.public_bytes(Encoding.PEM)


def lender_folder(
    directory: Path, *, name: str = "north-bank", num_loans: int = 178, **policy: object
) -> Path:
    """Write a folder as `fedfin client join` leaves it, with loans; return its bank.yaml.

    Its policy allows `PLAN`, which is summed in clear; `policy` changes it.
    """
    directory.mkdir(parents=True)
    save_lender_keys(create_lender_keys(), directory / "keys")
    (directory / "ca.pem").write_bytes(ROOT)
    (directory / "coordinator.json").write_text(coordinator().statement.to_json())
    (directory / "schema.yaml").write_text(SCHEMA.read_text())
    table = pd.read_csv(LOANS, dtype=str, keep_default_na=False)
    table.iloc[shares(1, num_loans)[0]].to_csv(directory / "loans.csv", index=False)
    config = {
        "name": name,
        "federation": "test",
        "coordinator": "127.0.0.1:1",
        "data": {"path": "loans.csv"},
        "policy": {"allow_plain_aggregation": True, **policy},
    }
    (directory / "bank.yaml").write_text(yaml.safe_dump(config))
    return directory / "bank.yaml"


def first_checkpoint() -> str:
    """What an honest coordinator of the federation `test` shows while its log has one entry."""
    origin = coordinator_origin("test", AUTHORITY.fingerprint)
    note = sign(Checkpoint(origin, 1, hashlib.sha256(b"the first entry").digest()), coordinator().key)
    return Shown(note, {}, 0).to_json()


class AskedLender(Lender):
    """A lender whose coordinator shows its log with every question that shows none, and takes what comes back."""

    def answer(self, data: bytes) -> bytes:
        try:
            decode(data, *Message.__subclasses__())
        except LinkError:
            return super().answer(data)  # what is no message shows no log, and is not made one
        return with_witness(super().answer(with_witness(data, first_checkpoint())), "")


def open_lender(bank: Path) -> Lender:
    return AskedLender(LenderFolder(bank), say=lambda _: None)


def schema() -> Schema:
    return Schema.from_yaml(SCHEMA.read_text(), origin="schema.yaml")


def proposal(plan: JobPlan = PLAN, job: str = JOB) -> bytes:
    return encode(Propose(job, plan.model_dump_json(), schema().fingerprint()))


def train_request(
    histogram: bytes, number: int, plan: JobPlan = PLAN, *, shift: float = 0.0, job: str = JOB
) -> bytes:
    """Return the question of round `number`, with bins from a lender's own histogram."""
    columns = schema()
    bins = bins_from_histogram(decode(histogram, Histogram).counts, columns, plan.model.max_bins)
    architecture = architecture_of(plan.model, columns, bins)
    fingerprint = model_fingerprint(columns.fingerprint(), bins.fingerprint(), architecture)
    weights = initial_weights(architecture, plan.model.seed) + shift
    return encode(Train(job, number, bins.to_json(), fingerprint, weights.astype("float32")))

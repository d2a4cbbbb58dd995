"""A released model as two files: model.safetensors (the weights, no pickle) and model.json (all it takes to use it).

The digest names the model at the coordinator and at every lender alike: SHA-256 over the fingerprint of schema,
bins and architecture, and the weights.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedfin.credit.binning import Bins
from fedfin.credit.models import architecture_of, model_fingerprint, num_parameters
from fedfin.credit.schema import Schema
from fedfin.errors import ConfigError, FedfinError
from fedfin.files import write_public
from fedfin.plan import JobPlan

__all__ = ["ReleasedModel", "load_model", "model_digest", "save_model"]

_FORMAT: Final = "fedfin model 1"
_TENSOR: Final = "weights"


@dataclass(frozen=True, slots=True)
class ReleasedModel:
    """A model and what it was trained under.

    Attributes:
        job_id: The job that made it.
        rounds: Rounds it was trained for.
        plan: The job's plan, JSON text.
        schema: The columns it reads.
        bins: How they are encoded.
        fingerprint: Of schema, bins and architecture.
        weights: Shape (d,), float32.
    """

    job_id: str
    rounds: int
    plan: str = field(repr=False)
    schema: Schema = field(repr=False)
    bins: Bins = field(repr=False)
    fingerprint: str
    weights: NDArray[np.float32] = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 that names the model, hex."""
        return model_digest(self.fingerprint, self.weights)


def model_digest(fingerprint: str, weights: NDArray[np.float32]) -> str:
    """Return the SHA-256 over fingerprint and weights (little-endian float32), hex."""
    return hashlib.sha256(
        f"{_FORMAT}\n{fingerprint}\n".encode() + weights.astype("<f4").tobytes()
    ).hexdigest()


def save_model(model: ReleasedModel, directory: Path) -> None:
    """Write the two files into `directory`; model.json comes last, so that with it the model is whole.

    Raises:
        ConfigError: The files cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{directory} cannot be made ({error.strerror}); free the disk or mend its permissions"
        raise ConfigError(msg) from error
    body: dict[str, Any] = {
        "format": _FORMAT,
        "digest": model.digest,
        "job": model.job_id,
        "rounds": model.rounds,
        "fingerprint": model.fingerprint,
        "plan": json.loads(model.plan),
        "schema": model.schema.to_yaml(),
        "bins": model.bins.to_json(),
    }
    write_public(directory / "model.safetensors", save_tensors({_TENSOR: model.weights.astype(np.float32)}))
    write_public(directory / "model.json", (json.dumps(body, indent=1) + "\n").encode())


def load_model(directory: Path) -> ReleasedModel:
    """Read the two files and check them against the digest, and schema, bins and plan against the fingerprint.

    Raises:
        ConfigError: A file is missing, damaged or changed.
    """
    path = directory / "model.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        weights = load_tensors((directory / "model.safetensors").read_bytes())[_TENSOR]
        model = ReleasedModel(
            job_id=body["job"],
            rounds=body["rounds"],
            plan=json.dumps(body["plan"]),
            schema=Schema.from_yaml(body["schema"], origin=f"{path}: schema"),
            bins=Bins.from_json(body["bins"]),
            fingerprint=body["fingerprint"],
            weights=weights,
        )
        architecture = architecture_of(JobPlan.model_validate(body["plan"]).model, model.schema, model.bins)
        named = body["digest"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, FedfinError) as error:
        msg = f"{directory} does not hold a whole model ({error}); take it again from the coordinator or a backup"
        raise ConfigError(msg) from error
    if model.digest != named:
        msg = f"{directory}: the weights are not those that model.json names; take the model again from the coordinator"
        raise ConfigError(msg)
    meaning = model_fingerprint(model.schema.fingerprint(), model.bins.fingerprint(), architecture)
    if model.fingerprint != meaning or (weights.dtype, weights.shape) != (
        np.dtype(np.float32),
        (num_parameters(architecture),),
    ):
        msg = (
            f"{directory}: the weights were not trained under model.json's schema, bins and plan; take the model again"
            " from the coordinator"
        )
        raise ConfigError(msg)
    return model

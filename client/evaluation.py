"""What the federation is worth to this lender: its own model against the federated one, on its held-out loans.

The result stays in the lender's folder, beside the model; nothing of it goes to the coordinator.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedfin.client.alone import train_alone
from fedfin.credit.binning import encode
from fedfin.credit.export import ReleasedModel
from fedfin.credit.metrics import auroc, bootstrap_gain, brier, calibration_ratio, ks
from fedfin.credit.models import architecture_of, encoding_of, predict
from fedfin.credit.source import Loans
from fedfin.files import write_public
from fedfin.plan import JobPlan

__all__ = ["EVALUATION_FILE", "arm_metrics", "evaluate", "give_up", "predict_released"]

EVALUATION_FILE: Final = "evaluation.json"
_SEED: Final = 20_240_101  # of folds and resamples, which reveal nothing: the result stays here


def evaluate(model: ReleasedModel, train: Loans, holdout: Loans, directory: Path, *, same_loans: bool) -> str:
    """Judge a released model, write evaluation.json into `directory`, and return one line for the terminal.

    Args:
        model: The federated model.
        train: The lender's training loans; the alone model is made of them, without privacy: it never leaves.
        holdout: Its held-out loans, of both outcomes.
        directory: The model's folder.
        same_loans: Whether `train` is the snapshot that the job trained on. Where it is not, a loan may have
            changed sides, and the result says so.

    Raises:
        TrainingError: Too few loans of one outcome to make an own model.
        ConfigError: The file cannot be written.
    """
    rng = np.random.default_rng(_SEED)
    alone = train_alone(train.frame, train.labels, model.schema, rng)
    labels = holdout.labels
    own = alone.predict(holdout.frame)
    federated = predict_released(model, holdout)
    gain = bootstrap_gain(labels, federated, own, rng)
    body: dict[str, Any] = {
        "model": model.digest,
        "job": model.job_id,
        "same_loans": same_loans,
        "n_train": len(train),
        "n_holdout": len(holdout),
        "alone_kind": alone.architecture.kind,
        "arms": {"alone": arm_metrics(labels, own), "federated": arm_metrics(labels, federated)},
        "gain": {"auc": gain.estimate, "low": gain.low, "high": gain.high, "confidence": 0.95},
    }
    write_public(directory / EVALUATION_FILE, (json.dumps(body, indent=1) + "\n").encode(), mode=0o600)
    return (
        f"on {len(holdout)} held-out loans: AUROC alone {body['arms']['alone']['auc']:.3f}, federated"
        f" {body['arms']['federated']['auc']:.3f}, gain {gain.estimate:+.3f} (95%: {gain.low:+.3f} to {gain.high:+.3f})"
    )


def give_up(directory: Path, reason: str) -> None:
    """Write into evaluation.json why a model cannot be judged."""
    write_public(directory / EVALUATION_FILE, (json.dumps({"error": reason}) + "\n").encode(), mode=0o600)


def predict_released(model: ReleasedModel, loans: Loans) -> NDArray[np.float64]:
    """Return the model's probability of default for each loan, shape (n,)."""
    plan = JobPlan.model_validate_json(model.plan)
    architecture = architecture_of(plan.model, model.schema, model.bins)
    inputs = encode(loans.frame, model.schema, model.bins, encoding_of(plan.model.kind))
    return predict(architecture, model.weights, inputs)


def arm_metrics(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> dict[str, float]:
    """Return AUROC, KS, Brier score and predicted over actual bad loans."""
    return {
        "auc": auroc(labels, probabilities),
        "ks": ks(labels, probabilities),
        "brier": brier(labels, probabilities),
        "calibration": calibration_ratio(labels, probabilities),
    }

"""`fedfin client status`: what this lender did, spent and got; read from its own folder, nothing is sent."""

import json
from pathlib import Path
from typing import Any

from fedfin.client.evaluation import EVALUATION_FILE
from fedfin.client.folder import LenderFolder

__all__ = ["status_of"]


def status_of(config_path: Path) -> dict[str, Any]:
    """Return a document with the lender's budget per snapshot and its models.

    Raises:
        ConfigError: bank.yaml does not hold.
        LedgerError: The ledger cannot be read.
    """
    folder = LenderFolder(config_path)
    delta = folder.config.policy.max_delta
    snapshots: list[dict[str, Any]] = []
    ledger = folder.ledger()
    try:
        for snapshot in ledger.snapshots():
            spent, reserved = ledger.spent(snapshot, delta), ledger.reserved(snapshot, delta)
            snapshots.append(
                {
                    "snapshot": snapshot,
                    "delta": delta,
                    "relation": "add_or_remove_one",
                    "epsilon_rdp": spent.epsilon_rdp,
                    "epsilon_pld": spent.epsilon_pld,
                    "reserved_rdp": reserved.epsilon_rdp,
                }
            )
    finally:
        ledger.close()
    models: list[dict[str, Any]] = []
    for path in sorted(folder.models_path.glob("*/model.json")):
        evaluation = path.parent / EVALUATION_FILE
        models.append(
            {"model": path.parent.name, **(json.loads(evaluation.read_text()) if evaluation.exists() else {})}
        )
    return {
        "name": folder.config.name,
        "federation": folder.config.federation,
        "coordinator": folder.config.coordinator,
        "epsilon_limit": folder.config.policy.epsilon_limit,
        "snapshots": snapshots,
        "models": models,
    }

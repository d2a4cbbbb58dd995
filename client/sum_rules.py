"""The rules of this lender for secure sums, beyond those of the protocol (`fedfin.privacy.sum_rules`), by name.

The names are written to the lender's log and told to the coordinator, so they do not change.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedfin.errors import ProtocolRefusalError

__all__ = ["RULES", "refusal"]

RULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "roster_changed": "a lender goes by the roster it pinned and by what its members signed to follow on it",
        "membership": "a lender goes by a roster that has it in it with its own keys",
        "coordinator_key": "a lender goes by the coordinator's key that it pinned",
        "aggregation": "a job of secure sums answers in sums only, a job in clear in clear only",
        "other_job": "a sum is of this federation, of the accepted job and of its plan",
        "stage": "a sum is of a stage that the accepted plan has and this lender takes part in",
        "attempt": "each attempt at a stage is opened once",
        "charged": "what left in a private job was charged, and is not made a second time",
        "unknown_sum": "a lender that holds nothing of a sum declines the rest of it",
        "question": "the question is of the sum's job and stage",
        "layout": "the vector is laid out as plan, schema, model and cohort say",
        "planned_noise": "in mode shared no more lenders are lost than the noise was planned for",
        "one_model": "a stage is answered for one model",
        "witness": "a question of weight shows the coordinator's log, with a proof from what this lender cosigned last",
        "fork": "the coordinator has one log, signed by its own key, that only grows",
        "differencing": "a model that was answered is answered again for the identical cohort only",
    }
)
"""What this lender asks beyond `privacy.sum_rules`, by the name that a refusal carries."""


def refusal(rule: str, what: str) -> ProtocolRefusalError:
    """Return the error that refuses by `rule`, a key of `RULES`; `what` says what was seen, without secrets."""
    return ProtocolRefusalError(rule, f"{what}; the rule is that {RULES[rule]}")

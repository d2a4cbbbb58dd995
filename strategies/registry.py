"""The strategies by the plan's name for them, and what each needs: the cohort's sum, or every update by itself."""

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from fedfin.errors import ConfigError
from fedfin.strategies.fedavg import fedavg
from fedfin.strategies.fedsgd import fedsgd
from fedfin.strategies.median import median

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fedfin.plan import JobPlan
    from fedfin.strategies.strategy import ModelState, Strategy

__all__ = ["UpdateStrategy", "check_strategy", "sum_strategy", "update_strategy"]


class UpdateStrategy(Protocol):
    """Turns one round's single updates into the next global model; changes neither argument."""

    def __call__(self, state: "ModelState", updates: "Sequence[NDArray[np.float32]]") -> "ModelState":
        """Return the state after the round."""
        ...


_OF_SUMS: Final["Mapping[str, Strategy]"] = MappingProxyType({"fedavg": fedavg})
_OF_UPDATES: Final["Mapping[str, UpdateStrategy]"] = MappingProxyType({"median": median})


def check_strategy(plan: "JobPlan") -> None:
    """Refuse a strategy that needs what the plan's aggregation does not show.

    Raises:
        ConfigError: It needs single updates, and aggregation is secure.
    """
    if plan.aggregation == "secure" and update_strategy(plan) is not None:
        msg = (
            f"training.strategy is {plan.training.strategy}, which needs each lender's update by itself, while"
            f" aggregation is secure, which shows their sum only; take {' or '.join(_OF_SUMS)}, or aggregation plain"
        )
        raise ConfigError(msg)


def sum_strategy(plan: "JobPlan") -> "Strategy":
    """Return the strategy of a plan that needs the cohort's sum only.

    In mode shared the sum is of gradients and `fedsgd` makes a step of it; otherwise it is `training.strategy`.
    """
    if plan.privacy.mode == "shared":
        return partial(fedsgd, training=plan.training)
    return _OF_SUMS[plan.training.strategy]


def update_strategy(plan: "JobPlan") -> "UpdateStrategy | None":
    """Return the strategy of a plan that needs every update by itself, or None where it needs their sum only."""
    return _OF_UPDATES.get(plan.training.strategy)

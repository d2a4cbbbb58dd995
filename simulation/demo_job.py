"""The job of `fedfin demo`: which aggregation, privacy mode and quorum so many lenders get.

From three lenders on, updates are summed under secure aggregation; of two lenders each would learn the other's update
from the sum, so two are summed in clear. With privacy the noise comes in shares (mode `shared`), which served small
lenders better at the same stated epsilon and rests on more: docs/decisions/0016-the-demos-privacy-mode.md.
"""

from typing import Any, Final

from fedfin.plan import JobPlan

__all__ = ["MIN_SECURE", "demo_job", "demo_quorum"]

MIN_SECURE: Final = 3
"""Fewer lenders than this are summed in clear."""

_USUAL_QUORUM: Final = 5  # the default of a lender's policy
_FIRST_WITH_DROPOUT: Final = 4
_SHARED_TRAINING: Final = {"rounds": 30, "local_steps": 1, "learning_rate": 0.07}


def demo_quorum(num_lenders: int) -> int:
    """Return the smallest cohort of a demo of so many lenders under secure aggregation: one may fail, from four on."""
    return max(MIN_SECURE, min(_USUAL_QUORUM, num_lenders - 1))


def demo_job(num_lenders: int, epsilon: float | None = 3.0, rounds: int | None = None) -> JobPlan:
    """Return the demo's job.

    Args:
        num_lenders: 2 or more.
        epsilon: Of the whole job, at delta 1e-5; None trains without privacy.
        rounds: None takes the number that the mode was measured with.

    Raises:
        ValidationError: Epsilon or rounds are out of range.
    """
    training: dict[str, Any] = {} if rounds is None else {"rounds": rounds}
    if num_lenders < MIN_SECURE:
        privacy: dict[str, Any] = {"mode": "none"} if epsilon is None else {"epsilon": epsilon}
        return _job(training, privacy, aggregation="plain", cohort={"min_lenders": 2})
    cohort = {"min_lenders": demo_quorum(num_lenders)}
    if epsilon is None:
        return _job(training, {"mode": "none"}, aggregation="secure", cohort=cohort)
    privacy = {
        "mode": "shared",
        "epsilon": epsilon,
        "planned_dropouts": int(num_lenders >= _FIRST_WITH_DROPOUT),
        # as many as the secure sum withstands: ceil(n / 3) - 1
        "planned_colluders": (num_lenders + 2) // 3 - 1,
    }
    return _job({**_SHARED_TRAINING, **training}, privacy, aggregation="secure", cohort=cohort)


def _job(training: dict[str, Any], privacy: dict[str, Any], **sections: Any) -> JobPlan:  # noqa: ANN401  (YAML's values)
    return JobPlan.model_validate({"name": "demo", "training": training, "privacy": privacy, **sections})

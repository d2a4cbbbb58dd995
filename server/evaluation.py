"""What the federation learns of a model: figures of merit of all held-out loans, from the sum of their counts."""

from fedfin.plan import JobPlan

__all__ = ["evaluation_rounds"]


def evaluation_rounds(plan: JobPlan) -> tuple[int, ...]:
    """Return after which rounds the model is evaluated, ascending: entry k - 1 is evaluation k, the last the last one.

    The plan holds that there are no more evaluations than rounds, so no round is named twice.
    """
    times, rounds = plan.evaluation.times, plan.training.rounds
    return tuple(-(-number * rounds // times) for number in range(1, times + 1))

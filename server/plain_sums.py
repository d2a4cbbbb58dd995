"""Summing in clear: the coordinator asks, checks every single answer, and adds them up."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from fedfin.server.exchange import Answers, Exchange
from fedfin.server.summing import AnswerError, CohortSums, Parts, Stage, SumShortError, Upcoming
from fedfin.update import Message, Refused

__all__ = ["PlainSums"]


class PlainSums:
    """The `Summing` of aggregation plain: a repeated question gets a lender's same answer, so nothing is ever lost."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        deadline_s: float,
        refuse: Callable[[str, str], None],
        wait: Callable[[str, Refused], None],
    ) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            deadline_s: What a round waits.
            refuse: Told of a lender that refused, with its reason: its part in the job ends.
            wait: Told of a lender that says not yet: it stays in the job.
        """
        self._exchange = exchange
        self._deadline_s = deadline_s
        self._refuse = refuse
        self._wait = wait

    def bound_to(self, stage: Stage) -> None:
        """Return None: in clear no cohort is bound."""
        del stage

    def sum(
        self,
        stage: Stage,
        names: Sequence[str],
        *,
        following: Upcoming | None = None,
        on_reply: Callable[[str], None] | None = None,
    ) -> CohortSums:
        """Return the sum of the answers that hold; errors as `Summing.sum`, of which nothing is ever lost."""
        del following  # nothing can be prepared
        started = time.monotonic()
        answers = self._exchange.ask(
            dict.fromkeys(names, stage.question), stage.answer, deadline_s=self._deadline_s, on_reply=on_reply
        )
        found: dict[str, Parts] = {}
        for name, reply in self._sorted_out(answers, stage):
            try:
                found[name] = stage.read(name, reply)
            except AnswerError as error:
                answers.failures[name] = str(error)
        if not found or len(found) < stage.min_survivors(len(names)):
            refused = [
                name
                for name, reply in answers.replies.items()
                if isinstance(reply, Refused) and not reply.waits
            ]
            raise SumShortError(answers.failures, refused)
        some = next(iter(found.values()))
        return CohortSums(
            parts={part: np.sum([found[name][part] for name in found], axis=0) for part in some},
            survivors=tuple(sorted(found)),
            num_lenders=len(names),
            missing=answers.failures,
            failed_after={},
            seconds=time.monotonic() - started,
            exchanges=1,
            singles=found if stage.keeps_single else {},
        )

    def _sorted_out(self, answers: Answers, stage: Stage) -> list[tuple[str, Message]]:
        """Return the replies that are no refusals; a refusal ends that lender's part in the job, or in the stage."""
        kept: list[tuple[str, Message]] = []
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, Refused):
                answers.failures[name] = reply.reason
                if reply.waits:
                    self._wait(name, reply)
                elif stage.ends_part:
                    self._refuse(name, reply.reason)
            else:
                kept.append((name, reply))
        return kept

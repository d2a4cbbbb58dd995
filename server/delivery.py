"""How lenders learn that a job is over, whether they were there or come back later.

A completed job ends with its model, one that failed or was abandoned without. What a lender had reserved for it and not
spent is free from then on, so it is told at once, and of earlier jobs before it is asked for a new one.
"""

import time
from collections.abc import Collection
from typing import Final

import numpy as np

from fedfin.server.exchange import Exchange
from fedfin.server.gathering import PROPOSE_S, WAIT_S
from fedfin.server.jobs import Say
from fedfin.server.roster import Checkpoint, FederationStore
from fedfin.update import Done, Finish, Refused

__all__ = ["Delivery"]

_GIVE_UP_S: Final = 10.0  # no model to keep, and the coordinator ends: who is busy is told when it runs again


class Delivery:
    """Tells lenders of the end of this job and of the ones before it."""

    def __init__(
        self, exchange: Exchange, store: FederationStore, job_id: str, *, say: Say, patience_s: float
    ) -> None:
        """Prepare.

        Args:
            exchange: The way to the lenders.
            store: Knows how jobs ended, and who was told.
            job_id: The present job.
            say: Told of every step.
            patience_s: How long lenders that are away are waited for, at the end.
        """
        self._exchange = exchange
        self._store = store
        self._job_id = job_id
        self._say = say
        self._patience_s = patience_s
        self._ended = {
            earlier.job_id: earlier
            for earlier in store.jobs()
            if earlier.status != "running" and earlier.job_id != job_id
        }

    def deliver(self, checkpoint: Checkpoint) -> None:
        """Send the model to every lender that took part; those away get it when the coordinator runs again."""
        missing, not_kept = self._tell(_finish(self._job_id, checkpoint), self._patience_s, PROPOSE_S)
        self._say({"event": "delivered", "missing": missing, "not_kept": not_kept})

    def give_up(self, patience_s: float = 0.0) -> None:
        """Tell every lender that took part that the job is over without a model; those away hear it another time.

        Args:
            patience_s: How long lenders that are away are waited for.
        """
        took_part = set(self._store.undelivered(self._job_id))
        missing, _ = self._tell(_finish(self._job_id, None), patience_s, _GIVE_UP_S)
        told = sorted(took_part - set(missing))
        self._say({"event": "given_up", "job": self._job_id, "told": told, "missing": missing})

    def _tell(self, finish: Finish, patience_s: float, deadline_s: float) -> tuple[list[str], dict[str, str]]:
        """Send the end of this job; return who has not confirmed it, and who answered and does not, with the reason."""
        not_kept: dict[str, str] = {}
        until = time.monotonic() + patience_s
        said = False
        while True:
            away = set(self._store.undelivered(self._job_id))
            here = (away & self._exchange.online()) - set(not_kept)
            if here:
                not_kept |= self._end(finish, here, deadline_s)
                away = set(self._store.undelivered(self._job_id))
            if not away - set(not_kept) or time.monotonic() >= until:
                return sorted(away), not_kept
            if not said:
                left = max(0.0, until - time.monotonic())
                event = "delivering" if finish.status == "completed" else "giving_up"
                self._say({"event": event, "for": sorted(away - set(not_kept)), "seconds": left})
                said = True
            time.sleep(WAIT_S)

    def settle(self, names: Collection[str]) -> None:
        """Tell these lenders how earlier jobs ended, where they were away: what they had reserved is free again."""
        for job in list(self._ended.values()):
            away = set(self._store.undelivered(job.job_id))
            if not away:
                del self._ended[job.job_id]
            elif away & set(names):
                last = self._store.checkpoint(job.job_id) if job.status == "completed" else None
                self._end(_finish(job.job_id, last), away & set(names))

    def _end(self, finish: Finish, names: set[str], deadline_s: float = PROPOSE_S) -> dict[str, str]:
        """Send a job's end; return the lenders that answered but could not keep it, with the reason."""
        answers = self._exchange.ask(dict.fromkeys(sorted(names), finish), Done, deadline_s=deadline_s)
        not_kept: dict[str, str] = {}
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, Done):
                self._store.mark_delivered(finish.job_id, name)
            else:
                not_kept[name] = (
                    reply.reason if isinstance(reply, Refused) else "it answered another question"
                )
        return not_kept


def _finish(job_id: str, last: Checkpoint | None) -> Finish:
    """Return the message that ends a job: completed with its model, or without one (failed or abandoned here)."""
    if last is None:
        return Finish(job_id, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32))
    return Finish(job_id, "completed", last.round, last.bins, last.fingerprint, last.weights, last.reference)

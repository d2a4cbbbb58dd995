"""How lenders learn that a job is over, whether they were there or come back later.

A completed job ends with its model, an abandoned one without. What a lender had reserved for it is free from then on,
so it is told of earlier jobs before it is asked for a new one.
"""

import time
from collections.abc import Collection

import numpy as np

from fedfin.server.exchange import Exchange
from fedfin.server.gathering import PROPOSE_S, WAIT_S
from fedfin.server.jobs import Say
from fedfin.server.roster import Checkpoint, FederationStore
from fedfin.update import Done, Finish, Refused

__all__ = ["Delivery"]


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
        finish = _finish(self._job_id, checkpoint)
        not_kept: dict[str, str] = {}
        until = time.monotonic() + self._patience_s
        told = False
        while True:
            away = set(self._store.undelivered(self._job_id))
            here = (away & self._exchange.online()) - set(not_kept)
            if here:
                not_kept |= self._end(finish, here)
                away = set(self._store.undelivered(self._job_id))
            if not away - set(not_kept) or time.monotonic() > until:
                self._say({"event": "delivered", "missing": sorted(away), "not_kept": not_kept})
                return
            if not told:
                left = max(0.0, until - time.monotonic())
                self._say({"event": "delivering", "for": sorted(away - set(not_kept)), "seconds": left})
                told = True
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

    def _end(self, finish: Finish, names: set[str]) -> dict[str, str]:
        """Send a job's end; return the lenders that answered but could not keep it, with the reason."""
        answers = self._exchange.ask(dict.fromkeys(sorted(names), finish), Done, deadline_s=PROPOSE_S)
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
    """Return the message that ends a job: completed with its model, or abandoned."""
    if last is None:
        return Finish(job_id, "abandoned", 0, "", "", np.zeros(0, dtype=np.float32))
    return Finish(job_id, "completed", last.round, last.bins, last.fingerprint, last.weights, last.reference)

"""Answers that are seen by themselves: each stage is answered once, kept, then charged, then sent.

A repeated question (the coordinator was restarted) gets the answer that was kept, so nothing is charged twice; an
answer that was kept but not charged never left, so it is made anew. Why in this order: docs/decisions/0004.
"""

import hashlib
from collections.abc import Callable

from fedfin.audit.events import Budget, Event, Exchange, Failure, bounded
from fedfin.client.accepted import AcceptedJob
from fedfin.client.journal import Journal
from fedfin.client.refusing import WORK_FAILED
from fedfin.client.work import ResultT, Work
from fedfin.errors import LedgerError, PolicyRefusalError
from fedfin.privacy.ledger import Ledger
from fedfin.update import Message, Refused, encode

__all__ = ["answer_once", "charge_of", "charged_failure"]


def answer_once(
    question: bytes,
    job: AcceptedJob,
    work: Work[Message],
    ledger: Ledger,
    journal: Journal,
    say: Callable[[str], None],
) -> bytes:
    """Return the answer to a stage: what was kept, or by doing the work, keeping it and charging it.

    In a private job the work always ends in an answer that is kept and charged, a failure too: an uncharged failure
    would tell what no noise covers.

    Args:
        question: The question's bytes: the same ones get the same answer.
        job: The job.
        work: The stage's.
        ledger: The lender's.
        journal: The lender's.
        say: Prints a line for people.

    Raises:
        PolicyRefusalError: The stage was answered for another question.
        LedgerError: The stage was charged and its answer is gone, or nothing can be recorded.
        FedfinError: Without privacy: what the work raises.
    """
    asked = hashlib.sha256(question).digest()
    kept = job.folder.answer(work.stage)
    # Without privacy there is no charge: what was kept counts as sent.
    charged = not work.events or ledger.committed(work.charged_to, work.stage) is not None
    if kept is not None and charged:
        if kept[:32] != asked:
            msg = f"{work.stage} of job {job.job_id} was answered for another model already; a stage has one answer"
            raise PolicyRefusalError(msg)
        journal.note(Exchange(job=job.job_id, stage=work.stage, step="repeated", cohort_size=0))
        return kept[32:]
    if charged and work.events:
        msg = f"{work.stage} of job {job.job_id} was charged but its answer is gone; it is not made twice"
        raise LedgerError(msg)
    answer = encode(_done(job, work, journal, say))
    job.folder.keep_answer(work.stage, asked + answer)
    digest = hashlib.sha256(answer).hexdigest()
    if work.events:
        # on the disk first: nothing is spent that the log does not say. Killed in between, it is said again.
        journal.write(*charge_of(job, work))
        ledger.commit(work.charged_to, work.stage, work.events, digest)
    journal.note(Exchange(job=job.job_id, stage=work.stage, step="released", cohort_size=0, digest=digest))
    say(f"job {job.job_id}: {work.stage} answered")
    return answer


def charged_failure(
    job: AcceptedJob, stage: str, error: Exception, journal: Journal, say: Callable[[str], None]
) -> Refused:
    """Return what is answered in the place of private work that failed; it is charged like work that succeeded."""
    journal.note(Failure(job=job.job_id, stage=stage, reason=bounded(str(error))))
    say(f"job {job.job_id}: {stage} failed, and is charged all the same: {error}")
    return Refused(job.job_id, WORK_FAILED)


def charge_of(job: AcceptedJob, work: Work[ResultT]) -> tuple[Event, ...]:
    """Return the log's entry of what the ledger was charged for a stage; none where nothing was."""
    if not work.events:
        return ()
    counted = work.charged_to != job.job_id
    return (
        Budget(
            action="commit",
            job=job.job_id,
            snapshot=job.counted if counted else job.snapshot,
            stage=work.stage,
        ),
    )


def _done(job: AcceptedJob, work: Work[Message], journal: Journal, say: Callable[[str], None]) -> Message:
    try:
        return work.run()
    except Exception as error:
        if not work.events:
            raise
        return charged_failure(job, work.stage, error, journal, say)

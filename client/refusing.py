"""How a lender refuses: the rule and the reason go to its own log, and to the coordinator what it may know of them.

What a rule of the secure sum or the lender's policy says is told as it is: it is about the coordinator's own request.
Of the lender's loans, ledger and machine the coordinator learns only what it needs to go on.
"""

from typing import Final

from fedfin.audit.events import Refusal, bounded
from fedfin.client.journal import Journal
from fedfin.errors import (
    AuditError,
    BudgetSpentError,
    ConfigError,
    DataError,
    FedfinError,
    LedgerError,
    ProtocolRefusalError,
    TrainingError,
)

__all__ = ["WORK_FAILED", "reason_for", "write_refusal"]

WORK_FAILED: Final = "its training did not succeed"
"""What the coordinator learns of work that failed."""

_REASONS: Final[dict[type[FedfinError], str]] = {
    BudgetSpentError: "its privacy budget does not allow the job",
    DataError: "its loans do not pass its own check",
    LedgerError: "its privacy ledger cannot record",
    AuditError: "its log cannot record",
    TrainingError: WORK_FAILED,
    ConfigError: "its installation needs its engineer",
}


def reason_for(error: FedfinError) -> str:
    """Return what the coordinator is told."""
    return next((text for kind, text in _REASONS.items() if isinstance(error, kind)), str(error))


def write_refusal(journal: Journal, job_id: str, asked: str, error: FedfinError) -> None:
    """Note a refusal in the lender's log, with the rule that was broken.

    Args:
        journal: The lender's.
        job_id: The job that was named.
        asked: The question's kind.
        error: Why; of a `ProtocolRefusalError` the log gets the rule's name, of any other its class.
    """
    rule = error.rule if isinstance(error, ProtocolRefusalError) else type(error).__name__
    journal.note(Refusal(rule=rule, asked=asked, reason=bounded(str(error)), job=job_id))

"""Errors that a user can mend: what was wrong, where, and what to do.

One class for each thing a caller would do differently. The message is one paragraph that names the
setting, the value seen and the mend; it never holds a key, a token or a row of loans.
"""


class FedfinError(Exception):
    """Base of every error that fedfin raises on purpose."""


class ConfigError(FedfinError):
    """A configuration file is missing, unreadable, or holds a key or value it may not."""


class DataError(FedfinError):
    """The lender's table cannot be used: names the row, the column, the rule and the mend."""


class SchemaMismatchError(FedfinError):
    """Two sides disagree on schema, bins or architecture: their vectors do not mean the same."""


class EnrolmentError(FedfinError):
    """A token, certificate or key is not accepted; says which and why."""


class PolicyRefusalError(FedfinError):
    """The lender's own policy forbids what the coordinator asked."""


class NotYetError(PolicyRefusalError):
    """The lender's policy does not allow it now, and may later: the coordinator asks again by itself.

    Args:
        waits: What is waited for: `approval` or `hours`.
        what: What was seen, without more than the coordinator may know.
    """

    def __init__(self, waits: str, what: str) -> None:
        super().__init__(what)
        self.waits = waits


class PrivacyParameterError(FedfinError):
    """A privacy parameter has no meaning or would give no protection."""


class BudgetSpentError(FedfinError):
    """A job would pass the lender's epsilon limit for this data snapshot."""


class LedgerError(FedfinError):
    """The privacy ledger cannot record, or holds what it cannot account for: work stops."""


class AuditError(FedfinError):
    """A log cannot be written or read, or holds what cannot be true: work that would go unlogged stops."""


class TrainingError(FedfinError):
    """Local training gave something that may not leave the lender (not finite, empty)."""


class LinkError(FedfinError):
    """The other side cannot be reached, or answers in a way that is not the protocol."""


class QuorumError(FedfinError):
    """Fewer lenders than the quorum took part."""


class JobOverError(QuorumError):
    """The job cannot go on, whatever its lenders do now: it is given up, and only another job can be run."""


class ProtocolRefusalError(FedfinError):
    """A message of the secure sum breaks a rule: nothing is revealed, and this side answers no more of that sum.

    Args:
        rule: Short fixed name of the rule, for the lender's log; those of the sum itself are in `privacy.sum_rules`.
        what: What was seen and what that means, without keys, shares or masks.
    """

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


class RoundAbortedError(FedfinError):
    """A secure sum cannot be finished: too few lenders went on, and what arrived stays masked."""

"""The rules of a secure sum: what each side refuses, and the name under which it does.

A refusal is a `ProtocolRefusalError` with one of these names. It reveals nothing, and whoever refuses answers no more
of that sum. The names are written to the lender's log, so they do not change.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedfin.errors import ProtocolRefusalError

__all__ = ["RULES", "refusal"]

RULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "malformed": "every message has the one form that its parser accepts",
        "order": "the five steps of a sum are answered in their order",
        "once": "each step of a sum is answered once",
        "ended": "a sum that was refused, finished or forgotten is not gone on with",
        "cohort_size": "a sum has at least as many lenders as this lender's policy asks, and never fewer than three",
        "threshold": "the threshold is floor(2n/3) + 1 of the cohort",
        "membership": "this lender is in the cohort, with its own key in the roster it pinned",
        "roster": "the context names the pinned roster, and every lender of the cohort is in it",
        "unenrolled": "nobody outside the cohort takes part",
        "advert_signature": "an advert is signed for this sum by the identity key that its lender enrolled",
        "own_advert": "this lender's own advert comes back unaltered",
        "repeated_keys": "no two keys of a sum are equal",
        "weak_key": "a key is a canonical X25519 key whose exchange gives a secret",
        "too_few_adverts": "at least the threshold and the policy's cohort opened the sum",
        "sealed_share": "a share is authentic: from this sender, to this lender, for this sum",
        "share_commitment": "a share is the one that its sender committed to",
        "too_few_sharers": "at least the threshold and the policy's cohort shared their secrets",
        "vector": "a masked vector is asked of a sharer, arrives once, and has the sum's length",
        "survivor_set": "the survivors are among the sharers and hold this lender",
        "too_few_survivors": "at least the threshold, the policy's cohort and the planned answers survived",
        "confirmation": "a confirmation is signed by a survivor, for this sum, model, sharers and survivors",
        "too_few_confirmations": "at least the threshold of the survivors confirmed the same survivors",
        "lying_helper": "a share that is given back is the one that was handed out",
        "false_dealer": "the shares that a sharer committed to give the secret of its advert",
    }
)
"""What each rule asks, by the name that a refusal carries."""


def refusal(rule: str, what: str) -> ProtocolRefusalError:
    """Return the error that refuses by `rule`, a key of `RULES`; `what` says what was seen, without secrets."""
    return ProtocolRefusalError(rule, f"{what}; the rule is that {RULES[rule]}")

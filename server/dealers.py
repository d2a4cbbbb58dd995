"""Who dealt shares that do not open, by the word of the lenders that got them, and what is used up by it.

Nobody's word is needed against a dealer whose shares open and give no secret: they are the ones it committed to, as
`Combiner.false_dealers` finds when all of them are there. It is left out of the job likewise, under `FALSE_DEALER`.

A lender that gets such a share refuses the sum and names the dealer. So one dealer makes everybody else refuse; were
it asked again with them, no sum would ever end. It is left out once more lenders name it than may collude against an
honest one. Who refuses at that step has made no masked vector: where all others did, the stage is not used up.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from fedfin.privacy.sum_shares import accused

__all__ = ["FALSE_DEALER", "BadDealers", "bad_dealers"]

FALSE_DEALER: Final = "the shares that it dealt give no secret of its advert"
"""Why a lender is left out whose committed shares lie on no polynomial of its secret."""

_SHORT_OF_SHARERS: Final = (
    "too_few_sharers: "  # the other rule of that step that a lender's own policy decides
)


@dataclass(frozen=True, slots=True)
class BadDealers:
    """What the refusals of one sum's masks say.

    Attributes:
        named_by: The lenders that name a dealer, by dealer; as many as leave it out of the job, or more.
        nothing_left: Whether nobody but these dealers can have made a masked vector.
        rule: By which rules of the sum they were named, for the log.
    """

    named_by: Mapping[str, frozenset[str]]
    nothing_left: bool
    rule: str

    @property
    def witnesses(self) -> frozenset[str]:
        """Who named one of the dealers and is none: their refusals are no fault of theirs."""
        return frozenset[str]().union(*self.named_by.values()) - set(self.named_by)


def bad_dealers(
    refusals: Mapping[str, str], *, asked: Collection[str], sharers: Collection[str], num_lenders: int
) -> BadDealers:
    """Return the dealers that at least ceil(num_lenders / 3) lenders name; fewer than a third may collude.

    Args:
        refusals: Reason by lender, of those that were asked for a masked vector and refused; a lender's text, and
            nothing is made of it but where it is exactly the refusal of a share of one of `sharers`.
        asked: Who was asked for a masked vector.
        sharers: Whose sealed shares they were sent.
        num_lenders: Lenders of the sum's cohort, n.
    """
    named: defaultdict[str, set[str]] = defaultdict(set)
    for name, reason in refusals.items():
        dealer = accused(reason, sorted(set(sharers) - {name}))
        if dealer is not None:
            named[dealer].add(name)
    enough = -(-num_lenders // 3)
    named_by = {dealer: frozenset(by) for dealer, by in sorted(named.items()) if len(by) >= enough}
    made_none = set[str]().union(*named.values())
    made_none |= {name for name, reason in refusals.items() if reason.startswith(_SHORT_OF_SHARERS)}
    witnesses = set[str]().union(*named_by.values())
    return BadDealers(
        named_by,
        nothing_left=bool(named_by) and set(asked) <= made_none | set(named_by),
        rule=", ".join(sorted({refusals[name].partition(":")[0] for name in witnesses})),
    )

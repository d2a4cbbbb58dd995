"""Whole secure sums in one process, step by step, so that a test can leave out or spoil any message."""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.errors import ProtocolRefusalError
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of

QUESTION = b"train from these weights"


@cache
def identity_of(name):
    """A lender's identity key: the same in every sum of a test run."""
    return Ed25519PrivateKey.generate()


def names_of(num):
    return tuple(f"bank-{number:02}" for number in range(num))


def roster_of(names):
    return {name: identity_of(name).public_key() for name in names}


def context_of(names, **changes):
    """The context of a sum of these lenders, right unless changed."""
    right = SumContext(
        federation="fed",
        job_id="job-1",
        plan="a" * 64,
        stage="round 1",
        attempt=0,
        cohort=tuple(names),
        roster=roster_digest(roster_of(names)),
        layout="b" * 64,
        threshold=threshold_of(len(names)),
    )
    return replace(right, **changes)


def finest_step(bound, num_lenders, ring_bits):
    """The smallest quantum at which the lenders' sum cannot wrap."""
    return bound / ((2 ** (ring_bits - 1) - 1) // num_lenders)


@dataclass
class Sum:
    """One sum: the lenders, the coordinator, and what the coordinator sends."""

    names: tuple[str, ...]
    participants: dict[str, Participant]
    combiner: Combiner
    size: int
    adverts: dict[str, bytes] = field(default_factory=dict)

    def open(self, who=None):
        for name in self._or_all(who):
            self.combiner.add_advert(name, self.participants[name].open())
        self.adverts = self.combiner.adverts()

    def share(self, who=None):
        for name in self._or_all(who):
            self.combiner.add_sealed(name, self.participants[name].share(self.adverts))

    def ask(self, question=QUESTION):
        self.combiner.ask(question)

    def sealed_for(self, name):
        return self.combiner.sealed_for(name)

    def mask(self, who=None, vectors=None, question=QUESTION):
        for name in sorted(self.combiner.sharers if who is None else who):
            self.participants[name].receive(self.sealed_for(name), question)
            values = np.zeros(self.size, np.uint32) if vectors is None else vectors[name].copy()
            self.combiner.fold(name, self.participants[name].mask(values))

    def confirm(self, who=None):
        survivors = self.combiner.settle()
        for name in sorted(survivors if who is None else who):
            self.combiner.add_confirmation(name, self.participants[name].confirm(survivors))

    def unmask(self, who=None):
        confirmations = self.combiner.confirmations()
        for name in sorted(self.combiner.survivors if who is None else who):
            self.combiner.add_shares(name, self.participants[name].unmask(confirmations))

    def upto(self, step):
        """Do the steps before `step` with everybody."""
        steps = ("open", "share", "ask", "mask", "confirm", "unmask")
        for before in steps[: steps.index(step)]:
            getattr(self, before)()
        return self

    def _or_all(self, who):
        return self.names if who is None else sorted(who)


def new_sum(num=6, *, size=8, min_cohort=3, **changes):
    """A sum of `num` lenders that nobody has opened."""
    names = names_of(num)
    roster, context = roster_of(names), context_of(names, **changes)
    participants = {name: Participant(context, name, identity_of(name), roster, min_cohort) for name in names}
    return Sum(names, participants, Combiner(context, roster, size), size)


def secrets_of(participant):
    """Every secret that a participant holds now, as bytes."""
    own = participant._secrets
    held = [share for pair in own.held.values() for share in pair]
    found = [
        own.channel_private,
        own.mask_private,
        own.own,
        *own.channels.values(),
        *own.pairs.values(),
        *held,
    ]
    return [secret for secret in (*found, *(mask.key for mask in own.masks)) if secret]


def refused(rule, participant, call, *arguments):
    """The call is refused by this rule; nothing secret is told, and this lender answers nothing of the sum again."""
    before = secrets_of(participant)
    with pytest.raises(ProtocolRefusalError) as caught:
        call(*arguments)
    assert caught.value.rule == rule
    assert str(caught.value).startswith(f"{rule}: ")
    shown = str(caught.value) + repr(participant)
    assert before != []
    assert [secret for secret in before if secret.hex() in shown or repr(secret)[2:-1] in shown] == []
    assert participant._secrets is None
    for again in (
        participant.open,
        lambda: participant.share({}),
        lambda: participant.receive({}, QUESTION),
        lambda: participant.mask(np.zeros(4, np.uint32)),
        lambda: participant.confirm([]),
        lambda: participant.unmask({}),
    ):
        with pytest.raises(ProtocolRefusalError) as later:
            again()
        assert later.value.rule == "ended"
    return str(caught.value)


def turned_away(rule, call, *arguments):
    """The coordinator refuses a contribution by this rule."""
    with pytest.raises(ProtocolRefusalError) as caught:
        call(*arguments)
    assert caught.value.rule == rule
    return str(caught.value)

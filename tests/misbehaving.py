"""A coordinator that misbehaves in exactly one way at a time, and keeps all that the lenders tell it.

It talks to lenders over any `Exchange`: lenders in memory, or real ones through Flower, where the tests put it in the
place of the honest job's loop (`as_server_app`). Every attack is a job of its own, in `ATTACKS`.
"""

import json
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedfin.client.pinning import own_row
from fedfin.coordinator_key import CoordinatorIdentity
from fedfin.credit.binning import bins_from_histogram, histogram_size
from fedfin.credit.models import (
    architecture_of,
    initial_weights,
    largest_model,
    model_fingerprint,
    num_parameters,
)
from fedfin.credit.schema import Schema
from fedfin.errors import FedfinError, ProtocolRefusalError
from fedfin.identity import LenderKeys, create_lender_keys
from fedfin.plan import JobPlan, PrivacyPlan
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.encoding import Layout, unpack
from fedfin.privacy.shared_accounting import calibrate_shared, shared_sums
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.privacy.sum_messages import Advert
from fedfin.privacy.sum_shares import MASK_KEY, OWN_MASK, is_committed
from fedfin.roster_chain import RosterChain, SignedRoster
from fedfin.roster_versions import RosterMember, RosterVersion, sign_version
from fedfin.server.roster_signing import RosterBook, RosterSigning
from fedfin.strategies.sums import round_layout, round_scheme, shares_layout
from fedfin.update import (
    Accepted,
    Advertised,
    Confirm,
    Confirmed,
    Done,
    Finish,
    Mask,
    Masked,
    Message,
    Open,
    Propose,
    Refused,
    Shared,
    ShareKeys,
    Train,
    Unmask,
    Unmasked,
    encode,
)

DEADLINE_S = 30.0
NUM_LENDERS = 6  # with one of them missing the lenders' policy, five, still holds
NAMES = tuple(f"bank-{letter}" for letter in "abcdef")
ME, OTHER, LAST = NAMES[0], NAMES[1], NAMES[5]
WITHOUT_LAST = NAMES[:5]
PLAN = JobPlan.model_validate(
    {
        "name": "attack",
        "training": {"rounds": 4, "local_steps": 1, "learning_rate": 0.1},
        "privacy": {"epsilon": 1.0},
        "cohort": {"min_lenders": 5, "wait_for": NUM_LENDERS},
    }
)

WITHOUT_PRIVACY = PLAN.model_copy(update={"privacy": PrivacyPlan(mode="none")})
SHARED = PLAN.model_copy(update={"privacy": PrivacyPlan(mode="shared", epsilon=1.0, planned_colluders=1)})

Spoil = Callable[[str, Any], Any]
"""Changes the honest message for a lender, or returns None: it is not sent."""


def honest(_name: str, message: Message) -> Message:
    return message


@dataclass
class Sum:
    """One secure sum, its five exchanges step by step; every step may be spoilt, left out or done again."""

    job: "Coordinator"
    context: SumContext
    layout: Layout
    combiner: Combiner = field(init=False)
    adverts: dict[str, bytes] = field(default_factory=dict)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    confirmations: dict[str, bytes] = field(default_factory=dict)
    shares: list[tuple[str, str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        keys = self.job.roster.public_keys()
        known = replace(self.context, cohort=tuple(name for name in self.context.cohort if name in keys))
        # an honest coordinator's side, for the sums that are to succeed
        self.combiner = Combiner(known, keys, self.layout.size)

    @property
    def id(self) -> str:
        return self.context.digest().hex()

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for name in self.context.cohort if name in NAMES)

    def open(self, who: tuple[str, ...] | None = None) -> "Sum":
        request = Open(self.job.job_id, self.context.to_bytes().decode("ascii"))
        replies = self.job.ask("open", dict.fromkeys(who or self.members, request), Advertised)
        for name, reply in replies.items():
            self.adverts[name] = reply.advert
        return self

    def share(self, spoil: Spoil = honest, who: tuple[str, ...] | None = None) -> "Sum":
        request = ShareKeys(self.job.job_id, self.id, dict(self.adverts))
        replies = self.job.ask(
            "share", self._spoilt(who or tuple(self.adverts), lambda _: request, spoil), Shared
        )
        for name, reply in replies.items():
            self.sealed[name] = reply.sealed
        return self

    def mask(
        self, question: bytes, spoil: Spoil = honest, who: tuple[str, ...] | None = None
    ) -> dict[str, Masked]:
        def request(name: str) -> Mask:
            sealed = {sender: sent[name] for sender, sent in self.sealed.items() if sender != name}
            return Mask(self.job.job_id, self.id, sealed, np.frombuffer(question, np.uint8))

        replies = self.job.ask("mask", self._spoilt(who or tuple(self.sealed), request, spoil), Masked)
        for name, reply in replies.items():
            self.vectors[name] = unpack(reply.values.tobytes(), self.layout.size, self.layout.ring_bits)
        return replies

    def confirm(
        self,
        survivors: tuple[str, ...] | None = None,
        who: tuple[str, ...] | None = None,
        spoil: Spoil = honest,
    ) -> "Sum":
        among = tuple(sorted(survivors or self.vectors))
        request = Confirm(self.job.job_id, self.id, among, "")
        replies = self.job.ask("confirm", self._spoilt(who or among, lambda _: request, spoil), Confirmed)
        for name, reply in replies.items():
            self.confirmations[name] = reply.signature
        return self

    def unmask(
        self, confirmations: Mapping[str, bytes] | None = None, who: tuple[str, ...] | None = None
    ) -> "Sum":
        shown = dict(self.confirmations if confirmations is None else confirmations)
        request = Unmask(self.job.job_id, self.id, shown, {})
        replies = self.job.ask("unmask", dict.fromkeys(who or tuple(self.confirmations), request), Unmasked)
        for name, reply in replies.items():
            self.shares += [(name, owner, share) for owner, share in reply.shares.items()]
        return self

    def upto_mask(self) -> "Sum":
        return self.open().share()

    def whole(self, question: bytes) -> "Sum":
        self.upto_mask().mask(question)
        return self.confirm().unmask()

    def total(self, question: bytes) -> "np.ndarray[Any, Any]":
        """Return the sum that an honest coordinator makes of all that was told; raises where none can be made."""
        for name, advert in self.adverts.items():
            self.combiner.add_advert(name, advert)
        self.combiner.adverts()
        for name, sealed in self.sealed.items():
            self.combiner.add_sealed(name, sealed)
        self.combiner.ask(question)
        for name, vector in self.vectors.items():
            self.combiner.fold(name, vector)
        self.combiner.settle()
        told: dict[str, dict[str, bytes]] = {}
        for helper, owner, share in self.shares:
            told.setdefault(helper, {})[owner] = share
        for name, given in told.items():
            self.combiner.add_shares(name, given)
        return self.combiner.total()

    def told(self) -> dict[str, Any]:
        """Return what the coordinator holds: vectors, and for each owner how many right shares of either secret."""
        held: dict[str, dict[str, set[str]]] = {}
        for helper, owner, share in self.shares:
            for kind in (OWN_MASK, MASK_KEY):
                commitments = self.sealed[owner][helper]
                if is_committed(commitments, self.context.digest(), owner, helper, kind, share):
                    held.setdefault(owner, {OWN_MASK: set(), MASK_KEY: set()})[kind].add(helper)
        return {
            "stage": self.context.stage,
            "attempt": self.context.attempt,
            "threshold": threshold_of(self.context.num_lenders),
            "vectors": sorted(self.vectors),
            "shares": {owner: [len(kinds[OWN_MASK]), len(kinds[MASK_KEY])] for owner, kinds in held.items()},
        }

    def _spoilt(
        self, names: tuple[str, ...], request: Callable[[str], Message], spoil: Spoil
    ) -> dict[str, Message]:
        spoilt = {name: spoil(name, request(name)) for name in names}
        return {name: message for name, message in spoilt.items() if message is not None}


class Coordinator:
    """One job; keeps every refusal and every sum."""

    def __init__(
        self, exchange: Any, schema: Schema, chain: RosterChain, identity: CoordinatorIdentity, plan: JobPlan
    ) -> None:
        self.exchange, self.schema, self.chain, self.identity = exchange, schema, chain, identity
        self.federation, self.roster = identity.statement.federation, chain.last.roster()
        self.plan = plan
        self.job_id = f"attack-{secrets.token_hex(4)}"
        self.refusals: list[dict[str, str]] = []
        self.failures: dict[str, str] = {}
        self.sums: list[Sum] = []
        self.notes: dict[str, Any] = {}
        self.bins = bins_from_histogram(np.ones(histogram_size(schema)), schema, self.plan.model.max_bins)
        self.architecture = architecture_of(self.plan.model, schema, self.bins)

    def another(self) -> "Coordinator":
        """Return a second job of the same coordinator; what it is told is kept here."""
        other = Coordinator(self.exchange, self.schema, self.chain, self.identity, self.plan)
        other.refusals, other.sums, other.failures = self.refusals, self.sums, self.failures
        return other

    def ask(self, step: str, requests: Mapping[str, Message], expected: type[Message]) -> dict[str, Any]:
        answers = self.exchange.ask(requests, expected, deadline_s=DEADLINE_S)
        self.failures.update(answers.failures)
        given: dict[str, Any] = {}
        for name, reply in sorted(answers.replies.items()):
            if isinstance(reply, Refused):
                self.refusals.append(
                    {"lender": name, "step": step, "job": self.job_id, "reason": reply.reason}
                )
            else:
                given[name] = reply
        return given

    def propose(self, chain: RosterChain | None = None) -> "Coordinator":
        text = (chain or self.chain).to_json()
        request = Propose(self.job_id, self.plan.model_dump_json(), self.schema.fingerprint(), text)
        self.ask("propose", dict.fromkeys(NAMES, request), Accepted)
        return self

    def with_version(
        self, members: Mapping[str, RosterMember], signers: Mapping[str, LenderKeys], *, first: bool = False
    ) -> RosterChain:
        """Return the chain with a version more (or a first one), signed by the coordinator and its own inventions."""
        last = self.chain.last
        version = RosterVersion(
            federation=self.federation,
            number=1 if first else last.number + 1,
            previous="" if first else last.digest(),
            coordinator=self.identity.statement.key,
            members=dict(sorted(members.items())),
        )
        signatures = {name: sign_version(version, keys.identity) for name, keys in sorted(signers.items())}
        signed = SignedRoster(version, sign_version(version, self.identity.key), signatures)
        return RosterChain(self.chain.statement, (*(() if first else self.chain.versions), signed))

    def finish(self) -> None:
        request = Finish(self.job_id, "abandoned", 0, "", "", np.zeros(0, np.float32))
        self.ask("finish", dict.fromkeys(NAMES, request), Done)

    def sum(self, number: int = 1, cohort: tuple[str, ...] = NAMES, **changes: Any) -> Sum:
        """Return the sum of a round that nobody has opened; its context is right unless changed."""
        layout = self.layout(len(cohort))
        right = SumContext(
            federation=self.federation,
            job_id=self.job_id,
            plan=self.plan.digest(),
            stage=f"round {number}",
            attempt=0,
            cohort=tuple(sorted(cohort)),
            roster=roster_digest(self.roster.public_keys()),
            layout=layout.digest(),
            threshold=threshold_of(len(cohort)),
        )
        made = Sum(self, replace(right, **changes), layout)
        self.sums.append(made)
        return made

    def layout(self, num_lenders: int) -> Layout:
        """Return how a round's vector is laid out."""
        size = num_parameters(self.architecture)
        if self.plan.privacy.mode != "shared":
            return round_layout(self.plan, size, num_lenders)
        sums = shared_sums(
            self.plan,
            num_lenders=NUM_LENDERS,
            num_cells=histogram_size(self.schema),
            num_features=len(self.schema.features),
            num_parameters=largest_model(self.plan.model, self.schema),
        )
        noise = calibrate_shared(
            self.plan.privacy, sums, sample_rate=1.0, num_rounds=self.plan.training.rounds
        )
        return shares_layout(round_scheme(noise, sums, size, num_lenders))

    def question(self, number: int = 1, *, shift: float = 0.0) -> bytes:
        """Return the bytes of a round's question; `shift` moves one weight, which says how different the model is."""
        weights = initial_weights(self.architecture, self.plan.model.seed) + np.float32(1.0)
        weights[0] += shift
        fingerprint = model_fingerprint(self.schema.fingerprint(), self.bins.fingerprint(), self.architecture)
        return encode(
            Train(self.job_id, number, self.bins.to_json(), fingerprint, weights.astype(np.float32))
        )


# Keys and adverts


def swapped_keys(job: Coordinator) -> None:
    """Another lender's keys are replaced by the coordinator's own."""
    running = job.sum().open()
    forged = forged_advert(running, OTHER)

    def spoil(name: str, message: ShareKeys) -> ShareKeys:
        return message if name == OTHER else replace(message, adverts=message.adverts | {OTHER: forged})

    running.share(spoil).mask(job.question())


def swapped_own_keys(job: Coordinator) -> None:
    """A lender is shown other keys in its own name."""
    running = job.sum().open()
    forged = forged_advert(running, ME)
    running.share(
        lambda name, message: replace(message, adverts=message.adverts | {ME: forged}) if name == ME else None
    )


def unenrolled_in_the_cohort(job: Coordinator) -> None:
    """The cohort has a lender that nobody enrolled."""
    job.sum(cohort=(*NAMES, "invented")).open().share()


def unenrolled_advert(job: Coordinator) -> None:
    """A node outside the cohort brings keys."""
    running = job.sum().open()
    running.adverts["invented"] = forged_advert(running, "invented")
    running.share(who=NAMES)


def small_cohort(job: Coordinator) -> None:
    """Fewer lenders than their policy allows."""
    job.sum(cohort=NAMES[:4]).open().share()


def few_adverts(job: Coordinator) -> None:
    """A lender is shown four of six adverts."""
    running = job.sum().open()
    few = {name: running.adverts[name] for name in NAMES[:4]}
    running.share(lambda name, message: replace(message, adverts=few), who=(ME,))


def weak_threshold(job: Coordinator) -> None:
    """Three of six would do to open the sum."""
    job.sum(threshold=3).open().share()


# Shares, the model, the survivors


def altered_share(job: Coordinator) -> None:
    """One bit of a sealed share is another."""
    running = job.sum().upto_mask()

    def spoil(name: str, message: Mask) -> Mask:
        if name != ME:
            return message
        data = bytearray(message.sealed[OTHER])
        data[-1] ^= 1
        return replace(message, sealed=message.sealed | {OTHER: bytes(data)})

    running.mask(job.question(), spoil)
    note_that_nothing_is_summed(job, running)


def few_survivors(job: Coordinator) -> None:
    """Four of six are said to have answered."""
    running = job.sum().upto_mask()
    running.mask(job.question())
    running.confirm(NAMES[:4]).unmask(who=NAMES[:4])
    note_that_nothing_is_summed(job, running)


def split_survivor_sets(job: Coordinator) -> None:
    """Three lenders are told that all survived, two that one did not."""
    running = job.sum().upto_mask()
    running.mask(job.question())
    running.confirm(NAMES, who=NAMES[:3])
    running.confirm(WITHOUT_LAST, who=NAMES[3:5])
    running.unmask(who=WITHOUT_LAST)
    note_that_nothing_is_summed(job, running)


def both_secrets(job: Coordinator) -> None:
    """All survivors are confirmed; then the same lenders are to confirm that one had dropped out."""
    running = job.sum().upto_mask()
    running.mask(job.question())
    running.confirm()
    kept = dict(running.confirmations)
    running.confirm(WITHOUT_LAST, who=WITHOUT_LAST)
    running.confirmations = kept
    running.unmask(who=WITHOUT_LAST)
    note_that_nothing_is_summed(job, running)


def both_secrets_afterwards(job: Coordinator) -> None:
    """The sum is opened; then the other secret of one lender is asked for."""
    running = job.sum().whole(job.question())
    first = list(running.shares)
    running.confirm(WITHOUT_LAST, who=WITHOUT_LAST)
    running.unmask({name: running.confirmations[name] for name in WITHOUT_LAST}, who=WITHOUT_LAST)
    job.notes["shares told afterwards"] = sorted(
        {owner for given in running.shares if given not in first for owner in given[1:2]}
    )


def few_shares_of_the_noise(job: Coordinator) -> None:
    """In mode shared, one lender of six is lost where none was planned for: a sum with too little noise."""
    first = job.sum().upto_mask()
    first.mask(job.question(), lambda _, message: without(LAST, message), who=(ME,))
    second = job.sum(2).upto_mask()
    second.mask(job.question(2))
    second.confirm(WITHOUT_LAST).unmask(who=WITHOUT_LAST)
    note_that_nothing_is_summed(job, second)


def second_question(job: Coordinator) -> None:
    """A sum that was answered for one model is asked for another."""
    running = job.sum().upto_mask()
    running.mask(job.question(), who=(ME,))
    running.mask(job.question(shift=0.5), who=(ME,))


def second_question_without_privacy(job: Coordinator) -> None:
    """The same where nothing is charged."""
    second_question(job)


def different_model(job: Coordinator) -> None:
    """One lender is shown another model; its confirmation is shown with the others'."""
    running = shown_another_model(job)
    running.confirm().unmask()
    note_that_nothing_is_summed(job, running)


def different_model_hidden(job: Coordinator) -> None:
    """The same, and its confirmation is held back: the others open a sum in which its masks cancel nobody's."""
    running = shown_another_model(job)
    running.confirm()
    others = tuple(name for name in NAMES if name != ME)
    running.unmask({name: running.confirmations[name] for name in others}, who=NAMES)
    running.shares = [given for given in running.shares if given[0] != ME]
    job.notes["mean size in the ring"] = mean_size(running, job.question())


# Replay


def replay_across_rounds(job: Coordinator) -> None:
    """An advert, a sealed share and the confirmations of one round come again in later sums."""
    first = job.sum(1).whole(job.question(1))
    second = job.sum(2).open()
    old = first.adverts[OTHER]
    second.share(
        lambda name, message: (
            replace(message, adverts=message.adverts | {OTHER: old}) if name == ME else message
        )
    )
    third = job.sum(2, attempt=1).upto_mask()
    old = first.sealed[OTHER][ME]
    third.mask(
        job.question(2, shift=0.5),
        lambda name, message: replace(message, sealed=message.sealed | {OTHER: old}),
        who=(ME,),
    )
    fourth = job.sum(3).upto_mask()
    fourth.mask(job.question(3, shift=1.0))
    fourth.confirm().unmask(first.confirmations)
    note_that_nothing_is_summed(job, fourth)


def replay_across_jobs(job: Coordinator) -> None:
    """An advert of one job comes again in another, and so does the context."""
    first = job.sum().open()
    other = job.another().propose()
    second = other.sum().open()
    old = first.adverts[OTHER]
    second.share(
        lambda name, message: (
            replace(message, adverts=message.adverts | {OTHER: old}) if name == ME else message
        )
    )
    Sum(other, replace(first.context, attempt=1), first.layout).open()
    other.finish()


def opened_twice(job: Coordinator) -> None:
    """One attempt at a stage is opened for two cohorts."""
    job.sum().open()
    job.sum(cohort=WITHOUT_LAST).open()


# Differencing


def differencing_retry(job: Coordinator) -> None:
    """After a round with all, the same model is asked of all but one: the difference would be that one's vector."""
    lost_round(job, job.question())
    running = job.sum(attempt=1, cohort=WITHOUT_LAST).upto_mask()
    running.mask(job.question())


def differencing_retry_without_privacy(job: Coordinator) -> None:
    """The same where nothing is charged, and a retry with the identical cohort is allowed."""
    differencing_retry(job)
    job.sum(attempt=2).whole(job.question())


def differencing_survivors(job: Coordinator) -> None:
    """The identical cohort answers again, and one of them is said to have dropped out this time."""
    job.sum().whole(job.question())
    running = job.sum(attempt=1).upto_mask()
    running.mask(job.question())
    running.confirm(WITHOUT_LAST).unmask(who=WITHOUT_LAST)
    note_that_nothing_is_summed(job, running)


def differencing_nearly(job: Coordinator) -> None:
    """The same in the next round's name, with a model that differs in the eighth digit."""
    lost_round(job, job.question())
    running = job.sum(2, cohort=WITHOUT_LAST).upto_mask()
    running.mask(job.question(2, shift=1e-6))


def ordinary_dropout(job: Coordinator) -> None:
    """No attack: the next round has another model and one lender fewer."""
    job.sum().whole(job.question())
    running = job.sum(2, cohort=WITHOUT_LAST).whole(job.question(2, shift=0.05))
    job.notes["total"] = running.total(job.question(2, shift=0.05)).size


# Roster


def changed_roster(job: Coordinator) -> None:
    """A new job states other keys for one lender, the coordinator's own, which sign for it."""
    other, keys = job.another(), create_lender_keys()
    members = {**job.chain.last.members, OTHER: own_row(OTHER, keys)}
    other.propose(job.with_version(members, {OTHER: keys}))
    other.sum().open()


def invented_member(job: Coordinator) -> None:
    """A new job's roster has one member more, whom nobody but the coordinator and the member itself signed."""
    keys = create_lender_keys()
    members = {**job.chain.last.members, "invented": own_row("invented", keys)}
    job.another().propose(job.with_version(members, {"invented": keys}))


def invented_founders(job: Coordinator) -> None:
    """A new job's first version has one real lender, and invented ones for all the others."""
    invented = {name: create_lender_keys() for name in NAMES if name != ME}
    members = {name: own_row(name, keys) for name, keys in invented.items()} | {
        ME: job.chain.last.members[ME]
    }
    job.another().propose(job.with_version(members, invented, first=True))


def forgotten_version(job: Coordinator) -> None:
    """A new job's chain is cut back, or another one is signed in its place, by all but this lender's quorum."""
    first = job.chain.versions[0]
    silent = SignedRoster(first.version, first.coordinator_signature, {ME: first.signatures[ME]})
    job.another().propose(RosterChain(job.chain.statement, (silent,)))


def forged_coordinator(job: Coordinator) -> None:
    """Another key than the authority states signs the roster."""
    key = Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes_raw().hex()
    version = replace(job.chain.last, coordinator=raw)
    signed = SignedRoster(version, sign_version(version, key), {})
    job.another().propose(RosterChain(replace(job.chain.statement, key=raw), (signed,)))


def another_roster_in_the_context(job: Coordinator) -> None:
    """The job states the right roster, the sum another."""
    keys = job.roster.public_keys() | {OTHER: Ed25519PrivateKey.generate().public_key()}
    job.sum(roster=roster_digest(keys)).open()


def honest_round(job: Coordinator) -> None:
    """No attack: a round of all that is opened."""
    running = job.sum().whole(job.question())
    job.notes["mean size in the ring"] = mean_size(running, job.question())


ATTACKS: dict[str, Callable[[Coordinator], None]] = {
    attack.__name__: attack
    for attack in (
        *(swapped_keys, swapped_own_keys, unenrolled_in_the_cohort, unenrolled_advert, small_cohort),
        *(few_adverts, weak_threshold, altered_share, few_survivors, split_survivor_sets, both_secrets),
        few_shares_of_the_noise,
        *(both_secrets_afterwards, second_question, second_question_without_privacy, different_model),
        *(different_model_hidden, replay_across_rounds, replay_across_jobs, opened_twice, differencing_retry),
        *(differencing_retry_without_privacy, differencing_survivors, differencing_nearly),
        *(ordinary_dropout, changed_roster, invented_member, another_roster_in_the_context, honest_round),
        *(invented_founders, forgotten_version, forged_coordinator),
    )
}
NOT_PRIVATE = {
    "second_question_without_privacy",
    "differencing_retry_without_privacy",
    "differencing_survivors",
}


IN_SHARED = {"few_shares_of_the_noise"}


def run_attack(
    name: str, exchange: Any, schema: Schema, chain: RosterChain, identity: CoordinatorIdentity
) -> dict[str, Any]:
    """Run one attack as a job of its own; return all that the coordinator was told, as JSON."""
    plan = WITHOUT_PRIVACY if name in NOT_PRIVATE else SHARED if name in IN_SHARED else PLAN
    job = Coordinator(exchange, schema, chain, identity, plan)
    error = ""
    try:
        job.propose()
        ATTACKS[name](job)
    except (FedfinError, AssertionError, KeyError, ValueError, TypeError):
        error = traceback.format_exc()
    job.finish()
    return {
        "attack": name,
        "job": job.job_id,
        "refusals": job.refusals,
        "failures": job.failures,
        "sums": [running.told() for running in job.sums],
        "notes": job.notes,
        "error": error,
    }


def as_server_app(results: str) -> None:
    """Put the attacks in the place of the honest job's loop, in the process of a ServerApp.

    They run once all lenders are online; each one's result becomes a line of the file `results`.
    """
    from fedfin.server import rounds

    def run_attacks(
        exchange: Any,
        store: Any,
        job: Any,
        plan: Any,
        schema: Schema,
        *,
        identity: CoordinatorIdentity,
        **_: Any,
    ) -> None:
        while exchange.online() != frozenset(NAMES):
            time.sleep(0.1)
        signing = RosterSigning(exchange, RosterBook(store, identity), job.job_id, lambda _: None)
        while (chain := signing.chain()) is None:
            signing.ask(exchange.online())
            time.sleep(0.1)
        with Path(results).open("a") as out:
            for name in ATTACKS:
                out.write(json.dumps(run_attack(name, exchange, schema, chain, identity)) + "\n")
                out.flush()

    rounds.run_job = run_attacks  # type: ignore[assignment]


def mean_size(running: Sum, question: bytes) -> float:
    """Return how large the words of the unmasked sum are on average, as a share of the ring's largest."""
    size = 2 ** (running.layout.ring_bits - 1)
    words = running.total(question).astype(np.int64) % (2 * size)
    return float(np.abs(np.where(words >= size, words - 2 * size, words)).mean() / size)


def forged_advert(running: Sum, name: str) -> bytes:
    """Return keys of the coordinator's own making in a lender's name."""
    keys = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
    forged = Advert(keys[0], keys[1], secrets.token_bytes(32))
    return forged.signed(running.context.digest(), name, Ed25519PrivateKey.generate()).to_bytes()


def without(name: str, message: Mask) -> Mask:
    return replace(
        message, sealed={sender: data for sender, data in message.sealed.items() if sender != name}
    )


def shown_another_model(job: Coordinator) -> Sum:
    running = job.sum().upto_mask()
    crafted = np.frombuffer(job.question(shift=0.5), np.uint8)
    running.mask(
        job.question(), lambda name, message: replace(message, question=crafted) if name == ME else message
    )
    return running


def lost_round(job: Coordinator, question: bytes) -> None:
    """All lenders' masked vectors leave, and the coordinator says no more of that sum."""
    job.sum().upto_mask().mask(question)


def note_that_nothing_is_summed(job: Coordinator, running: Sum) -> None:
    """Note why the honest way from all that was told to a sum fails."""
    try:
        running.total(job.question())
        job.notes["summed"] = "yes"
    except (FedfinError, ProtocolRefusalError) as error:
        job.notes["summed"] = f"no: {error}"

"""A lender's side of one secure sum: it reveals its vector to nobody, whatever the coordinator sends.

The coordinator relays every message and may be malicious, together with fewer than n/3 of the lenders. What a lender
checks stands at each step; a check that fails raises `ProtocolRefusalError` with the rule's name, and from then on the
participant is dead: its secrets are forgotten and it answers nothing. So does every other failure in a step.

    open      keys made and signed for this sum                         advert
    share     all adverts checked; own secrets split, sealed per lender    sealed shares
    receive   shares checked, question and sharers bound                   (nothing leaves)
    mask      own and pairwise masks added                                 masked vector
    confirm   one survivor set signed                                      confirmation
    unmask    t confirmations of that set checked                          one share of each sharer, never both

One object serves one sum; it holds its secrets in memory only and can be neither copied nor pickled. Python cannot
overwrite them; to forget is to drop every reference. Each step is answered once: who must answer the same request
again keeps the answer.

Source: Bonawitz et al. 2017, figure 4 with the underlined steps (malicious server), on the complete graph.
"""

import secrets
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, NoReturn, final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.masks import Mask, add_masks
from fedfin.privacy.shamir import split
from fedfin.privacy.sum_context import MIN_LENDERS, SumContext, asked_digest, check_context
from fedfin.privacy.sum_keys import exchanged, own_mask, pair_mask, private_key
from fedfin.privacy.sum_messages import Advert, secret_commitment, sign_confirmation, verify_confirmation
from fedfin.privacy.sum_rules import refusal
from fedfin.privacy.sum_shares import Dealt, seal, share_commitments, unseal

__all__ = ["Participant"]

_STEPS: Final = ("open", "share", "receive", "mask", "confirm", "unmask")


@dataclass(slots=True, repr=False, eq=False)
class _Secrets:
    """What a participant must not tell; emptied as the steps need less of it."""

    identity: Ed25519PrivateKey
    channel_private: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    mask_private: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    own: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    keys: tuple[X25519PrivateKey, ...] = ()  # those of channel and masks, from open to share
    channels: dict[str, bytes] = field(default_factory=dict[str, bytes])  # exchanged, by peer
    pairs: dict[str, bytes] = field(default_factory=dict[str, bytes])  # exchanged, by peer
    held: dict[str, Dealt] = field(default_factory=dict[str, Dealt])
    masks: list[Mask] = field(default_factory=list[Mask])

    def empty(self) -> None:
        # a traceback may hold this object a while longer
        self.channel_private = self.mask_private = self.own = b""
        self.keys = ()
        for held in (self.channels, self.pairs, self.held):
            held.clear()
        self.masks.clear()


@final
class Participant:
    """One lender in one secure sum.

    Args:
        context: What the sum is about, as the coordinator sent it.
        name: This lender.
        identity: Its enrolled Ed25519 key.
        roster: The identity key of every member, as this lender pinned it.
        min_cohort: Fewest lenders of a sum that its policy allows; at least 3.

    Raises:
        PrivacyParameterError: `min_cohort` is below 3.
        ProtocolRefusalError: The context breaks a rule: `membership`, `roster`, `cohort_size`, `threshold`.
    """

    def __init__(
        self,
        context: SumContext,
        name: str,
        identity: Ed25519PrivateKey,
        roster: Mapping[str, Ed25519PublicKey],
        min_cohort: int,
    ) -> None:
        if min_cohort < MIN_LENDERS:
            msg = (
                f"the policy's min_cohort is {min_cohort}; a secure sum needs at least {MIN_LENDERS} lenders"
            )
            raise PrivacyParameterError(msg)
        check_context(context, name, identity.public_key(), roster, min_cohort)
        self._context = context
        self._digest = context.digest()
        self._name = name
        self._roster = {member: roster[member] for member in context.cohort}
        self._least = max(min_cohort, context.threshold)
        self._secrets: _Secrets | None = _Secrets(identity)
        self._num_done = 0
        self._lock = Lock()  # of two requests at the same time, one is the second
        self._advert = b""
        self._adverts: dict[str, bytes] = {}
        self._sharers: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._asked = b""
        self._confirmation = b""

    def __repr__(self) -> str:
        state = "ended" if self._secrets is None else f"{self._num_done} of {len(_STEPS)} steps"
        return f"Participant({self._name!r}, {self._context.stage!r}, {state})"

    def __reduce__(self) -> NoReturn:
        msg = "a participant cannot be pickled or copied: a copy could confirm two survivor sets"
        raise TypeError(msg)

    def open(self) -> bytes:
        """Return the advert: fresh public keys, signed for this sum.

        Raises:
            ProtocolRefusalError: The step was done already, or the sum has ended (rules `once`, `ended`).
        """
        with self._step("open") as own:
            own.keys = private_key(own.channel_private), private_key(own.mask_private)
            channel_key, mask_key = (key.public_key().public_bytes_raw() for key in own.keys)
            self._advert = (
                Advert(channel_key, mask_key, secret_commitment(self._digest, self._name, own.own))
                .signed(self._digest, self._name, own.identity)
                .to_bytes()
            )
            return self._advert

    def share(self, adverts: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return this lender's secrets in shares, sealed for each lender that opened the sum.

        Args:
            adverts: Everybody's advert, this lender's own among them, by name.

        Returns:
            Sealed share by receiver; for this lender itself the commitments to its own shares only.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `ended`, `unenrolled`, `own_advert`, `too_few_adverts`,
                `malformed`, `repeated_keys`, `advert_signature`, `weak_key`.
        """
        with self._step("share") as own:
            if not set(adverts) <= set(self._context.cohort):
                raise refusal("unenrolled", "an advert is from outside the cohort")
            if adverts.get(self._name) != self._advert:
                raise refusal("own_advert", f"the advert of {self._name} was altered or left out")
            if len(adverts) < self._least:
                raise refusal("too_few_adverts", f"{len(adverts)} lenders opened the sum, not {self._least}")
            self._exchange(own, {name: Advert.from_bytes(adverts[name]) for name in sorted(adverts)})
            self._adverts = dict(adverts)
            size, threshold = self._context.num_lenders, self._context.threshold
            pairs = zip(
                split(own.own, threshold, size), split(own.mask_private, threshold, size), strict=True
            )
            own.mask_private = own.channel_private = b""
            own.keys = ()
            return {
                name: self._dealt(own, name, pair)
                for name, pair in zip(self._context.cohort, pairs, strict=True)
                if name in adverts
            }

    def receive(self, sealed: Mapping[str, bytes], question: bytes) -> frozenset[str]:
        """Check the others' shares, bind the question, and return who is in the sum; nothing leaves.

        Args:
            sealed: The sealed share of every other sharer for this lender, by sender.
            question: The bytes of the message that is to be answered, with the model in it.

        Returns:
            The sharers, this lender among them: those whose masks are in its vector.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `ended`, `unenrolled`, `too_few_sharers`, `malformed`,
                `sealed_share`, `share_commitment`.
        """
        with self._step("receive") as own:
            if not set(sealed) <= set(self._adverts) - {self._name}:
                raise refusal("unenrolled", "a sealed share is from a lender that did not open the sum")
            self._sharers = frozenset(sealed) | {self._name}
            if len(self._sharers) < self._least:
                raise refusal("too_few_sharers", f"{len(self._sharers)} lenders shared, not {self._least}")
            for sender, data in sealed.items():
                own.held[sender] = unseal(data, own.channels[sender], self._digest, sender, self._name)
            self._asked = asked_digest(
                self._digest, question, {name: self._adverts[name] for name in self._sharers}
            )
            own.masks = [own_mask(own.own, self._asked, self._name)]
            own.masks += [pair_mask(own.pairs[peer], self._asked, self._name, peer) for peer in sealed]
            own.channels, own.pairs, own.own = {}, {}, b""
            return self._sharers

    def mask(self, values: NDArray[np.uint32], threads: int = 1) -> NDArray[np.uint32]:
        """Return the vector that may leave: the values with every mask added, modulo 2**32.

        Args:
            values: Shape (m,), contiguous and writeable; changed in place and returned.
            threads: Slices that are worked on at the same time; >= 1.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `ended`.
            ValueError: `values` is not such an array: a bug of the caller's.
        """
        with self._step("mask") as own:
            if values.dtype != np.uint32 or values.ndim != 1 or not values.flags.carray:
                msg = f"a {values.ndim}-dimensional array of {values.dtype} cannot be masked in place"
                raise ValueError(msg)
            add_masks(values, own.masks, threads)
            own.masks.clear()
            return values

    def confirm(self, survivors: Collection[str], min_survivors: int = 0) -> bytes:
        """Return this lender's signature over the one survivor set that it will ever confirm.

        Args:
            survivors: Whose masked vectors arrived, as the coordinator says.
            min_survivors: Fewest that the planned noise needs, in mode `shared`; 0 where it does not matter.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `ended`, `malformed`, `survivor_set`, `too_few_survivors`.
        """
        with self._step("confirm") as own:
            self._survivors = frozenset(survivors)
            if len(self._survivors) != len(survivors):
                raise refusal("malformed", "a survivor is named twice")
            if self._name not in self._survivors or not self._survivors <= self._sharers:
                raise refusal(
                    "survivor_set", f"the survivors leave out {self._name}, or hold one who did not share"
                )
            least = max(self._least, min_survivors)
            if len(self._survivors) < least:
                raise refusal("too_few_survivors", f"{len(self._survivors)} lenders survived, not {least}")
            self._confirmation = sign_confirmation(self._asked, self._survivors, own.identity)
            return self._confirmation

    def unmask(self, confirmations: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return one share of every sharer, and forget everything.

        Args:
            confirmations: Signatures over the survivor set, by survivor; at least the threshold.

        Returns:
            Share by owner: of the own mask's secret for a survivor, of the mask key for a lender that dropped out.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `ended`, `malformed`, `confirmation`,
                `too_few_confirmations`.
        """
        with self._step("unmask") as own:
            if not set(confirmations) <= self._survivors:
                raise refusal("confirmation", "a confirmation is not from a survivor")
            if len(confirmations) < self._context.threshold:
                what = f"{len(confirmations)} lenders confirmed, not {self._context.threshold}"
                raise refusal("too_few_confirmations", what)
            for name, confirmation in confirmations.items():
                if name == self._name and confirmation == self._confirmation:
                    continue  # made here, over these survivors
                verify_confirmation(self._asked, self._survivors, name, self._roster[name], confirmation)
            # one or the other: both together would open a lender's vector
            released = {owner: pair[owner not in self._survivors] for owner, pair in own.held.items()}
            self.forget()
            return released

    def forget(self) -> None:
        """Drop every secret; nothing is answered any more. May be called at any time, and again."""
        if self._secrets is not None:
            self._secrets.empty()
        self._secrets = None

    @contextmanager
    def _step(self, step: str) -> Generator[_Secrets]:
        """Run a step in its turn; whatever fails in it ends the sum here."""
        with self._lock:
            try:
                yield self._in_turn(step)
            except BaseException:
                self.forget()
                raise
            self._num_done += 1

    def _in_turn(self, step: str) -> _Secrets:
        turn, finished = _STEPS.index(step), self._num_done == len(_STEPS)
        if self._secrets is None and not finished:
            raise refusal("ended", f"{self._name} was asked to {step}, but this sum has ended here")
        if self._secrets is None or turn < self._num_done:
            raise refusal("once", f"{self._name} was asked to {step} a second time")
        if turn > self._num_done:
            raise refusal("order", f"{self._name} was asked to {step} before {_STEPS[self._num_done]}")
        return self._secrets

    def _dealt(self, own: _Secrets, receiver: str, pair: Dealt) -> bytes:
        if receiver == self._name:
            own.held[receiver] = pair
            return share_commitments(self._digest, self._name, receiver, pair)
        return seal(pair, own.channels[receiver], self._digest, self._name, receiver)

    def _exchange(self, own: _Secrets, adverts: Mapping[str, Advert]) -> None:
        keys = [key for advert in adverts.values() for key in (advert.channel_key, advert.mask_key)]
        if len(set(keys)) != len(keys):
            raise refusal("repeated_keys", "two keys in the adverts are equal")
        channel_private, mask_private = own.keys
        for name, advert in adverts.items():
            if name != self._name:
                advert.verify(self._digest, name, self._roster[name])
                own.channels[name] = exchanged(channel_private, advert.channel_key, name)
                own.pairs[name] = exchanged(mask_private, advert.mask_key, name)

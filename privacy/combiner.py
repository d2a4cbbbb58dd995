"""The coordinator's side of one secure sum: it relays, folds masked vectors as they arrive, and unmasks the sum only.

Nothing here is trusted by a lender. What is checked is checked so that one lender's bad contribution does not spoil
the sum: every `add_` raises `ProtocolRefusalError`, changes nothing, and the caller goes on without that lender.

    add_advert, adverts                      who opened
    add_sealed, sealed_for, ask              who shared: the sum is over these or fewer
    fold, settle                             who survived: their vectors are in the one accumulator
    add_confirmation, confirmations          they agree on that
    add_shares, total                        own masks of survivors, pairwise masks of the dropped, taken off

Each share that comes back is checked against its owner's commitment, so a helper that lies is found at once, and its
other shares are used as they are: however many lie, t right shares of each owner suffice, and no search is needed. A
sharer whose shares lie on no polynomial of its advert's secret makes the sum abort, and learns nothing. It is at fault
itself: who gives its shares back cannot alter what it committed to. All such are named, for later sums without them.
"""

from collections.abc import Container, Mapping, Sized

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fedfin.errors import RoundAbortedError
from fedfin.privacy.masks import Mask, add_masks
from fedfin.privacy.shamir import combine, is_share
from fedfin.privacy.sum_context import SumContext, asked_digest
from fedfin.privacy.sum_keys import check_public, exchanged, own_mask, pair_mask, private_key
from fedfin.privacy.sum_messages import Advert, secret_commitment, verify_confirmation
from fedfin.privacy.sum_rules import refusal
from fedfin.privacy.sum_shares import COMMITMENTS_BYTES, MASK_KEY, OWN_MASK, SEALED_BYTES, is_committed

__all__ = ["Combiner"]


class Combiner:
    """The coordinator in one secure sum.

    Args:
        context: What the sum is about.
        roster: Identity key of every member, the cohort among them.
        size: Length of the vectors, m.

    Raises:
        ProtocolRefusalError: A lender of the cohort is not in the roster (rule `roster`).
    """

    def __init__(self, context: SumContext, roster: Mapping[str, Ed25519PublicKey], size: int) -> None:
        if not set(context.cohort) <= set(roster):
            raise refusal("roster", "the cohort has a lender that is not in the roster")
        self._context = context
        self._digest = context.digest()
        self._roster = {name: roster[name] for name in context.cohort}
        self._size = size
        self._adverts: dict[str, Advert] = {}
        self._sharers: dict[str, None] = {}  # in the order in which they shared
        self._sealed: dict[str, dict[str, bytes]] = {}  # by receiver, then sender
        self._sum: NDArray[np.uint32] | None = None
        self._folded: set[str] = set()
        self._confirmations: dict[str, bytes] = {}
        self._shares: dict[str, dict[int, bytes]] = {}  # right ones only: by owner, then point
        self._helpers: set[str] = set()
        self._liars: set[str] = set()
        self._false_dealers: set[str] = set()
        self._opened = self._shared = self._settled = self._finished = False
        self._asked = b""

    def __repr__(self) -> str:
        return (
            f"Combiner({self._context.stage!r}, {len(self._folded)} of {self._context.num_lenders} vectors)"
        )

    @property
    def sharers(self) -> frozenset[str]:
        """Who shared so far."""
        return frozenset(self._sharers)

    @property
    def survivors(self) -> frozenset[str]:
        """Whose vectors are folded so far; final once settled."""
        return frozenset(self._folded)

    @property
    def liars(self) -> tuple[str, ...]:
        """Helpers that gave back another share than they were handed, sorted; the sum is right without it."""
        return tuple(sorted(self._liars))

    @property
    def false_dealers(self) -> tuple[str, ...]:
        """Sharers whose own committed shares give no secret of their advert, sorted; known after `total`."""
        return tuple(sorted(self._false_dealers))

    def add_advert(self, name: str, advert: bytes) -> None:
        """Take a lender's advert.

        Raises:
            ProtocolRefusalError: Rules `order`, `unenrolled`, `once`, `malformed`, `repeated_keys`, `weak_key`,
                `advert_signature`.
        """
        _in_turn(not self._opened, name, "advert")
        if name not in self._roster:
            raise refusal("unenrolled", f"{name} is not in the cohort")
        _only_once(name, self._adverts, "advert")
        parsed = Advert.from_bytes(advert)
        taken = {key for other in self._adverts.values() for key in (other.channel_key, other.mask_key)}
        if parsed.channel_key == parsed.mask_key or not taken.isdisjoint(
            (parsed.channel_key, parsed.mask_key)
        ):
            raise refusal("repeated_keys", f"{name} uses a key that is in use")
        for key in (parsed.channel_key, parsed.mask_key):
            check_public(key, name)
        parsed.verify(self._digest, name, self._roster[name])
        self._adverts[name] = parsed

    def adverts(self) -> dict[str, bytes]:
        """Return the adverts for everyone who opened; no more are taken.

        Raises:
            RoundAbortedError: Fewer than the threshold opened.
        """
        self._check_enough(self._adverts, "opened")
        self._opened = True
        return {name: advert.to_bytes() for name, advert in self._adverts.items()}

    def add_sealed(self, name: str, sealed: Mapping[str, bytes]) -> None:
        """Take a lender's sealed shares, one for each lender that opened.

        Raises:
            ProtocolRefusalError: Rules `order`, `unenrolled`, `once`, `malformed`.
        """
        _in_turn(self._opened and not self._shared, name, "shares")
        if name not in self._adverts:
            raise refusal("unenrolled", f"{name} did not open the sum")
        _only_once(name, self._sharers, "shares")
        sizes = dict.fromkeys(self._adverts, SEALED_BYTES) | {name: COMMITMENTS_BYTES}
        if {receiver: len(data) for receiver, data in sealed.items()} != sizes:
            raise refusal("malformed", f"{name} did not send one sealed share to each lender that opened")
        self._sharers[name] = None
        for receiver, data in sealed.items():
            self._sealed.setdefault(receiver, {})[name] = data

    def sealed_for(self, name: str) -> dict[str, bytes]:
        """Return the sealed shares of every other sharer for a sharer, by sender; no more sharers are taken.

        Raises:
            ProtocolRefusalError: The lender did not share itself (rule `unenrolled`).
            RoundAbortedError: Fewer than the threshold shared.
        """
        self._close_sharing()
        if name not in self._sharers:
            raise refusal("unenrolled", f"{name} did not share")
        return {sender: data for sender, data in self._sealed[name].items() if sender != name}

    def ask(self, question: bytes) -> None:
        """Bind the question that every sharer is asked; once, before the first vector.

        Raises:
            ProtocolRefusalError: A question was bound already (rule `once`).
            RoundAbortedError: Fewer than the threshold shared.
        """
        self._close_sharing()
        if self._asked:
            raise refusal("once", "one question is asked in a sum")
        adverts = {name: self._adverts[name].to_bytes() for name in self._sharers}
        self._asked = asked_digest(self._digest, question, adverts)

    def fold(self, name: str, values: NDArray[np.uint32]) -> None:
        """Add a masked vector to the accumulator; the array is not kept.

        Args:
            name: Whose it is.
            values: Shape (m,).

        Raises:
            ProtocolRefusalError: Rules `order`, `vector`.
        """
        _in_turn(bool(self._asked) and not self._settled, name, "vector")
        if name not in self._sharers or name in self._folded:
            raise refusal("vector", f"a vector of {name} is not awaited, or has arrived")
        if values.dtype != np.uint32 or values.shape != (self._size,):
            raise refusal("vector", f"the vector of {name} has shape {values.shape}, not ({self._size},)")
        if self._sum is None:
            self._sum = values.copy()
        else:
            np.add(self._sum, values, out=self._sum)
        self._folded.add(name)

    def settle(self) -> frozenset[str]:
        """Return the survivors, now final: a vector that comes later is refused.

        Raises:
            RoundAbortedError: Fewer than the threshold sent a vector.
        """
        self._check_enough(self._folded, "sent a masked vector")
        self._settled = True
        return self.survivors

    def add_confirmation(self, name: str, confirmation: bytes) -> None:
        """Take a survivor's signature over the survivors.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `malformed`, `confirmation`.
        """
        _in_turn(self._settled, name, "confirmation")
        if name not in self._folded:
            raise refusal("confirmation", f"{name} is not a survivor")
        _only_once(name, self._confirmations, "confirmation")
        verify_confirmation(self._asked, self.survivors, name, self._roster[name], confirmation)
        self._confirmations[name] = confirmation

    def confirmations(self) -> dict[str, bytes]:
        """Return as many confirmations as lenders ask to see, the threshold's number, by name.

        Raises:
            RoundAbortedError: Fewer arrived.
        """
        self._check_enough(self._confirmations, "confirmed the survivors")
        return {
            name: self._confirmations[name] for name in sorted(self._confirmations)[: self._context.threshold]
        }

    def add_shares(self, name: str, shares: Mapping[str, bytes]) -> None:
        """Take the shares that a survivor gives back, one of each sharer.

        Shares that are right are kept even where the same helper's others are not.

        Raises:
            ProtocolRefusalError: Rules `order`, `once`, `malformed`, and `lying_helper` where a share is not the one
                that its owner committed to.
        """
        _in_turn(self._settled, name, "shares")
        if name not in self._folded:
            raise refusal("unenrolled", f"{name} is not a survivor")
        _only_once(name, self._helpers, "shares")
        if shares.keys() != self._sharers.keys() or not all(map(is_share, shares.values())):
            raise refusal("malformed", f"{name} did not give back one share of each sharer")
        self._helpers.add(name)
        point = self._context.index_of(name)
        right = [owner for owner, share in shares.items() if self._is_right(owner, name, share)]
        for owner in right:
            self._shares.setdefault(owner, {})[point] = shares[owner]
        if len(right) < len(shares):
            self._liars.add(name)
            wrong = ", ".join(sorted(set(shares) - set(right)))
            raise refusal("lying_helper", f"{name} gave back wrong shares of {wrong}")

    def total(self, threads: int = 1) -> NDArray[np.uint32]:
        """Return the sum of the survivors' vectors modulo 2**32, shape (m,); the shares are forgotten.

        Args:
            threads: Slices that are worked on at the same time; >= 1.

        Raises:
            RoundAbortedError: Fewer than the threshold's right shares of some sharer are here (more may still be
                added), or a sharer's shares do not give the secret of its advert (`false_dealers`).
        """
        if self._sum is None or not self._settled:
            msg = "the sum has no survivors yet"
            raise RoundAbortedError(msg)
        if not self._finished:
            secrets = self._recovered()
            left_over = [mask for owner, secret in secrets.items() for mask in self._left_over(owner, secret)]
            add_masks(self._sum, left_over, threads)
            self._finished = True
            self._shares = {}
        return self._sum

    def _left_over(self, owner: str, secret: bytes) -> list[Mask]:
        """Return what takes the owner's masks off the sum."""
        if owner in self._folded:
            return [own_mask(secret, self._asked, owner).undone()]
        key = private_key(secret)
        pairs = {peer: exchanged(key, self._adverts[peer].mask_key, peer) for peer in self._folded}
        return [pair_mask(pair, self._asked, peer, owner).undone() for peer, pair in pairs.items()]

    def _recovered(self) -> dict[str, bytes]:
        """Return each sharer's secret: of its own mask where it survived, of its mask key where it dropped out.

        All are looked at before the sum aborts, so that every dealer at fault is known after one sum.
        """
        secrets: dict[str, bytes] = {}
        for owner in self._sharers:
            shares = self._shares.get(owner, {})
            points = sorted(shares)[: self._context.threshold]
            if len(points) < self._context.threshold:
                continue
            secret = combine({point: shares[point] for point in points})
            if secret is not None and self._is_advertised(owner, secret):
                secrets[owner] = secret
            else:
                self._false_dealers.add(owner)
        if self._false_dealers:
            names = ", ".join(self.false_dealers)
            msg = (
                f"the shares that {names} handed out give no secret of the advert; try again without {names}"
            )
            raise RoundAbortedError(msg)
        for owner in self._sharers:
            self._check_enough(self._shares.get(owner, {}), f"gave back a right share of {owner}")
        return secrets

    def _is_advertised(self, owner: str, secret: bytes) -> bool:
        advert = self._adverts[owner]
        if owner in self._folded:
            return secret_commitment(self._digest, owner, secret) == advert.commitment
        return private_key(secret).public_key().public_bytes_raw() == advert.mask_key

    def _is_right(self, owner: str, holder: str, share: bytes) -> bool:
        kind = OWN_MASK if owner in self._folded else MASK_KEY
        return is_committed(self._sealed[holder][owner], self._digest, owner, holder, kind, share)

    def _close_sharing(self) -> None:
        self._check_enough(self._sharers, "shared")
        self._shared = True

    def _check_enough(self, those: Sized, what: str) -> None:
        if len(those) < self._context.threshold:
            msg = (
                f"secure sum {self._context.stage!r}, attempt {self._context.attempt}: {len(those)} lenders {what}, and"
                f" {self._context.threshold} of {self._context.num_lenders} must; nothing was unmasked"
            )
            raise RoundAbortedError(msg)


def _in_turn(is_turn: bool, name: str, what: str) -> None:  # noqa: FBT001  (private, always by the same form)
    if not is_turn:
        raise refusal("order", f"{what} of {name} came too early or too late")


def _only_once(name: str, taken: Container[str], what: str) -> None:
    if name in taken:
        raise refusal("once", f"{what} of {name} came a second time")

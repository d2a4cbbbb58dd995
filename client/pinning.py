"""The version of the roster that a lender goes by: pinned, and followed only by versions that a quorum signed.

Without it a coordinator could hand a lender keys of its own making for every other member, and read all sums. A version
is taken when its chain holds and has in it the version that this lender pinned last, or one that its engineer approved.

In the lender's folder `roster.json` is the pinned version with its signatures, `roster.proposed.json` the chain of the
last one that was shown, `roster.approved.json` the signatures that the engineer's approvals allow to give.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedfin.audit import events
from fedfin.client.folder import LenderFolder
from fedfin.client.sum_rules import refusal
from fedfin.coordinator_key import CoordinatorStatement
from fedfin.errors import ConfigError, LinkError, NotYetError
from fedfin.files import write_public
from fedfin.identity import LenderKeys, key_fingerprint
from fedfin.roster import Roster
from fedfin.roster_chain import RosterChain, SignedRoster
from fedfin.roster_versions import RosterMember, RosterVersion, changes_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Change",
    "accept_chain",
    "approvals",
    "check_coordinator",
    "own_row",
    "pending",
    "pinned",
    "show_roster",
]


@dataclass(frozen=True, slots=True)
class Change:
    """A version that was shown to this lender, beside the pinned one.

    Attributes:
        pinned: What this lender goes by; None before the first.
        chain: The proposed version at its end, and those before it.
        signature: The lender's over it, hex, where its engineer approved it; else empty.
    """

    pinned: RosterVersion | None
    chain: RosterChain
    signature: str = field(default="", repr=False)

    @property
    def proposed(self) -> RosterVersion:
        """The version that was shown."""
        return self.chain.last

    @property
    def added(self) -> tuple[str, ...]:
        """Members of the proposed version only."""
        return changes_of(self.pinned, self.proposed).added

    @property
    def removed(self) -> tuple[str, ...]:
        """Members of the pinned version only."""
        return changes_of(self.pinned, self.proposed).removed

    @property
    def changed(self) -> tuple[str, ...]:
        """Members of both, with other keys in each."""
        changes = changes_of(self.pinned, self.proposed)
        return tuple(sorted((*changes.rotated, *changes.replaced)))

    def to_json(self) -> dict[str, Any]:
        """Return the change for `fedfin client approve-roster` and `status`: names and fingerprints."""
        before = {} if self.pinned is None else _fingerprints(self.pinned)
        after = _fingerprints(self.proposed)
        missing = self.chain.missing()
        return {
            "number": self.proposed.number,
            "digest": self.proposed.digest(),
            "members": after,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": {name: {"before": before[name], "now": after[name]} for name in self.changed},
            "signed_by": sorted(self.chain.versions[-1].signatures),
            "waits_for": list(missing.names),
            "approved": bool(self.signature),
        }


def accept_chain(folder: LenderFolder, text: str, own: RosterMember) -> RosterChain:
    """Return the chain of a proposal if this lender can go by its last version, which is pinned then.

    Args:
        folder: The lender's.
        text: The chain's JSON, from the coordinator.
        own: This lender's row, with the keys that it holds.

    Raises:
        LinkError: The text is no chain.
        ProtocolRefusalError: The chain does not hold (rules of `RosterChain.verify`), this lender is not in its last
            version with its own keys (`membership`), or it lacks the pinned version, or any that was approved
            (`roster_changed`).
        ConfigError: The pinned version is damaged, or a file cannot be written.
    """
    chain = _checked(folder, text, own, complete=True)
    before = pinned(folder)
    if before is None and not any(signed.version.digest() in approvals(folder) for signed in chain.versions):
        _propose(folder, chain)
        what = (
            f"this lender goes by no version of the roster yet, and its engineer approved none of this chain; look at"
            f" version {chain.last.number} and approve it with `fedfin client approve-roster`"
        )
        raise refusal("roster_changed", what)
    if before != chain.last:
        _pin(folder, chain, before)
    return chain


def show_roster(folder: LenderFolder, text: str, own: RosterMember) -> str:
    """Return this lender's signature over the last version of a chain, hex, if its engineer approved it.

    Args:
        folder: The lender's.
        text: The chain's JSON; its last version may lack signatures.
        own: This lender's row, with the keys that it holds.

    Raises:
        NotYetError: It waits for the engineer, for whom it is kept.
        LinkError: As `accept_chain`, as are `ProtocolRefusalError` and `ConfigError`.
    """
    chain = _checked(folder, text, own, complete=False)
    _propose(folder, chain)
    signature = approvals(folder).get(chain.last.digest())
    if signature is None:
        what = (
            f"version {chain.last.number} of the roster ({chain.last.digest()[:12]}, {len(chain.last.members)} members)"
            " waits for this lender's engineer: `fedfin client approve-roster`"
        )
        raise NotYetError("approval", what)
    return signature


def pinned(folder: LenderFolder) -> RosterVersion | None:
    """Return the pinned version, or None before the first.

    Raises:
        ConfigError: The file is damaged.
    """
    text = _read(folder.roster_path)
    if text is None or _is_unsigned(text):
        return None
    try:
        return SignedRoster.from_document(json.loads(text)).version
    except (ValueError, RecursionError, LinkError) as error:
        raise _damaged(folder.roster_path, error) from error


def pending(folder: LenderFolder) -> Change | None:
    """Return the version that was shown and is not pinned, or None; errors as `pinned`."""
    text, before = _read(folder.proposed_roster_path), pinned(folder)
    if text is None or _is_unsigned(text):
        return None
    try:
        chain = RosterChain.from_json(text)
    except LinkError as error:
        raise _damaged(folder.proposed_roster_path, error) from error
    if before is not None and chain.last.number <= before.number:
        return None
    return Change(before, chain, approvals(folder).get(chain.last.digest(), ""))


def approvals(folder: LenderFolder) -> dict[str, str]:
    """Return the signatures that the engineer's approvals allow to give, hex, by the version's digest.

    Raises:
        ConfigError: The file is damaged.
    """
    text = _read(folder.approved_roster_path)
    try:
        found = {} if text is None else json.loads(text)
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            msg = "it holds something else"
            raise ValueError(msg)  # noqa: TRY301  (one kind of damage)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder.approved_roster_path, error) from error
    return found


def own_row(name: str, keys: LenderKeys) -> RosterMember:
    """Return the row that a lender with these keys has in the roster."""
    return RosterMember(
        name,
        keys.identity.public_key().public_bytes_raw().hex(),
        keys.witness.public_key().public_bytes_raw().hex(),
        key_fingerprint(keys.node.public_key()),
        key_fingerprint(keys.tls.public_key()),
    )


def check_coordinator(folder: LenderFolder, statement: CoordinatorStatement) -> None:
    """Hold the coordinator's key against the pinned one; pin it in a folder that has none yet.

    Raises:
        ProtocolRefusalError: It is another key, or the federation's authority did not state it (`coordinator_key`).
        ConfigError: A file is damaged or cannot be written.
    """
    own = folder.coordinator()
    if own is not None and own.key == statement.key:
        return
    statement.verify(folder.root(), folder.config.federation)
    if own is not None:
        what = (
            f"the coordinator states another identity key ({statement.fingerprint[:32]}) than the pinned one"
            f" ({own.fingerprint[:32]}); ask its operator, on another way, whether it has a new one"
        )
        raise refusal("coordinator_key", what)
    write_public(folder.statement_path, statement.to_json().encode())


def _checked(folder: LenderFolder, text: str, own: RosterMember, *, complete: bool) -> RosterChain:
    """Return a chain that holds, follows on the pinned version, and has this lender's own row at its end."""
    chain = RosterChain.from_json(text)
    if chain.last.members.get(own.name) != own:
        seen = "is not in it" if own.name not in chain.last.members else "is in it with other keys"
        what = f"version {chain.last.number} of the roster is not one that this lender can go by: {own.name} {seen}"
        raise refusal("membership", what)
    check_coordinator(folder, chain.statement)
    chain.verify(folder.root(), folder.config.federation, complete=complete)
    before = pinned(folder)
    known = _logged(folder) if before is None else (before.number, before.digest())
    if known is not None:
        number, digest = known
        if number > len(chain.versions) or chain.versions[number - 1].version.digest() != digest:
            what = (
                f"the coordinator's chain of rosters does not have version {number} in it as this lender pinned it"
                f" ({digest[:12]}): it shows different rosters to different members; ask the others which they have"
            )
            raise refusal("roster_changed", what)
    return chain


def _logged(folder: LenderFolder) -> tuple[int, str] | None:
    """Return number and digest of the version that was pinned last by the log: roster.json may have been lost."""
    if not folder.journal.path.exists():
        return None
    log = folder.journal.log
    for index in reversed(range(log.size)):
        entry = log.entry(index)
        event = None if entry is None else entry.event
        if isinstance(event, events.RosterVersion) and event.action == "pinned":
            return event.number, event.digest
    return None


def _pin(folder: LenderFolder, chain: RosterChain, before: RosterVersion | None) -> None:
    signed, version, changes = chain.versions[-1], chain.last, changes_of(before, chain.last)
    write_public(folder.roster_path, _text(signed.to_document()))
    folder.journal.note(
        events.RosterVersion(
            action="pinned",
            number=version.number,
            digest=version.digest(),
            previous=version.previous or None,
            num_members=len(version.members),
            signed_by=tuple(signed.signatures),
            added=changes.added,
            removed=changes.removed,
            changed=tuple(sorted((*changes.rotated, *changes.replaced))),
        )
    )
    if pending(folder) is None:
        folder.proposed_roster_path.unlink(missing_ok=True)


def _propose(folder: LenderFolder, chain: RosterChain) -> None:
    """Keep a chain for the engineer to look at."""
    text, version = chain.to_json(), chain.last
    kept = _read(folder.proposed_roster_path)
    if kept == text:
        return
    write_public(folder.proposed_roster_path, text.encode())
    changes = changes_of(pinned(folder), version)
    if _last_of(kept) != version:  # not once more for each signature
        folder.journal.note(
            events.RosterVersion(
                action="proposed",
                number=version.number,
                digest=version.digest(),
                previous=version.previous or None,
                num_members=len(version.members),
                added=changes.added,
                removed=changes.removed,
                changed=tuple(sorted((*changes.rotated, *changes.replaced))),
            )
        )


def _last_of(text: str | None) -> RosterVersion | None:
    try:
        return None if text is None else RosterChain.from_json(text).last
    except LinkError:
        return None  # what cannot be read is replaced: nothing rests on what was only shown


def _fingerprints(version: RosterVersion) -> dict[str, str]:
    return {name: member.fingerprint for name, member in version.members.items()}


def _text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _read(path: "Path") -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _is_unsigned(text: str) -> bool:
    """Whether it is a roster of a release whose rosters nobody signed: it vouches for nothing."""
    try:
        Roster.from_json(text)
    except LinkError:
        return False
    return True


def _damaged(path: "Path", error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} is damaged ({error}); restore it from the backup. Without it this lender cannot tell whose keys it"
        " went by: nothing leaves in a secure sum"
    )

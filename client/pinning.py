"""The roster that a lender pins: the first one it sees, and no other until its engineer approves it.

Without it a coordinator could hand a lender keys of its own making for every other member, and read all sums. A pinned
roster does not tell an invented lender from a real one: the engineer compares fingerprints with the other members.

`roster.json` in the lender's folder is the pinned roster, `roster.proposed.json` the last one that was refused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfin.audit.events import Approval, RosterVersion
from fedfin.client.folder import LenderFolder
from fedfin.client.sum_rules import refusal
from fedfin.errors import ConfigError, LinkError, ProtocolRefusalError
from fedfin.files import write_public
from fedfin.roster import Roster

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Change", "accept_roster", "approve", "pending", "pinned"]


@dataclass(frozen=True, slots=True)
class Change:
    """A roster that waits for approval, beside the pinned one.

    Attributes:
        pinned: What this lender goes by; None before the first.
        proposed: What a coordinator stated since.
    """

    pinned: Roster | None
    proposed: Roster

    @property
    def added(self) -> tuple[str, ...]:
        """Members of the proposed roster only."""
        return tuple(sorted(set(self.proposed.keys) - set(self._before)))

    @property
    def removed(self) -> tuple[str, ...]:
        """Members of the pinned roster only."""
        return tuple(sorted(set(self._before) - set(self.proposed.keys)))

    @property
    def changed(self) -> tuple[str, ...]:
        """Members of both, with another key in each."""
        both = set(self._before) & set(self.proposed.keys)
        return tuple(sorted(name for name in both if self._before[name] != self.proposed.keys[name]))

    def to_json(self) -> dict[str, Any]:
        """Return the change for `fedfin client approve-roster` and `status`: names and fingerprints."""
        before = {} if self.pinned is None else self.pinned.fingerprints()
        after = self.proposed.fingerprints()
        return {
            "digest": self.proposed.digest(),
            "members": after,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": {name: {"before": before[name], "now": after[name]} for name in self.changed},
        }

    @property
    def _before(self) -> dict[str, str]:
        return {} if self.pinned is None else dict(self.pinned.keys)


def accept_roster(folder: LenderFolder, text: str, own_key: str) -> Roster:
    """Return the roster of a proposal if it is the pinned one, or pin it where none is.

    Args:
        folder: The lender's.
        text: The roster's JSON, from the coordinator.
        own_key: This lender's public identity key, PEM.

    Raises:
        LinkError: The text is no roster.
        ProtocolRefusalError: This lender is not in it with its own key (rule `membership`), or another roster is
            pinned (rule `roster_changed`): this one is kept beside it, to be approved.
        ConfigError: The pinned roster is damaged, or a file cannot be written.
    """
    stated, name = Roster.from_json(text), folder.config.name
    if stated.keys.get(name) != own_key:
        seen = "is not in it" if name not in stated.keys else "is in it with another identity key"
        what = f"the coordinator's roster is not one that this lender can go by: {name} {seen}"
        raise ProtocolRefusalError("membership", what)
    before = pinned(folder)
    if before is None:
        _write(folder.roster_path, stated)
        folder.journal.write(
            RosterVersion(action="pinned", number=0, digest=stated.digest(), num_members=len(stated.keys))
        )
    elif before != stated:
        _write(folder.proposed_roster_path, stated)
        what = (
            f"the coordinator's roster of {len(stated.keys)} members is not the one this lender pinned; its engineer"
            " looks at the change and approves it with `fedfin client approve-roster`"
        )
        raise refusal("roster_changed", what)
    else:
        folder.proposed_roster_path.unlink(missing_ok=True)  # what waited is not stated any more
    return stated


def pinned(folder: LenderFolder) -> Roster | None:
    """Return the pinned roster, or None before the first.

    Raises:
        ConfigError: The file is damaged.
    """
    return _read(folder.roster_path)


def pending(folder: LenderFolder) -> Change | None:
    """Return the roster that waits for approval, or None; errors as `pinned`."""
    proposed = _read(folder.proposed_roster_path)
    return None if proposed is None else Change(pinned(folder), proposed)


def approve(folder: LenderFolder, change: Change) -> None:
    """Pin the proposed roster: the very one that the engineer was shown.

    Raises:
        ConfigError: It cannot be written.
    """
    _write(folder.roster_path, change.proposed)
    if _read(folder.proposed_roster_path) == change.proposed:
        folder.proposed_roster_path.unlink(missing_ok=True)
    folder.journal.write(
        Approval(subject="roster", digest=change.proposed.digest()),
        RosterVersion(
            action="pinned",
            number=0,
            digest=change.proposed.digest(),
            previous=None if change.pinned is None else change.pinned.digest(),
            num_members=len(change.proposed.keys),
            added=change.added,
            removed=change.removed,
            changed=change.changed,
        ),
    )


def _write(path: "Path", roster: Roster) -> None:
    write_public(path, roster.to_json().encode())


def _read(path: "Path") -> Roster | None:
    try:
        return Roster.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, LinkError) as error:
        msg = (
            f"{path} is damaged ({error}); restore it from the backup. Without it this lender cannot tell whose keys it"
            " went by: nothing leaves in a secure sum"
        )
        raise ConfigError(msg) from error

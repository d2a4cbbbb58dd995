"""What a lender's engineer allows by hand: a version of the roster as a whole, or one member that enters or leaves.

An approval is this lender's signature over the very version that was shown. It is kept, and given to the coordinator
when that asks for it; the version counts once a quorum of members gave theirs.
"""

import json

from fedfin.audit.events import Approval
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import Change, approvals, own_row, pending
from fedfin.errors import ConfigError
from fedfin.files import write_public
from fedfin.roster_versions import changes_of, sign_version

__all__ = ["approve", "member_change"]


def approve(folder: LenderFolder, change: Change, *, member: str | None = None) -> None:
    """Sign the proposed version: the very one that the engineer was shown.

    Args:
        folder: The lender's.
        change: What was shown.
        member: The member that was approved, where the version's only change is this one.

    Raises:
        ConfigError: This lender is not in it with its own keys, or the approval cannot be kept.
    """
    keys = folder.keys()
    name = folder.config.name
    if change.proposed.members.get(name) != own_row(name, keys):
        msg = f"{name} is not in the proposed roster with the keys of this folder; ask the coordinator's operator"
        raise ConfigError(msg)
    digest = change.proposed.digest()
    # before the signature exists: what was not logged was not approved
    folder.journal.write(
        Approval(subject="roster" if member is None else "member", member=member, digest=digest)
    )
    kept = {**approvals(folder), digest: sign_version(change.proposed, keys.identity)}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    write_public(folder.approved_roster_path, text.encode(), mode=0o600)


def member_change(folder: LenderFolder, name: str) -> Change:
    """Return the version that waits for approval, if that this member enters, leaves or has new keys is all of it.

    Raises:
        ConfigError: No version waits, something else is in it too, or this lender goes by none yet.
    """
    change = pending(folder)
    if change is None:
        msg = "no version of the roster waits for approval; it is shown to this lender when a job gathers"
        raise ConfigError(msg)
    if change.pinned is None:
        msg = (
            "this lender goes by no roster yet: look at the whole of it and approve it with `fedfin client"
            " approve-roster`"
        )
        raise ConfigError(msg)
    changes = changes_of(change.pinned, change.proposed)
    names = (*changes.newcomers, *changes.removed, *changes.rotated)
    if names != (name,):
        msg = (
            f"version {change.proposed.number} of the roster changes {', '.join(sorted(names)) or 'nothing'}, and not"
            f" {name} alone; look at the whole of it and approve it with `fedfin client approve-roster`"
        )
        raise ConfigError(msg)
    return change

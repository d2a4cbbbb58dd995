"""`fedfin client approve-roster`, `approve-member`, `rotate`: the members as an engineer sees them, and new keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedfin.cli_output import DebugOption, JsonOption, agreed, chosen, guarded, print_json, print_table, say

if TYPE_CHECKING:
    from fedfin.client.folder import LenderFolder
    from fedfin.client.pinning import Change

__all__ = ["MEMBER_EPILOG", "ROSTER_EPILOG", "ROTATE_EPILOG", "approve_member", "approve_roster", "rotate"]

ROSTER_EPILOG: Final = "Example:  fedfin client approve-roster --config north-bank/bank.yaml"
MEMBER_EPILOG: Final = "Example:  fedfin client approve-member south-bank --config north-bank/bank.yaml"

ROTATE_EPILOG: Final = "Example:  fedfin client rotate --config north-bank/bank.yaml"

_ConfigOption = Annotated[Path, typer.Option("--config", help="The lender's bank.yaml.", dir_okay=False)]
_YesOption = Annotated[bool, typer.Option("--yes", help="Approve without asking.")]
_DEFAULT: Final = Path("bank.yaml")


def approve_roster(
    context: typer.Context,
    config: _ConfigOption = _DEFAULT,
    yes: _YesOption = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the version of the roster that waits for approval, beside the pinned one, and sign it.

    Compare the fingerprints with the members themselves, on another way than through the coordinator: it could invent
    a lender, or read the secure sums with keys of its own under lenders' names. All founders sign the first version;
    a later one counts once a quorum of the members signed it, which is more than two thirds, and each newcomer.
    --json alone approves nothing.
    """

    def work() -> None:
        from fedfin.client.folder import LenderFolder
        from fedfin.client.pinning import pending

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        _approve(folder, pending(folder), yes=yes, json_out=json_out)

    guarded(work, json_out=json_out, debug=debug)


def approve_member(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who enters, leaves or has new keys.", show_default=False)],
    config: _ConfigOption = _DEFAULT,
    yes: _YesOption = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sign the version of the roster that waits for approval, if nothing but this member differs in it.

    Compare the member's fingerprint with the member itself. Where more differs nothing is signed: `fedfin client
    approve-roster` shows all of it. --json alone approves nothing.
    """

    def work() -> None:
        from fedfin.client.approving import member_change
        from fedfin.client.folder import LenderFolder

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        _approve(folder, member_change(folder, name), yes=yes, json_out=json_out, member=name)

    guarded(work, json_out=json_out, debug=debug)


def rotate(
    context: typer.Context,
    config: _ConfigOption = _DEFAULT,
    leave_jobs: Annotated[
        bool, typer.Option("--leave-jobs", help="Rotate with a job open, and drop out of it.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Make new keys for this lender, which the old identity key signs; the old ones are deleted.

    The client must be stopped, and the coordinator must run. No other member needs to agree. A lender whose old key is
    lost is removed and invited again.
    """

    def work() -> None:
        from fedfin.client.folder import LenderFolder
        from fedfin.client.renewing import rotate as rotate_keys

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        rotate_keys(folder, leave_jobs=leave_jobs)
        say(
            f"{folder.config.name} has new keys; the old ones are deleted. Back up {folder.directory}/keys again"
        )

    guarded(work, debug=debug)


def _approve(
    folder: "LenderFolder", change: "Change | None", *, yes: bool, json_out: bool, member: str | None = None
) -> None:
    from fedfin.client.approving import approve

    document = None if change is None else change.to_json()
    if json_out and not (yes and change):
        print_json({"pending": document, "approved": bool(document and document["approved"])})
        return
    if change is None or document is None:
        say("no version of the roster waits for approval")
        return
    if not json_out:
        _show_change(document)
        if document["approved"]:
            waits = ", ".join(document["waits_for"])
            say(f"approved already; it waits for {waits or 'the coordinator'}")
            return
        if not (yes or agreed("sign this version of the roster?")):
            say("nothing was approved; this lender goes by what it went by before", style="bold red")
            raise SystemExit(1)
    approve(folder, change, member=member)
    if json_out:
        print_json({"pending": {**document, "approved": True}, "approved": True})
    else:
        say(
            f"signed: version {document['number']} of the roster, {document['digest'][:12]}; this lender goes by it"
            " once all that must have signed it"
        )


def _show_change(document: dict[str, Any]) -> None:
    kinds = {**dict.fromkeys(document["added"], "added"), **dict.fromkeys(document["changed"], "KEY CHANGED")}
    print_table(
        f"version {document['number']} of the roster, {document['digest'][:12]}, {len(document['members'])} members",
        ["lender", "identity key (SHA-256)", "beside the pinned roster", "signed"],
        [
            [name, key[:32], kinds.get(name, "the same"), "yes" if name in document["signed_by"] else "-"]
            for name, key in document["members"].items()
        ],
    )
    for name in document["removed"]:
        say(f"{name} is no member any more", style="yellow")
    for name, keys in document["changed"].items():
        say(
            f"{name} had the key {keys['before'][:32]} before: ask {name} itself whether it has new ones, not the"
            " coordinator",
            style="bold red",
        )
    say(f"digest of this version, the same at every member: {document['digest']}")

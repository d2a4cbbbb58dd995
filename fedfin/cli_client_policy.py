"""`fedfin client dry-run | make-approver | approve-job`: what a job would ask, and who lets it run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedfin.cli_output import (
    DebugOption,
    JsonOption,
    agreed,
    chosen,
    guarded,
    print_json,
    print_table,
    say,
)
from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from fedfin.client.folder import LenderFolder
    from fedfin.client.job_approval import HeldJob
    from fedfin.plan import JobPlan

__all__ = ["APPROVE_EPILOG", "DRY_RUN_EPILOG", "MAKE_EPILOG", "approve_job", "dry_run", "make_approver"]

DRY_RUN_EPILOG: Final = "Example:  fedfin client dry-run --config north-bank/bank.yaml --plan federation.yaml"
MAKE_EPILOG: Final = "Example:  fedfin client make-approver data-officer --key ~/fedfin-approver.key"
APPROVE_EPILOG: Final = (
    "Example:  fedfin client approve-job credit-1a2b3c4d --as data-officer --key ~/fedfin-approver.key"
    " --config north-bank/bank.yaml"
)
_DEFAULT: Final = Path("bank.yaml")
_ConfigOption = Annotated[Path, typer.Option("--config", help="The lender's bank.yaml.", dir_okay=False)]


def dry_run(
    context: typer.Context,
    config: _ConfigOption = _DEFAULT,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="The coordinator's federation.yaml.", show_default=False, dir_okay=False),
    ] = None,
    job: Annotated[
        str | None, typer.Option("--job", help="A job that waits for approval here.", show_default=False)
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            "--members",
            help="With --plan: lenders of the roster; default: the pinned roster's, or else the plan's.",
            min=1,
            show_default=False,
        ),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say everything that a job would ask of this lender; exit 1 if this lender would refuse it.

    Columns, statistics, model, rounds, what leaves and how long it is, what of the budget would be reserved and left.
    Nothing is reserved, logged or sent. Give --plan or --job.
    """

    def work() -> None:
        from fedfin.client.dry_run import dry_run as run
        from fedfin.client.dry_run import to_json
        from fedfin.client.folder import LenderFolder
        from fedfin.client.job_approval import held_job
        from fedfin.client.pinning import pinned
        from fedfin.config import FederationConfig
        from fedfin.parsing import load_config

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        held: HeldJob | None = None
        if (plan is None) == (job is None):
            msg = "give either --plan with the coordinator's federation.yaml, or --job with a job that waits here"
            raise ConfigError(msg)
        if job is not None:
            held = held_job(folder, job)
            asked, lenders = held.plan, held.num_members
        else:
            assert plan is not None  # noqa: S101  (one of the two is given)
            asked = load_config(plan, FederationConfig).job
            known = pinned(folder) if asked.aggregation == "secure" else None
            stated = asked.cohort.wait_for or asked.cohort.min_lenders
            lenders = members or (stated if known is None else len(known.members))
        document = {**to_json(run(asked, folder, lenders)), **_people_and_hours(folder, asked, held)}
        if json_out:
            print_json(document)
        else:
            _show(document)
        if document["refusals"]:
            raise SystemExit(1)

    guarded(work, json_out=json_out, debug=debug)


def make_approver(
    name: Annotated[str, typer.Argument(help="The approver's short name or office.", show_default=False)],
    key: Annotated[
        Path, typer.Option("--key", help="Where their key is written; theirs alone.", show_default=False)
    ],
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make an approver's key, and print the line that names them under policy.approvers of bank.yaml.

    Each approver runs this themselves, on a machine of their own: who has the file approves in their name.
    """

    def work() -> None:
        from pydantic import ValidationError

        from fedfin.approver import make_key, public_line
        from fedfin.lender_policy import Approver

        try:  # the name first: a key that nobody can be named with is not written
            Approver(name=name, key=_ANY_KEY)
        except ValidationError:
            msg = f"{name!r} is no name for bank.yaml; take small letters, digits and dashes, such as data-officer"
            raise ConfigError(msg) from None
        line = public_line(make_key(key))
        if json_out:
            print_json({"name": name, "key": line, "path": str(key)})
            return
        say(f"the key of {name} is in {key}; keep it away from others, and a copy in a safe place")
        say("add this line under policy.approvers of bank.yaml, and restart `fedfin client`:")
        say(f'    - {{name: {name}, key: "{line}"}}')

    guarded(work, json_out=json_out, debug=debug)


def approve_job(
    context: typer.Context,
    job: Annotated[
        str, typer.Argument(help="The job, as `fedfin client status` names it.", show_default=False)
    ],
    name: Annotated[str, typer.Option("--as", help="The approver, as in bank.yaml.", show_default=False)],
    key: Annotated[Path, typer.Option("--key", help="The approver's own key.", show_default=False)],
    config: _ConfigOption = _DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a waiting job would ask, and sign it in an approver's name.

    With as many different approvers as policy.approvals_needed says, the lender accepts the job when the coordinator
    proposes it again, a few seconds later. --json alone approves nothing.
    """

    def work() -> None:
        from fedfin.approver import load_key
        from fedfin.client.dry_run import dry_run as run
        from fedfin.client.dry_run import to_json
        from fedfin.client.folder import LenderFolder
        from fedfin.client.job_approval import approve, held_job, require_approver

        folder = LenderFolder(chosen(context, config, _DEFAULT))
        held, private = held_job(folder, job), load_key(key)
        require_approver(folder, name, private)  # before anybody reads on
        document = {
            **to_json(run(held.plan, folder, held.num_members)),
            **_people_and_hours(folder, held.plan, held),
        }
        if json_out and not yes:
            print_json({**document, "approved": False})
            return
        if not json_out:
            _show(document)
            if not (yes or agreed(f"approve {job} as {name}?")):
                say("nothing was approved", style="bold red")
                raise SystemExit(1)
        num_given, needed = approve(folder, held, name, private), folder.config.policy.approvals_needed
        if json_out:
            print_json({**document, "approved": True, "approvals": {"given": num_given, "needed": needed}})
            return
        say(f"approved: {job} has {num_given} of {needed} approvals", style="bold green")

    guarded(work, json_out=json_out, debug=debug)


# any point of the curve: only the name is looked at
_ANY_KEY: Final = "ed25519:" + "A" * 43 + "="


def _people_and_hours(folder: "LenderFolder", plan: "JobPlan", held: "HeldJob | None") -> dict[str, Any]:
    """Return what besides the rules decides when the job may start."""
    from fedfin.client.hours import next_opening, utc_now
    from fedfin.client.job_approval import approvers_of

    policy = folder.config.policy
    opening = next_opening(policy, utc_now())
    given = () if held is None else approvers_of(folder, held.job, plan.digest(), held.schema)
    return {
        "job": None if held is None else held.job,
        "hours": None if policy.hours is None else f"{policy.hours} {policy.time_zone}",
        "opens": None if opening is None else opening.isoformat(),
        "approvals": {
            "needed": policy.approvals_needed,
            "given": len(given),
            "by": [approver.name for approver in given],
        },
    }


def _show(document: dict[str, Any]) -> None:
    plan = document["plan"]
    say(
        f"{document['job'] or 'a job'} named {plan['name']}, plan {document['plan_digest'][:12]}:"
        f" {plan['model']['kind']} of up to {document['parameters']} parameters, {plan['training']['rounds']} rounds of"
        f" {plan['training']['local_steps']} steps, aggregation {plan['aggregation']}, privacy mode"
        f" {plan['privacy']['mode']}",
        style="bold",
    )
    print_table(
        "columns that it reads",
        ["column", "yours", "use", "histogram cells"],
        [_column_row(column) for column in document["columns"]],
        numeric_from=3,
    )
    print_table(
        f"what leaves, at most, with {document['members']} lenders",
        ["stage", "times", "values", "bytes each"],
        [
            [item["stage"], str(item["times"]), f"{item['values']:,}", f"{item['bytes']:,}"]
            for item in document["departures"]
        ],
    )
    seen = (
        f"each answer seen by the coordinator by itself, and your weight, {document['told_weight']:g}"
        if document["told_weight"] is not None
        else "under masks, so that the coordinator sees sums over the cohort only; keys and signatures come on top"
    )
    say(f"{document['bytes']:,} bytes in all, {seen}")
    for what, spend in (("training", document["training"]), ("held-out", document["held_out"])):
        if spend is not None:
            _show_spend(what, spend, document)
    if document["declines"]:
        say(
            f"this lender would train, and take no part in the evaluations: {document['declines']}",
            style="yellow",
        )
    if plan["privacy"]["mode"] == "none":
        say("no privacy: what leaves can reveal single loans, and nothing is charged", style="bold red")
    _show_when(document)
    for breach in document["refusals"]:
        say(f"refused by policy.{breach['key']}: {breach['reason']}", style="bold red")
    if not document["refusals"]:
        say("no rule of this lender refuses this job; nothing was reserved", style="bold green")


def _column_row(column: dict[str, Any]) -> list[str]:
    use = "feature" if column["is_feature"] else "fairness figures only"
    if column["why_feature"]:
        use = f"feature, protected: {column['why_feature']}"
    return [column["name"], column["local"], use, str(column["cells"] or "-")]


def _show_spend(what: str, spend: dict[str, Any], document: dict[str, Any]) -> None:
    budget = spend["budget"]
    reserved = "could not be reserved" if spend["refusal"] else "would be reserved"
    left = "" if budget is None else f"; {max(0.0, budget['share_left']):.1%} of the limit is left then"
    say(
        f"{what} loans ({spend['num_loans']}, snapshot {spend['snapshot'][:12]}): epsilon {spend['job']['rdp']:.3f} at"
        f" delta {document['plan']['privacy']['delta']:g} {reserved} (RDP; {spend['job']['pld']:.3f} by PLD), with all"
        f" that is spent or reserved {spend['after']['rdp']:.3f} at your policy's delta{left}"
    )


def _show_when(document: dict[str, Any]) -> None:
    needed, given = document["approvals"]["needed"], document["approvals"]["given"]
    if needed:
        by = f" ({', '.join(document['approvals']['by'])})" if given else ""
        say(f"it needs {needed} approval(s), and has {given}{by}", style="" if given >= needed else "yellow")
    if document["hours"]:
        when = "open now" if document["opens"] is None else f"opens {document['opens']}"
        say(f"hours: {document['hours']}, {when}")

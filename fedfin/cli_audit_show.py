"""`fedfin audit show`: the entries of a log, readable, filtered, a page at a time."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedfin.cli_output import DebugOption, JsonOption, guarded, print_json, print_table, say
from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedfin.audit.entry import Entry
    from fedfin.audit.reading import LogReader

__all__ = ["EPILOG", "PathArgument", "show"]

EPILOG: Final = "Example:  fedfin audit show fed --type refusal --type incident --since 2026-11-01"

PathArgument = Annotated[
    Path,
    typer.Argument(
        help="A log (audit.db), or the folder, run directory or unpacked pack that holds one.", exists=True
    ),
]

_DIGEST: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{3})?)?Z?)?")


def show(
    path: PathArgument,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="Only events of this type; may be given again.", show_default=False),
    ] = None,
    job: Annotated[
        str | None, typer.Option("--job", help="Only events of this job.", show_default=False)
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--member", help="Only events by or about this lender.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            help="Only from this time on, UTC: 2026-11-24 or 2026-11-24T18:00Z.",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Only before this time, UTC.", show_default=False)
    ] = None,
    first: Annotated[int, typer.Option("--first", help="The entry to begin with.", min=0)] = 0,
    limit: Annotated[int, typer.Option("--limit", help="Entries on a page.", min=1, max=100_000)] = 50,
    full: Annotated[bool, typer.Option("--full", help="Show digests and signatures whole.")] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a log's entries, a page at a time; it does not check them (`fedfin audit verify` does).

    Where the owner's key lies beside the log, the log says that it was read.
    """

    def work() -> None:
        from fedfin.audit.access import find_log, record
        from fedfin.audit.events import EVENT_TYPES, LogAccess
        from fedfin.audit.reading import open_log

        unknown = sorted(set(types or ()) - EVENT_TYPES.keys())
        if unknown:
            msg = f"--type {unknown[0]}: there is no such event; name one of {', '.join(sorted(EVENT_TYPES))}"
            raise ConfigError(msg)
        times = _time("--since", since), _time("--until", until)
        log_path = find_log(path)
        with open_log(log_path) as log:
            page = _page(log, first, limit, frozenset(types or ()), job, member, times)
            size = log.size
        if page:  # said before it is shown: what cannot be logged does not go on
            shown = page[-1][0] - page[0][0] + 1
            record(log_path, LogAccess(command="audit show", first=page[0][0], num_entries=shown))
        following = page[-1][0] + 1 if len(page) == limit else None
        if json_out:
            print_json(
                {
                    "log": str(log_path),
                    "size": size,
                    "entries": [_to_json(index, entry) for index, entry in page],
                    "next": following if following is not None and following < size else None,
                }
            )
            return
        rows = [_row(index, entry, full=full) for index, entry in page]
        print_table(f"{log_path}, {size} entries", ["entry", "UTC", "what", "said"], rows, numeric_from=4)
        if following is not None and following < size:
            say(f"more: --first {following}", style="dim")

    guarded(work, json_out=json_out, debug=debug)


def _page(
    log: "LogReader",
    first: int,
    limit: int,
    types: frozenset[str],
    job: str | None,
    member: str | None,
    times: tuple[str | None, str | None],
) -> "list[tuple[int, Entry | None]]":
    since, until = times

    def fits(entry: "Entry | None") -> bool:
        if entry is None:  # erased: what it was is not known, so it passes no filter
            return not (types or job or member or since or until)
        fields = entry.event.model_dump()
        about = {entry.actor, fields.get("member")}
        for names in ("cohort", "dropped", "signed_by", "added", "removed", "changed"):
            about.update(fields.get(names) or ())
        return (
            (not types or entry.event.type in types)
            and (job is None or job in {fields.get("job"), fields.get("run")})
            and (member is None or member in about)
            and (since is None or entry.time >= since)
            and (until is None or entry.time < until)
        )

    found: Iterator[tuple[int, Entry | None]] = (
        (index, entry) for index, entry in log.entries(min(first, log.size)) if fits(entry)
    )
    return [pair for pair, _ in zip(found, range(limit), strict=False)]


def _time(option: str, text: str | None) -> str | None:
    if text is None:
        return None
    if not _TIME.fullmatch(text):
        msg = f"{option} {text!r} is no time; write 2026-11-24 or 2026-11-24T18:00Z, in UTC"
        raise ConfigError(msg)
    return text.removesuffix("Z")  # entries' times have one form, so a beginning of it compares as text


def _row(index: int, entry: "Entry | None", *, full: bool) -> list[str]:
    if entry is None:
        return [str(index), "", "", "(erased under a retention class; its hash stays)"]
    fields = entry.event.model_dump(exclude_none=True, exclude={"type", "version"})
    said = ", ".join(
        f"{name} {_word(value, full=full)}" for name, value in fields.items() if value not in ((), False)
    )
    return [str(index), entry.time[:19].replace("T", " "), entry.event.type.replace("_", " "), said]


def _word(value: Any, *, full: bool) -> str:  # noqa: ANN401  (any field of any event)
    if isinstance(value, tuple | list):
        return "+".join(_word(item, full=full) for item in value)
    text = str(value)
    if full:
        return text
    if _DIGEST.fullmatch(text):
        return text[:12]
    if "\n" in text:  # a signed note: its size stands beside it
        return "(whole with --full)"
    return " ".join(text.split()) if len(text) <= 200 else f"{' '.join(text[:199].split())}…"


def _to_json(index: int, entry: "Entry | None") -> dict[str, Any]:
    if entry is None:
        return {"entry": index, "erased": True}
    return {
        "entry": index,
        "time": entry.time,
        "actor": entry.actor,
        "event": entry.event.model_dump(mode="json", exclude_none=True),
    }

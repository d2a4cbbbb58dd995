"""`fedfin audit prove`, `export` and `prune`: what of a log is given out, and what of it may go."""

import datetime as dt
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedfin.cli_audit_show import PathArgument
from fedfin.cli_output import DebugOption, JsonOption, guarded, print_json, print_table, say
from fedfin.errors import AuditError, ConfigError

if TYPE_CHECKING:
    from fedfin.audit.events import Export
    from fedfin.audit.retention import Due

__all__ = ["EXPORT_EPILOG", "PROVE_EPILOG", "PRUNE_EPILOG", "export", "prove", "prune"]

PROVE_EPILOG: Final = "Example:  fedfin audit prove fed/runs/credit-1a2b3c4d 1234 --out released.json"
EXPORT_EPILOG: Final = "Example:  fedfin audit export fed --pruned --out log.jsonl"
PRUNE_EPILOG: Final = "Example:  fedfin audit prune north-bank --years rounds=7"


def prove(
    path: PathArgument,
    entry: Annotated[int, typer.Argument(help="The entry's number, as `fedfin audit show` gives it.", min=0)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file; default: entry-N.json in this folder.", show_default=False),
    ] = None,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a small file that shows that an entry is in the log; anyone checks it with `fedfin audit verify FILE`."""

    def work() -> None:
        from fedfin.audit.access import cover, find_log
        from fedfin.audit.events import Export
        from fedfin.audit.proving import prove as make
        from fedfin.audit.reading import open_log
        from fedfin.files import write_public

        log_path = find_log(path)
        with open_log(log_path) as log:
            is_covered = any(size > entry for size, _ in log.checkpoints())
        if not is_covered:  # else the checkpoint that there is, which others may have cosigned
            cover(log_path)
        with open_log(log_path) as log:
            content = make(log, entry) + b"\n"
        target = _target(out or Path(f"entry-{entry}.json"))
        write_public(target, content)
        digest = hashlib.sha256(content).hexdigest()
        _record_or_undo(log_path, Export(what="proof", digest=digest, num_entries=1), target)
        if json_out:
            print_json({"proof": str(target), "entry": entry, "bytes": len(content), "digest": digest})
            return
        say(f"proof of entry {entry}: {target}, {len(content)} bytes")
        say(f"to check, anywhere and without the log: fedfin audit verify {target}")

    guarded(work, json_out=json_out, debug=debug)


def export(
    path: PathArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file; default: audit.jsonl in this folder.", show_default=False),
    ] = None,
    pruned: Annotated[
        bool,
        typer.Option(
            "--pruned",
            help="Leave the bodies out and keep their hashes: it tells nothing and proves the rest.",
        ),
    ] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a log as lines of JSON, one an entry, with its checkpoints; `fedfin audit verify FILE` checks it."""

    def work() -> None:
        from fedfin.audit.access import cover, find_log
        from fedfin.audit.events import Export
        from fedfin.audit.exporting import export_log
        from fedfin.audit.reading import open_log

        log_path = find_log(path)
        target = _target(out or Path("audit.jsonl"))
        cover(log_path)
        with open_log(log_path) as log:
            written = export_log(log, target, pruned=pruned)
        event = Export(
            what="pruned log" if pruned else "log", digest=written.digest, num_entries=written.num_entries
        )
        _record_or_undo(log_path, event, target)
        if json_out:
            print_json(
                {
                    "export": str(target),
                    "entries": written.num_entries,
                    "bodies": written.num_bodies,
                    "digest": written.digest,
                }
            )
            return
        say(f"{written.num_entries} entries, {written.num_bodies} with their bodies: {target}")
        say(f"to check: fedfin audit verify {target}")

    guarded(work, json_out=json_out, debug=debug)


def prune(
    path: PathArgument,
    years: Annotated[
        list[str] | None,
        typer.Option(
            "--years",
            help="Keep a class longer than its floor: rounds=7; may be given again.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Erase; without it only what would go is shown.")
    ] = False,
    json_out: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Erase the bodies of entries whose retention class has run out; their hashes stay, and every proof holds.

    Classes and floors: decisions 10 years, rounds 5, operation 2; identity is kept for ever. The log says what was
    erased and why. It needs the owner's key beside the log.
    """

    def work() -> None:
        from fedfin.audit.access import cover, find_log, owners_key
        from fedfin.audit.log import AuditLog
        from fedfin.audit.reading import open_log
        from fedfin.audit.retention import due
        from fedfin.identity import load_identity_key

        log_path = find_log(path)
        key_path = owners_key(log_path)
        if yes and key_path is None:
            msg = f"no key lies beside {log_path} (keys/identity.key), so it is a copy; prune the owner's own log"
            raise AuditError(msg)
        cover(log_path)
        with open_log(log_path) as log:
            found = due(log, dt.datetime.now(dt.UTC), _years(years or []))
        if yes and key_path is not None:
            with AuditLog.open(log_path, key=load_identity_key(key_path, "its owner")) as opened:
                for one in found:
                    opened.prune(one.ranges, retention=one.retention.name)
                opened.checkpoint()
        _tell(log_path, found, erased=yes, json_out=json_out)

    guarded(work, json_out=json_out, debug=debug)


def _tell(log_path: Path, found: "tuple[Due, ...]", *, erased: bool, json_out: bool) -> None:
    from fedfin.audit.retention import RETENTION

    if json_out:
        print_json(
            {
                "log": str(log_path),
                "erased": erased,
                "classes": [{"class": one.retention.name, "entries": one.num_entries} for one in found],
            }
        )
        return
    numbers = {one.retention.name: one.num_entries for one in found}
    print_table(
        "entries whose bodies were erased" if erased else "entries whose bodies may go",
        ["class", "kept", "entries", "reason"],
        [
            [
                kept.name,
                "for ever" if kept.years is None else f"{kept.years} years",
                str(numbers.get(kept.name, 0)),
                kept.reason,
            ]
            for kept in RETENTION
        ],
        numeric_from=4,
    )
    if numbers and not erased:
        say("nothing was erased; add --yes to erase them")


def _years(given: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if not number.isascii() or not number.isdigit():
            msg = f"--years {text!r} is not CLASS=YEARS, such as rounds=7"
            raise ConfigError(msg)
        found[name] = int(number)
    return found


def _target(path: Path) -> Path:
    if path.exists():
        msg = f"{path} exists already; name another file with --out, or move it away"
        raise ConfigError(msg)
    return path


def _record_or_undo(log_path: Path, event: "Export", written: Path) -> None:
    """Log what was given out; where that fails, nothing is given out."""
    from fedfin.audit.access import record

    try:
        record(log_path, event)
    except BaseException:
        written.unlink(missing_ok=True)
        raise

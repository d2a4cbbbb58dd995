"""A running coordinator that shows one lender another log than the others, once; honest in all else.

`install` writes a `sitecustomize` and returns its folder for PYTHONPATH. In the ServerApp's process, and in no other,
the checkpoint that goes with the order's question is replaced for the order's lender. Nothing of this is in the
package: only the tests' processes load it.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from fedfin.audit.checkpoint import parse_checkpoint, sign
from fedfin.audit.events import Policy
from fedfin.audit.log import AuditLog
from fedfin.audit.origins import COORDINATOR
from fedfin.identity import create_identity_key
from fedfin.update import AskHistogram, Evaluate, Mask, Train, decode
from fedfin.witness import Shown

HOOK = """\
import sys

if "fedfin.server.app" in sys.orig_argv:
    sys.path.append({tests!r})
    import forking

    forking.misbehave({lender!r}, {round!r}, {how!r}, {shown!r})
"""


def install(directory: Path, lender: str, number: int, how: str) -> Path:
    """Write the hook below `directory`; return the folder that PYTHONPATH must name.

    Args:
        directory: A new folder; `shown.note` in it becomes the checkpoint that the lender was shown.
        lender: Who is shown another one.
        number: In which round, with the question that its masked vector would answer.
        how: `fork`: another history, signed by the coordinator's key; `another_key`: the right one, signed by another.
    """
    directory.mkdir()
    tests, shown = str(Path(__file__).parent), str(directory / "shown.note")
    hook = HOOK.format(tests=tests, lender=lender, round=number, how=how, shown=shown)
    (directory / "sitecustomize.py").write_text(hook)
    return directory


def misbehave(lender: str, number: int, how: str, kept: str) -> None:
    """In the coordinator's process: show `lender` another checkpoint in one round."""
    from fedfin.server.witnessing import WitnessedExchange

    show, shown_to = WitnessedExchange._show, {"fork": fork, "another_key": another_key}[how]

    def shows(self: Any, requests: Any) -> Any:
        showing, shown = show(self, requests)
        request = shown.get(lender)
        if isinstance(request, Mask) and not Path(kept).exists() and round_of(request) == number:
            note, proofs = shown_to(self._journal.log)
            Path(kept).write_text(note)
            right = Shown.from_json(request.witness)
            text = dataclasses.replace(right, checkpoint=note, proofs=proofs or right.proofs).to_json()
            shown[lender] = dataclasses.replace(request, witness=text)
        return showing, shown

    WitnessedExchange._show = shows  # type: ignore[method-assign]


def round_of(request: Mask) -> int | None:
    question = decode(request.question.tobytes(), AskHistogram, Train, Evaluate)
    return question.round if isinstance(question, Train) else None


def fork(log: AuditLog) -> tuple[str, dict[int, tuple[bytes, ...]]]:
    """Return a longer log's checkpoint by the coordinator's key, with that log's proofs; it has other entries."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.db"
        with AuditLog.create(
            path, origin=log.origin, actor=COORDINATOR, key=log._key, side="coordinator"
        ) as other:
            other.append_many([Policy(digest="e" * 64)] * (log.size + 1))
            return other.checkpoint(), {old: other.consistency(old) for old in range(1, log.size + 1)}


def another_key(log: AuditLog) -> tuple[str, None]:
    """Return the right checkpoint, signed by a key that is not the coordinator's; its proofs hold."""
    return sign(parse_checkpoint(log.checkpoint()), create_identity_key()), None


def kept_by(folder: Path) -> list[dict[str, Any]]:
    """Return what a lender keeps of logs that cannot be the one it knows, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted((folder / "forks").glob("*.json"))]

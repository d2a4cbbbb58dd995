"""Writes down, in a running federation's processes, what was encoded and what was summed; ends a lender on a step.

`install` writes a `sitecustomize` and returns its folder for PYTHONPATH. In a lender's process every vector that goes
into a secure sum is kept in the lender's folder before it is masked, with the values that it was encoded from; in
the coordinator's, every sum that was made. Nothing of this is in the package: only the tests' processes load it.

A lender whose environment says FEDFIN_TEST_DIE="round 2 mask" ends without a word when it is asked for its masked
vector of round 2, with "round 2 confirm" when it is asked to confirm. One whose environment says
FEDFIN_TEST_DEAL_FALSELY="round 2" deals shares in that round that open and give no secret of its own.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

HOOKS = """\
import sys

sys.path.append({tests!r})
if "fedfin.server.app" in sys.orig_argv:
    import recording

    recording.record_sums({sums!r})
elif "client" in sys.orig_argv and "--config" in sys.orig_argv:
    import recording

    recording.record_vectors()
"""


def install(directory: Path) -> Path:
    """Write the hooks below `directory`; return the folder that PYTHONPATH must name."""
    hooks, sums = directory / "hooks", directory / "sums"
    hooks.mkdir()
    sums.mkdir()
    text = HOOKS.format(tests=str(Path(__file__).parent), sums=str(sums))
    (hooks / "sitecustomize.py").write_text(text)
    return hooks


def record_vectors() -> None:
    """In a lender's process: keep each vector of a sum as it was before it was masked; end on the named step."""
    from fedfin.privacy.encoding import Layout
    from fedfin.privacy.participant import Participant

    folder = Path(sys.orig_argv[sys.orig_argv.index("--config") + 1]).parent / "recorded"
    folder.mkdir(exist_ok=True)
    encode, encode_integers = Layout.encode, Layout.encode_integers
    mask, confirm = Participant.mask, Participant.confirm
    last: dict[str, Any] = {}

    dealt, falsely = Participant._dealt, os.environ.get("FEDFIN_TEST_DEAL_FALSELY")

    def recorded_dealt(self: Any, own: Any, receiver: str, pair: Any) -> Any:
        if self._context.stage == falsely:
            pair = tuple(bytes(33) for _ in pair)
        return dealt(self, own, receiver, pair)

    Participant._dealt = recorded_dealt  # type: ignore[method-assign]  # the tests' process only

    def keep(layout: Any, parts: Any) -> None:
        last["layout"] = json.dumps(asdict(layout))
        last["parts"] = {name: np.array(values, dtype=np.float64).ravel() for name, values in parts.items()}

    def recorded_encode(self: Any, parts: Any, *more: Any, **others: Any) -> Any:
        keep(self, parts)
        return encode(self, parts, *more, **others)

    def recorded_integers(self: Any, parts: Any, *more: Any, **others: Any) -> Any:
        keep(self, parts)
        return encode_integers(self, parts, *more, **others)

    def recorded_mask(self: Any, values: Any, *more: Any, **others: Any) -> Any:
        end_if_told(f"{self._context.stage} mask")
        np.savez(
            folder / f"{self._context.digest().hex()}.npz",
            encoded=values.copy(),
            layout=last["layout"],
            **{f"part {name}": part for name, part in last["parts"].items()},
        )
        return mask(self, values, *more, **others)

    def recorded_confirm(self: Any, *more: Any, **others: Any) -> Any:
        end_if_told(f"{self._context.stage} confirm")
        return confirm(self, *more, **others)

    Layout.encode, Layout.encode_integers = recorded_encode, recorded_integers  # type: ignore[method-assign]
    Participant.mask, Participant.confirm = recorded_mask, recorded_confirm  # type: ignore[method-assign]


def end_if_told(step: str) -> None:
    if os.environ.get("FEDFIN_TEST_DIE") == step:
        os._exit(9)


def record_sums(directory: str) -> None:
    """In the coordinator's process: keep each unmasked sum, and what the job's loop made of it."""
    from fedfin.privacy.combiner import Combiner
    from fedfin.server.unmasking import SecureSums

    total, made = Combiner.total, SecureSums.sum
    last: dict[str, Any] = {}

    def recorded_total(self: Any, *more: Any, **others: Any) -> Any:
        found = total(self, *more, **others)
        last.update(context=self._context, total=found.copy())
        return found

    def recorded_sum(self: Any, *more: Any, **others: Any) -> Any:
        sums = made(self, *more, **others)
        context = last["context"]
        np.savez(
            Path(directory) / f"{context.digest().hex()}.npz",
            stage=context.stage,
            total=last["total"],
            survivors=np.array(sums.survivors),
            **{f"part {name}": part for name, part in sums.parts.items()},
        )
        return sums

    Combiner.total, SecureSums.sum = recorded_total, recorded_sum  # type: ignore[method-assign]

"""The coordinator's run directory: run.json, rounds.jsonl, metrics.json, model/.

Nothing of one lender's size or performance is in it: who took part, who was missing and why, and seconds.
"""

import datetime as dt
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedfin.config import FederationConfig
from fedfin.credit.schema import Schema
from fedfin.errors import ConfigError
from fedfin.files import write_public
from fedfin.server.roster import Job

__all__ = ["RunDirectory"]

_KEPT: Final = frozenset(
    {
        "cohort",
        "bins",
        "bins_short",
        "round_done",
        "round_short",
        "refused",
        "unanswered",
        "held",
        "delivered",
        "accepted",
        "bins_lost",
        "round_lost",
        "evaluated",
        "evaluation_short",
        "evaluation_lost",
        "evaluation_skipped",
        "sum_refused",
        "sum_liars",
        "next_job",
        "given_up",
    }
)


class RunDirectory:
    """One job's folder at the coordinator; a restarted job goes on in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, config: FederationConfig, job: Job, schema: Schema, root_fingerprint: str) -> None:
        """Write run.json, once.

        Raises:
            ConfigError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{self.path} cannot be made ({error.strerror}); free the disk or mend its permissions"
            raise ConfigError(msg) from error
        if not (self.path / "run.json").exists():
            self._write_run(
                {
                    "job": job.job_id,
                    "federation": config.federation,
                    "created": job.created_at,
                    "plan": json.loads(job.plan),
                    "plan_digest": job.digest,
                    "schema_fingerprint": schema.fingerprint(),
                    "root_fingerprint": root_fingerprint,
                    "versions": {
                        name: importlib.metadata.version(name)
                        for name in ("fedfin", "flwr", "torch", "numpy")
                    },
                }
            )

    def note(self, event: Mapping[str, Any]) -> None:
        """Append an event of the job to rounds.jsonl; passing events (waiting, single answers) are not kept.

        Raises:
            ConfigError: The disk is full or the file may not be written.
        """
        if event["event"] not in _KEPT:
            return
        line = {"time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"), **event}
        try:
            with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = f"{self.path / 'rounds.jsonl'} cannot be written ({error.strerror}); free the disk, then start again"
            raise ConfigError(msg) from error

    def catch_up(self, said: Mapping[str, Any] | None) -> None:
        """Append the event that was kept with a job's last result, where it was not noted before a kill.

        Args:
            said: `FederationStore.said`; None where nothing was.

        Raises:
            ConfigError: As `note`, or the file cannot be read.
        """
        path = self.path / "rounds.jsonl"
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)  # cut off while it was written
            lines = [json.loads(line) for line in data[:whole].splitlines()]
        except (OSError, ValueError) as error:
            msg = f"{path} cannot be read ({error}); restore it from the backup of the folder"
            raise ConfigError(msg) from error
        for line in lines:
            line.pop("time", None)
        if said is not None and dict(said) not in lines:
            self.note(said)

    def judge(self, evaluation: Mapping[str, Any]) -> None:
        """Add an evaluation's figures, of sums only, to metrics.json; one of the same number is replaced."""
        path = self.path / "metrics.json"
        kept = json.loads(path.read_text(encoding="utf-8"))["evaluations"] if path.exists() else []
        by_number = {int(one["evaluation"]): one for one in [*kept, evaluation]}
        document = {"evaluations": [by_number[number] for number in sorted(by_number)]}
        write_public(path, (json.dumps(document, indent=1) + "\n").encode())

    def finish(self, digest: str) -> None:
        """Add the released model's digest and the time to run.json."""
        run = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        self._write_run({**run, "model": digest, "completed": dt.datetime.now(dt.UTC).isoformat()})

    def _write_run(self, run: Mapping[str, Any]) -> None:
        write_public(self.path / "run.json", (json.dumps(run, indent=1) + "\n").encode())

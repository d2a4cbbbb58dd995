"""A lender's folder: bank.yaml, keys, the federation's schema, the ledger, jobs and models."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedfin.client.journal import Journal
from fedfin.config import LenderConfig
from fedfin.coordinator_key import CoordinatorStatement
from fedfin.credit.schema import Schema
from fedfin.errors import ConfigError, LedgerError, LinkError
from fedfin.files import write_private, write_public
from fedfin.identity import LenderKeys, load_lender_keys
from fedfin.parsing import load_config
from fedfin.privacy.ledger import Ledger

__all__ = ["JobFolder", "LenderFolder"]

_SALT_BYTES: Final = 32


class LenderFolder:
    """Where a lender's files are; opening it reads bank.yaml, nothing else."""

    def __init__(self, config_path: Path, *, without: Collection[str] = ()) -> None:
        """Read bank.yaml.

        Args:
            config_path: The file.
            without: Sections of it that are not looked at, for looks at the folder that do not need them.

        Raises:
            ConfigError: It does not hold; names every wrong key.
        """
        self.config_path = config_path.resolve()
        self.config = load_config(config_path, LenderConfig, without=without)
        self.directory = self.config_path.parent
        self.root_path = self.directory / "ca.pem"
        self.models_path = self.directory / "models"
        self.jobs_path = self.directory / "jobs"
        self.ledger_path = self.directory / "ledger.db"
        self.roster_path = self.directory / "roster.json"
        self.proposed_roster_path = self.directory / "roster.proposed.json"
        self.approved_roster_path = self.directory / "roster.approved.json"
        self.statement_path = self.directory / "coordinator.json"
        self.forks_path = self.directory / "forks"
        self.journal = Journal(
            self.directory,
            name=self.config.name,
            federation=self.config.federation,
            identity=lambda: self.keys().identity,
        )

    def schema(self) -> Schema:
        """Read the federation's schema as it was received at enrolment.

        Raises:
            ConfigError: The file is missing or does not parse.
        """
        path = self.directory / "schema.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            msg = f"{path} cannot be read ({error.strerror}); it is written by `fedfin client join`"
            raise ConfigError(msg) from error
        return Schema.from_yaml(text, origin=str(path))

    def keys(self) -> LenderKeys:
        """Read the lender's private keys."""
        return load_lender_keys(self.directory / "keys")

    def root(self) -> x509.Certificate:
        """Read the federation's root certificate, as it was pinned at enrolment.

        Raises:
            ConfigError: It cannot be read.
        """
        try:
            return x509.load_pem_x509_certificate(self.root_path.read_bytes())
        except (OSError, ValueError) as error:
            msg = f"{self.root_path} cannot be read ({error}); it is written by `fedfin client join`"
            raise ConfigError(msg) from error

    def coordinator(self) -> CoordinatorStatement | None:
        """Read the coordinator's key as it was pinned; None in a folder that was made before there was one.

        Raises:
            ConfigError: What is kept of it is damaged.
        """
        try:
            return CoordinatorStatement.from_json(self.statement_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, LinkError) as error:
            msg = f"{self.statement_path} is damaged ({error}); restore it from the backup of the folder"
            raise ConfigError(msg) from error

    def check_names(self) -> None:
        """Hold the names of bank.yaml against the certificates that were given at enrolment.

        Raises:
            ConfigError: A name was changed, or a certificate cannot be read.
        """
        certificates = (
            ("name", self.directory / "certificate.pem", self.config.name),
            ("federation", self.root_path, self.config.federation),
        )
        for key, path, given in certificates:
            try:
                subject = x509.load_pem_x509_certificate(path.read_bytes()).subject
            except (OSError, ValueError) as error:
                msg = f"{path} cannot be read ({error}); it is written by `fedfin client join`"
                raise ConfigError(msg) from error
            enrolled = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
            if enrolled != given:
                msg = f"{self.config_path}: {key} is {given!r}, and {enrolled!r} is enrolled; restore it"
                raise ConfigError(msg)

    def has_ledger(self) -> bool:
        """Tell whether there is a privacy ledger; there is none before the first start.

        Raises:
            LedgerError: There was one: this lender accepted a job that is charged.
        """
        if self.ledger_path.exists():
            return True
        if jobs := self._charged_jobs():
            msg = (
                f"the privacy ledger {self.ledger_path} is gone, and this lender accepted job {min(jobs)}: what its"
                " loans have given is not known. Restore the newest copy from the backup; nothing leaves without it"
            )
            raise LedgerError(msg)
        return False

    def ledger(self) -> Ledger:
        """Open the lender's privacy ledger; made where there was none.

        Raises:
            LedgerError: It cannot be opened, is gone, or is older than a job that this lender accepted.
        """
        self.has_ledger()
        ledger = Ledger(self.ledger_path)
        lacking = self._charged_jobs() - {entry.job_id for entry in ledger.entries()}
        if lacking:
            ledger.close()
            msg = (
                f"the privacy ledger {self.ledger_path} lacks job {min(lacking)}, which this lender accepted: it is"
                " another one, or an old copy that forgets what was spent since. Restore the newest copy from the"
                " backup; nothing leaves without it"
            )
            raise LedgerError(msg)
        return ledger

    def _charged_jobs(self) -> set[str]:
        """Return the accepted jobs that the ledger must hold: each was reserved before it was accepted."""
        return {
            accepted["job"]
            for accepted in self.accepted_jobs()
            if json.loads(accepted["plan"])["privacy"]["mode"] != "none"
        }

    def accepted_jobs(self) -> list[dict[str, Any]]:
        """Return what `JobFolder.accepted` does of every job here, by their ids in order; errors likewise."""
        found = [JobFolder(path.parent).accepted() for path in sorted(self.jobs_path.glob("*/job.json"))]
        return [accepted for accepted in found if accepted is not None]

    def salt(self, *, make: bool = True) -> bytes:
        """Return the lender's secret salt (32 bytes), made at first use: it blinds digests of loans.

        Args:
            make: False makes none: a lender without one gets zeros, for looks of which nothing is kept or sent.
        """
        path = self.directory / "keys" / "salt.key"
        if not path.exists():
            if self.has_ledger():
                msg = (
                    f"{path} is gone, and with it the ledger cannot tell whose budget is spent: restore the file from"
                    " its backup. Nothing leaves without it"
                )
                raise LedgerError(msg)
            if not make:
                return bytes(_SALT_BYTES)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_private(path, os.urandom(_SALT_BYTES))
        salt = path.read_bytes()
        if len(salt) != _SALT_BYTES:
            msg = f"{path} is damaged; restore it from the backup, or the ledger cannot recognise the loans"
            raise ConfigError(msg)
        return salt

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold the folder for one process.

        Raises:
            ConfigError: Another process holds it.
        """
        with (self.directory / "client.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                msg = f"another `fedfin client` serves {self.directory} already; stop it first"
                raise ConfigError(msg) from error
            yield

    def job(self, job_id: str) -> "JobFolder":
        """Return the folder of a job; it may not exist yet."""
        return JobFolder(self.jobs_path / job_id)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """One job at this lender: what was accepted, and the answers that may leave (or have left)."""

    path: Path

    @property
    def sums_path(self) -> Path:
        """Where the job's secure sums are logged (`fedfin.client.sum_log`)."""
        return self.path / "sums"

    def accepted(self) -> dict[str, Any] | None:
        """Return what was accepted (`fedfin.client.accepted`), or None.

        Raises:
            ConfigError: The file is damaged.
        """
        path = self.path / "job.json"
        try:
            accepted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _ = accepted["job"], json.loads(accepted["plan"])["privacy"]["mode"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            msg = (
                f"{path} is damaged; restore it from the backup, or this lender cannot tell what it promised"
            )
            raise ConfigError(msg) from error
        return accepted

    def accept(self, **fields: str | float | None) -> None:
        """Keep what was accepted, durably."""
        (self.path / "outbox").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_public(self.path / "job.json", (json.dumps(fields, indent=1) + "\n").encode(), mode=0o600)

    def keep_answer(self, stage: str, data: bytes) -> None:
        """Keep an answer, durably, before it is charged and sent."""
        write_public(self._outbox(stage), data, mode=0o600)

    def answer(self, stage: str) -> bytes | None:
        """Return the kept answer of a stage, or None."""
        try:
            return self._outbox(stage).read_bytes()
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Mark the job as over, durably, and delete the kept answers and models: nobody may ask again."""
        write_public(self.path / "over", b"")
        shutil.rmtree(self.path / "outbox", ignore_errors=True)
        shutil.rmtree(self.sums_path, ignore_errors=True)

    def is_over(self) -> bool:
        """Tell whether the job was ended here."""
        return (self.path / "over").exists()

    def _outbox(self, stage: str) -> Path:
        return self.path / "outbox" / f"{stage.replace(' ', '-')}.bin"

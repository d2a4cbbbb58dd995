"""`fedfin server init`: a federation's folder, with its authority, keys, schema and configuration."""

import contextlib
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from fedfin.audit.log import AuditLog
from fedfin.config import FederationConfig
from fedfin.coordinator_key import CoordinatorIdentity, CoordinatorStatement
from fedfin.errors import ConfigError, LinkError
from fedfin.files import write_private, write_public
from fedfin.identity import (
    CertificateAuthority,
    create_authority,
    create_identity_key,
    load_authority,
    load_identity_key,
    private_pem,
)
from fedfin.parsing import load_config
from fedfin.plan import JobPlan
from fedfin.reference import annotated
from fedfin.server.journal import open_federation_log
from fedfin.server.roster import FederationStore
from fedfin.server.server_certificate import issue, renew_if_due

__all__ = ["Federation", "found", "open_federation"]

_LOCAL: Final = ("localhost", "127.0.0.1")


class Federation:
    """A coordinator's folder: its configuration and where its files are."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path.resolve()
        self.config = load_config(config_path, FederationConfig)
        self.directory = self.config_path.parent
        self.store = FederationStore(self.directory / "federation.db")
        self.root_path = self.directory / "ca.pem"
        self.server_certificate_path = self.directory / "server.pem"
        self.server_key_path = self.directory / "keys" / "server.key"
        self.statement_path = self.directory / "coordinator.json"
        self.log_path = self.directory / "audit.db"
        self.runs_path = self.directory / "runs"

    def authority(self) -> CertificateAuthority:
        """Read the federation's authority."""
        return load_authority(self.root_path, self.directory / "keys" / "ca.key")

    def identity(self) -> CoordinatorIdentity:
        """Read the coordinator's identity key, and what the authority states of it.

        Raises:
            ConfigError: A file is missing or damaged, or the two do not belong together.
        """
        key = load_identity_key(self.directory / "keys" / "identity.key", "`fedfin server init`")
        try:
            statement = CoordinatorStatement.from_json(self.statement_path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, LinkError) as error:
            msg = f"{self.statement_path} cannot be read ({error}); restore it from the backup of the folder"
            raise ConfigError(msg) from error
        if statement.public_key() != key.public_key():
            msg = f"{self.statement_path} is of another key than keys/identity.key; restore both from the backup"
            raise ConfigError(msg)
        return CoordinatorIdentity(statement, key)

    def log(self) -> AuditLog:
        """Open the federation's log, made where there is none; the caller closes it.

        Raises:
            AuditError: It cannot be made or opened, or another key signs it.
            ConfigError: As `identity`.
        """
        identity = self.identity()
        return open_federation_log(
            self.log_path, identity.key, federation=self.config.federation, root=identity.statement.root
        )

    def schema_text(self) -> str:
        """Return schema.yaml as it stands.

        Raises:
            ConfigError: The file is missing or unreadable.
        """
        path = self.directory / self.config.schema_path
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            msg = f"{path} cannot be read ({error.strerror}); put the federation's schema there"
            raise ConfigError(msg) from error


def open_federation(config_path: Path) -> Federation:
    """Open a folder made by `found`.

    Raises:
        ConfigError: The configuration does not parse, or the folder is not whole.
    """
    federation = Federation(config_path)
    for path in (federation.root_path, federation.server_certificate_path, federation.server_key_path):
        if not path.exists():
            msg = f"{path} is missing; it is made by `fedfin server init`: restore the folder from its backup"
            raise ConfigError(msg)
    renew_if_due(
        federation.server_certificate_path,
        federation.server_key_path,
        federation.authority,
        federation.config.address,
    )
    if not federation.statement_path.exists():  # a folder from before coordinators had such a key
        _make_identity(federation.directory, federation.authority(), federation.config.federation)
    return federation


def found(
    directory: Path,
    *,
    name: str,
    address: str,
    schema_text: str,
    job: dict[str, Any],
    keep_transcripts: bool = False,
) -> Federation:
    """Make a federation's folder.

    Args:
        directory: A new or empty folder.
        name: The federation's name.
        address: host:port under which lenders will reach it.
        schema_text: The schema, already checked by the caller.
        job: Values of the job that differ from the defaults, nested like `JobPlan`.
        keep_transcripts: Whether each secure sum is kept, so that its round can be done again.

    Raises:
        ConfigError: The folder is not empty, or cannot be written; nothing is left half made in it then.
    """
    if directory.exists() and any(directory.iterdir()):
        msg = (
            f"{directory} is not empty; `fedfin server init` never overwrites a federation: give a new folder"
        )
        raise ConfigError(msg)
    try:
        FederationConfig(federation=name, address=address, job=JobPlan.model_validate(job))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        msg = f"{where} is {first['input']!r}: {problem}; give --name like coop, --address like host:9443"
        raise ConfigError(msg) from None
    host = address.rpartition(":")[0].strip("[]")
    loopback = host in {*_LOCAL, "::1"}
    text = annotated(
        FederationConfig,
        {
            "federation": name,
            "address": address,
            "listen": "127.0.0.1" if loopback else "0.0.0.0",  # noqa: S104  (lenders are on other hosts)
            "job": job,
            **({"evidence": {"keep_transcripts": True}} if keep_transcripts else {}),
        },
        heading=(
            "The coordinator's configuration; docs/configuration.md lists every key.\n"
            "It runs as it is: fedfin server --config federation.yaml"
        ),
    )
    authority = create_authority(name)
    server_key = ec.generate_private_key(ec.SECP256R1())
    certificate = issue(authority, server_key, address)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        (directory / "keys").mkdir(mode=0o700)
    except OSError as error:
        msg = f"{directory} cannot be made ({error.strerror}); give a folder that you may write"
        raise ConfigError(msg) from error
    write_private(directory / "keys" / "ca.key", private_pem(authority.key))
    write_private(directory / "keys" / "server.key", private_pem(server_key))
    write_public(directory / "ca.pem", authority.root.public_bytes(serialization.Encoding.PEM))
    write_public(directory / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))
    _make_identity(directory, authority, name)
    write_public(directory / "schema.yaml", schema_text.encode())
    FederationStore.create(directory / "federation.db")
    write_public(directory / "federation.yaml", text.encode())  # last: with it the folder counts as made
    federation = Federation(directory / "federation.yaml")
    federation.log().close()
    return federation


def _make_identity(directory: Path, authority: CertificateAuthority, name: str) -> None:
    """Make the coordinator's identity key, and have the authority state it; two processes may do so at once."""
    path = directory / "keys" / "identity.key"
    if not path.exists():
        with contextlib.suppress(
            ConfigError
        ):  # the other process was quicker, or what follows says what is wrong
            write_private(path, private_pem(create_identity_key()))
    key = load_identity_key(path, "`fedfin server init`")
    statement = CoordinatorStatement.make(authority, name, key.public_key())
    write_public(directory / "coordinator.json", statement.to_json().encode())

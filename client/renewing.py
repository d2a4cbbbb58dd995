"""A lender's new keys, and its certificate's renewal.

`rotate` makes four new keys beside the old ones, has the old identity key sign them, and puts them in their place once
the coordinator has them. Killed at any point, it is run again and goes on. A certificate is renewed by the running
client for the key that it has.
"""

import shutil
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedfin.audit.reading import open_log
from fedfin.client.enrolment_link import post
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import own_row
from fedfin.enrolling import CertificateAnswer, RenewalRequest, RotationRequest
from fedfin.errors import ConfigError, EnrolmentError
from fedfin.files import write_public
from fedfin.identity import (
    LenderKeys,
    certificate_request,
    create_lender_keys,
    is_due,
    load_lender_keys,
    public_pem,
    save_lender_keys,
)
from fedfin.roster_versions import rotation_message

__all__ = ["CHECK_S", "renew_if_due", "rotate"]

CHECK_S: Final = 24 * 3600.0
"""A running client looks at its certificate this often."""


def rotate(folder: LenderFolder, *, leave_jobs: bool = False) -> None:
    """Replace the lender's keys by new ones that its old identity key signs.

    Args:
        folder: The lender's; its client must be stopped.
        leave_jobs: Whether to go on with a job open: the lender drops out of it, since its members know the old keys.

    Raises:
        ConfigError: The client runs, a job is open, or a file is damaged or cannot be written.
        EnrolmentError: The coordinator refuses; the old keys stay.
        LinkError: The coordinator cannot be reached; run it again.
    """
    with folder.lock():
        keys_path, new_path = folder.directory / "keys", folder.directory / "keys.new"
        if not keys_path.exists() and new_path.exists():  # killed between the two renames
            new_path.rename(keys_path)
        open_jobs = [job["job"] for job in folder.accepted_jobs() if not folder.job(job["job"]).is_over()]
        if open_jobs and not leave_jobs:
            msg = (
                f"job {open_jobs[0]} is not over, and its members know the old keys; wait for its end, or leave it"
                " (--leave-jobs)"
            )
            raise ConfigError(msg)
        old = folder.keys()
        if not (new_path / "witness.key").exists():  # written last: with it they are whole
            shutil.rmtree(new_path, ignore_errors=True)
            save_lender_keys(create_lender_keys(), new_path)
        new = load_lender_keys(new_path)
        try:
            certificate = _send(folder, old, new)
        except EnrolmentError:
            shutil.rmtree(new_path)
            raise
        _sign_over(folder, new)
        write_public(folder.directory / "certificate.pem", certificate.encode())
        _replace(folder)


def renew_if_due(folder: LenderFolder, say: Callable[[str], None]) -> bool:
    """Renew the certificate if it has fewer than ten days left; return whether there is a new one.

    Raises:
        ConfigError: A file is damaged or cannot be written.
        EnrolmentError: The coordinator refuses.
        LinkError: It cannot be reached.
    """
    path = folder.directory / "certificate.pem"
    try:
        if not is_due(x509.load_pem_x509_certificate(path.read_bytes())):
            return False
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); it is written by `fedfin client join`"
        raise ConfigError(msg) from error
    keys, name = folder.keys(), folder.config.name
    unsigned = RenewalRequest(
        name=name, certificate_request=certificate_request(name, keys.tls), signatures={}
    )
    signature = keys.identity.sign(unsigned.transcript()).hex()
    request = unsigned.model_copy(update={"signatures": {"identity": signature}})
    root = folder.root_path.read_bytes()
    answer = post(folder.config.coordinator, root, "/v1/enrol/renew", request, CertificateAnswer)
    _require_own(answer.certificate, keys)
    write_public(path, answer.certificate.encode())
    say("this lender's certificate was renewed")
    return True


def _send(folder: LenderFolder, old: LenderKeys, new: LenderKeys) -> str:
    """Have the coordinator take over the new keys; return the certificate."""
    name, federation = folder.config.name, folder.config.federation
    message = rotation_message(federation, own_row(name, old), own_row(name, new))
    unsigned = RotationRequest(
        name=name,
        certificate_request=certificate_request(name, new.tls),
        node_key=public_pem(new.node.public_key()),
        identity_key=public_pem(new.identity.public_key()),
        witness_key=public_pem(new.witness.public_key()),
        rotation=old.identity.sign(message).hex(),
        signatures={},
    )
    transcript = unsigned.transcript()
    request = unsigned.model_copy(
        update={
            "signatures": {
                "node": new.node.sign(transcript, ec.ECDSA(hashes.SHA256())).hex(),
                "identity": new.identity.sign(transcript).hex(),
                "witness": new.witness.sign(transcript).hex(),
            }
        }
    )
    root = folder.root_path.read_bytes()
    answer = post(folder.config.coordinator, root, "/v1/enrol/rotate", request, CertificateAnswer)
    _require_own(answer.certificate, new)
    return answer.certificate


def _sign_over(folder: LenderFolder, new: LenderKeys) -> None:
    """Let the lender's log go on under the new identity key, by an entry that the old one signs."""
    folder.journal.flush()
    folder.journal.close()
    if folder.journal.path.exists():
        with open_log(folder.journal.path) as log:
            done = log.public_key == new.identity.public_key()
        if done:  # killed after it
            return
    folder.journal.log.rotate(new.identity)
    folder.journal.close()


def _replace(folder: LenderFolder) -> None:
    """Put the new keys in the old ones' place, which are deleted; what else is in the folder (the salt) stays."""
    keys_path, new_path = folder.directory / "keys", folder.directory / "keys.new"
    old_path = folder.directory / "keys.old"
    shutil.rmtree(old_path, ignore_errors=True)
    for path in keys_path.iterdir():
        if not (new_path / path.name).exists():
            shutil.copy2(path, new_path / path.name)
    keys_path.rename(old_path)
    new_path.rename(keys_path)
    shutil.rmtree(old_path)


def _require_own(certificate: str, keys: LenderKeys) -> None:
    if x509.load_pem_x509_certificate(certificate.encode()).public_key() != keys.tls.public_key():
        msg = "the coordinator's certificate is for another key than this lender's; ask its operator, and do not go on"
        raise EnrolmentError(msg)

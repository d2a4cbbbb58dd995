"""`fedfin client join TOKEN`: make the keys here, prove possession, receive the certificate and the schema."""

import json
import shutil
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedfin.audit.events import Enrolment
from fedfin.client.enrolment_link import post, request
from fedfin.client.folder import LenderFolder
from fedfin.config import LenderConfig
from fedfin.coordinator_key import CoordinatorStatement
from fedfin.credit.schema import Schema
from fedfin.enrolling import EnrolmentAnswer, EnrolmentRequest
from fedfin.errors import ConfigError, EnrolmentError, LinkError
from fedfin.files import write_public
from fedfin.identity import (
    LenderKeys,
    certificate_request,
    create_lender_keys,
    fingerprint_of,
    key_fingerprint,
    load_lender_keys,
    public_pem,
    save_lender_keys,
)
from fedfin.invitation import Invitation
from fedfin.reference import annotated

__all__ = ["join"]


def join(token: str, directory: Path) -> LenderFolder:
    """Join the federation that the token names.

    Args:
        token: What `fedfin server invite` printed.
        directory: A new or empty folder for the lender's keys and bank.yaml; or that of a try whose answer was
            lost, which is then finished with the same token.

    Returns:
        The lender's folder; its bank.yaml still wants the place of the loans.

    Raises:
        EnrolmentError: The token is altered, used, expired or of another federation, or the server's root is
            not the one the token names.
        LinkError: The coordinator cannot be reached, or the clocks are too far apart.
        ProtocolRefusalError: The coordinator's identity key is not stated by the federation's authority.
        ConfigError: The folder is not empty or cannot be written.
    """
    invitation = Invitation.from_token(token)
    unfinished = (directory / "keys" / "witness.key").exists() and not (directory / "bank.yaml").exists()
    if directory.exists() and any(directory.iterdir()) and not unfinished:
        msg = f"{directory} is not empty; `fedfin client join` never overwrites keys: give a new folder with --dir"
        raise ConfigError(msg)
    root_pem = _pinned_root(invitation)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        msg = f"{directory} cannot be made ({error.strerror}); give a folder that you may write with --dir"
        raise ConfigError(msg) from error
    if unfinished:  # the answer to an earlier try was lost: the same keys get it again
        keys = load_lender_keys(directory / "keys")
    else:
        keys = create_lender_keys()
        save_lender_keys(
            keys, directory / "keys"
        )  # first: a token that is used up must not leave nobody's keys
    try:
        answer = _enrol(invitation, root_pem, keys)
    except EnrolmentError:
        if not unfinished:  # refused: there is nothing to come back to
            shutil.rmtree(directory)
        raise
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    if certificate.public_key() != keys.tls.public_key():
        msg = "the coordinator's certificate is for another key than this lender's; ask its operator, and do not go on"
        raise EnrolmentError(msg)
    statement = CoordinatorStatement.from_json(answer.coordinator)
    statement.verify(x509.load_pem_x509_certificate(root_pem), answer.federation)
    schema = Schema.from_yaml(answer.schema_text, origin="the federation's schema")
    write_public(directory / "ca.pem", root_pem)
    write_public(directory / "coordinator.json", statement.to_json().encode())
    write_public(directory / "certificate.pem", answer.certificate.encode())
    write_public(directory / "schema.yaml", answer.schema_text.encode())
    text = annotated(
        LenderConfig,
        {
            "name": invitation.name,
            "federation": answer.federation,
            "coordinator": invitation.address,
            "data": {"path": "loans.csv"},
        },
        heading=(
            f"{invitation.name}'s configuration; docs/configuration.md lists every key.\n"
            f"The federation's columns: {', '.join(column.name for column in schema.columns)}; the outcome:"
            f" {schema.label.name}.\n"
            "Next: say under data where your loans are and how your columns are called, then run\n"
            "    fedfin client check --config bank.yaml\n"
            "    fedfin client --config bank.yaml"
        ),
    )
    write_public(directory / "bank.yaml", text.encode())  # last: with it the folder counts as made
    folder = LenderFolder(directory / "bank.yaml")
    folder.salt()  # made now, so that a salt that is gone later is never made anew in silence
    folder.journal.write(
        Enrolment(
            member=invitation.name,
            federation=answer.federation,
            identity=key_fingerprint(keys.identity.public_key()),
            witness=key_fingerprint(keys.witness.public_key()),
            root=invitation.fingerprint,
        )
    )
    folder.journal.close()
    return folder


def _pinned_root(invitation: Invitation) -> bytes:
    """Fetch the root certificate and hold it against the fingerprint; nothing secret is sent here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint below decides, before anything of ours is said
    status, body = request(invitation.address, context, "GET", "/v1/enrol/root")
    try:
        pem = str(json.loads(body)["root"]).encode()
        root = x509.load_pem_x509_certificate(pem)
    except (ValueError, KeyError, TypeError) as error:
        msg = f"the server at {invitation.address} is no fedfin coordinator (status {status}); check the token's origin"
        raise LinkError(msg) from error
    if fingerprint_of(root) != invitation.fingerprint:
        msg = (
            f"the server at {invitation.address} belongs to another federation than the token, or somebody is in"
            " between: the fingerprints of their root certificates differ. Nothing was sent; ask the coordinator"
        )
        raise EnrolmentError(msg)
    return pem


def _enrol(invitation: Invitation, root_pem: bytes, keys: LenderKeys) -> EnrolmentAnswer:
    unsigned = EnrolmentRequest(
        name=invitation.name,
        secret=invitation.secret,
        certificate_request=certificate_request(invitation.name, keys.tls),
        node_key=public_pem(keys.node.public_key()),
        identity_key=public_pem(keys.identity.public_key()),
        witness_key=public_pem(keys.witness.public_key()),
        signatures={},
    )
    transcript = unsigned.transcript()
    signed = unsigned.model_copy(
        update={
            "signatures": {
                "node": keys.node.sign(transcript, ec.ECDSA(hashes.SHA256())).hex(),
                "identity": keys.identity.sign(transcript).hex(),
                "witness": keys.witness.sign(transcript).hex(),
            }
        }
    )
    return post(invitation.address, root_pem, "/v1/enrol", signed, EnrolmentAnswer)

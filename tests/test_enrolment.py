"""Enrolment: who proves its keys and holds a token becomes a member; every other request is refused with the reason.

A refusal that is not about the token leaves the token usable, and nothing secret is in any answer or error.
"""

import asyncio
import base64
import dataclasses
import json
import sqlite3
import traceback

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedfin.coordinator_key import CoordinatorIdentity, CoordinatorStatement
from fedfin.enrolling import EnrolmentAnswer, EnrolmentRequest
from fedfin.errors import ConfigError, EnrolmentError
from fedfin.identity import (
    create_authority,
    create_identity_key,
    create_lender_keys,
    private_pem,
    public_pem,
    verify_signature,
)
from fedfin.invitation import Invitation, secret_hash
from fedfin.server.enrolment import EnrolmentDesk, enrolment_app
from fedfin.server.renewal import RenewalDesk
from fedfin.server.roster import FederationStore
from fedfin.server.roster_signing import RosterBook

AUTHORITY = create_authority("alps")
KEYS = create_lender_keys()
OTHERS = create_lender_keys()
COORDINATOR = create_identity_key()
STATEMENT = CoordinatorStatement.make(AUTHORITY, "alps", COORDINATOR.public_key())
SCHEMA_TEXT = "the federation's schema"
ROLES = ("node", "identity", "witness")


class Federation:
    """A coordinator's desk over a new database, and the members that it told the SuperLink of."""

    def __init__(self, directory, authority=AUTHORITY):
        self.path = directory / "federation.db"
        self.store = FederationStore.create(self.path)
        self.announced = []
        self.has_schema = True
        self.desk = EnrolmentDesk(
            self.store,
            authority,
            statement=STATEMENT,
            schema_text=self.schema_text,
            on_member=self.announced.append,
        )

    def schema_text(self):
        if not self.has_schema:
            raise ConfigError("schema.yaml cannot be read")
        return SCHEMA_TEXT

    def invite(self, name="north"):
        invitation = Invitation.create(name, "fed.example:9092", AUTHORITY.fingerprint)
        self.store.invite(invitation)
        return invitation


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


def csr_pem(key, name="north"):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def sign(key, message):
    return key.sign(message, ec.ECDSA(hashes.SHA256())) if hasattr(key, "curve") else key.sign(message)


def request_for(invitation, keys=KEYS, **fields):
    """The request that `fedfin client join` sends; `fields` are changed before it is signed."""
    unsigned = EnrolmentRequest(
        name=invitation.name,
        secret=invitation.secret,
        certificate_request=csr_pem(keys.tls, invitation.name),
        node_key=public_pem(keys.node.public_key()),
        identity_key=public_pem(keys.identity.public_key()),
        witness_key=public_pem(keys.witness.public_key()),
        signatures={},
    ).model_copy(update=fields)
    transcript = unsigned.transcript()
    signatures = {role: sign(getattr(keys, role), transcript).hex() for role in ROLES}
    return unsigned.model_copy(update={"signatures": signatures})


def body_of(request):
    return request.model_dump_json().encode()


def refused(federation, body):
    """The reason of a refusal, having made sure that nobody was enrolled and no secret was told."""
    before, announced = federation.store.members(), list(federation.announced)
    with pytest.raises(EnrolmentError) as caught:
        federation.desk.enrol(body)
    assert federation.store.members() == before
    assert federation.announced == announced
    assert_tells_no_secret("".join(traceback.format_exception(caught.value)), body)
    return str(caught.value)


def assert_tells_no_secret(text, body=b""):
    assert "PRIVATE KEY" not in text
    for name in ("tls", "node", "identity", "witness"):
        lines = private_pem(getattr(KEYS, name)).decode().splitlines()[1:-1]
        assert not any(line in text for line in lines)
    try:
        secret = json.loads(body)["secret"]
    except (ValueError, KeyError, TypeError):
        return
    if isinstance(secret, str) and len(secret) > 12:
        assert secret[:12] not in text  # pydantic would print the beginning


# A whole request


def test_a_lender_that_proves_its_keys_and_holds_a_token_is_a_member(federation):
    request = request_for(federation.invite())
    answer = federation.desk.enrol(body_of(request))
    (member,) = federation.store.members()
    assert federation.announced == [member]
    assert (member.name, member.certificate) == ("north", answer.certificate)
    assert (member.node_key, member.identity_key, member.witness_key) == (
        request.node_key,
        request.identity_key,
        request.witness_key,
    )
    assert (answer.federation, answer.schema_text) == ("alps", SCHEMA_TEXT)
    assert CoordinatorStatement.from_json(answer.coordinator) == STATEMENT


def test_the_answers_certificate_is_the_lenders_under_the_root(federation):
    answer = federation.desk.enrol(body_of(request_for(federation.invite())))
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.public_key() == KEYS.tls.public_key()
    policy = verification.PolicyBuilder().store(verification.Store([AUTHORITY.root]))
    verified = policy.build_client_verifier().verify(certificate, [])
    assert list(verified.subjects) == [x509.DNSName("north")]


def test_the_certificates_name_is_the_tokens_whatever_the_request_says(federation):
    request = request_for(federation.invite(), certificate_request=csr_pem(KEYS.tls, "south"))
    answer = federation.desk.enrol(body_of(request))
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=north"


def test_the_roster_keeps_the_identity_keys_signature_over_the_row(federation):
    request = request_for(federation.invite())
    federation.desk.enrol(body_of(request))
    (member,) = federation.store.members()
    verify_signature(member.identity_key, bytes.fromhex(member.signature), request.transcript())


@given(st.binary(min_size=32, max_size=32).map(bytes.hex))
def test_what_is_signed_holds_the_secrets_hash_and_not_the_secret(secret):
    request = request_for(Invitation("north", "fed.example:1", "0" * 64, secret))
    assert secret.encode() not in request.transcript()
    assert secret_hash("north", secret).encode() in request.transcript()
    assert f"{secret!r}" not in repr(request)


# Possession


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_signature_is_refused_and_the_token_stays_usable(federation, role):
    request = request_for(federation.invite())
    signatures = {key: value for key, value in request.signatures.items() if key != role}
    reason = refused(federation, body_of(request.model_copy(update={"signatures": signatures})))
    assert reason == "the enrolment must be signed by three different keys; run `fedfin client join` again"
    federation.desk.enrol(body_of(request))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("forgery", ["another key", "another message", "altered", "empty", "no hex"])
def test_a_forged_signature_is_refused_and_the_token_stays_usable(federation, role, forgery):
    request = request_for(federation.invite())
    honest = bytes.fromhex(request.signatures[role])
    forged = {
        "another key": sign(getattr(OTHERS, role), request.transcript()).hex(),
        "another message": sign(getattr(KEYS, role), b"another").hex(),
        "altered": (honest[:-1] + bytes([honest[-1] ^ 1])).hex(),
        "empty": "",
        "no hex": "signature",
    }[forgery]
    signatures = {**request.signatures, role: forged}
    reason = refused(federation, body_of(request.model_copy(update={"signatures": signatures})))
    assert "run `fedfin client join` again" in reason
    assert ("does not hold the private key" in reason) == (forgery != "no hex")
    federation.desk.enrol(body_of(request))


@pytest.mark.parametrize("role", ROLES)
def test_a_key_that_is_exchanged_on_the_way_is_refused(federation, role):
    """Somebody in between has keys of its own, but not the signatures of the others over them."""
    request = request_for(federation.invite())
    key = getattr(OTHERS, role)
    swapped = request.model_copy(update={f"{role}_key": public_pem(key.public_key())})
    signatures = {**request.signatures, role: sign(key, swapped.transcript()).hex()}
    reason = refused(federation, body_of(swapped.model_copy(update={"signatures": signatures})))
    assert "does not hold the private key" in reason
    federation.desk.enrol(body_of(request))


def test_another_tls_key_than_the_signed_one_is_refused(federation):
    request = request_for(federation.invite())
    other = request.model_copy(update={"certificate_request": csr_pem(OTHERS.tls)})
    assert "does not hold the private key" in refused(federation, body_of(other))
    federation.desk.enrol(body_of(request))


def test_a_certificate_request_that_its_key_did_not_sign_is_refused(federation):
    invitation = federation.invite()
    der = bytearray(
        x509.load_pem_x509_csr(csr_pem(KEYS.tls).encode()).public_bytes(serialization.Encoding.DER)
    )
    der[-1] ^= 1
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.b64encode(der).decode()}\n-----END CERTIFICATE REQUEST-----\n"
    reason = refused(federation, body_of(request_for(invitation, certificate_request=pem)))
    assert reason.startswith("the certificate request is not signed by its own key")
    federation.desk.enrol(body_of(request_for(invitation)))


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)
def test_a_tls_key_that_is_not_p256_is_refused_and_the_token_stays_usable(federation, key):
    invitation = federation.invite()
    reason = refused(federation, body_of(request_for(invitation, certificate_request=csr_pem(key))))
    assert reason.startswith("the TLS key is not P-256; run `fedfin client join` with this release")
    federation.desk.enrol(body_of(request_for(invitation)))


def test_one_key_in_two_roles_is_refused_and_the_token_stays_usable(federation):
    invitation = federation.invite()
    twice = dataclasses.replace(KEYS, witness=KEYS.identity)
    assert "three different keys" in refused(federation, body_of(request_for(invitation, keys=twice)))
    spaced = request_for(invitation, keys=twice, witness_key=public_pem(KEYS.identity.public_key()) + "\n")
    assert "the witness key is of another kind or form" in refused(federation, body_of(spaced))
    federation.desk.enrol(body_of(request_for(invitation)))


@pytest.mark.parametrize(
    ("role", "key"),
    [
        ("node", ec.generate_private_key(ec.SECP256R1())),
        ("node", ed25519.Ed25519PrivateKey.generate()),
        ("identity", ec.generate_private_key(ec.SECP384R1())),
        ("witness", ec.generate_private_key(ec.SECP256R1())),
    ],
)
def test_a_key_of_another_kind_is_refused_and_the_token_stays_usable(federation, role, key):
    invitation = federation.invite()
    reason = refused(
        federation, body_of(request_for(invitation, keys=dataclasses.replace(KEYS, **{role: key})))
    )
    assert reason.startswith(f"the {role} key is of another kind or form; run `fedfin client join`")
    federation.desk.enrol(body_of(request_for(invitation)))


def test_a_node_key_enrolled_under_another_name_is_refused_and_the_token_stays_usable(federation):
    federation.desk.enrol(body_of(request_for(federation.invite("north"))))
    invitation = federation.invite("south")
    assert "its node key is enrolled already" in refused(federation, body_of(request_for(invitation)))
    federation.desk.enrol(body_of(request_for(invitation, keys=OTHERS)))


# The body


@pytest.fixture(scope="module")
def founded(tmp_path_factory):
    """A federation for properties: nobody is ever enrolled in it."""
    return Federation(tmp_path_factory.mktemp("federation"))


@given(body=st.binary(max_size=100))
def test_a_body_that_is_no_request_is_refused(founded, body):
    assert refused(founded, body) == (
        "the enrolment request is malformed; both sides must run the same release of fedfin"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../north"},
        {"name": "North"},
        {"secret": "A" * 64},
        {"secret": "0" * 63},
        {"secret": None},
        {"certificate_request": ""},
        {"certificate_request": "x" * 4001},
        {"node_key": "no key"},
        {"identity_key": "-----BEGIN PUBLIC KEY-----\nMAoGAyoDBAMCAQE=\n-----END PUBLIC KEY-----\n"},
        {"witness_key": "x" * 1001},
        {"signatures": []},
        {"signatures": {"node": 1}},
        {"signatures": dict.fromkeys("abcd", "")},
        {"more": 1},
    ],
    ids="-".join,
)
def test_a_malformed_field_is_refused_and_the_token_stays_usable(federation, fields):
    request = request_for(federation.invite())
    body = json.dumps({**request.model_dump(), **fields}).encode()
    assert refused(federation, body).startswith("the enrolment request is malformed")
    federation.desk.enrol(body_of(request))


@pytest.mark.parametrize("field", list(EnrolmentRequest.model_fields))
def test_a_field_that_is_missing_is_refused(federation, field):
    fields = request_for(federation.invite()).model_dump()
    del fields[field]
    assert refused(federation, json.dumps(fields).encode()).startswith("the enrolment request is malformed")


# The token


def test_a_used_token_is_refused(federation):
    request = request_for(federation.invite())
    first = federation.desk.enrol(body_of(request))
    # the same lender with the same keys lost the answer on its way: it is given again, and nobody is enrolled twice
    assert federation.desk.enrol(body_of(request)) == first
    assert len(federation.store.members()) == 1
    other = Invitation("north", "fed.example:9092", AUTHORITY.fingerprint, request.secret)
    assert "a token works once" in refused(federation, body_of(request_for(other, keys=OTHERS)))


def test_an_expired_token_is_refused(federation):
    request = request_for(federation.invite())
    with sqlite3.connect(federation.path) as db:
        db.execute("UPDATE invitations SET expires_at = '2020-01-01T00:00:00+00:00'")
    db.close()
    assert "expired at 2020-01-01" in refused(federation, body_of(request))


def test_a_token_of_another_name_federation_or_secret_is_refused(federation):
    invitation = federation.invite("north")
    foreign = Invitation.create("north", "other.example:9092", "0" * 64)
    altered = dataclasses.replace(invitation, secret="0" * 64)
    renamed = dataclasses.replace(invitation, name="south")
    for wrong in (foreign, altered, renamed):
        reason = refused(federation, body_of(request_for(wrong)))
        assert f"this federation gave no such token to {wrong.name}" in reason
        assert f"`fedfin server invite {wrong.name}`" in reason
    federation.desk.enrol(body_of(request_for(invitation)))


def test_a_coordinator_without_its_schema_enrols_nobody_and_uses_no_token(federation):
    request = request_for(federation.invite())
    federation.has_schema = False
    with pytest.raises(ConfigError, match=r"schema\.yaml cannot be read"):
        federation.desk.enrol(body_of(request))
    assert (federation.store.members(), federation.announced) == ((), [])
    federation.has_schema = True
    federation.desk.enrol(body_of(request))


# Over HTTP


def ask(app, method, path, parts=(b"",)):
    """Send a request in parts; return the status and the whole answer's text."""
    waiting = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
        for i, part in enumerate(parts)
    ]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": method, "path": path}, receive, send))
    start, body = sent
    assert (b"cache-control", b"no-store") in start["headers"]
    return start["status"], body["body"].decode()


@pytest.fixture
def app(federation):
    identity = CoordinatorIdentity(STATEMENT, COORDINATOR)
    book = RosterBook(federation.store, identity)
    return enrolment_app(
        federation.desk,
        RenewalDesk(
            federation.store, AUTHORITY, book, "alps", federation.announced.append, log=lambda _: None
        ),
    )


def test_the_root_certificate_is_given_to_everybody(app):
    status, text = ask(app, "GET", "/v1/enrol/root")
    assert status == 200
    root = x509.load_pem_x509_certificate(json.loads(text)["root"].encode())
    assert root == AUTHORITY.root
    assert_tells_no_secret(text)


def test_a_request_is_answered_with_certificate_schema_and_federation(app, federation):
    body = body_of(request_for(federation.invite()))
    status, text = ask(app, "POST", "/v1/enrol", [body[:100], body[100:101], body[101:]])
    assert status == 200
    answer = EnrolmentAnswer.model_validate_json(text)
    assert (answer.federation, answer.schema_text) == ("alps", SCHEMA_TEXT)
    assert CoordinatorStatement.from_json(answer.coordinator) == STATEMENT
    assert_tells_no_secret(text, body)


def test_a_refusal_is_403_with_the_reason_and_no_secret(app, federation):
    body = body_of(request_for(Invitation.create("north", "fed.example:9092", "0" * 64)))
    status, text = ask(app, "POST", "/v1/enrol", [body])
    assert status == 403
    assert json.loads(text)["error"].startswith("this federation gave no such token to north")
    assert_tells_no_secret(text, body)


def test_a_coordinator_that_cannot_enrol_now_says_500(app, federation):
    body = body_of(request_for(federation.invite()))
    federation.path.unlink()
    status, text = ask(app, "POST", "/v1/enrol", [body])
    assert status == 500
    assert json.loads(text)["error"].startswith("the coordinator cannot enrol now: ")
    assert_tells_no_secret(text, body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/enrol"),
        ("PUT", "/v1/enrol"),
        ("HEAD", "/v1/enrol/root"),
        ("POST", "/v1/enrol/root"),
        ("POST", "/v1/enrol/"),
        ("POST", "/v1/enrol/other"),
        ("GET", "/v1/enrol/root/../../keys/ca.key"),
        ("GET", "/v1/fleet/pull"),
    ],
)
def test_there_is_nothing_elsewhere(app, method, path):
    assert ask(app, method, path) == (404, '{"error": "there is nothing here"}')


@pytest.mark.parametrize("parts", [[b" " * 65_537], [b" " * 40_000] * 2, [b" " * 40_000] * 100])
def test_a_body_that_is_too_long_is_413_and_not_read_to_its_end(app, parts):
    assert ask(app, "POST", "/v1/enrol", parts) == (413, '{"error": "the enrolment request is too long"}')


@pytest.mark.parametrize("path", ["/v1/enrol/rotate", "/v1/enrol/renew"])
def test_new_keys_and_renewals_are_answered_there_too(app, path):
    status, text = ask(app, "POST", path, [b"{}"])
    assert (status, "malformed" in text) == (403, True)
    assert ask(app, "GET", path)[0] == 404


def test_a_request_that_breaks_off_enrols_nobody(app, federation):
    body = body_of(request_for(federation.invite()))
    waiting = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return waiting.pop(0)

    async def send(message):
        pass

    asyncio.run(app({"type": "http", "method": "POST", "path": "/v1/enrol"}, receive, send))
    assert federation.store.members() == ()
    federation.desk.enrol(body)

"""Keys, certificates and invitations: what is accepted, what is refused, and that no secret is ever shown."""

import base64
import dataclasses
import datetime as dt
import hashlib
import ipaddress
import json
import os
import re
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedfin import files
from fedfin.errors import ConfigError, EnrolmentError
from fedfin.files import write_private, write_public
from fedfin.identity import (
    CertificateAuthority,
    create_authority,
    create_lender_keys,
    load_authority,
    load_lender_keys,
    private_pem,
    public_pem,
    save_lender_keys,
    verify_signature,
)
from fedfin.invitation import LENDER_NAME_PATTERN, Invitation, secret_hash

NAMES = st.from_regex(LENDER_NAME_PATTERN, fullmatch=True)
ADDRESSES = st.builds(
    "{}:{}".format, st.sampled_from(["fed.example", "[::1]", "10.0.0.1"]), st.integers(1, 65535)
)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
INVITATIONS = st.builds(Invitation, NAMES, ADDRESSES, DIGESTS, DIGESTS)
AUTHORITY = create_authority("alps")
KEYS = create_lender_keys()


def token_of(body):
    """A token with these contents and check characters that fit: what only an attacker would make."""
    text = base64.urlsafe_b64encode(body).decode().rstrip("=")
    return f"fedfin1_{text}.{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def request_of(key, name="north"):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


def policy(authority):
    """The verifier that a Python TLS program would build from the root alone."""
    return verification.PolicyBuilder().store(verification.Store([authority.root]))


# Invitation tokens


@given(INVITATIONS)
def test_a_token_gives_back_its_invitation(invitation):
    token = invitation.to_token()
    assert token.split() == [token]
    assert Invitation.from_token(f"  {token}\n") == invitation


@given(INVITATIONS, st.data())
def test_a_token_with_one_character_altered_is_refused(invitation, data):
    token = invitation.to_token()
    position = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(
        st.characters(exclude_characters=token[position]).filter(lambda char: not char.isspace())
    )
    with pytest.raises(EnrolmentError, match=r"copy (it|the whole line) again"):
        Invitation.from_token(token[:position] + other + token[position + 1 :])


@given(INVITATIONS, st.data())
def test_a_token_that_was_cut_is_refused(invitation, data):
    token = invitation.to_token()
    with pytest.raises(EnrolmentError, match=r"copy (it|the whole line) again"):
        Invitation.from_token(token[: data.draw(st.integers(0, len(token) - 1))])


@given(st.text())
def test_other_text_is_no_token(text):
    with pytest.raises(EnrolmentError, match=r"no invitation token \(they begin with fedfin1_\)"):
        Invitation.from_token(text)


@pytest.mark.parametrize(
    "parts",
    [
        ["north", "fed.example:9092", "0" * 64],
        ["north", "fed.example:9092", "0" * 64, "0" * 64, "more"],
        ["north", "fed.example:9092", "0" * 64, 7],
        ["../north", "fed.example:9092", "0" * 64, "0" * 64],
        ["north\n", "fed.example:9092", "0" * 64, "0" * 64],
        ["north", "fed.example", "0" * 64, "0" * 64],
        ["north", "fed.example:9092", "0" * 63, "0" * 64],
        ["north", "fed.example:9092", "0" * 64, "not hex"],
        {"name": "north"},
        "north",
        None,
    ],
)
def test_a_token_that_holds_something_else_is_refused(parts):
    with pytest.raises(EnrolmentError, match="ask the coordinator for a new one"):
        Invitation.from_token(token_of(json.dumps(parts).encode()))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_token_that_cannot_be_read_is_refused(body):
    with pytest.raises(EnrolmentError, match="the token cannot be read; ask the coordinator for a new one"):
        Invitation.from_token(token_of(body))


def test_every_invitation_has_its_own_secret_of_256_bits():
    secrets = {Invitation.create("north", "fed.example:9092", "0" * 64).secret for _ in range(20)}
    assert len(secrets) == 20
    assert {len(bytes.fromhex(secret)) for secret in secrets} == {32}


@given(st.tuples(NAMES, DIGESTS), st.tuples(NAMES, DIGESTS))
def test_the_hash_of_a_secret_is_bound_to_the_name(one, other):
    assert (secret_hash(*one) == secret_hash(*other)) == (one == other)


@given(INVITATIONS)
def test_the_coordinator_keeps_a_hash_that_does_not_hold_the_secret(invitation):
    assert invitation.secret_hash() == secret_hash(invitation.name, invitation.secret)
    assert invitation.secret not in invitation.secret_hash()


# Nothing secret is shown


@given(INVITATIONS, DIGESTS)
def test_the_repr_of_an_invitation_does_not_depend_on_its_secret(invitation, secret):
    assert repr(invitation) == repr(dataclasses.replace(invitation, secret=secret))
    assert str(invitation) == repr(invitation)


@given(INVITATIONS)
def test_a_refused_token_is_not_repeated_in_the_error(invitation):
    token = invitation.to_token()
    with pytest.raises(EnrolmentError) as caught:
        Invitation.from_token(token[:-1])
    assert token[8:-9] not in str(caught.value)
    assert invitation.secret not in str(caught.value)


def test_the_repr_of_keys_shows_none_of_them():
    assert repr(KEYS) == "LenderKeys()"
    assert repr(AUTHORITY) == f"CertificateAuthority(root={AUTHORITY.root!r})"


# Keys on disk


def test_a_lender_has_four_keys_of_the_kinds_that_are_needed():
    assert (KEYS.tls.curve.name, KEYS.node.curve.name) == ("secp256r1", "secp384r1")
    publics = [
        public_pem(getattr(KEYS, name).public_key()) for name in ("tls", "node", "identity", "witness")
    ]
    assert len(set(publics)) == 4


def test_keys_come_back_as_they_were_saved(tmp_path):
    save_lender_keys(KEYS, tmp_path / "keys")
    loaded = load_lender_keys(tmp_path / "keys")
    for name in ("tls", "node", "identity", "witness"):
        assert private_pem(getattr(loaded, name)) == private_pem(getattr(KEYS, name))


def test_keys_are_readable_by_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        save_lender_keys(KEYS, tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert modes == dict.fromkeys(("tls.key", "node.key", "identity.key", "witness.key"), 0o600)


def test_a_key_is_never_overwritten(tmp_path):
    save_lender_keys(KEYS, tmp_path)
    with pytest.raises(ConfigError, match=r"tls\.key exists already; it is never overwritten"):
        save_lender_keys(create_lender_keys(), tmp_path)
    assert private_pem(load_lender_keys(tmp_path).tls) == private_pem(KEYS.tls)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_that_others_can_read_is_refused_until_its_mode_is_mended(tmp_path, mode):
    save_lender_keys(KEYS, tmp_path)
    path = tmp_path / "identity.key"
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"\(mode {mode:o}\); run `chmod 600 {re.escape(str(path))}`"):
        load_lender_keys(tmp_path)
    path.chmod(0o600)
    load_lender_keys(tmp_path)


def test_a_missing_key_names_what_makes_it(tmp_path):
    save_lender_keys(KEYS, tmp_path)
    (tmp_path / "node.key").unlink()
    with pytest.raises(ConfigError, match=r"node\.key cannot be read .*; it is made by `fedfin client join`"):
        load_lender_keys(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        private_pem(KEYS.tls)[:-40],
        KEYS.tls.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        ),
    ],
)
def test_a_damaged_key_is_refused_without_its_content(tmp_path, content):
    save_lender_keys(KEYS, tmp_path)
    (tmp_path / "tls.key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tls\.key is no PEM private key; restore it") as caught:
        load_lender_keys(tmp_path)
    assert "BEGIN" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"), [("tls", "node"), ("tls", "identity"), ("node", "witness"), ("identity", "tls")]
)
def test_a_key_in_the_place_of_another_is_refused(tmp_path, one, other):
    save_lender_keys(KEYS, tmp_path)
    (tmp_path / f"{one}.key").write_bytes((tmp_path / f"{other}.key").read_bytes())
    with pytest.raises(ConfigError, match="of the wrong kind; restore the folder from its backup"):
        load_lender_keys(tmp_path)


def save_authority(authority, directory):
    (directory / "ca.pem").write_bytes(authority.root.public_bytes(serialization.Encoding.PEM))
    write_private(directory / "ca.key", private_pem(authority.key))
    return directory / "ca.pem", directory / "ca.key"


def test_an_authority_comes_back_as_it_was_saved(tmp_path):
    loaded = load_authority(*save_authority(AUTHORITY, tmp_path))
    assert loaded.fingerprint == AUTHORITY.fingerprint
    assert loaded.key.public_key() == AUTHORITY.key.public_key()


def test_a_damaged_root_or_another_roots_key_is_refused(tmp_path):
    root_path, key_path = save_authority(AUTHORITY, tmp_path)
    root_path.write_bytes(create_authority("other").root.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match=r"ca\.key does not hold the key of .*ca\.pem; restore both"):
        load_authority(root_path, key_path)
    root_path.write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem is no PEM certificate; restore it"):
        load_authority(root_path, key_path)
    root_path.unlink()
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be read .* made by `fedfin server init`"):
        load_authority(root_path, key_path)


# Certificates


def test_a_servers_certificate_verifies_under_the_root_for_each_of_its_hosts():
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = AUTHORITY.issue_server(key, ("fed.example", "127.0.0.1", "::1"))
    for host in (
        x509.DNSName("fed.example"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ):
        assert policy(AUTHORITY).build_server_verifier(host).verify(certificate, [])[0] == certificate
    with pytest.raises(verification.VerificationError):
        policy(AUTHORITY).build_server_verifier(x509.DNSName("evil.example")).verify(certificate, [])


def test_a_lenders_certificate_verifies_under_the_root_as_a_clients_in_its_name():
    certificate = AUTHORITY.issue_lender(request_of(KEYS.tls), "north")
    verified = policy(AUTHORITY).build_client_verifier().verify(certificate, [])
    assert list(verified.subjects) == [x509.DNSName("north")]
    assert certificate.public_key() == KEYS.tls.public_key()
    with pytest.raises(verification.VerificationError):
        policy(AUTHORITY).build_server_verifier(x509.DNSName("north")).verify(certificate, [])


def test_a_lenders_name_is_the_coordinators_word_not_the_requests():
    certificate = AUTHORITY.issue_lender(request_of(KEYS.tls, name="south"), "north")
    assert certificate.subject.rfc4514_string() == "CN=north"


def test_a_certificate_of_another_federation_does_not_verify():
    certificate = create_authority("alps").issue_lender(request_of(KEYS.tls), "north")
    with pytest.raises(verification.VerificationError):
        policy(AUTHORITY).build_client_verifier().verify(certificate, [])


def test_a_lender_cannot_issue_certificates_with_its_own():
    lender = AUTHORITY.issue_lender(request_of(KEYS.tls), "north")
    forged = CertificateAuthority(root=lender, key=KEYS.tls).issue_lender(
        request_of(ec.generate_private_key(ec.SECP256R1())), "south"
    )
    with pytest.raises(verification.VerificationError):
        policy(AUTHORITY).build_client_verifier().verify(forged, [lender])


def test_certificates_hold_now_and_for_thirty_days():
    certificate = AUTHORITY.issue_lender(request_of(KEYS.tls), "north")
    now = dt.datetime.now(dt.UTC)
    assert certificate.not_valid_before_utc < now - dt.timedelta(hours=23)
    left = certificate.not_valid_after_utc - now
    assert dt.timedelta(days=29, hours=23) < left < dt.timedelta(days=30, hours=1)


def test_the_fingerprint_is_the_sha256_of_the_root():
    encoded = AUTHORITY.root.public_bytes(serialization.Encoding.DER)
    assert AUTHORITY.fingerprint == hashlib.sha256(encoded).hexdigest()
    assert create_authority("alps").fingerprint != AUTHORITY.fingerprint


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), KEYS.identity])
def test_a_request_whose_key_is_not_p256_is_refused(key):
    signer = None if key is KEYS.identity else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, signer)
    with pytest.raises(EnrolmentError, match="the TLS key is not P-256; run `fedfin client join`"):
        AUTHORITY.issue_lender(request, "north")


def test_a_request_that_its_key_did_not_sign_is_refused():
    encoded = bytearray(request_of(KEYS.tls).public_bytes(serialization.Encoding.DER))
    encoded[-1] ^= 1
    with pytest.raises(EnrolmentError, match="not signed by its own key; run `fedfin client join` again"):
        AUTHORITY.issue_lender(x509.load_der_x509_csr(bytes(encoded)), "north")


# Signatures


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_a_signature_holds_for_its_message_only(message, other):
    for key, signature in (
        (KEYS.identity, KEYS.identity.sign(message)),
        (KEYS.node, KEYS.node.sign(message, ec.ECDSA(hashes.SHA256()))),
    ):
        verify_signature(public_pem(key.public_key()), signature, message)
        if other != message:
            with pytest.raises(EnrolmentError, match="does not hold the private key"):
                verify_signature(public_pem(key.public_key()), signature, other)


@given(st.binary(max_size=120))
def test_random_bytes_are_no_signature(signature):
    for key in (KEYS.identity, KEYS.node):
        with pytest.raises(EnrolmentError, match="does not hold the private key"):
            verify_signature(public_pem(key.public_key()), signature, b"message")


def test_a_key_of_another_kind_or_none_is_refused():
    other = rsa.generate_private_key(65537, 2048).public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(EnrolmentError, match="neither Ed25519 nor ECDSA"):
        verify_signature(pem.decode(), b"", b"message")
    unknown = base64.b64encode(bytes.fromhex("300a300506032a0304030100")).decode()
    for text in ("", "no key", f"-----BEGIN PUBLIC KEY-----\n{unknown}\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(EnrolmentError, match="does not hold the private key"):
            verify_signature(text, b"", b"message")


# Files


def test_a_public_file_replaces_the_one_before(tmp_path):
    path = tmp_path / "file"
    write_public(path, b"one")
    write_public(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_public_file_is_whole_or_not_at_all(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_public(path, b"one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os if step == "fsync" else type(path), step, full)
    with pytest.raises(
        ConfigError, match=r"file cannot be written \(No space left on device\); free the disk"
    ):
        write_public(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_mode_0600_is_never_readable_by_others_in_between(tmp_path, monkeypatch):
    seen = []
    real = os.fsync

    def watched(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", watched)
    write_public(tmp_path / "answer", b"noised counts", mode=0o600)
    write_private(tmp_path / "key", b"secret")
    assert seen == [0o600, 0o600]


def test_a_secret_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"key cannot be written \(No space left on device\)"):
        write_private(tmp_path / "key", b"secret")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder_that_does_not_exist_is_refused(tmp_path):
    for write in (write_private, write_public):
        with pytest.raises(ConfigError, match=r"file cannot be written \(No such file or directory\)"):
            write(tmp_path / "gone" / "file", b"")

"""New keys by the old one's word, certificates that renew themselves, and members that are shut out at once."""

import dataclasses
import datetime as dt
import shutil

import pytest
import rosters
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from lender_log import logged
from lenders import lender_folder
from rosters import keys_of, member

from fedfin.audit.events import Revocation, RosterVersion, Rotation
from fedfin.audit.log import AuditLog
from fedfin.audit.origins import coordinator_origin
from fedfin.audit.reading import open_log
from fedfin.client import renewing
from fedfin.client.accepted import JobFolder
from fedfin.client.folder import LenderFolder
from fedfin.client.renewing import renew_if_due, rotate
from fedfin.enrolling import CertificateAnswer, RenewalRequest, RotationRequest
from fedfin.errors import AuditError, ConfigError, EnrolmentError, LinkError
from fedfin.identity import (
    certificate_request,
    create_lender_keys,
    is_due,
    load_lender_keys,
    public_pem,
)
from fedfin.invitation import Invitation
from fedfin.roster_versions import rotation_message
from fedfin.server.admission import MemberKeys, log_rotation, revoke
from fedfin.server.founding import found, open_federation
from fedfin.server.renewal import RenewalDesk
from fedfin.server.roster import FederationStore
from fedfin.server.roster_signing import RosterBook, member_row

NAMES = ("bank-a", "bank-b", "bank-c")


class House:
    """A coordinator's desk, its store with three members and their signed roster."""

    def __init__(self, directory, keys=None, *, signed=True):
        self.keys = keys or {name: keys_of(name) for name in NAMES}
        self.store = FederationStore.create(directory / "federation.db")
        for name, own in self.keys.items():
            invitation = Invitation.create(name, "fed.example:9092", "0" * 64)
            self.store.invite(invitation)
            self.store.enrol(rosters.enrolled(name, own), invitation.secret_hash())
        if signed:
            self.store.versions.add(rosters.founded(self.keys).versions[-1])
        self.book = RosterBook(self.store, rosters.coordinator())
        self.told, self.log = [], lambda _: None
        self.desk = RenewalDesk(
            self.store,
            rosters.authority(),
            self.book,
            rosters.FEDERATION,
            self.told.append,
            log=lambda what: self.log(what),  # noqa: PLW0108  (tests put another in its place)
        )

    def row(self, name="bank-a"):
        return next(member_row(found) for found in self.store.members() if found.name == name)

    def rotate(self, new, *, old=None, name="bank-a", **changes):
        old = old or self.keys[name]
        message = rotation_message(rosters.FEDERATION, member(name, old), member(name, new))
        fields = {
            "name": name,
            "certificate_request": certificate_request(name, new.tls),
            "node_key": public_pem(new.node.public_key()),
            "identity_key": public_pem(new.identity.public_key()),
            "witness_key": public_pem(new.witness.public_key()),
            "rotation": old.identity.sign(message).hex(),
            **{key: value for key, value in changes.items() if key != "signatures"},
        }
        unsigned = RotationRequest(**fields, signatures={})
        text = unsigned.transcript()
        signatures = {
            "node": new.node.sign(text, ec.ECDSA(hashes.SHA256())).hex(),
            "identity": new.identity.sign(text).hex(),
            "witness": new.witness.sign(text).hex(),
            **changes.get("signatures", {}),
        }
        return self.desk.rotate(
            unsigned.model_copy(update={"signatures": signatures}).model_dump_json().encode()
        )

    def renew(self, keys, *, name="bank-a", signer=None):
        unsigned = RenewalRequest(
            name=name, certificate_request=certificate_request(name, keys.tls), signatures={}
        )
        signature = (signer or keys).identity.sign(unsigned.transcript()).hex()
        request = unsigned.model_copy(update={"signatures": {"identity": signature}})
        return self.desk.renew(request.model_dump_json().encode())


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture
def log(tmp_path):
    origin = coordinator_origin(rosters.FEDERATION, rosters.authority().fingerprint)
    with AuditLog.create(
        tmp_path / "audit.db",
        origin=origin,
        actor="coordinator",
        key=rosters.coordinator().key,
        side="coordinator",
    ) as made:
        yield made


# New keys


def test_new_keys_make_a_version_at_once(house):
    new = create_lender_keys()
    certificate = x509.load_pem_x509_certificate(house.rotate(new).encode())
    assert certificate.public_key() == new.tls.public_key()
    chain = house.book.chain()
    assert (chain.last.number, chain.last.members["bank-a"]) == (2, member("bank-a", new))
    chain.verify(rosters.authority().root, rosters.FEDERATION)
    assert house.book.candidate() is None
    (told,) = house.told
    assert (told.after.identity_key, told.version) == (
        public_pem(new.identity.public_key()),
        chain.versions[-1],
    )


def test_the_same_request_gets_the_same_answer(house):
    new = create_lender_keys()
    assert house.rotate(new) == house.rotate(new)
    assert len(house.store.versions.complete()) == 2


def test_new_keys_are_rotated_again(house):
    first, second = create_lender_keys(), create_lender_keys()
    house.rotate(first)
    house.rotate(second, old=first)
    house.book.chain().verify(rosters.authority().root, rosters.FEDERATION)
    assert house.row() == member("bank-a", second)


def test_before_the_first_version_new_keys_are_simply_taken(tmp_path):
    house, new = House(tmp_path, signed=False), create_lender_keys()
    house.rotate(new)
    assert (house.book.chain(), house.row()) == (None, member("bank-a", new))


def refused(house, says, act):
    before = (house.store.members(), house.store.versions.complete())
    with pytest.raises(EnrolmentError, match=says):
        act()
    assert (house.store.members(), house.store.versions.complete()) == before
    assert house.told == []


def test_new_keys_that_the_old_one_did_not_sign_are_refused(house):
    refused(
        house,
        "the signature over the new keys",
        lambda: house.rotate(create_lender_keys(), old=keys_of("bank-b")),
    )


@pytest.mark.parametrize("role", ["node", "identity", "witness"])
def test_new_keys_that_the_sender_does_not_hold_are_refused(house, role):
    new = create_lender_keys()
    forged = create_lender_keys().identity.sign(b"something else").hex()
    refused(house, "does not hold the private key", lambda: house.rotate(new, signatures={role: forged}))


@pytest.mark.parametrize("role", ["tls", "node", "identity", "witness"])
@pytest.mark.parametrize("owner", ["bank-a", "bank-b"])
def test_a_key_that_is_in_use_is_refused(house, role, owner):
    new = dataclasses.replace(create_lender_keys(), **{role: getattr(keys_of(owner), role)})
    refused(house, "in use already", lambda: house.rotate(new))


def test_a_stranger_has_no_keys_to_replace(house):
    refused(house, "not a member", lambda: house.rotate(create_lender_keys(), old=keys_of("x"), name="x"))


def test_a_member_that_the_roster_has_with_other_keys_waits_for_the_members_word(house):
    """It was removed and enrolled anew: until its members sign that, its new keys vouch for nothing."""
    house.store.remove("bank-a")
    invitation = Invitation.create("bank-a", "fed.example:9092", "0" * 64)
    house.store.invite(invitation)
    anew = create_lender_keys()
    house.store.enrol(rosters.enrolled("bank-a", anew), invitation.secret_hash())
    refused(house, "members must sign", lambda: house.rotate(create_lender_keys(), old=anew))


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b'{"name": "bank-a"}'])
def test_a_body_that_is_no_request_is_refused(house, body):
    refused(house, "malformed", lambda: house.desk.rotate(body))
    refused(house, "malformed", lambda: house.desk.renew(body))


def test_a_rotation_is_logged_with_the_old_keys_signature(house, log, tmp_path):
    house.rotate(create_lender_keys())
    log_rotation(log, house.told[0])
    rotations = logged(tmp_path, Rotation)
    assert [event.key for event in rotations] == ["identity", "witness", "node", "tls"]
    assert [event.proof for event in rotations] == [house.told[0].proof, None, None, None]
    (version,) = logged(tmp_path, RosterVersion)
    assert (version.action, version.number, version.changed) == ("signed", 2, ("bank-a",))


def test_new_keys_that_cannot_be_logged_do_not_count(house):
    def full(_):
        raise AuditError("the disk is full")

    new, before = create_lender_keys(), house.row()
    house.log = full
    with pytest.raises(AuditError, match="the disk is full"):
        house.rotate(new)
    assert (house.row(), house.told) == (before, [])
    assert house.book.chain().last.number == 1
    logged_rotations = []
    house.log = logged_rotations.append
    house.rotate(new)
    assert logged_rotations == house.told
    assert house.row() == member("bank-a", new)


# Certificates


def test_a_certificate_is_renewed_for_the_same_key(house):
    keys = keys_of("bank-a")
    renewed = x509.load_pem_x509_certificate(house.renew(keys).encode())
    assert renewed.public_key() == keys.tls.public_key()
    assert renewed.not_valid_after_utc - dt.datetime.now(dt.UTC) > dt.timedelta(days=29)
    assert house.row() == member("bank-a")  # the roster is as it was
    assert house.book.candidate() is None


def test_a_certificate_that_is_not_the_senders_is_refused(house):
    other = create_lender_keys()
    refused(house, "does not hold", lambda: house.renew(keys_of("bank-a"), signer=keys_of("bank-b")))
    refused(house, "another key", lambda: house.renew(dataclasses.replace(keys_of("bank-a"), tls=other.tls)))
    house.store.remove("bank-a")
    refused(house, "not a member", lambda: house.renew(keys_of("bank-a")))


def days_left(monkeypatch, days):
    monkeypatch.setattr("fedfin.identity.LEAF_DAYS", days)


def test_a_certificate_is_due_ten_days_before_its_end(monkeypatch):
    for days, due in ((30, False), (11, False), (9, True)):
        days_left(monkeypatch, days)
        certificate = x509.load_pem_x509_certificate(
            rosters.enrolled(f"due-{days}", create_lender_keys()).certificate.encode()
        )
        assert is_due(certificate) == due


def test_the_servers_certificate_is_renewed_at_its_start(tmp_path, monkeypatch):
    days_left(monkeypatch, 9)
    federation = found(tmp_path / "f", name="coop", address="fed.example:9443", schema_text="c", job={})
    before = x509.load_pem_x509_certificate(federation.server_certificate_path.read_bytes())
    monkeypatch.setattr("fedfin.identity.LEAF_DAYS", 30)
    open_federation(federation.config_path)
    after = x509.load_pem_x509_certificate(federation.server_certificate_path.read_bytes())
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert after.public_key() == before.public_key()
    names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example", "localhost"]
    open_federation(federation.config_path)  # not due any more
    assert x509.load_pem_x509_certificate(federation.server_certificate_path.read_bytes()) == after


# The lender's side


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """A lender's folder whose requests reach a desk in this process."""
    folder = LenderFolder(lender_folder(tmp_path / "bank-a", name="bank-a", num_loans=60))
    house = House(tmp_path, {"bank-a": folder.keys(), "bank-b": keys_of("bank-b")})
    (folder.directory / "certificate.pem").write_text(house.store.members()[0].certificate)

    def post(address, root_pem, path, body, answer):
        act = {"/v1/enrol/rotate": house.desk.rotate, "/v1/enrol/renew": house.desk.renew}[path]
        return answer(certificate=act(body.model_dump_json().encode()))

    monkeypatch.setattr(renewing, "post", post)
    folder.house = house
    return folder


def check_log(bank):
    """Each entry is signed by the key of its time, and the last of them is the lender's key now."""
    with open_log(bank.journal.path) as log:
        signers = log.signers()
        assert log.public_key == bank.keys().identity.public_key()
        for number, entry in log.entries():
            key = next(key for start, key in reversed(signers) if start <= number)
            entry.verify(key, log.origin)


def test_a_lender_rotates_its_keys_and_its_log_goes_on_under_the_new_one(bank):
    before = bank.keys()
    salt = bank.salt()
    bank.journal.write(RosterVersion(action="pinned", number=1, digest="0" * 64, num_members=1))
    rotate(bank)
    after = bank.keys()
    assert bank.house.row() == member("bank-a", after)
    assert after.identity.public_key() != before.identity.public_key()
    assert bank.salt() == salt
    assert not (bank.directory / "keys.old").exists()
    bank.journal.write(RosterVersion(action="pinned", number=2, digest="0" * 64, num_members=1))
    bank.journal.close()
    check_log(bank)
    assert [event.key for event in logged(bank.directory, Rotation)] == ["identity"]


@pytest.mark.parametrize("step", ["post", "_sign_over", "_replace"])
def test_a_rotation_that_was_killed_is_run_again_and_goes_on(bank, monkeypatch, step):
    real = getattr(renewing, step)

    def killed_after(*args):
        if step != "_replace":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(renewing, step, killed_after)
    with pytest.raises(KeyboardInterrupt):
        rotate(bank)
    monkeypatch.setattr(renewing, step, real)
    rotate(bank)
    assert bank.house.row() == member("bank-a", bank.keys())
    assert len(bank.house.store.versions.complete()) == 2
    bank.journal.close()
    check_log(bank)


def test_a_rotation_killed_between_the_two_renames_goes_on(bank):
    shutil.copytree(bank.directory / "keys", bank.directory / "keys.new")
    (bank.directory / "keys").rename(bank.directory / "keys.old")
    rotate(bank)
    assert bank.house.row() == member("bank-a", bank.keys())


def test_a_rotation_that_is_refused_leaves_the_old_keys(bank):
    before = load_lender_keys(bank.directory / "keys").identity.public_key()
    bank.house.store.remove("bank-a")
    with pytest.raises(EnrolmentError, match="not a member"):
        rotate(bank)
    assert bank.keys().identity.public_key() == before
    assert not (bank.directory / "keys.new").exists()


def test_a_lender_that_serves_or_has_an_open_job_does_not_rotate(bank):
    with bank.lock(), pytest.raises(ConfigError, match="stop it first"):
        rotate(bank)
    bank.job("credit-1").accept(job="credit-1", plan='{"privacy": {"mode": "none"}}')
    with pytest.raises(ConfigError, match="--leave-jobs"):
        rotate(bank)
    rotate(bank, leave_jobs=True)
    assert isinstance(bank.job("credit-1"), JobFolder)
    assert bank.house.row() == member("bank-a", bank.keys())


def test_a_lender_renews_its_certificate_when_it_is_due_and_not_before(bank, monkeypatch):
    said = []
    assert not renew_if_due(bank, said.append)
    monkeypatch.setattr("fedfin.client.renewing.is_due", lambda _: True)
    assert renew_if_due(bank, said.append)
    assert said == ["this lender's certificate was renewed"]
    assert (bank.directory / "certificate.pem").read_text() == bank.house.store.members()[0].certificate


def test_a_certificate_for_another_key_is_not_kept(bank, monkeypatch):
    other = rosters.enrolled("bank-b").certificate
    monkeypatch.setattr(renewing, "post", lambda *_: CertificateAnswer(certificate=other))
    monkeypatch.setattr("fedfin.client.renewing.is_due", lambda _: True)
    before = (bank.directory / "certificate.pem").read_text()
    for act in (lambda: renew_if_due(bank, print), lambda: rotate(bank)):
        with pytest.raises(EnrolmentError, match="another key"):
            act()
    assert (bank.directory / "certificate.pem").read_text() == before


# Who is let in


def shown_by(name, keys=None):
    """The node key and the certificate that a lender's connection shows."""
    row = rosters.enrolled(name, keys or keys_of(name))
    certificate = x509.load_pem_x509_certificate(row.certificate.encode())
    return row.node_key.encode(), certificate.public_bytes(serialization.Encoding.DER)


def test_a_node_is_let_in_with_its_own_certificate_only(house):
    keys = MemberKeys(house.store, lambda one: one.node_key.encode())
    node, shown = shown_by("bank-a")
    _, of_another = shown_by("bank-b")
    _, of_earlier_keys = shown_by("bank-a", create_lender_keys())
    assert keys.knows(node, shown)
    for certificate in (b"", of_another, of_earlier_keys):
        assert not keys.knows(node, certificate)
    for key in (b"", shown_by("bank-x")[0]):
        assert not keys.knows(key, shown)


def test_a_removed_member_is_shut_out_at_once(house, log, tmp_path, monkeypatch):
    keys = MemberKeys(house.store, lambda one: one.node_key.encode())
    monkeypatch.setattr("fedfin.server.admission._FRESH_S", 0.0)
    node, shown = shown_by("bank-a")
    assert keys.knows(node, shown)
    revoke(house.store, log, "bank-a", "its keys were stolen")
    assert not keys.knows(node, shown)
    (event,) = logged(tmp_path, Revocation)
    assert (event.member, event.reason) == ("bank-a", "its keys were stolen")
    # the next version leaves it out, and says whose word that needs
    assert list(house.book.candidate().last.members) == ["bank-b", "bank-c"]
    assert house.book.candidate().missing().names == ("bank-b", "bank-c")


def test_a_stranger_is_not_removed_and_nothing_is_logged(house, log, tmp_path):
    with pytest.raises(EnrolmentError, match="not enrolled"):
        revoke(house.store, log, "bank-x", "never here")
    assert logged(tmp_path, Revocation) == []


def test_nobody_is_let_in_when_the_members_cannot_be_read(house, tmp_path):
    keys = MemberKeys(house.store, lambda one: one.node_key.encode())
    (tmp_path / "federation.db").write_bytes(b"no database" * 1000)
    with pytest.raises(LinkError):
        keys.knows(*shown_by("bank-a"))

"""The roster that a lender goes by: what its engineer signed, and what a quorum of members signed to follow on it."""

import json
from dataclasses import replace

import pytest
import rosters
from lender_log import logged
from rosters import chain, founded, keys_of, signed, version
from secure_lenders import NAMES, Cohort, chain_of, refusal_of, secure_plan, write_folders
from typer.testing import CliRunner

from fedfin.audit.events import Approval, Refusal, RosterVersion
from fedfin.cli import app
from fedfin.client.approving import approve
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import accept_chain, own_row, pending, pinned, show_roster
from fedfin.client.status import status_of
from fedfin.errors import ConfigError, LinkError, NotYetError, ProtocolRefusalError
from fedfin.identity import create_authority, create_lender_keys
from fedfin.roster import Roster
from fedfin.roster_versions import sign_version
from fedfin.update import Accepted, RosterSigned, ShowRoster, decode, encode

OTHERS = ("bank-b", "bank-c", "bank-d")


class Bank:
    """The lender bank-a, its keys, and the rosters it is in."""

    def __init__(self, directory):
        self.folder = LenderFolder(write_folders(directory, ("bank-a",))["bank-a"])
        self.keys = self.folder.keys()
        self.own = own_row("bank-a", self.keys)

    def all(self, *names):
        return {name: keys_of(name) for name in names} | {"bank-a": self.keys}

    def founded(self):
        return founded(self.all(*OTHERS))

    def after(self, before, names, signers):
        """The chain with a version of these members more, signed by these."""
        made = version(self.all(*names), before.last)
        return chain(*before.versions, signed(made, {name: self.all(*signers)[name] for name in signers}))

    def accept(self, offered):
        accept_chain(self.folder, offered.to_json(), self.own)
        self.folder.journal.flush()

    def show(self, offered):
        return show_roster(self.folder, offered.to_json(), self.own)

    def pin(self, offered):
        rosters.pin(self.folder.directory, offered)
        return offered

    def refuses(self, rule, offered, says=": "):
        before = pinned(self.folder)
        with pytest.raises(ProtocolRefusalError, match=says) as refused:
            self.accept(offered)
        assert refused.value.rule == rule
        assert pinned(self.folder) == before

    def logged(self, kind):
        return logged(self.folder.directory, kind)


@pytest.fixture
def bank(tmp_path):
    return Bank(tmp_path)


def client(folder, *words, text=None):
    shown = CliRunner().invoke(
        app, ["client", *words, "--config", str(folder.config_path)], input=text, env={"COLUMNS": "200"}
    )
    return shown.exit_code, " ".join(shown.output.split())


# The first version


def test_a_first_version_waits_for_the_engineer_and_is_signed_then(bank):
    unsigned = chain(signed(version(bank.all(*OTHERS)), ()))
    with pytest.raises(NotYetError, match="approve-roster") as waits:
        bank.show(unsigned)
    assert waits.value.waits == "approval"
    approve(bank.folder, pending(bank.folder))
    signature = bank.show(unsigned)
    assert signature == sign_version(unsigned.last, bank.keys.identity)
    (approval,) = bank.logged(Approval)
    assert (approval.subject, approval.digest) == ("roster", unsigned.last.digest())
    assert pinned(bank.folder) is None  # it is not complete yet


def test_a_version_that_all_signed_is_pinned_by_who_approved_it(bank):
    whole = bank.founded()
    bank.refuses("roster_changed", whole, "approved none")
    approve(bank.folder, pending(bank.folder))
    bank.accept(whole)
    assert pinned(bank.folder) == whole.last
    assert pending(bank.folder) is None
    event = bank.logged(RosterVersion)[-1]
    assert (event.action, event.number, event.digest) == ("pinned", 1, whole.last.digest())
    assert event.added == ("bank-a", *OTHERS)
    bank.accept(whole)  # again, and nothing is logged again
    assert len([one for one in bank.logged(RosterVersion) if one.action == "pinned"]) == 1


def test_an_approval_is_of_the_version_that_was_shown_and_no_other(bank):
    first = chain(signed(version(bank.all(*OTHERS)), ()))
    with pytest.raises(NotYetError):
        bank.show(first)
    approve(bank.folder, pending(bank.folder))
    with pytest.raises(NotYetError):
        bank.show(chain(signed(version(bank.all(*OTHERS, "bank-x")), ())))
    assert pending(bank.folder).signature == ""


def test_a_first_version_that_a_member_did_not_sign_is_refused(bank):
    made = version(bank.all(*OTHERS))
    approve_it = chain(signed(made, ()))
    with pytest.raises(NotYetError):
        bank.show(approve_it)
    approve(bank.folder, pending(bank.folder))
    some = {name: bank.all(*OTHERS)[name] for name in ("bank-a", "bank-b", "bank-c")}
    bank.refuses("roster_quorum", chain(signed(made, some)), "bank-d did not sign")


# Later versions


def test_what_a_quorum_signed_is_followed_without_this_lenders_word_and_logged(bank):
    first = bank.pin(bank.founded())
    second = bank.after(first, (*OTHERS, "bank-x"), (*OTHERS, "bank-x"))
    bank.accept(second)
    assert pinned(bank.folder) == second.last
    assert bank.logged(Approval) == []
    event = bank.logged(RosterVersion)[-1]
    assert (event.action, event.number, event.added) == ("pinned", 2, ("bank-x",))
    assert event.signed_by == (*OTHERS, "bank-x")


def test_an_invented_lender_is_refused(bank):
    first = bank.pin(bank.founded())
    bank.refuses("roster_quorum", bank.after(first, (*OTHERS, "invented"), ("invented",)), "3 more")


def test_a_removed_quorum_is_refused(bank):
    """All but this lender and one that colludes are removed, and only those two would have to sign."""
    first = bank.pin(bank.founded())
    bank.refuses("roster_quorum", bank.after(first, ("bank-b", "invented"), ("bank-b", "invented")))


def test_several_versions_are_followed_at_once(bank):
    first = bank.pin(bank.founded())
    second = bank.after(first, (*OTHERS, "bank-x"), (*OTHERS, "bank-x"))
    third = bank.after(second, ("bank-b", "bank-c", "bank-x"), ("bank-b", "bank-c", "bank-x", "bank-d"))
    bank.accept(third)
    assert pinned(bank.folder) == third.last
    assert bank.logged(RosterVersion)[-1].removed == ("bank-d",)


def test_another_history_than_the_pinned_one_is_refused(bank):
    bank.pin(bank.founded())
    other = founded(bank.all("bank-b", "bank-c"))
    bank.refuses("roster_changed", other, "different rosters to different members")


def test_an_older_version_than_the_pinned_one_is_refused(bank):
    first = bank.founded()
    bank.pin(bank.after(first, (*OTHERS, "bank-x"), (*OTHERS, "bank-x")))
    bank.refuses("roster_changed", first)


def test_a_newcomer_goes_by_the_version_that_it_signed(bank):
    before = founded(OTHERS)
    asked = bank.after(before, OTHERS, ())
    with pytest.raises(NotYetError):
        bank.show(asked)
    approve(bank.folder, pending(bank.folder))
    entered = bank.after(before, OTHERS, (*OTHERS, "bank-a"))
    followed = bank.after(entered, (*OTHERS, "bank-x"), (*OTHERS, "bank-x"))
    bank.accept(followed)
    assert pinned(bank.folder) == followed.last


# This lender's own keys and the coordinator's


@pytest.mark.parametrize("stated", ["without it", "with another key", "with another witness key"])
def test_a_roster_without_this_lenders_own_keys_is_refused_and_not_shown(bank, stated):
    other = create_lender_keys()
    keys = {
        "without it": {name: keys_of(name) for name in OTHERS},
        "with another key": bank.all(*OTHERS) | {"bank-a": other},
        "with another witness key": bank.all(*OTHERS) | {"bank-a": replace(bank.keys, witness=other.witness)},
    }[stated]
    bank.refuses("membership", founded(keys))
    with pytest.raises(ProtocolRefusalError):
        bank.show(founded(keys))
    assert pending(bank.folder) is None


def test_the_coordinators_key_is_pinned_where_it_was_not(bank):
    bank.pin(bank.founded())
    bank.folder.statement_path.unlink()
    bank.accept(bank.founded())
    assert bank.folder.coordinator() == rosters.coordinator().statement


@pytest.mark.parametrize("signed_by", ["the federation's authority", "another authority"])
def test_another_coordinators_key_is_refused(bank, signed_by):
    bank.pin(bank.founded())
    authority = rosters.authority() if signed_by.startswith("the") else create_authority(rosters.FEDERATION)
    key = create_lender_keys().identity
    statement = type(rosters.coordinator().statement).make(authority, rosters.FEDERATION, key.public_key())
    made = version(bank.all(*OTHERS), coordinator=statement.key)
    forged = replace(
        chain(signed(made, bank.all(*OTHERS), by=key)),
        statement=statement,
    )
    bank.refuses("coordinator_key", forged)


def test_text_that_is_no_chain_is_refused(bank):
    with pytest.raises(LinkError):
        accept_chain(bank.folder, "{}", bank.own)


# What is kept


@pytest.mark.parametrize("file", ["roster.json", "roster.proposed.json", "roster.approved.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"members":[]}'])
def test_a_damaged_file_stops_secure_sums_until_it_is_restored(bank, file, content):
    if file == "roster.approved.json":
        with pytest.raises(NotYetError):
            bank.show(bank.founded())
    (bank.folder.directory / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} is damaged"):
        status_of(bank.folder.config_path)
    if file != "roster.proposed.json":
        with pytest.raises(ConfigError, match="restore it"):
            bank.accept(bank.founded())


def test_a_pinned_roster_that_is_gone_is_known_from_the_log(bank):
    """Else a coordinator could lead this lender from an earlier approved version into another history."""
    first = bank.founded()
    bank.refuses("roster_changed", first)
    approve(bank.folder, pending(bank.folder))
    bank.accept(first)
    names = ("bank-a", *OTHERS)
    true = bank.after(first, (*names, "bank-e"), (*OTHERS, "bank-e"))
    false = bank.after(first, (*names, "bank-f"), (*OTHERS, "bank-f"))
    bank.accept(true)
    bank.folder.roster_path.unlink()
    for other in (false, first):
        with pytest.raises(ProtocolRefusalError, match="does not have version 2"):
            bank.accept(other)
        with pytest.raises(ProtocolRefusalError, match="does not have version 2"):
            bank.show(other)
    bank.accept(true)
    assert pinned(bank.folder) == true.last


def test_a_roster_that_nobody_signed_vouches_for_nothing(bank):
    """As an earlier release pinned it: the first signed version is approved whole."""
    bank.folder.roster_path.write_text(bank.founded().last.roster().to_json())
    assert pinned(bank.folder) is None
    bank.refuses("roster_changed", bank.founded())


# The engineer's commands


def test_the_engineer_looks_approves_and_the_lender_takes_part(tmp_path):
    banks = write_folders(tmp_path, NAMES)
    job = Cohort(banks, secure_plan("local"))
    folder, lender = LenderFolder(banks["bank-a"]), job.lenders["bank-a"]
    folder.roster_path.unlink()  # as a founder that has signed nothing yet
    show = ShowRoster(job.job, job.chain.to_json())
    assert "waits for this lender's engineer" in refusal_of(lender, show)
    assert refusal_of(lender, job.proposal()).startswith("roster_changed: ")
    assert [event.rule for event in logged(folder.directory, Refusal)] == ["NotYetError", "roster_changed"]

    status, shown = client(folder, "status")
    assert status == 0
    assert job.chain.last.digest() in shown  # whole: it is compared by telephone
    assert "approve-roster" in shown
    status, shown = client(folder, "approve-roster", text="n\n")
    assert status == 1
    assert job.roster.fingerprints()["bank-b"][:32] in shown
    assert "added" in shown
    assert client(folder, "approve-roster", text="")[0] == 1
    document = json.loads(client(folder, "approve-roster", "--json")[1])
    assert (document["approved"], document["pending"]["added"]) == (False, list(NAMES))
    assert "waits for this lender's engineer" in refusal_of(lender, show)

    assert client(folder, "approve-roster", text="y\n")[0] == 0
    assert "approved already" in client(folder, "approve-roster")[1]
    assert decode(lender.answer(encode(show)), RosterSigned).signature
    assert decode(lender.answer(encode(job.proposal())), Accepted)
    assert status_of(banks["bank-a"])["roster"] == {
        "pinned": {"number": 1, "digest": job.chain.last.digest(), "members": job.roster.fingerprints()},
        "pending": None,
    }
    assert client(folder, "approve-roster") == (0, "no version of the roster waits for approval")


def test_one_member_is_approved_by_its_name(bank):
    first = bank.pin(bank.founded())
    with pytest.raises(NotYetError):
        bank.show(bank.after(first, (*OTHERS, "bank-x"), ()))
    status, shown = client(bank.folder, "approve-member", "bank-y", "--yes")
    assert status == 1
    assert "changes bank-x, and not bank-y alone" in shown
    status, shown = client(bank.folder, "approve-member", "bank-x", "--yes")
    assert status == 0
    assert rosters.member("bank-x").fingerprint[:32] in shown
    (approval,) = bank.logged(Approval)
    assert (approval.subject, approval.member) == ("member", "bank-x")
    assert bank.show(bank.after(first, (*OTHERS, "bank-x"), ()))


def test_a_member_is_not_approved_by_its_name_where_more_differs(bank):
    first = bank.pin(bank.founded())
    with pytest.raises(NotYetError):
        bank.show(bank.after(first, ("bank-b", "bank-c", "bank-x"), ()))
    status, shown = client(bank.folder, "approve-member", "bank-x", "--yes")
    assert status == 1
    assert "changes bank-d, bank-x, and not bank-x alone" in shown
    assert bank.logged(Approval) == []


def test_a_first_roster_is_approved_whole(bank):
    assert "no version of the roster waits" in client(bank.folder, "approve-member", "bank-b")[1]
    with pytest.raises(NotYetError):
        bank.show(bank.founded())
    status, shown = client(bank.folder, "approve-member", "bank-b", "--yes")
    assert status == 1
    assert "approve-roster" in shown


def test_a_changed_key_is_shown_with_the_key_before(bank):
    first = bank.pin(bank.founded())
    new = create_lender_keys()
    made = version(bank.all(*OTHERS) | {"bank-b": new}, first.last)
    with pytest.raises(NotYetError):
        bank.show(chain(*first.versions, signed(made, ())))
    _, shown = client(bank.folder, "approve-roster", "--yes")
    assert "KEY CHANGED" in shown
    assert rosters.member("bank-b").fingerprint[:32] in shown
    assert "ask bank-b itself" in shown


def test_a_folder_with_other_keys_than_the_roster_signs_nothing(bank):
    with pytest.raises(NotYetError):
        bank.show(bank.founded())
    change = pending(bank.folder)
    made = version(bank.all(*OTHERS) | {"bank-a": create_lender_keys()})
    with pytest.raises(ConfigError, match="keys of this folder"):
        approve(bank.folder, replace(change, chain=chain(signed(made, ()))))
    assert bank.logged(Approval) == []


# In a job


def test_a_job_goes_on_with_the_roster_it_was_accepted_with(tmp_path):
    banks = write_folders(tmp_path, NAMES)
    job = Cohort(banks, secure_plan("none")).accept()
    keys = {name: LenderFolder(bank).keys() for name, bank in banks.items()}
    newcomer = rosters.followed(job.chain, keys | {"bank-g": keys_of("bank-g")})
    lender = job.lenders["bank-a"]
    assert refusal_of(lender, job.proposal(newcomer)).startswith("roster_changed: ")
    job.start(job.bins_question()).whole()


def test_a_roster_smaller_than_the_quorum_is_refused(tmp_path):
    banks = write_folders(tmp_path, NAMES[:4])
    job = Cohort(banks, secure_plan("local"))
    folder = LenderFolder(banks["bank-a"])
    folder.roster_path.unlink()
    assert "the roster has 4 members, and cohort.min_lenders is 5" in refusal_of(
        job.lenders["bank-a"], job.proposal()
    )
    # it came too early: the roster of all is none that changed
    assert pinned(folder) is None


def test_noise_that_stands_against_fewer_colluders_than_the_masks_is_refused(tmp_path):
    plan = secure_plan("shared", privacy={"mode": "shared", "epsilon": 2.0, "planned_dropouts": 1})
    banks = write_folders(tmp_path, NAMES)
    reason = refusal_of(Cohort(banks, plan).lenders["bank-a"], Cohort(banks, plan).proposal())
    assert reason.startswith(
        "privacy.planned_colluders is 0, and this lender wants noise that stands against 1 of 6"
    )


def test_the_unsigned_roster_of_a_sum_is_that_of_the_version(tmp_path):
    banks = write_folders(tmp_path, NAMES)
    of = chain_of(banks)
    assert isinstance(of.last.roster(), Roster)
    assert list(of.last.roster().keys) == list(NAMES)

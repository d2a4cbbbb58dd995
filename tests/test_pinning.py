"""The roster that a lender goes by: the first one it saw, until its engineer approves another."""

import json

import pytest
from secure_lenders import NAMES, Cohort, refusal_of, secure_plan, write_folders
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import accept_roster, pending, pinned
from fedfin.client.status import status_of
from fedfin.errors import ConfigError, LinkError, ProtocolRefusalError
from fedfin.identity import create_lender_keys, public_pem
from fedfin.roster import Roster
from fedfin.update import Accepted, decode, encode


def new_key():
    return public_pem(create_lender_keys().identity.public_key())


@pytest.fixture
def folder(tmp_path):
    banks = write_folders(tmp_path, ("bank-a",))
    return LenderFolder(banks["bank-a"])


@pytest.fixture
def own(folder):
    return public_pem(folder.keys().identity.public_key())


def events(folder):
    return [json.loads(line)["event"] for line in (folder.directory / "log.jsonl").read_text().splitlines()]


def client(folder, *words, text=None):
    shown = CliRunner().invoke(
        app, ["client", *words, "--config", str(folder.config_path)], input=text, env={"COLUMNS": "200"}
    )
    return shown.exit_code, " ".join(shown.output.split())


def test_the_first_roster_is_pinned_and_stays(folder, own):
    first = Roster.of({"bank-a": own, "bank-b": new_key()})
    assert pinned(folder) is None
    assert accept_roster(folder, first.to_json(), own) == first == pinned(folder)
    assert accept_roster(folder, first.to_json(), own) == first
    assert events(folder) == ["roster_pinned"]
    assert pending(folder) is None


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_another_roster_is_refused_and_kept_to_be_looked_at(folder, own, change):
    members = {"bank-a": own, "bank-b": new_key(), "bank-c": new_key()}
    accept_roster(folder, Roster.of(members).to_json(), own)
    others = {
        "added": {**members, "bank-d": new_key()},
        "removed": {name: members[name] for name in ("bank-a", "bank-b")},
        "changed": {**members, "bank-b": new_key()},
    }[change]
    with pytest.raises(ProtocolRefusalError, match="approve-roster") as refused:
        accept_roster(folder, Roster.of(others).to_json(), own)
    assert refused.value.rule == "roster_changed"
    assert pinned(folder) == Roster.of(members)
    seen = pending(folder)
    assert seen.proposed == Roster.of(others)
    named = {"added": ("bank-d",), "removed": ("bank-c",), "changed": ("bank-b",)}
    for kind, names in named.items():
        assert getattr(seen, kind) == (names if kind == change else ())


def test_what_is_not_stated_any_more_does_not_wait_any_more(folder, own):
    first = Roster.of({"bank-a": own, "bank-b": new_key()})
    accept_roster(folder, first.to_json(), own)
    with pytest.raises(ProtocolRefusalError):
        accept_roster(folder, Roster.of({"bank-a": own}).to_json(), own)
    accept_roster(folder, first.to_json(), own)
    assert pending(folder) is None


@pytest.mark.parametrize("members", ["without it", "with another key"])
def test_a_roster_without_this_lenders_own_key_is_refused_and_never_pinned(folder, own, members):
    stated = {"without it": {"bank-b": new_key()}, "with another key": {"bank-a": new_key()}}[members]
    with pytest.raises(ProtocolRefusalError) as refused:
        accept_roster(folder, Roster.of(stated).to_json(), own)
    assert refused.value.rule == "membership"
    assert (pinned(folder), pending(folder)) == (None, None)


def test_text_that_is_no_roster_is_refused(folder, own):
    with pytest.raises(LinkError):
        accept_roster(folder, "{}", own)


@pytest.mark.parametrize("file", ["roster.json", "roster.proposed.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"members":[]}'])
def test_a_damaged_file_stops_secure_sums_until_it_is_restored(folder, own, file, content):
    (folder.directory / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} is damaged"):
        status_of(folder.config_path)
    if file == "roster.json":
        with pytest.raises(ConfigError, match="restore it"):
            accept_roster(folder, Roster.of({"bank-a": own}).to_json(), own)


def test_the_engineer_looks_approves_and_the_lender_takes_part(tmp_path):
    banks = write_folders(tmp_path, NAMES)
    job = Cohort(banks, secure_plan("local")).accept()
    folder, lender = LenderFolder(banks["bank-a"]), job.lenders["bank-a"]
    newcomer = Roster.of({**job.roster.keys, "bank-g": new_key()})
    job.job = "secure-5678"
    assert refusal_of(lender, job.proposal(newcomer)).startswith("roster_changed: ")
    last = json.loads((folder.directory / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["rule"]) == ("refused", "roster_changed")

    status, shown = client(folder, "status")
    assert status == 0
    assert job.roster.digest() in shown  # whole: it is compared by telephone
    assert newcomer.digest() in shown
    assert "approve-roster" in shown
    status, shown = client(folder, "approve-roster", text="n\n")
    assert status == 1
    assert newcomer.digest() in shown
    assert newcomer.fingerprints()["bank-g"][:32] in shown
    assert "bank-g" in shown
    assert "added" in shown
    status, _ = client(folder, "approve-roster", text="")
    assert status == 1
    assert client(folder, "approve-roster", "--json")[0] == 0
    assert pinned(folder) == job.roster

    status, shown = client(folder, "approve-roster", text="y\n")
    assert status == 0
    assert pinned(folder) == newcomer
    assert decode(lender.answer(encode(job.proposal(newcomer))), Accepted)
    assert status_of(banks["bank-a"])["roster"] == {
        "pinned": {"digest": newcomer.digest(), "members": newcomer.fingerprints()},
        "pending": None,
    }
    assert client(folder, "approve-roster") == (0, "no roster waits for approval")


def test_a_changed_key_is_shown_with_the_key_before(folder, own):
    before, now = new_key(), new_key()
    first, second = (Roster.of({"bank-a": own, "bank-b": key}) for key in (before, now))
    accept_roster(folder, first.to_json(), own)
    with pytest.raises(ProtocolRefusalError):
        accept_roster(folder, second.to_json(), own)
    _, shown = client(folder, "approve-roster", "--yes")
    assert "KEY CHANGED" in shown
    assert first.fingerprints()["bank-b"][:32] in shown
    assert "ask bank-b itself" in shown
    assert pinned(folder) == second
    assert events(folder)[-1] == "roster_approved"


def test_approving_with_json_says_what_was_approved(folder, own):
    accept_roster(folder, Roster.of({"bank-a": own}).to_json(), own)
    assert json.loads(client(folder, "approve-roster", "--json")[1]) == {"pending": None, "approved": False}
    both = Roster.of({"bank-a": own, "bank-b": new_key()})
    with pytest.raises(ProtocolRefusalError):
        accept_roster(folder, both.to_json(), own)
    document = json.loads(client(folder, "approve-roster", "--json", "--yes")[1])
    assert (document["approved"], document["pending"]["added"]) == (True, ["bank-b"])
    assert pinned(folder) == both


def test_a_job_goes_on_with_the_roster_it_was_accepted_with(tmp_path):
    banks = write_folders(tmp_path, NAMES)
    job = Cohort(banks, secure_plan("none")).accept()
    newcomer = Roster.of({**job.roster.keys, "bank-g": new_key()})
    lender = job.lenders["bank-a"]
    assert refusal_of(lender, job.proposal(newcomer)).startswith("roster_changed: ")
    job.start(job.bins_question()).whole()


def test_a_roster_smaller_than_the_quorum_is_refused(tmp_path):
    banks = write_folders(tmp_path, NAMES[:4])
    job = Cohort(banks, secure_plan("local"))
    assert "the roster has 4 members, and cohort.min_lenders is 5" in refusal_of(
        job.lenders["bank-a"], job.proposal()
    )
    # it came too early: the roster of all is none that changed
    assert pinned(LenderFolder(banks["bank-a"])) is None


def test_noise_that_stands_against_fewer_colluders_than_the_masks_is_refused(tmp_path):
    plan = secure_plan("shared", privacy={"mode": "shared", "epsilon": 2.0, "planned_dropouts": 1})
    banks = write_folders(tmp_path, NAMES)
    reason = refusal_of(Cohort(banks, plan).lenders["bank-a"], Cohort(banks, plan).proposal())
    assert reason.startswith(
        "privacy.planned_colluders is 0, and this lender wants noise that stands against 1 of 6"
    )
    assert pinned(LenderFolder(banks["bank-a"])) is None

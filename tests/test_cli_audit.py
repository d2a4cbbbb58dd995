"""`fedfin audit` and `fedfin report` at the command line: what they print, write, log and refuse."""

import json

import pytest
from evidence_house import JOB, MEMBERS, PLAN, federation_log, run_directory
from lenders import lender_folder
from rosters import authority, coordinator, founded
from typer.testing import CliRunner

from fedfin.audit import retention
from fedfin.audit.access import record
from fedfin.audit.events import Policy, Service
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.cli import app
from fedfin.client.folder import LenderFolder
from fedfin.errors import AuditError
from fedfin.identity import create_identity_key, key_fingerprint, private_pem

OWNER = founded(MEMBERS).statement.fingerprint


def run_command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def in_json(*words, code=0):
    return json.loads(run_command(*words, "--json", code=code))


@pytest.fixture
def fed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return federation_log(tmp_path / "fed")


def types_of(fed):
    with open_log(fed / "audit.db") as log:
        return [entry.event.type for _, entry in log.entries() if entry is not None]


def test_verify_says_what_it_checked_who_cosigned_and_what_to_do(fed, tmp_path):
    run = run_directory(tmp_path, fed)
    said = run_command("audit", "verify", run, "--trust", authority().fingerprint.upper())
    assert "cosigned up to entry" in said
    assert ", ".join(MEMBERS) in said
    assert said.endswith("nothing is wrong\n")
    (run / "audit.db").unlink()
    said = run_command("audit", "verify", run, code=1)
    assert "WRONG (manifest.json): the file audit.db is missing" in said
    assert "ask for it" in said


def test_verify_changes_nothing(fed):
    before = {path: path.read_bytes() for path in fed.rglob("*") if path.is_file()}
    run_command("audit", "verify", fed)
    assert {path: path.read_bytes() for path in fed.rglob("*") if path.is_file()} == before


def test_verify_says_that_nothing_was_trusted(fed):
    assert any("to trust" in note for note in in_json("audit", "verify", fed)["notes"])


def test_wrong_usage_is_told_from_wrong_evidence(fed, tmp_path):
    assert "no fingerprint" in run_command("audit", "verify", fed, "--trust", "abc", code=2)
    (tmp_path / "empty").mkdir()
    assert "holds no log" in in_json("audit", "verify", tmp_path / "empty", code=1)["error"]
    (tmp_path / "x.txt").write_text("x")
    assert "nothing of fedfin's evidence" in in_json("audit", "verify", tmp_path / "x.txt", code=1)["error"]
    note = in_json("audit", "verify", fed, "--checkpoint", tmp_path / "x.txt", code=1)
    assert "malformed" in note["error"]


def test_show_filters_by_type_job_member_and_time_a_page_at_a_time(fed):
    def shown(*options):
        return [
            (one["entry"], one["event"]["type"]) for one in in_json("audit", "show", fed, *options)["entries"]
        ]

    assert [name for _, name in shown("--type", "plan", "--type", "release")] == ["plan", "release"]
    assert {name for _, name in shown("--job", JOB)} == {
        "plan",
        "approval",
        "consent",
        "round_completed",
        "release",
    }
    assert {name for _, name in shown("--member", "city-bank")} == {
        "enrolment",
        "roster",
        "consent",
        "round_completed",
    }
    assert shown("--until", "2020-01-01") == []
    assert len(shown("--since", "2020-01-01T00:00Z")) == 13 + 3  # the reads before it that showed something
    page = in_json("audit", "show", fed, "--limit", "2", "--first", "3")
    assert ([one["entry"] for one in page["entries"]], page["next"]) == ([3, 4], 5)


def test_show_prints_a_table_and_refuses_what_it_does_not_know(fed):
    said = run_command("audit", "show", fed, "--type", "consent")
    assert "city-bank" in said
    assert PLAN.digest()[:12] in said
    assert "there is no such event" in in_json("audit", "show", fed, "--type", "x", code=1)["error"]
    assert "is no time" in in_json("audit", "show", fed, "--since", "yesterday", code=1)["error"]
    assert "2026-11-24" in in_json("audit", "show", fed, "--since", "24.11.2026", code=1)["error"]


def test_the_owner_s_log_says_that_it_was_read_and_given_out_and_a_copy_is_left_alone(fed, tmp_path):
    run = run_directory(tmp_path, fed)
    for number, source in enumerate((fed, run)):
        run_command("audit", "show", source)
        run_command("audit", "prove", source, "3", "--out", tmp_path / f"{number}.json")
        run_command("audit", "export", source, "--out", tmp_path / f"{number}.jsonl")
    assert types_of(fed)[-3:] == ["log_access", "export", "export"]
    assert types_of(run)[-1] == "release"


def test_what_cannot_be_logged_is_not_given_out(fed, tmp_path):
    (fed / "keys" / "identity.key").write_bytes(private_pem(create_identity_key()))
    for words in (("prove", fed, "3"), ("export", fed)):
        assert "not the one that signs" in in_json("audit", *words, code=1)["error"]
    assert "not the one that signs" in in_json("audit", "show", fed, code=1)["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fed"]
    with pytest.raises(AuditError):
        record(fed / "audit.db", Service(action="started", release="0.1.0"))


def test_a_proof_and_exports_pass_anywhere(fed, tmp_path):
    run_command("audit", "prove", fed, "3")
    run_command("audit", "export", fed)
    run_command("audit", "export", fed, "--pruned", "--out", "pruned.jsonl")
    for name in ("entry-3.json", "audit.jsonl", "pruned.jsonl"):
        document = in_json("audit", "verify", tmp_path / name, "--trust", OWNER)
        assert document["ok"], document
    assert "exists already" in in_json("audit", "export", fed, code=1)["error"]


def test_a_lender_s_log_which_keeps_no_checkpoint_is_proved_exported_and_pruned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = LenderFolder(lender_folder(tmp_path / "bank"))
    bank.journal.write(*(Service(action="started", release="0.1.0"), Policy(digest="a" * 64)))
    bank.journal.checkpoint()  # for the coordinator, who keeps it
    bank.journal.close()
    owner = key_fingerprint(bank.keys().identity.public_key())
    run_command("audit", "prove", bank.directory, "1")
    run_command("audit", "export", bank.directory)
    for name in ("entry-1.json", "audit.jsonl"):
        document = in_json("audit", "verify", tmp_path / name, "--trust", owner)
        assert (document["ok"], "no checkpoint" in str(document["notes"])) == (True, False), document
    now = tuple(
        retention.RetentionClass(kept.name, kept.years and 0, kept.types, kept.reason)
        for kept in retention.RETENTION
    )
    monkeypatch.setattr(retention, "RETENTION", now)
    kept = {one["class"]: one["entries"] for one in in_json("audit", "prune", bank.directory)["classes"]}
    assert kept == {"decisions": 1, "operation": 3}


def test_prune_shows_what_would_go_and_erases_it_with_yes(fed, monkeypatch):
    classes = tuple(
        retention.RetentionClass(kept.name, kept.years and 0, kept.types, kept.reason)
        for kept in retention.RETENTION
    )
    monkeypatch.setattr(retention, "RETENTION", classes)
    assert "nothing was erased" in run_command("audit", "prune", fed)
    kept = {one["class"]: one["entries"] for one in in_json("audit", "prune", fed)["classes"]}
    assert kept == {"decisions": 6, "rounds": 2, "operation": 1}
    assert in_json("audit", "prune", fed, "--yes")["erased"]
    document = in_json("audit", "verify", fed, "--trust", OWNER)
    assert (document["ok"], document["log"]["erased"]) == (True, 9)
    assert "(erased under a retention class" in run_command("audit", "show", fed)


def test_prune_keeps_longer_and_not_shorter_and_leaves_copies_alone(fed, tmp_path):
    assert in_json("audit", "prune", fed, "--years", "rounds=7")["classes"] == []
    assert "is not CLASS=YEARS" in in_json("audit", "prune", fed, "--years", "rounds", code=1)["error"]
    assert "5 years at least" in in_json("audit", "prune", fed, "--years", "rounds=1", code=1)["error"]
    run = run_directory(tmp_path, fed)
    assert "is a copy" in in_json("audit", "prune", run, "--yes", code=1)["error"]


def test_report_writes_a_signed_pack_beside_the_coordinator_s_key_and_logs_it(fed):
    run = run_directory(fed, fed)
    written = in_json("report", run, "--zip")
    assert written["signed"]
    assert types_of(fed)[-1] == "export"
    document = in_json("audit", "verify", written["pack"], "--trust", authority().fingerprint)
    assert (document["ok"], document["notes"]) == (True, [])


def test_report_of_a_copy_is_made_unsigned_and_states_the_audit_of_the_same_plan_only(fed, tmp_path):
    run = run_directory(tmp_path, fed)
    audit = {
        "model": "logistic", "epsilon_plan": 3.0, "delta": 1e-5, "num_steps": PLAN.num_steps,
        "epsilon_measured": 2.25, "claim_pld": 2.76, "confidence": 0.999, "passed": True,
    }  # fmt: skip
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    written = in_json("report", run, "--audit", tmp_path / "audit.json")
    assert not written["signed"]
    page = (tmp_path / "runs" / f"{JOB}-evidence" / "report.html").read_text()
    assert "2.250" in page
    (tmp_path / "audit.json").write_text(json.dumps({**audit, "num_steps": 1}))
    refused = in_json("report", run, "--audit", tmp_path / "audit.json", "--out", tmp_path / "x", code=1)
    assert "audit this plan" in refused["error"]
    (tmp_path / "audit.json").write_text("{}")
    refused = in_json("report", run, "--audit", tmp_path / "audit.json", "--out", tmp_path / "x", code=1)
    assert "is not what" in refused["error"]
    assert "exists already" in in_json("report", run, code=1)["error"]
    assert not (tmp_path / "x").exists()


def test_a_pack_that_could_not_be_logged_is_taken_back(fed):
    run = run_directory(fed, fed)
    (fed / "keys" / "identity.key").write_bytes(private_pem(create_identity_key()))
    assert "not the one that signs" in in_json("report", run, code=1)["error"]
    assert not run.with_name(f"{JOB}-evidence").exists()


def test_a_log_in_use_is_checked_too(fed):
    with AuditLog.open(fed / "audit.db", key=coordinator().key) as log:
        log.append(Service(action="stopped", release="0.1.0"))
        document = in_json("audit", "verify", fed)
    assert document["ok"]
    assert any("not closed" in note for note in document["notes"])


def test_no_pack_is_made_of_a_run_that_nobody_sealed(fed, tmp_path):
    run = run_directory(tmp_path, fed)
    (run / "manifest.json").unlink()
    error = in_json("report", run, code=1)["error"]
    assert "is not sealed" in error
    assert "audit show" in error
    assert not list(tmp_path.glob("*-evidence*"))

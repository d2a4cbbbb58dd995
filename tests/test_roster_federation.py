"""Who is a member of a running federation: by the members' signatures, with new keys, and not any more."""

import json

import pytest
from federation import SECURE_JOB, federation, shares
from lender_log import logged

from fedfin.audit.events import RosterVersion, Rotation
from fedfin.client.folder import LenderFolder
from fedfin.client.pinning import pending, pinned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FOUNDERS = ("north-bank", "harbour-micro", "lane-micro", "south-bank")
NEWCOMER = "late-bank"
POLICY = {"min_cohort": 3, "epsilon_limit": 50.0}


def run_job(built, *options):
    built.start_server(*options)
    assert built.wait_for_end("server", timeout_s=240) == 0, built.tail("server")


def cohorts_of_the_last_job(built):
    runs = built.config.parent.glob("runs/*/rounds.jsonl")
    last = max(runs, key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in last.read_text().splitlines()]
    return [line["cohort"] for line in lines if line["event"] == "round_done"]


def version_of(built, name):
    found = pinned(LenderFolder(built.bank(name)))
    return None if found is None else found.number


def test_members_sign_who_enters_rotate_by_themselves_and_are_shut_out(tmp_path):
    job = {"training": {"rounds": 2, "local_steps": 1, "learning_rate": 0.1}}
    with federation(tmp_path, SECURE_JOB, **job) as built:
        rows = shares(len(FOUNDERS) + 1)
        built.start_server("--enrol-only")
        for name, own in zip(FOUNDERS, rows, strict=False):
            built.enrol(name, own, **POLICY)
        built.processes["server"].terminate()
        built.wait_for_end("server")

        # the first job waits for all founders, by name, and goes on by itself once they have signed
        built.engineers = False
        for name in FOUNDERS:
            built.start_lender(name)
        built.start_server()
        built.wait(lambda: "engineers of" in built.output("server"), "the coordinator says whom it waits for")
        assert all(pending(LenderFolder(built.bank(name))) is not None for name in FOUNDERS)
        assert built.events("round_done") == []
        built.engineers = True
        assert built.wait_for_end("server", timeout_s=240) == 0, built.tail("server")
        assert {version_of(built, name) for name in FOUNDERS} == {1}

        # a lender rotates its keys: nobody else is asked
        built.start_server("--enrol-only")
        built.processes[FOUNDERS[0]].terminate()
        built.wait_for_end(FOUNDERS[0])
        built.fedfin("client", "rotate", "--config", built.bank(FOUNDERS[0]))
        built.enrol(NEWCOMER, rows[-1], **POLICY)
        built.processes["server"].terminate()
        built.wait_for_end("server")
        built.start_lender(FOUNDERS[0])
        built.start_lender(NEWCOMER)

        # the newcomer is let in by the members' signatures: by the next job but one at the latest
        run_job(built, "--new-job")
        run_job(built, "--new-job")
        assert {version_of(built, name) for name in (*FOUNDERS, NEWCOMER)} == {3}
        cohorts = cohorts_of_the_last_job(built)
        assert all({NEWCOMER, FOUNDERS[0]} <= set(cohort) for cohort in cohorts)

        # who is removed is not let in any more, and the others go on
        built.fedfin("server", "remove", NEWCOMER, "--config", built.config)
        run_job(built, "--new-job")
        cohorts = cohorts_of_the_last_job(built)
        assert len(cohorts) == 2
        assert all(NEWCOMER not in cohort for cohort in cohorts)
        roster = json.loads(built.fedfin("server", "roster", "--config", built.config, "--json").stdout)
        assert NEWCOMER not in {row["name"] for row in roster["members"]}
        kinds = [(event.type, getattr(event, "action", "")) for event in logged(built.config.parent)]
        assert ("revocation", "") in kinds
        assert len(logged(built.config.parent, Rotation)) == 4
        signed = [e.number for e in logged(built.config.parent, RosterVersion) if e.action == "signed"]
        assert signed[:3] == [1, 2, 3]

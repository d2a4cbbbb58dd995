"""A job that cannot go on: its lenders hear of it, free what was never spent, and the coordinator's status says why."""

import json

import pytest
from federation import SCHEMA
from secure_house import AWAY, MUTE, Killed, SecureHouse, hurry, job_of
from secure_lenders import NAMES
from typer.testing import CliRunner

from fedfin.audit.events import JobEnded
from fedfin.cli import app
from fedfin.client.status import status_of as status_of_lender
from fedfin.errors import JobOverError, QuorumError
from fedfin.server.founding import found
from fedfin.server.jobs import Waiting, choose_job
from fedfin.server.status import status_of
from fedfin.update import Finish, Mask, Open, Propose, Refused

REFUSING = NAMES[:3]
"""With these gone the plan's quorum of four cannot be met."""

STAYING = NAMES[3:]
POLICY = "its policy accepts no model of this kind"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def house(tmp_path):
    built = SecureHouse(tmp_path)
    yield built
    built.close()


def refusing(names, kind=Propose, reason=POLICY):
    return lambda name, question, stage: (
        Refused(question.job_id, reason) if name in names and isinstance(question, kind) else None
    )


def reserved(house, name):
    """What this lender holds reserved, RDP epsilon of all its tables, and whether its newest job is open."""
    shown = status_of_lender(house.banks[name])
    return sum(one["reserved_rdp"] for one in shown["snapshots"]), shown["jobs"][-1]["open"]


def the_job(house):
    return status_of(house.store)["jobs"][-1]


# Lenders hear of it


def test_lenders_that_accepted_a_job_without_a_quorum_are_told_at_once_and_have_their_budget_back(house):
    house.fault = refusing(REFUSING)
    with pytest.raises(
        JobOverError, match=r"only 3 of 6 lenders can take part\. Refused: bank-a: its policy"
    ):
        house.run(job_of("local"))
    (end,) = house.said("given_up")
    assert (end["told"], end["missing"]) == (list(STAYING), [])
    for name in STAYING:
        assert reserved(house, name) == (0.0, False)
        (entry,) = house.journal(name, JobEnded)
        assert (entry.job, entry.status) == (end["job"], "abandoned")
        assert house.charges(name) == {}


def test_before_anything_was_asked_another_job_costs_no_more_and_is_made_when_started_again(house):
    house.fault = refusing(REFUSING)
    with pytest.raises(JobOverError):
        house.run(job_of("local", rounds=1))
    house.fault = lambda name, question, stage: None
    assert house.run(job_of("local", rounds=1)).round == 1
    failed, made = house.store.jobs()
    assert (failed.status, made.status) == ("failed", "completed")
    assert all(house.charges(name) == {"bins": 1, "round 1": 1} for name in NAMES)


def lose_the_bins(house):
    """Run a private job whose bins are lost after lenders were charged for them: it cannot go on."""
    house.fault = lambda name, question, stage: (
        MUTE if name in NAMES[:2] and isinstance(question, Mask) and stage == "bins" else None
    )
    with pytest.raises(JobOverError, match="they answer it once"):
        house.run(job_of("local"))


def test_what_was_spent_stays_spent(house):
    lose_the_bins(house)
    for name in NAMES:
        assert house.charges(name) == {"bins": 1}
        assert reserved(house, name) == (0.0, False)
        (snapshot,) = (one for one in status_of_lender(house.banks[name])["snapshots"] if not one["held_out"])
        assert snapshot["epsilon_rdp"] > 0.0


def test_who_was_away_is_told_when_the_coordinator_is_started_again(house):
    lost = {NAMES[0]: "answer", NAMES[1]: "question"}
    mute = lambda name, question, stage: (  # noqa: E731
        {"answer": MUTE, "question": AWAY}.get(lost.get(name)) if isinstance(question, Finish) else None
    )
    lose = house.fault

    def say(event):
        house.events.append(event)
        if event["event"] == "bins_lost":
            house.fault = mute

    house.say = say
    lose_the_bins(house)
    assert house.said("given_up")[0]["missing"] == list(lost)
    assert reserved(house, NAMES[0]) == (0.0, False)  # its word was lost, not the coordinator's
    held, is_open = reserved(house, NAMES[1])
    assert held > 0.0
    assert is_open
    house.fault = lose
    with pytest.raises(JobOverError, match=r"job credit-\w+ failed: the sum of the histograms"):
        house.run(job_of("local"))
    again = house.said("given_up")[1]
    assert (again["told"], again["missing"]) == (list(lost), [])
    assert all(reserved(house, name) == (0.0, False) for name in NAMES)
    assert len(house.store.jobs()) == 1  # charged lenders pay for another job only when it is asked for
    house.run(job_of("local", rounds=1), new_job=True)


def test_killed_while_it_tells_them_the_job_does_not_go_on(house):
    def die():
        if house.store.jobs() and house.store.jobs()[-1].status == "failed":
            raise Killed

    house.on_step = die
    house.fault = refusing(REFUSING)
    with pytest.raises(Killed):
        house.run(job_of("local"))
    house.on_step, house.fault = lambda: None, lambda name, question, stage: None
    assert reserved(house, STAYING[0])[0] > 0.0
    house.run(job_of("local", rounds=1))
    first = house.store.jobs()[0].job_id
    for name in STAYING:
        ended = [entry.job for entry in house.journal(name, JobEnded)]
        assert ended[0] == first


def test_a_job_that_can_go_on_keeps_its_reservations(house):
    house.fault = refusing(REFUSING, Open, "its loans do not pass its own check")
    with pytest.raises(QuorumError, match="too many lenders refused to go on") as stopped:
        house.run(job_of("local"))
    assert not isinstance(stopped.value, JobOverError)
    assert house.said("given_up") == []
    held, is_open = reserved(house, STAYING[0])
    assert held > 0.0
    assert is_open
    assert house.store.jobs()[0].status == "running"


# What the coordinator's status says


def test_the_status_goes_from_waiting_to_finished(house):
    seen = []

    def say(event):
        house.events.append(event)
        seen.append((event["event"], the_job(house)["state"]))

    house.say = say
    house.run(job_of(rounds=1))
    states = dict(seen)
    assert (states["started"], states["accepted"], states["round_done"]) == ("waiting", "waiting", "running")
    job = the_job(house)
    assert (job["state"], job["reason"], job["goes_on"], job["refused"]) == ("finished", "", False, {})
    assert (job["round"], job["of"], job["lenders"]) == (1, 1, list(NAMES))


def test_the_status_of_a_job_without_a_quorum_has_the_reason_and_who_refused_why(house):
    house.fault = refusing(REFUSING)
    with pytest.raises(QuorumError) as ended:
        house.run(job_of())
    job = the_job(house)
    assert (job["state"], job["goes_on"], job["reason"]) == ("failed", False, str(ended.value))
    assert job["refused"] == dict.fromkeys(REFUSING, POLICY)


def test_the_status_of_a_job_that_stopped_says_that_it_goes_on_and_forgets_why_when_it_does(house):
    house.fault = refusing(REFUSING, Open, "its loans do not pass its own check")
    with pytest.raises(QuorumError) as stopped:
        house.run(job_of("local"))
    job = the_job(house)
    assert (job["state"], job["goes_on"], job["reason"]) == ("failed", True, str(stopped.value))
    house.fault = lambda name, question, stage: None
    house.run(job_of("local"))
    job = the_job(house)
    assert (job["state"], job["reason"], job["refused"]) == ("finished", "", {})
    assert len(house.store.jobs()) == 1


def test_the_command_shows_how_the_last_job_ended_and_who_refused(tmp_path):
    federation = found(
        tmp_path / "fed", name="coop", address="127.0.0.1:9443", schema_text=SCHEMA.read_text(), job={}
    )
    plan = federation.config.job
    job = choose_job(federation.store, plan, new_job=False, say=lambda _: None)
    federation.store.save_answer(job.job_id, "north", weight=None, reason=POLICY)
    federation.store.save_answer(job.job_id, "south", weight=0.0, reason=None)
    federation.store.end_job(job.job_id, "failed", "cohort.min_lenders is 5, and only 1 of 2 can take part")
    command = ["server", "status", "--config", str(federation.config_path)]
    shown = " ".join(CliRunner().invoke(app, command).stdout.split())
    assert f"{job.job_id} failed: cohort.min_lenders is 5, and only 1 of 2 can take part" in shown
    assert f"north takes no part in {job.job_id}: {POLICY}" in shown
    (told,) = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["jobs"]
    assert (told["state"], told["refused"], told["undelivered"]) == ("failed", {"north": POLICY}, ["south"])


def test_a_failed_job_that_was_charged_is_not_made_again_by_itself(house):
    lose_the_bins(house)
    plan = job_of("local")
    (job,) = house.store.jobs()
    assert choose_job(house.store, plan, new_job=False, say=house.say) == job
    assert choose_job(house.store, plan, new_job=True, say=house.say) != job


# For whom it waits is said once


def test_who_is_waited_for_is_said_when_it_changes_and_once_a_minute(monkeypatch):
    said, clock = [], [1000.0]
    monkeypatch.setattr("fedfin.server.jobs.time.monotonic", lambda: clock[0])
    waiting = Waiting(said.append)
    for at, here in ((0, {"a"}), (30, {"a"}), (59, {"a"}), (61, {"a"}), (62, {"a", "b"}), (63, {"a", "b"})):
        clock[0] = 1000.0 + at
        waiting.report(here, {"c"}, 3)
    assert [line["online"] for line in said] == [["a"], ["a"], ["a", "b"]]


def test_rounds_that_wait_for_the_same_lenders_say_so_once(house):
    """Each round waits anew; what it would say is what the one before said."""
    looks = []

    def online():
        looks.append(bool(house.away))
        if looks[-3:] == [True] * 3:
            house.away.clear()
        return frozenset(NAMES) - house.away

    def say(event):
        house.events.append(event)
        if event["event"] in {"bins", "round_done"}:
            house.away.update(REFUSING)

    house.say, house.online = say, online
    house.run(job_of(rounds=3))
    assert sum(looks) >= 9  # three looks before each round
    assert [line["for"] for line in house.said("waiting")] == [list(REFUSING)]

"""A coordinator killed after it kept something and before it logged that logs it at its next start, once and first."""

import pytest
from secure_house import MUTE, Killed, hurry, job_of
from secure_lenders import NAMES
from witnessed_house import WitnessedHouse

from fedfin.audit.events import (
    Candidate,
    Consent,
    Evaluation,
    Exchange,
    Failure,
    Incident,
    JobEnded,
    Receipt,
    Release,
    RoundCompleted,
    bounded,
)
from fedfin.audit.verifying import verify_log
from fedfin.errors import ConfigError, JobOverError, QuorumError
from fedfin.server.recording import Recorder
from fedfin.server.roster import FederationStore
from fedfin.update import Mask, Open, Refused


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def house(tmp_path):
    built = WitnessedHouse(tmp_path)
    yield built
    built.close()


def plan(aggregation):
    return job_of(rounds=2, times=2, aggregation=aggregation)


def killed_before_it_is_logged(house, monkeypatch, job, *, at):
    """Run a job; the process ends when it comes to say this, after it was kept and before it is logged."""
    take = Recorder.take

    def until_then(self, event):
        if at(event):
            raise Killed
        take(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "take", until_then)
        with pytest.raises(Killed):
            house.run(job)


def late(house):
    """The entries that follow the incidents which say that they are late."""
    events = house.entries(object)
    return [
        events[at + 1]
        for at, event in enumerate(events)
        if isinstance(event, Incident) and "follow late" in event.reason
    ]


@pytest.mark.parametrize("aggregation", ["plain", "secure"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_round_that_was_kept_and_not_logged_is_logged_late(house, monkeypatch, aggregation, number):
    job = plan(aggregation)
    killed_before_it_is_logged(
        house, monkeypatch, job, at=lambda event: event["event"] == "round_done" and event["round"] == number
    )
    assert house.store.checkpoint(house.store.jobs()[0].job_id).round == number
    assert len(house.entries(RoundCompleted)) == number - 1
    house.run(job)
    done = house.entries(RoundCompleted)
    assert [event.round for event in done] == [1, 2]
    assert done[0].model_after == done[1].model_before
    assert done[number - 1].cohort == NAMES
    assert late(house) == [done[number - 1]]
    events = house.entries(object)
    later = [at for at, event in enumerate(events) if getattr(event, "stage", "") == "round 2"]
    if number == 1 and later:
        assert events.index(done[0]) < min(later)
    assert verify_log(house.log_path).ok


@pytest.mark.parametrize("aggregation", ["plain", "secure"])
def test_bins_that_were_kept_and_not_logged_are_logged_late(house, monkeypatch, aggregation):
    job = plan(aggregation)
    killed_before_it_is_logged(house, monkeypatch, job, at=lambda event: event["event"] == "bins")
    house.run(job)
    (bins,) = (one for one in house.entries(Exchange) if (one.stage, one.step) == ("bins", "released"))
    assert late(house) == [bins]
    assert bins.cohort_size == len(NAMES)


def test_an_evaluation_that_was_kept_and_not_logged_is_logged_late(house, monkeypatch):
    job = plan("secure")
    killed_before_it_is_logged(house, monkeypatch, job, at=lambda event: event["event"] == "evaluated")
    house.run(job)
    judged = house.entries(Evaluation)
    assert [event.after_round for event in judged] == [1, 2]
    assert late(house) == judged[:1]


def test_what_was_logged_is_not_logged_again(house, monkeypatch):
    """Killed right after the entry: nothing is late, and a release is said once."""
    job, take = plan("plain"), Recorder.take

    def killed_after(self, event):
        take(self, event)
        if event["event"] == "released":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "take", killed_after)
        with pytest.raises(Killed):
            house.run(job)
    assert house.store.jobs()[0].status == "running"
    house.run(job)
    assert late(house) == []
    assert [len(house.entries(kind)) for kind in (Candidate, Release)] == [1, 1]
    assert [event.round for event in house.entries(RoundCompleted)] == [1, 2]


def test_a_release_that_was_not_logged_is_logged_before_its_lenders_get_the_model(house, monkeypatch):
    job = plan("plain")
    killed_before_it_is_logged(house, monkeypatch, job, at=lambda event: event["event"] == "released")
    assert house.entries(Receipt) == []
    house.run(job)
    kinds = [type(event) for event in house.entries(object)]
    assert kinds.count(Release) == 1
    assert kinds.index(Release) < kinds.index(Receipt)


def test_the_end_of_a_job_that_was_not_logged_is_logged_late(house):
    """All its lenders have the model: it is not run again, and its end is logged all the same."""
    house.run(plan("plain"))  # this house's process ends where the command would log the end
    assert house.entries(JobEnded) == []
    for _ in range(2):
        with pytest.raises(ConfigError, match="was trained already"):
            house.run(plan("plain"))
        assert [event.status for event in house.entries(JobEnded)] == ["completed"]
    assert late(house) == house.entries(JobEnded)


def test_a_job_that_was_abandoned_unlogged_is_logged_with_its_last_round(house, monkeypatch):
    killed_before_it_is_logged(
        house, monkeypatch, plan("plain"), at=lambda event: event["event"] == "round_done"
    )
    first = house.store.jobs()[0].job_id
    house.store.end_job(first, "abandoned")
    house.run(plan("plain"))
    assert [event.status for event in house.entries(JobEnded) if event.job == first] == ["abandoned"]
    assert [event.round for event in house.entries(RoundCompleted) if event.job == first] == [1]


# Jobs that fail


def lose_the_bins(house):
    """Let the answers of two lenders to the question for their histograms be lost: a private job is over with them."""
    house.fault = lambda name, question, stage: (
        MUTE if name in NAMES[:2] and isinstance(question, Mask) and stage == "bins" else None
    )


def of_the_job(house):
    return [event for event in house.entries(Failure) if event.stage == "job"]


def test_a_job_that_failed_is_logged_with_its_reason_before_its_lenders_are_told(house):
    lose_the_bins(house)
    with pytest.raises(JobOverError) as ended:
        house.run(job_of("local"))
    (failure,), (end,) = of_the_job(house), house.entries(JobEnded)
    assert failure.reason == bounded(str(ended.value))
    assert end.status == "failed"
    events, receipts = house.entries(object), house.entries(Receipt)
    assert len(receipts) == len(NAMES)
    assert events.index(end) < min(events.index(receipt) for receipt in receipts)


def test_a_failed_job_whose_end_was_not_logged_is_logged_late(house, monkeypatch):
    lose_the_bins(house)
    killed_before_it_is_logged(
        house, monkeypatch, job_of("local"), at=lambda event: event["event"] == "job_failed"
    )
    assert house.entries(JobEnded) == []
    with pytest.raises(JobOverError, match="failed: the sum of the histograms"):
        house.run(job_of("local"))
    (end,), (failure,) = house.entries(JobEnded), of_the_job(house)
    assert end.status == "failed"
    assert failure.reason == bounded(house.store.jobs()[0].reason)
    assert late(house) == [failure]


def test_a_job_that_stopped_and_can_go_on_says_why_and_is_not_over(house):
    house.fault = lambda name, question, stage: (
        Refused(question.job_id, "its loans do not pass its own check")
        if name in NAMES[:3] and isinstance(question, Open)
        else None
    )
    with pytest.raises(QuorumError) as stopped:
        house.run(job_of())
    assert [event.reason for event in of_the_job(house)] == [bounded(str(stopped.value))]
    assert house.entries(JobEnded) == []


# What lenders signed


@pytest.mark.parametrize(("kept", "kind"), [("save_answer", Consent), ("mark_delivered", Receipt)])
def test_what_a_lender_signed_is_logged_before_anything_rests_on_it(house, monkeypatch, kept, kind):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(FederationStore, kept, killed)
        with pytest.raises(Killed):
            house.run(plan("plain"))
    assert [event.member for event in house.entries(kind)] == list(NAMES)
    assert all(event.signature for event in house.entries(kind))

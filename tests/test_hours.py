"""A lender's hours: across midnight, in its own zone, and what may still be finished after them."""

import datetime as dt
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lenders import AskedLender, lender_folder, proposal, train_request
from secure_lenders import Cohort, secure_plan, write_folders

from fedfin.client.folder import LenderFolder
from fedfin.client.hours import is_open, next_opening, require_hours
from fedfin.config import LenderPolicy
from fedfin.errors import NotYetError
from fedfin.update import (
    Accepted,
    Advertised,
    AskHistogram,
    Confirmed,
    Histogram,
    Refused,
    Update,
    decode,
    encode,
)

NIGHT = {"hours": "22:00-06:00", "time_zone": "Europe/Madrid"}
MADRID = ZoneInfo("Europe/Madrid")


def policy(hours="22:00-06:00", zone="Europe/Madrid"):
    return LenderPolicy(hours=hours, time_zone=zone)


def madrid(hour, minute=0, *, month=11, day=24):
    return dt.datetime(2026, month, day, hour, minute, tzinfo=MADRID)


@pytest.mark.parametrize(
    ("hours", "hour", "minute", "is_in"),
    [
        ("22:00-06:00", 21, 59, False),
        ("22:00-06:00", 22, 0, True),
        ("22:00-06:00", 0, 0, True),
        ("22:00-06:00", 5, 59, True),
        ("22:00-06:00", 6, 0, False),
        ("08:00-18:30", 7, 59, False),
        ("08:00-18:30", 8, 0, True),
        ("08:00-18:30", 18, 29, True),
        ("08:00-18:30", 18, 30, False),
        ("00:00-06:00", 23, 59, False),
        ("22:00-00:00", 23, 59, True),
        ("22:00-00:00", 0, 0, False),
    ],
)
def test_hours_hold_across_midnight_with_the_start_in_and_the_end_out(hours, hour, minute, is_in):
    assert is_open(policy(hours), madrid(hour, minute)) == is_in


def test_hours_are_those_of_the_policys_zone_whatever_the_clocks_zone_is():
    moment = dt.datetime(2026, 7, 1, 20, 30, tzinfo=dt.UTC)  # 22:30 in Madrid's summer, 16:30 in New York's
    assert is_open(policy(), moment)
    assert not is_open(policy(zone="America/New_York"), moment)
    assert not is_open(policy(zone="UTC"), moment)
    winter = dt.datetime(2026, 12, 1, 20, 30, tzinfo=dt.UTC)  # 21:30 in Madrid's winter
    assert not is_open(policy(), winter)


def test_an_hour_that_comes_twice_counts_both_times():
    twice = policy("02:00-03:00")  # clocks in Madrid go back from 03:00 to 02:00 on 2026-10-25
    both = [madrid(2, 30, month=10, day=25).replace(fold=fold) for fold in (0, 1)]
    assert both[0].astimezone(dt.UTC) != both[1].astimezone(dt.UTC)
    assert [is_open(twice, moment.astimezone(dt.UTC)) for moment in both] == [True, True]


@given(st.integers(0, 366 * 24 * 60))
def test_hours_and_their_complement_are_never_both_open(minutes):
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=minutes)
    assert is_open(policy("22:00-06:00"), moment) != is_open(policy("06:00-22:00"), moment)


def test_the_next_opening_is_told_in_the_policys_zone():
    assert next_opening(policy(), madrid(23)) is None
    assert next_opening(policy(), madrid(12)) == madrid(22)
    assert next_opening(policy("08:00-09:00"), madrid(12)) == madrid(8, day=25)
    assert next_opening(LenderPolicy(), madrid(12)) is None


def test_out_of_hours_is_a_refusal_that_names_them_and_may_change_by_itself():
    require_hours(policy(), madrid(22))
    with pytest.raises(
        NotYetError, match=r"between 22:00-06:00 Europe/Madrid only \(policy\.hours\)"
    ) as caught:
        require_hours(policy(), madrid(12))
    assert caught.value.waits == "hours"
    require_hours(policy(), madrid(6, 9), grace=dt.timedelta(minutes=10))
    with pytest.raises(NotYetError):
        require_hours(policy(), madrid(6, 10), grace=dt.timedelta(minutes=10))


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def test_a_lender_accepts_and_trains_in_its_hours_only_and_reads_nothing_outside_them(tmp_path, monkeypatch):
    bank = lender_folder(tmp_path / "bank", **NIGHT)
    clock = Clock(madrid(12))
    lender = AskedLender(LenderFolder(bank), say=lambda _: None, now=clock)
    refused = decode(lender.answer(proposal()), Refused)
    assert refused.waits == "hours"
    assert not (bank.parent / "jobs" / "credit-1234" / "job.json").exists()
    clock.now = madrid(22)
    decode(lender.answer(proposal()), Accepted)
    histogram = lender.answer(encode(AskHistogram("credit-1234")))
    decode(histogram, Histogram)
    clock.now = madrid(6, day=25)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fedfin.client.stages.train_locally", lambda *_, **__: pytest.fail("trained out of hours")
        )
        refused = decode(lender.answer(train_request(histogram, 1)), Refused)
    assert refused.waits == "hours"
    clock.now = madrid(5, 59, day=25)
    assert decode(lender.answer(train_request(histogram, 1)), Update).round == 1
    lender.close()


@pytest.fixture
def cohort(tmp_path):
    clock = Clock(madrid(5, 55))
    made = Cohort(write_folders(tmp_path, **NIGHT), secure_plan("none"))
    for name, bank in made.banks.items():
        made.lenders[name].close()
        made.lenders[name] = AskedLender(LenderFolder(bank), say=lambda _: None, now=clock)
    yield made.accept(), clock
    for lender in made.lenders.values():
        lender.close()


def test_a_sum_that_was_opened_in_the_hours_is_finished_after_them_and_no_other_is_opened(cohort):
    made, clock = cohort
    first = made.start(made.bins_question()).open().share()
    clock.now = madrid(6, 1)
    first.mask()
    assert first.refused == {}
    following = made.start(made.bins_question())
    answer = first.ask("bank-a", first.confirm_message(following), Confirmed)
    assert answer.signature != b""
    assert answer.advert == b""  # what could be prepared is not
    assert following.ask("bank-b", following.open_message(), Advertised) is None
    assert "policy.hours" in following.refused["bank-b"]


def test_ten_minutes_after_the_hours_no_masked_vector_leaves(cohort):
    made, clock = cohort
    first = made.start(made.bins_question()).open().share()
    clock.now = madrid(6, 10)
    first.mask()
    assert sorted(first.refused) == sorted(made.banks)
    assert all("policy.hours" in reason for reason in first.refused.values())

"""Bodies go when their class has run out and not before; what the log is checked with stays, and every proof holds."""

import datetime as dt

import pytest
from evidence_house import federation_log
from rosters import coordinator

from fedfin.audit import retention
from fedfin.audit.events import EVENT_TYPES, Service
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.audit.retention import RETENTION, class_of, due
from fedfin.audit.verifying import verify_log
from fedfin.errors import AuditError


def in_years(years):
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=365.25 * years + 1)


def due_types(path, years, longer=None):
    with open_log(path) as log:
        found = due(log, in_years(years), longer)
        return {
            log.entry(i).event.type for one in found for start, stop in one.ranges for i in range(start, stop)
        }


def test_every_event_has_one_class_and_an_unknown_one_is_kept_for_ever():
    named = [name for kept in RETENTION for name in kept.types]
    assert sorted(named) == sorted(EVENT_TYPES)
    assert class_of("of a later release").years is None


def test_classes_run_out_one_after_the_other_and_identities_never(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    assert due_types(path, 1) == set()
    assert due_types(path, 2) == {"service"}
    assert due_types(path, 5) == {"service", "round_completed"}
    assert due_types(path, 100) == {"service", "round_completed", "plan", "approval", "consent", "release"}


def test_a_class_can_be_kept_longer_and_not_shorter(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    assert due_types(path, 5, {"rounds": 7}) == {"service"}
    with open_log(path) as log:
        for years, told in (
            ({"rounds": 4}, "5 years at least"),
            ({"identity": 90}, "for ever"),
            ({"x": 1}, "no reten"),
        ):
            with pytest.raises(AuditError, match=told):
                due(log, in_years(1), years)


def test_nothing_that_no_checkpoint_covers_is_due(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    with AuditLog.open(path, key=coordinator().key) as log:
        late = log.append(Service(action="stopped", release="0.1.0"))
    with open_log(path) as log:
        assert all(stop <= late for one in due(log, in_years(100)) for _, stop in one.ranges)


def test_a_log_verifies_after_everything_that_is_due_was_erased(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    with open_log(path) as log:
        found = due(log, in_years(100))
    with AuditLog.open(path, key=coordinator().key) as log:
        for one in found:
            log.prune(one.ranges, retention=one.retention.name)
    report = verify_log(path)
    assert (report.wrong, report.num_pruned) == (None, sum(one.num_entries for one in found))
    with open_log(path) as log:
        assert due(log, in_years(100)) == ()


def test_the_limit_on_a_leap_day_is_the_day_before_in_other_years():
    operation = next(kept for kept in RETENTION if kept.name == "operation")
    limit = retention._limit(operation, dt.datetime(2028, 2, 29, 12, tzinfo=dt.UTC), {})
    assert limit == "2026-02-28T12:00:00.000Z"

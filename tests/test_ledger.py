"""The ledger never forgets a release, never charges one twice, and stops work when it cannot be sure."""

import dataclasses
import hashlib
import json
import math
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfin.errors import BudgetSpentError, DataError, LedgerError, PrivacyParameterError
from fedfin.privacy.accounting import GaussianEvent, epsilon_pld, epsilon_rdp
from fedfin.privacy.events import SharedNoiseEvent
from fedfin.privacy.filter import Account, divergence, filter_epsilon, open_account
from fedfin.privacy.ledger import Ledger, Spent
from fedfin.privacy.overlap import memberships
from fedfin.privacy.snapshot import Snapshot, snapshot_of

DELTA = 1e-5
SNAPSHOT = "5a" * 32
BINS = GaussianEvent(40.0)
ROUND = GaussianEvent(20.0, sample_rate=0.5, count=5)
JOB = (BINS, dataclasses.replace(ROUND, count=10))
JOB_COST = epsilon_rdp(JOB, DELTA)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


def table(name=SNAPSHOT, loans=None, scheme="row"):
    """A snapshot of these loans (numbers); without any its one loan is in no other snapshot."""
    numbers = loans if loans is not None else [name]
    rows = sorted(hashlib.sha256(str(number).encode()).digest()[:16] for number in numbers)
    return Snapshot(name, scheme, b"".join(rows))


def reserve(ledger, job_id="job-1", snapshot=SNAPSHOT, events=JOB, limit=10.0, delta=DELTA, max_delta=DELTA):
    loans = table(snapshot) if isinstance(snapshot, str) else snapshot
    ledger.reserve(job_id, loans, events, delta=delta, epsilon_limit=limit, max_delta=max_delta)


def spend(ledger, job_id="job-1"):
    """A whole job from its reservation to its end."""
    reserve(ledger, job_id)
    ledger.commit(job_id, "bins", [BINS], "b0")
    ledger.commit(job_id, "round 1", [ROUND], "r1")
    ledger.commit(job_id, "round 2", [ROUND], "r2")
    ledger.release(job_id)


# What a job does to the ledger


def test_a_new_ledger_has_spent_nothing(ledger):
    assert ledger.spent(SNAPSHOT, DELTA) == Spent(0.0, 0.0, ())
    assert ledger.reserved(SNAPSHOT, DELTA) == Spent(0.0, 0.0, ())
    assert ledger.entries() == ()
    assert ledger.snapshots() == ()


def test_reserved_moves_to_spent_stage_by_stage(ledger):
    reserve(ledger)
    assert ledger.reserved(SNAPSHOT, DELTA).events == tuple(
        sorted(JOB, key=lambda event: event.noise_multiplier)
    )
    assert ledger.spent(SNAPSHOT, DELTA).events == ()
    ledger.commit("job-1", "bins", [BINS], "b0")
    ledger.commit("job-1", "round 1", [ROUND], "r1")
    assert ledger.reserved(SNAPSHOT, DELTA).events == (ROUND,)
    assert ledger.spent(SNAPSHOT, DELTA) == Spent(
        epsilon_pld([BINS, ROUND], DELTA), epsilon_rdp([BINS, ROUND], DELTA), (ROUND, BINS)
    )
    ledger.release("job-1")
    assert ledger.reserved(SNAPSHOT, DELTA).events == ()
    assert ledger.spent(SNAPSHOT, DELTA).events == (ROUND, BINS)


def test_everything_is_there_when_the_file_is_opened_again(path):
    with Ledger(path) as ledger:
        spend(ledger)
        expected = ledger.entries()
    with Ledger(path) as again:
        assert again.entries() == expected
        assert again.spent(SNAPSHOT, DELTA).epsilon_rdp == pytest.approx(JOB_COST)


def test_an_entry_says_what_was_done_by_what_and_when(ledger):
    spend(ledger)
    entries = ledger.entries(SNAPSHOT)
    kinds = [(entry.kind, entry.stage, entry.release_digest) for entry in entries]
    assert kinds == [
        ("reserve", "", ""),
        ("commit", "bins", "b0"),
        ("commit", "round 1", "r1"),
        ("commit", "round 2", "r2"),
        ("release", "", ""),
    ]
    assert (entries[0].delta, entries[0].epsilon_limit) == (DELTA, 10.0)
    assert entries[2].events == (ROUND,)
    assert "dp-accounting=0.6" in entries[2].versions
    assert entries[2].utc.endswith("+00:00")


def test_each_snapshot_has_its_own_budget(ledger):
    reserve(ledger, "job-1", "first", limit=JOB_COST)
    reserve(ledger, "job-2", "second", limit=JOB_COST)
    ledger.commit("job-2", "bins", [BINS], "b0")
    assert ledger.snapshots() == ("first", "second")
    assert ledger.spent("first", DELTA).events == ()
    assert ledger.spent("second", DELTA).events == (BINS,)
    assert [entry.job_id for entry in ledger.entries("first")] == ["job-1"]


def test_a_committed_stage_is_found_by_its_name(ledger):
    reserve(ledger)
    assert ledger.committed("job-1", "bins") is None
    assert ledger.committed("no such job", "bins") is None
    ledger.commit("job-1", "bins", [BINS], "b0")
    assert ledger.committed("job-1", "bins") == "b0"


# The limit


def test_a_job_that_just_fits_is_reserved_and_the_next_is_refused(ledger):
    reserve(ledger, "job-1", limit=JOB_COST)
    with pytest.raises(
        BudgetSpentError,
        match=r"job-2 asks 100.0% of .* and 100.0% is spent or reserved.*passes the limit; .*raise",
    ):
        reserve(ledger, "job-2", limit=JOB_COST)
    assert [entry.job_id for entry in ledger.entries()] == ["job-1"]


def test_what_has_left_counts_for_ever_and_what_has_not_is_free_again(ledger):
    reserve(ledger, "job-1", limit=JOB_COST)
    ledger.release("job-1")
    reserve(ledger, "job-2", limit=JOB_COST)
    ledger.commit("job-2", "bins", [BINS], "b0")
    ledger.release("job-2")
    with pytest.raises(BudgetSpentError):
        reserve(ledger, "job-3", limit=JOB_COST)
    # 1.001: the account keeps the order that its first limit and job gave it
    reserve(ledger, "job-3", limit=1.001 * epsilon_rdp([*JOB, BINS], DELTA))


def test_a_limit_lowered_meanwhile_binds_a_repeated_reservation(ledger):
    reserve(ledger, limit=JOB_COST)
    with pytest.raises(BudgetSpentError):
        reserve(ledger, limit=0.9 * JOB_COST)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_without_meaning_is_refused(ledger, limit):
    with pytest.raises(PrivacyParameterError, match="epsilon_limit"):
        reserve(ledger, limit=limit)


# Repetitions, and what is not a repetition


def test_every_step_may_be_repeated_and_counts_once(ledger):
    reserve(ledger)
    reserve(ledger, events=JOB[::-1])
    for _ in range(2):
        ledger.commit("job-1", "bins", [BINS], "b0")
    for _ in range(2):
        ledger.release("job-1")
    ledger.commit("job-1", "bins", [BINS], "b0")
    assert [entry.kind for entry in ledger.entries()] == ["reserve", "commit", "release"]
    assert ledger.spent(SNAPSHOT, DELTA).events == (BINS,)


@pytest.mark.parametrize("change", [{"snapshot": "other"}, {"events": (BINS,)}, {"delta": 1e-6}])
def test_a_job_id_with_other_content_is_refused(ledger, change):
    reserve(ledger)
    with pytest.raises(LedgerError, match="other content; give this job its own id"):
        reserve(ledger, **change)


def test_a_job_that_is_over_is_not_reserved_again(ledger):
    spend(ledger)
    with pytest.raises(LedgerError, match="is over"):
        reserve(ledger)


def test_a_stage_leaves_once(ledger):
    reserve(ledger)
    ledger.commit("job-1", "round 1", [ROUND], "r1")
    with pytest.raises(LedgerError, match="already left as r1"):
        ledger.commit("job-1", "round 1", [ROUND], "another digest")
    with pytest.raises(LedgerError, match="already left as r1"):
        ledger.commit("job-1", "round 1", [BINS], "r1")
    assert ledger.spent(SNAPSHOT, DELTA).events == (ROUND,)


@pytest.mark.parametrize(
    "events",
    [[GaussianEvent(30.0)], [dataclasses.replace(ROUND, count=11)], [BINS, BINS]],
    ids=["other", "more", "twice"],
)
def test_nothing_leaves_that_was_not_reserved(ledger, events):
    reserve(ledger)
    with pytest.raises(LedgerError, match="more than is left of its reservation"):
        ledger.commit("job-1", "round 1", events, "r1")
    assert ledger.spent(SNAPSHOT, DELTA).events == ()


def test_nothing_leaves_without_a_reservation_or_after_the_end(ledger):
    with pytest.raises(LedgerError, match="not reserved"):
        ledger.commit("job-1", "bins", [BINS], "b0")
    reserve(ledger)
    ledger.release("job-1")
    with pytest.raises(LedgerError, match="is over"):
        ledger.commit("job-1", "bins", [BINS], "b0")


def test_releasing_a_job_that_holds_nothing_changes_nothing(ledger):
    ledger.release("no such job")
    assert ledger.entries() == ()


def test_no_events_is_not_a_job_or_a_stage(ledger):
    with pytest.raises(PrivacyParameterError, match="no events"):
        reserve(ledger, events=())
    reserve(ledger)
    with pytest.raises(PrivacyParameterError, match="no events"):
        ledger.commit("job-1", "bins", [], "b0")


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines"])
def test_a_name_that_is_not_short_and_printable_is_refused(ledger, name):
    with pytest.raises(PrivacyParameterError, match="job_id"):
        reserve(ledger, name)


# Tables that share loans

ONE_JOB = 1.0001 * JOB_COST  # a limit with room for one job
TWO_JOBS = 1.01 * epsilon_rdp([*JOB, *JOB], DELTA)


def fits(ledger, snapshot, limit=ONE_JOB, events=JOB):
    return ledger.budget(snapshot, events, epsilon_limit=limit, max_delta=DELTA).fits


@pytest.mark.parametrize(
    ("later", "inherits"),
    [
        (range(2, 8), True),  # a subset
        (range(20), True),  # a superset
        (range(5, 15), True),  # the window moved on
        ([9, 100, 101], True),  # one loan is in both
        (range(10, 20), False),  # none is
    ],
    ids=["subset", "superset", "window", "one loan", "none"],
)
def test_a_table_with_a_loan_of_an_earlier_one_inherits_its_spend(ledger, later, inherits):
    reserve(ledger, "job-1", table("first", range(10)), limit=ONE_JOB)
    second = table("second", later)
    assert fits(ledger, second) is not inherits
    assert ledger.budget(second, epsilon_limit=ONE_JOB, max_delta=DELTA).others == ("first",) * inherits
    for stage, events in (("bins", [BINS]), ("round 1", [ROUND]), ("round 2", [ROUND])):
        ledger.commit("job-1", stage, events, "digest")
    ledger.release("job-1")
    assert fits(ledger, second) is not inherits
    assert ledger.spent(second, DELTA) == (ledger.spent("first", DELTA) if inherits else Spent(0.0, 0.0, ()))
    if inherits:
        with pytest.raises(BudgetSpentError, match="with 1 other snapshots that hold the same loans"):
            reserve(ledger, "job-2", second, limit=ONE_JOB)
    else:
        reserve(ledger, "job-2", second, limit=ONE_JOB)


def test_jobs_on_tables_that_share_loans_count_for_each_other_both_ways(ledger):
    first, second = table("first", range(10)), table("second", range(5, 15))
    reserve(ledger, "job-1", first, limit=TWO_JOBS)
    reserve(ledger, "job-2", second, limit=TWO_JOBS)
    for snapshot in (first, second):
        assert not fits(ledger, snapshot, limit=TWO_JOBS)
        assert ledger.reserved(snapshot.digest, DELTA).epsilon_rdp == epsilon_rdp([*JOB, *JOB], DELTA)
    ledger.commit("job-2", "bins", [BINS], "b0")
    assert ledger.spent("first", DELTA).events == (BINS,)


def test_in_a_chain_of_windows_only_loans_that_are_shared_count(ledger):
    """C meets B, and B meets A, and no loan of C is in A: what A gave is not charged to C."""
    a, b, c = table("a", range(10)), table("b", range(5, 15)), table("c", range(10, 20))
    reserve(ledger, "job-a", a, limit=TWO_JOBS)
    reserve(ledger, "job-b", b, limit=TWO_JOBS)
    assert ledger.held("a", DELTA).epsilon_rdp == epsilon_rdp([*JOB, *JOB], DELTA)
    assert ledger.held(c, DELTA).epsilon_rdp == JOB_COST
    reserve(ledger, "job-c", c, limit=TWO_JOBS)
    # b's worst loans are in two tables, never in three
    assert ledger.held("b", DELTA).epsilon_rdp == epsilon_rdp([*JOB, *JOB], DELTA)
    everything = table("everything", range(20))
    assert ledger.held(everything, DELTA).epsilon_rdp == epsilon_rdp([*JOB, *JOB], DELTA)
    reserve(ledger, "job-d", everything, limit=10.0)
    assert ledger.held("c", DELTA).epsilon_rdp == epsilon_rdp([*JOB, *JOB, *JOB], DELTA)


def test_the_history_is_of_the_loan_that_gave_most(ledger):
    reserve(ledger, "job-1", table("first", range(10)))
    ledger.commit("job-1", "bins", [BINS], "b0")
    reserve(ledger, "job-2", table("second", range(5, 15)))
    ledger.commit("job-2", "bins", [BINS], "b1")
    ledger.commit("job-1", "round 1", [ROUND], "r1")
    reserve(ledger, "job-3", table("third", range(10, 12)))
    charges = ledger.history("second", DELTA)
    assert [(charge.entry.job_id, charge.entry.stage) for charge in charges] == [
        ("job-1", "bins"),
        ("job-2", "bins"),
        ("job-1", "round 1"),
    ]
    assert [charge.epsilon_rdp for charge in charges] == [
        epsilon_rdp([BINS], DELTA),
        epsilon_rdp([BINS, BINS], DELTA),
        epsilon_rdp([BINS, BINS, ROUND], DELTA),
    ]
    spent = ledger.spent("second", DELTA)
    assert (charges[-1].epsilon_pld, charges[-1].epsilon_rdp) == (spent.epsilon_pld, spent.epsilon_rdp)
    assert ledger.history(table("new", range(100, 110)), DELTA) == ()


def test_a_long_history_has_a_bounded_number_of_plds_and_the_last_is_what_was_spent(ledger, monkeypatch):
    monkeypatch.setattr("fedfin.privacy.ledger._MOST_PLDS", 4)
    reserve(ledger, events=(BINS, dataclasses.replace(ROUND, count=50)))
    ledger.commit("job-1", "bins", [BINS], "b0")
    for number in range(1, 11):
        ledger.commit("job-1", f"round {number}", [ROUND], f"r{number}")
    charges = ledger.history(SNAPSHOT, DELTA)
    known = [number for number, charge in enumerate(charges) if charge.epsilon_pld is not None]
    assert known == [1, 4, 7, 10]
    assert charges[4].epsilon_pld == epsilon_pld([BINS, dataclasses.replace(ROUND, count=20)], DELTA)
    assert charges[-1].epsilon_pld == ledger.spent(SNAPSHOT, DELTA).epsilon_pld


def test_damage_that_sqlite_quotes_as_no_text_is_a_ledger_error(path):
    Ledger(path).close()
    content = path.read_bytes()
    place = content.index(b"BEFORE DELETE ON entry")
    path.write_bytes(content[:place] + b"\xc5" + content[place + 1 :])
    with pytest.raises(LedgerError, match="restore it from a backup"):
        Ledger(path)


def test_loans_whose_digests_cannot_be_compared_count_as_the_same(ledger):
    """The numbers of loans were switched on or off, or the schema changed: nothing starts anew in silence."""
    reserve(ledger, "job-1", table("first", range(10), scheme="row"), limit=TWO_JOBS)
    numbered = table("second", range(50, 60), scheme="loan_id")
    assert not fits(ledger, numbered)
    reserve(ledger, "job-2", numbered, limit=TWO_JOBS)
    # of two schemes, any loan of one may be any of the other's, whichever table is asked for
    third = table("third", range(70, 80), scheme="row")
    assert not fits(ledger, third)
    assert fits(ledger, third, limit=TWO_JOBS)
    assert ledger.held(third, DELTA).epsilon_rdp == JOB_COST


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.frozensets(st.integers(0, 5), min_size=1), min_size=1, max_size=5),
    st.frozensets(st.integers(0, 5), min_size=1),
)
def test_a_tables_loans_are_in_these_sets_of_tables(tables, asked):
    known = {f"t{number}": table(f"t{number}", loans) for number, loans in enumerate(tables)}
    known["asked"] = table("asked", asked)
    sets = {
        frozenset(["asked", *(f"t{number}" for number, loans in enumerate(tables) if loan in loans)])
        for loan in asked
    }
    largest = {one for one in sets if not any(one < other for other in sets)}
    found = memberships("asked", known)
    assert set(found) == largest
    assert len(found) == len(largest)


# The filter


def test_an_account_fixes_its_order_and_delta_with_the_first_job(ledger):
    assert ledger.account(SNAPSHOT) is None
    reserve(ledger, "job-1", limit=ONE_JOB)
    account = ledger.account(SNAPSHOT)
    reserve(ledger, "job-2", events=[GaussianEvent(1.0)], limit=100.0, max_delta=1e-3)
    assert ledger.account(SNAPSHOT) == account
    assert account.delta == DELTA
    budget = ledger.budget(SNAPSHOT, epsilon_limit=100.0, max_delta=1e-3)
    assert budget.account == account


def test_a_lowered_delta_binds_at_once(ledger):
    reserve(ledger, "job-1", limit=ONE_JOB)
    order = ledger.account(SNAPSHOT).order
    budget = ledger.budget(SNAPSHOT, epsilon_limit=ONE_JOB, max_delta=1e-7)
    assert budget.account == Account(order, 1e-7)
    assert not budget.fits


def test_a_table_that_meets_an_earlier_one_takes_over_its_account(ledger):
    reserve(ledger, "job-1", table("first", range(10)), limit=ONE_JOB)
    reserve(ledger, "job-2", table("second", range(5, 15)), events=[GaussianEvent(1.0)], limit=100.0)
    assert ledger.account("second") == ledger.account("first")
    reserve(ledger, "job-3", table("third", range(20, 30)), events=[GaussianEvent(1.0)], limit=100.0)
    assert ledger.account("third").order < ledger.account("first").order


def test_a_table_that_meets_two_accounts_is_held_to_both(ledger):
    reserve(ledger, "job-1", table("fine", [1]), limit=1.0, events=[GaussianEvent(100.0)])
    reserve(ledger, "job-2", table("coarse", [2]), limit=100.0, events=[GaussianEvent(1.0)])
    both = table("both", [1, 2])
    fine, coarse = ledger.account("fine").order, ledger.account("coarse").order
    assert coarse < fine
    budget = ledger.budget(both, epsilon_limit=100.0, max_delta=DELTA)
    assert (budget.account.order, budget.spent) == (fine, 0.0)
    # the loan in "coarse" gave more, and at the order of "fine" that weighs more still
    assert budget.reserved == pytest.approx(fine / 2)


def test_the_order_is_not_chosen_anew_to_let_a_job_in(ledger):
    """A later job of another kind that the least over all orders would admit is refused at the account's order."""
    sampled = GaussianEvent(0.9, 0.01, 500)
    reserve(ledger, "job-1", events=[GaussianEvent(4.0)], limit=8.0)
    limit = 1.001 * epsilon_rdp([GaussianEvent(4.0), sampled], DELTA)
    order = ledger.account(SNAPSHOT).order
    lone = open_account([GaussianEvent(4.0), sampled], limit, DELTA)
    assert lone.order != order
    assert filter_epsilon(lone, divergence([GaussianEvent(4.0), sampled], lone.order)) <= limit
    with pytest.raises(BudgetSpentError, match=f"admits nothing: .*Renyi order {order:g} since"):
        reserve(ledger, "job-2", events=[sampled], limit=limit)


def test_shares_of_the_limit_add_up_over_jobs(ledger):
    for job in ("job-1", "job-2"):
        reserve(ledger, job, limit=3.0)
    ledger.commit("job-1", "bins", [BINS], "b0")
    budget = ledger.budget(SNAPSHOT, JOB, epsilon_limit=3.0, max_delta=DELTA)
    assert budget.spent + budget.reserved == pytest.approx(2 * budget.asked, rel=1e-12)
    assert budget.left == pytest.approx(budget.capacity - 3 * budget.asked)
    assert budget.share(budget.capacity) == 1.0


def test_a_limit_that_holds_at_no_order_admits_nothing(ledger):
    with pytest.raises(BudgetSpentError, match=r"leaves no room.*raise policy\.epsilon_limit"):
        reserve(ledger, limit=1e-4)
    reserve(ledger, "job-1", limit=3.0)
    budget = ledger.budget(SNAPSHOT, epsilon_limit=1e-4, max_delta=DELTA)
    assert budget.capacity < 0.0
    assert budget.share(budget.spent) == math.inf
    assert not budget.fits


# Noise in shares

SUMS = SharedNoiseEvent(4.0, 0.5, 10, size=20, share_stddev=10**6, num_shares=8, num_lenders=10)
COARSE = dataclasses.replace(SUMS, share_stddev=30)


def test_sums_under_noise_in_shares_are_recorded_charged_and_shown_like_other_releases(path):
    with Ledger(path) as ledger:
        reserve(ledger, events=[SUMS, BINS])
        ledger.commit("job-1", "round 1", [dataclasses.replace(SUMS, count=1)], "r1")
        with pytest.raises(LedgerError, match="more than is left"):
            ledger.commit("job-1", "round 2", [dataclasses.replace(SUMS, count=1, num_shares=7)], "r2")
    with Ledger(path) as again:
        (spent,) = again.spent(SNAPSHOT, DELTA).events
        assert spent == dataclasses.replace(SUMS, count=1)
        assert again.held(SNAPSHOT, DELTA).epsilon_rdp == epsilon_rdp([SUMS, BINS], DELTA)
        assert again.reserved(SNAPSHOT, DELTA).events == (dataclasses.replace(SUMS, count=9), BINS)


def test_the_limit_holds_what_the_lattice_adds(ledger):
    """Rounding to a coarse lattice costs epsilon on top of the divergences; both are held against the limit."""
    smooth = ledger.budget(table(), [SUMS], epsilon_limit=3.0, max_delta=DELTA)
    coarse = ledger.budget(table(), [COARSE], epsilon_limit=3.0, max_delta=DELTA)
    assert smooth.gap.eta < 1e-9
    assert coarse.gap.eta == 10 * COARSE.round_gap[0] > 0.01
    limit = epsilon_rdp([COARSE], DELTA)
    assert epsilon_rdp([SUMS], DELTA) < 0.99 * limit
    with pytest.raises(BudgetSpentError):
        reserve(ledger, events=[COARSE], limit=0.9999 * limit)
    reserve(ledger, events=[COARSE], limit=1.0001 * limit)
    with pytest.raises(BudgetSpentError):
        reserve(ledger, "job-2", events=[GaussianEvent(100.0)], limit=1.0001 * limit)


@pytest.mark.parametrize(
    "parameters", ["{}", '{"size": 20}', "[1, 2, 3, 4]", "no json", '{"size": 20, "share_stddev": "x"}']
)
def test_noise_in_shares_without_its_parameters_stops_the_work(ledger, path, parameters):
    spend(ledger)
    other = sqlite3.connect(path)
    other.execute(
        "INSERT INTO event VALUES (1, 'discrete_gaussian_shares', 4.0, 0.5, 1, 'poisson', 'add_or_remove_one', ?)",
        (parameters,),
    )
    other.commit()
    other.close()
    with pytest.raises(LedgerError, match="account"):
        ledger.spent(SNAPSHOT, DELTA)


# The file


def test_the_file_is_for_its_owner_only(ledger, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_others_can_read_is_refused(path):
    Ledger(path).close()
    path.chmod(0o644)
    with pytest.raises(LedgerError, match="chmod 600"):
        Ledger(path)


def test_repr_shows_the_path_only(ledger, path):
    assert repr(ledger) == f"Ledger({str(path)!r})"


def test_entries_cannot_be_changed_or_removed(ledger, path):
    spend(ledger)
    other = sqlite3.connect(path)
    for statement in (
        "DELETE FROM entry",
        "DELETE FROM event",
        "UPDATE entry SET stage = 'x'",
        "UPDATE event SET count = 0",
        "DELETE FROM snapshot",
        "UPDATE snapshot SET delta = 0.5",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="entries only grow"):
            other.execute(statement)
    other.close()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="folder exists"):
        Ledger(tmp_path / "nowhere" / "ledger.db")


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be looked at" * 20])
def test_an_emptied_or_foreign_file_is_refused_and_not_begun_anew(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(LedgerError, match="backup"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_file_is_refused(path):
    with Ledger(path) as ledger:
        for job in range(40):
            spend(ledger, f"job-{job}")
    whole = path.read_bytes()
    for start in range(4096, len(whole), 4096):
        path.write_bytes(whole[:start] + b"\xff" * 512 + whole[start + 512 :])
        with pytest.raises(LedgerError, match="backup"):
            Ledger(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LedgerError, match="backup"):
        Ledger(path)


def test_an_unknown_schema_version_is_refused(path):
    Ledger(path).close()
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(path)


@pytest.mark.parametrize(
    "values",
    [
        "'laplace', 1.0, 1.0, 1, 'none', 'add_or_remove_one'",
        "'gaussian', 0.0, 1.0, 1, 'none', 'add_or_remove_one'",
    ],
)
def test_an_event_that_cannot_be_accounted_for_stops_the_work(ledger, path, values):
    spend(ledger)
    other = sqlite3.connect(path)
    other.execute(f"INSERT INTO event VALUES (1, {values}, '{{}}')")
    other.commit()
    other.close()
    with pytest.raises(LedgerError, match="account"):
        ledger.spent(SNAPSHOT, DELTA)
    with pytest.raises(LedgerError, match="account"):
        reserve(ledger, "job-2")


@pytest.mark.parametrize(
    ("pragma", "reason"),
    [("query_only = ON", "readonly"), ("max_page_count = 1", "full")],
    ids=["readonly", "full disk"],
)
def test_what_cannot_be_written_may_not_leave(ledger, pragma, reason):
    reserve(ledger)
    before = ledger.entries()
    ledger._file._db.execute(f"PRAGMA {pragma}")

    def write_until_the_pages_of_the_file_are_full():
        for job in range(200):
            reserve(ledger, f"job {job} {'x' * 100}", events=[GaussianEvent(1000.0)])

    with pytest.raises(LedgerError, match=f"{reason}.*nothing may leave"):
        write_until_the_pages_of_the_file_are_full()
    recorded = ledger.entries()
    assert recorded[: len(before)] == before
    assert all(entry.events for entry in recorded)


def test_a_file_that_another_process_holds_is_refused(path, monkeypatch):
    monkeypatch.setattr("fedfin.privacy.ledger_file._BUSY_TIMEOUT_S", 0.1)
    with Ledger(path) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            reserve(ledger)
        other.execute("ROLLBACK")
        other.close()
        reserve(ledger)


# Real processes: killed at every point, and racing for the same budget

PROCESSES = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    from fedfin.errors import BudgetSpentError
    from fedfin.privacy.accounting import GaussianEvent
    from fedfin.privacy.ledger import Ledger
    from fedfin.privacy.snapshot import Snapshot

    LIMITS = dict(delta=1e-5, epsilon_limit=10.0, max_delta=1e-5)
    LOANS = Snapshot("snapshot", "row", bytes(16))
    BINS, ROUND = GaussianEvent(40.0), GaussianEvent(20.0, 0.5, 5)
    JOB = [BINS, GaussianEvent(20.0, 0.5, 10)]

    def in_a_process(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def run_job(path, kill_at, done, *, every=0):
        # kill_at counts SQL statements, or with `every` steps of SQLite's machine
        with Ledger(path) as ledger:
            points = [0]
            def point(*_):
                points[0] += 1
                if points[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            if every:
                ledger._file._db.set_progress_handler(point, every)
            else:
                ledger._file._db.set_trace_callback(point)
            if any(entry.kind == "release" for entry in ledger.entries()):
                return points[0]
            ledger.reserve("job", LOANS, JOB, **LIMITS)
            done("reserve")
            for stage, events in (("bins", [BINS]), ("round 1", [ROUND]), ("round 2", [ROUND])):
                ledger.commit("job", stage, events, "digest of " + stage)
                done(stage)
            ledger.release("job")
            done("release")
            return points[0]

    def summary(path):
        with Ledger(path) as ledger:
            spent, reserved = ledger.spent("snapshot", 1e-5), ledger.reserved("snapshot", 1e-5)
            kinds = [(e.kind, e.stage, e.release_digest, repr(e.events)) for e in ledger.entries()]
        return repr((spent, reserved, kinds))

    def crash(folder):
        ignore = lambda stage: None
        whole = folder / "whole.db"
        outcome = {"killed": 0, "wrong": []}
        for every in (0, 40):
            whole.unlink(missing_ok=True)
            num_points = run_job(whole, None, ignore, every=every)
            for kill_at in range(1, num_points + 1):
                path = folder / f"{every}-{kill_at}.db"
                log = open(folder / f"{every}-{kill_at}.log", "ab", buffering=0)
                record = lambda stage: log.write(stage.encode() + b";")
                status = in_a_process(lambda: run_job(path, kill_at, record, every=every))
                outcome["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                with Ledger(path) as ledger:
                    there = [e.stage or e.kind for e in ledger.entries()]
                    for entry in ledger.entries():
                        assert entry.events or entry.kind == "release"
                returned = Path(log.name).read_bytes().decode().split(";")[:-1]
                # at most the stage in progress is there without having returned
                if there[: len(returned)] != returned or len(there) > len(returned) + 1:
                    outcome["wrong"].append(["forgot", every, kill_at])
                run_job(path, None, ignore)
                if summary(path) != summary(whole):
                    outcome["wrong"].append(["total", every, kill_at])
            outcome[f"points_{every}"] = num_points
        return outcome

    def race(folder):
        outcomes = []
        for attempt in range(5):
            path, (reader, writer) = folder / f"race-{attempt}.db", os.pipe()
            children = []
            for racer in range(4):
                child = os.fork()
                if child == 0:
                    os.close(writer)
                    os.read(reader, 1)  # until the parent closes the gate
                    try:
                        with Ledger(path) as ledger:
                            limits = {**LIMITS, "epsilon_limit": float(sys.argv[3])}
                            ledger.reserve(f"job-{racer}", LOANS, JOB, **limits)
                    except BudgetSpentError:
                        os._exit(3)
                    except BaseException:
                        os._exit(4)
                    os._exit(0)
                children.append(child)
            os.close(reader)
            os.close(writer)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            outcomes.append(sorted(codes))
        return outcomes

    print(json.dumps({"crash": crash, "race": race}[sys.argv[1]](Path(sys.argv[2]))))
    """
)


def run_processes(*arguments):
    # a process of its own forks: the test's may have threads
    finished = subprocess.run(
        [sys.executable, "-c", PROCESSES, *map(str, arguments)],
        capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_process_killed_at_any_point_neither_forgets_nor_spends_twice(tmp_path):
    outcome = run_processes("crash", tmp_path)
    assert outcome["wrong"] == []
    assert outcome["killed"] == outcome["points_0"] + outcome["points_40"]
    assert outcome["points_0"] >= 25


def test_processes_that_race_never_pass_the_limit_together(tmp_path):
    assert run_processes("race", tmp_path, 1.2 * JOB_COST) == [[0, 3, 3, 3]] * 5


# The snapshot

SALT = b"0123456789abcdef"
FRAME = pd.DataFrame({"income": [1.0, 2.5, np.nan], "home": ["rent", None, "own"], "age": [30, 41, 52]})
LABELS = np.array([0, 1, 0])


def test_a_snapshot_ignores_the_order_of_rows_and_columns_and_how_numbers_are_held():
    expected = snapshot_of(FRAME, LABELS, SALT)
    assert len(expected.digest) == 64
    order = [2, 0, 1]
    assert snapshot_of(FRAME.iloc[order], LABELS[order], SALT) == expected
    assert snapshot_of(FRAME[["age", "home", "income"]], LABELS, SALT) == expected
    assert snapshot_of(FRAME.astype({"age": "float64"}), LABELS.astype(bool), SALT) == expected
    assert (
        snapshot_of(FRAME.astype({"home": "category", "age": "Int64"}), LABELS.astype("float32"), SALT)
        == expected
    )


@pytest.mark.parametrize(
    "frame",
    [
        FRAME.assign(age=[30, 41, 53]),
        FRAME.assign(home=["rent", None, "Own"]),
        FRAME.assign(home=["rent", "", "own"]),
        FRAME.assign(income=[1.0, 2.5, 0.0]),
        FRAME.assign(income=[2.5, 1.0, np.nan]),
        FRAME.rename(columns={"age": "years"}),
    ],
    ids=["number", "text", "missing text", "missing number", "cells swapped", "name"],
)
def test_another_table_is_another_snapshot(frame):
    assert snapshot_of(frame, LABELS, SALT).digest != snapshot_of(FRAME, LABELS, SALT).digest


def test_other_labels_salts_and_repeated_rows_are_other_snapshots():
    twice = pd.concat([FRAME, FRAME.iloc[:1]])
    digests = {
        snapshot_of(FRAME, LABELS, SALT).digest,
        snapshot_of(FRAME, 1 - LABELS, SALT).digest,
        snapshot_of(FRAME, LABELS, SALT[::-1]).digest,
        snapshot_of(twice, np.array([0, 1, 0, 0]), SALT).digest,
    }
    assert len(digests) == 4


def test_a_snapshot_needs_a_salt_rows_labels_and_distinct_names():
    with pytest.raises(PrivacyParameterError, match="token_bytes"):
        snapshot_of(FRAME, LABELS, b"short")
    for frame, labels in (
        (FRAME.iloc[:0], LABELS[:0]),
        (FRAME, LABELS[:2]),
        (FRAME.set_axis(["a", "b", "a"], axis=1), LABELS),
    ):
        with pytest.raises(DataError, match="snapshot"):
            snapshot_of(frame, labels, SALT)

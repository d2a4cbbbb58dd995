"""A lender's log: every line is whole and on the disk when the call returns, or the call is refused."""

import datetime as dt
import json
import os
import re
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfin.audit import journal as module
from fedfin.audit.journal import Journal
from fedfin.errors import ConfigError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_when_and_what(path):
    before = dt.datetime.now(dt.UTC) - dt.timedelta(milliseconds=1)
    Journal(path).write("released", job="credit-1", epsilon=0.5, digest=None)
    (line,) = lines(path)
    assert list(line) == ["time", "event", "job", "epsilon", "digest"]
    assert (line["event"], line["job"], line["epsilon"], line["digest"]) == (
        "released",
        "credit-1",
        0.5,
        None,
    )
    assert before <= dt.datetime.fromisoformat(line["time"]) <= dt.datetime.now(dt.UTC)


def test_lines_are_appended_by_this_journal_and_the_next(path):
    journal = Journal(path)
    journal.write("one")
    journal.write("two")
    Journal(path).write("three")
    assert [line["event"] for line in lines(path)] == ["one", "two", "three"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_line_and_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("journal") / "log.jsonl"
    Journal(path).write("refused", reason=text)
    kept = path.read_bytes()
    assert (kept.count(b"\n"), kept[-1:]) == (1, b"\n")
    assert json.loads(kept)["reason"] == text


def test_lines_of_several_threads_do_not_mix(path):
    def write(number):
        for _ in range(5):
            Journal(path).write("event", number=number, text="x" * 500)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["number"] for line in lines(path)) == sorted([0, 1, 2, 3] * 5)


def test_a_line_is_on_the_disk_when_the_call_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    Journal(path).write("one")
    assert synced == [path.stat().st_size]


def test_the_log_is_readable_by_its_owner_only(path):
    before = os.umask(0)
    try:
        Journal(path).write("one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_logged_does_not_go_on(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "gone" / "log.jsonl", "No such file or directory"),
    ):
        refusal = f"{path} cannot be written ({reason}); free the disk: nothing goes on unlogged"
        with pytest.raises(ConfigError, match=f"^{re.escape(refusal)}$"):
            Journal(path).write("released")


def test_a_full_disk_is_refused(tmp_path):
    full = tmp_path / "log.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"log\.jsonl cannot be written \(No space left on device\)"):
        Journal(full).write("released")


def test_a_line_that_the_disk_takes_in_part_is_refused(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, data: real(descriptor, data[:10]))
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        Journal(path).write("released")

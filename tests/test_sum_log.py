"""The log of what left a lender in secure sums: durable, complete, and exact about what is nearly equal."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfin.client.sum_log import NEARLY_EQUAL, SumLog
from fedfin.errors import ConfigError

NORTH_SOUTH = frozenset({"north", "south"})
WEIGHTS = np.linspace(-1.0, 1.0, 50, dtype=np.float32)
NONE = np.zeros(0, np.float32)


@pytest.fixture
def log(tmp_path):
    return SumLog(tmp_path / "sums")


def stages(found):
    return [(released.stage, released.attempt) for released in found]


def test_what_was_recorded_is_there_after_a_restart(log, tmp_path):
    log.open("round 1", 0)
    log.release("round 1", 0, NORTH_SOUTH, WEIGHTS)
    log.confirm("round 1", 0, ["south", "north"])
    log.open("round 2", 0)
    for found in (log, SumLog(tmp_path / "sums")):
        assert found.was_opened("round 1", 0)
        assert found.was_opened("round 2", 0)
        assert not found.was_opened("round 1", 1)
        (released,) = found.released
        assert (released.sharers, released.survivors) == (NORTH_SOUTH, NORTH_SOUTH)
        assert stages(found.alike("round 2", WEIGHTS)) == [("round 1", 0)]


def test_looking_makes_nothing(log, tmp_path):
    assert log.alike("bins", NONE) == ()
    assert not (tmp_path / "sums").exists()


@given(
    st.floats(0.0, 3.0),
    st.integers(0, 2**31),
    st.floats(1e-3, 1e3),
)
def test_models_are_alike_up_to_the_stated_relative_distance(tmp_path_factory, times, seed, scale):
    log = SumLog(tmp_path_factory.mktemp("log") / "sums")
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=40) * scale).astype(np.float32)
    step = rng.normal(size=40)
    step *= times * NEARLY_EQUAL * np.linalg.norm(weights) / np.linalg.norm(step)
    other = (weights + step).astype(np.float32)
    distance = np.linalg.norm(other.astype(np.float64) - weights)
    largest = max(1.0, *(np.linalg.norm(one.astype(np.float64)) for one in (weights, other)))
    log.release("round 1", 0, NORTH_SOUTH, weights)
    is_near = distance <= NEARLY_EQUAL * largest
    assert stages(log.alike("round 2", other)) == ([("round 1", 0)] if is_near else [])


@pytest.mark.parametrize("weight", [0.0, -0.0, 1e-45, 1e-30, -9e-6])
def test_models_of_zeros_and_of_next_to_nothing_are_alike(log, weight):
    zeros = np.zeros(3, np.float32)
    log.release("round 1", 0, NORTH_SOUTH, zeros)
    assert stages(log.alike("round 2", np.float32([0.0, weight, 0.0]))) == [("round 1", 0)]
    assert log.alike("round 2", np.float32([0.0, 1.1e-5, 0.0])) == ()


def test_stages_of_another_kind_are_not_alike(log):
    log.release("round 1", 0, NORTH_SOUTH, WEIGHTS)
    log.release("bins", 0, NORTH_SOUTH, NONE)
    assert log.alike("evaluation 1", WEIGHTS) == ()
    assert stages(log.alike("bins", NONE)) == [("bins", 0)]


def test_a_model_of_another_size_is_taken_for_a_nearly_equal_one(log):
    log.release("round 1", 0, NORTH_SOUTH, WEIGHTS)
    # as the same model has under bins with one more that no loan is in
    assert stages(log.alike("round 2", np.append(WEIGHTS, np.float32(0)))) == [("round 1", 0)]


def test_a_line_that_a_crash_cut_never_left_and_is_dropped(log, tmp_path):
    log.open("round 1", 0)
    path = tmp_path / "sums" / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"what":"released","stage":"rou')
    again = SumLog(tmp_path / "sums")
    assert again.was_opened("round 1", 0)
    assert again.released == ()
    again.open("round 2", 0)
    assert SumLog(tmp_path / "sums").was_opened("round 2", 0)


def test_a_full_disk_stops_the_vector_and_leaves_the_log_whole(log, tmp_path, monkeypatch):
    log.open("round 1", 0)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:10]))
        with pytest.raises(ConfigError, match="nothing leaves unrecorded"):
            log.open("round 2", 0)
    assert not log.was_opened("round 2", 0)
    log.open("round 3", 0)
    again = SumLog(tmp_path / "sums")
    assert (again.was_opened("round 2", 0), again.was_opened("round 3", 0)) == (False, True)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"[]\n",
        b"{}\n",
        b'{"what":"opened","stage":"bins"}\n',
        b'{"what":"forgotten","stage":"bins","attempt":0}\n',
        b'{"what":"confirmed","stage":"bins","attempt":0,"survivors":[]}\n',
        b'{"what":"released","stage":"bins","attempt":0,"sharers":7,"norm":0.0,"size":0}\n',
    ],
)
def test_a_damaged_log_stops_everything_until_it_is_restored(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match="is damaged"):
        SumLog(tmp_path)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_lost_weights_stop_the_comparison(log, tmp_path, how):
    log.release("round 1", 0, NORTH_SOUTH, WEIGHTS)
    path = tmp_path / "sums" / "round-1.0.f32"
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="is damaged"):
        log.alike("round 2", WEIGHTS)


def test_only_this_user_reads_what_was_asked(log, tmp_path):
    log.release("round 1", 0, NORTH_SOUTH, WEIGHTS)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "sums").iterdir()}
    assert modes == {"log.jsonl": 0o600, "round-1.0.f32": 0o600}
    assert (tmp_path / "sums").stat().st_mode & 0o777 == 0o700
    (line,) = (tmp_path / "sums" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["what"] == "released"

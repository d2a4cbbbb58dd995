"""A running federation under secure aggregation: what the coordinator gets is the sum of what the lenders encoded.

Six real lender processes, TLS and Flower's SuperLink. One lender is killed when it is asked for its masked vector,
after it has shared its keys, and one when it is asked to confirm, after its vector has left. Both take part again.
"""

import json

import numpy as np
import pytest
from federation import federation, shares
from numpy.testing import assert_array_equal
from recording import install

from fedfin.audit.events import JobEnded
from fedfin.privacy.encoding import Layout, Segment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = tuple(f"bank-{letter}" for letter in "abcdef")
KILLED_ON = {"bank-f": "round 2 mask", "bank-e": "round 5 confirm"}
LOCAL = {
    "name": "local",
    "training": {"rounds": 8, "local_steps": 2, "learning_rate": 0.1},
    "privacy": {"epsilon": 3.0},
    "cohort": {"min_lenders": 5, "round_deadline_s": 30.0},
}
SHARED = {
    "name": "shared",
    "training": {"rounds": 8, "local_steps": 1, "learning_rate": 0.07},
    "privacy": {"mode": "shared", "epsilon": 3.0, "planned_dropouts": 1, "planned_colluders": 1},
    "cohort": {"min_lenders": 5, "round_deadline_s": 30.0},
}


def layout_of(record):
    said = json.loads(str(record["layout"]))
    segments = tuple(Segment(**segment) for segment in said["segments"])
    return Layout(segments, said["num_lenders"], said["ring_bits"])


def records(directory):
    return {path.stem: _loaded(path) for path in sorted(directory.glob("*.npz"))}


def _loaded(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("job", [LOCAL, SHARED], ids=["local", "shared"])
def test_each_sum_is_that_of_the_survivors_vectors_whoever_is_killed(tmp_path, monkeypatch, job):
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path)))
    with federation(tmp_path, job) as built:
        built.start_server()
        for name, rows in zip(NAMES, shares(len(NAMES)), strict=True):
            built.enrol(name, rows)
        for name in NAMES:
            with monkeypatch.context() as dying:
                dying.setenv("FEDFIN_TEST_DIE", KILLED_ON.get(name, ""))
                built.start_lender(name)
        for name in KILLED_ON:
            assert built.wait_for_end(name, timeout_s=120) == 9
            built.start_lender(name)
        assert built.wait_for_end("server", timeout_s=400) == 0, built.tail("server")
        sums = records(tmp_path / "sums")
        vectors = {name: records(built.directory / name / "recorded") for name in NAMES}
    assert {str(made["stage"]) for made in sums.values()} >= {"bins", *(f"round {n}" for n in range(1, 9))}
    survivors = {}
    for digest, made in sums.items():
        stage = str(made["stage"])
        survivors[stage] = tuple(str(name) for name in made["survivors"])
        added = [vectors[name][digest] for name in survivors[stage]]
        layout = layout_of(added[0])
        # bit for bit, in the ring
        in_ring = np.sum([one["encoded"] for one in added], axis=0, dtype=np.uint32)
        ring = np.uint32(2**layout.ring_bits - 1)
        assert_array_equal(made["total"] & ring, in_ring & ring)
        decoded = layout.decode(made["total"])
        for segment in layout.segments:
            part = f"part {segment.name}"
            # what the job's loop goes on with
            assert_array_equal(made[part], decoded[segment.name])
            # the lenders' own values, rounded to the nearest quantum each
            plain = np.sum([one[part] for one in added], axis=0)
            assert np.abs(decoded[segment.name] - plain).max() <= len(added) / 2 * segment.step * (1 + 1e-9)
    assert "bank-f" not in survivors["round 2"]
    assert len(survivors["round 2"]) == 5
    assert "bank-e" in survivors["round 5"], "its vector had left"
    assert survivors["round 1"] == NAMES
    # five at least are in every sum, so one of the two takes part again
    assert len(survivors["round 8"]) >= 5


def test_a_dealer_of_no_secret_ends_the_job_and_every_lender_has_what_it_did_not_spend_back(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path)))
    with federation(tmp_path, LOCAL) as built:
        built.start_server()
        for name, rows in zip(NAMES, shares(len(NAMES)), strict=True):
            built.enrol(name, rows)
        for name in NAMES:
            with monkeypatch.context() as dealing:
                dealing.setenv("FEDFIN_TEST_DEAL_FALSELY", "round 2" if name == "bank-f" else "")
                built.start_lender(name)
        assert built.wait_for_end("server", timeout_s=120) == 1
        assert "fedfin server remove bank-f" in " ".join(built.output("server").split())
        (found,) = built.events("sum_liars")
        assert (found["rule"], found["lenders"], found["stage"]) == ("false_dealer", ["bank-f"], "round 2")
        (end,) = built.events("given_up")
        assert (end["told"], end["missing"]) == (list(NAMES), [])
        shown = built.fedfin("server", "status", "--config", built.config, "--json").stdout
        (job,) = json.loads(shown)["jobs"]
        assert (job["state"], job["goes_on"], job["round"]) == ("failed", False, 1)
        assert list(job["refused"]) == ["bank-f"]
        for name in NAMES:
            (entry,) = built.journal(name, JobEnded)
            assert entry.status == "abandoned"
            lender = json.loads(
                built.fedfin("client", "status", "--config", built.bank(name), "--json").stdout
            )
            assert [one["reserved_rdp"] for one in lender["snapshots"]] == [0.0] * len(lender["snapshots"])
            assert max(one["epsilon_rdp"] for one in lender["snapshots"]) > 0.0
        assert b"\x1b" not in (built.config.parent / "link.log").read_bytes()
        assert b"\x1b" not in (built.config.parent / "serverapp.log").read_bytes()

"""A round is done again from its transcript, to the bit, and whatever was changed in it is named."""

import json
import shutil

import numpy as np
import pytest
import rosters
from lenders import ROOT, schema
from secure_house import hurry, job_of
from typer.testing import CliRunner
from witnessed_house import WitnessedHouse

from fedfin.audit.events import RoundCompleted
from fedfin.audit.sealing import read_seal
from fedfin.credit.binning import Bins
from fedfin.credit.export import ReleasedModel, save_model
from fedfin.errors import AuditError
from fedfin.server.journal import Journal
from fedfin.server.replaying import last_round, replay
from fedfin.server.sealing import seal_finished
from fedfin.server.transcripts import Transcripts


def finished(house, plan, tmp_path):
    """A sealed run directory as `fedfin server` leaves it, with transcripts."""
    runs, root = tmp_path / "runs", tmp_path / "ca.pem"
    kept = Transcripts(runs / "run")
    final = house.run(plan, transcripts=kept)
    (job,) = house.store.jobs()
    (runs / "run").rename(runs / job.job_id)
    run = runs / job.job_id
    (run / "run.json").write_text(json.dumps({"job": job.job_id, "plan": json.loads(job.plan)}))
    model = ReleasedModel(
        job.job_id,
        final.round,
        job.plan,
        schema(),
        Bins.from_json(final.bins),
        final.fingerprint,
        final.weights,
    )
    save_model(model, run / "model")
    root.write_bytes(ROOT)
    with house.log() as log:
        seal_finished(runs, root, house.store, rosters.coordinator(), Journal(log))
    return run, model.digest


@pytest.fixture
def house(tmp_path, monkeypatch):
    hurry(monkeypatch)
    built = WitnessedHouse(tmp_path / "house")
    yield built
    built.close()


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    (tmp_path / "house").mkdir()


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_every_round_of_a_job_is_done_again_with_the_same_digests(house, tmp_path, mode):
    """One lender dies before it masks in round 2: what is taken off the sum for it is in the transcript."""
    house.fault = lambda name, question, stage: (
        "away" if (name, stage, type(question).__name__) == ("bank-c", "round 2", "Mask") else None
    )
    run, digest = finished(house, job_of(mode, rounds=3, times=1), tmp_path)
    assert last_round(run) == 3
    logged = {event.round: event for event in house.entries(RoundCompleted)}
    for number in (1, 2, 3):
        done = replay(run, number)
        assert done.model == logged[number].model_after
        assert done.survivors == logged[number].cohort
    assert "bank-c" not in logged[2].cohort
    assert replay(run, 3).model == digest
    assert all(event.transcript for event in logged.values())
    assert read_seal(run).job == run.name


def test_the_last_attempt_at_a_stage_counts_and_ten_comes_after_nine(house, tmp_path):
    kept = Transcripts(finished(house, job_of("none", rounds=1), tmp_path)[0])
    first = kept.path("round 1", 0)
    for suffix in (".json", ".bin"):
        shutil.copy(first.with_suffix(suffix), kept.path("round 1", 10).with_suffix(suffix))
    kept.path("round 1", 9).write_text("an attempt that is not read")
    assert kept.read("round 1").vectors.keys() == kept.read("bins").vectors.keys()


def change_vector(run):
    path = run / "transcripts" / "round-1.0.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_vector_and_its_digest(run):
    kept = Transcripts(run).read("round 1")
    kept.vectors["bank-a"] = kept.vectors["bank-a"] + np.uint32(1)
    kept.write(run / "transcripts" / "round-1.0.json")


def change_question(run):
    kept = Transcripts(run).read("round 1")
    kept.question = kept.question[:-1] + bytes([kept.question[-1] ^ 1])
    kept.write(run / "transcripts" / "round-1.0.json")


def drop_lender(run):
    kept = Transcripts(run).read("round 1")
    del kept.vectors["bank-a"]
    kept.write(run / "transcripts" / "round-1.0.json")


def lose_transcript(run):
    (run / "transcripts" / "bins.0.json").unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_vector, "round-1.0.json is missing or was changed"),
        (change_vector_and_its_digest, "the sum of round 1 is not the one that was logged"),
        (change_question, "the question of round 1"),
        (drop_lender, "the transcript of round 1 .* gives no sum"),
        (lose_transcript, "holds no transcript of bins"),
    ],
)
def test_what_was_changed_in_a_transcript_is_named(house, tmp_path, change, named):
    run, _ = finished(house, job_of("none", rounds=1, times=0), tmp_path)
    change(run)
    with pytest.raises(AuditError, match=named):
        replay(run, 1)
    with pytest.raises(AuditError, match="cannot be done again: the log names rounds"):
        replay(run, 2)


def test_a_log_that_was_changed_is_nothing_to_compare_with(house, tmp_path):
    run, _ = finished(house, job_of("local", rounds=1), tmp_path)
    content = (run / "audit.db").read_bytes()
    (run / "audit.db").write_bytes(content.replace(b'"step":"unmasked"', b'"step":"released"'))
    assert (run / "audit.db").read_bytes() != content
    with pytest.raises(AuditError, match=r"audit\.db does not hold"):
        replay(run, 1)


def test_the_command_says_what_it_did_and_fails_by_exit_1(house, tmp_path):
    import typer

    from fedfin.cli_audit_replay import replay_command

    app = typer.Typer()
    app.command()(replay_command)
    run, digest = finished(house, job_of("none", rounds=1, times=0), tmp_path)
    shown = CliRunner().invoke(app, ["1", "--run", str(run), "--json"])
    assert json.loads(shown.output)["model"] == digest
    change_vector(run)
    assert CliRunner().invoke(app, ["1", "--run", str(run)]).exit_code == 1

"""An evidence pack holds what a stranger needs, tells it in one page, and no byte of it can be changed unseen."""

import copy
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from evidence_house import JOB, MEMBERS, evaluation, federation_log, run_directory
from rosters import authority, coordinator

from fedfin.audit.evidence import AuditBound, ColumnCard, Evidence, Gain, PrivacyFigures
from fedfin.audit.inspecting import inspect
from fedfin.audit.log_story import read_story
from fedfin.audit.obligations import OBLIGATIONS
from fedfin.audit.pack import write_pack
from fedfin.audit.pack_files import seal_pack
from fedfin.audit.pack_plots import fairness_plot, svg
from fedfin.audit.run_record import read_run
from fedfin.audit.verifying import Trust
from fedfin.errors import AuditError
from fedfin.identity import create_identity_key

PRIVACY = PrivacyFigures(
    "Gaussian noise", 1e-5, 2.99, 2.76, (2.76, 6.1, 10.0), 6.5, 2.6, "Nobody else is trusted."
)
ROOT = Trust(frozenset({authority().fingerprint}))


def evidence_of(run, **more):
    record = read_run(run)
    return Evidence(run=record, story=read_story(run / "audit.db", record.job), privacy=PRIVACY, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and its pack as a folder and as a zip file: made once, since drawing takes a second."""
    folder = tmp_path_factory.mktemp("made")
    evidence = evidence_of(run_directory(folder))
    write_pack(evidence, folder / "pack", key=coordinator().key)
    write_pack(evidence, folder / "pack.zip", as_zip=True, key=coordinator().key)
    return folder


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path)


@pytest.fixture
def folder(made, tmp_path):
    """A signed pack to do something to."""
    return Path(shutil.copytree(made / "pack", tmp_path / "pack"))


def test_a_pack_holds_the_run_and_what_to_read_and_passes(made, folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"report.html", "model-card.md", "evidence.json", "README.txt", "manifest.json"} <= names
    run = made / "runs" / JOB
    assert {path.name for path in run.iterdir()} == {path.name for path in (folder / "run").iterdir()}
    found = inspect(folder, ROOT)
    assert (found.wrong, found.notes, found.log.anchored.by) == (None, [], MEMBERS)
    assert [check.what for check in found.checked][:3] == ["manifest", "seal", "roster"]
    assert "run" in {check.what for check in found.checked}


def test_a_pack_is_one_zip_file_the_same_for_the_same_run(made, tmp_path):
    run = made / "runs" / JOB
    second = write_pack(evidence_of(run), tmp_path / "pack.zip", as_zip=True, key=coordinator().key)
    assert (made / "pack.zip").read_bytes() == second.path.read_bytes()
    assert inspect(second.path, ROOT).wrong is None


def test_no_byte_of_a_zipped_pack_can_be_changed(made, tmp_path):
    path = Path(shutil.copy(made / "pack.zip", tmp_path))
    content = path.read_bytes()
    rng = random.Random(0)
    heads = [
        entry.header_offset + shift for entry in zipfile.ZipFile(path).infolist() for shift in (8, 10, 38)
    ]
    tail = range(len(content) - 40, len(content))
    for place in [*heads, *tail, *rng.sample(range(len(content)), 60)]:
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
        found = inspect(path, ROOT)
        assert found.wrong is not None, place


def test_no_byte_of_an_unzipped_pack_can_be_changed_and_the_file_is_named(folder):
    rng = random.Random(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = inspect(folder, ROOT)
        assert found.wrong is not None, path
        name = path.relative_to(folder).as_posix()
        assert name in found.wrong.what or name == "manifest.json"
        path.write_bytes(content)
    assert inspect(folder, ROOT).wrong is None


def test_a_file_that_was_added_or_taken_away_is_named(folder):
    (folder / "run" / "more.txt").write_text("x")
    assert "run/more.txt was added" in inspect(folder).wrong.what
    (folder / "run" / "more.txt").unlink()
    (folder / "run" / "metrics.json").unlink()
    assert "run/metrics.json is missing" in inspect(folder).wrong.what


def test_a_pack_that_nobody_signed_says_so_and_one_of_another_signer_is_refused(folder):
    seal_pack(folder, JOB, None)
    assert "nobody signed the pack's manifest" in inspect(folder, ROOT).wrong.what
    found = inspect(folder, Trust())
    assert found.wrong is None
    assert any("nobody signed the pack's manifest" in note for note in found.notes)
    seal_pack(folder, JOB, create_identity_key())
    assert "not the coordinator's" in inspect(folder, ROOT).wrong.what
    seal_pack(folder, "another", coordinator().key)
    assert "is of the job another" in inspect(folder, ROOT).wrong.what


def test_a_zip_whose_files_share_their_bytes_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", b"0" * 10_000)
        entry = archive.getinfo("a")
        for number in range(50):
            again = copy.copy(entry)
            again.filename = f"a{number}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    told = inspect(path).wrong.what
    assert "together larger" in told or "Overlapped" in told


def test_a_zip_that_leads_out_of_its_folder_or_holds_a_bomb_is_refused(tmp_path):
    for name, method in (("../out.txt", zipfile.ZIP_STORED), ("bomb", zipfile.ZIP_DEFLATED)):
        path = tmp_path / "pack.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, b"0" * 100)
        assert "is no file of a pack" in inspect(path).wrong.what
    assert not (tmp_path / "out.txt").exists()


def test_a_pack_is_written_whole_over_nothing(run, tmp_path):
    (tmp_path / "pack").mkdir()
    with pytest.raises(AuditError, match="exists already"):
        write_pack(evidence_of(run), tmp_path / "pack")
    (run / "link").symlink_to(run / "run.json")
    with pytest.raises(AuditError, match="no plain file"):
        write_pack(evidence_of(run), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_report_loads_nothing_and_tells_of_every_section(run, tmp_path):
    evidence = evidence_of(
        run,
        audit=AuditBound(2.3, 2.76, 0.999, passed=True),
        columns=(ColumnCard("Income", "numeric", "income", "yes"),),
        label="ninety days past due",
        gains=(Gain("city-bank", 0.01, -0.01, 0.03),),
        is_simulated=True,
    )
    folder = write_pack(evidence, tmp_path / "pack").path
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|<script|url\((?!#)""", page)
    for heading in (
        "What was agreed", "Who took part", "Rounds", "How the model does", "Over the rounds", "Calibration",
        "Fairness", "What each lender gains", "What it costs", "Where it comes from", "The log", "which duty",
    ):  # fmt: skip
        assert heading in page
    for said in (
        "Simulated",
        "1 attempt was lost",
        "city-bank",
        "k = 1: 2.76",
        "Attacked",
        "supports",
        *MEMBERS,
    ):
        assert said in page
    assert page.count("<svg") == 6
    card = (folder / "model-card.md").read_text()
    assert "ninety days past due" in card
    assert "| Income | numeric | income | yes |" in card


def test_a_section_that_the_run_holds_nothing_for_is_left_out(run, tmp_path):
    (run / "metrics.json").unlink()
    record = read_run(run)
    folder = write_pack(Evidence(run=record, story=None, privacy=None), tmp_path / "pack").path
    page = (folder / "report.html").read_text()
    for heading in (
        "How the model does</h2>",
        "Calibration",
        "Fairness",
        "What each lender gains",
        "Attacked",
    ):
        assert heading not in page
    assert "no differential privacy" in page
    assert "kept no signed log" in page


def test_names_from_a_run_are_text_in_the_page(tmp_path):
    run = run_directory(tmp_path)
    text = (run / "rounds.jsonl").read_text().replace("no answer", "<script>alert(1)</script>")
    (run / "rounds.jsonl").write_text(text)
    lines = text + '{"event": "refused", "lender": "x", "reason": "<script>"}\n'
    (run / "rounds.jsonl").write_text(lines)
    page = (write_pack(evidence_of(run), tmp_path / "pack").path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_no_text_of_a_pack_says_that_anyone_complies(folder):
    for name in ("report.html", "model-card.md", "README.txt", "evidence.json"):
        assert not re.search(r"\bcompl(y|ies|iant)\b", (folder / name).read_text(), re.IGNORECASE)
    for text in (
        "SR 26-2",
        "article 12",
        "article 13",
        "article 19",
        "1002",
        "GDPR",
        "JR/T 0196",
        "JR/T 0221",
    ):
        assert any(text in row.source for row in OBLIGATIONS)


def test_a_run_whose_files_do_not_fit_each_other_is_refused(tmp_path):
    run = run_directory(tmp_path)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"epsilon": 3.0', '"epsilon": 4.0'))
    with pytest.raises(AuditError, match="plan was changed after the run"):
        read_run(run)
    (run / "run.json").write_text(text.replace('c",\n "completed', 'd",\n "completed'))
    with pytest.raises(AuditError, match="is of the model"):
        read_run(run)
    (run / "run.json").write_text("{")
    with pytest.raises(AuditError, match="is no JSON"):
        read_run(run)
    with pytest.raises(AuditError, match="cannot be read"):
        read_run(tmp_path)


def test_the_story_tells_who_agreed_to_what(tmp_path):
    story = read_story(federation_log(tmp_path / "fed") / "audit.db", JOB)
    assert story.consents == dict.fromkeys(MEMBERS, ("accepted", True))
    assert sorted(story.members) == list(MEMBERS)
    assert story.cosigned_by == MEMBERS
    assert len(story.rosters) == len(story.approvals) == len(story.decisions) == 1
    shutil.rmtree(tmp_path / "fed")


@pytest.mark.parametrize("label", ["$0 to $500", "$\\frac{", "--><script>x</script>"])
def test_a_category_is_drawn_as_it_stands(label):
    told = {**evaluation(1, 1)}
    told["fairness"][0]["groups"][1]["label"] = label
    drawn = svg(fairness_plot(told))
    assert "<script" not in drawn
    assert "<" in label or f"Sex: {label}" in drawn

"""A lender's log as its code writes it: its first entry, several processes, what an older release left."""

import hashlib
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from lender_log import logged, types_of
from lenders import ROOT, lender_folder

from fedfin.audit.checkpoint import NoteKey, verify_note
from fedfin.audit.events import Founding, JobEnded, Policy
from fedfin.audit.log import AuditLog
from fedfin.audit.verifying import verify_log
from fedfin.client.folder import LenderFolder
from fedfin.errors import AuditError
from fedfin.identity import create_authority, load_lender_keys

WRITER = """
import sys
from pathlib import Path
from fedfin.audit.events import JobEnded
from fedfin.client.folder import LenderFolder
folder = LenderFolder(Path(sys.argv[1]))
for number in range(100):
    folder.journal.write(JobEnded(job=f"{sys.argv[2]}-{number}", status="completed"))
folder.journal.close()
"""


@pytest.fixture
def folder(tmp_path):
    return LenderFolder(lender_folder(tmp_path / "bank"))


def ended(number):
    return JobEnded(job=f"job-{number}", status="completed")


def test_what_was_noted_is_written_with_the_next_write_in_its_order(folder):
    folder.journal.note(ended(1), ended(2))
    assert not folder.journal.path.exists()
    folder.journal.write(ended(3))
    folder.journal.flush()
    assert [event.job for event in logged(folder.directory, JobEnded)] == ["job-1", "job-2", "job-3"]


def test_what_could_not_be_written_stays_noted(folder, monkeypatch):
    def full(*_):
        raise AuditError("the disk is full")

    folder.journal.write(ended(1))
    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append_many", full)
        with pytest.raises(AuditError, match="the disk is full"):
            folder.journal.write(ended(2))
    folder.journal.write(ended(3))
    assert [event.job for event in logged(folder.directory, JobEnded)] == ["job-1", "job-2", "job-3"]


def test_the_first_entry_says_whose_log_it_is_and_what_was_before_it(folder):
    earlier = b'{"event": "enrolled"}\n'
    (folder.directory / "log.jsonl").write_bytes(earlier)
    folder.journal.write(ended(1))
    (founding,) = logged(folder.directory, Founding)
    assert (founding.federation, founding.earlier) == ("test", hashlib.sha256(earlier).hexdigest())
    assert (folder.directory / "log.jsonl").read_bytes() == earlier
    key = load_lender_keys(folder.directory / "keys").identity.public_key()
    origin = f"fedfin/test/{founding.root[:16]}/lender/north-bank"
    seen = verify_note(folder.journal.checkpoint(), {origin: NoteKey("signer", key)})
    assert seen.checkpoint.size == 2


def test_a_log_that_is_gone_is_not_begun_anew(folder):
    folder.journal.write(ended(1))
    folder.journal.close()
    folder.approved_roster_path.write_text("{}")  # an approval was logged before it was kept
    folder.journal.path.unlink()
    with pytest.raises(AuditError, match=r"is gone.*restore"):
        folder.journal.write(ended(2))
    assert not folder.journal.path.exists()


def test_two_processes_write_one_log(folder):
    """A running client, and commands of its engineer: each looks at what the other wrote."""
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(folder.config_path), name])
        for name in ("one", "two")
    ]
    folder.journal.write(Policy(digest="0" * 64))
    assert [process.wait(60) for process in running] == [0, 0]
    folder.journal.write(Policy(digest="1" * 64))
    folder.journal.close()
    assert verify_log(folder.journal.path).ok
    assert types_of(folder.directory).count("job_ended") == 200
    assert len(logged(folder.directory, Founding)) == 1
    for name in ("one", "two"):
        jobs = [event.job for event in logged(folder.directory, JobEnded) if event.job.startswith(name)]
        assert jobs == [f"{name}-{number}" for number in range(100)]


def test_another_federations_root_makes_another_log(folder, tmp_path):
    folder.journal.write(ended(1))
    other = LenderFolder(lender_folder(tmp_path / "other"))
    other.root_path.write_bytes(create_authority("test").root.public_bytes(Encoding.PEM))
    other.journal.write(ended(1))
    assert folder.root_path.read_bytes() == ROOT
    assert folder.journal.log.origin != other.journal.log.origin

"""What is read of a log is of one moment, though other processes append to it: no half of what they wrote is seen."""

import pytest
from audit_logs import new_log, round_event
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfin.audit import merkle
from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import LogReader, open_log
from fedfin.audit.verifying import verify_log
from fedfin.errors import AuditError


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.db"


@pytest.fixture
def other(path, key):
    """The log as another process has it open."""
    with new_log(path, key, num_entries=5) as log:
        yield log


@pytest.mark.parametrize("checked", ["last_signed", "public_key", "connection"])
def test_a_log_is_opened_while_another_process_appends(path, key, other, monkeypatch, checked):
    """The other's entries and its checkpoint come between two looks at the file's end."""
    found = LogReader.__dict__[checked]
    read = found.fget if isinstance(found, property) else found

    def meddling(log):
        if log is not other and not log.__dict__.setdefault("meddled", False):
            log.meddled = True
            other.append_many([round_event(number) for number in range(3)])
            other.checkpoint()
        return read(log)

    monkeypatch.setattr(LogReader, checked, property(meddling) if isinstance(found, property) else meddling)
    with AuditLog.open(path, key=key) as log:
        assert log.meddled
        assert log.size == 8
        assert log.append(round_event()) == 8
    assert verify_log(path).ok


def test_a_root_and_its_size_are_of_one_moment(path, key, other):
    with AuditLog.open(path, key=key) as log:
        with log.snapshot():
            size = log.size
            other.append_many([round_event(number) for number in range(3)])
            assert (log.size, log.root()) == (size, other.root(size))
            with log.snapshot():  # nested: the same moment
                assert log.size == size
            assert log.size == size
            old, new = log.root(3), log.root()
            merkle.verify_consistency(3, size, old, new, log.consistency(3))
        assert (log.size, log.root()) == (8, other.root())


def test_nothing_is_appended_as_of_an_earlier_moment(other):
    with other.snapshot():
        with pytest.raises(AuditError, match="is being read as of one moment"):
            other.append(round_event())
        assert other.size == 5
    assert other.append(round_event()) == 5


def test_what_was_being_read_when_it_failed_holds_nobody_up(path, key, other):
    with AuditLog.open(path, key=key) as log:
        with pytest.raises(AuditError, match="no hash"), log.snapshot():
            log.node(9, 0)
        assert log.append(round_event()) == 5
        assert other.append(round_event()) == 6


def test_a_checkpoint_is_of_the_log_as_it_is_signed(path, key, other, monkeypatch):
    """Another process appends after the size was looked at and before the checkpoint is signed."""
    read, left = LogReader.size.fget, [1]

    def meddling(log):
        size = read(log)
        if log is not other and left:
            left.clear()
            other.append(round_event())
        return size

    with AuditLog.open(path, key=key) as log:
        monkeypatch.setattr(LogReader, "size", property(meddling))
        signed = parse_checkpoint(log.checkpoint())
        assert not left
        assert (signed.size, signed.root) == (6, other.root(6))


def test_of_several_processes_that_found_a_log_one_does(path, key):
    with new_log(path, key) as one, AuditLog.open(path, key=key) as two:
        assert one.append_first(round_event(1))
        assert not two.append_first(round_event(2))
        assert [entry.event.round for _, entry in two.entries()] == [1]


def test_a_log_that_both_find_empty_is_founded_once(path, key, monkeypatch):
    with new_log(path, key) as one, AuditLog.open(path, key=key) as two:
        size = LogReader.size.fget
        monkeypatch.setattr(LogReader, "size", property(lambda log: 0 if not log._depth else size(log)))
        assert one.append_first(round_event(1))
        assert not two.append_first(round_event(2))
        monkeypatch.undo()
        assert two.size == 1


def test_a_log_that_is_written_in_place_while_it_is_read_is_not_vouched_for(path, key):
    """A closed log is read in place; a process that opens and closes it meanwhile moves its pages."""
    new_log(path, key, num_entries=5).close()
    with (
        pytest.raises(AuditError, match="was written while it was read; read it again"),
        open_log(path),
        AuditLog.open(path, key=key) as log,
    ):
        log.append(round_event())
    with open_log(path) as found:
        assert found.size == 6


def test_a_log_that_is_open_and_was_not_written_is_read_from_a_copy(path, key):
    new_log(path, key, num_entries=5).close()
    with AuditLog.open(path, key=key) as log, open_log(path) as found:
        assert found.unmerged
        log.append(round_event())
        assert (found.size, found.root()) == (5, log.root(5))

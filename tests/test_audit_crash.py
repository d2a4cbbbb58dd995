"""A process that logs is killed at any moment: every entry it was told is kept is there, and the log goes on."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from audit_logs import new_log, round_event
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.audit.verifying import Trust, verify_log

# Four threads append without end, one of them in batches, and one signs checkpoints; whatever a call returned is told.
LOAD = textwrap.dedent(
    """
    import os, sys, threading
    from pathlib import Path
    from audit_logs import round_event
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from fedfin.audit.log import AuditLog

    log = AuditLog.open(Path(sys.argv[1]), key=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[2])))

    def tell(text):
        os.write(1, f"{text}\\n".encode())  # one write a line: lines of threads do not mix

    def singly():
        while True:
            index = log.append(round_event(7))
            tell(f"{index} 1")

    def in_batches():
        while True:
            index = log.append_many([round_event(9)] * 40)
            tell(f"{index} 40")
            log.checkpoint()

    for work in (singly, singly, singly, in_batches):
        threading.Thread(target=work, daemon=True).start()
    tell("started")
    threading.Event().wait()
    """
)


def killed_under_load(path, key, seconds):
    """Return what the process had been told was kept when it was killed."""
    raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, str(path), raw], stdout=subprocess.PIPE, env=environment
    ) as child:
        told = child.stdout.readline()
        assert told == b"started\n" or b" " in told
        time.sleep(seconds)
        child.kill()
        told += child.stdout.read()
    # The last line may be cut: what was told only in part was not told.
    whole = told.rsplit(b"\n", 1)[0].decode().splitlines()
    return [tuple(map(int, line.split())) for line in whole if line != "started"]


def kill_many_times(path, times):
    key, rng = Ed25519PrivateKey.generate(), random.Random(9)
    new_log(path, key).close()
    size, kills_with_entries = 0, 0
    for _ in range(times):
        told = killed_under_load(path, key, rng.uniform(0.0, 0.15))
        with open_log(path) as log:  # as it was left, WAL and all
            assert log.size >= max([size, *(first + number for first, number in told)])
            for first, number in told:
                assert [entry.event.round for _, entry in log.entries(first, first + number)] == [
                    7 if number == 1 else 9
                ] * number
        with AuditLog.open(path, key=key) as log:
            size = log.append(round_event()) + 1
            assert size == log.size
            held = log.checkpoint()
        kills_with_entries += bool(told)
    report = verify_log(path, Trust(anchors=(held,)))
    assert (report.wrong, report.size) == (None, size)
    assert kills_with_entries > times // 2
    return size


def test_a_process_killed_ten_times_under_load_loses_nothing(tmp_path):
    assert kill_many_times(tmp_path / "audit.db", 10) > 100


@pytest.mark.slow
def test_a_process_killed_a_hundred_times_under_load_loses_nothing(tmp_path):
    assert kill_many_times(tmp_path / "audit.db", 100) > 1000

"""A proof shows one entry to someone who has not the log, over rotations and erasures, and no altered one does."""

import json
from itertools import pairwise

import pytest
from evidence_house import MEMBERS, cosigned, federation_log
from rosters import coordinator, keys_of

from fedfin.audit.entry import canonical_json
from fedfin.audit.events import Service
from fedfin.audit.log import AuditLog
from fedfin.audit.proving import prove, verify_proof
from fedfin.audit.reading import open_log
from fedfin.audit.verifying import Trust
from fedfin.errors import AuditError
from fedfin.identity import create_identity_key, key_fingerprint

WITNESSES = {name: keys_of(name).witness.public_key() for name in MEMBERS}
OWNER = frozenset({key_fingerprint(coordinator().key.public_key())})
TRUST = Trust(OWNER, WITNESSES, 3)


@pytest.fixture
def log(tmp_path):
    return federation_log(tmp_path / "fed") / "audit.db"


def proved(log, tmp_path, index):
    path = tmp_path / f"{index}.json"
    with open_log(log) as reader:
        path.write_bytes(prove(reader, index) + b"\n")
    return path


def test_every_entry_is_proved_by_a_small_file(log, tmp_path):
    with open_log(log) as reader:
        size = reader.size
    for index in range(size):
        path = proved(log, tmp_path, index)
        report = verify_proof(path, TRUST)
        assert (report.wrong, report.anchored.by) == (None, MEMBERS)
        assert path.stat().st_size < 8000


def test_a_proof_leads_from_the_old_key_to_the_one_that_signed_the_checkpoint(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    keys = [coordinator().key, create_identity_key(), create_identity_key()]
    for old, new in pairwise(keys):
        with AuditLog.open(path, key=old) as log:
            log.rotate(new)
    with AuditLog.open(path, key=keys[-1]) as log:
        log.append(Service(action="stopped", release="0.1.0"))
        size = log.size
        cosigned(log)
    # the earlier checkpoint is as well vouched for and shorter; the last entries need the later one
    for index in range(size - 3, size):
        assert (
            verify_proof(proved(path, tmp_path, index), Trust(witnesses=WITNESSES, threshold=3)).wrong is None
        )
    handed_over = proved(path, tmp_path, size - 3)
    assert verify_proof(handed_over, TRUST).wrong is None
    document = json.loads(handed_over.read_text())
    document["rotations"] = []
    handed_over.write_bytes(canonical_json(document))
    assert verify_proof(handed_over, TRUST).wrong is not None


def test_an_entry_whose_body_was_erased_is_proved_by_its_hash(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    with AuditLog.open(path, key=coordinator().key) as log:
        log.prune([(0, 1)], retention="operation")
    report = verify_proof(proved(path, tmp_path, 0), TRUST)
    assert (report.wrong, report.num_pruned) == (None, 1)


def test_no_byte_of_a_proof_can_be_changed(log, tmp_path):
    path = proved(log, tmp_path, 3)
    content = path.read_bytes()[:-1]
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert verify_proof(path, TRUST).wrong is not None, place


def test_an_entry_that_no_checkpoint_covers_or_that_is_not_there_has_no_proof(tmp_path):
    path = federation_log(tmp_path / "fed") / "audit.db"
    with AuditLog.open(path, key=coordinator().key) as log:
        index = log.append(Service(action="stopped", release="0.1.0"))
    with open_log(path) as reader:
        with pytest.raises(AuditError, match="no checkpoint of"):
            prove(reader, index)
        with pytest.raises(AuditError, match="no entry"):
            prove(reader, index + 1)


def test_a_proof_by_another_key_or_with_too_few_cosignatures_is_refused(log, tmp_path):
    path = proved(log, tmp_path, 3)
    assert "not trusted" in verify_proof(path, Trust(frozenset({"0" * 64}))).wrong.what
    assert "4 must" in verify_proof(path, Trust(OWNER, WITNESSES, 4)).wrong.what

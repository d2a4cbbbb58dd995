"""An export is checked by itself, without the log: full or pruned, and whatever is done to it is named."""

import json

import pytest
from evidence_house import MEMBERS, ORIGIN, cosigned, federation_log
from rosters import coordinator, keys_of

from fedfin.audit.events import Service
from fedfin.audit.exporting import export_log, verify_export
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import open_log
from fedfin.audit.verifying import Trust
from fedfin.identity import create_identity_key, key_fingerprint

WITNESSES = {name: keys_of(name).witness.public_key() for name in MEMBERS}
OWNER = frozenset({key_fingerprint(coordinator().key.public_key())})


@pytest.fixture
def log(tmp_path):
    return federation_log(tmp_path / "fed") / "audit.db"


def exported(log, tmp_path, *, pruned=False):
    path = tmp_path / "audit.jsonl"
    with open_log(log) as reader:
        export_log(reader, path, pruned=pruned)
    return path


def changed(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")
    return verify_export(path, Trust(OWNER, WITNESSES, 3))


@pytest.mark.parametrize("pruned", [False, True])
def test_an_export_has_the_log_s_root_and_its_cosignatures(log, tmp_path, pruned):
    report = verify_export(exported(log, tmp_path, pruned=pruned), Trust(OWNER, WITNESSES, 3))
    with open_log(log) as reader:
        assert (report.wrong, report.root, report.size) == (None, reader.root(), reader.size)
    assert report.anchored.by == MEMBERS


def test_a_full_export_holds_readable_entries_and_a_pruned_one_no_event(log, tmp_path):
    full = exported(log, tmp_path).read_text()
    assert json.loads(full.splitlines()[1])["event"]["type"] == "service"
    assert "city-bank" not in "".join(exported(log, tmp_path, pruned=True).read_text().splitlines()[1:])


def test_an_export_of_a_log_whose_key_was_replaced_and_whose_entries_were_erased_is_right(tmp_path):
    folder = federation_log(tmp_path / "fed")
    new = create_identity_key()
    with AuditLog.open(folder / "audit.db", key=coordinator().key) as log:
        log.rotate(new)
    with AuditLog.open(folder / "audit.db", key=new) as log:
        log.prune([(0, 1)], retention="operation")
        log.append(Service(action="stopped", release="0.1.0"))
        cosigned(log)
    for pruned in (False, True):
        report = verify_export(
            exported(folder / "audit.db", tmp_path, pruned=pruned), Trust(OWNER, WITNESSES, 3)
        )
        assert (report.wrong, report.num_pruned) == (None, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [*lines[:3], lines[3].replace("micro", "macro"), *lines[4:]], "entry 2"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "entry 1"),
        (lambda lines: [*lines[:4], *lines[5:]], "entry 3"),
        (lambda lines: lines[:-1], "entries, and its first line says"),
        (lambda lines: [lines[0].replace('"size":', '"size":1'), *lines[1:]], "its first line says"),
        (lambda lines: [lines[0] + " ", *lines[1:]], "first line"),
        (lambda lines: [*lines[:3], '{"leaf_hash":"' + "0" * 64 + '"}', *lines[4:]], "is missing"),
        (lambda lines: [*lines[:3], '{"leaf_hash":"00"}', *lines[4:]], "is no hash"),
    ],
)
def test_whatever_is_done_to_an_export_is_named(log, tmp_path, change, told):
    report = changed(exported(log, tmp_path), change)
    assert told in report.wrong.what


def test_a_hash_that_was_changed_in_a_pruned_export_does_not_fit_the_checkpoint(log, tmp_path):
    path = exported(log, tmp_path, pruned=True)
    report = changed(path, lambda lines: [*lines[:2], '{"leaf_hash":"' + "0" * 64 + '"}', *lines[3:]])
    assert "does not state the root" in report.wrong.what


def test_an_export_by_another_key_or_without_enough_cosignatures_is_refused(log, tmp_path):
    path = exported(log, tmp_path)
    assert "not trusted" in verify_export(path, Trust(frozenset({"0" * 64}))).wrong.what
    assert "cosigned by 4" in verify_export(path, Trust(OWNER, WITNESSES, 4)).wrong.what


def test_a_log_that_was_cut_short_is_shown_by_a_checkpoint_that_another_holds(tmp_path):
    folder = federation_log(tmp_path / "fed")
    old = (folder / "audit.db").read_bytes()
    with AuditLog.open(folder / "audit.db", key=coordinator().key) as log:
        log.append(Service(action="stopped", release="0.1.0"))
        held = log.checkpoint()
    (folder / "audit.db").write_bytes(old)
    report = verify_export(exported(folder / "audit.db", tmp_path), Trust(anchors=(held,)))
    assert "held elsewhere" in report.wrong.what
    assert report.origin == ORIGIN

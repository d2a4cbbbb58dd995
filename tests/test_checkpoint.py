"""Signed notes, checkpoints and cosignatures: the published ones verify, what is altered or odd is refused."""

import base64
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfin.audit.checkpoint import (
    MAX_NOTE_BYTES,
    Checkpoint,
    NoteKey,
    add_signatures,
    cosign,
    parse_checkpoint,
    sign,
    signature_lines,
    verify_note,
)
from fedfin.errors import AuditError
from fedfin.roster import Roster

ORIGIN = "fedfin/credit-2026/coordinator"
TIME = 1_767_225_600


def published(text):
    """A verifier key as it is published: name, key id, base64 of the type and the key."""
    name, key_id, rest = text.split("+", 2)
    raw = base64.b64decode(rest)
    key = NoteKey({1: "signer", 4: "cosigner"}[raw[0]], Ed25519PublicKey.from_public_bytes(raw[1:]))
    assert key.key_id(name).hex() == key_id
    return {name: key}


# The example of c2sp.org/signed-note.
NOTE = (
    "This is an example message.\n\n— example.com/foo"
    " Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
NOTE_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"

# c2sp.org/tlog-cosignature prints a cosigned checkpoint without its keys, so the specification's own can only be
# parsed. The one below is a real one that has been published with keys: of the Certificate Transparency log
# arche2025h1 (staging), signed by the log and cosigned by public witnesses.
SPECIFIED = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa"
    " Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "— witness.example.com/w1"
    " jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
COSIGNED = (
    "arche2025h1.staging.ct.transparency.dev\n1432088532\nU7WM79jrzyhGZ5/GUBTpM7NzwdyfFx61t3RovgcC4Ro=\n\n"
    "— arche2025h1.staging.ct.transparency.dev zTM8sQAAAZ5W0WdjBAMARjBEAiBjW5IQf9pvsYLfQFX6hoGREPMHbdQ3urbllzalApkptQIg"
    "IpwtEroeW2BXaHAI4kJXFbon5Ch9MNL5zRNZ55lvGt0=\n"
    "— arche2025h1.staging.ct.transparency.dev"
    " ui8GwCF1+kWqZrxGdhj4aX3gcw7XUlXQQabg/27lefwhUkzbC3NygNI75MdhL1bfTW9g8Ei59RA23oHP7Ry1k3ZFWwQ=\n"
    "— transparency.dev/DEV:witness-little-garden"
    " 2AQqhwAAAABqEiEgzgFIqqhbUoDwjMWE6UP8nd8/KYTzwZ2rhIgcqoXHAwVkjZr4AscylP3v7sEodkRAErumC2q44vdgJY096st5BQ==\n"
    "— witness1.smartit.nu/witness1"
    " pIyCDwAAAABqEiEghIp82KWebrw7/oHQwlTAm3g2RKS4+eebl8eO0WH+/iEcxZ75W3u5hNI7TOQtmJbqmNWVuE0tgh0XwzdZsDsUAQ==\n"
    "— remora.n621.de"
    " 2net5wAAAABqEiEgPlfF3V06o0Y+fHM+J5J9s27wgxxcOVSpZ/2g/KSiXCg9DEZI+aVCIobWX9sXTynk5XeU/zZ0WBxtqB0DrAWfBw==\n"
    "— witness.stagemole.eu"
    " Z/euoAAAAABqEiEgw0i+7g2ENfDAWHmtRzCfKTHSDwYDJA2NmKeGi9Y8FtEyOUvVr+AJmIY/2TUFucgKi7lI7cUiOvKFYe/TmN9DAg==\n"
)
LOG_KEY = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
WITNESS_KEYS = (
    "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    "witness.stagemole.eu+67f7aea0+BEqSG3yu9YrmcM3BHvQYTxwFj3uSWakQepafafpUqklv",
    "witness1.smartit.nu/witness1+a48c820f+BPSFWg9G6KPiO7QPryYO5Xq4oYJJ+kAvLKLSimDhoxMO",
    "transparency.dev/DEV:witness-little-garden+d8042a87+BCtusOxINQNUTN5Oj8HObRkh2yHf/MwYaGX4CPdiVEPM",
)


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def witness():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def checkpoint():
    return Checkpoint(ORIGIN, 7, bytes(range(32)))


def keys_of(key=None, **witnesses):
    found = {name.replace("_", "-"): NoteKey("cosigner", one.public_key()) for name, one in witnesses.items()}
    return found | ({ORIGIN: NoteKey("signer", key.public_key())} if key else {})


def test_the_published_note_verifies():
    verified = verify_note(NOTE, published(NOTE_KEY))
    assert verified.body == "This is an example message.\n"
    assert verified.by == {"example.com/foo": None}


def test_the_specified_checkpoint_is_read_and_its_cosignature_has_its_time():
    found = parse_checkpoint(SPECIFIED)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20852163)
    names = [name for name, _ in signature_lines(SPECIFIED)]
    assert names == ["example.com/behind-the-sofa", "witness.example.com/w1"]
    raw = base64.b64decode(signature_lines(SPECIFIED)[1][1].split(" ")[2])
    assert int.from_bytes(raw[4:12]) == 1679315147  # the time that the specification prints beside it


def test_published_cosignatures_verify():
    keys = published(LOG_KEY)
    for text in WITNESS_KEYS:
        keys |= published(text)
    verified = verify_note(COSIGNED, keys)
    assert verified.checkpoint.size == 1432088532
    assert verified.by == {name: 0x6A122120 if key.kind == "cosigner" else None for name, key in keys.items()}


@pytest.mark.parametrize("text", [LOG_KEY, *WITNESS_KEYS])
def test_a_published_signature_is_of_the_whole_checkpoint(text):
    with pytest.raises(AuditError, match="does not verify: the note was altered"):
        verify_note(COSIGNED.replace("\n1432088532\n", "\n1432088533\n"), published(text))


def test_a_checkpoint_is_signed_and_cosigned(checkpoint, key, witness):
    note = sign(checkpoint, key)
    grown = add_signatures(note, [cosign(note, "bank-a", witness, TIME)])
    verified = verify_note(grown, keys_of(key, bank_a=witness))
    assert verified.checkpoint == checkpoint
    assert verified.by == {ORIGIN: None, "bank-a": TIME}


def test_a_cosignature_is_of_the_time_it_states(checkpoint, key, witness):
    note = sign(checkpoint, key)
    line = cosign(note, "bank-a", witness, TIME)
    raw = base64.b64decode(line.split(" ")[2])
    later = base64.b64encode(raw[:4] + struct.pack(">Q", TIME + 1) + raw[12:]).decode()
    with pytest.raises(AuditError, match="signature of bank-a on the note does not verify"):
        verify_note(add_signatures(note, [f"— bank-a {later}\n"]), keys_of(bank_a=witness))


def test_a_bad_signature_of_a_known_name_rejects_the_note_for_all(checkpoint, key, witness):
    note = sign(checkpoint, key)
    line = cosign(note, "bank-a", witness, TIME)
    raw = base64.b64decode(line.split(" ")[2])
    forged = f"— bank-a {base64.b64encode(raw[:-1] + bytes([raw[-1] ^ 1])).decode()}\n"
    with pytest.raises(AuditError, match="bank-a on the note does not verify"):
        verify_note(add_signatures(note, [forged]), keys_of(key, bank_a=witness))


def test_a_cosignature_that_was_cut_does_not_verify(checkpoint, key, witness):
    note = sign(checkpoint, key)
    key_id = NoteKey("cosigner", witness.public_key()).key_id("bank-a")
    for rest in (b"x", bytes(8), bytes(71), bytes(73), b"\xff" * 72):
        line = f"— bank-a {base64.b64encode(key_id + rest).decode()}\n"
        with pytest.raises(AuditError, match="bank-a on the note does not verify"):
            verify_note(add_signatures(note, [line]), keys_of(bank_a=witness))


def test_unknown_names_keys_and_types_are_ignored(checkpoint, key, witness):
    note = sign(checkpoint, key)
    stranger = Ed25519PrivateKey.generate()
    post_quantum = f"— bank-a {base64.b64encode(bytes([0, 0, 0, 6]) + bytes(2428)).decode()}\n"
    lines = [cosign(note, "bank-x", stranger, TIME), cosign(note, "bank-a", stranger, TIME), post_quantum]
    grown = add_signatures(note, [*lines, cosign(note, "bank-a", witness, TIME)])
    assert verify_note(grown, keys_of(key, bank_a=witness)).by == {ORIGIN: None, "bank-a": TIME}


def test_a_note_that_nobody_known_signed_is_refused(checkpoint, key, witness):
    note = sign(checkpoint, key)
    with pytest.raises(AuditError, match=r"signed by none of those trusted here \(bank-a\)"):
        verify_note(note, keys_of(bank_a=witness))
    with pytest.raises(AuditError, match=r"signed by none of those trusted here \(nobody\)"):
        verify_note(note, {})


def test_a_logs_key_cannot_stand_for_a_witness(checkpoint, key):
    note = sign(checkpoint, key)
    with pytest.raises(AuditError, match="signed by none"):
        verify_note(note, {ORIGIN: NoteKey("cosigner", key.public_key())})


def test_one_key_under_two_names_has_two_ids(key):
    first, second = (NoteKey("cosigner", key.public_key()).key_id(name) for name in ("bank-a", "bank-b"))
    assert first != second


def test_a_line_is_added_once(checkpoint, key, witness):
    note = sign(checkpoint, key)
    line = cosign(note, "bank-a", witness, TIME)
    once = add_signatures(note, [line, line])
    assert add_signatures(once, [line]) == once
    assert once == note + line


def test_a_thousand_cosignatures_fit(checkpoint, key, witness):
    note = sign(checkpoint, key)
    grown = add_signatures(note, [cosign(note, f"bank-{number}", witness, TIME) for number in range(1000)])
    assert len(signature_lines(grown)) == 1001


BODY = Checkpoint(ORIGIN, 7, bytes(32)).to_body()
LINE = f"— {ORIGIN} {base64.b64encode(bytes(68)).decode()}\n"


@pytest.mark.parametrize(
    "note",
    [
        "",
        BODY,
        BODY + "\n",
        f"\n\n{LINE}",
        BODY + LINE,
        f"{BODY}\n{LINE[:-1]}",
        f"{BODY}\n{LINE}".replace("\n", "\r\n"),
        f"{BODY}\n{LINE}\x00",
        f"{BODY}\t\n\n{LINE}",
        f"{BODY}\n{LINE.replace('—', '-')}",
        f"{BODY}\n{LINE.replace(' ', '  ')}",
        f"{BODY}\n{LINE}{LINE}",
        f"{BODY}\n{LINE.replace('=', '')}",
        f"{BODY}\n— {ORIGIN} AAAA\n",
        f"{BODY}\n— {ORIGIN} ____\n",
        f"{BODY}\n— {ORIGIN} AAAAAAB=\n",  # spare bits that are not zero
        f"{BODY}\n— a+b {LINE.split(' ')[2]}",
        f"{BODY}\n— a\u00a0b {LINE.split(' ')[2]}",
        f"{BODY}\n—  {LINE.split(' ')[2]}",
        f"{BODY}\ud800\n\n{LINE}",
        f"{'x' * 5000}\n\n{LINE}",
        f"{BODY}\n" + "".join(LINE.replace(ORIGIN, f"n{number}") for number in range(1101)),
        f"{BODY}\n— {ORIGIN} {'A' * 9000}\n",
        f"{BODY}\n{LINE}" + "x" * MAX_NOTE_BYTES,
    ],
)
def test_a_malformed_note_is_refused(note):
    for use in (signature_lines, parse_checkpoint, lambda text: verify_note(text, {})):
        with pytest.raises(AuditError, match=r"note|name of a log"):
            use(note)


@pytest.mark.parametrize(
    "body",
    [
        f"{ORIGIN}\n7\n",
        f"{BODY}more\n",
        BODY.replace("\n7\n", "\n07\n"),
        BODY.replace("\n7\n", "\n-7\n"),
        BODY.replace("\n7\n", "\n7 \n"),
        BODY.replace("\n7\n", "\n\u0667\n"),
        BODY.replace("\n7\n", "\n9999999999999999999\n"),
        BODY.replace("AAA=", "AAA"),
        BODY.replace("AAA=", "AAB="),
        f"{ORIGIN}\n7\nAAAA\n",
        BODY.replace(ORIGIN, ""),
        BODY.replace(ORIGIN, "two words"),
    ],
)
def test_a_malformed_checkpoint_is_refused(body):
    with pytest.raises(AuditError):
        Checkpoint.from_body(body)
    assert Checkpoint.from_body(BODY).to_body() == BODY


def test_what_cannot_be_cosigned_is_refused(checkpoint, key, witness):
    with pytest.raises(AuditError, match="no checkpoint"):
        cosign(NOTE, "bank-a", witness, TIME)
    note = sign(checkpoint, key)
    for name in ("", "two words", "a+b", "x" * 256):
        with pytest.raises(AuditError, match="cannot be the name"):
            cosign(note, name, witness, TIME)
    for time in (0, -1, 2**63):
        with pytest.raises(AuditError, match="no time of a cosignature; mend the clock"):
            cosign(note, "bank-a", witness, time)


def test_the_fingerprint_is_the_rosters(key):
    from fedfin.identity import key_fingerprint, public_pem

    roster = Roster.of({"bank-a": public_pem(key.public_key())})
    assert roster.fingerprints() == {"bank-a": key_fingerprint(key.public_key())}

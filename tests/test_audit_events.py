"""Events and entries: what may be said, by whom, in exactly one way."""

import json
import math

import pytest
from audit_logs import ORIGIN, round_event
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedfin.audit import events as module
from fedfin.audit.entry import (
    MAX_LEAF_BYTES,
    Entry,
    canonical_json,
    event_json,
    parse_leaf,
    sign_entry,
    signed_leaves,
    signed_part,
    utc_now,
)
from fedfin.audit.events import (
    EVENT_TYPES,
    Budget,
    Clock,
    Consent,
    Enrolment,
    Evaluation,
    Exchange,
    Incident,
    PlanProposed,
    Refusal,
    RoundCompleted,
    UnknownEvent,
    bounded,
    real,
    salted_digest,
)
from fedfin.errors import AuditError

KEY = Ed25519PrivateKey.generate()
TIME = "2026-11-24T18:19:06.928Z"
DIGEST = "ab" * 32
EVENTS = [
    round_event(),
    Enrolment(member="bank-a", federation="credit-2026", identity=DIGEST),
    PlanProposed(
        job="job-1",
        digest=DIGEST,
        model="logistic",
        strategy="fedavg",
        aggregation="secure",
        mode="local",
        epsilon=real(0.5),
        delta=real(1e-5),
        rounds=10,
        least_cohort=3,
    ),
    Consent(job="job-1", member="bank-a", plan=DIGEST, decision="accepted", signature="cd" * 64),
    Exchange(job="job-1", stage="round 3", step="masked", cohort_size=5, digest=DIGEST),
    Refusal(rule="BudgetSpentError", asked="Train", reason="its budget: ε=0.5 of 0.4 is spent", job="job-1"),
    Budget(action="reserve", job="job-1", snapshot=DIGEST, epsilon=real(0.5), delta=real(1e-5)),
    Clock(source="ntp", offset_ms=-3),
]


def entry(event=None, seq=0):
    return sign_entry(seq, TIME, "coordinator", event or round_event(), key=KEY, origin=ORIGIN)


def leaf_of(content):
    """A leaf with this event, signed by nobody."""
    fields = {"actor": "bank-a", "event": content, "seq": 0, "signature": "00" * 64, "time": TIME}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_an_entry_comes_back_from_its_leaf_and_its_signature_holds(event):
    written = entry(event, seq=7)
    read = parse_leaf(written.to_leaf())
    assert read == written
    read.verify(KEY.public_key(), ORIGIN)


def test_a_batch_of_leaves_is_the_same_one_by_one():
    texts = [event_json(event) for event in EVENTS] * 20
    many = list(signed_leaves(5, TIME, "coordinator", texts, key=KEY, origin=ORIGIN))
    assert many == [entry(EVENTS[at % len(EVENTS)], seq=5 + at).to_leaf() for at in range(len(texts))]
    for leaf in many:
        message, signature = signed_part(leaf, ORIGIN)
        KEY.public_key().verify(signature, message)


def test_the_leaf_is_canonical_json():
    leaf = entry().to_leaf()
    assert canonical_json(json.loads(leaf)) == leaf
    fields = json.loads(leaf)
    assert list(fields) == ["actor", "event", "seq", "signature", "time"]
    assert list(fields["event"]) == sorted(fields["event"])


@pytest.mark.parametrize("change", [{"seq": 8}, {"time": "2026-11-24T18:19:06.929Z"}, {"actor": "bank-a"}])
def test_an_entry_belongs_to_its_place_time_and_actor(change):
    written = entry(seq=7)
    fields = {name: getattr(written, name) for name in ("seq", "time", "actor", "event", "signature")}
    with pytest.raises(AuditError, match=r"is not signed by the key of .* for the log"):
        Entry(**fields | change).verify(KEY.public_key(), ORIGIN)


def test_an_entry_belongs_to_its_log_and_key():
    for key, origin in ((KEY, "fedfin/credit-2026/bank-a"), (Ed25519PrivateKey.generate(), ORIGIN)):
        with pytest.raises(AuditError, match="do not rely on it"):
            entry().verify(key.public_key(), origin)


LEAF = entry().to_leaf().decode()


@pytest.mark.parametrize(
    "leaf",
    [
        "",
        "[]",
        "null",
        "{" * 100_000,
        "[" * 100_000,
        LEAF + " ",
        LEAF.replace(":", ": ", 1),
        LEAF.replace('"attempt":1', '"attempt":1.0'),
        LEAF.replace('"attempt":1', '"attempt":1e0'),
        LEAF.replace('"attempt":1', '"attempt":true'),
        LEAF.replace('"attempt":1', '"attempt":"1"'),
        LEAF.replace('"attempt":1', '"attempt":0'),
        LEAF.replace('"attempt":1', '"attempt":9007199254740992'),
        LEAF.replace('"attempt":1,', ""),
        LEAF.replace('"attempt":1', '"attempt":1,"attempt":1'),
        LEAF.replace('"attempt":1', '"attempt":1,"auroc":"0.7"'),
        LEAF.replace('"attempt":1', '"attempt":NaN'),
        LEAF.replace('"seq":0', '"seq":-1'),
        LEAF.replace('"seq":0', '"seq":true'),
        LEAF.replace('"seq":0', '"seq":' + "9" * 5000),
        LEAF.replace(TIME, "2026-13-24T18:19:06.928Z"),
        LEAF.replace(TIME, "2026-11-24T18:19:06.928+00:00"),
        LEAF.replace(TIME, "2026-11-24T18:19:06Z"),
        LEAF.replace('"actor":"coordinator"', '"actor":"Jane Doe"'),
        LEAF.replace('"actor":"coordinator"', '"actor":7'),
        LEAF.replace('"signature":"', '"signature":"A'),
        LEAF.replace('"version":1', '"version":0'),
        LEAF.replace('"version":1', '"version":null'),
        LEAF.replace('"type":"round_completed"', '"type":7'),
        LEAF.replace("job-1", "\\u006aob-1"),
        "x" * (MAX_LEAF_BYTES + 1),
    ],
)
def test_what_is_not_an_entry_to_the_byte_is_refused(leaf):
    with pytest.raises(AuditError, match="the log was changed, or is no log of fedfin"):
        parse_leaf(leaf.encode())


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(AuditError, match="no JSON in UTF-8"):
        parse_leaf(b"\xff" + LEAF.encode())


def test_a_refused_value_is_not_repeated_in_the_error():
    with pytest.raises(AuditError) as refused:
        parse_leaf(LEAF.replace("job-1", "a secret").encode())
    assert "a secret" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [
        {"type": "round_completed", "version": 2, "cohort_of": ["bank-a"], "nested": {"b": [1, True, "ü"]}},
        {"type": "merger", "version": 1, "with": "credit-2027"},
    ],
)
def test_an_event_of_a_later_release_is_kept_to_the_byte(content):
    leaf = leaf_of(content)
    read = parse_leaf(leaf)
    assert isinstance(read.event, UnknownEvent)
    assert (read.event.type, read.event.version) == (content["type"], content["version"])
    assert read.to_leaf() == leaf


@pytest.mark.parametrize("value", [None, 0.5, {"ü": 1}])
def test_an_event_of_a_later_release_is_canonical_too(value):
    with pytest.raises(AuditError, match="the log was changed"):
        parse_leaf(leaf_of({"type": "merger", "version": 1, "value": value}))


def test_every_event_has_its_name_and_refuses_what_it_has_no_field_for():
    assert sorted(EVENT_TYPES.values(), key=str) == sorted(
        (
            kind
            for kind in vars(module).values()
            if isinstance(kind, type)
            and issubclass(kind, module.Event)
            and kind not in {module.Event, UnknownEvent}
        ),
        key=str,
    )
    for kind in EVENT_TYPES.values():
        with pytest.raises(ValidationError, match="extra_forbidden"):
            kind.model_validate({"ssn": "123-45-6789"})


def test_the_coordinators_events_have_no_field_for_a_number_of_one_lender():
    """Beside sizes of cohorts and the plan's own epsilon there is no number in them that belongs to a member."""
    numbers = {
        f"{name}.{field}"
        for name, kind in EVENT_TYPES.items()
        if "coordinator" in kind.sides
        for field, schema in kind.model_json_schema()["properties"].items()
        if field != "version" and ('"integer"' in json.dumps(schema) or "(e[+-]" in json.dumps(schema))
    }
    assert numbers == {
        "roster.number",
        "roster.num_members",
        "revocation.from_round",
        "plan.epsilon",
        "plan.delta",
        "plan.rounds",
        "plan.least_cohort",
        "exchange.attempt",
        "exchange.cohort_size",
        "round_completed.round",
        "round_completed.attempt",
        "round_completed.seconds",
        "round_lost.round",
        "round_lost.attempt",
        "candidate.rounds",
        "evaluation.cohort_size",
        "evaluation.after_round",
        "evaluation.auroc",
        "evaluation.brier",
        "evaluation.calibration",
        "release.num_lenders",
        "export.num_entries",
        "log_access.first",
        "log_access.num_entries",
        "clock.offset_ms",
        "checkpoint.size",
        "pruned.ranges",
        "pruned.num_entries",
    }


@pytest.mark.parametrize("metric", ["auroc", "brier", "calibration"])
def test_a_metric_of_fewer_than_three_lenders_is_refused(metric):
    Evaluation(job="job-1", model=DIGEST, cohort_size=3, **{metric: real(0.7)})
    Evaluation(job="job-1", model=DIGEST, cohort_size=2)
    with pytest.raises(ValidationError, match="metrics of 2 lenders tell one lender's"):
        Evaluation(job="job-1", model=DIGEST, cohort_size=2, **{metric: real(0.7)})


def test_a_lenders_budget_has_no_place_at_the_coordinator():
    assert Budget.sides == {"lender"}
    assert RoundCompleted.sides == {"coordinator"}


def test_an_event_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        round_event().round = 2


@pytest.mark.parametrize("text", ["", "two\nlines", "x" * 1001, "\x7f", "\ud800"])
def test_a_reason_is_one_line_of_bounded_length(text):
    with pytest.raises(ValidationError):
        Incident(kind="privacy", reason=text)
    assert Incident(kind="privacy", reason=bounded(text)).reason == bounded(text)


@given(st.text(alphabet=st.characters()))
def test_any_text_is_bounded_to_a_reason_that_comes_back(text):
    written = entry(Incident(kind="integrity", reason=bounded(text)))
    assert parse_leaf(written.to_leaf()) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_back_from_its_text(number):
    event = Budget(action="commit", job="job-1", snapshot=DIGEST, epsilon=real(number))
    assert math.copysign(1.0, float(event.epsilon)) == math.copysign(1.0, number)
    assert float(event.epsilon) == number


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_not_logged(number):
    with pytest.raises(ValueError, match="cannot be logged"):
        real(number)


@pytest.mark.parametrize("value", [None, 0.5, 2**53, {1: 2}, {"ü": 1}, b"bytes"])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(ValueError, match=r"canonical|ASCII"):
        canonical_json(value)


def test_a_digest_cannot_be_guessed_without_its_salt():
    salt = bytes(range(32))
    assert salted_digest(salt, b"row 7") != salted_digest(bytes(32), b"row 7")
    # RFC 4231, test case 1.
    assert salted_digest(b"\x0b" * 20, b"Hi There").startswith("b0344c61d8db38535ca8afceaf0bf12b")
    with pytest.raises(ValueError, match="a salt of 15 bytes can be guessed"):
        salted_digest(bytes(15), b"row 7")


def test_an_entry_that_is_too_large_is_refused():
    event = UnknownEvent(type="merger", version=1, content=json.dumps({"a": "x" * MAX_LEAF_BYTES}))
    with pytest.raises(AuditError, match="log its digest and keep it in a file"):
        entry(event).to_leaf()


def test_the_time_is_utc_with_milliseconds():
    now = utc_now()
    assert len(now) == len(TIME)
    assert now.endswith("Z")

"""Spoilt messages at both sides of a job: no crash, no hang, and nothing malformed is taken for a message.

Real messages of real sums are altered in their bytes and in their headers, at every step, and given to a real lender
and to the coordinator's real side of a sum behind Flower's envelope. A lender may answer, refuse, or say that the bytes
are no message; it answers only what it may answer. A coordinator's sum is exact, or there is none.

Each test goes on for half a second, or for FEDFIN_FUZZ_S seconds: `FEDFIN_FUZZ_S=100 pytest tests/test_fuzz_messages.py
--timeout=0 -s` for ten minutes in all, with the number of examples.
"""

import contextlib
import dataclasses
import json
import os
import re
import struct
import sys
import time
from collections import Counter

import numpy as np
import pytest
from cohorts import identity_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lenders import lender_folder, open_lender, schema

from fedfin.credit.binning import Bins, bins_from_histogram, histogram_size
from fedfin.credit.models import architecture_of, initial_weights, model_fingerprint, num_parameters
from fedfin.errors import FedfinError, LinkError, ProtocolRefusalError
from fedfin.identity import load_lender_keys, public_pem
from fedfin.plan import JobPlan
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.roster import Roster
from fedfin.strategies.sums import round_layout
from fedfin.update import (
    Accepted,
    Advertised,
    AskHistogram,
    Confirm,
    Confirmed,
    Done,
    Evaluate,
    Finish,
    Histogram,
    Mask,
    Masked,
    Open,
    Propose,
    Refused,
    Scores,
    Shared,
    ShareKeys,
    Train,
    Unmask,
    Unmasked,
    Update,
    decode,
    encode,
)

FUZZ_S = float(os.environ.get("FEDFIN_FUZZ_S", ".5"))
KINDS = (
    *(Propose, Accepted, Refused, AskHistogram, Histogram, Train, Update, Evaluate, Scores, Finish, Done),
    *(Open, Advertised, ShareKeys, Shared, Mask, Masked, Confirm, Confirmed, Unmask, Unmasked),
)
ME = "bank-a"
NAMES = (ME, "bank-b", "bank-c", "bank-d", "bank-e")
LEAST = 3  # of five; the policy asks for as many
PLAN = JobPlan.model_validate(
    {
        "training": {"rounds": 10_000, "local_steps": 1},
        "privacy": {"mode": "none"},
        "cohort": {"min_lenders": 3},
    }
)
POLICY = {"allow_no_privacy": True, "min_cohort": 3, "max_rounds": 10_000}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
HEX = st.binary(max_size=200).map(bytes.hex)


def for_a_while(what, check):
    """Repeat a property until FUZZ_S seconds have passed; say how many examples that were."""
    end = time.monotonic() + FUZZ_S
    while True:
        check()
        if time.monotonic() > end:
            break
    sys.stdout.write(f"\n{what}: {EXAMPLES[what]} examples")


EXAMPLES: Counter[str] = Counter()
"""Examples tried so far, by what was fuzzed."""


def fuzzing(max_examples):
    """Settings of a property: a single example that takes ten seconds is a hang."""
    return settings(
        max_examples=max_examples, deadline=10_000, database=None, suppress_health_check=list(HealthCheck)
    )


def unpacked(data):
    (length,) = struct.unpack("<I", data[4:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header, body):
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([b"FFN1", struct.pack("<I", len(text)), text, body])


@st.composite
def spoilt_bytes(draw, data):
    """Bytes like these, with something wrong; by chance the same."""
    how = draw(st.sampled_from(["other", "flipped", "cut", "longer", "swapped"]))
    if how == "other" or not data:
        return draw(st.binary(max_size=200))
    at = draw(st.integers(0, len(data) - 1))
    if how == "flipped":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    if how == "longer":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    other = draw(st.integers(0, len(data) - 1))
    return data[:at] + data[other : other + 8] + data[at + 8 :]


@st.composite
def spoilt_value(draw, value):
    """A field of a header like this one, with something wrong."""
    if isinstance(value, str) and value and draw(st.booleans()):
        if all(digit in "0123456789abcdef" for digit in value) and len(value) % 2 == 0:
            return draw(spoilt_bytes(bytes.fromhex(value)) | st.binary(max_size=80)).hex()
        return draw(spoilt_bytes(value.encode())).decode(errors="replace")
    if isinstance(value, dict) and value and draw(st.booleans()):
        changed = dict(value)
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(sorted(value)))
            how = draw(st.sampled_from(["left out", "altered", "exchanged", "somebody"]))
            if how == "left out":
                changed.pop(name, None)
            elif how == "altered":
                changed[name] = draw(spoilt_value(value[name]))
            elif how == "exchanged":
                changed[name] = value[draw(st.sampled_from(sorted(value)))]
            else:
                changed[draw(st.text(max_size=8) | st.sampled_from(NAMES))] = value[name]
        return changed
    if isinstance(value, list) and draw(st.booleans()):
        return draw(st.lists(st.sampled_from(NAMES) | st.text(max_size=5), max_size=7))
    if isinstance(value, int) and draw(st.booleans()):
        return value + draw(st.sampled_from([-1, 1, 10**9, 10**30]))
    return draw(JSON | HEX)


@st.composite
def spoilt(draw, data):
    """A message like this one, with something wrong in its bytes, its header or its arrays; by chance the same."""
    how = draw(st.sampled_from(["bytes", "field", "field", "field", "fewer", "more", "kind", "body", "same"]))
    header, body = unpacked(data)
    if how == "same":
        return data
    if how == "bytes":
        return draw(spoilt_bytes(data))
    if how == "body":
        return packed(header, draw(spoilt_bytes(body)))
    if how == "kind":
        return packed(
            {**header, "kind": draw(st.sampled_from([kind.__name__ for kind in KINDS]) | JSON)}, body
        )
    fields = dict(header["fields"])
    if how == "more":
        fields[draw(st.text(max_size=5))] = draw(JSON)
    else:
        name = draw(st.sampled_from(sorted(fields)))
        if how == "fewer":
            del fields[name]
        else:
            fields[name] = draw(spoilt_value(fields[name]))
    return packed({**header, "fields": fields}, body)


def same_message(one, other):
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, item.name), getattr(other, item.name))
        if isinstance(getattr(one, item.name), np.ndarray)
        else getattr(one, item.name) == getattr(other, item.name)
        for item in dataclasses.fields(one)
    )


# A lender


class Bench:
    """One real lender, with loans and a folder, among four others that are participants only; a job without privacy.

    Nobody but this lender's answers are looked at, so the others need no loans: their vectors are zeros.
    """

    def __init__(self, directory):
        bank = lender_folder(directory / ME, name=ME, num_loans=60, **POLICY)
        self.lender = open_lender(bank)
        own = public_pem(load_lender_keys(bank.parent / "keys").identity.public_key())
        others = {name: public_pem(identity_of(name).public_key()) for name in NAMES if name != ME}
        self.roster = Roster.of({ME: own, **others})
        self.schema = schema()
        self.bins = bins_from_histogram(
            np.ones(histogram_size(self.schema)), self.schema, PLAN.model.max_bins
        )
        self.architecture = architecture_of(PLAN.model, self.schema, self.bins)
        self.layout = round_layout(PLAN, num_parameters(self.architecture), len(NAMES))
        self.number_of_jobs = 0
        self.number_of_rounds = 0
        self.new_job()

    def new_job(self):
        self.number_of_jobs += 1
        self.number_of_rounds = 0
        self.job_id = f"fuzz-{self.number_of_jobs}"
        assert isinstance(self.answer(self.proposal()), Accepted)

    def proposal(self, job_id=None):
        return encode(
            Propose(
                job_id or self.job_id,
                PLAN.model_dump_json(),
                self.schema.fingerprint(),
                self.roster.to_json(),
            )
        )

    def answer(self, data):
        return decode(self.lender.answer(data), *KINDS)

    def question(self, number):
        fingerprint = model_fingerprint(self.schema.fingerprint(), self.bins.fingerprint(), self.architecture)
        weights = initial_weights(self.architecture, 0) + np.float32(1.0 + 0.01 * number)
        return Train(self.job_id, number, self.bins.to_json(), fingerprint, weights)

    def context(self):
        self.number_of_rounds += 1
        return SumContext(
            federation="test",
            job_id=self.job_id,
            plan=PLAN.digest(),
            stage=f"round {self.number_of_rounds}",
            attempt=0,
            cohort=NAMES,
            roster=roster_digest(self.roster.public_keys()),
            layout=self.layout.digest(),
            threshold=threshold_of(len(NAMES)),
        )


class BenchSum:
    """One sum: the right request of every step to this lender, and its right continuation."""

    STEPS = ("open", "share", "mask", "confirm", "unmask")

    def __init__(self, bench):
        self.bench = bench
        self.context = bench.context()
        self.number = bench.number_of_rounds
        self.others = {
            name: Participant(self.context, name, identity_of(name), bench.roster.public_keys(), LEAST)
            for name in NAMES
            if name != ME
        }
        self.question = encode(bench.question(self.number))
        self.adverts, self.sealed, self.confirmations = {}, {}, {}
        self.next = None

    @property
    def id(self):
        return self.context.digest().hex()

    def request(self, step):
        """The right request of this step; the others do theirs first."""
        job = self.bench.job_id
        match step:
            case "open":
                return Open(job, self.context.to_bytes().decode())
            case "share":
                self.adverts |= {name: other.open() for name, other in self.others.items()}
                return ShareKeys(job, self.id, self.adverts)
            case "mask":
                for name, other in self.others.items():
                    self.sealed[name] = other.share(self.adverts)
                sealed = {name: sent[ME] for name, sent in self.sealed.items() if name != ME}
                return Mask(job, self.id, sealed, np.frombuffer(self.question, np.uint8))
            case "confirm":
                for name, other in self.others.items():
                    others = {sender: sent[name] for sender, sent in self.sealed.items() if sender != name}
                    other.receive(others, self.question)
                    other.mask(np.zeros(self.bench.layout.size, np.uint32))
                self.next = self.bench.context()
                return Confirm(job, self.id, NAMES, self.next.to_bytes().decode())
            case _:
                for name, other in self.others.items():
                    self.confirmations[name] = other.confirm(NAMES)
                roster = self.bench.roster.public_keys()
                self.next_adverts |= {
                    name: Participant(self.next, name, identity_of(name), roster, LEAST).open()
                    for name in self.others
                }
                return Unmask(job, self.id, self.confirmations, self.next_adverts)

    def take(self, reply):
        """Go on with a right answer of this lender."""
        match reply:
            case Advertised():
                self.adverts[ME] = reply.advert
            case Shared():
                self.sealed[ME] = reply.sealed
            case Confirmed():
                self.confirmations[ME] = reply.signature
                self.next_adverts = {ME: reply.advert}

    def upto(self, step):
        for before in self.STEPS[: self.STEPS.index(step)]:
            self.take(self.bench.answer(encode(self.request(before))))
        return self


def may_answer(step, sent, right, running):
    """Whether a lender may answer what it was sent, where `right` is what an honest coordinator sends.

    Lenders may have dropped out, and the model's weights are the coordinator's to choose; nothing else is.
    """
    same_sum = step == "open" or getattr(sent, "sum", None) == right.sum
    if type(sent) is not type(right) or sent.job_id != right.job_id or not same_sum:
        return False
    checks = {
        "open": may_open,
        "share": lambda: ME in sent.adverts and is_part(sent.adverts, right.adverts, 4),
        "mask": lambda: is_part(sent.sealed, right.sealed, 3) and is_a_model(sent.question, right.question),
        "confirm": lambda: (
            ME in sent.survivors and is_part(dict.fromkeys(sent.survivors), dict.fromkeys(NAMES), 4)
        ),
        "unmask": lambda: is_part(sent.confirmations, right.confirmations, 4),
    }
    return checks[step](sent, running) if step == "open" else checks[step]()


def is_part(some, whole, least):
    return len(some) >= least and some.items() <= whole.items()


def may_open(sent, running):
    try:
        context = SumContext.from_bytes(sent.context.encode())
    except ProtocolRefusalError:
        return False
    right = running.context
    bound = ("federation", "job_id", "plan", "roster")
    return (
        all(getattr(context, key) == getattr(right, key) for key in bound)
        and {ME} <= set(context.cohort) <= set(NAMES)
        and len(context.cohort) >= LEAST
        and context.threshold == threshold_of(len(context.cohort))
        and re.fullmatch("bins|round [1-9][0-9]{0,3}|evaluation 1", context.stage) is not None
    )


def is_a_model(sent, right):
    """Any finite weights are a model: a lender that is shown another one spoils no sum."""
    try:
        question = decode(sent.tobytes(), Train)
    except LinkError:
        return False
    asked = decode(right.tobytes(), Train)
    return same_message(dataclasses.replace(question, weights=asked.weights), asked)


ANSWER = {
    "open": Advertised,
    "share": Shared,
    "mask": Masked,
    "confirm": Confirmed,
    "unmask": Unmasked,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.lender.close()


@pytest.mark.parametrize("step", BenchSum.STEPS)
def test_a_lender_answers_right_requests_only(bench, step):
    @fuzzing(25)
    @given(st.data())
    def requests_of_any_kind(data):
        EXAMPLES[f"lender, {step}"] += 1
        running = BenchSum(bench).upto(step)
        right = running.request(step)
        sent = data.draw(spoilt(encode(right)))
        try:
            reply = bench.answer(sent)
        except LinkError:
            assert sent != encode(right)
            return
        if isinstance(reply, Refused):
            assert sent != encode(right)
            return
        message = decode(sent, *KINDS)
        assert isinstance(reply, ANSWER[step])
        assert may_answer(step, message, right, running)

    def in_a_new_job():
        bench.new_job()
        requests_of_any_kind()

    for_a_while(f"lender, {step}", in_a_new_job)


# Parsers


def samples(bench):
    """One real message of each kind."""
    running = BenchSum(bench)
    found = [bench.proposal()]
    for step in BenchSum.STEPS:
        request = encode(running.request(step))
        reply = bench.lender.answer(request)
        running.take(decode(reply, *KINDS))
        found += [request, reply]
    weights = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
    counts = np.arange(4, dtype=np.float64)
    rest = (
        Accepted("job", 50.0),
        Refused("job", "its loans do not pass"),
        AskHistogram("job"),
        Histogram("job", counts),
        bench.question(1),
        Update("job", 1, "f", weights),
        Evaluate("job", 1, bench.bins.to_json(), "f", weights),
        Scores("job", counts),
        Finish("job", "completed", 1, bench.bins.to_json(), "f", weights),
        Done("job"),
    )
    return found + [encode(message) for message in rest]


def test_spoilt_bytes_are_no_message_or_a_whole_one(bench):
    real = samples(bench)
    assert {unpacked(data)[0]["kind"] for data in real} == {kind.__name__ for kind in KINDS}

    @fuzzing(200)
    @given(st.data())
    def bytes_of_any_kind(data):
        EXAMPLES["decode"] += 1
        sent = data.draw(spoilt(data.draw(st.sampled_from(real))))
        try:
            message = decode(sent, *KINDS)
        except LinkError:
            return
        again = decode(encode(message), *KINDS)
        assert same_message(again, message)
        assert encode(again) == encode(message)

    for_a_while("decode", bytes_of_any_kind)


def test_spoilt_rosters_and_bins_are_refused_or_canonical(bench):
    @fuzzing(200)
    @given(st.data())
    def texts_of_any_kind(data):
        EXAMPLES["texts"] += 1
        text = data.draw(st.sampled_from([bench.roster.to_json(), bench.bins.to_json()]))
        sent = data.draw(spoilt_value(text) | spoilt_json(text) | st.text(max_size=30))
        sent = sent if isinstance(sent, str) else json.dumps(sent)
        with contextlib.suppress(LinkError):
            assert Roster.from_json(sent).to_json() == sent
        # what the lender catches: client/stages.py
        with contextlib.suppress(FedfinError, ValueError, KeyError, TypeError, IndexError):
            architecture_of(PLAN.model, bench.schema, Bins.from_json(sent))

    for_a_while("texts", texts_of_any_kind)


@st.composite
def spoilt_json(draw, text):
    """A JSON text like this one, with another value somewhere."""
    whole = json.loads(text)
    at = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return text
        key = draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and draw(st.booleans()):
            at = at[key]
            continue
        at[key] = draw(spoilt_value(at[key]))
        return json.dumps(whole, separators=(",", ":"))

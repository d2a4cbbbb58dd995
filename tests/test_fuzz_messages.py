"""Spoilt messages at both sides of a job: no crash, no hang, and nothing malformed is taken for a message.

Real messages of real sums are altered in their bytes and in their headers, at every step, and given to a real lender
and to the coordinator's real side of a sum behind Flower's envelope. A lender may answer, refuse, or say that the bytes
are no message; it answers only what it may answer. A coordinator's sum is exact, or there is none.

Each test goes on for half a second, or for FEDFIN_FUZZ_S seconds: `FEDFIN_FUZZ_S=100 pytest tests/test_fuzz_messages.py
--timeout=0 -s` for ten minutes in all, with the number of examples.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import struct
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import rosters
from cohorts import identity_of
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lenders import lender_folder, open_lender, schema
from spoiling import spoilt_bytes, spoilt_map

from fedfin.credit.binning import Bins, bins_from_histogram, histogram_size
from fedfin.credit.models import architecture_of, initial_weights, model_fingerprint, num_parameters
from fedfin.errors import FedfinError, LinkError, ProtocolRefusalError
from fedfin.identity import load_lender_keys
from fedfin.plan import JobPlan
from fedfin.privacy.encoding import Layout, Segment, pack, unpack
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.roster import Roster
from fedfin.roster_chain import RosterChain
from fedfin.server.app import GridExchange
from fedfin.server.roster import FederationStore
from fedfin.server.summing import Stage, SumLostError, SumShortError, Upcoming
from fedfin.server.unmasking import JobContext, SecureSums
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
    RosterSigned,
    Scores,
    Shared,
    ShareKeys,
    ShowRoster,
    Train,
    Unmask,
    Unmasked,
    Update,
    decode,
    encode,
)
from fedfin.wire import from_record, to_record

FUZZ_S = float(os.environ.get("FEDFIN_FUZZ_S", ".5"))
KINDS = (
    *(Propose, Accepted, Refused, AskHistogram, Histogram, Train, Update, Evaluate, Scores, Finish, Done),
    *(Open, Advertised, ShareKeys, Shared, Mask, Masked, Confirm, Confirmed, Unmask, Unmasked),
    *(ShowRoster, RosterSigned),
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
def spoilt_value(draw, value):
    """A field of a header like this one, with something wrong."""
    if isinstance(value, str) and value and draw(st.booleans()):
        if all(digit in "0123456789abcdef" for digit in value) and len(value) % 2 == 0:
            return draw(spoilt_bytes(bytes.fromhex(value)) | st.binary(max_size=80)).hex()
        return draw(spoilt_bytes(value.encode())).decode(errors="replace")
    if isinstance(value, dict) and value and draw(st.booleans()):
        return draw(spoilt_map(value, NAMES, spoilt_value, most=2))
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
        own = load_lender_keys(bank.parent / "keys")
        others = {
            name: dataclasses.replace(rosters.keys_of(name), identity=identity_of(name))
            for name in NAMES
            if name != ME
        }
        self.chain = rosters.founded({ME: own, **others})
        rosters.pin(bank.parent, self.chain)
        self.roster = self.chain.last.roster()
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
        self.job_id = f"fuzz-{self.number_of_jobs:06}"
        assert isinstance(self.answer(self.proposal()), Accepted)

    def proposal(self, job_id=None):
        return encode(
            Propose(
                job_id or self.job_id,
                PLAN.model_dump_json(),
                self.schema.fingerprint(),
                self.chain.to_json(),
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
    @fuzzing(10)
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


@pytest.mark.parametrize("kind", [Propose, AskHistogram, Train, Evaluate, Finish])
def test_a_lender_takes_right_questions_of_other_kinds_only(bench, kind):
    """A job of secure sums: nothing is answered in clear, and a proposal holds to the pinned roster."""

    @fuzzing(10)
    @given(st.data())
    def questions_of_any_kind(data):
        EXAMPLES[f"lender, {kind.__name__}"] += 1
        bench.new_job()
        sent = data.draw(spoilt(encode(right_question(bench, kind))))
        try:
            reply = bench.answer(sent)
        except LinkError:
            return
        if isinstance(reply, Refused):
            return
        question = decode(sent, *KINDS)
        if isinstance(question, Propose):
            assert isinstance(reply, Accepted)
            assert question.schema_fingerprint == bench.schema.fingerprint()
            plan = JobPlan.model_validate(json.loads(question.plan))
            # in clear nothing rests on the roster, and a job may go without
            assert question.roster in {bench.chain.to_json(), *([""] if plan.aggregation == "plain" else [])}
        else:
            assert isinstance(question, Finish)
            assert isinstance(reply, Done)
            assert question.status in {"completed", "abandoned"}
            assert question.status == "abandoned" or 0 <= question.rounds <= PLAN.training.rounds

    for_a_while(f"lender, {kind.__name__}", questions_of_any_kind)


def right_question(bench, kind):
    train = bench.question(1)
    if kind is Propose:
        return decode(bench.proposal("fuzz-new"), Propose)
    if kind is AskHistogram:
        return AskHistogram(bench.job_id)
    if kind is Train:
        return train
    about = (bench.bins.to_json(), train.fingerprint, train.weights)
    return (
        Evaluate(bench.job_id, 1, *about)
        if kind is Evaluate
        else Finish(bench.job_id, "completed", 1, *about)
    )


# Parsers


def samples(bench):
    """One real message of each kind."""
    bench.new_job()  # what was fuzzed before may have ended the job
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
        ShowRoster("job", bench.chain.to_json()),
        RosterSigned("job", "0" * 128),
    )
    return found + [encode(message) for message in rest]


def test_spoilt_bytes_are_no_message_or_a_whole_one(bench):
    real = samples(bench)
    assert {unpacked(data)[0]["kind"] for data in real} == {kind.__name__ for kind in KINDS}

    @fuzzing(100)
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
    @fuzzing(100)
    @given(st.data())
    def texts_of_any_kind(data):
        EXAMPLES["texts"] += 1
        text = data.draw(
            st.sampled_from([bench.roster.to_json(), bench.chain.to_json(), bench.bins.to_json()])
        )
        sent = data.draw(spoilt_value(text) | spoilt_json(text) | st.text(max_size=30))
        sent = sent if isinstance(sent, str) else json.dumps(sent)
        with contextlib.suppress(LinkError):
            assert Roster.from_json(sent).to_json() == sent
        with contextlib.suppress(LinkError):
            assert RosterChain.from_json(sent).to_json() == sent
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


# The coordinator


class Honest:
    """A lender of a secure sum and the next, as `client/masking.py` answers, with a vector that the test knows."""

    def __init__(self, name, roster, layout, vectors):
        self.name, self.roster, self.layout, self.vectors = name, roster, layout, vectors
        self.sums, self.following = {}, {}

    def answer(self, request):
        match request:
            case Open():
                return Advertised(JOB, *self.open(request.context))
            case ShareKeys():
                return Shared(JOB, request.sum, self.sums[request.sum].share(request.adverts))
            case Mask():
                self.sums[request.sum].receive(request.sealed, request.question.tobytes())
                masked = self.sums[request.sum].mask(self.vectors[self.name].copy())
                return Masked(JOB, request.sum, np.frombuffer(pack(masked, self.layout.ring_bits), np.uint8))
            case Confirm():
                signature = self.sums[request.sum].confirm(request.survivors)
                self.following[request.sum], advert = self.open(request.next) if request.next else ("", b"")
                return Confirmed(JOB, request.sum, signature, advert)
            case _:
                shares = self.sums[request.sum].unmask(request.confirmations)
                following = self.sums.get(self.following[request.sum])
                sealed = following.share(request.adverts) if following and request.adverts else {}
                return Unmasked(JOB, request.sum, shares, sealed)

    def open(self, text):
        context = SumContext.from_bytes(text.encode())
        own = self.sums[context.digest().hex()] = Participant(
            context, self.name, identity_of(self.name), self.roster, LEAST
        )
        return context.digest().hex(), own.open()


class SpoiltGrid:
    """Flower's Grid, before lenders that are honest but for one reply of one of them."""

    def __init__(self, lenders):
        self.lenders = lenders
        self.target, self.spoil = None, None
        self.sent, self.spoilt = None, None
        self.replies = {}

    def push_messages(self, messages):
        for message in messages:
            name = NAMES[message.metadata.dst_node_id]
            request = decode(from_record(message.content), *KINDS)
            try:
                reply = encode(self.lenders[name].answer(request))
            except FedfinError as error:  # it refuses what follows from the spoilt reply
                reply = encode(Refused(JOB, str(error)))
            if (type(request), name) == self.target and self.sent is None:
                self.sent, self.spoilt = reply, self.spoil(reply)
                reply = self.spoilt
            self.replies[str(len(self.replies))] = reply
        return [str(len(self.replies) - len(messages) + at) for at in range(len(messages))]

    def pull_messages(self, message_ids):
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=key),
                has_error=lambda: False,
                content=to_record(self.replies[key]),
            )
            for key in message_ids
        ]


JOB = "fuzz-1"
SIZE = 4
STEP_REQUESTS = {"open": Open, "share": ShareKeys, "mask": Mask, "confirm": Confirm, "unmask": Unmask}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = FederationStore.create(tmp_path_factory.mktemp("store") / "federation.db")
    made.start_job(JOB, PLAN.model_dump_json(), PLAN.digest())
    with pytest.MonkeyPatch.context() as patch:
        for key in ("_task_id", "_run_id", "_node_id"):  # Flower's messages say whose task they are of
            patch.setattr(TaskIdentity, key, 1)
        yield made


def counts_of(num_lenders):
    return Layout((Segment("counts", SIZE, 1000.0, 1.0),), num_lenders)


def stage_number(number):
    upcoming = Upcoming(f"round {number}", counts_of)
    weights = np.full(3, number, np.float32)
    question = Train(JOB, number, "", "", weights)
    return Stage(upcoming, question, number, lambda _: LEAST, Update, lambda *_: {})


@pytest.mark.parametrize("step", STEP_REQUESTS)
def test_a_coordinators_sum_is_exact_or_there_is_none(store, step):
    numbers = itertools.count(10_000 * list(STEP_REQUESTS).index(step) + 1)
    roster = {name: identity_of(name).public_key() for name in NAMES}
    context = JobContext("test", JOB, PLAN.digest(), roster, 5.0)
    vectors = {name: np.array([1, 2, 3, 10**at], np.uint32) for at, name in enumerate(NAMES)}

    @fuzzing(10)
    @given(st.data(), st.sampled_from(NAMES))
    def replies_of_any_kind(data, liar):
        EXAMPLES[f"coordinator, {step}"] += 1
        layout = counts_of(len(NAMES))
        grid = SpoiltGrid({name: Honest(name, roster, layout, vectors) for name in NAMES})
        grid.target, grid.spoil = (STEP_REQUESTS[step], liar), lambda reply: data.draw(spoilt(reply))
        exchange = GridExchange(grid, store)
        exchange._names = dict(enumerate(NAMES))
        sums = SecureSums(
            exchange, store, context, say=lambda _: None, refuse=lambda *_: None, wait=lambda *_: None
        )
        first, second = (stage_number(next(numbers)) for _ in range(2))
        try:
            made = sums.sum(first, NAMES, following=second.upcoming)
        except (SumLostError, SumShortError):
            made = None
        assert grid.sent is not None
        if grid.sent == grid.spoilt:
            assert made is not None
            assert made.survivors == NAMES
        if made is not None:
            # who deals shares that do not open is dropped by whom it dealt them to, and drops out of the sum with them
            assert step == "share" or set(NAMES) - set(made.survivors) <= {liar}
            expected = np.sum([vectors[name] for name in made.survivors], axis=0, dtype=np.uint32)
            if step == "mask" and liar in made.survivors:
                expected += altered_by(
                    grid, layout
                )  # a lender may answer with any vector, and shifts the sum by it
            assert made.parts["counts"].tolist() == expected.view(np.int32).tolist()
        # whatever was spoilt, the next sum is right; shares of it that are spoilt on their way with the last answers of
        # this one cost it lenders, or make it abort, and then the one after it is right
        if step == "unmask":
            with contextlib.suppress(SumLostError):
                after = sums.sum(second, NAMES)
                added = np.sum([vectors[name] for name in after.survivors], axis=0)
                assert after.parts["counts"].tolist() == added.tolist()
            second = stage_number(next(numbers))
        after = sums.sum(second, NAMES)
        assert after.survivors == NAMES
        assert after.parts["counts"].tolist() == np.sum(list(vectors.values()), axis=0).tolist()

    for_a_while(f"coordinator, {step}", replies_of_any_kind)


def altered_by(grid, layout):
    """What the spoilt vector is more than the right one, in the ring."""
    right, wrong = (
        unpack(decode(data, Masked).values.tobytes(), layout.size, layout.ring_bits)
        for data in (grid.sent, grid.spoilt)
    )
    return wrong - right

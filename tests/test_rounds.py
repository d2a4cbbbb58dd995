"""The job's loop against lenders in memory: quorum, deadlines, refusals, and a death at every single step."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import rosters
from numpy.testing import assert_array_equal
from secure_house import WatchedStore, hurry

from fedfin.credit.binning import Bins, histogram_size
from fedfin.credit.drift import num_cells
from fedfin.credit.schema import Schema
from fedfin.credit.score_counts import evaluation_cells
from fedfin.errors import ConfigError, FedfinError, QuorumError
from fedfin.invitation import Invitation
from fedfin.plan import JobPlan, TrainingPlan
from fedfin.server import gathering
from fedfin.server.exchange import Answers
from fedfin.server.jobs import choose_job
from fedfin.server.plain_sums import PlainSums
from fedfin.server.roster import FederationStore
from fedfin.server.rounds import run_job
from fedfin.server.summing import SumShortError
from fedfin.update import (
    Accepted,
    AskHistogram,
    Done,
    Evaluate,
    Finish,
    Histogram,
    Propose,
    Refused,
    Scores,
    ShowRoster,
    Train,
    Update,
    decode,
    encode,
)

SCHEMA = Schema.from_yaml(
    """
label: {name: bad, bad: 1, good: 0, definition: 90 days past due}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 8, grid_cells: 8}
  - {name: home, kind: categorical, categories: [owner, rent]}
""",
    "schema.yaml",
)
WEIGHTS = {"east": 50.0, "north": 200.0, "south": 100.0}


def plan_with(**sections):
    # targets are far away: a rate that lets an update reach them
    small = {
        "training": {"rounds": 3, "learning_rate": 1.0},
        "cohort": {"min_lenders": 2, "round_deadline_s": 0.05, "start_timeout_s": 0.05},
        "evaluation": {"times": 0},
    }
    merged = {key: {**small.get(key, {}), **sections.get(key, {})} for key in {**small, **sections}}
    return JobPlan.model_validate({"aggregation": "plain", **merged})


class Killed(BaseException):
    """The process ends here; nothing after it is executed."""


@dataclass
class Lender:
    """A lender in memory: its update moves every weight towards its own number, the same for the same question."""

    name: str
    weight: float
    target: float
    online: bool = True
    #: What it does instead of its part, by the type of the question: a function from question to answer.
    instead: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    models: dict = field(default_factory=dict)
    ends: list = field(default_factory=list)

    def answer(self, question):  # noqa: PLR0911  (one case for each question)
        self.asked.append(question)
        if type(question) in self.instead:
            return self.instead[type(question)](question)
        match question:
            case Propose():
                return Accepted(question.job_id, self.weight)
            case AskHistogram():
                return Histogram(question.job_id, self.histogram())
            case Train():
                delta = (np.float32(self.target) - question.weights) * np.float32(0.5)
                return Update(question.job_id, question.round, question.fingerprint, delta)
            case Evaluate():
                # all loans in the middle cell of the score, half of them bad
                counts = np.zeros(evaluation_cells(SCHEMA))
                counts[[32, 96]] = self.weight / 2
                return Scores(question.job_id, counts)
            case ShowRoster():
                return Refused(question.job_id, "its engineer looks at it", "approval")
            case Finish():
                self.ends.append((question.job_id, question.status))
                if question.status == "completed":
                    self.models[question.job_id] = question.weights
                return Done(question.job_id)

    def histogram(self):
        """Return as many loans in every column as the weight says, more in each cell than in the one before."""
        sizes = [num_cells(column) for column in SCHEMA.features]
        return np.concatenate([self.weight * np.arange(1, n + 1) * 2.0 / (n * (n + 1)) for n in sizes])

    def histogram_with(self, count):
        counts = self.histogram()
        counts[0] = count
        return counts

    def questions(self, kind):
        return [question for question in self.asked if isinstance(question, kind)]


class House:
    """Lenders, the coordinator's store and what it said; the Exchange of the tests."""

    def __init__(self, directory, weights=WEIGHTS):
        self.path = directory / "federation.db"
        self.store = FederationStore.create(self.path)
        self.lenders = {
            name: Lender(name, weight, target=number + 1.0)
            for number, (name, weight) in enumerate(sorted(weights.items()))
        }
        for name in self.lenders:
            self.enrol(name)
        self.store.versions.add(rosters.founded(tuple(self.lenders)).versions[-1])
        self.events = []
        self.released = []
        self.judged = []
        self.on_step = lambda: None

    def enrol(self, name):
        invitation = Invitation.create(name, "fed.example:9092", "0" * 64)
        self.store.invite(invitation)
        self.store.enrol(rosters.enrolled(name), invitation.secret_hash())

    # The Exchange

    def online(self):
        return frozenset(name for name, lender in self.lenders.items() if lender.online)

    def ask(self, requests, expected, *, deadline_s, on_reply=None, fold=None, enough=None):
        self.on_step()
        answers = Answers(replies={}, failures={})
        for name, request in requests.items():
            lender = self.lenders[name]
            question = decode(encode(request), Propose, AskHistogram, Train, Evaluate, Finish)
            reply = lender.answer(question) if lender.online else None
            if reply is None:
                answers.failures[name] = f"no answer within {deadline_s:g} s"
            else:
                answers.replies[name] = decode(encode(reply), type(reply))
                if on_reply is not None:
                    on_reply(name)
        self.on_step()
        return answers

    # The coordinator

    def say(self, event):
        self.on_step()
        self.events.append(event)

    def release(self, checkpoint):
        self.on_step()
        self.released.append(checkpoint)

    def run(self, plan, *, new_job=False):
        """What the ServerApp does at every start."""
        store = WatchedStore(self.path, self.on_step)
        return self.run_job(store, choose_job(store, plan, new_job=new_job, say=self.say), plan)

    def run_job(self, store, job, plan):
        return run_job(
            self,
            store,
            job,
            plan,
            SCHEMA,
            identity=rosters.coordinator(),
            release=self.release,
            judged=self.judged.append,
            say=self.say,
        )

    def said(self, event):
        return [line for line in self.events if line["event"] == event]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setattr(gathering, "SILENT_S", 0.01)


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def averaged(weights, lenders):
    """One round by hand: the weighted mean of the lenders' targets, half way from where the weights are."""
    total = sum(lender.weight for lender in lenders)
    mean = sum(lender.weight * lender.target for lender in lenders) / total
    return weights + (mean - weights) * 0.5


def refuse(reason):
    return lambda question: Refused(question.job_id, reason)


def silent(_):
    return None


# The whole walk


def test_a_job_proposes_bins_trains_releases_and_delivers(house):
    final = house.run(plan_with())
    kinds = [line["event"] for line in house.events if line["event"] not in ("answer", "accepted")]
    assert kinds == ["started", "cohort", "bins", *["round", "round_done"] * 3, "delivered"]
    assert final.round == 3
    (job,) = house.store.jobs()
    assert job.status == "completed"
    (released,) = house.released
    assert_array_equal(released.weights, final.weights)
    for lender in house.lenders.values():
        assert_array_equal(lender.models[job.job_id], final.weights)
    assert house.store.undelivered(job.job_id) == ()


def test_every_round_is_the_weighted_mean_of_the_updates(house):
    final = house.run(plan_with())
    expected = np.zeros(final.weights.shape)
    for _ in range(3):
        expected = averaged(expected, house.lenders.values())
    np.testing.assert_allclose(final.weights, expected, rtol=1e-6)


def test_with_strategy_median_every_round_moves_by_the_median_of_the_updates(house):
    final = house.run(plan_with(training={"strategy": "median"}))
    # the lenders draw half way towards 1, 2 and 3: 2 is the median, whatever the weights
    np.testing.assert_allclose(final.weights, 2.0 * (1 - 0.5**3), rtol=1e-6)


def test_the_bins_are_of_the_summed_histograms(house):
    final = house.run(plan_with(model={"max_bins": 2}))
    # the eight cells count 1, 2, ... 8 in proportion: half of the 36 lie below the middle of the sixth
    assert Bins.from_json(final.bins).edges == (("income", (0.0, 5.0, 8.0)),)


def test_all_lenders_are_asked_the_same_and_no_more(house):
    house.run(plan_with())
    asked = {name: [encode(question) for question in lender.asked] for name, lender in house.lenders.items()}
    assert asked["east"] == asked["north"] == asked["south"]
    kinds = [type(question) for question in house.lenders["east"].asked]
    assert kinds == [Propose, AskHistogram, Train, Train, Train, Finish]


def numbers_in(value):
    if isinstance(value, dict):
        return numbers_in(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


def test_events_tell_of_no_lenders_size(house):
    house.run(plan_with())
    assert {lender.weight for lender in house.lenders.values()} & set(numbers_in(house.events)) == set()


# Quorum


def test_below_quorum_the_coordinator_waits_and_says_for_whom(house):
    for name in ("north", "south"):
        house.lenders[name].online = False

    def back(event):
        house.events.append(event)
        if event["event"] == "waiting":
            house.lenders["north"].online = True

    house.say = back
    house.run(plan_with())
    first = house.said("waiting")[0]
    assert (first["online"], first["for"]) == (["east"], ["north", "south"])
    assert house.said("cohort")[0]["lenders"] == ["east", "north"]


def test_the_job_starts_with_the_quorum_when_the_others_stay_away_too_long(house):
    house.lenders["south"].online = False
    house.run(plan_with(cohort={"start_timeout_s": 1.0}))
    assert house.said("cohort")[0]["lenders"] == ["east", "north"]
    assert house.said("waiting")[0]["wanted"] == 3
    assert house.lenders["south"].asked == []


def test_no_more_lenders_are_waited_for_than_the_plan_says(house):
    house.lenders["south"].online = False
    house.run(plan_with(cohort={"wait_for": 2, "start_timeout_s": 1e6}))
    assert house.said("cohort")[0]["lenders"] == ["east", "north"]
    assert house.said("waiting") == []


def test_a_lender_that_goes_away_in_the_middle_is_waited_for_below_quorum(house):
    plan = plan_with(cohort={"min_lenders": 3})
    gone = []

    def leave(question):
        if question.round == 2 and not gone:
            gone.append("south")
            house.lenders["south"].online = False
            return None
        return Lender.answer(Lender("south", 100.0, 3.0), question)

    def back(event):
        house.events.append(event)
        if event["event"] == "waiting" and event["for"] == ["south"]:
            house.lenders["south"].online = True

    house.lenders["south"].instead[Train] = leave
    house.say = back
    final = house.run(plan)
    assert final.round == 3
    (short,) = house.said("round_short")
    assert (short["round"], short["missing"]) == (2, {"south": "no answer within 0.05 s"})
    assert house.said("waiting")[0]["for"] == ["south"]


def test_a_lender_that_enrols_in_the_middle_takes_part_from_the_next_round(house):
    def enrol(event):
        house.events.append(event)
        if event["event"] == "round_done" and "west" not in house.lenders:
            house.lenders["west"] = Lender("west", 50.0, 4.0)
            house.enrol("west")

    house.say = enrol
    house.run(plan_with())
    cohorts = [line["cohort"] for line in house.said("round_done")]
    assert cohorts == [["east", "north", "south"], *[["east", "north", "south", "west"]] * 2]
    assert list(house.lenders["west"].models) == [house.store.jobs()[0].job_id]


# Lenders that fail


def test_a_missed_deadline_is_put_down_to_its_lender_and_the_round_goes_on(house):
    house.lenders["south"].instead[Train] = lambda question: (
        None if question.round == 2 else Lender.answer(Lender("south", 100.0, 3.0), question)
    )
    house.run(plan_with())
    done = house.said("round_done")
    assert [line["missing"] for line in done] == [{}, {"south": "no answer within 0.05 s"}, {}]
    assert [line["cohort"] for line in done][1] == ["east", "north"]


def test_a_missing_histogram_is_put_down_to_its_lender_and_the_bins_go_on(house):
    house.lenders["south"].instead[AskHistogram] = silent
    house.run(plan_with())
    (bins,) = house.said("bins")
    assert (bins["lenders"], bins["missing"]) == (2, {"south": "no answer within 0.05 s"})


def test_a_histogram_of_another_schema_is_put_down_to_its_lender(house):
    house.lenders["south"].instead[AskHistogram] = lambda question: Histogram(question.job_id, np.ones(3))
    house.run(plan_with())
    cells = histogram_size(SCHEMA)
    assert house.said("bins")[0]["missing"] == {
        "south": f"its histogram does not have the schema's {cells} cells"
    }


def test_a_refused_proposal_is_recorded_and_the_job_goes_on_without_it(house):
    house.lenders["south"].instead[Propose] = refuse("its policy forbids it")
    house.run(plan_with())
    (event,) = house.said("refused")
    assert (event["lender"], event["reason"]) == ("south", "its policy forbids it")
    assert house.said("cohort")[0]["refused"] == {"south": "its policy forbids it"}
    assert [type(question) for question in house.lenders["south"].asked] == [Propose]
    (job,) = house.store.jobs()
    assert set(house.store.weights(job.job_id)) == {"east", "north"}


@pytest.mark.parametrize("kind", [AskHistogram, Train])
def test_a_lender_that_refuses_to_go_on_is_left_out_and_told_of_the_end(house, kind):
    """It holds a reservation of its budget, which only the job's end gives back."""
    house.lenders["south"].instead[kind] = refuse("its ledger cannot record")
    house.run(plan_with())
    assert [line["lender"] for line in house.said("refused")] == ["south"]
    assert len(house.lenders["south"].questions(kind)) == 1
    assert [line["cohort"] for line in house.said("round_done")] == [["east", "north"]] * 3
    assert [status for _, status in house.lenders["south"].ends] == ["completed"]


def test_too_many_refusals_at_the_proposal_end_the_job_with_their_reasons(house):
    for name, reason in (("north", "its policy"), ("south", "its budget")):
        house.lenders[name].instead[Propose] = refuse(reason)
    expected = (
        r"cohort\.min_lenders is 2, and only 1 of 3 lenders can take part\. Refused: north: its policy; south: its"
        r" budget\. Mend the plan, then start again"
    )
    with pytest.raises(QuorumError, match=expected):
        house.run(plan_with())


@pytest.mark.parametrize("kind", [AskHistogram, Train])
def test_too_many_refusals_later_end_the_job_with_their_reasons(house, kind):
    for name, reason in (("north", "its table changed"), ("south", "its disk is full")):
        house.lenders[name].instead[kind] = refuse(reason)
    with pytest.raises(
        QuorumError,
        match=r"too many lenders refused to go on \(north: its table changed; south: its disk is full\)",
    ):
        house.run(plan_with())
    (job,) = house.store.jobs()
    assert job.status == "running"


def test_a_stage_that_no_quorum_is_willing_to_answer_ends_the_job_with_their_reasons(house, monkeypatch):
    """In a secure sum a refusal by rule leaves the lender in the job; it must not be asked for ever."""
    asked = []

    def refused(_, stage, names, **__):
        asked.append(stage.name)
        raise SumShortError({"east": "[charged] it has left", "south": "too late"}, ["east", "south"])

    monkeypatch.setattr(PlainSums, "sum", refused)
    with pytest.raises(
        QuorumError, match=r"refuse bins each time .*east: \[charged\] it has left; south: too late"
    ):
        house.run(plan_with())
    assert asked == ["bins"] * 3


def test_what_was_refused_is_asked_again_after_a_restart(house):
    """Between the runs the operator mended the plan's quarrel with the lender."""
    for name in ("north", "south"):
        house.lenders[name].instead[Propose] = refuse("its policy")
    with pytest.raises(QuorumError):
        house.run(plan_with())
    for name in ("north", "south"):
        house.lenders[name].instead.clear()
    house.run(plan_with())
    assert [line["cohort"] for line in house.said("round_done")] == [["east", "north", "south"]] * 3


def altered(**fields):
    """An update in which these fields are others than they should be."""

    def answer(question):
        honest = {
            "job_id": question.job_id,
            "round": question.round,
            "fingerprint": question.fingerprint,
            "delta": np.full_like(question.weights, 1e6),
        }
        return Update(**{**honest, **{key: change(honest[key]) for key, change in fields.items()}})

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (altered(delta=lambda delta: delta[:-1]), "its update is for another schema or architecture"),
        (
            altered(delta=lambda delta: np.append(delta, delta)),
            "its update is for another schema or architecture",
        ),
        (altered(fingerprint=lambda _: "0" * 64), "its update is for another schema or architecture"),
        (altered(round=lambda number: number + 1), "it answered another question"),
        (altered(round=lambda number: number - 1), "it answered another question"),
        (lambda question: Done(question.job_id), "it answered another question"),
    ],
    ids=["short", "long", "fingerprint", "next-round", "last-round", "kind"],
)
def test_an_update_of_something_else_is_put_down_to_its_lender_and_changes_nothing(house, answer, reason):
    house.lenders["south"].instead[Train] = answer
    final = house.run(plan_with())
    assert [line["missing"] for line in house.said("round_done")] == [{"south": reason}] * 3
    expected = np.zeros(final.weights.shape)
    for _ in range(3):
        expected = averaged(expected, [house.lenders["east"], house.lenders["north"]])
    np.testing.assert_allclose(final.weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "weight"), [("size", 2001.0), ("size", 0.0), ("size", -1.0), ("sqrt", 50.0), ("equal", 1.5)]
)
def test_a_weight_beyond_the_plans_is_not_taken(house, weighting, weight):
    house.lenders["south"].weight = weight
    for name in ("east", "north"):
        house.lenders[name].weight = 1.0
    house.run(plan_with(training={"weighting": weighting}))
    assert {line["lender"] for line in house.said("unanswered")} == {"south"}
    assert "its weight is not one of the plan's" in house.said("unanswered")[0]["reason"]
    assert [line["cohort"] for line in house.said("round_done")] == [["east", "north"]] * 3


@pytest.mark.parametrize(("weighting", "weight"), [("size", 2000.0), ("sqrt", 2000.0**0.5), ("equal", 1.0)])
def test_the_largest_weight_of_the_plan_is_taken(house, weighting, weight):
    for lender in house.lenders.values():
        lender.weight = weight
    house.run(plan_with(training={"weighting": weighting}))
    assert [line["cohort"] for line in house.said("round_done")] == [["east", "north", "south"]] * 3


def test_a_lender_that_does_not_answer_the_proposal_is_named_and_not_asked_without_pause(house, monkeypatch):
    monkeypatch.setattr(gathering, "SILENT_S", 3600.0)
    house.lenders["south"].instead[Propose] = silent
    house.run(plan_with())
    (event,) = house.said("unanswered")
    assert (event["lender"], event["reason"]) == ("south", "no answer within 120 s")
    assert len(house.lenders["south"].asked) == 1


# The end


def test_a_model_that_could_not_be_delivered_is_delivered_at_the_next_run(house):
    plan = plan_with()
    house.lenders["south"].instead[Train] = lambda question: (
        setattr(house.lenders["south"], "online", question.round < 3)
        or Lender.answer(Lender("south", 100.0, 3.0), question)
    )
    final = house.run(plan)
    assert house.said("delivered")[-1]["missing"] == ["south"]
    house.lenders["south"].online = True
    house.events.clear()
    again = house.run(plan)
    assert [line["event"] for line in house.events] == ["delivered"]
    assert house.said("delivered")[-1]["missing"] == []
    assert_array_equal(again.weights, final.weights)
    (model,) = house.lenders["south"].models.values()
    assert_array_equal(model, final.weights)
    assert len(house.lenders["north"].questions(Finish)) == 1
    assert len(house.released) == 1


def test_a_model_that_could_not_be_delivered_is_delivered_beside_the_next_job(house):
    house.lenders["south"].instead[Finish] = silent
    first = house.run(plan_with())
    house.lenders["south"].instead.clear()
    second = house.run(plan_with(training={"rounds": 1}))
    models = house.lenders["south"].models
    assert [job.status for job in house.store.jobs()] == ["completed", "completed"]
    one, two = (job.job_id for job in house.store.jobs())
    assert_array_equal(models[one], first.weights)
    assert_array_equal(models[two], second.weights)


def test_a_lender_that_cannot_keep_the_model_is_named_with_its_reason_and_not_held_to_have_it(house):
    plan = plan_with(cohort={"round_deadline_s": 3600.0})
    house.lenders["south"].instead[Finish] = refuse("its installation needs its engineer")
    house.run(plan)
    (delivered,) = house.said("delivered")
    assert delivered["missing"] == ["south"]
    assert delivered["not_kept"] == {"south": "its installation needs its engineer"}
    assert len(house.lenders["south"].questions(Finish)) == 1
    house.lenders["south"].instead.clear()
    house.run(plan)
    assert len(house.lenders["south"].models) == 1


def test_a_completed_job_without_its_checkpoint_is_refused_with_the_mend(house):
    house.store.start_job("credit-1", "{}", "digest")
    house.store.end_job("credit-1", "completed")
    (job,) = house.store.jobs()
    with pytest.raises(FedfinError, match=r"its checkpoint is gone; restore federation\.db from its backup"):
        house.run_job(house.store, job, plan_with())


# Deaths


def steps_of(house, plan):
    """Number of steps (before and after each write and question, at each event and release) of the whole job."""
    count = [0]

    def step():
        count[0] += 1

    house.on_step = step
    house.run(plan)
    return count[0]


def kill_at(house, number):
    """Let the process die at its step `number` from here on."""
    left = [number]

    def step():
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    house.on_step = step


def bytes_by_question(lender):
    """The bytes that a lender was asked, by what they ask: more than one under a name is an inconsistency."""
    asked = {}
    for question in lender.asked:
        name = (type(question).__name__, getattr(question, "round", None))
        asked.setdefault(name, set()).add(encode(question))
    return asked


def was_told_to_all(house):
    """Whether the job had ended, and every lender had confirmed it, before the process died."""
    return [job.status for job in house.store.jobs()] == ["completed"] and not house.store.undelivered(
        house.store.jobs()[0].job_id
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The steps and the final weights of the job when nothing happens."""
    house = House(tmp_path_factory.mktemp("undisturbed"))
    plan = plan_with(training={"rounds": 2})
    num_steps = steps_of(house, plan)
    return num_steps, house.released[0].weights


def test_a_job_killed_at_any_step_ends_with_the_same_model_and_asks_nobody_anything_else(
    tmp_path_factory, undisturbed
):
    num_steps, weights = undisturbed
    plan = plan_with(training={"rounds": 2})
    assert num_steps > 40
    for number in range(1, num_steps + 1):
        house = House(tmp_path_factory.mktemp("killed"))
        kill_at(house, number)
        with pytest.raises(Killed):
            house.run(plan)
        house.on_step = lambda: None
        if was_told_to_all(house):
            with pytest.raises(ConfigError, match="this plan was trained already"):
                house.run(plan)
        else:
            assert_array_equal(house.run(plan).weights, weights)
        (job,) = house.store.jobs()
        assert job.status == "completed"
        assert len(house.released) >= 1
        for released in house.released:
            assert_array_equal(released.weights, weights)
        for lender in house.lenders.values():
            assert {len(forms) for forms in bytes_by_question(lender).values()} == {1}
            assert_array_equal(lender.models[job.job_id], weights)


def test_a_job_killed_at_every_step_one_after_the_other_still_ends_with_the_same_model(house, undisturbed):
    _, weights = undisturbed
    plan = plan_with(training={"rounds": 2})
    deaths = 0
    for patience in range(2, 200):  # a little further each time
        kill_at(house, patience)
        try:
            final = house.run(plan)
            break
        except Killed:
            deaths += 1
    assert deaths > 3
    assert_array_equal(final.weights, weights)
    assert_array_equal(house.lenders["south"].models[house.store.jobs()[0].job_id], weights)
    for lender in house.lenders.values():
        assert {len(forms) for forms in bytes_by_question(lender).values()} == {1}


def test_a_round_that_was_kept_is_not_asked_again(house):
    plan = plan_with()

    def die(event):
        if event["event"] == "round" and event["round"] == 3:
            raise Killed
        house.events.append(event)

    say, house.say = house.say, die
    with pytest.raises(Killed):
        house.run(plan)
    house.say = say
    house.run(plan)
    assert [question.round for question in house.lenders["east"].questions(Train)] == [1, 2, 3]
    assert len(house.lenders["east"].questions(AskHistogram)) == 1
    assert house.said("resumed")[0]["job"] == house.store.jobs()[0].job_id


# Which job


def choose(house, plan, *, new_job=False):
    return choose_job(house.store, plan, new_job=new_job, say=house.say)


def test_a_first_plan_is_a_new_job_named_after_it(house):
    plan = JobPlan(name="scorecard")
    job = choose(house, plan)
    assert re.fullmatch(r"scorecard-[0-9a-f]{8}", job.job_id)
    assert (job.status, job.digest) == ("running", plan.digest())
    assert JobPlan.model_validate_json(job.plan) == plan
    assert house.events == [{"event": "started", "job": job.job_id}]


def test_a_strategy_that_needs_single_updates_is_refused_under_secure_aggregation_before_anyone_is_asked(
    house,
):
    plan = JobPlan().model_copy(update={"training": TrainingPlan(strategy="median")})
    expected = (
        r"training\.strategy is median, .* aggregation is secure, .*; take fedavg, or aggregation plain$"
    )
    with pytest.raises(ConfigError, match=expected):
        choose(house, plan)
    assert house.store.jobs() == ()
    assert choose(house, plan.model_copy(update={"aggregation": "plain"})).status == "running"


def test_an_unfinished_job_of_the_same_plan_goes_on(house):
    job = choose(house, plan_with())
    assert choose(house, plan_with()) == job
    assert house.events[-1] == {"event": "resumed", "job": job.job_id}


def test_a_changed_plan_takes_the_place_of_a_job_in_which_nobody_took_part(house):
    old = choose(house, plan_with())
    new = choose(house, plan_with(privacy={"epsilon": 1.0}))
    assert [(job.job_id, job.status) for job in house.store.jobs()] == [
        (old.job_id, "abandoned"),
        (new.job_id, "running"),
    ]


def test_a_changed_plan_is_refused_while_a_job_is_unfinished(house):
    job = choose(house, plan_with())
    house.store.save_answer(job.job_id, "east", weight=50.0, reason=None)
    other = plan_with(privacy={"epsilon": 1.0})
    with pytest.raises(
        ConfigError, match=rf"job {job.job_id} is unfinished .* restore the plan .* `fedfin server --new-job`"
    ):
        choose(house, other)
    assert [(kept.job_id, kept.status) for kept in house.store.jobs()] == [(job.job_id, "running")]
    assert choose(house, plan_with()) == job


def test_new_job_abandons_the_unfinished_one(house):
    old = choose(house, plan_with())
    new = choose(house, plan_with(privacy={"epsilon": 1.0}), new_job=True)
    assert [(job.job_id, job.status) for job in house.store.jobs()] == [
        (old.job_id, "abandoned"),
        (new.job_id, "running"),
    ]
    assert house.events[-2:] == [
        {"event": "abandoned", "job": old.job_id},
        {"event": "started", "job": new.job_id},
    ]
    assert choose(house, plan_with(privacy={"epsilon": 1.0})) == new


def test_a_trained_plan_is_refused_unless_a_new_job_is_asked_for(house):
    house.run(plan_with())
    (done,) = house.store.jobs()
    with pytest.raises(
        ConfigError, match=rf"trained already, as job {done.job_id}.*runs/{done.job_id}/model"
    ):
        choose(house, plan_with())
    new = choose(house, plan_with(), new_job=True)
    assert new.job_id != done.job_id
    assert house.store.jobs()[0].status == "completed"


def test_another_plan_after_a_trained_one_is_a_new_job(house):
    house.run(plan_with())
    assert choose(house, plan_with(training={"rounds": 1})).status == "running"


def abandon_after_the_bins(house):
    """A job that every lender has accepted is abandoned before its first round."""
    plan = plan_with()

    def die(event):
        house.events.append(event)
        if event["event"] == "bins":
            raise Killed

    say, house.say = house.say, die
    with pytest.raises(Killed):
        house.run(plan)
    house.say = say
    return house.store.jobs()[0].job_id


def test_lenders_are_told_that_a_job_is_abandoned_before_the_next_is_proposed(house):
    """What the abandoned job holds of their budgets could not be reserved for the new one."""
    old = abandon_after_the_bins(house)
    house.run(plan_with(privacy={"epsilon": 1.0}), new_job=True)
    for lender in house.lenders.values():
        assert lender.ends[0] == (old, "abandoned")
        kinds = [type(question) for question in lender.asked]
        assert kinds[:4] == [Propose, AskHistogram, Finish, Propose]


def test_a_lender_that_connects_late_is_told_of_the_abandoned_job_before_the_next_is_proposed(house):
    old = abandon_after_the_bins(house)
    for lender in house.lenders.values():
        lender.online = False

    def back(event):
        house.events.append(event)
        if event["event"] == "waiting":
            for lender in house.lenders.values():
                lender.online = True

    house.say = back
    house.run(plan_with(privacy={"epsilon": 1.0}), new_job=True)
    for lender in house.lenders.values():
        assert [status for _, status in lender.ends] == ["abandoned", "completed"]
        assert lender.ends[0][0] == old
        assert [type(question) for question in lender.asked][2:4] == [Finish, Propose]


def test_an_update_beyond_what_the_plans_steps_can_reach_is_put_down_to_its_lender(house):
    house.lenders["south"].target = 1e6
    final = house.run(plan_with())
    for line in house.said("round_done"):
        assert line["cohort"] == ["east", "north"]
        assert "steps can reach" in line["missing"]["south"]
    assert np.abs(final.weights).max() < 1e3


@pytest.mark.parametrize("counts", [1.7e308, 1e12, -1e6])
def test_an_absurd_histogram_is_put_down_to_its_lender_and_ends_no_job(house, counts):
    cells = house.lenders["south"].histogram_with(counts)
    house.lenders["south"].instead[AskHistogram] = lambda question: Histogram(question.job_id, cells)
    final = house.run(plan_with(privacy={"mode": "none"}))
    (event,) = house.said("bins")
    assert event["lenders"] == 2
    assert "south" in event["missing"]
    assert final.round == 3

"""The way to the lenders over Flower's Grid: answers handed over as they come, and nobody waited for without need."""

from types import SimpleNamespace

import pytest
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedfin.errors import LinkError
from fedfin.server import app
from fedfin.server.app import GridExchange
from fedfin.update import Advertised, Done, Open, Refused, decode, encode
from fedfin.wire import from_record, to_record

NAMES = ("east", "north", "south")
JOB = "credit-1"


class Grid:
    """Flower's Grid before lenders that answer, refuse, stay silent, or are gone."""

    def __init__(self, **answers):
        #: By lender: a message, an error code, None for silence; "" is a node that the message does not reach.
        self.answers = answers
        self.pushed = []

    def push_messages(self, messages):
        names = [NAMES[message.metadata.dst_node_id] for message in messages]
        self.pushed += [(name, message.content) for name, message in zip(names, messages, strict=True)]
        return ["" if self.answers[name] == "" else f"message to {name}" for name in names]

    def pull_messages(self, message_ids):
        names = [message_id.removeprefix("message to ") for message_id in message_ids]
        return [self._reply(name) for name in names if self.answers[name] is not None]

    def _reply(self, name):
        answer = self.answers[name]
        failed = isinstance(answer, int)
        return SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=f"message to {name}"),
            has_error=lambda: failed,
            error=SimpleNamespace(code=answer),
            content=None if failed else to_record(encode(answer)),
        )


@pytest.fixture(autouse=True)
def _flower(monkeypatch):
    for key in ("_task_id", "_run_id", "_node_id"):  # Flower's messages say whose task they are of
        monkeypatch.setattr(TaskIdentity, key, 1)
    monkeypatch.setattr(app, "_POLL_S", 0.001)
    monkeypatch.setattr(app, "_GRACE_S", 0.05)


def advert(name):
    return Advertised(JOB, "a" * 64, name.encode())


def ask(grid, names=NAMES, **options):
    exchange = GridExchange(grid, store=None)
    exchange._names = dict(enumerate(NAMES))
    requests = dict.fromkeys(names, Open(JOB, "context"))
    return exchange.ask(requests, Advertised, **{"deadline_s": 5.0, **options})


def test_answers_and_refusals_are_kept_by_lender():
    answers = {"east": advert("east"), "north": Refused(JOB, "no"), "south": advert("south")}
    found = ask(Grid(**answers))
    assert found.replies == answers
    assert found.failures == {}


def test_an_answer_that_is_handed_over_is_not_kept_and_a_refusal_is():
    taken = {}
    grid = Grid(east=advert("east"), north=Refused(JOB, "no"), south=advert("south"))
    found = ask(grid, fold=taken.__setitem__)
    assert taken == {"east": advert("east"), "south": advert("south")}
    assert found.replies == {"north": Refused(JOB, "no")}


def test_an_answer_that_is_not_taken_is_its_lenders_failure():
    def fold(name, reply):
        if name == "north":
            msg = "it answered for another sum"
            raise LinkError(msg)

    found = ask(Grid(**{name: advert(name) for name in NAMES}), fold=fold)
    assert found.failures == {"north": "it answered for another sum"}


def test_once_enough_have_answered_the_others_are_waited_for_a_moment_only():
    grid = Grid(east=advert("east"), north=advert("north"), south=None)
    found = ask(grid, deadline_s=60.0, enough=2)
    assert set(found.replies) == {"east", "north"}
    assert found.failures["south"].startswith("no answer within 0.0")


def test_refusals_and_failures_are_not_enough():
    grid = Grid(east=advert("east"), north=Refused(JOB, "no"), south=None)
    found = ask(grid, deadline_s=0.2, enough=2)
    assert found.failures == {"south": "no answer within 0.2 s"}


def test_each_way_to_fail_is_named():
    grid = Grid(
        east="", north=int(ErrorCode.NODE_UNAVAILABLE), south=int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    )
    found = ask(grid)
    assert found.failures["east"] == "its node went offline before the question reached it"
    assert found.failures["north"] == "its node went away before it answered"
    assert found.failures["south"].startswith("its node stopped or failed")
    assert ask(grid, names=("west",)).failures == {"west": "its node is offline"}


@pytest.mark.parametrize("answer", [Done(JOB), Advertised("another-1", "a" * 64, b"")])
def test_another_answer_than_the_one_due_or_for_another_job_is_a_failure(answer):
    found = ask(Grid(east=answer, north=advert("north"), south=advert("south")))
    assert list(found.failures) == ["east"]
    assert set(found.replies) == {"north", "south"}


def test_one_question_to_all_is_one_content_and_each_lender_gets_it():
    grid = Grid(**{name: advert(name) for name in NAMES})
    ask(grid)
    assert [name for name, _ in grid.pushed] == list(NAMES)
    assert {decode(from_record(content), Open).context for _, content in grid.pushed} == {"context"}

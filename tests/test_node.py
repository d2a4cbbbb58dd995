"""The lender's node: which calls it makes of Flower, and when it gives up."""

# ruff: noqa: N802  (the recorder has the names of Flower's client)

import datetime as dt
import email.utils
import json
import threading

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedfin.client.app import make_app
from fedfin.client.node import Node, check_clock
from fedfin.errors import LinkError
from fedfin.update import Accepted, Propose, decode, encode
from fedfin.wire import from_record, to_record

ADDRESS = "127.0.0.1:1"


class StubbedLender:
    """Answers every proposal with a weight; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def answer(self, data):
        self.asked.append(data)
        return encode(Accepted("job-1", 50.0))


class Recorder:
    """Stands for Flower's Fleet client: delivers one message, keeps what comes back, and the name of every call."""

    def __init__(self, content, stop):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.calls, self.pushed, self._stop = [], {}, stop
        message = FlowerMessage(content, dst_node_id=5, message_type="query.propose")
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            self._objects = {i: o.deflate() for i, o in get_all_nested_objects(message).items()}
            self._tree = get_object_tree(message)
            self._stub = message_to_proto(remove_content_from_message(message))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ActivateNode(self, request):
        self.calls.append("ActivateNode")
        return ActivateNodeResponse(node_id=5)

    def DeactivateNode(self, request):
        self.calls.append("DeactivateNode")
        return DeactivateNodeResponse()

    def SendNodeHeartbeat(self, request):
        return SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request):
        self.calls.append("PullMessages")
        if self.calls.count("PullMessages") == 1:
            return PullMessagesResponse(messages_list=[self._stub], message_object_trees=[self._tree])
        self._stop()
        return PullMessagesResponse()

    def PullObject(self, request):
        self.calls.append("PullObject")
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=self._objects[request.object_id]
        )

    def ConfirmMessageReceived(self, request):
        self.calls.append("ConfirmMessageReceived")
        return ConfirmMessageReceivedResponse()

    def PushMessages(self, request):
        self.calls.append("PushMessages")
        self.reply = message_from_proto(request.messages_list[0])
        self.reply_id = request.message_object_trees[0].object_id
        ids = [self.reply_id, *_ids(request.message_object_trees[0])]
        return PushMessagesResponse(objects_to_push=ids, session_id="s")

    def PushObject(self, request):
        self.calls.append("PushObject")
        self.pushed[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def __getattr__(self, name):
        raise AssertionError(f"the node called {name}")


def _ids(tree):
    return [i for child in tree.children for i in (child.object_id, *_ids(child))]


def node_with(tmp_path, recorder_content, lender):
    said = []
    (tmp_path / "ca.pem").write_text("unused")
    node = Node(
        ADDRESS,
        tmp_path / "ca.pem",
        (tmp_path / "certificate.pem", tmp_path / "tls.key"),
        ec.generate_private_key(ec.SECP384R1()),
        make_app(lender),
        state_path=tmp_path / "node.json",
        say=said.append,
        idle=lambda: None,
    )
    recorder = Recorder(recorder_content, node.stop)
    node._client = lambda: recorder
    return node, recorder, said


def test_a_question_is_answered_by_the_installed_app_and_no_bundle_is_fetched(tmp_path):
    question = encode(Propose("job-1", "{}", "f" * 64))
    lender = StubbedLender()
    node, recorder, _ = node_with(tmp_path, to_record(question), lender)
    node.run()
    assert lender.asked == [question]
    message = inflate_object_from_contents(recorder.reply_id, recorder.pushed)
    assert decode(from_record(message.content), Accepted).weight == 50.0
    assert recorder.reply.metadata.dst_node_id == 1
    # GetFab and GetRun are not among them: neither code nor configuration comes from outside
    assert set(recorder.calls) == {
        "ActivateNode",
        "PullMessages",
        "PullObject",
        "ConfirmMessageReceived",
        "PushMessages",
        "PushObject",
        "DeactivateNode",
    }


def test_a_failing_app_becomes_an_error_without_its_text(tmp_path):
    class Broken(StubbedLender):
        def answer(self, data):
            raise ValueError("row 17 of the loans")

    node, recorder, said = node_with(tmp_path, to_record(b"x"), Broken())
    node.run()
    assert recorder.reply.has_error()
    assert "row 17" not in recorder.reply.error.reason
    assert any("row 17" in line for line in said)  # the lender's own terminal says it


def test_a_restarted_node_gives_up_its_old_place_first(tmp_path):
    (tmp_path / "node.json").write_text(json.dumps({"node_id": 5}))
    node, recorder, _ = node_with(tmp_path, to_record(encode(Propose("job-1", "{}", "f"))), StubbedLender())
    node.run()
    assert recorder.calls[:2] == ["DeactivateNode", "ActivateNode"]


def test_a_question_that_does_not_arrive_whole_is_lost_and_the_node_goes_on(tmp_path):
    node, recorder, said = node_with(
        tmp_path, to_record(encode(Propose("job-1", "{}", "f"))), StubbedLender()
    )
    recorder._objects = dict.fromkeys(recorder._objects, b"junk")
    node.run()
    assert any("did not arrive whole" in line for line in said)
    assert "PushMessages" not in recorder.calls


def test_a_lost_connection_is_made_again(tmp_path):
    node, recorder, said = node_with(
        tmp_path, to_record(encode(Propose("job-1", "{}", "f"))), StubbedLender()
    )
    attempts = iter([httpx.ConnectError("refused"), httpx.ReadError("reset")])

    def client():
        error = next(attempts, None)
        if error is not None:
            raise error
        return recorder

    node._client = client
    node.run()
    assert any("away" in line for line in said)
    assert "PushMessages" in recorder.calls


def test_a_stopped_node_returns_while_the_coordinator_is_away(tmp_path):
    node, _, _ = node_with(tmp_path, to_record(b"x"), StubbedLender())

    def client():
        raise httpx.ConnectError("refused")

    node._client = client
    thread = threading.Thread(target=node.run)
    thread.start()
    node.stop()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(("minutes", "side"), [(60, "ahead of"), (-60, "behind")])
def test_a_clock_an_hour_off_is_named_with_its_mend(minutes, side):
    there = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=minutes)
    with pytest.raises(LinkError, match=f"60 minutes {side}") as error:
        check_clock(email.utils.format_datetime(there, usegmt=True))
    assert "NTP" in str(error.value)


@pytest.mark.parametrize("seconds", [-200, 0, 200])
def test_clocks_that_agree_are_not_complained_of(seconds):
    there = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)
    check_clock(email.utils.format_datetime(there, usegmt=True))
    check_clock(None)


def test_the_app_answers_every_kind_of_question():
    from fedfin.update import AskHistogram, Finish, Train
    from fedfin.wire import MESSAGE_TYPES

    app = make_app(StubbedLender())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    weights = np.zeros(2, dtype=np.float32)
    for question in (
        Propose("job-1", "{}", "f"),
        AskHistogram("job-1"),
        Train("job-1", 1, "{}", "f", weights),
        Finish("job-1", "completed", 1, "{}", "f", weights),
    ):
        message = FlowerMessage(
            to_record(encode(question)), dst_node_id=5, message_type=MESSAGE_TYPES[type(question)]
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        assert decode(from_record(app(message, None).content), Accepted).weight == 50.0

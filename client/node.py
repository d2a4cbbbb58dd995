"""The lender's node: Flower's Fleet client, our loop.

Flower's own SuperNode runs whatever bundle arrives, polls every three seconds, and ends when its coordinator
restarts. This loop speaks the same protocol through Flower's Fleet client, runs only the installed ClientApp,
polls every 0.2 s in a job and every second when idle, and reconnects for as long as it runs. Private parts of
flwr 1.41 used here are held to a contract by tests/test_node.py.
"""

import contextlib
import datetime as dt
import email.utils
import json
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedfin.errors import LinkError
from fedfin.files import write_public
from fedfin.wire import pull_soon

__all__ = ["Node", "check_clock"]

_POLL_JOB_S: Final = 0.2
_POLL_IDLE_S: Final = 1.0
_JOB_LINGERS_S: Final = 30.0  # a question within this time means that a job is going on
_HEARTBEAT_S: Final = (
    10.0  # the shortest that Flower allows: a killed lender counts as offline after twice this
)
_HEARTBEAT_EVERY_S: Final = 4.0
_RECONNECT_S: Final = (0.2, 0.5, 1.0, 2.0, 3.0)
_CLOCK_TOLERANCE_S: Final = 240.0  # Flower refuses signatures older than about 305 s
_LOST: Final = (httpx.HTTPError, ConnectionError, ssl.SSLError, OSError)


class Node:
    """One lender's connection; `run` returns only when told to stop, or when going on makes no sense."""

    def __init__(
        self,
        address: str,
        root_path: Path,
        certificate: tuple[Path, Path],
        key: ec.EllipticCurvePrivateKey,
        app: ClientApp,
        *,
        state_path: Path,
        say: Callable[[str], None],
        idle: Callable[[], None],
    ) -> None:
        """Prepare a connection.

        Args:
            address: host:port of the coordinator.
            root_path: The federation's root certificate, the only one that is trusted.
            certificate: Files of this lender's certificate and its key, which it shows to the coordinator.
            key: The node key under which the lender is enrolled.
            app: The installed ClientApp.
            state_path: A file for the node's last number, so that a restarted node can take its own place.
            say: Told in words what happens.
            idle: Called after each answered question, when the answer has left.
        """
        self._address = address
        self._root = root_path.read_bytes()
        self._certificate = certificate
        self._key = key
        self._app = app
        self._state_path = state_path
        self._say = say
        self._idle = idle
        self._stop = threading.Event()
        self._unknown_since: float | None = None

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stop.set()

    def run(self) -> None:
        """Serve the coordinator until stopped; lost connections are made again.

        Raises:
            LinkError: The coordinator does not know this lender, shows a certificate of another authority, or
                the clocks are too far apart: trying again would not help.
        """
        attempt = 0
        while not self._stop.is_set():
            try:
                with self._client() as client:
                    node_id = self._activate(client)
                    self._say(f"connected to {self._address}")
                    attempt, self._unknown_since = 0, None
                    self._serve(client, FlowerNode(node_id=node_id))
            except _LOST as error:
                self._refuse_hopeless(error)
                if attempt == 0 and isinstance(error, httpx.HTTPStatusError):
                    status = error.response.status_code
                    self._say(
                        f"the coordinator does not take this lender yet (status {status}); trying again"
                    )
                elif attempt == 0:
                    self._say(f"the coordinator at {self._address} is away; trying again until it is back")
                self._stop.wait(_RECONNECT_S[min(attempt, len(_RECONNECT_S) - 1)])
                attempt += 1

    def _client(self) -> FleetHttpClient:
        # Flower's own way of building it takes no certificate of the client's.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self._root.decode("ascii"))
        context.load_cert_chain(
            *self._certificate
        )  # read again at each connection: it is renewed every few weeks
        return FleetHttpClient(
            f"https://{self._address}",
            verify=context,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self._key, self._key.public_key()),
            ],
        )

    def _activate(self, client: FleetHttpClient) -> int:
        if (last := self._last_node_id()) is not None:
            # A node that was killed still counts as online, and Flower would refuse it for twenty seconds.
            with contextlib.suppress(httpx.HTTPStatusError):  # the SuperLink is new, or had noticed by itself
                client.DeactivateNode(DeactivateNodeRequest(node_id=last))
        response = client.ActivateNode(
            ActivateNodeRequest(
                public_key=public_key_to_bytes(self._key.public_key()), heartbeat_interval=_HEARTBEAT_S
            )
        )
        write_public(self._state_path, json.dumps({"node_id": response.node_id}).encode(), mode=0o600)
        return response.node_id

    def _last_node_id(self) -> int | None:
        try:
            return int(json.loads(self._state_path.read_text())["node_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _serve(self, client: FleetHttpClient, node: FlowerNode) -> None:
        heartbeat = _Heartbeat(client, node)
        heartbeat.start()
        asked_at = -_JOB_LINGERS_S
        try:
            while not self._stop.is_set():
                heartbeat.raise_if_lost()
                response = client.PullMessages(PullMessagesRequest(node=node))
                if response.messages_list:
                    try:
                        stub = message_from_proto(response.messages_list[0])
                        self._handle(client, node, stub, response.message_object_trees[0])
                    except (LinkError, *_LOST):
                        raise
                    except Exception as error:  # noqa: BLE001  (Flower inflates what came: it may raise anything)
                        # A question that did not arrive whole is lost, its round goes on without this lender.
                        self._say(f"a question did not arrive whole or its answer was not taken: {error!r}")
                    asked_at = time.monotonic()
                    self._idle()
                    continue
                in_job = time.monotonic() - asked_at < _JOB_LINGERS_S
                self._stop.wait(_POLL_JOB_S if in_job else _POLL_IDLE_S)
        finally:
            heartbeat.stop()
            if self._stop.is_set():
                with contextlib.suppress(*_LOST):  # it will notice by the missing heartbeats
                    client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    def _handle(
        self, client: FleetHttpClient, node: FlowerNode, stub: FlowerMessage, tree: ObjectTree
    ) -> None:
        run_id, started = stub.metadata.run_id, time.monotonic()
        contents = pull_soon(
            [entry.object_id for entry in iterate_object_tree(tree)],
            make_pull_object_fn_protobuf(client.PullObject, node, run_id),
        )
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id)(
            stub.metadata.message_id
        )
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, FlowerMessage)  # noqa: S101  (the tree's root is the message)
        message.metadata.__dict__["_message_id"] = tree.object_id
        context = Context(
            run_id=run_id, node_id=node.node_id, node_config={}, state=RecordDict(), run_config={}
        )
        try:
            reply = self._app(message, context)
        except Exception as error:  # noqa: BLE001  (whatever it is, the coordinator must learn that there is no answer)
            self._say(f"a question could not be answered: {type(error).__name__}: {error}")
            reply = FlowerMessage(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "see the lender's log"), reply_to=message
            )
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            reply_tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            pushed = client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(bare)],
                    message_object_trees=[reply_tree],
                    clientapp_runtime_list=[time.monotonic() - started],
                )
            )
            push_objects(
                objects,
                push_object_fn=make_push_object_fn_protobuf(
                    client.PushObject, node, run_id, pushed.session_id
                ),
                object_ids_to_push=set(pushed.objects_to_push),
            )

    def _refuse_hopeless(self, error: Exception) -> None:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            if "Hostname mismatch" in text or "IP address mismatch" in text:
                why = f"is for another host name than {self._address}: use the one of federation.yaml"
            elif "expired" in text:
                why = "has expired: its operator must renew it"
            else:
                why = (
                    "was not signed by this federation's authority (ca.pem): it is another federation, or somebody is"
                    " in between; check coordinator in bank.yaml before going on"
                )
            msg = f"the certificate of the server at {self._address} {why}"
            raise LinkError(msg) from error
        if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code not in {401, 404, 412}:
            self._unknown_since = None
            return
        check_clock(error.response.headers.get("date"))
        # A SuperLink takes a moment to notice that a killed node is gone: only a lasting refusal is hopeless.
        self._unknown_since = self._unknown_since or time.monotonic()
        if time.monotonic() - self._unknown_since > 2.5 * _HEARTBEAT_S:
            msg = (
                f"the coordinator at {self._address} does not accept this lender's node key (status"
                f" {error.response.status_code}): it is not enrolled there, or another process runs with the same keys;"
                " join with a new token, or stop the other process"
            )
            raise LinkError(msg) from error


class _Heartbeat:
    """Tells the SuperLink that the node is alive, also while it trains."""

    def __init__(self, client: FleetHttpClient, node: FlowerNode) -> None:
        self._client = client
        self._request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=_HEARTBEAT_S)
        self._stop = threading.Event()
        self._lost: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        while not self._stop.wait(_HEARTBEAT_EVERY_S):
            try:
                if not self._client.SendNodeHeartbeat(self._request).success:
                    self._lost = ConnectionError("the SuperLink does not know the node any more")
                    return
            except _LOST as error:
                self._lost = error
                return


def check_clock(date_header: str | None) -> None:
    """Compare this machine's clock with the coordinator's.

    Args:
        date_header: The Date header of an answer of the coordinator, RFC 9110; None is not checked.

    Raises:
        LinkError: They differ by more than Flower's signatures allow; says by how much.
    """
    if date_header is None:
        return
    there = email.utils.parsedate_to_datetime(date_header)
    offset = (dt.datetime.now(dt.UTC) - there).total_seconds()
    if abs(offset) > _CLOCK_TOLERANCE_S:
        side = "ahead of" if offset > 0 else "behind"
        msg = (
            f"this machine's clock is {abs(offset) / 60:.0f} minutes {side} the coordinator's; signatures of more than"
            " five minutes' difference are refused: set both clocks by NTP, then start again"
        )
        raise LinkError(msg)

"""The two doors of the SuperLink's process, and the parts of flwr 1.41 that we hold it to."""

import asyncio
import importlib.metadata
import inspect

import flwr.common.constant as flower_constants
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from federation import SCHEMA
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import TaskType
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.grid import HttpGrid, http_grid
from flwr.superlink.main import create_app

from fedfin.errors import LinkError
from fedfin.identity import public_pem
from fedfin.server import link
from fedfin.server.founding import found
from fedfin.server.roster import Member

SECRET = "s" * 64


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    federation = found(
        tmp_path_factory.mktemp("link") / "fed",
        name="test",
        address="127.0.0.1:9443",
        schema_text=SCHEMA.read_text(),
        job={},
    )
    return create_app(link._superlink_config(federation), SuperLinkLifespan)


@pytest.fixture
def state(superlink):
    return superlink.state.linkstate_factory.state()


def ask(app, method, path, **options):
    async def exchange():
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="https://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(exchange())


async def enrolment(scope, receive, send):
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"enrolment"})


def test_this_is_the_flower_that_the_contract_is_with():
    assert importlib.metadata.version("flwr") == "1.41.0"


@pytest.mark.parametrize("path", ["/v1/enrol", "/v1/enrol/root"])
def test_enrolment_is_ours_and_never_reaches_flower(superlink, path):
    assert ask(link.FleetOnly(superlink, enrolment, lambda *_: True), "GET", path).status_code == 299


def test_the_fleet_api_is_passed_on_and_wants_a_signature(superlink):
    body = ActivateNodeRequest(public_key=b"x", heartbeat_interval=10).SerializeToString()
    headers = {"content-type": "application/x-protobuf", "accept": "application/x-protobuf"}
    answer = ask(
        link.FleetOnly(superlink, enrolment, lambda *_: True),
        "POST",
        "/v1/fleet/activate-node",
        content=body,
        headers=headers,
    )
    assert answer.status_code in {401, 415, 426}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/get-nodes",
        "/v1/fedfin/run",
        "/docs",
        "/v1/enrolx",
        "/v1/fleetx",
        "/healthz",
    ],
)
def test_the_public_door_knows_nothing_else(superlink, path):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(link.FleetOnly(superlink, enrolment, lambda *_: True), method, path).status_code == 404


def test_a_stranger_is_turned_away_before_its_body_is_read(superlink):
    """Flower reads a whole body before it checks the signature; four hundred megabytes would be kept for nobody."""
    reads = 0

    def body():
        nonlocal reads
        for _ in range(100):
            reads += 1
            yield b"x" * 1000

    async def stream():
        for part in body():
            yield part

    door = link.FleetOnly(superlink, enrolment, lambda *_: False)
    answer = ask(door, "POST", "/v1/fleet/push-object", content=stream())
    assert answer.status_code == 401


def test_a_body_beyond_the_bound_is_refused_by_its_length_and_cut_when_it_hid_it(superlink, monkeypatch):
    monkeypatch.setattr(link, "MAX_BODY", 10_000)
    seen = 0

    async def counting(scope, receive, send):
        nonlocal seen
        while True:
            part = await receive()
            seen += len(part.get("body", b""))
            if part["type"] == "http.disconnect" or not part.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def endless():
        for _ in range(1000):
            yield b"x" * 1000

    door = link.FleetOnly(counting, enrolment, lambda *_: True)
    assert ask(door, "POST", "/v1/fleet/push-object", content=b"x" * 20_000).status_code == 413
    assert seen == 0
    ask(door, "POST", "/v1/fleet/push-object", content=endless())
    assert seen <= 10_000


def test_flower_itself_would_have_answered_there(superlink):
    """If this fails, the door guards nothing any more and the test above proves nothing."""
    assert ask(superlink, "GET", "/docs").status_code == 200


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", f"Bearer {SECRET}x", SECRET])
def test_a_run_is_started_for_the_secret_only(superlink, authorization):
    door = link.RuntimeOnly(superlink, lambda: (1, "token"), SECRET)
    headers = {} if authorization is None else {"authorization": authorization}
    assert ask(door, "POST", "/v1/fedfin/run", headers=headers).status_code == 404
    right = ask(door, "POST", "/v1/fedfin/run", headers={"authorization": f"Bearer {SECRET}"})
    assert right.json() == {"run_id": 1, "token": "token"}


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/list-nodes", "/v1/fleet/pull-messages", "/docs"]
)
def test_the_inner_door_passes_the_runtime_api_only(superlink, path):
    assert ask(link.RuntimeOnly(superlink, lambda: (1, ""), SECRET), "POST", path).status_code == 404


def test_a_started_run_gives_a_token_for_our_server_app_and_nobody_else_can_claim_it(state):
    run_id, token = link._start_run(state)
    assert run_id != 0
    assert len(token) >= 32
    (task,) = [
        task for task in state.get_tasks() if task.run_id == run_id and task.type == TaskType.SERVER_APP
    ]
    assert state.claim_task(task.task_id) is None


def test_a_member_becomes_a_node_once_and_is_found_by_its_key(state):
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    member = Member("north-bank", public_pem(key), "", "", "", "")
    link._register(state, member)
    node = state.get_node_id_by_public_key(public_key_to_bytes(key))
    link._register(state, member)
    assert node is not None
    assert state.get_node_id_by_public_key(public_key_to_bytes(key)) == node


def test_what_else_is_private_in_flower_is_still_there():
    assert "public_key" in [field.name for field in NodeInfo.DESCRIPTOR.fields]
    assert flower_constants.HEARTBEAT_MIN_INTERVAL <= 10
    assert flower_constants.HEARTBEAT_PATIENCE == 2
    assert isinstance(HttpGrid._runtime_client, property)
    assert callable(HttpGrid.get_nodes)
    # server/app replaces this name, so that a lender that dies while sending holds nobody up for two hours
    assert "pull_objects(" in inspect.getsource(HttpGrid.pull_messages)
    assert http_grid.pull_objects.__module__ == "flwr.supercore.inflatable.inflatable_utils"


def test_a_taken_port_is_named_with_its_mend():
    with link.open_socket("127.0.0.1", 0) as holder, pytest.raises(LinkError, match="change address"):
        link.open_socket("127.0.0.1", holder.getsockname()[1])

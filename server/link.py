"""Flower's SuperLink, in a process of its own, behind two listeners of ours.

The public TLS listener passes `/v1/fleet/*`, `/health` and our `/v1/enrol*`, nothing else: with the stock port
anyone who holds the root certificate could list nodes, take the ServerApp's token and start a run of own code
on the lenders' machines (measured). The inner listener is on loopback, on a port of the kernel's choice, and
passes the Runtime API (which wants a task's token) and our `/v1/fedfin/run`, which wants this start's secret.

The process reads one JSON line on standard input (configuration path and secret), writes one on standard output
when it is ready, and ends when standard input closes, so that it never outlives its supervisor.

Private parts of flwr 1.41 used here are held to a contract by tests/test_link.py.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

import uvicorn
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TRANSPORT_TYPE_GRPC_RERE
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLWR_IN_MEMORY_DB_NAME, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.servicer.control import control_handlers

from fedfin.audit.events import Enrolment
from fedfin.errors import FedfinError, LinkError
from fedfin.server.admission import MemberKeys, log_rotation
from fedfin.server.enrolment import EnrolmentDesk, enrolment_app
from fedfin.server.founding import Federation, open_federation
from fedfin.server.mutual_tls import CERTIFICATE, ShownCertificate
from fedfin.server.renewal import RenewalDesk, Rotated
from fedfin.server.roster import Member
from fedfin.server.roster_signing import RosterBook
from fedfin.server.server_certificate import serve_renewed
from fedfin.wire import THIN_BUNDLE_NAME, plain_log

__all__ = ["MAX_BODY", "FleetOnly", "RuntimeOnly", "main", "open_socket"]

MAX_BODY: Final = 128 * 1024 * 1024
"""Bytes of one request of a lender: a model of thirty million parameters."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_GRACE_S: Final = 2  # Flower's keep-alives would hold SIGTERM for 15 s and more
_HEARTBEAT_S: Final = 30.0

_BUNDLE: Final = f"""
[project]
name = "{THIN_BUNDLE_NAME}"
version = "1.0.0"
description = "A run needs a bundle; this one carries no code, and lenders never fetch it."
license = {{ text = "Apache-2.0" }}
dependencies = []

[tool.flwr.app]
publisher = "fedfin"

[tool.flwr.app.components]
serverapp = "fedfin.server.app:app"
clientapp = "fedfin.client.app:app"

[tool.flwr.app.config]
""".encode()


class FleetOnly:
    """The public door: Flower's Fleet API, its health, and our enrolment; all else is 404, unseen by Flower."""

    def __init__(self, superlink: App, enrolment: App, knows: Callable[[bytes, bytes], bool]) -> None:
        """Prepare the door.

        Args:
            superlink: Flower's.
            enrolment: Ours.
            knows: Tells whether a node key, as Flower's header carries it, and a certificate, DER or nothing, are one
                member's.
        """
        self._superlink = superlink
        self._enrolment = enrolment
        self._knows = knows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass or refuse one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._superlink(scope, receive, send)
        elif scope["type"] != "http":
            await _refuse_scope(send)
        elif scope["path"] == "/health":
            await self._superlink(scope, receive, send)
        elif _path_is(scope, "/v1/fleet/"):
            # Flower reads a whole body before it looks at the signature: strangers are turned away unread.
            headers = dict(scope["headers"])
            key = headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b"")
            if not self._knows(key, scope.get(CERTIFICATE, b"")):
                await _json(send, 401, {"error": "this node key and certificate are not enrolled here"})
            elif _length(headers) > MAX_BODY:
                await _json(send, 413, {"error": f"a message may hold {MAX_BODY} bytes"})
            else:
                await self._superlink(scope, _bounded(receive), send)
        elif scope["path"] == "/v1/enrol" or _path_is(scope, "/v1/enrol/"):
            await self._enrolment(scope, receive, send)
        else:
            await _not_found(send)


class RuntimeOnly:
    """The inner door on loopback: Flower's Runtime API, and `/v1/fedfin/run` for who knows the secret."""

    def __init__(self, superlink: App, start_run: Callable[[], tuple[int, str]], secret: str) -> None:
        self._superlink = superlink
        self._start_run = start_run
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass or refuse one ASGI scope."""
        if scope["type"] != "http":
            await _refuse_scope(send)
        elif _path_is(scope, "/v1/runtime/"):
            await self._superlink(scope, receive, send)
        elif scope["path"] == "/v1/fedfin/run" and scope["method"] == "POST":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._secret}".encode()):
                await _not_found(send)
                return
            run_id, token = await asyncio.to_thread(self._start_run)
            await _json(send, 200, {"run_id": run_id, "token": token})
        else:
            await _not_found(send)


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a listening socket.

    Raises:
        LinkError: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        msg = (
            f"{host}:{port} cannot be listened on ({error.strerror}); stop the program that holds the port (another"
            " `fedfin server`?), or change address in federation.yaml, and coordinator in each lender's bank.yaml"
        )
        raise LinkError(msg) from error
    return listener


def main() -> None:
    """Run the SuperLink until standard input closes; the supervisor's way of starting this process."""
    plain_log()
    order = json.loads(sys.stdin.readline())
    try:
        asyncio.run(_serve(open_federation(Path(order["config"])), order["secret"]))
    except FedfinError as error:
        _say({"error": str(error)})
        sys.exit(1)


async def _serve(federation: Federation, secret: str) -> None:
    config = federation.config
    public_socket = open_socket(config.listen, config.port)
    inner_socket = open_socket("127.0.0.1", 0)
    superlink = create_app(_superlink_config(federation), SuperLinkLifespan)
    state: LinkState = superlink.state.linkstate_factory.state()
    for member in federation.store.members():
        _register(state, member)
    log = federation.log()
    members = MemberKeys(federation.store, _node_key)

    def enrolled(member: Member) -> None:
        """Log who joined, then let its node in; without the entry it gets no answer, and its next try is logged."""
        log.append(
            Enrolment(
                member=member.name,
                federation=config.federation,
                identity=hashlib.sha256(member.identity_key.encode()).hexdigest(),
                witness=hashlib.sha256(member.witness_key.encode()).hexdigest(),
                root=federation.authority().fingerprint,
            )
        )
        _register(state, member)
        members.forget()

    def rotated(what: Rotated) -> None:
        _register(state, what.after)
        members.forget()

    authority, identity = federation.authority(), federation.identity()
    desk = EnrolmentDesk(
        federation.store,
        authority,
        statement=identity.statement,
        schema_text=federation.schema_text,
        on_member=enrolled,
    )
    book = RosterBook(federation.store, identity)
    renewal = RenewalDesk(
        federation.store,
        authority,
        book,
        config.federation,
        rotated,
        log=lambda what: log_rotation(log, what),
    )
    public = uvicorn.Server(
        uvicorn.Config(
            FleetOnly(
                superlink,
                enrolment_app(desk, renewal),
                lambda header, shown: _is_member(members, header, shown),
            ),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=75,
            limit_concurrency=1000,
            ssl_certfile=str(federation.server_certificate_path),
            ssl_keyfile=str(federation.server_key_path),
            ssl_ca_certs=str(federation.root_path),
            ssl_cert_reqs=ssl.CERT_OPTIONAL,  # who enrols has none yet; the door insists where it must
            http=ShownCertificate,
            server_header=False,
            lifespan="on",
            ws="none",
        )
    )
    inner = uvicorn.Server(
        uvicorn.Config(
            RuntimeOnly(superlink, lambda: _start_run(state), secret),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
            server_header=False,
            lifespan="off",
            ws="none",
        )
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_when_stdin_closes, args=(loop, stop), daemon=True).start()
    tasks = [
        asyncio.create_task(public.serve(sockets=[public_socket])),
        asyncio.create_task(inner.serve(sockets=[inner_socket])),
    ]
    while not (public.started and inner.started):
        if any(task.done() for task in tasks):
            msg = "the SuperLink did not start; look into link.log beside federation.yaml"
            raise LinkError(msg)
        await asyncio.sleep(0.02)
    assert public.config.ssl is not None  # noqa: S101  (it was given a certificate)
    certificate = (
        federation.server_certificate_path,
        federation.server_key_path,
        federation.authority,
        config.address,
    )
    threading.Thread(target=serve_renewed, args=(public.config.ssl, *certificate), daemon=True).start()
    _say({"inner": f"127.0.0.1:{inner_socket.getsockname()[1]}", "pid": os.getpid()})
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    public.should_exit = inner.should_exit = True
    await asyncio.gather(*tasks)
    log.close()


def _superlink_config(federation: Federation) -> SuperLinkLifespanConfig:
    certificates = (
        federation.root_path.read_bytes(),
        federation.server_certificate_path.read_bytes(),
        federation.server_key_path.read_bytes(),
    )
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=federation.config.port,
        insecure=False,
        certificates=certificates,
        superexec_auth_secret=os.urandom(32),  # nobody is told: AcquireTask is closed to all
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(federation.root_path),
        ssl_certfile=str(federation.server_certificate_path),
        ssl_keyfile=str(federation.server_key_path),
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )


def _node_key(member: Member) -> bytes:
    return public_key_to_bytes(load_pem_public_key(member.node_key.encode()))  # type: ignore[arg-type]  # EC, checked at enrolment


def _register(state: LinkState, member: Member) -> None:
    key = _node_key(member)
    if state.get_node_id_by_public_key(key) is None:
        state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, _HEARTBEAT_S)


def _start_run(state: LinkState) -> tuple[int, str]:
    """Start a run with the bundle that carries no code, and claim its task for our ServerApp."""
    bundle, _ = build_fab_from_files({"pyproject.toml": _BUNDLE})
    account = AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)
    request = StartRunRequest(fab=fab_to_proto(Fab("", bundle, {})))
    run_id = control_handlers.start_run(request, account, state, None).run_id
    for task in state.get_tasks():
        if task.run_id == run_id and task.type == TaskType.SERVER_APP:
            token = state.claim_task(task.task_id)
            if token is not None:
                return run_id, token
    msg = "Flower made no task for the run; look into link.log beside federation.yaml"
    raise LinkError(msg)


def _when_stdin_closes(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.read()
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)


def _is_member(members: MemberKeys, header: bytes, certificate: bytes) -> bool:
    try:
        key = base64.b64decode(header, validate=True)
    except ValueError:
        return False
    return members.knows(key, certificate)


def _length(headers: Mapping[bytes, bytes]) -> int:
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:
        return MAX_BODY + 1


def _bounded(receive: Receive) -> Receive:
    """Cut a body that grows beyond the bound without having said so."""
    seen = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal seen
        part = await receive()
        seen += len(part.get("body", b""))
        return {"type": "http.disconnect"} if seen > MAX_BODY else part

    return bounded


def _path_is(scope: Scope, prefix: str) -> bool:
    # No dot segments and no encoded slashes: Flower must see the path that was checked.
    raw = scope.get("raw_path", b"")
    return bool(scope["path"].startswith(prefix)) and b"%" not in raw and "/." not in scope["path"]


async def _refuse_scope(send: Send) -> None:
    await send({"type": "websocket.close", "code": 1008})


async def _not_found(send: Send) -> None:
    await _json(send, 404, {"error": "there is nothing here"})


async def _json(send: Send, status: int, body: dict[str, object]) -> None:
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

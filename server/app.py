"""The ServerApp's process: Flower's Grid on one side, the job's loop on the other.

It is started by the supervisor, takes a run from the SuperLink through the inner listener, runs the job and
prints one JSON line an event. Its poll is 0.1 s where Flower's own is 3 s. Private parts of flwr 1.41 used here
are held to a contract by tests/test_link.py.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, http_grid

from fedfin.credit.binning import Bins
from fedfin.credit.export import ReleasedModel, save_model
from fedfin.credit.schema import Schema
from fedfin.errors import FedfinError, LinkError
from fedfin.server.exchange import Answers
from fedfin.server.founding import Federation, open_federation
from fedfin.server.jobs import choose_job
from fedfin.server.journal import Journal
from fedfin.server.recording import Recorder
from fedfin.server.registry import RunDirectory
from fedfin.server.roster import Checkpoint, FederationStore, Job
from fedfin.server.rounds import run_job
from fedfin.server.sealing import seal_finished
from fedfin.server.transcripts import Transcripts
from fedfin.server.witnessing import WitnessedExchange
from fedfin.update import Message, Refused, decode, encode
from fedfin.wire import MESSAGE_TYPES, from_record, plain_log, pull_soon, to_record

__all__ = ["EXIT_LINK_LOST", "GridExchange", "main"]

EXIT_LINK_LOST: Final = 75
"""Exit status that asks the supervisor to start the process again (the SuperLink went away)."""

_POLL_S: Final = 0.1
_ONLINE_FRESH_S: Final = 0.3
_GRACE_S: Final = 5.0  # once enough have answered: a lender that was killed holds nobody up


_OF_THE_LOG: Final = frozenset({"exchange", "job_failed", "job_stopped"})
"""Too many for people, or said to them in another way."""


class GridExchange:
    """The way to the lenders over Flower's Grid; failures are put down to the lender they belong to."""

    def __init__(self, grid: Grid, store: FederationStore) -> None:
        self._grid = grid
        self._store = store
        self._names: dict[int, str] = {}
        self._online: frozenset[str] = frozenset()
        self._asked_at = 0.0
        self._one_by_one = False

    def online(self) -> frozenset[str]:
        """Return the names of the enrolled lenders whose node is online."""
        if time.monotonic() - self._asked_at > _ONLINE_FRESH_S:
            # HttpGrid's get_nodes; the Grid's public get_node_ids would lose the keys that name the lenders.
            nodes = list(self._grid.get_nodes())
            by_key = {_key_bytes(member.node_key): member.name for member in self._store.members()}
            self._names = {
                node.node_id: by_key[node.public_key] for node in nodes if node.public_key in by_key
            }
            self._online = frozenset(self._names.values())
            self._asked_at = time.monotonic()
        return self._online

    def ask(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        *,
        deadline_s: float,
        on_reply: Callable[[str], None] | None = None,
        fold: Callable[[str, Message], None] | None = None,
        enough: int | None = None,
    ) -> Answers:
        """Send each lender its request; return when all have answered, or at the deadline (`Exchange.ask`)."""
        started = time.monotonic()
        end = started + deadline_s
        node_of = {name: node for node, name in self._names.items()}
        taker = _Taker(requests, expected, fold, on_reply)
        failures = taker.answers.failures
        names = [name for name in requests if name in node_of]
        message_ids = self._grid.push_messages(
            _flower_messages({node_of[name]: requests[name] for name in names}, deadline_s)
        )
        waiting = {key: name for key, name in zip(message_ids, names, strict=True) if key}
        failures |= {
            name: "its node went offline before the question reached it"
            for name, message_id in zip(names, message_ids, strict=True)
            if not message_id
        }
        while waiting and time.monotonic() < end:
            for reply in self._pull(waiting, taker.answers):
                taker.take(waiting.pop(reply.metadata.reply_to_message_id), reply)
            if waiting:
                time.sleep(_POLL_S)
            if enough is not None and taker.num_good >= enough:
                end, enough = min(end, time.monotonic() + _GRACE_S), None
        waited_s = min(deadline_s, time.monotonic() - started)
        failures |= dict.fromkeys(waiting.values(), f"no answer within {waited_s:.3g} s")
        for name in set(requests) - set(names):
            failures[name] = "its node is offline"
        return taker.answers

    def _pull(self, waiting: dict[str, str], answers: Answers) -> list[FlowerMessage]:
        """Return the replies that are there; one that is no message is put down to the lender that sent it."""
        if not self._one_by_one:
            try:
                return list(self._grid.pull_messages(list(waiting)))
            except (httpx.HTTPError, ConnectionError):
                raise
            except Exception:  # noqa: BLE001  (Flower inflates what a lender sent: it may raise anything)
                self._one_by_one = True  # from now on the culprit is found, and holds up nobody else's reply
        replies: list[FlowerMessage] = []
        for message_id, name in list(waiting.items()):
            try:
                replies += self._grid.pull_messages([message_id])
            except (httpx.HTTPError, ConnectionError):
                raise
            except Exception:  # noqa: BLE001  (as above)
                del waiting[message_id]
                answers.failures[name] = "it sent a reply that is no message of Flower's"
        return replies


class _Taker:
    """Takes replies to one set of questions: each is handed over, kept, or put down to its lender as a failure."""

    def __init__(
        self,
        requests: Mapping[str, Message],
        expected: type[Message],
        fold: Callable[[str, Message], None] | None,
        on_reply: Callable[[str], None] | None,
    ) -> None:
        self._requests = requests
        self._expected = expected
        self._fold = fold
        self._on_reply = on_reply
        self.answers = Answers(replies={}, failures={})
        self.num_good = 0

    def take(self, name: str, reply: FlowerMessage) -> None:
        if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            self.answers.failures[name] = "its node went away before it answered"
        elif reply.has_error():
            self.answers.failures[name] = (
                f"its node stopped or failed (Flower error {reply.error.code}); its own output says why"
            )
        else:
            try:
                self._take(name, decode(from_record(reply.content), self._expected, Refused))
            except FedfinError as error:
                self.answers.failures[name] = str(error)
        if self._on_reply is not None:
            self._on_reply(name)

    def _take(self, name: str, message: Message) -> None:
        if message.job_id != self._requests[name].job_id:
            msg = "it answered for another job"
            raise LinkError(msg)
        if isinstance(message, self._expected):
            if self._fold is not None:
                self._fold(name, message)
            self.num_good += 1
        if self._fold is None or not isinstance(message, self._expected):
            self.answers.replies[name] = message


def _flower_messages(requests: Mapping[int, Message], deadline_s: float) -> list[FlowerMessage]:
    """Return the messages to these nodes."""
    packed: dict[int, bytes] = {}
    return [
        FlowerMessage(
            # One encoding for all lenders: Flower stores equal content once.
            content=to_record(packed.setdefault(id(request), encode(request))),
            dst_node_id=node,
            message_type=MESSAGE_TYPES[type(request)],
            ttl=deadline_s + 60,
        )
        for node, request in requests.items()
    ]


app = ServerApp()


@app.main()
def run(grid: Grid, context: Context) -> None:
    """Run the job of the federation whose configuration the supervisor named."""
    order = _Order.current
    if order is None:
        msg = "this ServerApp is started by `fedfin server`, never by a bundle"
        raise LinkError(msg)
    federation = open_federation(Path(order["config"]))
    del context  # Flower's run configuration is empty: the plan is ours
    _run_federation(GridExchange(grid, federation.store), federation, new_job=bool(order["new_job"]))


def main() -> None:
    """Take a run from the SuperLink and execute the ServerApp; the supervisor's way of starting this process."""
    plain_log()
    order = json.loads(sys.stdin.readline())
    _Order.current = order
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    try:
        _execute(order)
    except FedfinError as error:
        _say({"event": "failed", "reason": str(error)})
        sys.exit(1)
    except (httpx.HTTPError, ConnectionError, KeyboardInterrupt, RuntimeError) as error:
        # Flower raises SIGINT when the SuperLink forgets our task, and RuntimeError on a broken pull.
        traceback.print_exc()  # into serverapp.log
        _say({"event": "link_lost", "reason": type(error).__name__})
        sys.exit(EXIT_LINK_LOST)


class _Order:
    """What the supervisor asked for; a ServerApp takes no arguments, so it stands here."""

    current: dict[str, Any] | None = None


def _execute(order: dict[str, Any]) -> None:
    inner = order["inner"]
    granted = httpx.post(
        f"http://{inner}/v1/fedfin/run", headers={"authorization": f"Bearer {order['secret']}"}, timeout=30
    )
    granted.raise_for_status()
    # HttpGrid takes no setting for this: its module's own name is replaced.
    http_grid.__dict__["pull_objects"] = pull_soon
    grid = HttpGrid(runtime_api_address=inner, insecure=True, token=granted.json()["token"])
    client = grid._runtime_client  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  as flwr's own run_serverapp
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    status, details = "failed", ""
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        context, flower_run = context_from_proto(task.context), run_from_proto(task.run)
        grid.set_run(flower_run)
        # Flower's Message() reads these globals.
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = flower_run.run_id
        TaskIdentity.node_id = context.node_id
        app(grid=grid, context=context)
        status = "completed"
    finally:
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
            heartbeat.stop()
            grid.close()
        except (httpx.HTTPError, RuntimeError):
            pass  # the SuperLink is gone: there is nobody to tell


def _run_federation(exchange: GridExchange, federation: Federation, *, new_job: bool) -> None:
    plan = federation.config.job
    schema = Schema.from_yaml(
        federation.schema_text(), origin=str(federation.directory / federation.config.schema_path)
    )
    store = federation.store
    with federation.log() as log:
        journal, identity = Journal(log), federation.identity()

        def seal() -> None:
            for sealed in seal_finished(federation.runs_path, federation.root_path, store, identity, journal):
                _say({"event": "sealed", "job": sealed})

        recorder = Recorder(journal, hashlib.sha256(federation.config_path.read_bytes()).hexdigest())
        recorder.reconcile(store)
        seal()  # what was killed between a job's end and its seal

        def chosen(event: Mapping[str, Any]) -> None:
            if event["event"] == "abandoned":
                recorder.abandon(event["job"])
            _say(event)

        job = choose_job(store, plan, new_job=new_job, say=chosen)
        recorder.begin(job, plan, store.weights(job.job_id))
        _run_logged(exchange, federation, job, schema, journal, recorder)
        seal()
        _say({"event": "completed", "job": job.job_id, "run": str(federation.runs_path / job.job_id)})


def _run_logged(
    exchange: GridExchange,
    federation: Federation,
    job: Job,
    schema: Schema,
    journal: Journal,
    recorder: Recorder,
) -> None:
    plan, store, identity = federation.config.job, federation.store, federation.identity()
    directory = RunDirectory(federation.runs_path / job.job_id)
    directory.begin(federation.config, job, schema, identity.statement.root)
    directory.catch_up(federation.store.said(job.job_id))

    def say(event: Mapping[str, Any]) -> None:
        recorder.take(event)
        directory.note(event)
        if event["event"] not in _OF_THE_LOG:
            _say(event)

    def release(final: Checkpoint) -> None:
        model = ReleasedModel(
            job_id=job.job_id,
            rounds=final.round,
            plan=job.plan,
            schema=schema,
            bins=Bins.from_json(final.bins),
            fingerprint=final.fingerprint,
            weights=final.weights,
        )
        save_model(model, directory.path / "model")
        directory.finish(model.digest)
        released = {"event": "released", "job": job.job_id, "model": model.digest, "run": str(directory.path)}
        recorder.take({**released, "rounds": final.round})
        _say(released)

    witnessed = WitnessedExchange(
        exchange, journal, members=store.members, statement=identity.statement, say=say
    )
    run_job(
        witnessed,
        store,
        job,
        plan,
        schema,
        identity=identity,
        release=release,
        judged=directory.judge,
        say=say,
        transcripts=Transcripts(directory.path) if federation.config.evidence.keep_transcripts else None,
    )
    recorder.take({"event": "completed"})


def _end(_signum: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal.SIGTERM)  # not 0: the job is not done


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def _key_bytes(pem: str) -> bytes:
    return public_key_to_bytes(load_pem_public_key(pem.encode()))  # type: ignore[arg-type]  # EC, checked at enrolment


def _say(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""`fedfin server`: starts the SuperLink and the ServerApp, starts them again when one dies, and stops both.

The SuperLink's state is in memory: when it dies, both start anew, and the job goes on from its checkpoint. Each
child ends when its standard input closes, so a supervisor that is killed leaves nothing running.
"""

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from fedfin.errors import LinkError
from fedfin.server.founding import Federation
from fedfin.server.jobs import check_runnable

__all__ = ["supervise"]

_LINK: Final = "fedfin.server.link"
_APP: Final = "fedfin.server.app"
_EXIT_LINK_LOST: Final = 75  # as in server/app, which cannot be imported here without importing Flower
_READY_S: Final = 90.0
_STOP_S: Final = 3.0
_MAX_DEATHS: Final = 5  # without a round done between them


def supervise(
    federation: Federation,
    *,
    new_job: bool,
    on_event: Callable[[Mapping[str, Any]], None],
    stop: threading.Event | None = None,
    enrol_only: bool = False,
) -> None:
    """Run the federation's job to its end, or only listen for lenders that join.

    Args:
        federation: The coordinator's folder.
        new_job: Abandon an unfinished job, or train a finished plan again.
        on_event: Told of every event, in this thread; events are mappings with `event`.
        enrol_only: Run no job; return when stopped.
        stop: When set, both processes are ended and the call returns; the job goes on at the next call.

    Raises:
        ConfigError: The job's plan cannot be run at all; nothing was started.
        LinkError: The SuperLink cannot start (port taken), keeps dying, or the job failed; says why.
        KeyboardInterrupt: Passed on after both processes have ended.
    """
    if not enrol_only:
        check_runnable(federation.config.job)
    pair = _Pair(federation, on_event)
    try:
        pair.run(new_job=new_job, stop=stop or threading.Event(), enrol_only=enrol_only)
    finally:
        pair.stop()


class _Child:
    """One process: JSON lines out, a log file for the rest, ended by closing its standard input."""

    def __init__(
        self,
        module: str,
        order: Mapping[str, Any],
        log_path: Path,
        events: "queue.Queue[tuple[str, dict[str, Any]]]",
    ) -> None:
        self.module = module
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    module,
                ],  # -P: nothing is imported from the folder it was started in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which ends them in order
                env=_environment(log_path.parent),
            )
        stdin = _pipe(self.process.stdin)
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
        self._reader = threading.Thread(
            target=self._read, args=(_pipe(self.process.stdout), events), daemon=True
        )
        self._reader.start()

    def status(self) -> int | None:
        """Return the exit status once the process has ended and all it said is in the queue."""
        if self.process.poll() is None:
            return None
        self._reader.join(_STOP_S)
        return self.process.returncode

    def close(self) -> None:
        with contextlib.suppress(OSError):
            _pipe(self.process.stdin).close()

    def end(self, until: float) -> None:
        self.close()
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self, stdout: IO[bytes], events: "queue.Queue[tuple[str, dict[str, Any]]]") -> None:
        for line in stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library's print; it is not ours
            if isinstance(event, dict):
                events.put((self.module, event))
        stdout.close()


class _Pair:
    """The SuperLink and the ServerApp."""

    def __init__(self, federation: Federation, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        self._federation = federation
        self._on_event = on_event
        self._events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._link: _Child | None = None
        self._app: _Child | None = None
        self._deaths = 0
        self._completed = False
        self._failure: str | None = None

    def run(self, *, new_job: bool, stop: threading.Event, enrol_only: bool) -> None:
        link, order = self._start_link(new_job=new_job)
        while enrol_only and not stop.wait(0.1):
            if (status := link.status()) is not None:
                self._count_death("the SuperLink")
                self._on_event({"event": "link_died", "status": status})
                link, order = self._start_link(new_job=new_job)
        if enrol_only:
            return
        app = self._start_app(order)
        while not stop.is_set():
            status, link_status = app.status(), link.status()  # before the queue: what they said comes first
            if not self._hear(order):
                if status == 0 and self._completed:
                    return
                if link_status is not None:
                    self._count_death("the SuperLink")
                    self._on_event({"event": "link_died", "status": link_status})
                    app.end(time.monotonic() + _STOP_S)
                    link, order = self._start_link(new_job=order["new_job"])
                    app = self._start_app(order)
                elif status is not None:
                    if self._failure is not None:
                        raise LinkError(self._failure)
                    if status != _EXIT_LINK_LOST or link.process.poll() is None:
                        self._count_death("the ServerApp")
                        self._on_event({"event": "app_died", "status": status})
                        app = self._start_app(order)

    def _hear(self, order: dict[str, Any]) -> bool:
        """Pass on one event; return False when there was none for a moment."""
        try:
            module, event = self._events.get(timeout=0.1)
        except queue.Empty:
            return False
        if module != _APP:
            return True
        match event.get("event"):
            case "failed":
                self._failure = str(event.get("reason"))
                return True
            case "completed":
                self._completed = True
            case "started" | "resumed":
                order["new_job"] = (
                    False  # the job exists: a restart goes on with it instead of starting another
                )
            case "round_done" | "bins":
                self._deaths = 0
            case _:
                pass
        self._on_event(event)
        return True

    def stop(self) -> None:
        until = time.monotonic() + _STOP_S
        children = [child for child in (self._app, self._link) if child is not None]
        for child in children:
            child.close()
        for child in children:
            child.end(until)

    def _start_link(self, *, new_job: bool) -> tuple[_Child, dict[str, Any]]:
        secret = secrets.token_hex(32)
        config = str(self._federation.config_path)
        log_path = self._federation.directory / "link.log"
        if self._link is not None:
            self._link.close()
        link = self._link = _Child(_LINK, {"config": config, "secret": secret}, log_path, self._events)
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            try:
                module, event = self._events.get(timeout=0.1)
            except queue.Empty:
                if link.process.poll() is not None and self._events.empty():
                    msg = f"the SuperLink ended while starting (status {link.process.returncode}); {log_path} says why"
                    raise LinkError(msg) from None
                continue
            if module != _LINK:
                continue  # a late line of a ServerApp that is gone
            if "error" in event:
                raise LinkError(str(event["error"]))
            self._on_event({"event": "listening", "address": self._federation.config.address})
            return link, {"config": config, "secret": secret, "inner": event["inner"], "new_job": new_job}
        msg = f"the SuperLink did not start within {_READY_S:g} s; {log_path} says why"
        raise LinkError(msg)

    def _start_app(self, order: Mapping[str, Any]) -> _Child:
        if self._app is not None:
            self._app.close()
        self._app = _Child(_APP, order, self._federation.directory / "serverapp.log", self._events)
        return self._app

    def _count_death(self, what: str) -> None:
        self._deaths += 1
        if self._deaths > _MAX_DEATHS:
            msg = f"{what} died {self._deaths} times without a round between; link.log and serverapp.log say why"
            raise LinkError(msg)


def _environment(directory: Path) -> dict[str, str]:
    home = directory / "flower"
    home.mkdir(mode=0o700, exist_ok=True)
    return {
        **os.environ,
        "FLWR_HOME": str(
            home
        ),  # Flower keeps files there; two federations on one machine must not share them
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # noqa: S101  (Popen was told PIPE)
    return pipe

"""The supervisor's judgement of its two processes, on stand-ins that die as told."""

import json
import os
import sys
from pathlib import Path

import pytest

from fedfin.errors import LinkError
from fedfin.plan import JobPlan
from fedfin.server import supervisor

LINK = "import json,sys; sys.stdin.readline(); print(json.dumps({'inner': 'here'}), flush=True); sys.stdin.read()"


class Folder:
    """What the supervisor needs of a federation."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.config_path = self.directory / "federation.yaml"
        self.config = type("Config", (), {"address": "127.0.0.1:1", "job": JobPlan()})()


def supervise(tmp_path, monkeypatch, app, link=LINK):
    """Run the supervisor over two one-line programs; return what it said."""
    real = supervisor.subprocess.Popen

    def popen(command, **options):
        program = link if command[-1] == "fedfin.server.link" else app
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
    said = []
    supervisor.supervise(Folder(tmp_path), new_job=True, on_event=said.append)
    return [event["event"] for event in said]


def saying(*events, then):
    lines = "".join(f"print({json.dumps(json.dumps(event))}, flush=True);" for event in events)
    return f"import os,sys,json; order=json.loads(sys.stdin.readline()); {lines} {then}"


def test_the_end_is_what_the_app_says_and_not_that_it_ended(tmp_path, monkeypatch):
    app = saying({"event": "started"}, {"event": "completed"}, then="sys.exit(0)")
    assert supervise(tmp_path, monkeypatch, app) == ["listening", "started", "completed"]


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(143)", "os.kill(os.getpid(), 9)", "sys.exit(1)"])
def test_an_app_that_ends_without_completing_is_started_again_and_given_up_in_the_end(
    tmp_path, monkeypatch, end
):
    with pytest.raises(LinkError, match="died 6 times without a round"):
        supervise(tmp_path, monkeypatch, saying({"event": "started"}, then=end))


def test_a_restarted_app_goes_on_with_the_job_instead_of_starting_another(tmp_path, monkeypatch):
    marker = tmp_path / "second"
    then = (
        f"exec('''import pathlib\\np = pathlib.Path({os.fspath(marker)!r})\\n"
        "again = p.exists()\\np.write_text(str(order['new_job']))\\n"
        "print(json.dumps({'event': 'completed'})) if again else os._exit(143)''')"
    )
    events = supervise(tmp_path, monkeypatch, saying({"event": "started"}, then=then))
    assert events[-1] == "completed"
    assert "app_died" in events
    assert marker.read_text() == "False"


def test_a_failure_is_raised_with_its_reason_even_when_the_app_is_gone_at_once(tmp_path, monkeypatch):
    app = saying({"event": "failed", "reason": "too many lenders refused"}, then="os._exit(1)")
    with pytest.raises(LinkError, match="too many lenders refused"):
        supervise(tmp_path, monkeypatch, app)


def test_a_link_that_cannot_listen_is_named(tmp_path, monkeypatch):
    link = "import json,sys; print(json.dumps({'error': 'the port is taken'}), flush=True)"
    with pytest.raises(LinkError, match="the port is taken"):
        supervise(tmp_path, monkeypatch, saying(then=""), link=link)


def test_a_link_that_dies_while_starting_is_named_with_its_log(tmp_path, monkeypatch):
    with pytest.raises(LinkError, match=r"link\.log"):
        supervise(tmp_path, monkeypatch, saying(then=""), link="import sys; sys.exit(3)")


def test_a_round_done_forgives_earlier_deaths(tmp_path, monkeypatch):
    counter = tmp_path / "count"
    then = (
        f"exec('''import pathlib\\np = pathlib.Path({os.fspath(counter)!r})\\n"
        "n = int(p.read_text()) + 1 if p.exists() else 1\\np.write_text(str(n))\\n"
        "print(json.dumps({'event': 'completed'})) if n == 9 else os._exit(143)''')"
    )
    app = saying({"event": "round_done"}, then=then)
    assert supervise(tmp_path, monkeypatch, app).count("app_died") == 8

"""What a person sees at the terminal: clear errors, exit statuses, JSON."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lenders import lender_folder
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.cli_output import guarded, print_table, say
from fedfin.config import LenderConfig
from fedfin.errors import ConfigError
from fedfin.parsing import parse_yaml

ROOT = Path(__file__).parent.parent


def fedfin(*arguments, **environment):
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "160", **environment}
    )


@pytest.fixture
def federation(tmp_path):
    assert (
        fedfin("server", "init", tmp_path / "fed", "--name", "coop", "--address", "127.0.0.1:9443").exit_code
        == 0
    )
    return tmp_path / "fed"


def test_init_makes_a_folder_that_holds_together_and_tells_nobody_its_keys(federation):
    from fedfin.server.founding import open_federation

    opened = open_federation(federation / "federation.yaml")
    assert opened.config.federation == "coop"
    for key in (federation / "keys").iterdir():
        assert key.stat().st_mode & 0o777 == 0o600


def test_a_job_of_mode_shared_does_not_start_in_clear_and_its_mend_parses(federation):
    config = federation / "federation.yaml"
    text = config.read_text().replace("aggregation: secure", "aggregation: plain")
    shared = text.replace("mode: local", "mode: shared").replace("local_steps: 10", "local_steps: 1")
    config.write_text(shared)
    refused = fedfin("server", "--config", config)
    words = " ".join(refused.stderr.split())
    assert (refused.exit_code, "privacy.mode is shared and aggregation is plain" in words) == (1, True)
    assert "set aggregation to secure" in words
    config.write_text(shared.replace("aggregation: plain", "aggregation: secure"))
    assert fedfin("server", "status", "--config", config).exit_code == 0


def test_init_never_overwrites_a_federation(federation):
    made = fedfin("server", "init", federation.with_name("other"))  # of the default name
    assert "made a federation named federation in" in made.stdout
    again = fedfin("server", "init", federation)
    assert again.exit_code == 1
    assert "new folder" in again.stderr


def test_invite_prints_the_token_alone_on_standard_output(federation):
    done = fedfin("server", "invite", "north-bank", "--config", federation / "federation.yaml")
    assert done.exit_code == 0
    assert done.stdout.startswith("fedfin1_")
    assert len(done.stdout.split()) == 1
    token = done.stdout.strip()
    from fedfin.invitation import Invitation

    secret = Invitation.from_token(token).secret
    everything = b"".join(path.read_bytes() for path in federation.rglob("*") if path.is_file())
    assert secret.encode() not in everything
    assert bytes.fromhex(secret) not in everything


@pytest.mark.parametrize("name", ["North", "a b", "../x", "", "x" * 41])
def test_a_name_that_is_no_name_is_refused_with_an_example(federation, name):
    done = fedfin("server", "invite", name, "--config", federation / "federation.yaml")
    assert done.exit_code == 1
    assert "north-bank" in done.stderr


def test_roster_and_status_are_json_when_asked(federation):
    config = federation / "federation.yaml"
    fedfin("server", "invite", "north-bank", "--config", config)
    roster = json.loads(fedfin("server", "roster", "--config", config, "--json").stdout)
    assert roster["members"] == []
    assert [line["name"] for line in roster["invitations"]] == ["north-bank"]
    status = json.loads(fedfin("server", "status", "--config", config, "--json").stdout)
    assert status["jobs"] == []
    assert status["log"] == {"entries": 1, "checkpoint": None, "cosigned_by": [], "final": None, "quorum": 0}


def test_the_configuration_may_stand_before_the_subcommand(federation):
    done = fedfin("server", "--config", federation / "federation.yaml", "roster", "--json")
    assert json.loads(done.stdout)["members"] == []


@pytest.mark.parametrize("command", [("server",), ("client",), ("client", "check"), ("client", "status")])
def test_a_missing_file_is_one_paragraph_with_the_mend(command, tmp_path):
    done = fedfin(*command, "--config", tmp_path / "none.yaml")
    assert done.exit_code == 1
    assert "none.yaml does not exist" in done.stderr
    assert "--config" in done.stderr
    assert "Traceback" not in done.output


def test_a_wrong_value_names_file_key_value_and_mend(federation):
    config = federation / "federation.yaml"
    config.write_text(config.read_text().replace("epsilon: 3.0", "epsilon: -3.0"))
    done = fedfin("server", "--config", config)
    assert done.exit_code == 1
    for word in ("federation.yaml", "job.privacy.epsilon", "-3.0", "greater than 0"):
        assert word in done.stderr


def test_an_error_is_json_when_asked(tmp_path):
    done = fedfin("client", "check", "--config", tmp_path / "none.yaml", "--json")
    assert done.exit_code == 1
    assert "does not exist" in json.loads(done.stdout)["error"]


def test_wrong_usage_exits_with_two():
    assert fedfin("server", "invite").exit_code == 2
    assert fedfin("nonsense").exit_code == 2
    assert fedfin("demo", "--lenders", "x").exit_code == 2


@pytest.mark.parametrize("number", [0, 1, 9])
def test_the_demo_says_how_many_lenders_its_loans_allow(number, tmp_path):
    done = fedfin("demo", "--lenders", number, "--dir", tmp_path / "demo")
    assert done.exit_code == 1
    assert "2 to 8" in done.stderr


def test_the_demo_overwrites_nothing(tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = fedfin("demo", "--dir", tmp_path)
    assert done.exit_code == 1
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_altered_token_is_refused_before_anything_is_made(federation, tmp_path):
    token = fedfin(
        "server", "invite", "north-bank", "--config", federation / "federation.yaml"
    ).stdout.strip()
    done = fedfin(
        "client", "join", token[:-1] + ("0" if token[-1] != "0" else "1"), "--dir", tmp_path / "bank"
    )
    assert done.exit_code == 1
    assert "altered" in done.stderr
    assert not (tmp_path / "bank").exists()


def test_a_coordinator_that_is_away_is_named_when_joining(federation, tmp_path):
    config = federation / "federation.yaml"
    config.write_text(config.read_text().replace("127.0.0.1:9443", "127.0.0.1:1"))
    token = fedfin("server", "invite", "north-bank", "--config", config).stdout.strip()
    done = fedfin("client", "join", token, "--dir", tmp_path / "bank")
    assert done.exit_code == 1
    assert "cannot be reached" in done.stderr
    assert not (tmp_path / "bank").exists()


def test_check_shows_a_clean_table_and_exits_zero(tmp_path):
    done = fedfin("client", "check", "--config", lender_folder(tmp_path / "bank"))
    assert done.exit_code == 0, done.output
    assert "can take part" in done.stdout
    assert "178 loans" in done.stdout


def test_check_names_every_fault_that_was_planted_in_a_real_table(tmp_path):
    bank = lender_folder(tmp_path / "bank", num_loans=300)
    loans = bank.parent / "loans.csv"
    header, *rows = [line.split(",") for line in loans.read_text().splitlines()]
    at = {name: position for position, name in enumerate(header)}
    rows[3][at["Income"]] = "inf"
    rows[5][at["Amount"]] = "many"
    rows[7][at["Seniority"]] = "999"
    rows[9][at["Home"]] = "castle"
    rows += [rows[20], rows[20]]
    for row in rows:
        row[at["Price"]] = str(100 + 900 * int(row[at["target"]]))
    dropped = at["Expenses"]
    loans.write_text(
        "\n".join(",".join(c for i, c in enumerate(row) if i != dropped) for row in [header, *rows])
    )
    done = fedfin("client", "check", "--config", bank)
    assert done.exit_code == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith(("error:", "warning:"))]
    for column, word in (
        ("Expenses", "no such column"),
        ("Income", "finite"),
        ("Amount", "number"),
        ("Seniority", "range"),
        ("Home", "categor"),
        ("Price", "leak"),
        ("", "equal to an earlier one"),
    ):
        assert any(column in line and word in line for line in lines), (column, word, lines)
    document = json.loads(fedfin("client", "check", "--config", bank, "--json").stdout)
    assert document["can_take_part"] is False
    assert {f["rule"] for f in document["findings"]} >= {"missing_column", "suspect_leak", "duplicate_rows"}


def test_status_of_a_fresh_lender_is_empty_and_makes_no_trouble(tmp_path):
    document = json.loads(
        fedfin("client", "status", "--config", lender_folder(tmp_path / "bank"), "--json").stdout
    )
    assert document["models"] == []
    assert document["snapshots"] == []


def test_our_own_bug_is_one_paragraph_and_a_traceback_only_when_asked(capsys):
    def work():
        raise ZeroDivisionError

    with pytest.raises(SystemExit, match="1"):
        guarded(work)
    assert "bug of fedfin" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        guarded(work, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_a_password_in_a_url_is_refused_without_being_shown():
    text = "name: a\nfederation: f\ncoordinator: x:1\ndata: {url: 'postgresql://u:hunter2@h/d', table: t}\n"
    with pytest.raises(ConfigError, match="password_env") as error:
        parse_yaml(text, LenderConfig, origin="bank.yaml")
    assert "hunter2" not in str(error.value)


def test_help_is_quick_because_no_library_is_loaded_for_it():
    code = (
        "import sys; from fedfin.cli import app;"
        "print(sorted({'torch', 'flwr', 'pandas', 'opacus'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_the_demos_loans_are_what_the_data_sheet_says():
    with gzip.open(ROOT / "simulation" / "credit_data.csv.gz", "rt") as file:
        header, *rows = file.read().splitlines()
    assert len(rows) == 4454
    assert header.split(",")[-1] == "target"
    assert round(sum(row.endswith(",1") for row in rows) / len(rows), 3) == 0.282


def test_the_version_is_told():
    done = fedfin("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("fedfin 0.")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf", "1000000"])
def test_a_mistyped_epsilon_is_a_mistake_and_no_bug(epsilon, tmp_path):
    done = fedfin("demo", "--epsilon", epsilon, "--dir", tmp_path / "demo")
    assert done.exit_code == 1
    assert "--epsilon" in done.stderr
    assert "bug" not in done.stderr
    assert not (tmp_path / "demo").exists()


def test_words_of_the_other_side_cannot_steer_the_terminal(capsys):
    """A coordinator's reason, a lender's refusal: what an engineer approves by must be what stands there."""
    evil = "plain\x1b[2K\x1b[1Ahidden \u202etxt\x9b2J"
    say(evil)
    print_table("rows", ["what"], [[evil]])
    told = capsys.readouterr().out
    assert told.count("plain") == told.count("hidden") == 2
    assert not set(told) & {"\x1b", "\x9b", "\u202e"}

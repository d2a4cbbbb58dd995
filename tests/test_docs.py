"""The documents say what the code does."""

import re
import warnings
from pathlib import Path

import click
import pytest
import typer.main
from typer.testing import CliRunner

from fedfin.cli import app
from fedfin.cli_reference import commands_page, configuration_page
from fedfin.client import sum_rules as lenders_rules
from fedfin.privacy import sum_rules

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def commands() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(command: click.Command, path: list[str]) -> None:
        found.append(path)
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                walk(command.get_command(context, name), [*path, name])

    walk(typer.main.get_command(app), [])
    return found


def test_the_configuration_page_is_the_code():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page(), "run `make docs`"


def test_the_commands_page_is_the_code():
    assert (ROOT / "docs" / "commands.md").read_text() == commands_page(), "run `make docs`"


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert re.search(rf"Example:.*fedfin {' '.join(path)}".rstrip(), shown.output), shown.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_names_exists(page):
    known = {tuple(path): {o for p in command_at(path).params for o in p.opts} for path in commands()}
    for line in re.findall(
        r"^(?:    |```.*\n)?(?:\$ )?fedfin ([^\n`]*)|`fedfin ([^`]*)`", page.read_text(), re.MULTILINE
    ):
        words = (line[0] or line[1]).split("#")[0].split()
        path: tuple[str, ...] = ()
        for word in words:
            if (*path, word) not in known:
                break
            path = (*path, word)
        options = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
        for option in options:
            assert any(option in known[path[:end]] for end in range(len(path) + 1)), (
                f"{page.name}: fedfin {words}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_the_project_leads_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_and_benchmark_that_a_page_names_is_there(page):
    for name in re.findall(r"\b((?:tests|benchmarks)/[a-z]\w*\.py)\b", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_security_page_names_every_rule_of_a_secure_sum():
    page = (ROOT / "docs" / "security.md").read_text()
    assert [rule for rule in [*sum_rules.RULES, *lenders_rules.RULES] if f"`{rule}`" not in page] == []


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_examples_for_researchers_run_one_after_the_other(whole, capsys):
    page = (ROOT / "docs" / "researcher.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert any("PrivateEngine(" in block for block in blocks)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own, at its import
        for block in blocks:
            if whole or "compare_arms" not in block:  # which trains every arm: half a minute
                exec(compile(block, "researcher.md", "exec"), names)
    printed = capsys.readouterr().out
    ours, theirs = re.findall(r"steps: RDP ([\d.]+), Opacus ([\d.]+)", printed)[0]
    assert ours == theirs
    for figure in (ours, *re.findall(r"(?:all: RDP|PLD|two lenders:) ([\d.]+)", printed)):
        assert figure in page, f"the example prints {figure}, which the page does not say"


def command_at(path: list[str]) -> click.Command:
    command = typer.main.get_command(app)
    for name in path:
        command = command.get_command(click.Context(command), name)
    return command

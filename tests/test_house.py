"""The house rules of DESIGN.md, checked: who may import whom, where Flower and torch may be, what is in the wheel."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALL = "hall"  # fedfin/*.py but cli*.py
DOOR = "cli"  # fedfin/cli*.py, and __main__.py, which starts it
ARITHMETIC = ("audit", "privacy", "credit", "strategies")
ROOMS = (*ARITHMETIC, "client", "server", "simulation")
MAY_IMPORT = {
    HALL: {HALL},
    "audit": {HALL, "audit"},
    "privacy": {HALL, "privacy"},
    "credit": {HALL, "credit"},
    "strategies": {HALL, "strategies", "privacy"},
    "client": {HALL, *ARITHMETIC, "client"},
    "server": {HALL, *ARITHMETIC, "server"},
    "simulation": {HALL, *ROOMS},
    DOOR: {HALL, *ROOMS, DOOR},
}
FLOWER_DOORS = {
    "client/app",
    "client/node",
    "server/app",
    "server/link",
    "fedfin/wire",
    "simulation/federation",
}
TORCH_DOORS = {
    "credit/models",
    "credit/reasons",
    "credit/export",
    "privacy/bookkeeping",
    "privacy/gradients",
    "privacy/hooks",
    "privacy/layers",
    "privacy/probing",
    "privacy/recording",
    "privacy/canaries",
    "client/training",
}
MODULES = [path for room in (*ROOMS, "fedfin") for path in sorted((ROOT / room).glob("*.py"))]
PACKAGE_DATA = {
    "fedfin/py.typed",
    "fedfin/simulation/credit_data.csv.gz",
    "fedfin/simulation/credit_data.yaml",
    "fedfin/simulation/CREDIT_DATA_NOTICE",
    "fedfin/simulation/report.html.j2",
}


def imported(source):
    """Every name that the source imports anywhere: in functions and under TYPE_CHECKING too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def heads(path):
    return {name.split(".")[0] for name in imported(path.read_text())}


def place(path):
    return f"{path.parent.name}/{path.stem}"


def layer_of(module):
    """The layer of a module of fedfin, from its dotted name."""
    room = module.split(".")[1] if "." in module else ""
    if room in ROOMS:
        return room
    return DOOR if room.startswith("cli") or room == "__main__" else HALL


def dotted(path):
    return f"fedfin.{path.stem}" if path.parent.name == "fedfin" else f"fedfin.{path.parent.name}.{path.stem}"


def test_imports_in_functions_and_under_type_checking_count():
    source = """
if TYPE_CHECKING:
    import torch
def late():
    from fedfin.server import roster
    from . import near
"""
    assert sorted(imported(source)) == ["..near", "fedfin.server.roster", "torch"]


def test_a_module_imports_only_from_the_layers_below_it():
    for path in MODULES:
        allowed = MAY_IMPORT[layer_of(dotted(path))]
        ours = [name for name in imported(path.read_text()) if name.split(".")[0] == "fedfin"]
        assert (place(path), [name for name in ours if layer_of(name) not in allowed]) == (place(path), [])


def test_a_module_names_fedfin_in_full():
    """At the root Python would also find `credit`, and load a second copy of it; relative imports hide layers."""
    for path in MODULES:
        assert (place(path), heads(path) & {"", *ROOMS}) == (place(path), set())


def test_flower_stays_behind_its_doors():
    assert {place(path) for path in MODULES if "flwr" in heads(path)} - FLOWER_DOORS == set()


def test_torch_stays_behind_its_doors():
    users = {place(path) for path in MODULES if "torch" in heads(path) and path.parent.name != "simulation"}
    assert users - TORCH_DOORS == set()


def test_client_and_server_never_see_each_other():
    assert "server" not in MAY_IMPORT["client"]
    assert "client" not in MAY_IMPORT["server"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_flat_and_named_in_both_tables_and_linked(room):
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert f"fedfin.{room}" in tables["packages"]
    assert tables["package-dir"][f"fedfin.{room}"] == room
    assert (ROOT / "fedfin" / room).readlink() == Path("..") / room
    assert list((ROOT / room).glob("*/*.py")) == []


def test_no_room_is_named_that_does_not_exist():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(tables["packages"]) == sorted(["fedfin", *(f"fedfin.{room}" for room in ROOMS)])
    assert set(tables["package-dir"]) == set(tables["packages"])
    assert {link.name for link in (ROOT / "fedfin").iterdir() if link.is_symlink()} == set(ROOMS)


def test_no_module_is_called_after_what_it_does_not_hold():
    shy = ("util", "helper", "common", "manager")
    assert [path.name for path in MODULES if any(word in path.stem for word in shy)] == []


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_package_data(tmp_path):
    # a copy: an earlier build's leftovers must not be what fills the wheel
    unneeded = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests", "benchmarks", "docs")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=unneeded)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-isolation")
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    modules = {dotted(path).replace(".", "/") + ".py" for path in MODULES}
    assert (modules | PACKAGE_DATA) - shipped == set()
    assert [name for name in shipped if name.startswith(ROOMS)] == []

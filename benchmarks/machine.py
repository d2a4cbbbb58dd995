"""The machine a benchmark ran on, and the one document every benchmark prints."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The wheels whose release moves our figures.
REPORTED_PACKAGES = ("flwr", "torch", "numpy")


def machine() -> dict[str, str | int]:
    """Return the processor, cores usable by this process, memory in GiB, system and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in REPORTED_PACKAGES},
    }


def document(benchmark: str, figures: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a benchmark reports.

    Args:
        benchmark: The script's name without `.py`.
        figures: Every figure that has a bar, under the ID the design gives it.
        rows: What was measured, one flat dict a line of the table; rows may differ in keys.

    Returns:
        `{"benchmark": ..., "machine": {...}, "figures": {...}, "rows": [...]}`, ready for `json.dumps`.
    """
    return {
        "benchmark": benchmark,
        "machine": machine(),
        # float(): figures are often NumPy scalars, which json refuses.
        "figures": {name: float(value) for name, value in figures.items()},
        "rows": rows,
    }


def print_document(result: dict[str, Any], *, as_json: bool) -> None:
    """Print what `document` returned: one line of JSON, or the machine, the rows and the figures."""
    if as_json:
        print(json.dumps(result))
        return
    print(result["benchmark"])
    print("  ".join(f"{name}={value}" for name, value in result["machine"].items()))
    if result["rows"]:
        columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
        print()
        _print_aligned([columns, *([row.get(name, "") for name in columns] for row in result["rows"])])
    if result["figures"]:
        print()
        _print_aligned(result["figures"].items())


def _cpu_model() -> str:
    # platform.processor() is empty or "x86_64" on Linux; the kernel's own list names the model.
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _print_aligned(lines: Iterable[Sequence[Any]]) -> None:
    table = [[_cell(value) for value in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

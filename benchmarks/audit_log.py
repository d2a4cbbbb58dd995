"""The audit log: how fast it is written, verified, exported and proved, against hashing alone and against one by one.

`audit.verify.rate_over_hashing` is the rate at which a log's tree is verified (the file read, every leaf hashed from
its bytes, every stored hash compared) over the rate of the same leaf and node hash calls on the same bytes in memory.
Parsing and signatures are a row of their own: one Ed25519 verification takes a hundred times as long as a hash.
`audit.append.batch512_over_single` is entries a second in batches of 512, each with one sync of the disk, over one by
one. Entries are those of a completed round with three lenders. Compared figures are taken in turns, medians of the
repeats; one process, signatures on all its cores.

    python benchmarks/audit_log.py [--json] [--entries 100000] [--repeats 7] [--dir DIR]

`--entries 1000000` takes three to five minutes, most of them to write the log and to check its signatures. How much
batches gain is a matter of the disk: where it syncs in 0.1 ms, signing is what takes the time; give `--dir` a folder
on the disk that the log will be on.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from machine import document, print_document

from fedfin.audit import merkle
from fedfin.audit.events import Event, RoundCompleted, real
from fedfin.audit.log import AuditLog
from fedfin.audit.reading import LogReader, open_log
from fedfin.audit.verifying import verify_log

BATCHES = (1, 64, 512)
APPENDED = {1: 512, 64: 4096, 512: 8192}  # entries a repeat
PROOFS = 2000
EXPORTED = 50_000


def event(number: int) -> Event:
    """Return what a round leaves in the log."""
    return RoundCompleted(
        job="credit-2026",
        round=number,
        cohort=("bank-a", "bank-b", "bank-c"),
        seconds=real(1.25),
        model_before=f"{number:064x}",
        model_after=f"{number + 1:064x}",
    )


def seconds(work: Callable[[], object]) -> float:
    """Return how long it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def new_log(path: Path) -> AuditLog:
    """Return an empty log."""
    return AuditLog.create(
        path,
        origin="fedfin/benchmark/coordinator",
        actor="coordinator",
        key=Ed25519PrivateKey.generate(),
        side="coordinator",
    )


def append_rates(folder: Path, repeats: int) -> dict[int, float]:
    """Return entries a second for each size of batch, taken in turns."""
    taken: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    logs = {batch: new_log(folder / f"append{batch}.db") for batch in BATCHES}
    for _ in range(repeats):
        for batch, log in logs.items():
            groups = [[event(number) for number in range(batch)] for _ in range(APPENDED[batch] // batch)]
            spent = seconds(lambda log=log, groups=groups: [log.append_many(group) for group in groups])  # type: ignore[misc]  # the loop's own
            taken[batch].append(APPENDED[batch] / spent)
    for log in logs.values():
        log.close()
    return {batch: statistics.median(rates) for batch, rates in taken.items()}


def filled(path: Path, num_entries: int) -> None:
    """Write a log of this size, with a checkpoint at its end."""
    with new_log(path) as log:
        for start in range(0, num_entries, 4096):
            log.append_many(event(number) for number in range(start, min(start + 4096, num_entries)))
        log.checkpoint()


def hash_all(bodies: list[tuple[bytes]]) -> bytes:
    """Return the last of the hashes that verifying computes, on bytes in memory."""
    hashes = merkle.leaf_hashes(bodies)
    while len(hashes) > 1:
        hashes = merkle.node_hashes(hashes)
    return hashes[0]


def verify_rates(path: Path, repeats: int) -> tuple[float, float, float]:
    """Return entries a second of the tree verified, of hashing alone, and of entries parsed and signatures verified."""
    with open_log(path) as log:
        bodies = [(body,) for _, _, body in log.bodies() if body is not None]
    gc.freeze()  # or the collector walks through all these rows while the log is verified, and only then
    trees, alone = [], []
    for _ in range(repeats):
        report = verify_log(path, signatures=False)
        if not report.ok:
            raise SystemExit(report.wrong)
        trees.append(len(bodies) / report.tree_s)
        alone.append(len(bodies) / seconds(lambda: hash_all(bodies)))
    report = verify_log(path)
    if not report.ok:
        raise SystemExit(report.wrong)
    return statistics.median(trees), statistics.median(alone), len(bodies) / report.signatures_s


def export_rate(log: LogReader) -> float:
    """Return entries a second that are read, parsed, and written as lines of JSON."""
    stop = min(EXPORTED, log.size)

    def lines() -> Iterator[bytes]:
        for _, entry in log.entries(0, stop):
            if entry is not None:
                yield entry.to_leaf() + b"\n"

    with tempfile.TemporaryFile() as file:
        return stop / seconds(lambda: file.writelines(lines()))


def proof_rates(log: LogReader) -> dict[str, float]:
    """Return proofs made a second, of inclusion and of consistency, and checks of inclusion a second."""
    size, root = log.size, log.root()
    places = [number * (size - 1) // PROOFS for number in range(PROOFS)]
    proofs = [log.inclusion(index) for index in places]
    leaves = [log.leaf_hash(index) for index in places]

    def check() -> None:
        for index, leaf, proof in zip(places, leaves, proofs, strict=True):
            merkle.verify_inclusion(leaf, index, size, proof, root)

    return {
        "inclusion proofs": PROOFS / seconds(lambda: [log.inclusion(index) for index in places]),
        "consistency proofs": PROOFS / seconds(lambda: [log.consistency(index + 1) for index in places]),
        "inclusion proofs checked": PROOFS / seconds(check),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--entries", type=int, default=100_000, help="of the log that is verified")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--dir", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        appended = append_rates(folder, arguments.repeats)
        path = folder / "audit.db"
        filling_s = seconds(lambda: filled(path, arguments.entries))
        tree, hashing, signatures = verify_rates(path, arguments.repeats)
        with open_log(path) as log:
            exported, proved = export_rate(log), proof_rates(log)
        num_bytes = path.stat().st_size
    rows: list[dict[str, Any]] = [
        *({"what": f"append, batches of {batch}", "per_s": rate} for batch, rate in appended.items()),
        {
            "what": f"append, {arguments.entries} entries in batches of 4096",
            "per_s": arguments.entries / filling_s,
        },
        {"what": f"verify the tree of {arguments.entries} entries", "per_s": tree},
        {"what": "the same hashes on bytes in memory", "per_s": hashing},
        {"what": "parse entries and verify signatures", "per_s": signatures},
        {"what": "export as JSON lines", "per_s": exported},
        *({"what": what, "per_s": rate} for what, rate in proved.items()),
    ]
    rows = [
        row | {"entries": arguments.entries, "bytes_an_entry": num_bytes / arguments.entries} for row in rows
    ]
    figures = {
        "audit.verify.rate_over_hashing": tree / hashing,
        "audit.append.batch512_over_single": appended[512] / appended[1],
    }
    print_document(document("audit_log", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

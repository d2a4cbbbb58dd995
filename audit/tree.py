"""Checks the tree of a log against its entries, a batch at a time: most of the work is hashing.

A batch is one complete subtree of the log, so that its levels are checked while its leaves are in memory, and only its
root is kept for the levels above.
"""

from typing import Final

from fedfin.audit import merkle
from fedfin.audit.findings import CHANGED, CUT, FoundError
from fedfin.audit.reading import LogReader

__all__ = ["check_tree"]

_BATCH_LEVELS: Final = 12
_HASH_BYTES: Final = 32
_BATCH: Final = 1 << _BATCH_LEVELS  # a power of two, so that a batch is one complete subtree


def check_tree(log: LogReader) -> tuple[int, bytes]:
    """Recompute every leaf and every complete subtree, batch by batch, and hold them against what is stored.

    Returns:
        How many bodies are gone, and the root over all entries.

    Raises:
        FoundError: The first difference.
        sqlite3.Error: The file cannot be read.
    """
    size, num_gone, above = log.size, 0, list[bytes]()
    for first in range(0, size, _BATCH):
        stop = min(first + _BATCH, size)
        hashes, gone = _check_leaves(log, first, stop)
        num_gone += gone
        for level in range(1, _BATCH_LEVELS + 1):
            hashes = _check_level(log, level, first >> level, hashes)
        above += hashes  # none but of a whole batch
    for level in range(_BATCH_LEVELS + 1, size.bit_length()):
        above = _check_level(log, level, 0, above)
    _check_nothing_else(log, size)
    return num_gone, log.root(size)


def _check_leaves(log: LogReader, first: int, stop: int) -> tuple[list[bytes], int]:
    """Return the leaf hashes of a batch, which fit the bodies, and how many of these are gone."""
    query = "SELECT content FROM body WHERE idx >= ? AND idx < ? ORDER BY idx"
    found = merkle.leaf_hashes(log.connection.execute(query, (first, stop)).fetchall())
    if _are_stored(log, found, "SELECT leaf AS hash FROM entry WHERE", (first, stop)):
        return found, 0
    # Slowly, entry by entry: bodies were erased, or something is wrong.
    leaves, gone = list[bytes](), 0
    for place, (index, leaf, body) in enumerate(log.bodies(first, stop), first):
        if index != place:
            raise FoundError(place, f"entry {place} is missing from the log", CHANGED)
        if body is None and len(leaf) == _HASH_BYTES:
            gone += 1
        elif body is None or merkle.leaf_hash(body) != leaf:
            raise FoundError(index, f"entry {index} is not what its hash says", CHANGED)
        leaves.append(leaf)
    if len(leaves) != stop - first:
        place = first + len(leaves)
        raise FoundError(place, f"entry {place} is missing from the log", CHANGED)
    return leaves, gone


def _check_level(log: LogReader, level: int, first: int, below: list[bytes]) -> list[bytes]:
    """Return the hashes of a level, which are those that are stored; `first` is the index of the first."""
    found = merkle.node_hashes(below)
    values = (level, first, first + len(found))
    if not found or _are_stored(log, found, "SELECT hash FROM node WHERE level = ? AND", values):
        return found
    query = "SELECT idx, hash FROM node WHERE level = ? AND idx >= ? AND idx < ?"
    stored = dict(log.connection.execute(query, values))
    index = next((at for at, value in enumerate(found, first) if stored.get(at) != value), None)
    if index is None:  # the database gave them in another order
        return found
    leaf = index << level
    what = (
        f"hash {index} of level {level}, over entries {leaf} to {leaf + (1 << level) - 1}, does not fit them"
    )
    raise FoundError(leaf, what, CHANGED)


def _are_stored(log: LogReader, hashes: list[bytes], rows: str, values: tuple[int, ...]) -> bool:
    """Tell whether the rows of one range, whole and in their order, hold these hashes.

    The database joins them to one value: to give each to Python takes longer than to compute it. A range of a
    primary key with as many rows as numbers has no gap. Where the answer is no, the caller looks row by row.
    """
    query = (
        "SELECT count(*), CAST(group_concat(hash, '') AS BLOB)"  # noqa: S608  (of constants; the values are bound)
        f" FROM ({rows} idx >= ? AND idx < ? AND length(hash) = {_HASH_BYTES} ORDER BY idx)"
    )
    number, joined = log.connection.execute(query, values).fetchone()
    return bool(number == len(hashes) == values[-1] - values[-2] and joined == b"".join(hashes))


def _check_nothing_else(log: LogReader, size: int) -> None:
    db = log.connection
    num_nodes = sum(size >> level for level in range(1, size.bit_length()))
    if db.execute("SELECT count(*) FROM node").fetchone()[0] != num_nodes:
        raise FoundError(None, "the file holds hashes of entries that it does not hold", CUT)
    beyond = "SELECT min(idx) FROM (SELECT idx FROM {0} WHERE idx < 0 UNION ALL SELECT idx FROM {0} WHERE idx >= ?)"
    for table in ("entry", "body"):
        index = db.execute(beyond.format(table), (size,)).fetchone()[0]
        if index is not None:
            raise FoundError(index, f"the file holds a body at place {index}, outside the log", CHANGED)

"""What is cheap to check when a log is opened to go on with: its end against its tree, its key and its checkpoint."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfin.audit import merkle
from fedfin.audit.checkpoint import parse_checkpoint
from fedfin.audit.reading import LogReader
from fedfin.errors import AuditError

__all__ = ["check_ending"]


def check_ending(log: LogReader, key: Ed25519PublicKey) -> None:
    """Check the end of a log in a few dozen hashes, whatever its length.

    Args:
        log: The log.
        key: The key that is to sign its next entry.

    Raises:
        AuditError: The key is another one, the last entry or the right edge of the tree does not fit, or the log is
            shorter or other than its last checkpoint.
    """
    with log.snapshot():  # another process may append at any moment
        _check(log, key)


def _check(log: LogReader, key: Ed25519PublicKey) -> None:
    size = log.size
    merkle.edge(log.node, size)
    if log.public_key.public_bytes_raw() != key.public_bytes_raw():
        msg = f"the key is not the one that signs {log.path}; open the log with the key of its owner"
        raise AuditError(msg)
    start = 0
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            _check_right_side(log, level, start >> level)
            start += 1 << level
    if size:
        body = log.body(size - 1)
        if body is not None and merkle.leaf_hash(body) != log.leaf_hash(size - 1):
            raise _broken(log, f"entry {size - 1} is not what its hash says")
    last = log.last_signed()
    if last is not None:
        signed, note = last
        if signed > size:
            raise _broken(log, f"it signed a checkpoint of {signed} entries and holds {size}")
        if parse_checkpoint(note).root != log.root(signed):
            raise _broken(log, f"its tree is not the one of its checkpoint of {signed} entries")
    db = log.connection
    nodes = db.execute("SELECT count(*) FROM node WHERE level = 1 AND idx >= ?", (size // 2,)).fetchone()[0]
    if nodes or db.execute("SELECT 1 FROM body WHERE idx >= ? LIMIT 1", (size,)).fetchone():
        raise _broken(log, "it holds parts of entries that are gone")


def _check_right_side(log: LogReader, level: int, index: int) -> None:
    """Hold a complete subtree against its right side, down to the last leaf."""
    while level:
        children = log.node(level - 1, 2 * index), log.node(level - 1, 2 * index + 1)
        if merkle.node_hash(*children) != log.node(level, index):
            raise _broken(log, f"hash {index} of level {level} does not fit those below it")
        level, index = level - 1, 2 * index + 1


def _broken(log: LogReader, what: str) -> AuditError:
    return AuditError(
        f"{log.path}: {what}; it was changed or restored from an older copy: see `fedfin audit verify`, and tell"
        " those who cosign it"
    )

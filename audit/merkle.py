"""The Merkle tree of a log: hashes, roots, and proofs that anyone checks with a few hashes.

Only complete subtrees are stored: node (level, index) is the root over leaves index * 2**level and the 2**level - 1
after it. They never change once written, so the tree is append-only like the log; a root or a proof of any size is
put together from at most two of them a level. Everything here is pure: a tree is a function that gives a node.

Source: RFC 6962 section 2.1 (hashes, proofs), RFC 9162 sections 2.1.3.2 and 2.1.4.2 (verification).
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Final, Protocol

from fedfin.errors import AuditError

__all__ = [
    "EMPTY_ROOT",
    "NodeSource",
    "consistency",
    "edge",
    "grow",
    "inclusion",
    "leaf_hash",
    "leaf_hashes",
    "node_hash",
    "node_hashes",
    "root",
    "verify_consistency",
    "verify_inclusion",
]

EMPTY_ROOT: Final = sha256(b"").digest()
"""The root of a log without entries."""

_HASH_BYTES: Final = 32


class NodeSource(Protocol):
    """Gives the hash of a complete subtree; level 0 are the leaves."""

    def __call__(self, level: int, index: int, /) -> bytes:
        """Return the 32 bytes of node (level, index), which exists."""
        ...


def leaf_hash(body: bytes) -> bytes:
    """Return the hash of an entry's bytes."""
    return sha256(b"\x00" + body).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash over two subtrees."""
    return sha256(b"\x01" + left + right).digest()


def leaf_hashes(bodies: Iterable[tuple[bytes]]) -> list[bytes]:
    """Return `leaf_hash` of each body; they come as the rows of one column that a database gives."""
    return [sha256(b"\x00" + body).digest() for (body,) in bodies]


def node_hashes(below: Sequence[bytes]) -> list[bytes]:
    """Return `node_hash` of each pair of neighbours; a last one without a neighbour has none."""
    return [
        sha256(b"\x01" + left + right).digest() for left, right in zip(below[::2], below[1::2], strict=False)
    ]


def edge(nodes: NodeSource, size: int) -> list[bytes]:
    """Return the roots of the complete subtrees that `size` leaves are made of, the largest first."""
    found: list[bytes] = []
    start = 0
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            found.append(nodes(level, start >> level))
            start += 1 << level
    return found


def grow(subtrees: list[bytes], size: int, leaf: bytes, write: Callable[[int, int, bytes], object]) -> None:
    """Add a leaf to a tree of `size` leaves.

    Args:
        subtrees: The tree's edge, as `edge` gives it; changed to the edge of size + 1.
        size: Leaves before.
        leaf: The new leaf's hash.
        write: Called with (level, index, hash) for each subtree of level 1 and more that is now complete.
    """
    level, index, found = 0, size, leaf
    while index & 1:
        found = node_hash(subtrees.pop(), found)
        level += 1
        index >>= 1
        write(level, index, found)
    subtrees.append(found)


def root(subtrees: Sequence[bytes]) -> bytes:
    """Return the root of the tree with this edge (RFC 6962 section 2.1, MTH)."""
    if not subtrees:
        return EMPTY_ROOT
    found = subtrees[-1]
    for left in reversed(subtrees[:-1]):
        found = node_hash(left, found)
    return found


def inclusion(nodes: NodeSource, index: int, size: int) -> tuple[bytes, ...]:
    """Return the audit path of leaf `index` in the tree of `size` leaves (RFC 6962 section 2.1.1).

    Raises:
        AuditError: The tree has no such leaf.
    """
    if not 0 <= index < size:
        msg = f"there is no entry {index} in a log of {size}; name one from 0 to {size - 1}"
        raise AuditError(msg)
    path: list[bytes] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            path.append(_range(nodes, middle, stop))
            stop = middle
        else:
            path.append(_range(nodes, start, middle))
            start = middle
    return tuple(reversed(path))


def consistency(nodes: NodeSource, old: int, new: int) -> tuple[bytes, ...]:
    """Return the proof that the tree of `new` leaves begins with the tree of `old` leaves (RFC 6962 section 2.1.2).

    It is empty for equal sizes, and for an empty tree, which every tree begins with.

    Raises:
        AuditError: The old tree is larger than the new one.
    """
    if not 0 <= old <= new:
        msg = f"a log of {new} entries cannot begin with one of {old}; name the smaller size first"
        raise AuditError(msg)
    if old in {0, new}:
        return ()
    path: list[bytes] = []
    start, stop, whole = 0, new, True
    while start + old != stop:
        middle = start + _split(stop - start)
        if start + old <= middle:
            path.append(_range(nodes, middle, stop))
            stop = middle
        else:
            path.append(_range(nodes, start, middle))
            old -= middle - start
            start, whole = middle, False
    if not whole:
        path.append(_range(nodes, start, stop))
    return tuple(reversed(path))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root_hash: bytes) -> None:
    """Check that the leaf is at `index` of the tree with this root (RFC 9162 section 2.1.3.2).

    Args:
        leaf: The leaf's hash.
        index: Its index, from 0.
        size: Leaves of the tree.
        proof: As `inclusion` gives it.
        root_hash: The tree's root, from a checkpoint that is trusted.

    Raises:
        AuditError: It is not, or the proof is malformed.
    """
    _whole(leaf, root_hash, *proof)
    fn, sn, found = index, size - 1, leaf
    right = 0 <= index < size
    for sibling in proof:
        if sn == 0:
            right = False
            break
        if fn & 1 or fn == sn:
            found = node_hash(sibling, found)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = node_hash(found, sibling)
        fn, sn = fn >> 1, sn >> 1
    if not right or sn != 0 or found != root_hash:
        msg = (
            f"the proof does not show that entry {index} is in the log of {size}; ask for the proof again, and rely"
            " on nothing until one holds"
        )
        raise AuditError(msg)


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Check that the newer tree begins with the older one (RFC 9162 section 2.1.4.2).

    Args:
        old: Leaves of the older tree; 0 is a beginning of every tree.
        new: Leaves of the newer tree.
        old_root: Root of the older tree, which was seen before.
        new_root: Root of the newer tree.
        proof: As `consistency` gives it.

    Raises:
        AuditError: It does not, or the proof is malformed: the log was rewritten, or shows different parties
            different histories.
    """
    _whole(old_root, new_root, *proof)
    if not _consistent(old, new, old_root, new_root, list(proof)):
        msg = (
            f"the log of {new} entries is not shown to begin with the log of {old} that was seen before: it was"
            " rewritten, or someone is shown another history; keep both checkpoints and rely on neither"
        )
        raise AuditError(msg)


def _consistent(old: int, new: int, old_root: bytes, new_root: bytes, path: list[bytes]) -> bool:
    if not 0 <= old <= new:
        return False
    if old == new:
        return not path and old_root == new_root
    if old == 0:
        return not path and old_root == EMPTY_ROOT
    if not path:
        return False
    if old & (old - 1) == 0:
        path.insert(0, old_root)
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    first = second = path[0]
    for sibling in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            second = node_hash(second, sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and first == old_root and second == new_root


def _split(size: int) -> int:
    """Return the largest power of two below `size`; size > 1."""
    return 1 << (size - 1).bit_length() - 1


def _range(nodes: NodeSource, start: int, stop: int) -> bytes:
    """Return the hash over leaves [start, stop), a subtree of the tree: complete, or at its right edge."""
    subtrees: list[bytes] = []
    while start < stop:
        level = (stop - start).bit_length() - 1
        subtrees.append(nodes(level, start >> level))
        start += 1 << level
    return root(subtrees)


def _whole(*hashes: bytes) -> None:
    if any(len(found) != _HASH_BYTES for found in hashes):
        msg = "a hash of the proof is not 32 bytes long; the proof was cut or altered: ask for it again"
        raise AuditError(msg)

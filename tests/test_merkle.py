"""The tree is RFC 6962's: roots and proofs against the definition, and against the published vectors."""

import random

import pytest

from fedfin.audit import merkle
from fedfin.errors import AuditError

# The leaves, roots and proofs of certificate-transparency's own merkle_tree_test and log_verifier_test.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {  # (index from 0, size)
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): INCLUSION[0, 8],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


class Tree:
    """Holds what a log's file holds: the leaves, and the complete subtrees as they come to be."""

    def __init__(self, leaves):
        self.nodes = {}
        self.edge = []
        for size, body in enumerate(leaves):
            leaf = merkle.leaf_hash(body)
            self.nodes[0, size] = leaf
            merkle.grow(self.edge, size, leaf, self.put)

    def put(self, level, index, found):
        assert (level, index) not in self.nodes
        self.nodes[level, index] = found

    def __call__(self, level, index):
        return self.nodes[level, index]

    def root(self, size):
        return merkle.root(merkle.edge(self, size))


def defined_root(leaves):
    """RFC 6962 section 2.1, as it is written there."""
    if not leaves:
        return merkle.EMPTY_ROOT
    if len(leaves) == 1:
        return merkle.leaf_hash(leaves[0])
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return merkle.node_hash(defined_root(leaves[:k]), defined_root(leaves[k:]))


def hashes(texts):
    return tuple(bytes.fromhex(text) for text in texts)


def altered(proof, rng):
    """The proof with one bit flipped, one hash missing, and one too many."""
    place = rng.randrange(len(proof))
    bit = bytearray(proof[place])
    bit[rng.randrange(32)] ^= 1 << rng.randrange(8)
    yield (*proof[:place], bytes(bit), *proof[place + 1 :])
    yield (*proof[:place], *proof[place + 1 :])
    yield (*proof, bytes(32))


@pytest.fixture(scope="module")
def leaves():
    rng = random.Random(6962)
    return [rng.randbytes(rng.randrange(40)) for _ in range(300)]


@pytest.fixture(scope="module")
def tree(leaves):
    return Tree(leaves)


def test_the_published_roots_and_proofs_come_out():
    tree = Tree(LEAVES)
    assert [tree.root(size).hex() for size in range(9)] == ROOTS
    for (index, size), path in INCLUSION.items():
        assert merkle.inclusion(tree, index, size) == hashes(path)
    for (old, new), path in CONSISTENCY.items():
        assert merkle.consistency(tree, old, new) == hashes(path)


def test_the_published_proofs_verify():
    roots = hashes(ROOTS)
    for (index, size), path in INCLUSION.items():
        merkle.verify_inclusion(merkle.leaf_hash(LEAVES[index]), index, size, hashes(path), roots[size])
    for (old, new), path in CONSISTENCY.items():
        merkle.verify_consistency(old, new, roots[old], roots[new], hashes(path))


def test_the_root_of_every_size_to_300_is_that_of_the_definition(leaves, tree):
    for size in range(301):
        assert tree.root(size) == defined_root(leaves[:size])
    assert merkle.root(tree.edge) == tree.root(300)


def test_a_tree_of_n_leaves_stores_fewer_than_n_subtrees_above_them(tree):
    assert len([level for level, _ in tree.nodes if level]) == sum(300 >> level for level in range(1, 10))


def test_many_hashes_at_once_are_those_one_by_one(leaves):
    found = merkle.leaf_hashes([(body,) for body in leaves])
    assert found == [merkle.leaf_hash(body) for body in leaves]
    pairs = [merkle.node_hash(found[at], found[at + 1]) for at in range(0, 298, 2)]
    assert merkle.node_hashes(found[:299]) == pairs  # the last has no neighbour


def test_inclusion_of_every_leaf_in_every_size_to_70_is_proved_and_nothing_else(leaves, tree):
    rng = random.Random(1)
    for size in range(1, 71):
        root = tree.root(size)
        for index in range(size):
            leaf = merkle.leaf_hash(leaves[index])
            proof = merkle.inclusion(tree, index, size)
            merkle.verify_inclusion(leaf, index, size, proof, root)
            wrong = [(bytes(32), index, size, proof, root), (leaf, index, size, proof, bytes(32))]
            wrong += [(leaf, (index + 1) % size, size, proof, root)] if size > 1 else []
            wrong += [(leaf, index, size, bad, root) for bad in (altered(proof, rng) if proof else [])]
            for values in wrong:
                with pytest.raises(AuditError, match="does not show that entry"):
                    merkle.verify_inclusion(*values)


def test_consistency_of_all_pairs_of_sizes_to_70_is_proved_and_nothing_else(tree):
    rng = random.Random(2)
    for new in range(71):
        for old in range(new + 1):
            roots = tree.root(old), tree.root(new)
            proof = merkle.consistency(tree, old, new)
            merkle.verify_consistency(old, new, *roots, proof)
            wrong = [(bytes(32), roots[1], proof)]
            wrong += [(roots[0], bytes(32), proof)] if old else []
            wrong += [(*roots, bad) for bad in (altered(proof, rng) if proof else [])]
            wrong += [] if proof else [(*roots, (bytes(32),))]
            for values in wrong:
                with pytest.raises(AuditError, match="is not shown to begin with"):
                    merkle.verify_consistency(old, new, *values)


def test_a_proof_of_other_sizes_is_refused(tree):
    proof = merkle.consistency(tree, 6, 8)
    for old, new in ((8, 6), (-1, 8), (7, 8)):
        with pytest.raises(AuditError, match="is not shown to begin with"):
            merkle.verify_consistency(old, new, tree.root(6), tree.root(8), proof)
    leaf = tree(0, 7)
    for index, size in ((8, 8), (-1, 8), (7, 0)):
        with pytest.raises(AuditError, match="does not show that entry"):
            merkle.verify_inclusion(leaf, index, size, merkle.inclusion(tree, 7, 8), tree.root(8))


def test_hashes_of_another_length_are_refused(tree):
    short = tree(0, 0)[:31]
    with pytest.raises(AuditError, match="not 32 bytes"):
        merkle.verify_inclusion(tree(0, 1), 1, 2, (short,), tree.root(2))
    with pytest.raises(AuditError, match="not 32 bytes"):
        merkle.verify_consistency(1, 2, short, tree.root(2), (tree(0, 1),))


def test_what_cannot_be_proved_is_refused(tree):
    with pytest.raises(AuditError, match="no entry 8 in a log of 8; name one from 0 to 7"):
        merkle.inclusion(tree, 8, 8)
    with pytest.raises(
        AuditError, match="a log of 3 entries cannot begin with one of 8; name the smaller size first"
    ):
        merkle.consistency(tree, 8, 3)

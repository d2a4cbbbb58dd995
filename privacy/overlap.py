"""Which loans of a data snapshot are in which other snapshots, so that their spend comes along.

A loan's spend is the composition of all that left of every snapshot it is in. Loans that are in the same snapshots
have the same spend, and a loan that is in more of them has more: it is enough to look at the largest sets.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedfin.privacy.snapshot import ROW_BYTES, Snapshot

__all__ = ["memberships"]


def memberships(snapshot: str, known: Mapping[str, Snapshot | None]) -> tuple[frozenset[str], ...]:
    """Return the sets of snapshots that loans of one snapshot are in, only the largest.

    Args:
        snapshot: The digest of the snapshot whose loans are asked for; a key of `known`.
        known: All snapshots to look at, by digest; None for one whose loans are not recorded.

    Returns:
        Sets that all hold `snapshot`, none within another; at least one. Where loans cannot be compared (not
        recorded, or digests of another scheme) every loan is taken to be in both.
    """
    own = known[snapshot]
    alike = {
        name: other
        for name, other in known.items()
        if name != snapshot and own is not None and other is not None and other.scheme == own.scheme
    }
    certain = frozenset(known) - frozenset(alike)
    if own is None or not alike:
        return (certain,)
    rows = _digests(own)
    inside = np.column_stack([np.isin(rows, _digests(other), assume_unique=True) for other in alike.values()])
    names = np.array(list(alike), dtype=object)
    sets = [certain | frozenset(names[pattern]) for pattern in np.unique(inside, axis=0)]
    return tuple(one for one in sets if not any(one < other for other in sets))


def _digests(snapshot: Snapshot) -> NDArray[np.bytes_]:
    # of equal width, so that NumPy's reading of trailing zero bytes as padding makes no two digests equal
    return np.frombuffer(snapshot.rows, dtype=f"S{ROW_BYTES}")

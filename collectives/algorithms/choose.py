"""Which algorithm a reduction or a broadcast takes.

Pure, and of what all members know alike: the size, the members' hosts in the view, and what the caller said. Nothing
is measured while a group runs, so members cannot come to different choices; the name goes with each member's part, so
different versions are a Mismatch. The figures are those of benchmarks/algorithms.py, see docs/groups.md.

    up to EAGER_BYTES                                     eager (before any of this)
    one host, two members, or 16-bit floats               direct
    aligned hosts of several members, BY_HOST_BYTES       by host     [Note: aligned hosts]
    a power of two of members, up to HALVING_BYTES        halving
    aligned hosts of several members                      by host
    RING_BYTES or more                                    ring        only where not deterministic
    else                                                  direct

Where not deterministic, all hosts of equally many members count as aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

BY_HOST_BYTES = 1 << 20  # below it trips cost more than bytes
HALVING_BYTES = 4 << 20  # above it direct is ahead, as it combines one block while the next ones travel
RING_BYTES = 8 << 20
SPREAD_BYTES = 1 << 20


def choose_reduce(nbytes: int, hosts: Sequence[str], deterministic: bool, widens: bool) -> str:
    """`hosts`: of each member; `widens`: parts are combined in a wider type, which would travel."""
    n, groups = len(hosts), by_host(hosts)
    if n <= 2 or len(groups) == 1 or widens:
        return "direct"
    even = len({len(group) for group in groups}) == 1 and len(groups[0]) > 1
    aligned = even and (are_aligned(groups) or not deterministic)
    if aligned and nbytes >= BY_HOST_BYTES:
        return "by host"
    if n & (n - 1) == 0 and nbytes <= HALVING_BYTES:
        return "halving"
    if aligned:
        return "by host"
    if not deterministic and nbytes >= RING_BYTES:
        return "ring"
    return "direct"


def choose_broadcast(nbytes: int, hosts: Sequence[str]) -> str:
    """The root's connection is what limits a large broadcast to several hosts."""
    return "spread" if len(hosts) == len(set(hosts)) > 2 and nbytes >= SPREAD_BYTES else "moves"


def by_host(hosts: Sequence[str]) -> list[list[int]]:
    """Members of each host, hosts in the order of their first member."""
    groups: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)
    return list(groups.values())


def are_aligned(groups: Sequence[Sequence[int]]) -> bool:
    """Whether each host is a subtree of the rank tree: see [Note: aligned hosts]."""
    m = len(groups[0])
    return m & (m - 1) == 0 and all(list(group) == list(range(i * m, i * m + m)) for i, group in enumerate(groups))

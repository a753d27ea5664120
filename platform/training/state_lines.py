"""The state hash of a run, computed by all ranks together: each hashes its share of the tensors.

[Note: state hash] `state_sha256` is SHA-256 over the sorted lines (name, kind, dtype, shape, SHA-256 of the
unpadded bytes), tied tensors once, and the step; see everstep.storage.state_hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import torch

from everstep.collectives.tensors import bytes_of
from everstep.platform.training.exchange import Group
from everstep.platform.training.layout import Run
from everstep.platform.training.shard import RankState
from everstep.storage.index import TensorMeta
from everstep.storage.state_hash import tensor_line

_TAG = 1 << 60


class _Part(msgspec.Struct, array_like=True):
    tensor: int
    start: int
    data: bytes


def hash_lines(
    state: RankState, owned: Sequence[Sequence[Run]], group: Group | None, timeout_s: float, everywhere: bool
) -> tuple[str, ...]:
    """This rank's lines: tensor i of the sorted state is hashed by rank i modulo ranks. Raises ViewOver.

    `everywhere`: every rank holds everything (ZeRO 0), so nothing needs to be sent.
    """
    metas = state.metas()
    position = {meta.key: i for i, meta in enumerate(metas)}
    rank, ranks = (group.rank, group.size) if group is not None else (0, 1)
    outgoing: list[list[_Part]] = [[] for _ in range(ranks)]
    for place in state.places(None if everywhere else owned[rank]):
        index = position[place.meta.key]
        outgoing[index % ranks].append(
            _Part(index, place.start, place.tensor.contiguous().view(torch.uint8).numpy().tobytes())
        )
    incoming = list(outgoing[rank])
    if group is not None and not everywhere:
        for data in _exchange(group, [msgspec.msgpack.encode(parts) for parts in outgoing], timeout_s):
            incoming += msgspec.msgpack.decode(data, type=list[_Part])
    parts: dict[int, dict[int, bytes]] = {}
    for part in incoming:
        parts.setdefault(part.tensor, {})[part.start] = part.data
    return tuple(_line(metas[i], parts.get(i, {})) for i in range(rank, len(metas), ranks))


def _exchange(group: Group, outgoing: Sequence[bytes], timeout_s: float) -> list[memoryview]:
    """Sends `outgoing[r]` to rank r; what the others sent. How much that is has to be said first."""
    peers = [peer for peer in range(group.size) if peer != group.rank]
    sizes = torch.empty(group.size, dtype=torch.int64)
    group.all_to_all(sizes, torch.tensor([len(data) for data in outgoing]), _TAG).wait(timeout_s)
    incoming = {peer: torch.empty(int(sizes[peer]), dtype=torch.uint8) for peer in peers}
    works = [group.recv_parts([incoming[peer]], peer, _TAG) for peer in peers]
    works += [
        group.send_parts([torch.frombuffer(bytearray(outgoing[peer]), dtype=torch.uint8)], peer, _TAG)
        for peer in peers
    ]
    for work in works:
        work.wait(timeout_s)
    return [bytes_of(incoming[peer]) for peer in peers]


def _line(meta: TensorMeta, parts: dict[int, bytes]) -> str:
    data = b"".join(parts[start] for start in sorted(parts))
    assert len(data) == meta.nbytes, f"{meta.name}/{meta.kind}: {len(data)} of {meta.nbytes} bytes"
    return tensor_line(meta, hashlib.sha256(data).hexdigest())

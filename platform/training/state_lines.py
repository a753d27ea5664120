"""The state hash of a run, computed by all ranks together: each hashes its share of the tensors.

[Note: state hash] `state_sha256` is SHA-256 over the sorted lines (name, kind, dtype, shape, SHA-256 of the
unpadded bytes), tied tensors once, and the step; see everstep.storage.state_hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import torch

from everstep.platform.training.exchange import Wire
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
    state: RankState, owned: Sequence[Sequence[Run]], wire: Wire | None, timeout_s: float
) -> tuple[str, ...]:
    """This rank's lines: tensor i of the sorted state is hashed by rank i modulo ranks. Raises ViewOver."""
    metas = state.metas()
    position = {meta.key: i for i, meta in enumerate(metas)}
    rank, ranks = (wire.rank, wire.size) if wire is not None else (0, 1)
    outgoing: list[list[_Part]] = [[] for _ in range(ranks)]
    for place in state.places():
        index = position[place.meta.key]
        outgoing[index % ranks].append(
            _Part(index, place.start, place.tensor.contiguous().view(torch.uint8).numpy().tobytes())
        )
    whole = sum(stop - start for start, stop in state.held) == state.layout.total  # ZeRO 0: nothing to send
    incoming = list(outgoing[rank])
    if wire is not None and not whole:
        for peer in range(ranks):
            if peer != rank:
                wire.send(peer, _TAG, [memoryview(msgspec.msgpack.encode(outgoing[peer]))])
        for peer in range(ranks):
            if peer != rank:
                incoming += msgspec.msgpack.decode(wire.recv(peer, _TAG, timeout_s), type=list[_Part])
        wire.flush()
    parts: dict[int, dict[int, bytes]] = {}
    for part in incoming:
        parts.setdefault(part.tensor, {})[part.start] = part.data
    return tuple(_line(metas[i], parts.get(i, {})) for i in range(rank, len(metas), ranks))


def _line(meta: TensorMeta, parts: dict[int, bytes]) -> str:
    data = b"".join(parts[start] for start in sorted(parts))
    assert len(data) == meta.nbytes, f"{meta.name}/{meta.kind}: {len(data)} of {meta.nbytes} bytes"
    return tensor_line(meta, hashlib.sha256(data).hexdigest())

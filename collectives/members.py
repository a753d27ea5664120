"""All members of one view, as one of them sees them: the operations of a group over the view's mesh.

Beside those, moves of several tensors of any sizes at once, which is what a training step sends: the parts of a
gradient that one rank owns, the parameters that each rank has updated. They leave from where they are and arrive
where they belong; only what is small is copied once more. Thread-safety: that of the mesh.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from everstep.collectives.algorithms import parts as build
from everstep.collectives.algorithms.moves import Parts
from everstep.collectives.algorithms.parts import are_small
from everstep.collectives.arguments import name_of
from everstep.collectives.mesh import Mesh
from everstep.collectives.operations import Collectives, Operation
from everstep.collectives.transport.frames import RECEIVER, SENDER
from everstep.collectives.work import Work


class Members(Collectives):
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    @property
    def rank(self) -> int:
        return self._mesh.rank

    @property
    def size(self) -> int:
        return self._mesh.size

    def _submit(self, operation: Operation) -> Work:
        return self._mesh.submit(operation)

    def send_parts(self, parts: Parts, to: int, tag: int = 0) -> Work:
        """To the `recv_parts` of rank `to` with the same tag and sizes; see `send`."""
        made, ranks, alone = build.pair(parts, sending=True), (self.rank, to), self._goes_alone(parts, [to])
        return self._submit(Operation("move", _match([parts]), tag, made, (), alone, (), SENDER, to, ranks))

    def recv_parts(self, parts: Parts, source: int, tag: int = 0) -> Work:
        """From the `send_parts` of rank `source` with the same tag and sizes; see `recv`."""
        made, ranks, alone = build.pair(parts, sending=False), (source, self.rank), self._goes_alone(parts, [source])
        return self._submit(Operation("move", _match([parts]), tag, made, parts, alone, (), RECEIVER, source, ranks))

    def _goes_alone(self, parts: Parts, peers: Sequence[int]) -> bool:
        """Whether the mesh's thread is to leave it to `wait` and `done`.

        In shared memory there is no network to keep busy: what it would move in the meantime, it would take from the
        computing, and 180 times a step (gpt.yaml, 4 ranks) its wake-up, the interpreter lock and warm caches as well.
        """
        return are_small(parts) or all(self._mesh.is_near(peer) for peer in peers)

    def share_parts(self, parts: Sequence[Parts], tag: int = 0) -> Work:
        """`parts[r]` is what rank r brings, and where it goes on all others: an all-gather of any sizes, in place."""
        assert len(parts) == self.size, f"parts of {len(parts)} members, of {self.size}"
        writes = [part for rank, theirs in enumerate(parts) if rank != self.rank for part in theirs]
        alone = self._goes_alone(
            [part for theirs in parts for part in theirs], [peer for peer in range(self.size) if peer != self.rank]
        )
        return self._submit(Operation("share", _match(parts), tag, build.share(parts), writes, alone))


def _match(parts: Sequence[Parts]) -> tuple[str, int, int]:
    """Says who brings how much; the sizes of thousands of parts would not fit into an OPEN."""
    sizes = [[part.numel() for part in theirs] for theirs in parts]
    dtypes = {name_of(part.dtype) for theirs in parts for part in theirs}
    return "|".join(sorted(dtypes)), sum(map(sum, sizes)), zlib.crc32(repr(sizes).encode())

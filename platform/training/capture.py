"""Copies a rank's state into a segment while training goes on.

[Note: window] State changes in `apply` only. So a snapshot begins right behind one apply, and all that the next one
has to wait for is that the copy is done: checksums, seal and parity are nobody's wait. Where somebody waits, the rest
is copied first and its checksums are made afterwards from the segment.

A `Capture` is made by the training thread, `run` by one thread of its maker's, its waits are the training thread's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
import xxhash

from everstep.platform.training.layout import Run
from everstep.platform.training.shard import RankState
from everstep.storage.segment import Seal, SegmentMap, Writer

_PIECE_BYTES = 1 << 20  # the checksum reads what the copy left in the cache


class Capture:
    """One version on its way into `segment`, cut for `view` (epoch, number). Raises SegmentFull.

    `runs`: what to write of what the rank holds (all of it). `before_seal` is called when everything but the seal is
    written; what it raises leaves the segment unsealed.
    """

    def __init__(
        self,
        segment: SegmentMap,
        state: RankState,
        view: tuple[int, int],
        before_seal: Callable[[], None] = lambda: None,
        runs: Sequence[Run] | None = None,
    ) -> None:
        self.step = state.stamp
        self.cpu_s = 0.0  # of `run`
        self.view = view
        self._before_seal = before_seal
        self._writer = Writer(segment)
        self._writer.begin()
        for meta in state.metas():
            # Every index lists the whole state's tensors: one that only a lost domain holds would otherwise be in
            # nobody's index, and its step would wrongly count as covered.
            self._writer.place(meta, 0, 0)
        self._parts: list[tuple[int, torch.Tensor, memoryview]] = []
        for place in state.places() if runs is None else state.places(runs):
            room = self._writer.place(place.meta, place.start, place.stop)
            if len(room):
                source = place.tensor.detach().reshape(-1).view(torch.uint8)
                self._parts.append((self._writer.placed - 1, source, room))
        self._copied = threading.Event()
        self._ended = threading.Event()
        self._hurry = False
        self._error: BaseException | None = None
        self.seal: Seal | None = None

    def run(self) -> None:
        """Copies, checks and seals; never raises: whoever waits gets the error."""
        began = time.thread_time()
        try:
            owed = [(n, room) for n, source, room in self._parts if not self._copy(n, source, room)]
            self._parts.clear()
            self._copied.set()
            for n, room in owed:
                self._writer.checked(n, xxhash.xxh3_64_intdigest(room))
            self._before_seal()
            self.seal = self._writer.seal(*self.view, self.step)
        except BaseException as error:
            self._error = error
        self.cpu_s = time.thread_time() - began
        self._parts.clear()
        self._copied.set()
        self._ended.set()

    def _copy(self, n: int, source: torch.Tensor, room: memoryview) -> bool:
        """False where the checksum is still to be made."""
        target = torch.frombuffer(room, dtype=torch.uint8)
        checksum = None if self._hurry else xxhash.xxh3_64()
        for first in range(0, len(room), _PIECE_BYTES):
            piece = target[first : first + _PIECE_BYTES]
            piece.copy_(source[first : first + _PIECE_BYTES])  # without the interpreter lock
            if checksum is not None:
                checksum.update(room[first : first + _PIECE_BYTES])
                if self._hurry:
                    checksum = None
        if checksum is None:
            return False
        self._writer.checked(n, checksum.intdigest())
        return True

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for the copy, so that checksums come later."""
        return self._hurry

    @property
    def ended(self) -> bool:
        """Whether `wait` would not wait."""
        return self._ended.is_set()

    def release(self) -> float:
        """Waits until the state may change; seconds waited. Raises what the copy raised."""
        return self._wait(self._copied, hurry=True)

    def wait(self) -> float:
        """Waits until it is sealed; seconds waited. Raises what kept it from that."""
        return self._wait(self._ended, hurry=False)

    def _wait(self, event: threading.Event, hurry: bool) -> float:
        waited = 0.0
        if not event.is_set():
            self._hurry = self._hurry or hurry
            began = time.perf_counter()
            event.wait()
            waited = time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return waited


def write_snapshot(
    segment: SegmentMap,
    state: RankState,
    view: tuple[int, int],
    before_seal: Callable[[], None] = lambda: None,
    runs: Sequence[Run] | None = None,
) -> Seal:
    """Writes and seals `state` at its stamp at once, in the caller's thread. Raises SegmentFull."""
    capture = Capture(segment, state, view, before_seal, runs)
    capture.run()
    capture.wait()
    assert capture.seal is not None
    return capture.seal

"""A rank's snapshots: its slots, the copy that is under way, and what its manager says of their parity.

Belongs to the training thread; one thread of its own copies ([Note: window]). `heard` may be called from any thread,
under the condition that was given.

[Note: one at a time] No snapshot begins before the newest one is protected: a rank waits for its domain's parity
before it votes on a step that a snapshot may follow, and the desk asks for none where a vote says otherwise. So two
slots and two parity segments are enough, and what is being written over is never what a recovery would read. The
exception is a rank that is asked for its inventory: it seals its state where no slot is spent into one slot more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from everstep.actors.config import ParityGroup, SaveSegment, Secured, SegmentSealed, SlotsGiven, SlotsWanted
from everstep.collectives.errors import PeerLost
from everstep.platform.training.capture import Capture, write_snapshot
from everstep.platform.training.layout import Run
from everstep.platform.training.messages import Verdict
from everstep.platform.training.shard import RankState
from everstep.storage.errors import StorageError
from everstep.storage.parity import parity_capacity
from everstep.storage.segment import SegmentMap, required_bytes, sizes_of
from everstep.storage.versions import Slots

_MIRROR = 100  # a number that no slot has


class Link(Protocol):
    """The rank's way to its manager, and its waits."""

    def note(self, kind: str, payload: bytes = b"") -> None: ...

    def wait(self, ready: Callable[[], bool], what: str, heed_view: bool = True) -> None:
        """Holds the condition. Raises PeerLost when the view is over, RunOver when the run is."""


class Place:
    """Where a rank stands in its view: what its snapshots are labelled with, and who keeps parity of them."""

    def __init__(
        self,
        label: tuple[int, int],
        rank: int,
        group: Sequence[tuple[str, str, Sequence[Run]]] = (),
        position: int = 0,
        parity: int = 0,
    ) -> None:
        self.label = label
        self.rank = rank
        self.group = tuple(group)  # by position: domain, fetch address, what that rank writes
        self.position = position
        self.parity = parity


class Snapshots:
    def __init__(self, link: Link, condition: threading.Condition, steps: int, every: int) -> None:
        """`steps`: the run's; `every`: steps between two checkpoints, 0 without."""
        self._link = link
        self._condition = condition
        self._steps = steps
        self._every = every
        self._place = Place((0, 0), 0)
        self._made: tuple[int, int] | None = None  # the view that the slots are for
        self._capacity_bytes = 0
        self._slots = Slots.empty(2)
        self._maps: list[SegmentMap] = []
        self._mirror: SegmentMap | None = None  # for what is mirrored, written when the view is over
        self._mirror_sealed = (0, 0, -1)  # epoch, view number, step
        self._capture: tuple[Capture, int] | None = None  # and its slot
        self._sealed = self._secured = -1
        self._interval = 1
        self._checkpoint = (-1, "")  # step and folder of the one that the newest verdict asked for
        self._ordered: SaveSegment | None = None  # of the newest capture
        self._pinned: dict[str, int] = {}  # segment path -> step, while it is being written to a checkpoint
        self._cpu_s = 0.0
        self._given: SlotsGiven | None = None
        self._saved: list[str] = []  # segment paths whose checkpoint file is written
        self._parity: dict[int, Secured] = {}  # by step, of the present view
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="snapshot")

    # ---- what is heard; any thread, under the condition -------------------------------------------------

    def heard(self, kind: str, payload: bytes) -> None:
        if kind == "slots":
            self._given = msgspec.msgpack.decode(payload, type=SlotsGiven)
        elif kind == "saved":
            self._saved.append(msgspec.msgpack.decode(payload, type=str))
        elif kind == "secured":
            told = msgspec.msgpack.decode(payload, type=Secured)
            if told.label == self._place.label:
                self._parity[told.step] = told

    # ---- for the conductor ------------------------------------------------------------------------------

    def sit(self, place: Place, checkpoint: tuple[int, str] = (-1, "")) -> None:
        """The rank has taken its seat in a view; `checkpoint`: step and folder of one to write from its snapshot."""
        with self._condition:
            self._place = place
            self._parity.clear()
        self._sealed = self._secured = -1
        self._interval = 1
        self._checkpoint = checkpoint

    def heed(self, step: int, verdict: Verdict) -> None:
        if (
            verdict.protected_step >= 0
            and self._slots.index_of(verdict.protected_step, self._place.label) is not None
        ):
            self._slots = self._slots.protected(verdict.protected_step, self._place.label)
        self._interval = verdict.interval
        self._checkpoint = (step, verdict.checkpoint)

    def begin(
        self,
        state: RankState,
        before_seal: Callable[[], None],
        runs: Sequence[Run] | None,
        wait: bool,
        protect: bool = True,
    ) -> float:
        """Begins to write the state at its stamp; `wait`: in this thread, to the end. Seconds that it took.

        `protect`: its parity follows. Not for what is sealed when the view is over: it would be written over what
        may be the newest whole one.
        """
        began = time.perf_counter()
        label, step = self._place.label, state.stamp
        self.finish()
        if self._made != label:
            self._take_slots(state)
        if self._slots.index_of(step, label) is not None:
            self._sealed = max(self._sealed, step)
            return 0.0
        index = self._reserve(step, state)
        try:
            capture = Capture(self._maps[index], state, label, before_seal, runs)
        except BaseException:
            self._slots = self._slots.abandoned(index)
            raise
        self._capture = (capture, index)
        self._ordered = self._order(step, self._maps[index].path)
        if wait:
            self._run(capture, index, self._ordered, protect)
            self.finish()
        else:
            self._copier.submit(self._run, capture, index, self._ordered, protect)
        return time.perf_counter() - began

    def seal_mirror(self, state: RankState) -> None:
        """Writes what is mirrored at its stamp, in this thread. Once in a view: when it is over."""
        version = (*self._place.label, state.stamp)
        if version == self._mirror_sealed:
            return
        if self._made != self._place.label:
            self._take_slots(state)
        assert self._mirror is not None, "the view mirrors nothing"
        write_snapshot(self._mirror, state, self._place.label, runs=state.mirrored)
        self._mirror_sealed = version

    def release(self) -> float:
        """Returns when the state may change; seconds waited."""
        return self._capture[0].release() if self._capture is not None else 0.0

    def protect(self, step: int, now: bool = False) -> float:
        """Before the vote on `step`: waits for the newest snapshot's parity where a snapshot may follow that step.

        Seconds waited. Raises PeerLost.
        """
        newest = max(self._sealed, self._capture[0].step if self._capture is not None else -1)
        may_follow = (
            now
            or step >= newest + self._interval
            or step >= self._steps
            or (self._every > 0 and step % self._every == 0)
        )
        began = time.perf_counter()
        if may_follow or (self._capture is not None and self._capture[0].ended):
            self.finish()
        if self._place.parity and self._sealed >= 0:
            with self._condition:
                if may_follow:
                    self._link.wait(lambda: self._sealed in self._parity, f"parity of step {self._sealed}")
                told = self._parity.get(self._sealed)
            if told is None:
                return time.perf_counter() - began
            if told.error:
                raise PeerLost(f"no parity of step {told.step}: {told.error}")
            if told.step > self._secured:
                self._cpu_s += told.cpu_s
        self._secured = max(self._secured, self._sealed)
        return time.perf_counter() - began

    def secured_step(self) -> int:
        """Step of the newest snapshot under the present layout that is sealed here, with this domain's parity."""
        return self._secured

    def take_cpu_s(self) -> float:
        """CPU time that went into snapshots since this was last asked."""
        spent, self._cpu_s = self._cpu_s, 0.0
        return spent

    def finish(self) -> None:
        """Waits until nothing is being written. Raises what the copy raised."""
        if self._capture is None:
            return
        capture, index = self._capture
        self._capture = None
        try:
            capture.wait()
        except BaseException:
            self._slots = self._slots.abandoned(index)
            raise
        self._cpu_s += capture.cpu_s
        self._slots = self._slots.sealed(index, capture.step)
        self._sealed = capture.step
        if self._ordered is not None:
            self._slots = self._slots.pin(capture.step)
            self._pinned[self._ordered.path] = capture.step

    def close(self) -> None:
        self._copier.shutdown(wait=True)
        self._close_maps()

    # ---- inside -----------------------------------------------------------------------------------------

    def _close_maps(self) -> None:
        for segment in [*self._maps, *([self._mirror] if self._mirror is not None else [])]:
            segment.close()
        self._maps, self._mirror = [], None

    def _order(self, step: int, path: str) -> SaveSegment | None:
        """The checkpoint that the newest verdict, or the view, asks for, if it is of this step."""
        wanted, folder = self._checkpoint
        if wanted <= step:
            self._checkpoint = (-1, "")
        if not folder or wanted != step:
            return None
        return SaveSegment(path, step, folder, f"rank-{self._place.rank:05d}.safetensors")

    def _run(self, capture: Capture, index: int, ordered: SaveSegment | None, protect: bool) -> None:
        """The manager hears of the seal at once, from this thread, and of the checkpoint: nobody may need this rank
        to live on for a file of what it has sealed."""
        capture.run()
        if capture.seal is not None:
            protect = protect and self._place.parity > 0
            sealed = SegmentSealed(capture.view, capture.step, self._maps[index].path, protect)
            self._link.note("sealed", msgspec.msgpack.encode(sealed))
            if ordered is not None:
                self._link.note("save", msgspec.msgpack.encode(ordered))

    def _reserve(self, step: int, state: RankState) -> int:
        with self._condition:
            while True:
                for path in self._saved:  # of an older layout's segments nothing is kept here any more
                    if (pinned := self._pinned.pop(path, None)) is not None:
                        self._slots = self._slots.unpin(pinned)
                self._saved.clear()
                self._slots, index, why = self._slots.reserve(step, self._place.label)
                if index is not None:
                    return index
                if not self._pinned:
                    break
                self._link.wait(lambda: bool(self._saved), f"a slot for step {step}: {why}", heed_view=False)
        self._maps += self._ask(SlotsWanted(self._made or (0, 0), self._capacity_bytes, 1, len(self._maps)))
        self._slots = self._slots.with_one_more()
        return self._reserve(step, state)

    def _take_slots(self, state: RankState) -> None:
        """Segments for this view's layout; the old ones stay with the manager until these are protected."""
        place = self._place
        count = 3 if self._every else 2  # one may be kept while a checkpoint is written from it
        self._capacity_bytes = required_bytes(state.footprint(state.own))
        group = None
        if place.parity:
            needed = parity_capacity([sizes_of(state.footprint(runs)) for _, _, runs in place.group], place.parity)
            members = tuple((domain, address) for domain, address, _ in place.group)
            group = ParityGroup(members, place.position, place.parity, needed)
        paths = self._ask(SlotsWanted(place.label, self._capacity_bytes, count, 0, group))
        self._close_maps()
        self._maps = paths
        if state.mirrored:
            needed = required_bytes(state.footprint(state.mirrored))
            (self._mirror,) = self._ask(SlotsWanted(place.label, needed, 1, _MIRROR))
        self._slots = Slots.empty(count)
        self._pinned.clear()
        self._made = place.label

    def _ask(self, wanted: SlotsWanted) -> list[SegmentMap]:
        with self._condition:
            self._given = None
        self._link.note("slots", msgspec.msgpack.encode(wanted))
        with self._condition:
            self._link.wait(
                lambda: self._given is not None and self._given.label == wanted.label, "segments", heed_view=False
            )
            given = self._given
        assert given is not None
        if given.error:
            raise StorageError(given.error)
        return [SegmentMap(path, writable=True) for path in given.paths]

"""The slots of one trainer's snapshots: which of them the next snapshot may use.

A slot is a segment. Its version is (step, view): one step may be cut for two views, when a recovery writes
its base step again in the new layout. The manager of a domain keeps one `Slots` for each trainer slot it
serves.

    state      event                     next       allowed when
    free       reserve(step, view)       writing    the version is not older than the newest protected one,
                                                    and in no slot yet
    sealed     reserve(step, view)       writing    the same, and the slot is spent (below)
    protected  reserve(step, view)       writing    the same, and the slot is spent (below)
    writing    sealed(index, step)       sealed     it is this step that is being written
    writing    abandoned(index)          free       always: the writer died or gave up
    sealed     protected(step, view)     protected  some slot holds the version (a repeat changes nothing)
    sealed     rolled_back(step)         free       its step is above a recovery's base and not pinned
    any        pin(step)                 same       a sealed or protected slot holds the step
    any        unpin(step)               same       the step is pinned

A slot is spent when its version is older than the newest protected one and its step is not pinned: a
checkpoint in writing pins the step it reads. So the newest protected version, which a recovery would restore,
is never overwritten, nor is a younger sealed one that may still become protected. Two slots are enough to go
on without a pinned one; a third keeps a checkpoint in writing from stalling the snapshots.

Pure: no clock, no I/O; values are frozen and safe in any thread. Anything outside the table raises
InvalidTransition with the recent events.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NoReturn, Self

from everstep.storage.errors import InvalidTransition

_RECENT: Final = 16
View = tuple[int, int]  # (epoch, number)
State = Literal["free", "writing", "sealed", "protected"]


@dataclass(frozen=True, order=True)
class Version:
    """One snapshot: the step, and the view (epoch, number) in whose layout it is cut."""

    step: int
    view: View = (0, 0)

    def __str__(self) -> str:
        return f"step {self.step} of view {self.view}"


@dataclass(frozen=True)
class Slot:
    """One segment's state; `version` is set unless it is free."""

    state: State = "free"
    version: Version | None = None

    def holds(self, version: Version | None) -> bool:
        """Whether a sealed or protected version is here, and this is it."""
        return version is not None and self.version == version and self.state in ("sealed", "protected")


@dataclass(frozen=True)
class Slots:
    """The slots, the pins (step, how many times), and the last events for error messages."""

    slots: tuple[Slot, ...]
    pins: tuple[tuple[int, int], ...] = ()
    recent: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def empty(cls, count: int) -> Self:
        """`count` free slots; at least two, or every snapshot would overwrite the protected one."""
        assert count >= 2, f"{count} snapshot slots"
        return cls((Slot(),) * count)

    @classmethod
    def adopt(cls, versions: Sequence[Version | None]) -> Self:
        """Slots as their seals tell (None: not sealed), for a manager that takes over its predecessor's
        segments.

        What is protected is not in the seals: the caller reports it by `protected`.
        """
        assert len(versions) >= 2, f"{len(versions)} snapshot slots"
        return cls(tuple(Slot() if version is None else Slot("sealed", version) for version in versions))

    @property
    def newest_protected(self) -> int | None:
        """Step of the newest protected version; None before the first."""
        newest = self._newest()
        return None if newest is None else newest.step

    def index_of(self, step: int, view: View | None = None) -> int | None:
        """The slot in which `step` is sealed or protected (in the newest view, unless one is named)."""
        found = [
            (slot.version, index)
            for index, slot in enumerate(self.slots)
            if slot.version is not None
            and slot.holds(slot.version)
            and slot.version.step == step
            and view in (None, slot.version.view)
        ]
        return max(found)[1] if found else None

    def reserve(self, step: int, view: View = (0, 0)) -> tuple[Self, int | None, str]:
        """Take a slot to write `step` into: (next slots, its index or None: the writer has to wait, why)."""
        version = Version(step, view)
        event = f"reserve({step}, {view})"
        newest = self._newest()
        if newest is not None and version < newest:
            self._refuse(event, f"{newest} is protected already")
        for index, slot in enumerate(self.slots):
            if slot.version == version:
                self._refuse(event, f"slot {index} has it, {slot.state}")
        spent = [index for index, slot in enumerate(self.slots) if self._spent(slot, newest)]
        if not spent:
            return self._after(f"{event} waits"), None, f"no slot for {version}: {self._occupancy(newest)}"
        # A free slot first, then the one with the oldest version.
        index = min(spent, key=lambda i: (self.slots[i].version or Version(-1), i))
        former = self.slots[index]
        reason = f"slot {index}: {'free' if former.version is None else f'{former.version} is spent'}"
        return self._with(index, Slot("writing", version), f"{event} = {index}"), index, reason

    def with_one_more(self) -> Self:
        """A free slot more."""
        return replace(self._after("with_one_more"), slots=(*self.slots, Slot()))

    def sealed(self, index: int, step: int) -> Self:
        """The writer has sealed slot `index`."""
        event = f"sealed({index}, {step})"
        slot = self._slot(index, event)
        if slot.state != "writing" or slot.version is None or slot.version.step != step:
            self._refuse(event, f"slot {index} is {slot.state}, {slot.version or 'no version'}")
        return self._with(index, Slot("sealed", slot.version), event)

    def abandoned(self, index: int) -> Self:
        """The writer of slot `index` died or gave up before it sealed: what is there counts as nothing."""
        event = f"abandoned({index})"
        slot = self._slot(index, event)
        if slot.state != "writing":
            self._refuse(event, f"slot {index} is {slot.state}")
        return self._with(index, Slot(), event)

    def protected(self, step: int, view: View | None = None) -> Self:
        """Every domain has sealed `step`: it can be recovered (of the newest view, unless one is named)."""
        event = f"protected({step}{'' if view is None else f', {view}'})"
        index = self.index_of(step, view)
        if index is None:
            self._refuse(event, f"no slot has it: {self._occupancy(self._newest())}")
        return self._with(index, Slot("protected", self.slots[index].version), event)

    def rolled_back(self, step: int) -> Self:
        """A recovery goes back to `step`: sealed versions above it will be computed again and are given up.

        A writer that is still at work keeps its slot until `sealed` or `abandoned`. Protected versions stay,
        since a recovery never goes back behind one: InvalidTransition.
        """
        event = f"rolled_back({step})"
        newest = self._newest()
        if newest is not None and newest.step > step:
            self._refuse(event, f"{newest} is protected")
        slots = tuple(
            Slot() if slot.version is not None and self._given_up(slot.state, slot.version, step) else slot
            for slot in self.slots
        )
        return replace(self._after(event), slots=slots)

    def pin(self, step: int) -> Self:
        """Keep `step` until as many `unpin`: a checkpoint is being written from it."""
        event = f"pin({step})"
        if self.index_of(step) is None:
            self._refuse(event, f"no slot has it: {self._occupancy(self._newest())}")
        return self._pinned(step, +1, event)

    def unpin(self, step: int) -> Self:
        """Undo one `pin`."""
        event = f"unpin({step})"
        if step not in dict(self.pins):
            self._refuse(event, "it is not pinned")
        return self._pinned(step, -1, event)

    def _newest(self) -> Version | None:
        return max(
            (slot.version for slot in self.slots if slot.state == "protected" and slot.version is not None),
            default=None,
        )

    def _given_up(self, state: State, version: Version, base: int) -> bool:
        return state == "sealed" and version.step > base and version.step not in dict(self.pins)

    def _spent(self, slot: Slot, newest: Version | None) -> bool:
        if slot.version is None:
            return True
        if slot.state == "writing" or slot.version.step in dict(self.pins):
            return False
        return newest is not None and slot.version < newest

    def _occupancy(self, newest: Version | None) -> str:
        def told(index: int, slot: Slot) -> str:
            if slot.version is None:
                return f"slot {index} free"
            pinned = ", pinned" if slot.version.step in dict(self.pins) else ""
            kept = ", the newest protected" if slot.version == newest and slot.state == "protected" else ""
            return f"slot {index} {slot.state} with {slot.version}{kept}{pinned}"

        return "; ".join(told(index, slot) for index, slot in enumerate(self.slots))

    def _slot(self, index: int, event: str) -> Slot:
        if not 0 <= index < len(self.slots):
            self._refuse(event, f"there are {len(self.slots)} slots")
        return self.slots[index]

    def _with(self, index: int, slot: Slot, event: str) -> Self:
        slots = (*self.slots[:index], slot, *self.slots[index + 1 :])
        return replace(self._after(event), slots=slots)

    def _pinned(self, step: int, change: int, event: str) -> Self:
        pins = dict(self.pins)
        pins[step] = pins.get(step, 0) + change
        return replace(self._after(event), pins=tuple(sorted((s, n) for s, n in pins.items() if n)))

    def _after(self, event: str) -> Self:
        return replace(self, recent=(*self.recent, event)[-_RECENT:])

    def _refuse(self, event: str, why: str) -> NoReturn:
        raise InvalidTransition(event, why, self.recent)

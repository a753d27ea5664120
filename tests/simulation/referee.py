"""What must hold at every event, whatever happens. Sees everything; nobody in the simulation asks it.

1. At most one view of the highest epoch acts: once a newer view has been told to go, no member applies a
   verdict of an older one that was decided later.
2. No step is committed by part of a view: every member that applies a step has its verdict, and all the same.
3. State that is applied, sealed, restored or handed in at the end equals the reference, unit by unit.
4. A protected step is recoverable unless the memory of all (ZeRO 0) or any (else) of those that sealed it was
   lost with its host, or cannot be reached for longer than the patience. It gives way to the step that the
   next verdict protects, even where a voter's host was lost in between.
5. A zombie changes nothing: it joins no view and votes in none after it was declared dead in its epoch.
6. A view whose size is not the wanted one is replaced at the next step boundary.
7. Progress: with nothing broken for a while, steps are decided, and the run ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from everstep.collectives.messages import ViewId
from simulation.state import ALL, Value, verified
from simulation.world import World

STUCK_S = 20.0  # four times the patience of the simulated coordinators


class Violation(AssertionError):
    """An invariant does not hold."""


class Referee:
    def __init__(self, world: World, last_step: int, replicated: bool) -> None:
        self.world = world
        self.replicated = replicated
        self.last_step = last_step
        self.acting = ViewId(0, 0)
        self.acting_since = 0.0
        self.protected = 0
        self.finished = False
        self.stirred_s = 0.0  # when something last broke or moved on
        self.decided = 0
        self.rolled_back = 0
        self._verdicts: dict[tuple[ViewId, int], tuple[bytes, float]] = {}
        self._dead: dict[tuple[int, str], float] = {}
        self._outgrown = ViewId(0, 0)
        self._holders: set[str] = set()  # members that have sealed the newest protected step
        self._gone: set[str] = set()  # members whose seals went with their host

    def fail(self, text: str) -> None:
        self.world.log("VIOLATION: %s", text)
        raise Violation(text)

    def stir(self) -> None:
        """A fault or a repair: progress is owed only some time after it."""
        self.stirred_s = self.world.now

    def memory_lost(self, names: set[str]) -> None:
        """A host is gone with the seals of `names`. Sharded state has no redundancy between domains yet."""
        self._gone |= names
        if self._holders & names and not (self.replicated and self._holders - names):
            self.protected = 0
        self._holders -= names

    # ---- what coordinators do ---------------------------------------------------------------------------

    def chose(self, view: ViewId, base_step: int, patience_was_over: bool) -> None:
        if view < self.acting:
            return  # by a coordinator that was replaced: nobody follows it
        if base_step < self.protected and not patience_was_over:
            self.fail(f"view {view} starts from step {base_step}, but step {self.protected} was protected")
        if base_step < self.protected:
            self.protected = base_step
        self.stir()

    def went(self, view: ViewId) -> None:
        if view > self.acting:
            self.acting, self.acting_since = view, self.world.now
        self.stir()

    def judged(self, view: ViewId, step: int, payload: bytes, voters: set[str], protected: int) -> None:
        known = self._verdicts.setdefault((view, step), (payload, self.world.now))
        if known[0] != payload:
            self.fail(f"two verdicts on step {step} of view {view}")
        for name in voters:
            if (view.epoch, name) in self._dead:
                self.fail(f"{name} voted in view {view}, but it was declared dead")
        if view >= self.acting:
            self.decided = max(self.decided, step)
            holders = voters - self._gone
            whole = holders == voters or (self.replicated and holders)
            # A host can go after its vote and before the verdict, which nobody can know: what the voters then gave
            # up for this step, by this verdict, is gone too, though all who held that are there.
            self.protected = max(self.protected, min(protected, self.last_step)) if whole else 0
            self._holders = holders
        self.stir()

    def reforms(self, view: ViewId, ranks: int, wanted: int) -> None:
        """A view that is not as large as it should be ends with the step: it gets no second verdict."""
        if self._outgrown == view and view >= self.acting:
            self.fail(f"view {view} has {ranks} ranks, {wanted} are wanted, and it goes on")
        if ranks != wanted:
            self._outgrown = view

    def declared_dead(self, epoch: int, name: str) -> None:
        self._dead.setdefault((epoch, name), self.world.now)

    def admitted(self, view: ViewId, names: set[str]) -> None:
        for name in names:
            if (view.epoch, name) in self._dead:
                self.fail(f"{name} is in view {view}, but it was declared dead")

    def ended(self, epoch: int, ok: bool, reason: str) -> None:
        if epoch < self.acting.epoch:
            return  # a coordinator that was replaced: nobody listens
        if not ok:
            self.fail(f"the run ended: {reason}")
        self.finished = True

    # ---- what members do --------------------------------------------------------------------------------

    def applies(self, name: str, view: ViewId, step: int, payload: bytes) -> None:
        verdict = self._verdicts.get((view, step))
        if verdict is None:
            self.fail(f"{name} applies step {step} of view {view} without a verdict")
            return
        if verdict[0] != payload:
            self.fail(f"{name} applies another verdict on step {step} of view {view} than others")
        if view < self.acting and verdict[1] > self.acting_since:
            self.fail(f"{name} applies step {step} of view {view}, which was decided after view {self.acting} went")

    def holds(self, name: str, what: str, values: Mapping[int, Value], step: int) -> None:
        wrong = verified(values, step)
        if wrong:
            self.fail(f"{name} {what} step {step}: {'; '.join(wrong[:3])}")

    def whole(self, values: Mapping[int, Value]) -> None:
        self.holds("the result", "is not", values, self.last_step)
        if set(values) != set(ALL):
            self.fail(f"the result has units {sorted(values)}")

    def check_progress(self) -> None:
        if self.world.now - self.stirred_s > STUCK_S:
            self.fail(f"nothing has moved for {STUCK_S} s; step {self.decided} is the last that was decided")

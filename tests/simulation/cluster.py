"""A simulated run with random faults: `simulate(seed)` returns what happened or raises what went wrong.

The cluster plays the part of the host port: it starts watchers, trainers and coordinators, and starts them
again when they are gone. Faults come at random for some time; then all is healed and the run has to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulation.coordinator import FROZEN_S, Coordinator, Directory, Job
from simulation.referee import Referee, Violation
from simulation.state import Host
from simulation.trainer import Trainer
from simulation.watcher import Watcher
from simulation.world import Process, World

FAULTY_S = 15.0
END_S = 240.0  # far more than any run takes
SUPPLY_S = 0.3  # between looks at what has to be started again


@dataclass(frozen=True)
class Outcome:
    """For statistics over seeds: virtual seconds, events handled, faults by name, views formed."""

    seed: int
    virtual_s: float
    events: int
    faults: dict[str, int]
    views: int
    epochs: int
    half_told: int
    woken_late: int


class Failed(AssertionError):
    """A seed failed; carries seed, configuration and event log."""


class Seat:
    """One slot of the run: its host and the processes there."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.homes = 0
        self.home = Host("", slot, alive=False)
        self.watchers = 0
        self.watcher: Watcher | None = None
        self.trainers = 0
        self.trainer: Trainer | None = None
        self.local: list[Process] = []


class Cluster:
    def __init__(self, seed: int, in_doubt: bool = True) -> None:
        """`in_doubt` False: without what was added with verdicts in doubt, as older seeds were drawn."""
        self.in_doubt = in_doubt
        self.world = World(seed)
        rng = self.rng = self.world.rng
        slots = rng.randint(2, 6)
        minimum = rng.randint(1, min(2, slots))
        domains = tuple(f"domain-{slot}" for slot in range(slots))
        target, start = rng.randint(minimum, slots), rng.choice([0, 0, 40])
        steps = start + rng.randint(60, 160)  # most runs outlast the faults
        replicated, offers_live, every = rng.random() < 0.25, rng.random() < 0.5, rng.choice([1, 1, 1, 3])
        self.job = Job(minimum, target, steps, domains, replicated, offers_live, every, start)
        self.hosts_fail = rng.random() < 0.3
        self.referee = Referee(self.world, self.job.steps, self.job.replicated)
        self.directory = Directory()
        self.seats = [Seat(slot) for slot in range(slots)]
        self.faults: dict[str, int] = {}
        self.half_told = 0  # verdicts of which a part was out when their coordinator was struck
        self.woken_late = 0  # coordinators that woke up when they had a successor
        self.world.log("seed %d: %d slots, %s", seed, slots, self.job)

    def run(self) -> None:
        self._start_coordinator()
        self._supply()
        self._watch()
        self.world.after(self.rng.expovariate(1.0), self._fault)
        self.world.run(END_S, lambda: self.referee.finished)
        if not self.referee.finished:
            self.referee.fail(f"the run has not ended after {END_S} s")

    def _watch(self) -> None:
        self.referee.check_progress()
        self.world.after(1.0, self._watch)

    # ---- starting -----------------------------------------------------------------------------------------

    def _start_coordinator(self) -> None:
        Coordinator(self.world, self.job, self.directory, self.referee)
        self.referee.stir()

    def _supply(self) -> None:
        for seat in self.seats:
            self._fill(seat)
        self.world.after(SUPPLY_S, self._supply)

    def _fill(self, seat: Seat) -> None:
        if not seat.home.alive:
            seat.homes += 1
            seat.home = Host(f"host-{seat.slot}.{seat.homes}", seat.slot)
            seat.local = []
        if seat.watcher is None or seat.watcher.dead:
            seat.watchers += 1
            name = f"manager-{seat.slot}.{seat.watchers}"
            seat.watcher = Watcher(self.world, name, seat.home, self.directory, seat.local)
            self.world.log("%s starts", name)
            self.referee.stir()
        elif seat.trainer is None or seat.trainer.dead:
            seat.trainers += 1
            name = f"rank-{seat.slot}.{seat.trainers}"
            seat.trainer = Trainer(self.world, name, seat.home.name, seat.slot, self.job, self.referee, self._find)
            seat.local.append(seat.trainer)
            self.world.log("%s starts", name)

    def _find(self, address: str) -> Process | None:
        for seat in self.seats:
            if seat.trainer is not None and seat.trainer.name == address:
                return seat.trainer
            if address == f"domain-{seat.slot}":
                return seat.watcher
        return None

    # ---- faults -------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        if self.world.now > FAULTY_S:
            return
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._kill_trainer, 6),
            (self._kill_several, 1),
            (self._freeze_trainer, 6),
            (self._kill_watcher, 2),
            (self._freeze_watcher, 2),
            (self._kill_coordinator, 2),
            (self._replace_coordinator, 1),
            (self._freeze_coordinator, 1),
            (self._kill_coordinator_in_verdict, 1 if self.in_doubt else 0),
            (self._freeze_coordinator_in_verdict, 1 if self.in_doubt else 0),
            (self._cut_from_head, 2),
            (self._cut_peers, 1),
            (self._break_stream, 2),
            (self._scale, 3),
            (self._lose_host, 1 if self.hosts_fail else 0),
        ]
        kind = self.rng.choices([k for k, _ in kinds], [weight for _, weight in kinds])[0]
        name = kind.__name__.strip("_")
        self.faults[name] = self.faults.get(name, 0) + 1
        self.world.log("fault: %s", name)
        self.referee.stir()
        kind()
        # Half of them hit while the former one is still being dealt with.
        self.world.after(self.rng.choice([0.02, 0.3, 1.0, 3.0]) * self.rng.random() * 2, self._fault)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            self.referee.stir()
            action()

        self.world.after(delay_s, act)

    def _any_trainer(self) -> Trainer | None:
        living = [s.trainer for s in self.seats if s.trainer is not None and not s.trainer.dead]
        return self.rng.choice(living) if living else None

    def _any_watched(self) -> tuple[Seat, Watcher] | None:
        living = [(s, s.watcher) for s in self.seats if s.watcher is not None and not s.watcher.dead]
        return self.rng.choice(living) if living else None

    def _kill_trainer(self) -> None:
        if trainer := self._any_trainer():
            trainer.die("signal 9")

    def _kill_several(self) -> None:
        for _ in range(self.rng.randint(2, 3)):
            self._kill_trainer()

    def _freeze_trainer(self) -> None:
        trainer = self._any_trainer()
        if trainer is None:
            return
        watcher = next(s.watcher for s in self.seats if s.trainer is trainer)
        if watcher is not None:
            watcher.kill_delay_s = self.rng.choice([0.01, 0.5, 2.0])
        trainer.freeze()
        if self.rng.random() < 0.7:
            self._later(self.rng.choice([0.05, 0.3, 1.0, 3.0]) * self.rng.random() * 2, trainer.wake)

    def _kill_watcher(self) -> None:
        if found := self._any_watched():
            found[1].die("signal 9")

    def _freeze_watcher(self) -> None:
        if found := self._any_watched():
            watcher = found[1]
            watcher.freeze()
            self._later(self.rng.uniform(0.1, 2.5 * FROZEN_S), watcher.wake)
            # The supervisor kills one that it has lost.
            patience = FROZEN_S * self.rng.uniform(1.2, 2.2)
            self._later(patience, lambda: watcher.die("killed by the supervisor") if watcher.frozen else None)

    def _kill_coordinator(self) -> None:
        if self.directory.coordinator is not None and not self.directory.coordinator.dead:
            self.directory.coordinator.die("signal 9")
            self._later(self.rng.uniform(0.05, 1.0), self._start_coordinator)

    def _replace_coordinator(self) -> None:
        """A standby takes over from one that lives."""
        self._start_coordinator()

    def _freeze_coordinator(self) -> None:
        coordinator = self.directory.coordinator
        if coordinator is None or coordinator.dead or coordinator.frozen:
            return
        coordinator.freeze()
        if self.rng.random() < 0.5:
            self._later(self.rng.uniform(0.2, 1.5), self._start_coordinator)
        self._later(self.rng.uniform(0.1, 3.0), lambda: self._wake_late(coordinator))

    def _kill_coordinator_in_verdict(self) -> None:
        """Some members have the verdict, the others never get it: a successor finds the step in doubt."""
        coordinator = self.directory.coordinator
        if coordinator is None or coordinator.dead:
            return

        def strike() -> None:
            coordinator.die("signal 9 within a verdict")
            self.half_told += 1
            if self.directory.coordinator is coordinator:
                self._later(self.rng.uniform(0.05, 1.0), self._start_coordinator)

        coordinator.doubt = strike

    def _freeze_coordinator_in_verdict(self) -> None:
        """The same, and what it had still to say it says when it is woken, mostly after its successor has begun."""
        coordinator = self.directory.coordinator
        if coordinator is None or coordinator.dead:
            return

        def strike() -> None:
            coordinator.freeze()
            self.half_told += 1
            self._later(self.rng.uniform(0.05, 1.0), self._start_coordinator)
            self._later(self.rng.uniform(0.05, 3.0), lambda: self._wake_late(coordinator))

        coordinator.doubt = strike

    def _wake_late(self, coordinator: Coordinator) -> None:
        self.woken_late += coordinator is not self.directory.coordinator and not coordinator.dead
        coordinator.wake()

    def _cut_from_head(self) -> None:
        head, found = self.directory.coordinator, self._any_watched()
        if head is not None and found:
            self._cut(found[1].host, head.host)

    def _cut_peers(self) -> None:
        if len(self.seats) > 1:
            a, b = self.rng.sample(self.seats, 2)
            self._cut(a.home.name, b.home.name)

    def _cut(self, a: str, b: str) -> None:
        self.world.cut(a, b)
        self._later(self.rng.choice([0.2, 1.0, 3.0]) * self.rng.uniform(0.5, 1.0), lambda: self.world.heal(a, b))

    def _break_stream(self) -> None:
        trainer = self._any_trainer()
        if trainer is not None and trainer.connections:
            connection = self.rng.choice(trainer.connections)
            if self.in_doubt:
                trainer.break_stream(connection)
            else:
                connection.close(trainer)

    def _scale(self) -> None:
        self.job.target = self.rng.randint(self.job.minimum, len(self.seats))

    def _lose_host(self) -> None:
        seat = self.rng.choice(self.seats)
        seat.home.alive = False
        for process in (seat.watcher, seat.trainer):
            if process is not None:
                process.die("its host is lost", silently=True)
        self.referee.memory_lost({trainer.name for trainer in seat.local})


def simulate(seed: int, in_doubt: bool = True) -> Outcome:
    """Raises Failed with the seed and the event log."""
    cluster = Cluster(seed, in_doubt)
    try:
        cluster.run()
    except Exception as error:
        kind = "" if isinstance(error, Violation) else f"{type(error).__name__}: "
        raise Failed(f"seed {seed} failed: {kind}{error}\n{cluster.world.log_text()}") from error
    referee = cluster.referee
    return Outcome(
        seed,
        cluster.world.now,
        cluster.world.events,
        cluster.faults,
        referee.acting.number,
        referee.acting.epoch,
        cluster.half_told,
        cluster.woken_late,
    )

"""Managers' parts of three domains in one process, over real sockets: parity is written, a lost one is rebuilt."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.actors.config import ParityGroup, SlotsWanted
from everstep.actors.fetch import Asker, Await, FetchServer
from everstep.actors.parity_keeper import ParityKeeper
from everstep.actors.shelf import DomainShelf
from everstep.actors.sources import Sources
from everstep.platform.training.messages import Rebuild
from everstep.platform.training.protection import rebuilds
from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import StateIndex, TensorMeta
from everstep.storage.parity import parity_capacity
from everstep.storage.planner import Want, plan
from everstep.storage.segment import SegmentMap, Writer, payload, required_bytes, sizes_of

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")

TOKEN = "a token"
VIEW = (1, 3)
LIMIT_S = 20.0
SIZES = (700_000, 2_300_001, 1_600_000)


class Domain:
    def __init__(self, run: Path, n: int) -> None:
        self.name = f"slot-{n}"
        self.meta = TensorMeta(f"w{n}", "param", "uint8", (SIZES[n],))
        self.piece = [(self.meta, 0, SIZES[n])]
        self.shelf = DomainShelf(run / self.name, self.name, LIMIT_S)
        self.server = FetchServer("127.0.0.1", TOKEN, self.shelf)
        self.keeper = ParityKeeper(self.shelf, TOKEN, LIMIT_S)
        self.told: dict[int, str] = {}
        self.changed = threading.Condition()
        self.slots: tuple[str, ...] = ()

    def form(self, members: tuple[tuple[str, str], ...], n: int, capacity: int, view: tuple[int, int]) -> None:
        group = ParityGroup(members, n, 1, capacity)
        self.slots, rows = self.shelf.make("rank", SlotsWanted(view, required_bytes(self.piece), 2, 0, group))
        self.keeper.form(view, group, rows)

    def seal(self, step: int, view: tuple[int, int] = VIEW) -> None:
        path = self.slots[step % 2]
        with SegmentMap(path, writable=True) as segment:
            writer = Writer(segment)
            writer.begin()
            writer.put(self.meta, 0, SIZES[int(self.name[-1])], content(self.name, step))
            writer.seal(*view, step)
        self.shelf.sealed((*view, step), path)
        self.keeper.protect((*view, step), self.on_told)

    def on_told(self, step: int, cpu_s: float, error: str) -> None:
        with self.changed:
            self.told[step] = error
            self.changed.notify_all()

    def secured(self, step: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: step in self.told, LIMIT_S), f"{self.name}: nothing of step {step}"
            return self.told[step]

    def close(self) -> None:
        self.shelf.close()
        self.keeper.close()
        self.server.close()


def content(domain: str, step: int) -> bytes:
    return random.Random(f"{domain}/{step}").randbytes(SIZES[int(domain[-1])])


@pytest.fixture
def domains(tmp_path: Path) -> Iterator[list[Domain]]:
    made = [Domain(tmp_path, n) for n in range(3)]
    form(made, VIEW)
    yield made
    for domain in made:
        domain.close()


def form(made: list[Domain], view: tuple[int, int]) -> None:
    members = tuple((domain.name, domain.server.address) for domain in made)
    capacity = parity_capacity([sizes_of(domain.piece) for domain in made], 1)
    for n, domain in enumerate(made):
        domain.form(members, n, capacity, view)


def what_is_left(
    domains: list[Domain], step: int, lost: int, damaged: frozenset[tuple[str, str]] = frozenset()
) -> list[tuple[Rebuild, StateIndex]]:
    stocks = {domain.name: domain.shelf.stock() for n, domain in enumerate(domains) if n != lost}
    return rebuilds(step, stocks, damaged)


def read(domains: list[Domain], sources: Sources, found: list[tuple[Rebuild, StateIndex]], lost: int) -> bytes:
    ((rebuild, index),) = found
    wants = [Want(f"w{lost}", "param", 0, SIZES[lost], "me")]
    copies = [(copy, memoryview(bytearray(copy.nbytes))) for copy in plan(index, wants, lambda source, want: 1)]
    addresses = {domain.name: domain.server.address for domain in domains}
    sources.fill(copies, addresses, "", [rebuild], lambda: None)
    return b"".join(bytes(buffer) for _, buffer in copies)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_domain_is_rebuilt_from_the_others(domains: list[Domain], tmp_path: Path, lost: int) -> None:
    for step in (4, 5):
        for domain in domains:
            domain.seal(step)
        assert [domain.secured(step) for domain in domains] == ["", "", ""]
    sources = Sources(domains[lost - 1].name, tmp_path, TOKEN)
    domains[lost].shelf.destroy()
    for step in (4, 5):
        found = what_is_left(domains, step, lost)
        assert read(domains, sources, found, lost) == content(f"slot-{lost}", step)
    assert not sources.damaged


def test_a_version_waits_until_the_others_have_sealed_theirs(domains: list[Domain]) -> None:
    domains[0].seal(4)
    asker = Asker(domains[1].server.address, TOKEN)
    asker.ask(Await(*VIEW, 4))
    with domains[0].changed:
        assert not domains[0].changed.wait_for(lambda: 4 in domains[0].told, 0.3)
    domains[1].seal(4)
    assert asker.sealed().payload_bytes == SIZES[1]
    asker.close()
    domains[2].seal(4)
    assert [domain.secured(4) for domain in domains] == ["", "", ""]


def test_a_view_that_is_over_ends_what_waits_for_it(domains: list[Domain]) -> None:
    domains[0].seal(4)  # the others never do
    newer = (1, 4)
    form(domains, newer)
    for domain in domains:
        domain.seal(4, newer)
    assert [domain.secured(4) for domain in domains] == ["", "", ""]
    assert domains[0].told == {4: ""}, "of the view that is over nothing is told"


def test_a_manager_that_goes_away_is_told(domains: list[Domain]) -> None:
    for domain in domains:
        domain.seal(4)
    assert [domain.secured(4) for domain in domains] == ["", "", ""]
    domains[2].shelf.close()
    domains[2].server.close()
    for domain in domains[:2]:
        domain.seal(5)
    assert domains[0].secured(5) != ""
    assert [version.index.step for version in domains[0].shelf.stock().versions] == [4, 5]
    assert [version.step for version in domains[0].shelf.stock().parities] == [4], "what was whole stays whole"


@pytest.mark.parametrize("suffix", [".seg", ".par"])
def test_damage_is_found_before_it_is_decoded_and_named(domains: list[Domain], tmp_path: Path, suffix: str) -> None:
    for domain in domains:
        domain.seal(4)
    for domain in domains:
        domain.secured(4)
    (path,) = [path for path in (tmp_path / "slot-2").glob(f"*{suffix}") if sealed(path)]
    with SegmentMap(path, writable=True) as segment, payload(segment, 7, 1) as byte:
        byte[0] ^= 1
    sources = Sources("slot-0", tmp_path, TOKEN)
    with pytest.raises(SegmentDamaged, match="not match"):
        read(domains, sources, what_is_left(domains, 4, lost=1), lost=1)
    assert sources.damaged == {("slot-2", path.name)}
    assert what_is_left(domains, 4, 1, frozenset(sources.damaged)) == [], "nothing is rebuilt from it any more"


def sealed(path: Path) -> bool:
    with SegmentMap(path, writable=False) as segment:
        return segment.memory[0] != 0


def test_slots_that_do_not_fit_leave_nothing_behind(domains: list[Domain], tmp_path: Path) -> None:
    before = sorted(path.name for path in (tmp_path / "slot-0").iterdir())
    with pytest.raises(Exception, match="a segment takes"):
        domains[0].shelf.make("rank", SlotsWanted((1, 9), 1 << 50, 2))
    assert sorted(path.name for path in (tmp_path / "slot-0").iterdir()) == before

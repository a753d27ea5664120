"""What simulated ranks and managers say of their state: votes, inventories, stocks, as a real run's would be.

The model is a few large parameters, each with a master and two moments. A rank's snapshot is two versions, each with
the parity of its group, as a view with `snapshot.parity: 1` keeps them.
"""

import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from everstep.platform.training.layout import FlatLayout, Run
from everstep.platform.training.messages import (
    Inventory,
    LaneLoss,
    ParityVersion,
    SealedVersion,
    Stock,
    ViewPlan,
    Vote,
)
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.parity import ParityIndex

KINDS = ("master", "exp_avg", "exp_avg_sq")
_pack = msgspec.msgpack.encode


class Model:
    """`tensors` parameters of one size, cut into as many blocks as everstep allows."""

    def __init__(self, tensors: int) -> None:
        each = (1 << 26) // tensors
        self.layout = FlatLayout.of([(f"layers.{i}.weight", (each,), False) for i in range(tensors)])
        self.metas = tuple(
            TensorMeta(t.name, kind, "float32", t.shape) for t in self.layout.tensors for kind in KINDS
        )

    def fragments(self, owned: Sequence[Run], source: Source) -> tuple[Fragment, ...]:
        at, found = 0, []
        for piece in self.layout.pieces(owned):
            for kind in KINDS:
                found.append(Fragment(piece.tensor.name, kind, piece.start, piece.stop, source, at, 1 + at))
                at += 4 * piece.numel
        return tuple(found)


@dataclass(frozen=True)
class Layout:
    """The state of one view, as its members hold it: by member's name its domain, its runs, its parity group."""

    view: tuple[int, int]
    domains: Mapping[str, str]
    owned: Mapping[str, tuple[Run, ...]]
    groups: Mapping[str, tuple[str, ...]]  # domain -> the domains of its group, by position


@dataclass
class Memory:
    """The segments of all living domains: those of the newest layout, which is protected as soon as it acts."""

    model: Model
    steps: tuple[int, ...] = ()  # sealed in the layout
    layout: Layout | None = None
    lost: set[str] = field(default_factory=set)  # domains whose segments went with their node
    _told: tuple[Any, dict[str, bytes]] = (None, {})

    def take(self, view: tuple[int, int], base: int, members: Sequence[tuple[str, str]], plan: ViewPlan) -> None:
        """A view acts: its layout is what is held. `members`: (name, domain) in rank order."""
        groups: dict[str, tuple[str, ...]] = {}
        for group in plan.parity.groups:
            names = tuple(members[rank][1] for rank in group)
            groups |= dict.fromkeys(names, names)
        owned = {name: runs for (name, _), runs in zip(members, plan.owned, strict=True)}
        self.layout = Layout(view, dict(members), owned, groups)
        self.steps, self.lost = (base,), set()

    def sealed(self, step: int) -> None:
        self.steps = (*self.steps, step)[-2:]

    def inventory(self, name: str) -> bytes:
        held = self.layout.owned.get(name, ()) if self.layout is not None else ()
        return _pack(Inventory(self.steps[-1] if held else -1, held, None, self.model.layout.rows))

    def stocks(self) -> dict[str, bytes]:
        """Of every domain that holds something."""
        layout, model = self.layout, self.model
        if layout is None:
            return {}
        if self._told[0] == (layout.view, self.steps):
            return {domain: stock for domain, stock in self._told[1].items() if domain not in self.lost}
        mine = {layout.domains[name]: runs for name, runs in layout.owned.items()}
        sizes, indexes = {}, {}
        for domain, runs in mine.items():
            fragments = model.fragments(runs, Source("segment", domain, "0"))
            places = {meta.key: place for place, meta in enumerate(model.metas)}
            rows = [(places[f.key], f.start, f.stop, f.offset, f.checksum) for f in fragments]
            sizes[domain] = sum(4 * (f.stop - f.start) for f in fragments)
            indexes[domain] = _pack((model.metas, rows, (), ()))
        found = {}
        for domain, runs in mine.items():
            versions, parities = [], []
            for step in self.steps:
                locator = f"view-{layout.view[0]}-{layout.view[1]}.{step}.seg"
                index = StateIndex(step, model.metas, model.fragments(runs, Source("segment", domain, locator)))
                versions.append(SealedVersion(layout.view, locator, index))
                if group := layout.groups.get(domain):
                    payloads = tuple(sizes[other] for other in group)
                    told = tuple(indexes[other] for other in group)
                    parity = ParityIndex(group, group.index(domain), 1, payloads, told, ())
                    parities.append(ParityVersion(layout.view, step, locator[:-3] + "par", parity))
            found[domain] = _pack(Stock(tuple(versions), tuple(parities)))
        self._told = (layout.view, self.steps), found
        return self.stocks()


def vote(rank: int, ranks: int, lanes: int, step: int, blocks: int) -> bytes:
    """Of a rank whose gradients are finite."""
    mine = range(rank * lanes // ranks, (rank + 1) * lanes // ranks)
    losses = tuple(LaneLoss(lane, 2.0 + lane / lanes, 1.0) for lane in mine)
    norms = array.array("d", [1e-3] * blocks).tobytes()
    return _pack(Vote("step", losses, norms, sealed_step=step - 1, compute_s=0.2, exchange_s=0.05, samples=len(mine)))

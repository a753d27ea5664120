"""What one rank holds of the training state, and how an update is applied to it.

Three stores, all float32 in flat order, each tensor at a 64-byte boundary:
- `compute`: the whole flat space; the model's parameters and float buffers are views of it;
- `master`: this rank's runs only; the optimizer works on pieces of it;
- `reduced`: the reduced gradients of the same runs.

[Note: shadows] A rank may hold runs that another owns, and apply the same reduced gradients to them: `mirrored`. The
rest of what it holds is `own`: what it votes on and what its snapshots and its part of a checkpoint contain. Nothing
else tells the two apart, so a mirror has its owner's bits at every stamp.

[Note: stamps] `stamp` is the step whose state master, optimizer tensors and buffers hold, or TORN while they
are being written; `compute_stamp` says the same of `compute`. Torn memory is never a source for recovery.

Belongs to the training thread.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from everstep.platform.training.layout import FlatLayout, Piece, Run, aligned, intersect, merge_runs
from everstep.platform.training.messages import Verdict
from everstep.platform.training.optimizers import OptimizerSet
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.planner import Want

TORN = -1
_NORM_BLOCKS = 64  # blocks squared at once: 2 MiB of float64 with the smallest block


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class Place:
    """One stored range of one state tensor: `tensor` is flat and contiguous."""

    meta: TensorMeta
    start: int
    stop: int
    tensor: torch.Tensor


class ShardStore:
    """A flat float32 store of some runs; every run starts at a 64-byte boundary."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = merge_runs(runs)
        self._offsets: list[int] = []
        at = 0
        for start, stop in self.runs:
            self._offsets.append(at)
            at += aligned(stop - start)
        self.data = torch.zeros(at, dtype=torch.float32)

    def view(self, start: int, stop: int) -> torch.Tensor:
        """Flat elements [start, stop), which lie inside one run."""
        for (a, b), offset in zip(self.runs, self._offsets, strict=True):
            if a <= start and stop <= b:
                return self.data[offset + start - a : offset + stop - a]
        raise AssertionError(f"flat range {start}:{stop} is not held")


class RankState:
    """Model, optimizers and buffers of one rank. Raises UnsupportedModel where bits could not be promised."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        allocate: Callable[[int], torch.Tensor] = torch.empty,
    ) -> None:
        """`allocate(elements)` gives the memory of `compute`, from which updated parameters are sent."""
        self.model = model
        self.params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        check_model(model)
        self.buffers = [(n, b) for n, b in model.named_buffers() if b.is_floating_point()]
        self.integers = [(n, b) for n, b in model.named_buffers() if not b.is_floating_point()]
        self.optimizers = OptimizerSet(optimizers, self.params)
        shapes = [(n, tuple(p.shape), not self.optimizers.cuttable(n)) for n, p in self.params]
        self.layout = FlatLayout.of(shapes, [(n, tuple(b.shape)) for n, b in self.buffers])
        self.compute = allocate(self.layout.total).zero_()
        for name, tensor in [*self.params, *self.buffers]:
            flat = self.layout.by_name[name]
            view = self.compute[flat.start : flat.stop].view(flat.shape)
            view.copy_(tensor.detach())
            tensor.data = view
        self._homes = _homes_of(model, [*self.buffers, *self.integers])
        first_buffer = len(self.params)
        self.buffer_range = (
            self.layout.tensors[first_buffer].start if self.buffers else self.layout.total,
            self.layout.total,
        )
        self._buffers = self.compute[slice(*self.buffer_range)].clone()
        self._integers = [b.clone() for _, b in self.integers]
        self._initial = (self.compute.clone(), [b.clone() for b in self._integers])
        self.touched: set[int] = set()
        self.stamp = 0
        self.compute_stamp = 0
        self.held: tuple[Run, ...] = ()
        self.own: tuple[Run, ...] = ()
        self.mirrored: tuple[Run, ...] = ()
        self.master = ShardStore(())
        self.reduced = ShardStore(())
        self.pieces: list[Piece] = []

    # ---- ownership --------------------------------------------------------------------------------------

    def hold(self, runs: Sequence[Run], mirrored: Sequence[Run] = ()) -> None:
        """Takes new, unstamped stores for `runs` and what is `mirrored`, which does not overlap with them; what they
        shall contain comes with `wants` and `install`."""
        self.stamp = TORN
        self.own, self.mirrored = merge_runs(runs), merge_runs(mirrored)
        self.held = merge_runs([*self.own, *self.mirrored])
        self.master = ShardStore(self.held)
        self.reduced = ShardStore(self.held)
        self.pieces = self.layout.pieces(self.held)
        self.optimizers.attach([(p, self._shaped(self.master, p)) for p in self.pieces if not p.tensor.is_buffer])

    def _shaped(self, store: ShardStore, piece: Piece) -> torch.Tensor:
        view = store.view(piece.flat, piece.flat + piece.numel)
        return view.view(piece.tensor.shape) if piece.tensor.whole else view

    def reset(self) -> None:
        """The state that the seed gave, step 0; ownership stays."""
        compute, integers = self._initial
        self.compute.copy_(compute)
        self._buffers.copy_(compute[slice(*self.buffer_range)])
        for kept, value in zip(self._integers, integers, strict=True):
            kept.copy_(value)
        self.touched.clear()
        self.optimizers.clear()
        for piece in self.pieces:
            self.master.view(piece.flat, piece.flat + piece.numel).copy_(
                compute[piece.flat : piece.flat + piece.numel]
            )
        self.begin_lane()
        self.stamp = self.compute_stamp = 0

    # ---- lanes ------------------------------------------------------------------------------------------

    def begin_lane(self) -> None:
        """Every lane starts from the committed buffers."""
        self._put_home()
        self.compute[slice(*self.buffer_range)].copy_(self._buffers)
        for (_, buffer), committed in zip(self.integers, self._integers, strict=True):
            buffer.copy_(committed)

    def lane_buffers(self) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
        """Copies of the buffers as the lane's forward left them, also where it bound a new tensor to a name.

        (the float ones in flat order, positions among them of those that changed, the integer ones)
        """
        floats = self.compute[slice(*self.buffer_range)].clone()
        changed = []
        for position, (name, buffer) in enumerate(self.buffers):
            flat = self.layout.by_name[name]
            at = flat.start - self.buffer_range[0]
            mine = floats[at : at + flat.numel]
            if (bound := self._bound(name, buffer)) is not buffer:
                mine.copy_(bound.detach().reshape(-1))
            if not torch.equal(mine, self._buffers[at : at + flat.numel]):
                changed.append(position)
        return floats, changed, [self._bound(name, buffer).detach().clone() for name, buffer in self.integers]

    def _bound(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """What the model holds under a buffer's name: `buffer`, until a forward assigns another tensor to it."""
        found = [getattr(module, leaf) for module, leaf in self._homes[name]]
        bound = next((value for value in found if value is not buffer), buffer)
        if not isinstance(bound, torch.Tensor) or (bound.shape, bound.dtype) != (buffer.shape, buffer.dtype):
            form = f"{bound.dtype}{list(bound.shape)}" if isinstance(bound, torch.Tensor) else type(bound).__name__
            raise UnsupportedModel(
                f"buffer {name} was {buffer.dtype}{list(buffer.shape)} and became {form}; "
                "buffers keep shape and dtype"
            )
        return bound

    def _put_home(self) -> None:
        """The model's buffers are those of the flat space again, whatever a forward assigned to their names."""
        for name, buffer in [*self.buffers, *self.integers]:
            for module, leaf in self._homes[name]:
                if getattr(module, leaf) is not buffer:
                    setattr(module, leaf, buffer)

    # ---- apply ------------------------------------------------------------------------------------------

    def apply(
        self,
        step: int,
        verdict: Verdict,
        lanes: int,
        factor: float,
        integers: Sequence[torch.Tensor],
        midway: Callable[[], None],
    ) -> None:
        """Updates the held runs to the state after `step`. Never stops half-way; leaves `compute` to the gather.

        `factor` is the schedule's; `integers` are the integer buffers after any lane's forward; `midway` is
        called while the state is torn.
        """
        assert self.stamp == step - 1, f"apply of step {step} on state {self.stamp}"
        if verdict.outcome == "commit":
            self.stamp = self.compute_stamp = TORN
            data = self.reduced.data
            untouched = {self.params[i][0] for i in verdict.untouched}
            buffers = {self.buffers[i][0] for i in verdict.changed}
            for piece in self.pieces:
                if piece.tensor.name in buffers and piece.tensor.is_buffer:
                    mean = self.reduced.view(piece.flat, piece.flat + piece.numel) / lanes
                    self.master.view(piece.flat, piece.flat + piece.numel).copy_(mean)
            data.div_(verdict.weight)
            if verdict.clip_factor != 1.0:
                data.mul_(verdict.clip_factor)
            midway()
            self.optimizers.step(lambda piece: self._gradient(piece, untouched), factor)
            self.touched |= set(range(len(self.params))) - set(verdict.untouched)
            for committed, value in zip(self._integers, integers, strict=True):
                committed.copy_(value)
            self.stamp = step
        else:
            self.stamp = self.compute_stamp = step
            self.begin_lane()

    def _gradient(self, piece: Piece, untouched: set[str]) -> torch.Tensor | None:
        return None if piece.tensor.name in untouched else self._shaped(self.reduced, piece)

    def publish(self) -> None:
        """Copies the held part of `master` into `compute`."""
        for piece in self.pieces:
            self.compute[piece.flat : piece.flat + piece.numel].copy_(
                self.master.view(piece.flat, piece.flat + piece.numel)
            )

    def gathered(self) -> None:
        """`compute` is whole again: its buffers become the committed ones."""
        self._put_home()
        self._buffers.copy_(self.compute[slice(*self.buffer_range)])
        for (_, buffer), committed in zip(self.integers, self._integers, strict=True):
            buffer.copy_(committed)
        self.compute_stamp = self.stamp

    def norm_blocks(self, owned: Sequence[Run]) -> list[float]:
        """Sums of squares, in float64, of the norm blocks of the owned gradients (buffers left out)."""
        sums = []
        for piece in self.layout.pieces(owned):
            if piece.tensor.is_buffer:
                continue
            base, blocks = piece.tensor.start, self.layout.norm_blocks(piece)
            # Each block is summed by itself, so its sum does not depend on the piece; squares do not care.
            for first in range(0, len(blocks), _NORM_BLOCKS):
                some = blocks[first : first + _NORM_BLOCKS]
                start, stop = some[0][0], some[-1][1]
                squares = self.reduced.view(base + start, base + stop).double().square_()
                sums += [float(squares[a - start : b - start].sum()) for a, b in some]
        return sums

    # ---- state as named tensors -------------------------------------------------------------------------

    def metas(self) -> tuple[TensorMeta, ...]:
        """Every tensor of the whole state at this stamp, the same on all ranks."""
        metas = []
        for position, (name, param) in enumerate(self.params):
            metas.append(TensorMeta(name, "param", "float32", tuple(param.shape)))
            if position in self.touched:
                metas += self.optimizers.metas(name)
        metas += [TensorMeta(n, "buffer", "float32", tuple(b.shape)) for n, b in self.buffers]
        metas += [TensorMeta(n, "buffer", dtype_name(b), tuple(b.shape)) for n, b in self.integers]
        return tuple(sorted(metas, key=lambda meta: meta.key))

    def places(self, runs: Sequence[Run] | None = None) -> Iterator[Place]:
        """What of `runs` this rank holds, in a fixed order; without `runs` everything."""
        positions = {name: i for i, (name, _) in enumerate(self.params)}
        seen: set[tuple[str, str]] = set()  # a scalar is there once, however many pieces of its tensor are held
        for piece, part in self._parts(runs):
            tensor = piece.tensor
            kind = "buffer" if tensor.is_buffer else "param"
            data = self.master.view(part.flat, part.flat + part.numel)
            yield Place(TensorMeta(tensor.name, kind, "float32", tensor.shape), part.start, part.stop, data)
            if not tensor.is_buffer and positions[tensor.name] in self.touched:
                for meta, start, stop, flat in self.optimizers.places(piece):
                    if self.optimizers.like_param(tensor.name, meta.kind):
                        yield Place(meta, part.start, part.stop, flat[part.start - start : part.stop - start])
                    elif meta.key not in seen:
                        seen.add(meta.key)
                        yield Place(meta, start, stop, flat)
        for (name, _), committed in zip(self.integers, self._integers, strict=True):
            meta = TensorMeta(name, "buffer", dtype_name(committed), tuple(committed.shape))
            yield Place(meta, 0, meta.numel, committed.reshape(-1))

    def _parts(self, runs: Sequence[Run] | None) -> Iterator[tuple[Piece, Piece]]:
        """(held piece, the part of it inside `runs`), in flat order."""
        if runs is None:
            yield from ((piece, piece) for piece in self.pieces)
            return
        starts = [piece.flat for piece in self.pieces]
        for wanted in self.layout.pieces(intersect(self.held, runs)):
            at = bisect_left(starts, wanted.flat + 1) - 1
            yield self.pieces[at], wanted

    def live_index(self, member: str) -> StateIndex | None:
        """Stamped memory as an index; None while torn."""
        if self.stamp == TORN:
            return None
        source = Source("live", member, "")
        fragments = [Fragment(p.meta.name, p.meta.kind, p.start, p.stop, source, 0) for p in self.places()]
        return StateIndex(self.stamp, self.metas(), tuple(fragments))

    def footprint(self, runs: Sequence[Run] | None = None) -> Iterator[tuple[TensorMeta, int, int]]:
        """(tensor, start, stop) of the largest snapshot of `runs`, of whichever rank, or of all that is held: every
        optimizer tensor counted."""
        for piece in self.pieces if runs is None else self.layout.pieces(runs):
            kind = "buffer" if piece.tensor.is_buffer else "param"
            yield TensorMeta(piece.tensor.name, kind, "float32", piece.tensor.shape), piece.start, piece.stop
            if not piece.tensor.is_buffer:
                for meta in self.optimizers.metas(piece.tensor.name):
                    want = self._state_want(piece, meta, "")
                    yield meta, want.start, want.stop
        for name, param in self.params:  # every snapshot names the whole state's tensors
            yield TensorMeta(name, "param", "float32", tuple(param.shape)), 0, 0
            yield from ((meta, 0, 0) for meta in self.optimizers.metas(name))
        for name, buffer in [*self.buffers, *self.integers]:
            yield TensorMeta(name, "buffer", dtype_name(buffer), tuple(buffer.shape)), 0, buffer.numel()

    def wants(self, have: StateIndex, member: str) -> list[Want]:
        """What `install` needs to hold the state that `have` describes."""
        metas = have.metas()
        wants = []
        for piece in self.pieces:
            name = piece.tensor.name
            kind = "buffer" if piece.tensor.is_buffer else "param"
            wants.append(Want(name, kind, piece.start, piece.stop, member))
            if piece.tensor.is_buffer:
                continue
            for meta in self.optimizers.metas(name):
                if meta.key in metas:
                    wants.append(self._state_want(piece, meta, member))
        wants += [Want(n, "buffer", 0, math.prod(b.shape), member) for n, b in self.integers]
        return wants

    def _state_want(self, piece: Piece, meta: TensorMeta, member: str) -> Want:
        like = self.optimizers.like_param(piece.tensor.name, meta.kind)
        span = (piece.start, piece.stop) if like else (0, meta.numel)
        return Want(meta.name, meta.kind, *span, member)

    def install(self, have: StateIndex, fill: Callable[[Want, torch.Tensor], None]) -> None:
        """Brings every held tensor to `have.step`; `fill(want, flat_tensor)` supplies the bytes."""
        keys = set(have.metas())
        self.touched = {
            i for i, (n, _) in enumerate(self.params) if any(m.key in keys for m in self.optimizers.metas(n))
        }
        for piece in self.pieces:
            name, kind = piece.tensor.name, "buffer" if piece.tensor.is_buffer else "param"
            span = (piece.start, piece.stop)
            fill(Want(name, kind, *span, ""), self.master.view(piece.flat, piece.flat + piece.numel))
            if piece.tensor.is_buffer:
                continue
            for meta in self.optimizers.metas(name):
                if meta.key in keys:
                    want = self._state_want(piece, meta, "")
                    self.optimizers.put(piece, meta.kind, lambda flat, want=want: fill(want, flat))  # type: ignore[misc]
        for (name, _), committed in zip(self.integers, self._integers, strict=True):
            fill(Want(name, "buffer", 0, committed.numel(), ""), committed.reshape(-1))
        self.stamp = have.step


def _homes_of(
    model: torch.nn.Module, buffers: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, list[tuple[torch.nn.Module, str]]]:
    """The modules and attributes that hold each buffer; several where it is tied."""
    names = {id(buffer): name for name, buffer in buffers}
    homes: dict[str, list[tuple[torch.nn.Module, str]]] = {name: [] for name, _ in buffers}
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            homes[names[id(buffer)]].append((module, leaf))
    return homes


def check_model(model: torch.nn.Module) -> None:
    """Raises UnsupportedModel for what the flat space cannot hold."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UnsupportedModel(f"parameter {name} is {parameter.dtype}; trainable parameters must be float32")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise UnsupportedModel(f"buffer {name} is {buffer.dtype}; floating-point buffers must be float32")
        if buffer.is_complex():
            raise UnsupportedModel(f"buffer {name} is complex; store it as two float32 buffers")


class UnsupportedModel(ValueError):
    """The model holds something that would break the promise of equal bits."""

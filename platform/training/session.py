"""Your own training loop, on lanes that survive everything.

    with es.Session(model, optimizer) as s:
        for step in s.steps():                     # an aborted step is yielded again
            for lane in s.lanes():
                s.backward(lane, loss_of(model, s.batch(lane)))
            s.commit()

Nothing in the loop raises when a member dies: the step's remaining work becomes a no-op and the step is yielded
again once the survivors stand at one base step. Belongs to the training thread.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from everstep.collectives.errors import CollectiveError, CollectiveTimeout
from everstep.platform.training.conductor import Conductor, RunOver, Seat, ViewOver
from everstep.platform.training.evaluation import evaluate
from everstep.platform.training.exchange import (
    Bucket,
    GradientPool,
    Reduction,
    buckets_of,
    gather,
    mirror_gradients,
    share_gradients,
)
from everstep.platform.training.lanes import lanes_of
from everstep.platform.training.messages import Inventory, LaneLoss, Verdict, Vote
from everstep.platform.training.randomness import KeyedRandomness
from everstep.platform.training.restore import restore
from everstep.platform.training.settings import Settings as Settings
from everstep.platform.training.settings import current_job
from everstep.platform.training.shard import TORN, RankState, UnsupportedModel
from everstep.platform.training.solo import Solo
from everstep.platform.training.state_lines import hash_lines
from everstep.platform.training.task import CommitEvent, LaneContext, Loss, Task

log = logging.getLogger(__name__)


@dataclass
class _Attempt:
    """One attempt at one step."""

    step: int  # from 1: the state that a commit leads to
    reduction: Reduction
    started: float
    evaluation: tuple[LaneLoss, ...]
    losses: list[LaneLoss] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    integers: list[torch.Tensor] | None = None
    integers_agree: bool = True
    samples: int = 0


class Session:
    """Trains `model` with `optimizer` (one or several) as this process's rank; alone if there is no job.

    `settings`, `task` and `conductor` come from the job inside a rank process. Outside of one, give `settings`
    (and `task` if `batch` is used) and the session trains all lanes in this process.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        settings: Settings | None = None,
        task: Task | None = None,
        conductor: Conductor | None = None,
    ) -> None:
        job = current_job.get()
        found = settings or (job.settings if job is not None else None)
        if found is None:
            raise ValueError("es.Session outside of a job needs settings=es.Settings(steps=…, lanes=…)")
        self.settings = found
        self.task = task or (job.task if job is not None else None)
        self.model = model
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._conductor = conductor or (job.conductor if job is not None else Solo(self.settings))
        self.state = RankState(model, optimizers, self._conductor.empty)
        self._buckets = buckets_of(self.state.layout)
        self._pool = GradientPool(self._conductor.empty)
        self._random = KeyedRandomness(model, self.settings.seed)
        self._seat: Seat | None = None
        self._attempt: _Attempt | None = None
        self._announced = 0  # newest step whose on_commit was called
        self._decided: tuple[int, Verdict] | None = None  # newest verdict, applied or not
        self._stall_s = 0.0
        self._exchange_s = 0.0
        self._backward_lane = -1
        self._done = False
        self._probing = False
        self._last = False  # the verdict said that no step follows
        self.lane_now = -1
        self.losses: list[float] = []
        self.state_lines: tuple[str, ...] = ()
        self._hooks = []
        for position, (_, parameter) in enumerate(self.state.params):
            hooked: Any = parameter  # torch has no annotation for this method
            self._hooks.append(hooked.register_post_accumulate_grad_hook(self._on_gradient(position)))
        self._bucket_of = {i: b for b in self._buckets for i in b.params}
        self._filling: dict[int, tuple[torch.Tensor, set[int]]] = {}
        self._lane_buffers = torch.empty(0)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._random.remove()
        for hook in self._hooks:
            hook.remove()
        self._conductor.stand_up(None)

    # ---- the loop ---------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yields the number of each update, from 0, until the job's last step is committed, sealed and hashed."""
        while not self._done:
            try:
                if self._seat is None:
                    self._sit()
                seat = self._seat
                assert seat is not None
                if self._last or seat.plan.final or self.state.stamp >= self.settings.steps:
                    self._finish(seat)
                    return
                self._open(seat)
            except (ViewOver, CollectiveTimeout) as error:
                self._stand(error)
                continue
            except RunOver:
                return
            yield self.state.stamp

    def lanes(self) -> Iterator[int]:
        """This rank's lanes of the present step; ends early when the step was aborted."""
        seat = self._seat
        if seat is None or self._attempt is None:
            return
        for lane in lanes_of(seat.rank, seat.ranks, self.settings.lanes, self._waves):
            if self._attempt is None or self._conductor.over():
                return
            self.lane_now = lane
            self.state.begin_lane()
            self._random.begin(self._attempt.step, lane)
            began = time.perf_counter()
            yield lane
            factor = self._conductor.slow_factor(self._attempt.step) if self._attempt is not None else 1.0
            if factor > 1.0:
                time.sleep((factor - 1.0) * (time.perf_counter() - began))

    def batch(self, lane: int) -> Any:
        """The collated samples of a lane, by the task's `sample`, `dataset` and `collate`."""
        if self.task is None or (self._attempt is None and not self._probing):
            raise ValueError("s.batch needs a task with a dataset and a step that is open")
        indices = self.task.sample(self._step_number(), lane)
        return self.task.collate([self.task.data[i] for i in indices])

    def context(self, lane: int) -> LaneContext:
        """Step, lane and a generator keyed by both, for the task's `loss`."""
        return LaneContext.keyed(self.settings.seed, self._step_number(), lane)

    def _step_number(self) -> int:
        return self._attempt.step - 1 if self._attempt is not None else 0

    def backward(self, lane: int, loss: torch.Tensor | Loss) -> None:
        """Gradients of one lane, on their way to their owners when it returns. A no-op in an aborted step."""
        attempt = self._attempt
        if attempt is None or self._conductor.over():
            return
        value = Loss.of(loss, self.settings.lane_batch)
        weight = float(value.weight)
        attempt.losses.append(LaneLoss(lane, float(value.sum.detach()), weight, dict(value.metrics)))
        attempt.samples += self.settings.lane_batch
        self._backward_lane = lane
        try:
            self._take_buffers(attempt)
            if value.sum.requires_grad:
                value.sum.backward()  # type: ignore[no-untyped-call]
            for bucket in self._buckets:
                self._ship(bucket, lane)
        except (ViewOver, CollectiveTimeout) as error:
            self._stand(error)
        finally:
            self._filling.clear()
            for _, parameter in self.state.params:
                parameter.grad = None

    def commit(self) -> None:
        """Votes on the step, waits for the verdict and applies it. A no-op in an aborted step."""
        attempt, seat = self._attempt, self._seat
        if attempt is None or seat is None:
            return
        try:
            self._commit(attempt, seat)
        except RunOver:
            self._done = True
        except (ViewOver, CollectiveTimeout) as error:
            self._stand(error)

    def open_probe(self) -> None:
        """Prepares the model for a dry lane: lane 0 of the first step, whose gradients go nowhere."""
        self._probing = True
        self.state.begin_lane()
        self._random.begin(0, 0)

    def close_probe(self, loss: Loss) -> bytes:
        """Runs the dry lane backward, discards it, and returns its gradients' bytes, hashed."""
        digest = hashlib.sha256()
        if loss.sum.requires_grad:
            loss.sum.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.state.params:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                digest.update(name.encode() + gradient.contiguous().numpy().tobytes())
        self.state.begin_lane()
        self._probing = False
        return digest.digest()

    # ---- inside a step ----------------------------------------------------------------------------------

    @property
    def _waves(self) -> bool:
        return self.settings.zero >= 2

    def _open(self, seat: Seat) -> None:
        step = self.state.stamp + 1
        self._conductor.fault_point("gradient", step)
        reduction = Reduction(
            self._buckets,
            seat.plan.owned,
            self.settings.lanes,
            self._waves,
            seat.group,
            self.settings.stall_s,
            self._pool,
        )
        self._attempt = _Attempt(step, reduction, time.perf_counter(), self._evaluate(seat))

    def _evaluate(self, seat: Seat) -> tuple[LaneLoss, ...]:
        lanes = lanes_of(seat.rank, seat.ranks, self.settings.lanes, self._waves)
        return evaluate(self.settings, self.task, self.state, lanes, self._random, self._conductor.over)

    def _on_gradient(self, position: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._attempt is None or self._backward_lane < 0:
                return
            if self._conductor.over():
                raise ViewOver
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            bucket = self._bucket_of[position]
            flat, waiting = self._filling_of(bucket)
            tensor = self.state.layout.tensors[position]
            if position not in waiting:
                raise UnsupportedModel(
                    f"parameter {tensor.name} got a gradient twice in one backward pass: where activation "
                    "checkpointing runs a module more than once, call checkpoint(..., use_reentrant=False)"
                )
            at = tensor.start - bucket.start
            flat[at : at + tensor.numel].view(tensor.shape).copy_(gradient)
            waiting.discard(position)
            self._attempt.touched.add(position)
            if not waiting:
                self._ship(bucket, self._backward_lane)

        return hook

    def _filling_of(self, bucket: Bucket) -> tuple[torch.Tensor, set[int]]:
        if bucket.index not in self._filling:
            waiting = {i for i in bucket.params if not self.state.layout.tensors[i].is_buffer}
            self._filling[bucket.index] = (self._pool.take(bucket), waiting)
        return self._filling[bucket.index]

    def _ship(self, bucket: Bucket, lane: int) -> None:
        """Sends a bucket once a lane; with what has no gradient as zeros, buffers as they are after forward."""
        attempt = self._attempt
        assert attempt is not None
        if bucket.index in self._filling and self._filling[bucket.index][1] == {-1}:
            return  # it left from a hook
        flat, waiting = self._filling_of(bucket)
        for tensor in (self.state.layout.tensors[i] for i in waiting):
            flat[tensor.start - bucket.start : tensor.stop - bucket.start].zero_()
        first_buffer, end = self.state.buffer_range
        start, stop = max(bucket.start, first_buffer), min(bucket.stop, end)
        if stop > start:
            lane_buffers = self._lane_buffers[start - first_buffer : stop - first_buffer]
            flat[start - bucket.start : stop - bucket.start].copy_(lane_buffers)
        waiting.clear()
        waiting.add(-1)
        attempt.reduction.add(bucket, lane, flat)
        self._filling[bucket.index] = (torch.empty(0), waiting)

    def _take_buffers(self, attempt: _Attempt) -> None:
        self._lane_buffers, changed, integers = self.state.lane_buffers()
        attempt.changed.update(changed)
        if attempt.integers is None:
            attempt.integers = integers
        elif not all(torch.equal(a, b) for a, b in zip(attempt.integers, integers, strict=True)):
            attempt.integers_agree = False

    def _commit(self, attempt: _Attempt, seat: Seat) -> None:
        conductor, state, step = self._conductor, self.state, attempt.step
        if conductor.over():
            raise ViewOver
        conductor.fault_point("reduce", step)
        computed = time.perf_counter()
        owned = seat.plan.owned
        with torch.no_grad():
            attempt.reduction.finish(state.reduced)
            if self.settings.zero == 0:
                share_gradients(state.reduced, owned, seat.group, self.settings.stall_s)
            mirror_gradients(state.reduced, owned, seat.plan.shadowed, seat.group, self.settings.stall_s)
            exchanged = time.perf_counter()
            conductor.fault_point("vote", step)
            self._stall_s += conductor.protect(step)
            vote = self._vote(attempt, owned[seat.rank], computed - attempt.started, exchanged - computed)
            verdict = conductor.vote(seat, step, vote)
            self._decided = (step, verdict)
            conductor.fault_point("verdict", step)
            if verdict.outcome == "failed":
                raise RunOver(verdict.error)
            factor = self.task.schedule(step - 1) if self.task is not None else 1.0
            midway = lambda: conductor.fault_point("apply", step)  # noqa: E731
            self._stall_s += conductor.release()
            state.apply(step, verdict, self.settings.lanes, factor, attempt.integers or [], midway)
            self._last = verdict.last
            self._announce(step, verdict)
            if verdict.snapshot:
                sealing = lambda: conductor.fault_point("snapshot", step)  # noqa: E731
                self._stall_s += conductor.snapshot(state, sealing, state.own)
            self._attempt = None
            began = time.perf_counter()
            conductor.fault_point("gather", step)
            self._gather(seat)
            self._exchange_s = time.perf_counter() - began

    def _vote(self, attempt: _Attempt, owned: Sequence[tuple[int, int]], compute_s: float, exchange_s: float) -> Vote:
        blocks = torch.tensor(self.state.norm_blocks(owned), dtype=torch.float64)
        integers = b"".join(t.contiguous().numpy().tobytes() for t in attempt.integers or [])
        digest = hashlib.sha256(integers).hexdigest()
        stall_s, self._stall_s = self._stall_s, 0.0
        return Vote(
            "step",
            losses=tuple(attempt.losses),
            norm_blocks=blocks.numpy().tobytes(),
            finite=bool(torch.isfinite(blocks).all()),
            untouched=tuple(sorted(set(range(len(self.state.params))) - attempt.touched)),
            changed=tuple(sorted(attempt.changed)),
            integers=digest,
            integers_agree=attempt.integers_agree,
            sealed_step=self._conductor.sealed_step(),
            compute_s=compute_s,
            exchange_s=exchange_s + self._exchange_s,
            stall_s=stall_s,
            background_s=self._conductor.background_s(),
            samples=attempt.samples,
            evaluation=attempt.evaluation,
        )

    def _gather(self, seat: Seat) -> None:
        """After this every rank computes with the committed parameters."""
        if self.settings.zero == 0:
            self.state.publish()
        else:
            gather(self.state, seat.plan.owned, seat.group, self.settings.stall_s)
        self.state.gathered()

    def _announce(self, step: int, verdict: Verdict) -> None:
        if step <= self._announced:
            return
        self._announced = step
        self.losses.append(verdict.loss)
        if self.task is not None:
            skipped = verdict.outcome == "skip"
            self.task.on_commit(CommitEvent(step - 1, verdict.loss, skipped, verdict.grad_norm, verdict.metrics))

    # ---- views ------------------------------------------------------------------------------------------

    def _sit(self) -> None:
        """Takes part in the next view: inventory, restore, level, gather, first snapshot of the new layout."""
        conductor, state = self._conductor, self.state
        seat = conductor.take_seat(self._inventory)
        conductor.fault_point("recovery", seat.base_step)
        marks = [time.perf_counter()]
        with torch.no_grad():
            whole = [(0, state.layout.total)]
            runs = whole if self.settings.zero == 0 else list(seat.plan.owned[seat.rank])
            restore(state, runs, seat, conductor)
            if self._decided is not None and self._decided[0] <= seat.base_step:
                self._announce(*self._decided)  # the others applied it, and this rank got it from them
            marks.append(time.perf_counter())
            conductor.level(seat)
            marks.append(time.perf_counter())
            self._gather(seat)
            marks.append(time.perf_counter())
            self._last = False
            self._stall_s = conductor.snapshot(state, lambda: None, state.own)  # goes on while training does
            marks.append(time.perf_counter())
        self._seat = seat
        spent = " ".join(
            f"{what} {1000 * (b - a):.0f} ms"
            for what, a, b in zip(("restored", "level", "gathered", "sealed"), marks, marks[1:], strict=False)
        )
        log.info("rank %d of %d in view %s from step %d: %s", seat.rank, seat.ranks, seat.view, seat.base_step, spent)

    def _inventory(self) -> Inventory:
        """What this rank offers; unsealed stamped state is sealed first, so that others can read it."""
        state, conductor = self.state, self._conductor
        if state.stamp != TORN and state.held:
            with torch.no_grad():
                conductor.snapshot(state, lambda: None, state.own, wait=True)
                if state.mirrored:
                    conductor.seal_mirror(state)
        return Inventory(state.stamp, state.held, None, state.layout.rows, state.mirrored)

    def _stand(self, error: CollectiveError) -> None:
        self._attempt = None
        self._seat = None
        self._filling.clear()
        self._conductor.stand_up(error)

    def _finish(self, seat: Seat) -> None:
        """The last step is committed: seal it everywhere, hash it, and end."""
        step = self.state.stamp
        self._stall_s += self._conductor.protect(step + 1, now=True)
        sealed = self._conductor.sealed_step()
        vote = Vote("seal", sealed_step=sealed, stall_s=self._stall_s, evaluation=self._evaluate(seat))
        self._conductor.vote(seat, step + 1, vote)
        with torch.no_grad():
            everywhere = self.settings.zero == 0
            lines = hash_lines(self.state, seat.plan.owned, seat.group, self.settings.stall_s, everywhere)
        vote = Vote("hash", hash_lines=lines, sealed_step=self._conductor.sealed_step())
        self._conductor.vote(seat, step + 2, vote)
        self.state_lines = lines
        self._done = True

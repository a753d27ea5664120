"""Quantised all-reduces of real processes that are killed in the middle: the same bits on all. Not a test module.

A trial is a few operations of random sizes, types, schemes and ops, in a transaction, outside of one, or in a
subgroup of a transaction. In some, one member dies: at its k-th encoding or decoding, or when it is killed. Then:

    what ends well ends with the same bits on all members that it ends well on, and with the same members
    these are the bits of integration.quantised_reference, within the documented bound of the exact result
    a transaction ends well on all survivors or on none; where it does not, tensors and residuals are as before
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from integration.group_peers import Peer, all_of

MODES = ("transaction", "plain", "subgroup")
MAX_MEMBERS = 5
MAX_ELEMENTS = 200_000


@dataclass(frozen=True)
class Step:
    """One all-reduce; `seed` and the member's name say what it brings."""

    numel: int
    dtype: str
    op: str
    scheme: str
    feedback: bool
    bad: bool  # one member has an infinity in it
    seed: int


@dataclass(frozen=True)
class Trial:
    mode: str
    steps: tuple[Step, ...]
    victim: str = ""
    dies_at: int = 0  # call of a codec; 0: the driver kills it

    @staticmethod
    def draw(random: random.Random, names: list[str], kill: bool) -> Trial:
        steps = tuple(
            Step(
                random.choice((0, random.randint(1, 3000), random.randint(1, MAX_ELEMENTS), MAX_ELEMENTS)),
                random.choice(("float32", "float32", "bfloat16", "float16")),
                random.choice(("sum", "avg")),
                random.choice(("minmax8", "zeropoint8")),
                random.random() < 0.3,
                random.random() < 0.05,
                random.getrandbits(32),
            )
            for _ in range(random.randint(1, 3))
        )
        mode = random.choice(MODES)
        if not kill:
            return Trial(mode, steps)
        return Trial(mode, steps, random.choice(names), random.choice((0, random.randint(1, 30))))


@dataclass
class Trials:
    """Plays trials. `violations`: what broke a promise."""

    address: str
    seed: int
    peers: list[Peer] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    done: int = 0
    operations: int = 0  # that ended well, each counted once
    kills: int = 0
    in_the_middle: int = 0  # kills after which an operation of a survivor ended in PeerLost
    exact: int = 0  # of the operations: compared with the reference
    sizes: dict[int, int] = field(default_factory=dict)  # trials by number of members

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._started = 0
        self._grow(1)  # which needs nobody's admission
        self._grow(2)

    def play(self, kill_share: float) -> None:
        wanted = self._random.randint(2, MAX_MEMBERS)
        if len(self.peers) < 2 or (self._random.random() < 0.3 and wanted > len(self.peers)):
            self._grow(max(2, wanted))
        names = [peer.name for peer in self.peers]
        trial = Trial.draw(self._random, names, self._random.random() < kill_share)
        delay_s = self._random.random() ** 2 * 0.03
        self.sizes[len(names)] = self.sizes.get(len(names), 0) + 1
        for peer in self.peers:
            peer.tell("quantised", trial)
        if trial.victim:
            self._kill(trial, delay_s)
        found = {peer.name: peer.answer() for peer in self.peers}
        self.done += 1
        self._judge(trial, found)
        if trial.victim:
            members = all_of(self.peers, "reform_without", trial.victim)
            assert len(set(members)) == 1, members

    def end(self) -> None:
        for peer in self.peers:
            peer.end()

    def told(self) -> str:
        sizes = ", ".join(f"{n} members {count}" for n, count in sorted(self.sizes.items()))
        return (
            f"{self.done} trials ({sizes}), {self.operations} operations, {self.exact} of them compared with the "
            f"reference; {self.kills} members killed, {self.in_the_middle} of them in the middle; seed {self.seed}"
        )

    def _grow(self, members: int) -> None:
        lacking = members - len(self.peers)
        new = [Peer(f"m{self._started + i}") for i in range(lacking)]
        self._started += lacking
        old = list(self.peers)
        self.peers += new
        for peer in new:
            peer.tell("join", self.address)
        if old:
            names = tuple(sorted(peer.name for peer in new))
            assert all(set(found) == set(names) for found in all_of(old, "await_joiners", names))
            assert all(found is True for found in all_of(old, "admit"))
        for peer in new:
            joined = peer.answer()
            assert not isinstance(joined, dict), joined

    def _kill(self, trial: Trial, delay_s: float) -> None:
        victim = next(peer for peer in self.peers if peer.name == trial.victim)
        self.peers.remove(victim)
        time.sleep(0.2 if trial.dies_at else delay_s)  # it may be dead by then, by its own hand
        victim.end()  # a SIGKILL
        self.kills += 1

    def _judge(self, trial: Trial, found: dict[str, dict[str, Any]]) -> None:
        what = f"trial {self.done} of seed {self.seed}, {trial}"
        self.violations += [f"{what}: {name}: {text}" for name, told in found.items() for text in told["wrong"]]
        self.in_the_middle += bool(trial.victim) and any(told["lost"] for told in found.values())
        self.exact += sum(told["compared"] for told in found.values())
        for i in range(len(trial.steps)):
            ended = {name: told["ended"][i] for name, told in found.items() if i in told["ended"]}
            groups: dict[tuple[str, ...], set[str]] = {}
            for members, digest in ended.values():
                groups.setdefault(members, set()).add(digest)
            self.operations += len(groups)
            for members, digests in groups.items():
                if len(digests) > 1:
                    self.violations.append(f"{what}: operation {i} gave {digests} to {members}")
            # Of a transaction, once a view is retried in, all survivors are in it; a subgroup splits them for good.
            if trial.mode == "transaction" and (len(groups) != 1 or len(ended) != len(found)):
                self.violations.append(f"{what}: operation {i} ended on {ended} of {sorted(found)}")
            if not trial.victim and len(ended) != len(found):
                self.violations.append(f"{what}: operation {i} ended on {sorted(ended)} only")


# ---- in the member's process --------------------------------------------------------------------------------


def take_part(group: Any, name: str, trial: Trial) -> dict[str, Any]:
    from everstep.collectives import ErrorFeedback, PeerLost
    from everstep.collectives.quantisation import error_bound
    from integration.quantised_reference import expected

    if name == trial.victim and trial.dies_at:
        _die_at(trial.dies_at)
    inputs = [_input(step, name) for step in trial.steps]
    tensors = [each.clone() for each in inputs]
    owed = [_input(step, f"residual of {name}").float() for step in trial.steps]
    feedbacks = [ErrorFeedback() if step.feedback else None for step in trial.steps]
    for feedback, residual in zip(feedbacks, owed, strict=True):
        if feedback is not None:
            feedback.residual = residual.nan_to_num(0.0, 0.0, 0.0)
    before = [None if each is None or each.residual is None else each.residual.clone() for each in feedbacks]
    found: dict[str, Any] = {"ended": {}, "wrong": [], "lost": 0, "compared": 0}
    among: tuple[str, ...] = ()

    def begin(where: Any) -> list[Any]:
        nonlocal among
        among = group.view.members
        if trial.mode == "subgroup":  # halves, so that operations of one end well while the other's do not
            half = len(among) // 2
            ranks = range(half) if group.rank < half else range(half, len(among))
            among, where = tuple(among[rank] for rank in ranks), where.subgroup(ranks)
        return [
            where.all_reduce(tensor, step.op, tag=tag, quantize=step.scheme, feedback=feedback)
            for tag, (step, tensor, feedback) in enumerate(zip(trial.steps, tensors, feedbacks, strict=True))
        ]

    def ended(tags: list[int]) -> None:
        for tag in tags:
            step, tensor = trial.steps[tag], tensors[tag]
            found["ended"][tag] = (among, _digest(tensor))
            if name == among[0] and not step.feedback:
                parts = [_input(step, member) for member in among]
                found["compared"] += 1
                if _digest(expected(parts, step.op, step.scheme)) != _digest(tensor):
                    found["wrong"].append(f"operation {tag} is not the reference's")
                if not step.bad and step.numel:
                    exact = sum(part.double() for part in parts) / (len(parts) if step.op == "avg" else 1)
                    if not bool(((tensor.double() - exact).abs() <= error_bound(parts, step.scheme, step.op)).all()):
                        found["wrong"].append(f"operation {tag} is outside of the bound")

    while True:
        try:
            if trial.mode == "plain":
                works, well = begin(group), []
                for tag, work in enumerate(works):
                    try:
                        work.wait()
                        well.append(tag)
                    except PeerLost:
                        found["lost"] += 1
                        found["wrong"] += _changed(tag, feedbacks, before)
                ended(well)
            else:
                with group.transaction() as tx:
                    begin(tx)
                ended(list(range(len(tensors))))
            return found
        except PeerLost:
            found["lost"] += 1
            for tag, (tensor, given) in enumerate(zip(tensors, inputs, strict=True)):
                if _digest(tensor) != _digest(given):
                    found["wrong"].append(f"input {tag} is not back")
                found["wrong"] += _changed(tag, feedbacks, before)
            group.reform()


def _changed(tag: int, feedbacks: list[Any], before: list[Any]) -> list[str]:
    feedback = feedbacks[tag]
    if feedback is None or _digest(feedback.residual) == _digest(before[tag]):
        return []
    return [f"residual {tag} is not as before"]


def _input(step: Step, name: str) -> Any:
    import torch

    from integration.quantised_reference import sample

    seed = int.from_bytes(hashlib.sha256(f"{step.seed} {name}".encode()).digest()[:6], "little")
    values = sample(seed, step.numel, getattr(torch, step.dtype))
    if step.bad and step.numel and seed % 2:
        values[seed % step.numel] = float("inf")
    return values


def _digest(tensor: Any) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _die_at(call: int) -> None:
    from everstep.collectives.quantisation import Codec

    left = call

    def counted(inner: Any, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(*args)

    for name in ("encode", "decode"):
        inner = getattr(Codec, name)
        setattr(Codec, name, lambda *args, inner=inner: partial(counted, inner)(*args))

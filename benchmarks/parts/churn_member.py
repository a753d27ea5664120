"""One peer of a churn: joins, and does transactions whose exact results it knows, until it is told to stop or is out.

What a tensor holds follows from (seed, transaction, member), so the exact sum over any membership can be computed
by everybody, and a sum over no membership at all is seen. Every outcome is one line of the peer's log, written
whole before the next transaction begins: a SIGKILL loses nothing that was over.
"""

import faulthandler
import json
import logging
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from parts.namespaces import enter

from everstep.collectives import (
    CollectiveError,
    CollectiveTimeout,
    CoordinatorLost,
    Evicted,
    Group,
    PeerLost,
    TransactionAborted,
)
from everstep.collectives.transaction import Transaction

STOP = "stop"  # a file of this name in the run's folder ends every peer
_ADMIT_EVERY = 3  # transactions of a view between two calls of admit()
_REFORM_S = 0.5  # so that a peer which waits for others sees STOP
_MAX_ELEMENTS = 1 << 19
_PERIOD = 251


class OwnError(Exception):
    """The user's own, in the middle of a block."""


@dataclass(frozen=True)
class Part:
    """What a peer is to do. Log in FOLDER/NAME.log, everything else that it says in FOLDER/NAME.err.

    `own_errors`: the share of (transaction, member) at which the member leaves its block by an error of its own.
    `namespace`: of the network, by its file; there is nothing but TCP between namespaces.
    """

    folder: str
    name: str
    address: str
    token: str
    seed: int
    timeout_s: float
    own_errors: float = 0.01
    namespace: str = ""


def serve(part: Part) -> None:
    """The peer's process."""
    err = os.open(f"{part.folder}/{part.name}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(err, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(1)
    if part.namespace:
        enter(part.namespace)
    _Peer(part).run()


def inputs(seed: int, txn: int, name: str) -> list[torch.Tensor]:
    """Whole numbers below 2^12: their sum over a thousand members is exact in float32."""
    lots = random.Random(f"{seed}/{txn}")
    own = random.Random(f"{seed}/{txn}/{name}")
    found = []
    for _ in range(lots.randint(1, 5)):
        elements = int(2 ** lots.uniform(0, _MAX_ELEMENTS.bit_length() - 1))
        pattern = (torch.arange(elements) + lots.randrange(_PERIOD)) % _PERIOD
        found.append((pattern * own.randint(1, 8) + own.randrange(2048)).to(torch.float32))
    return found


def sums(seed: int, txn: int, members: tuple[str, ...]) -> list[torch.Tensor]:
    parts = [inputs(seed, txn, name) for name in members]
    return [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]


def digest(tensors: list[torch.Tensor]) -> str:
    state = xxhash.xxh3_128()
    for tensor in tensors:
        state.update(memoryview(tensor.numpy()))  # type: ignore[arg-type]
    return state.hexdigest()


class _Peer:
    def __init__(self, part: Part) -> None:
        self.part, self.folder, self.name, self.seed = part, Path(part.folder), part.name, part.seed
        self.log = os.open(self.folder / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.group: Group
        self.view: Any = None
        self.done_in_view = 0

    def say(self, what: str, **more: Any) -> None:
        line = {"what": what, "at": time.monotonic(), **more}
        os.write(self.log, (json.dumps(line) + "\n").encode())

    def run(self) -> None:
        part, transport = self.part, "tcp" if self.part.namespace else "auto"
        self.say("joining")
        try:
            self.group = Group.join(
                part.address, token=part.token, name=self.name, timeout_s=part.timeout_s, transport=transport
            )
        except CollectiveError as error:
            self.say("refused", error=type(error).__name__, text=str(error))
            return
        self.say("joined", members=self.group.view.members, view=str(self.group.view.id))
        with self.group:
            try:
                while not (self.folder / STOP).exists():
                    self._turn()
            except (Evicted, CoordinatorLost) as error:
                self.say("evicted", error=type(error).__name__, text=str(error))
                return
        self.say("left")

    def _turn(self) -> None:
        """Everybody in a view must begin the same thing, so what is next follows from the view in use."""
        if self.view != self.group.view.id:
            self.view, self.done_in_view = self.group.view.id, 0
        try:
            if self.done_in_view % _ADMIT_EVERY == _ADMIT_EVERY - 1:
                self.done_in_view += 1
                if self.group.admit():
                    self.say("admitted", members=self.group.view.members)
                return
            self._transact()
            self.done_in_view += 1
        except PeerLost as error:
            self.say("lost", text=str(error))
            self._reform()
        except TransactionAborted as error:
            self.say("aborted", text=str(error))
        except OwnError:
            self.say("failed")

    def _reform(self) -> None:
        while not (self.folder / STOP).exists():
            try:
                self.group.reform(_REFORM_S)
                return self.say("reformed", members=self.group.view.members)
            except CollectiveTimeout:
                continue

    def _transact(self) -> None:
        given: list[torch.Tensor] = []
        tensors: list[torch.Tensor] = []
        number = 0
        try:
            with self.group.transaction() as tx:
                number = tx.number
                given = inputs(self.seed, number, self.name)
                tensors = [tensor.clone() for tensor in given]
                self._operate(tx, tensors)
            members = self.group.view.members
        except CollectiveError as error:
            same = all(torch.equal(a, b) for a, b in zip(given, tensors, strict=True))
            self.say("undone", txn=number, error=type(error).__name__, restored=same)
            raise
        except OwnError:
            same = all(torch.equal(a, b) for a, b in zip(given, tensors, strict=True))
            self.say("undone", txn=number, error="OwnError", restored=same)
            raise
        exact = sums(self.seed, number, members)
        right = all(torch.equal(a, b) for a, b in zip(exact, tensors, strict=True))
        self.say(
            "commit", txn=number, view=str(self.group.view.id), members=members, digest=digest(tensors), right=right,
            operations=len(tensors),
        )  # fmt: skip

    def _operate(self, tx: Transaction, tensors: list[torch.Tensor]) -> None:
        how = random.Random(f"{self.seed}/{tx.number}/how")
        own = random.Random(f"{self.seed}/{tx.number}/{self.name}/own")
        fails_at = own.randrange(len(tensors)) if own.random() < self.part.own_errors else -1
        for i, tensor in enumerate(tensors):
            if i == fails_at:
                raise OwnError
            work = tx.all_reduce(tensor, tag=how.choice((0, i)))
            if how.random() < 0.3:
                work.wait()

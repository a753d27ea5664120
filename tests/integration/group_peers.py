"""Members of groups as real processes, driven from a test: `Peer.ask("join", ...)`.

They are forked from a server that has imported torch, so that one costs milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TOKEN = "the group's token"
WAIT_S = 20.0
context = mp.get_context("forkserver")
context.set_forkserver_preload(["everstep.collectives.group", "integration.group_peers"])


class Peer:
    """One process that may be a member. `ask` runs a method of `_Member` there and returns what it returns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def tell(self, what: str, *args: Any, **kwargs: Any) -> Peer:
        self._pipe.send((what, args, kwargs))
        return self

    def answer(self, timeout_s: float = WAIT_S) -> Any:
        assert self._pipe.poll(timeout_s), f"{self.name} has not answered within {timeout_s} s"
        found = self._pipe.recv()
        assert not isinstance(found, str) or not found.startswith("Traceback"), f"{self.name}: {found}"
        return found

    def ask(self, what: str, *args: Any, **kwargs: Any) -> Any:
        return self.tell(what, *args, **kwargs).answer()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def all_of(peers: list[Peer], what: str, *args: Any, **kwargs: Any) -> list[Any]:
    """The same of all, at the same time."""
    for peer in peers:
        peer.tell(what, *args, **kwargs)
    return [peer.answer() for peer in peers]


class CoordinatorProcess:
    """`everstep coordinator`."""

    def __init__(self, folder: Path, min_peers: int, bind: str = "127.0.0.1:0", state: Path | None = None) -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        command = [sys.executable, "-m", "everstep", "coordinator", "--token-file", str(token), "--bind", bind]
        command += ["--min-peers", str(min_peers), "--json", *(["--state", str(state)] if state else [])]
        with (folder / "coordinator.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.address: str = json.loads(self.process.stdout.readline())["address"]

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def end(self) -> int:
        self.process.terminate()
        return self._reap()

    def _reap(self) -> int:
        code = self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


# ---- in the member's process ------------------------------------------------------------------------------


def _serve(name: str, pipe: Connection) -> None:
    import traceback

    import torch

    torch.set_num_threads(1)
    member = _Member(name, pipe)
    while True:
        try:
            what, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            found = getattr(member, what)(*args, **kwargs)
        except Exception:
            found = traceback.format_exc()
        pipe.send(found)


class _Member:
    def __init__(self, name: str, pipe: Connection) -> None:
        self.name, self.pipe = name, pipe
        self.group: Any = None

    def join(self, address: str, timeout_s: float = WAIT_S, name: str = "") -> Any:
        from everstep.collectives import Group

        def join() -> Any:
            self.group = Group.join(address, token=TOKEN, name=name or self.name, timeout_s=timeout_s)
            return self.view()

        return _told(join)

    def view(self) -> tuple[int, tuple[str, ...]]:
        return self.group.view.rank, self.group.view.members

    def sum(self, value: float, operations: int = 1, elements: int = 1000, fail: str = "") -> Any:
        """A transaction of that many all-reduces: its results, or the error, and whether the inputs are back."""
        import torch

        tensors = [torch.full((elements,), value + i) for i in range(operations)]

        def transact() -> list[float]:
            with self.group.transaction() as tx:
                for tag, tensor in enumerate(tensors):
                    tx.all_reduce(tensor, tag=tag)
                if fail:
                    raise ArithmeticError(fail)
            assert all(bool((tensor == tensor[0]).all()) for tensor in tensors)
            return [float(tensor[0]) for tensor in tensors]

        found = _told(transact)
        if isinstance(found, dict):
            found["restored"] = all(bool((t == value + i).all()) for i, t in enumerate(tensors))
        return found

    def reform(self, timeout_s: float = WAIT_S) -> Any:
        return _told(lambda: self.group.reform(timeout_s).members)

    def admit(self) -> Any:
        return _told(self.group.admit)

    def pending(self, until: tuple[str, ...]) -> tuple[str, ...]:
        deadline = time.monotonic() + WAIT_S
        while self.group.pending() != until and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.group.pending()

    def await_joiners(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The same in any order."""
        deadline = time.monotonic() + WAIT_S
        while not set(names) <= set(self.group.pending()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.group.pending()

    def leave(self) -> None:
        self.group.leave()

    def churn(self, value: float, elements: int = 1000) -> dict[str, Any]:
        """Transactions until something is sent to any member, reforming where a peer is lost: what each of them gave.

        By transaction number of the group, so that members can be compared: (members, sum)."""
        import torch

        from everstep.collectives import PeerLost

        committed: dict[int, tuple[tuple[str, ...], float]] = {}
        lost: list[str] = []
        longest_s = 0.0
        tensor, end = torch.empty(elements), torch.zeros(1)
        while not end:
            tensor.fill_(value)
            end.fill_(float(self.pipe.poll()))
            began = time.monotonic()
            try:
                with self.group.transaction() as tx:
                    tx.all_reduce(tensor)
                    tx.all_reduce(end, op="max", tag=1)
                    number = tx.number
                committed[number] = (self.group.view.members, float(tensor[0]))
                assert bool((tensor == tensor[0]).all())
            except PeerLost as error:
                assert bool((tensor == value).all()), "an input is not back"
                end.zero_()
                lost.append(str(error))
                self.group.reform(WAIT_S)
            longest_s = max(longest_s, time.monotonic() - began)
        return {"committed": committed, "lost": lost, "longest_s": longest_s}

    def quantised(self, trial: Any) -> Any:
        from integration.quantised_trials import take_part

        return take_part(self.group, self.name, trial)

    def reform_without(self, gone: str) -> tuple[str, ...]:
        """Waits until this member, too, knows that `gone` is."""
        deadline = time.monotonic() + WAIT_S
        while gone in self.group.reform(WAIT_S).members and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.group.view.members

    def cut_from(self, other: str) -> None:
        """From now on this process reaches `other` in no view: the link breaks now, and so does each new one."""
        from everstep.collectives import PeerLost, group
        from everstep.collectives.mesh import Mesh

        class CutMesh(Mesh):
            def __init__(self, view: Any, rank: int, listener: Any, on_broken: Any, *more: Any) -> None:
                super().__init__(view, rank, listener, on_broken, *more)
                names = [member.name for member in view.members]
                self.cut = (lambda: on_broken(names.index(other), "no route")) if other in names else None

            def connect(self, timeout_s: float) -> None:
                if self.cut is not None:
                    self.cut()
                    raise PeerLost(f"no route to {other}")
                super().connect(timeout_s)

        group.Mesh = CutMesh
        seat = self.group._seat
        view = self.group._view
        seat.mesh.abort(PeerLost("cut"))
        seat._on_broken(view, view.rank_of(other), "cut")

    def watcher_pid(self) -> int:
        """Of this host's watcher: it holds the other end of this process's connection."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if b"everstep.collectives.watcher" in (process / "cmdline").read_bytes():
                    environment = (process / "environ").read_bytes()
                    if os.environ["EVERSTEP_TEST_SESSION"].encode() in environment:
                        return int(process.name)
            except OSError:
                continue
        return 0

    def nothing(self) -> None:
        """Ends a `churn` without asking for anything else."""


def _told(action: Any) -> Any:
    from everstep.collectives import CollectiveError

    began = time.monotonic()
    try:
        return action()
    except (CollectiveError, ArithmeticError) as error:
        return {"error": type(error).__name__, "text": str(error), "after_s": time.monotonic() - began}

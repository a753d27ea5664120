"""Randomness keyed by (seed, step, lane, module, call), so that it does not matter who computes a lane.

Each module's forward runs under its own stream and its caller's stream goes on afterwards as if nothing had
been drawn. A forward that is run again inside backward (activation checkpointing) counts its calls apart, so
it draws what the first one drew, as long as a module is called once a lane.
"""

from __future__ import annotations

from typing import Any

import torch

from everstep.platform.training.task import keyed_seed

_IN_FORWARD, _IN_BACKWARD = 0, 1


class KeyedRandomness:
    """Hooks on every module of a model. Call `begin(step, lane)` before a lane's forward."""

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        self._seed = seed
        self._step = 0
        self._lane = 0
        self._calls: dict[tuple[str, int], int] = {}
        self._saved: list[torch.Tensor] = []
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def begin(self, step: int, lane: int) -> None:
        self._step, self._lane = step, lane
        self._calls.clear()
        self._saved.clear()
        torch.default_generator.manual_seed(keyed_seed(self._seed, step, lane, "<lane>", 0))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: Any) -> None:
            again = _IN_BACKWARD if torch._C._current_graph_task_id() != -1 else _IN_FORWARD
            call = self._calls.get((name, again), 0)
            self._calls[(name, again)] = call + 1
            self._saved.append(torch.default_generator.get_state())
            torch.default_generator.manual_seed(keyed_seed(self._seed, self._step, self._lane, name, call))

        return hook

    def _leave(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        if self._saved:
            torch.default_generator.set_state(self._saved.pop())

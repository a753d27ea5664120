"""Weights to begin with, out of another run's checkpoint (`checkpoint.init_from`): never its optimizer's state.

`match` is pure and says which tensor comes from where; the check before the start and every rank ask it the same. A
rank loads before its dry lane, so ranks that read different weights are told apart like any others that would not
compute the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.collectives.tensors import bytes_of
from everstep.platform.job.spec import InitFrom
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.index import StateIndex, TensorMeta
from everstep.storage.planner import Want

KINDS = ("param", "buffer")
_AT_ONCE_BYTES = 256 << 20  # read before it is copied into the model
_SHOWN = 5


class WarmStartRefused(ValueError):
    """The checkpoint does not fit the model; the message names tensors and what to do."""


@dataclass(frozen=True)
class Matched:
    """`pairs`: (name in the model, tensor of the checkpoint); `missing` and `unused` are names."""

    pairs: tuple[tuple[str, TensorMeta], ...]
    renamed: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def text(self, url: str) -> str:
        """One line for people."""
        parts = [f"initial weights: {len(self.pairs)} tensors of {url}"]
        if self.renamed:
            parts.append(f"{len(self.renamed)} renamed ({some([f'{a} -> {b}' for a, b in self.renamed])})")
        if self.missing:
            parts.append(f"{len(self.missing)} stay as built ({some(self.missing)})")
        if self.unused:
            parts.append(f"{len(self.unused)} of it not used ({some(self.unused)})")
        return "; ".join(parts)


def match(tensors: Mapping[str, tuple[int, ...]], have: StateIndex, rule: InitFrom) -> Matched:
    """`tensors`: name and shape of the model's parameters and buffers. Raises WarmStartRefused."""
    patterns = []
    for pattern, replacement in rule.names.items():
        try:
            patterns.append((re.compile(pattern), replacement))
        except re.error as error:
            raise WarmStartRefused(f"names: {pattern!r} is no regular expression: {error}") from error
    used = [False] * len(patterns)
    found: dict[str, TensorMeta] = {}
    renamed, unused = [], []
    for meta in have.tensors:
        if meta.kind not in KINDS:
            continue
        name = meta.name
        for position, (compiled, replacement) in enumerate(patterns):
            try:
                new, count = compiled.subn(replacement, name)
            except (re.error, IndexError) as error:
                raise WarmStartRefused(f"names: {replacement!r} cannot be put in: {error}") from error
            if count:
                name, used[position] = new, True
        if name not in tensors:
            unused.append(meta.name)
            continue
        if name in found:
            raise WarmStartRefused(f"{found[name].name!r} and {meta.name!r} would both become {name!r}")
        found[name] = meta
        if name != meta.name:
            renamed.append((meta.name, name))
    idle = [pattern for pattern, hit in zip(rule.names, used, strict=True) if not hit]
    if idle:
        raise WarmStartRefused(f"names: {some(idle)} match no tensor of the checkpoint")
    wrong = [
        f"{name}: {list(meta.shape)} in the checkpoint, {list(tensors[name])} in the model"
        for name, meta in sorted(found.items())
        if meta.shape != tensors[name]
    ]
    if wrong:
        raise WarmStartRefused(f"shapes differ: {some(wrong)}")
    missing = sorted(set(tensors) - set(found))
    if not found:
        raise WarmStartRefused(f"it has none of the model's tensors; it has {some(unused) or 'no weights'}")
    if missing and rule.missing == "error":
        raise WarmStartRefused(
            f"it has not {some(missing)}; rename what it has (names), or leave these as built (missing: keep)"
        )
    return Matched(tuple(sorted(found.items())), tuple(renamed), tuple(missing), tuple(sorted(unused)))


def tensors_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of the model's parameters (frozen ones, too) and buffers, tied ones once."""
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model)}


def load_weights(model: torch.nn.Module, rule: InitFrom) -> Matched:
    """Copies the checkpoint's weights into the model, cast to its dtypes; every byte was verified before.

    Raises WarmStartRefused or StorageError; the model may have been changed in part then.
    """
    checkpoint = Checkpoint.open(rule.url)
    matched = match(tensors_of(model), checkpoint.index, rule)
    targets = dict(_tensors(model))
    for batch in _batches(matched.pairs):
        buffers = [torch.empty(meta.nbytes, dtype=torch.uint8) for _, meta in batch]
        wants = [Want(meta.name, meta.kind, 0, meta.numel, "model") for _, meta in batch]
        checkpoint.load([(want, bytes_of(buffer)) for want, buffer in zip(wants, buffers, strict=True)])
        for (name, meta), buffer in zip(batch, buffers, strict=True):
            if meta.numel:
                values = buffer.view(getattr(torch, meta.dtype)).reshape(meta.shape)
                with torch.no_grad():
                    targets[name].copy_(values)
    return matched


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _batches(pairs: Sequence[tuple[str, TensorMeta]]) -> Iterator[list[tuple[str, TensorMeta]]]:
    batch: list[tuple[str, TensorMeta]] = []
    size = 0
    for pair in pairs:
        if batch and size + pair[1].nbytes > _AT_ONCE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += pair[1].nbytes
    if batch:
        yield batch


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""What a reader of another format gives: an index over the files that are there, without a byte moved.

Owns `Foreign`, the helpers that make its fragments, and `Renames`. Values are immutable but for `Renames`, which
belongs to one thread; functions keep no state.
"""

import math
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from everstep.storage.errors import CheckpointUnsupported
from everstep.storage.index import Box, Fragment, Source, StateIndex, TensorKey

PARAM: Final = "param"
BUFFER: Final = "buffer"
_STATISTICS: Final = re.compile(r"(?:^|\.)(?:running_mean|running_var|num_batches_tracked)$")


class Foreign(msgspec.Struct, frozen=True):
    """Another format's checkpoint as this one's words.

    index    tensors and fragments; sources are ("file", "", path relative to the folder read), offsets count
             from a file's start; a box's strides where its elements do not lie one behind the other
    ignored  names of what is in the checkpoint and is not taken, with the reason in brackets
    tied     name → name of the tensor that it shares its memory with, and that is in the index
    inline   row-major bytes of small tensors that lie in no file by themselves, such as a Python `step`; these
             tensors are in the index without fragments
    notes    what a person should know, one sentence each
    """

    index: StateIndex
    ignored: tuple[str, ...] = ()
    tied: dict[str, str] = {}
    inline: dict[TensorKey, bytes] = {}
    notes: tuple[str, ...] = ()


def file_source(path: str) -> Source:
    """The source of a fragment that lies in this file of the folder."""
    return Source("file", "", path)


def fragment_at(
    name: str,
    kind: str,
    shape: Sequence[int],
    path: str,
    offset: int,
    *,
    first: Sequence[int] = (),
    extent: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Fragment:
    """The fragment of a tensor of `shape` whose first element is at byte `offset` of file `path`.

    It is the box of `extent` at `first` of the tensor (the whole one where not given), with these element
    `strides` in the file. A box that is one run of the tensor becomes a flat range, which is cheaper to read.
    """
    box: Box = ()
    if first or extent or strides:
        box = tuple(zip(first or (0,) * len(shape), extent or shape, strict=True))
    numel = math.prod(extent if first or extent else shape)
    if strides and numel:
        # A dimension of one element has any stride, and torch writes 0 for some.
        strides = [stride if n > 1 else 1 for n, stride in zip(extent or shape, strides, strict=True)]
        if min(strides, default=1) < 1:
            raise CheckpointUnsupported(
                f"{path}: {name!r} ({kind}) was expanded, elements share memory; save a contiguous copy of it"
            )
    fragment = Fragment(name, kind, 0, numel, file_source(path), offset, 0, box, tuple(strides))
    return fragment.as_run(shape) or fragment


def guessed_kind(name: str, dtype: str) -> str:
    """PARAM or BUFFER, for formats that do not say: integers and a BatchNorm's statistics are never trained."""
    floating = dtype.startswith(("float", "bfloat", "complex"))
    return PARAM if floating and not _STATISTICS.search(name) else BUFFER


class Renames:
    """A user's rules for names: (regular expression, replacement) pairs, applied one after the other (`re.sub`).

    Raises CheckpointUnsupported for a rule that is none.
    """

    def __init__(self, names: Sequence[tuple[str, str]]) -> None:
        self._rules = []
        self._used: set[int] = set()
        for pattern, replacement in names:
            try:
                rule = re.compile(pattern)
                rule.sub(replacement, "")
            except (re.error, IndexError) as error:
                raise CheckpointUnsupported(f"names: {pattern!r} → {replacement!r} is no rule: {error}") from error
            self._rules.append((rule, replacement))

    def __call__(self, name: str) -> str:
        """The name as the rules leave it."""
        for number, (rule, replacement) in enumerate(self._rules):
            name, count = rule.subn(replacement, name)
            if count:
                self._used.add(number)
        return name

    def check_used(self) -> None:
        """Raises CheckpointUnsupported for rules that changed no name: they are mistakes."""
        unused = [rule.pattern for number, (rule, _) in enumerate(self._rules) if number not in self._used]
        if unused:
            raise CheckpointUnsupported(f"names: {', '.join(map(repr, unused))} fit no name of the checkpoint")

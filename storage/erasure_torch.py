"""Shards that are torch tensors: on the CPU by the kernels for host memory, elsewhere by torch operations.

Owns the arithmetic on 64-bit words, eight bytes at a time, which runs on every device of torch. On CUDA one compiled
function a set of factors does it all in one pass over memory; torch compiles it with NVRTC, in about 0.1 s and once a
process. Where that is not to be had, plain operations go over tiles that stay in the GPU's cache. Any thread; on a
GPU the work is queued on the calling thread's current stream, as that of any torch operation.

Measured (`benchmarks/erasure.py --gpu`, H100, 1 GiB, GB/s of data): XOR 4+1 2300 in one pass, 1300 by plain
operations; 4+2 1700, encoding or decoding two losses, and 235 or 55 by plain operations; a copy of the data 1500.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import torch

from everstep.storage.erasure import dress_array
from everstep.storage.gf256 import horner_steps
from everstep.storage.kernels import Kernel, combine_padded

_log = logging.getLogger(__name__)

_WORD: Final = 8
_TILE_WORDS: Final = (16 << 20) // _WORD  # measured: 4 MiB are bound by launches, 64 MiB by memory
# Eight bytes in a word: all but the top bits, and the bottom bits.
_LOW7: Final = 0x7F7F7F7F7F7F7F7F
_ONES: Final = 0x0101010101010101
_CARRY: Final = 0x1D  # what a bit that falls out of a byte leaves behind
_FUSED_INPUTS: Final = 8  # what torch's run-time compiler takes
_FUSED_ROWS: Final = 4


def kind_of(tensors: Sequence[torch.Tensor]) -> "TensorShards":
    """What handles these shards; ValueError unless all are dense and on one device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the shards are on {names}; all must be on one device: move them with `.to(...)`")
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise ValueError(
                f"a shard is a tensor of layout {tensor.layout}, dtype {tensor.dtype} on {tensor.device}; allowed "
                "are dense tensors with memory of their own"
            )
    return TensorShards(devices.pop())


class TensorShards:
    """See `erasure.Kind`; a flat is a 1-D uint8 tensor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def flat(self, shard: torch.Tensor) -> torch.Tensor:
        """A view of the tensor's memory, or of a contiguous copy."""
        # Each operation left out is a microsecond that a GPU may wait for.
        plain = shard.detach() if shard.requires_grad else shard
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        if plain.dim() != 1 or not plain.is_contiguous():
            plain = plain.contiguous().reshape(-1)
        return plain if plain.dtype is torch.uint8 else plain.view(torch.uint8)

    def combine(
        self, kernel: Kernel, rows: tuple[bytes, ...], flats: Sequence[torch.Tensor], nbytes: int
    ) -> list[torch.Tensor]:
        """See `erasure.Kind.combine`; `kernel` serves host memory only."""
        if self._device.type != "cpu":
            return combine_tensors(rows, flats, nbytes)
        shards = [torch.empty(nbytes, dtype=torch.uint8) for _ in rows]
        combine_padded(kernel, rows, [flat.numpy() for flat in flats], [shard.numpy() for shard in shards])
        return shards

    def dress(self, shard: torch.Tensor, nbytes: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `erasure.Kind.dress`."""
        dressed: torch.Tensor = dress_array(shard if len(shard) == nbytes else shard[:nbytes], given)
        return dressed


# ---- words ----------------------------------------------------------------------------------------------


def combine_tensors(rows: tuple[bytes, ...], flats: Sequence[torch.Tensor], nbytes: int) -> list[torch.Tensor]:
    """A new uint8 tensor of `nbytes` for each row; `flats` (1-D uint8 on any one device) may be shorter.

    Shards whose length is no multiple of 8 bytes have their last few copied into a word of their own; shards whose
    memory does not start at a multiple of 8 are copied.
    """
    device = flats[0].device
    words = -(-nbytes // _WORD)
    bodies = []  # whole words of each shard
    tails: dict[int, torch.Tensor] = {}  # the word after them, by shard, where bytes are left
    for at, flat in enumerate(flats):
        whole = len(flat) // _WORD * _WORD
        bodies.append(_as_words(flat if whole == len(flat) else flat[:whole]))
        if whole < len(flat):
            tail = torch.zeros(_WORD, dtype=torch.uint8, device=device)
            tail[: len(flat) - whole] = flat[whole:]
            tails[at] = tail.view(torch.int64)
    ends = {len(body) for body in bodies} | {len(bodies[at]) + 1 for at in tails}
    if ends == {words} and not tails and words:
        return [_as_bytes(made, nbytes) for made in combine_words(rows, bodies)]
    stretches: list[list[torch.Tensor]] = [[] for _ in rows]
    for start, stop in pairwise(sorted({0, words, *ends})):
        sources = {}
        for at, body in enumerate(bodies):
            if len(body) >= stop:
                sources[at] = body[start:stop]
            elif at in tails and len(body) == start:
                sources[at] = tails[at]
        part_rows = tuple(bytes(row[at] for at in sources) for row in rows)
        if sources:
            parts = combine_words(part_rows, list(sources.values()))
        else:
            parts = [torch.zeros(stop - start, dtype=torch.int64, device=device) for _ in rows]
        for stretch, part in zip(stretches, parts, strict=True):
            stretch.append(part)
    if not words:
        return [torch.empty(0, dtype=torch.uint8, device=device) for _ in rows]
    return [_as_bytes(torch.cat(stretch), nbytes) for stretch in stretches]


def _as_bytes(words: torch.Tensor, nbytes: int) -> torch.Tensor:
    flat = words.view(torch.uint8)
    return flat if len(flat) == nbytes else flat[:nbytes]


def _as_words(flat: torch.Tensor) -> torch.Tensor:
    if flat.data_ptr() % _WORD or flat.storage_offset() % _WORD:
        flat = flat.clone()
    return flat.view(torch.int64)


def combine_words(rows: tuple[bytes, ...], sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A new int64 tensor for each row: the sum of its factors times the sources (int64, 1-D, of one length)."""
    if sources[0].device.type == "cuda" and _fused_works():
        return fused_words(rows, sources)
    return plain_words(rows, sources)


def plain_words(
    rows: tuple[bytes, ...], sources: Sequence[torch.Tensor], tile_words: int = _TILE_WORDS
) -> list[torch.Tensor]:
    """`combine_words` by plain operations, tile by tile."""
    results = [torch.empty_like(sources[0]) for _ in rows]
    spare = torch.empty_like(sources[0][:tile_words])
    for at in range(0, len(sources[0]), tile_words):
        tile = slice(at, at + tile_words)
        pieces = [source[tile] for source in sources]
        for row, result in zip(rows, results, strict=True):
            _horner(row, pieces, result[tile], spare)
    return results


def _horner(row: bytes, pieces: list[torch.Tensor], total: torch.Tensor, spare: torch.Tensor) -> None:
    carry = spare[: len(total)]
    steps = horner_steps(row)
    if not steps:
        total.zero_()
    for number, columns in enumerate(steps):
        left = list(columns)
        if number:
            # Doubles each byte (H. P. Anvin, "The mathematics of RAID-6", section 5).
            torch.bitwise_right_shift(total, 7, out=carry)
            carry.bitwise_and_(_ONES).mul_(_CARRY)
            total.bitwise_and_(_LOW7).bitwise_left_shift_(1).bitwise_xor_(carry)
        elif len(left) > 1:
            torch.bitwise_xor(pieces[left.pop()], pieces[left.pop()], out=total)
        else:
            total.copy_(pieces[left.pop()])
        for column in left:
            total.bitwise_xor_(pieces[column])


# ---- one pass, compiled ---------------------------------------------------------------------------------


def fused_body(rows: tuple[bytes, ...], begun: bool) -> list[str]:
    """Statements that set d0, d1, … (a row each) from s0, s1, … (a source each), all 64-bit words.

    `begun`: to what p0, p1, … hold already. They are C++, and Python (over int64 tensors) as well.
    """
    lines = []
    for at, row in enumerate(rows):
        steps = horner_steps(row)
        for number, columns in enumerate(steps):
            terms = [f"s{column}" for column in columns]
            if number:
                terms.append(f"((d{at} & {_LOW7}) << 1)")
                terms.append(f"(((d{at} >> 7) & {_ONES}) * {_CARRY})")
            lines.append(f"d{at} = {' ^ '.join(terms)}")
        if begun:
            lines.append(f"d{at} = d{at} ^ p{at}" if steps else f"d{at} = p{at}")
        elif not steps:
            lines.append(f"d{at} = s0 ^ s0")
    return lines


@lru_cache(maxsize=256)
def compiled(rows: tuple[bytes, ...], begun: bool) -> Callable[..., Any]:
    """`fused_body` as a function of p0, p1, … (where `begun`) and s0, s1, … on CUDA; returns d0, d1, …"""
    inputs = [*(f"p{at}" for at in range(len(rows) * begun)), *(f"s{at}" for at in range(len(rows[0])))]
    parameters = [f"T {name}" for name in inputs] + [f"T& d{at}" for at in range(len(rows))]
    body = " ".join(f"{line};" for line in fused_body(rows, begun))
    code = f"template <typename T> void combine({', '.join(parameters)}) {{ {body} }}"
    compiler: Any = torch.cuda.jiterator
    function: Callable[..., Any] = compiler._create_multi_output_jit_fn(code, num_outputs=len(rows))
    return function


def fused_words(
    rows: tuple[bytes, ...],
    sources: Sequence[torch.Tensor],
    compile_: Callable[[tuple[bytes, ...], bool], Callable[..., Any]] = compiled,
) -> list[torch.Tensor]:
    """`combine_words` in as few passes as the compiler's limits on inputs and outputs allow."""
    results: list[torch.Tensor] = []
    for first in range(0, len(rows), _FUSED_ROWS):
        group = rows[first : first + _FUSED_ROWS]
        totals: list[torch.Tensor] = []
        column = 0
        while column < len(sources):
            stop = column + _FUSED_INPUTS - len(totals)
            function = compile_(tuple(row[column:stop] for row in group), bool(totals))
            made = function(*totals, *sources[column:stop])
            totals = [made] if isinstance(made, torch.Tensor) else list(made)
            column = stop
        results += totals
    return results


@lru_cache(maxsize=1)
def _fused_works() -> bool:
    """Whether functions can be compiled at run time and compute what plain operations do; tried once a process."""
    rows = (b"\x01\x01\x01", b"\x01\x02\x8e")
    noise = torch.arange(1, 1000, device="cuda") * 0x1E3779B97F4A7C15  # wraps around: all bits change
    sources = [noise, noise.flip(0), noise >> 5]
    try:
        fused = fused_words(rows, sources)
    except (AttributeError, RuntimeError) as error:  # an interface in beta; no NVRTC
        _log.warning("erasure codes on the GPU run without a compiled kernel, several times slower: %s", error)
        return False
    if all(torch.equal(a, b) for a, b in zip(fused, plain_words(rows, sources), strict=True)):
        return True
    _log.warning("erasure codes on the GPU run without a compiled kernel, several times slower: its results differ")
    return False

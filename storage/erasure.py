"""The erasure code: parity shards from data shards, and lost shards back from any `data` of the others.

Owns the public class, the checks of what it is given and the kinds of shards it takes: bytes-like objects and numpy
arrays here, torch tensors in `erasure_torch.py`, which is imported when a tensor is first given (importing torch
costs 2 s, and snapshot managers never do). The arithmetic is in `kernels.py`, the matrix in `gf256.py`. Any thread,
several at a time on one object; the interpreter's lock is released while bytes are worked on.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from everstep.storage.gf256 import MAX_SHARDS, coefficient, parity_row, rebuild_rows
from everstep.storage.kernels import Bytes, Kernel, best_kernel, combine_padded

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


class ErasureCode:
    """`data` shards are protected by `parity` more: any `data` of them give the rest.

    parity 1 is the plain XOR, and parity row 0 is that for every number of parities; with more it is a Reed-Solomon
    code over GF(2^8) with a Cauchy matrix ([Note: parity matrix]). 1 <= data, 0 <= parity, data + parity <= 255,
    otherwise ValueError. Shards are numbered 0..data-1 (data) and data..data+parity-1 (parity).

    Shards have any length in bytes. Shorter data shards count as if zeros followed, which costs neither memory nor
    time; parity is as long as the longest. The same bytes come from every kernel and device, and from every version
    of this package.
    """

    def __init__(self, data: int, parity: int, *, kernel: Kernel | None = None) -> None:
        _check_whole("data", data, 1)
        _check_whole("parity", parity, 0)
        if data + parity > MAX_SHARDS:
            raise ValueError(
                f"{data} data and {parity} parity shards are {data + parity}; at most {MAX_SHARDS} are allowed: "
                "split the shards into more groups"
            )
        self.data = data
        self.parity = parity
        self.kernel = kernel or best_kernel()
        self._rows = tuple(parity_row(row, data) for row in range(parity))

    def __repr__(self) -> str:
        return f"ErasureCode(data={self.data}, parity={self.parity}, kernel={self.kernel.name})"

    # ---- whole shards, results allocated here -----------------------------------------------------------

    def encode(self, shards: Sequence[Any]) -> list[Any]:
        """The parity shards of `data` shards of one kind, each as long as the longest.

        Bytes-like shards give bytearrays, numpy arrays give 1-D uint8 arrays, tensors give 1-D uint8 tensors on the
        same device (any dtype and shape; CUDA: on the current stream). Arrays and tensors that are not contiguous
        are copied first. ValueError: not `data` shards, of several kinds or devices.
        """
        if len(shards) != self.data:
            raise ValueError(f"{len(shards)} shards are given; this code takes exactly {self.data}")
        kind = _kind_of(shards)
        flats = [kind.flat(shard) for shard in shards]
        if not self.parity:
            return []
        return kind.combine(self.kernel, self._rows, flats, max(map(len, flats)))

    def decode(self, shards: Mapping[int, Any], lengths: Sequence[int] | None = None) -> list[Any]:
        """All data shards, from any `data` or more of the data and parity shards by their index.

        Data shards that are given come back as they are, the same objects. What is rebuilt is as long as parity is
        (that is: padded with zeros), or `lengths[i]` bytes where `lengths` names the bytes of every data shard;
        given ones that are longer than that are cut. Rebuilt: a bytearray, array or tensor like `encode` makes, but
        with the dtype of the given data shards if all agree and the length allows it, and with their shape if that
        fits too. ValueError: too few shards, an index or a length that cannot be, shards that cannot belong together.
        """
        for index in shards:
            self._check_index(index)
        if len(shards) < self.data:
            raise ValueError(
                f"{len(shards)} shards are given ({_listed(shards)}); decoding takes any {self.data} of the "
                f"{self.data + self.parity}"
            )
        kind = _kind_of(list(shards.values()))
        flats = {index: kind.flat(shards[index]) for index in sorted(shards)}
        lengths = self._checked_lengths({index: len(flat) for index, flat in flats.items()}, lengths)
        lost = tuple(index for index in range(self.data) if index not in flats)
        found: dict[int, Any] = {}
        if lost:
            have = tuple(flats)[: self.data]  # data first: their factors are plain, and row 0 is an XOR
            # Enough of each source for the longest that is lost.
            nbytes = max(lengths[index] for index in lost)
            rows = rebuild_rows(self.data, lost, have)
            used = [flats[index] if len(flats[index]) <= nbytes else flats[index][:nbytes] for index in have]
            results = kind.combine(self.kernel, rows, used, nbytes)
            given = [shards[index] for index in have if index < self.data]
            found = {
                index: kind.dress(result, lengths[index], given) for index, result in zip(lost, results, strict=True)
            }
        for index in range(self.data):
            if index not in found:
                whole = len(flats[index]) == lengths[index]
                shard = shards[index]
                found[index] = shard if whole else kind.dress(flats[index], lengths[index], [shard])
        return [found[index] for index in range(self.data)]

    # ---- into the caller's memory, nothing allocated ----------------------------------------------------

    def encode_into(self, shards: Sequence["Buffer | None"], parity: Sequence["Buffer"]) -> None:
        """All parity shards of `data` shards, written into `parity`: writable buffers of one length.

        A data shard may be shorter than that, or None: as if zeros followed. Buffers are contiguous and those
        written overlap no other; anything else is a ValueError.
        """
        sources = [_source(f"shard {index}", shard) for index, shard in enumerate(self._all_data(shards))]
        if len(parity) != self.parity:
            raise ValueError(f"{len(parity)} parity buffers are given; this code makes {self.parity}")
        self._combine(self._rows, sources, parity)

    def parity_of(self, row: int, shards: Sequence["Buffer | None"], into: "Buffer") -> None:
        """Parity shard `row` (0..parity-1) alone, written into `into`; otherwise as `encode_into`."""
        self._check_row(row)
        sources = [_source(f"shard {index}", shard) for index, shard in enumerate(self._all_data(shards))]
        self._combine((self._rows[row],), sources, [into])

    def rebuild(self, index: int, have: Mapping[int, "Buffer | None"], into: "Buffer") -> None:
        """Shard `index`, data or parity, out of any `data` of the others, written into `into`.

        `have`: `data` or more other shards, or the same stretch of each, by index; a value that is shorter than
        `into`, or None, counts as if zeros followed. Of more than `data` those with the lowest indices are used.
        Other demands are those of `encode_into`.
        """
        self.rebuild_into(have, {index: into})

    def rebuild_into(self, have: Mapping[int, "Buffer | None"], into: Mapping[int, "Buffer"]) -> None:
        """`rebuild` of several shards in one pass, each into its buffer; all of these have one length."""
        for index in (*have, *into):
            self._check_index(index)
            if index in have and index in into:
                raise ValueError(f"shard {index} is to be rebuilt, but given too; leave it out of what is given")
        if len(have) < self.data:
            raise ValueError(
                f"{len(have)} shards are given ({_listed(have)}); rebuilding takes any {self.data} of the others"
            )
        used = tuple(sorted(have)[: self.data])
        sources = [_source(f"shard {index}", have[index]) for index in used]
        self._combine(rebuild_rows(self.data, tuple(into), used), sources, list(into.values()))

    def accumulate(self, row: int, index: int, shard: "Buffer", into: "Buffer") -> None:
        """into ^= coefficient(row, index) * shard, over the shard's length; `into` is at least as long.

        Parity `row` is the sum of this over all data shards, in any order, into zeros.
        """
        factor = self.coefficient(row, index)
        source = _bytes_of("the shard", shard)
        result = _target("the buffer for the result", into)
        _check_memory([source], [result])
        if len(source):
            self.kernel.add(factor, source, result[: len(source)])

    def coefficient(self, row: int, index: int) -> int:
        """The factor of data shard `index` in parity `row`, 1..255. See [Note: parity matrix]."""
        self._check_row(row)
        if not 0 <= index < self.data:
            raise ValueError(f"data shard {index} does not exist; allowed are 0 to {self.data - 1}")
        return coefficient(row, index)

    def _combine(self, rows: tuple[bytes, ...], sources: Sequence[Bytes | None], buffers: Sequence["Buffer"]) -> None:
        results = [_target(f"buffer {at} for results", buffer) for at, buffer in enumerate(buffers)]
        if not results:
            return
        if len({len(result) for result in results}) > 1:
            raise ValueError(
                f"the buffers for results have {', '.join(str(len(result)) for result in results)} bytes; "
                "all of them must have one length"
            )
        _check_memory(sources, results)
        combine_padded(self.kernel, rows, sources, results)

    # ---- checks -----------------------------------------------------------------------------------------

    def _all_data(self, shards: Sequence["Buffer | None"]) -> Sequence["Buffer | None"]:
        if len(shards) != self.data:
            raise ValueError(
                f"{len(shards)} shards are given; this code takes exactly {self.data} (None stands for zeros)"
            )
        return shards

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.parity:
            allowed = f"0 to {self.parity - 1}" if self.parity else "none: this code has no parity"
            raise ValueError(f"parity row {row} does not exist; allowed are {allowed}")

    def _check_index(self, index: int) -> None:
        total = self.data + self.parity
        if not hasattr(index, "__index__") or not 0 <= index < total:
            raise ValueError(
                f"shard {index!r} does not exist; allowed are 0 to {total - 1} ({self.data} data, "
                f"{self.parity} parity)"
            )

    def _checked_lengths(self, given: dict[int, int], lengths: Sequence[int] | None) -> list[int]:
        """The bytes of each data shard."""
        parity = {index: nbytes for index, nbytes in given.items() if index >= self.data}
        if len(set(parity.values())) > 1:
            raise ValueError(
                "parity shards of one encoding have one length; these have: "
                + ", ".join(f"shard {index} {nbytes} bytes" for index, nbytes in parity.items())
            )
        longest = max(parity.values(), default=max(given.values()))
        for index, nbytes in given.items():
            if nbytes > longest:
                raise ValueError(
                    f"data shard {index} has {nbytes} bytes and parity {longest}; no data shard is longer than "
                    "parity: give shards of one encoding"
                )
        if lengths is None:
            return [given.get(index, longest) for index in range(self.data)]
        if len(lengths) != self.data:
            raise ValueError(
                f"{len(lengths)} lengths are given; there is one for each of the {self.data} data shards"
            )
        for index, nbytes in enumerate(lengths):
            if not 0 <= nbytes <= given.get(index, longest):
                raise ValueError(
                    f"lengths[{index}] is {nbytes}; allowed for data shard {index} are 0 to "
                    f"{given.get(index, longest)} bytes"
                )
        return list(lengths)


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {least} on, data + parity at most 255")


def _listed(shards: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(shards))) or "none"


# ---- memory ---------------------------------------------------------------------------------------------


def _bytes_of(what: str, buffer: "Buffer") -> Bytes:
    try:
        view = memoryview(buffer)
    except TypeError:
        raise ValueError(
            f"{what} is a {type(buffer).__name__}; allowed are bytes-like objects (bytes, bytearray, memoryview, "
            "mmap, a numpy array); `encode` and `decode` take tensors too"
        ) from None
    if not view.c_contiguous:
        raise ValueError(f"{what} is not contiguous; copy it first, bytes(...) for example")
    return np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)


def _source(what: str, buffer: "Buffer | None") -> Bytes | None:
    return None if buffer is None else _bytes_of(what, buffer)


def _target(what: str, buffer: "Buffer") -> Bytes:
    array = _bytes_of(what, buffer)
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only; the result is written into it: give a bytearray or a writable view")
    return array


def _check_memory(sources: Sequence[Bytes | None], results: Sequence[Bytes]) -> None:
    """That no source is longer than the results, and that nothing that is written overlaps anything else."""
    nbytes = len(results[0])
    for source in sources:
        if source is not None and len(source) > nbytes:
            raise ValueError(
                f"a shard has {len(source)} bytes and the result {nbytes}; no shard may be longer than it"
            )
    for at, result in enumerate(results):
        for other in (*sources, *results[:at]):
            if other is not None and np.may_share_memory(result, other):
                raise ValueError(
                    "a buffer for a result overlaps another buffer; results are written over it: give others"
                )


# ---- kinds of shards ------------------------------------------------------------------------------------


class Kind(Protocol):
    """One kind of shards. Their bytes are handled as a `flat`: something 1-D with `len` and slices."""

    def flat(self, shard: Any) -> Any:
        """The shard's bytes, without a copy where it is contiguous."""
        ...

    def combine(self, kernel: Kernel, rows: tuple[bytes, ...], flats: Sequence[Any], nbytes: int) -> list[Any]:
        """A new shard of `nbytes` for each row, from sources that may be shorter; see `Kernel.combine`."""
        ...

    def dress(self, shard: Any, nbytes: int, given: Sequence[Any]) -> Any:
        """The first `nbytes` of a flat or a new shard, looking as `given` do if they agree and it can be."""
        ...


class _BytesLike:
    def flat(self, shard: "Buffer") -> Bytes:
        return _bytes_of("a shard", shard)

    def combine(
        self, kernel: Kernel, rows: tuple[bytes, ...], flats: Sequence[Bytes], nbytes: int
    ) -> list[bytearray]:
        shards = [bytearray(nbytes) for _ in rows]
        combine_padded(kernel, rows, flats, [_bytes_of("a result", shard) for shard in shards])
        return shards

    def dress(self, shard: Bytes | bytearray, nbytes: int, given: Sequence[Any]) -> bytearray:
        if isinstance(shard, bytearray):
            del shard[nbytes:]
            return shard
        return bytearray(shard[:nbytes])


class _Arrays:
    def flat(self, shard: npt.NDArray[Any]) -> Bytes:
        if shard.dtype.hasobject:
            raise ValueError(
                f"a shard is an array of dtype {shard.dtype}, whose bytes are no data; give plain numbers"
            )
        return np.ascontiguousarray(shard).reshape(-1).view(np.uint8)

    def combine(self, kernel: Kernel, rows: tuple[bytes, ...], flats: Sequence[Bytes], nbytes: int) -> list[Bytes]:
        shards = [np.empty(nbytes, dtype=np.uint8) for _ in rows]
        combine_padded(kernel, rows, flats, shards)
        return shards

    def dress(self, shard: Bytes, nbytes: int, given: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        dressed: npt.NDArray[Any] = dress_array(shard[:nbytes], given)
        return dressed


def dress_array(flat: Any, given: Sequence[Any]) -> Any:
    """Flat uint8 with the dtype and the shape of `given`, as far as these agree and it can be; numpy or torch."""
    if len({array.dtype for array in given}) != 1 or len(flat) % given[0].itemsize:
        return flat
    typed = flat.view(given[0].dtype)
    shapes = {tuple(array.shape) for array in given}
    if len(shapes) != 1 or math.prod(given[0].shape) != len(typed):
        return typed
    return typed.reshape(given[0].shape)


def _kind_of(shards: Sequence[Any]) -> Kind:
    torch = sys.modules.get("torch")  # while nobody has imported it, there are no tensors
    tensors = [shard for shard in shards if torch is not None and isinstance(shard, torch.Tensor)]
    if tensors:
        if len(tensors) < len(shards):
            raise ValueError(f"{len(tensors)} of {len(shards)} shards are tensors; give tensors only, or none")
        from everstep.storage.erasure_torch import kind_of

        return kind_of(tensors)
    return _Arrays() if all(isinstance(shard, np.ndarray) for shard in shards) else _BytesLike()

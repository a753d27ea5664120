"""The parity of a group of segments: written by each domain for its part, and read to rebuild what was lost.

A parity segment is a segment (storage/segment.py: its seal is written last) whose payload is the parity rows that one
position of a group holds ([Stripes]) and whose index (`ParityIndex`) describes the whole group's version: who was in
it, how long their payloads were, their own indices with all checksums, and the checksum of every piece of the rows.
So any survivor of the group can say what the others held.

Everything moves in pieces of `PIECE_BYTES`, from every source in turn: what is asked for is sent ahead by the sources
while this side encodes. Memory: one piece a source. Functions of one thread; never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec
import xxhash

from everstep.storage.erasure import ErasureCode
from everstep.storage.errors import SegmentDamaged
from everstep.storage.segment import (
    Seal,
    SegmentMap,
    capacity_of,
    payload,
    read_index_bytes,
    read_seal,
    seal_raw,
    unseal,
    verify,
)
from everstep.storage.stripes import Stripes, parity_bytes

PARITY_SUFFIX: Final = ".par"
PIECE_BYTES: Final = 1 << 20  # k of them and the result stay in a core's second-level cache or near it


class ParityIndex(msgspec.Struct, frozen=True, array_like=True):
    """`members`: domains by position; `payloads`: bytes of their payloads; `indexes`: their segments' own indices.

    `checksums`: xxh3_64 of each piece of `PIECE_BYTES` of this position's rows, row by row.
    """

    members: tuple[str, ...]
    position: int
    parity: int
    payloads: tuple[int, ...]
    indexes: tuple[bytes, ...]
    checksums: tuple[int, ...]

    @property
    def stripes(self) -> Stripes:
        return Stripes(self.payloads, self.parity)


class Part(NamedTuple):
    """A range of bytes of the payload of a segment."""

    offset: int
    nbytes: int


class Reader(Protocol):
    """One source's ranges: `ask` for all of them, then `read` each in the same order."""

    def ask(self, parts: Sequence[Part]) -> None: ...

    def read(self, into: memoryview) -> None: ...


class Described(NamedTuple):
    """What a member's segment holds: bytes of its payload, and its index as it is written."""

    payload_bytes: int
    written_index: bytes


def parity_capacity(sizes: Sequence[tuple[int, int]], parity: int) -> int:
    """File size of a parity segment of a group; `sizes`: (payload, index) bytes at most, by position."""
    rows = parity_bytes(max(payload_bytes for payload_bytes, _ in sizes), len(sizes), parity)
    checksums = 9 * (parity + rows // PIECE_BYTES)
    names = 256 * len(sizes)  # and the few numbers of each member
    return capacity_of(rows, 256 + names + checksums + sum(index_bytes for _, index_bytes in sizes))


def write_parity(
    segment: SegmentMap,
    seal: tuple[int, int, int],
    members: Sequence[str],
    position: int,
    parity: int,
    described: Sequence[Described],
    reader_of: Callable[[int], Reader],
) -> Seal:
    """Encodes this position's rows out of the others' payloads, and seals them as (epoch, number, step).

    `described`: by position. `reader_of(position)` reads that member's payload. Raises what the readers raise; the
    segment is unsealed then.
    """
    stripes = Stripes(tuple(item.payload_bytes for item in described), parity)
    unseal(segment)
    code = ErasureCode(stripes.data, parity)
    readers = {p: reader_of(p) for p in range(stripes.members) if p != position}
    wanted: dict[int, list[Part]] = {p: [] for p in readers}
    for row in range(parity):
        for sources in _row_pieces(stripes, position, row):
            for source, part in sources:
                if part.nbytes:
                    wanted[source].append(part)
    for source, parts in wanted.items():
        readers[source].ask(parts)
    room = [memoryview(bytearray(PIECE_BYTES)) for _ in range(stripes.data)]
    checksums = []
    for row in range(parity):
        at = row * stripes.chunk_bytes
        for n, sources in enumerate(_row_pieces(stripes, position, row)):
            length = min(PIECE_BYTES, stripes.chunk_bytes - n * PIECE_BYTES)
            shards = []
            for i, (source, part) in enumerate(sources):
                if part.nbytes:
                    readers[source].read(room[i][: part.nbytes])
                shards.append(room[i][: part.nbytes])
            into = payload(segment, at, length)
            code.parity_of(row, shards, into)
            checksums.append(xxhash.xxh3_64_intdigest(into))
            at += length
    index = ParityIndex(
        tuple(members),
        position,
        parity,
        stripes.lengths,
        tuple(item.written_index for item in described),
        tuple(checksums),
    )
    return seal_raw(segment, seal, parity * stripes.chunk_bytes, msgspec.msgpack.encode(index))


def _row_pieces(stripes: Stripes, position: int, row: int) -> Iterator[list[tuple[int, Part]]]:
    """For each piece of a row: (position, range of its payload) of every data element; no bytes behind its end."""
    stripe = stripes.stripe_of_row(position, row)
    for at in range(0, stripes.chunk_bytes, PIECE_BYTES):
        sources = []
        for element in range(stripes.data):
            source = stripes.data_position(stripe, element)
            sources.append((source, _clipped(stripes, source, element, at, PIECE_BYTES)))
        yield sources


def _clipped(stripes: Stripes, position: int, chunk: int, at: int, nbytes: int) -> Part:
    """Bytes [at, at + nbytes) of a chunk, as far as the payload has them."""
    start, length = stripes.chunk_range(position, chunk)
    return Part(start + min(at, length), max(0, min(nbytes, length - at)))


def read_parity_index(segment: SegmentMap, seal: Seal) -> ParityIndex:
    """Raises SegmentChanged, SegmentDamaged."""
    data = read_index_bytes(segment, seal)
    try:
        index = msgspec.msgpack.decode(data, type=ParityIndex)
        n = len(index.members)
        if not (0 < index.parity < n == len(index.payloads) == len(index.indexes) and 0 <= index.position < n):
            raise ValueError(f"{n} members with parity {index.parity}")
        if min(index.payloads) < 0 or index.parity * index.stripes.chunk_bytes != seal.payload_bytes:
            raise ValueError(f"payloads {index.payloads} and {seal.payload_bytes} bytes of parity")
    except (msgspec.MsgspecError, ValueError) as error:
        raise SegmentDamaged(f"{segment.path}: the parity index cannot be read: {error}") from error
    return index


def verify_parity(segment: SegmentMap, seal: Seal) -> ParityIndex:
    """Checks every piece of the rows against its checksum. Raises SegmentDamaged naming the piece."""
    index = read_parity_index(segment, seal)
    chunk = index.stripes.chunk_bytes
    pieces = [(row, at) for row in range(index.parity) for at in range(0, chunk, PIECE_BYTES)]
    if len(pieces) != len(index.checksums):
        raise SegmentDamaged(f"{segment.path}: {len(index.checksums)} checksums for {len(pieces)} pieces")
    for (row, at), checksum in zip(pieces, index.checksums, strict=True):
        data = payload(segment, row * chunk + at, min(PIECE_BYTES, chunk - at))
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise SegmentDamaged(f"{segment.path}: parity row {row} at {at} does not match its checksum")
    return index


def verify_any(segment: SegmentMap) -> Seal:
    """Checks every checksum of a sealed segment, of a rank's or of parity. Raises SegmentDamaged."""
    seal = read_seal(segment)
    if seal is None or not segment.path.endswith(PARITY_SUFFIX):
        return verify(segment)
    verify_parity(segment, seal)
    return seal


# ---- rebuilding -----------------------------------------------------------------------------------------


def can_rebuild(stripes: Stripes, lost: int, data: Sequence[bool], rows: Sequence[bool]) -> bool:
    """Whether position `lost` can be rebuilt where `data[p]` and `rows[p]` say what of position p is left."""
    return all(
        len(_elements(stripes, stripes.stripe_of_chunk(lost, chunk), data, rows)) >= stripes.data
        for chunk in range(stripes.data)
    )


def _elements(stripes: Stripes, stripe: int, data: Sequence[bool], rows: Sequence[bool]) -> list[int]:
    """The elements of a stripe that are left; data, whose use costs no multiplication, first."""
    found = [i for i in range(stripes.data) if data[stripes.data_position(stripe, i)]]
    return found + [stripes.data + row for row in range(stripes.parity) if rows[stripes.parity_position(stripe, row)]]


class _Step(NamedTuple):
    chunk: int  # of the lost payload; also its element in the stripe
    at: int  # in the target
    nbytes: int
    sources: list[tuple[int, bool, int, Part]]  # element, whether it is parity, position, range


def rebuild(
    stripes: Stripes,
    lost: int,
    data: Mapping[int, Reader],
    rows: Mapping[int, Reader],
    wanted: Sequence[tuple[int, memoryview]],
) -> None:
    """Fills each (offset in the lost payload, buffer) of `wanted`.

    `data[p]` reads the payload of position p, `rows[p]` its parity segment's. Raises what the readers raise. At least
    as many elements as `can_rebuild` asks for must be there.
    """
    have_data = [p in data for p in range(stripes.members)]
    have_rows = [p in rows for p in range(stripes.members)]
    steps = [(target, list(_steps(stripes, lost, have_data, have_rows, at, len(target)))) for at, target in wanted]
    asked: dict[tuple[bool, int], list[Part]] = {}
    for _, todo in steps:
        for step in todo:
            for _, is_row, position, part in step.sources:
                if part.nbytes:
                    asked.setdefault((is_row, position), []).append(part)
    for (is_row, position), parts in asked.items():
        (rows if is_row else data)[position].ask(parts)
    room = [memoryview(bytearray(PIECE_BYTES)) for _ in range(stripes.data)]
    code = ErasureCode(stripes.data, stripes.parity)
    for target, todo in steps:
        for step in todo:
            have = {}
            for place, (element, is_row, position, part) in zip(room, step.sources, strict=True):
                if part.nbytes:
                    (rows if is_row else data)[position].read(place[: part.nbytes])
                have[element] = place[: part.nbytes]
            code.rebuild(step.chunk, have, target[step.at : step.at + step.nbytes])


def _steps(
    stripes: Stripes, lost: int, data: Sequence[bool], rows: Sequence[bool], offset: int, nbytes: int
) -> Iterator[_Step]:
    done = 0
    while done < nbytes:
        chunk, at = divmod(offset + done, stripes.chunk_bytes)
        length = min(nbytes - done, stripes.chunk_bytes - at, PIECE_BYTES)
        stripe = stripes.stripe_of_chunk(lost, chunk)
        sources = []
        for element in _elements(stripes, stripe, data, rows)[: stripes.data]:
            if element < stripes.data:
                position = stripes.data_position(stripe, element)
                part = _clipped(stripes, position, element, at, length)
                sources.append((element, False, position, part))
            else:
                row = element - stripes.data
                position = stripes.parity_position(stripe, row)
                sources.append((element, True, position, Part(row * stripes.chunk_bytes + at, length)))
        yield _Step(chunk, done, length, sources)
        done += length

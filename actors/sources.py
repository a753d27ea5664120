"""Where a rank gets state from: segments of its own and of other domains, parity, files. One call, several threads.

Sources are read side by side, one thread a source; what one source gives comes in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec

from everstep.actors.fetch import Asker, RemoteReader, check, cut_fragments, fetch, fetch_local
from everstep.platform.training.messages import Rebuild
from everstep.storage.checkpoint import Checkpoint
from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import Fragment
from everstep.storage.parity import Part, Reader, rebuild, verify_any
from everstep.storage.planner import Copy
from everstep.storage.segment import SegmentMap, payload
from everstep.storage.stripes import Stripes

Copies = list[tuple[Copy, memoryview]]
_AT_ONCE = 8
_ASKED_BYTES = 256 << 20  # of a rebuild, at a time: what is asked for is listed in memory on both sides


class Sources:
    """Copies of regions come from files only: no rank's memory is cut otherwise than into flat ranges.

    `own`: this rank's domain, whose segments are under `folder`. `damaged` collects (domain, locator)."""

    def __init__(self, own: str, folder: Path, token: str) -> None:
        self._own = own
        self._folder = folder
        self._token = token
        self.damaged: set[tuple[str, str]] = set()

    def fill(
        self,
        copies: Copies,
        addresses: dict[str, str],
        checkpoint: str,
        rebuilds: Sequence[Rebuild],
        go_on: Callable[[], None],
    ) -> None:
        """Fills every buffer, verified. `addresses`: domain -> its manager's; `go_on` raises to end it.

        Raises SegmentDamaged, CheckpointCorrupt, OSError.
        """
        groups: dict[tuple[str, str, str], Copies] = {}
        for item in copies:
            source = item[0].source
            together = source.kind == "file" or (source.kind == "segment" and source.holder != self._own)
            key = (source.kind, source.holder, "" if together else source.locator)
            groups.setdefault(key, []).append(item)
        found = {(r.domain, r.locator): r for r in rebuilds}
        files = Checkpoint.open(checkpoint) if checkpoint else None

        def read(key: tuple[str, str, str], group: Copies) -> None:
            go_on()
            kind, domain, locator = key
            if kind == "file":
                assert files is not None, "a file source without a checkpoint"
                files.read_copies(group)
            elif kind == "parity":
                self._rebuild(found[domain, locator], addresses, group)
            elif domain == self._own:
                self._noting(domain, lambda: fetch_local(self._path(domain, locator), group))
            else:
                self._noting(domain, lambda: fetch(addresses[domain], self._token, group))

        with ThreadPoolExecutor(min(_AT_ONCE, max(len(groups), 1)), thread_name_prefix="restore") as pool:
            for future in [pool.submit(read, key, group) for key, group in sorted(groups.items())]:
                future.result()

    def _path(self, domain: str, locator: str) -> str:
        return str(self._folder / domain / locator)

    def _noting(self, domain: str, read: Callable[[], None]) -> None:
        try:
            read()
        except SegmentDamaged as error:
            if error.locator:
                self.damaged.add((domain, error.locator))
            raise

    def _rebuild(self, item: Rebuild, addresses: dict[str, str], copies: Copies) -> None:
        stripes = Stripes(item.payloads, item.parity)
        with ExitStack() as stack:

            def readers(places: Sequence[tuple[str, str]]) -> dict[int, Reader]:
                found: dict[int, Reader] = {}
                for position, (domain, locator) in enumerate(places):
                    if domain == self._own:
                        found[position] = stack.enter_context(_LocalReader(self._path(domain, locator)))
                    elif domain:
                        asker = Asker(addresses[domain], self._token)
                        stack.callback(asker.close)
                        found[position] = RemoteReader(asker, locator, verify=True)
                return {p: _Noting(self, *places[p], reader) for p, reader in found.items()}

            data, rows = readers(item.data), readers(item.rows)
            batch: Copies = []
            size = 0
            whole = _widened(copies)
            for copy, buffer in sorted(whole, key=lambda entry: entry[0].offset):
                batch.append((copy, buffer))
                size += len(buffer)
                if size >= _ASKED_BYTES:
                    rebuild(stripes, item.position, data, rows, [(c.offset, b) for c, b in batch])
                    batch, size = [], 0
            rebuild(stripes, item.position, data, rows, [(c.offset, b) for c, b in batch])

            def checks() -> None:
                for copy, buffer in whole:
                    check(copy, buffer)

            self._noting(item.domain, checks)
            decoded = {(copy.name, copy.kind, copy.fragments): (copy, buffer) for copy, buffer in whole}
            for copy, buffer in copies:
                wide, found = decoded[copy.name, copy.kind, copy.fragments]
                if found is not buffer:
                    at = copy.offset - wide.offset
                    buffer[:] = found[at : at + copy.nbytes]


def _widened(copies: Copies) -> Copies:
    """One copy of each run of fragments; where only parts are wanted, the whole of them in memory of its own: a part
    cannot be checked, and parity that was encoded from damaged bytes is right by its own checksums."""
    found: dict[tuple[str, str, tuple[Fragment, ...]], tuple[Copy, memoryview]] = {}
    for copy, buffer in copies:
        key = (copy.name, copy.kind, copy.fragments)
        if key in found:
            continue
        if cut_fragments(copy):
            first, last = copy.fragments[0], copy.fragments[-1]
            nbytes = (last.stop - first.start) * copy.itemsize
            wide = msgspec.structs.replace(
                copy, start=first.start, stop=last.stop, offset=first.offset, nbytes=nbytes
            )
            found[key] = (wide, memoryview(bytearray(nbytes)))
        else:
            found[key] = (copy, buffer)
    return list(found.values())


class _Noting:
    """A reader whose damage is remembered: the next view does without it."""

    def __init__(self, sources: Sources, domain: str, locator: str, reader: Reader) -> None:
        self._sources = sources
        self._where = (domain, locator)
        self._reader = reader

    def ask(self, parts: Sequence[Part]) -> None:
        self._reader.ask(parts)

    def read(self, into: memoryview) -> None:
        try:
            self._reader.read(into)
        except SegmentDamaged:
            self._sources.damaged.add(self._where)
            raise


class _LocalReader:
    """One segment of this domain, checked when it is first read."""

    def __init__(self, path: str) -> None:
        self._segment = SegmentMap(path, writable=False)
        self._parts: list[Part] = []
        self._checked = False

    def __enter__(self) -> _LocalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._segment.close()

    def ask(self, parts: Sequence[Part]) -> None:
        self._parts += parts

    def read(self, into: memoryview) -> None:
        if not self._checked:
            verify_any(self._segment)
            self._checked = True
        part = self._parts.pop(0)
        with payload(self._segment, part.offset, part.nbytes) as data:
            into[:] = data

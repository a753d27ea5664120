"""Byte ranges of sealed segments over a socket: what is asked for arrives, and nothing else is handed out."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash

from everstep.actors import fetch as module
from everstep.actors.fetch import FetchServer, fetch, fetch_local
from everstep.collectives.errors import HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, proof
from everstep.storage.errors import SegmentDamaged
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta
from everstep.storage.planner import Copy, Want, plan
from everstep.storage.segment import SegmentMap, Writer, create_segment, read_index, read_seal, required_bytes, verify

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
TOKEN = "a token"
W = TensorMeta("w", "param", "float32", (3000,))
B = TensorMeta("b", "buffer", "uint8", (5,))
DATA = {"w": os.urandom(W.nbytes), "b": os.urandom(B.nbytes)}


def write(path: Path, sealed: bool = True) -> StateIndex | None:
    """w in three fragments, b whole."""
    pieces = [(W, 0, 1000), (W, 1000, 1001), (W, 1001, 3000), (B, 0, 5)]
    create_segment(path, required_bytes(pieces))
    with SegmentMap(path, writable=True) as segment:
        writer = Writer(segment)
        writer.begin()
        for meta, start, stop in pieces:
            writer.put(meta, start, stop, DATA[meta.name][start * meta.itemsize : stop * meta.itemsize])
        if not sealed:
            return None
        writer.seal(1, 1, 7)
        seal = read_seal(segment)
        assert seal is not None
        return read_index(segment, seal, Source("segment", "slot-0", path.name))


class Domain:
    """A manager's folder and its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = write(folder / "good.seg")
        self.server = FetchServer("127.0.0.1", TOKEN, self)

    def resolve(self, locator: str) -> str | None:
        path = self.folder / locator
        return str(path) if path.is_file() else None

    def verified(self, locator: str) -> None:
        with SegmentMap(self.folder / locator, writable=False) as segment:
            verify(segment)

    def copies(self, *ranges: tuple[str, int, int]) -> list[tuple[Copy, memoryview]]:
        assert self.index is not None
        kinds = {"w": "param", "b": "buffer"}
        wants = [Want(name, kinds[name], start, stop, "me") for name, start, stop in ranges]
        return [
            (copy, memoryview(bytearray(copy.nbytes))) for copy in plan(self.index, wants, lambda source, want: 1)
        ]


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[Domain]:
    domain = Domain(tmp_path)
    yield domain
    domain.server.close()


def assert_filled(copies: list[tuple[Copy, memoryview]]) -> None:
    for copy, buffer in copies:
        size = copy.itemsize
        assert bytes(buffer) == DATA[copy.name][copy.start * size : copy.stop * size]


@pytest.mark.parametrize(
    "ranges",
    [
        [("w", 0, 3000), ("b", 0, 5)],
        [("w", 0, 1)],
        [("w", 2999, 3000)],
        [("w", 999, 1002)],
        [("w", 1000, 1001)],
        [("b", 1, 3), ("w", 7, 2000)],
        [],
    ],
)
@pytest.mark.parametrize("remote", [True, False])
def test_any_ranges_arrive(domain: Domain, ranges: list[tuple[str, int, int]], remote: bool) -> None:
    copies = domain.copies(*ranges)
    if remote:
        fetch(domain.server.address, TOKEN, copies)
    else:
        fetch_local(str(domain.folder / "good.seg"), copies)
    assert_filled(copies)


def test_several_askers_at_once_are_served(domain: Domain) -> None:
    asked = [domain.copies(("w", at, 3000), ("b", 0, 5)) for at in range(0, 600, 50)]
    threads = [threading.Thread(target=fetch, args=(domain.server.address, TOKEN, copies)) for copies in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for copies in asked:
        assert_filled(copies)


def test_a_server_without_the_token_is_not_believed(domain: Domain) -> None:
    copies = domain.copies(("b", 0, 5))
    with pytest.raises(HandshakeRefused, match="does not know this run's token"):
        fetch(domain.server.address, "another token", copies)
    assert bytes(copies[0][1]) == bytes(5)


def test_an_asker_without_the_token_gets_no_byte(domain: Domain) -> None:
    with _asked(domain, [("good.seg", 0, 5)], token="another token") as connection:
        assert _rest(connection) == b""


def _asked(domain: Domain, ranges: object, token: str = TOKEN) -> socket.socket:
    """A connection on which `ranges`, or any bytes, were asked for by hand."""
    connection = _dial(domain)
    nonce = b"n" * NONCE_BYTES
    connection.sendall(nonce)
    answer = connection.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
    items = [module.Range(*item) for item in ranges] if isinstance(ranges, list) else []
    request = ranges if isinstance(ranges, bytes) else msgspec.msgpack.encode(module.Ranges(items))
    given = proof(token, "client", nonce, answer[:NONCE_BYTES], b"fetch")
    connection.sendall(given + struct.pack("<Q", len(request)) + request)
    return connection


def _dial(domain: Domain) -> socket.socket:
    host, port = domain.server.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), 10)


def _rest(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


def test_a_locator_that_is_not_the_domains_is_refused(domain: Domain, tmp_path: Path) -> None:
    for locator in ("gone.seg", "", "\0.seg"):
        with _asked(domain, [(locator, 0, 5)]) as connection:
            answer = _rest(connection)
            assert answer[:1] == b"\0"
            assert repr(locator).encode() in answer


def test_a_manager_resolves_nothing_outside_its_folder(tmp_path: Path) -> None:
    from everstep.actors.shelf import DomainShelf

    folder = tmp_path / "slot-0"
    folder.mkdir()
    write(folder / "good.seg")
    write(tmp_path / "secret.seg")
    (folder / "notes.txt").write_text("no segment")
    (folder / "folder.seg").mkdir()
    shelf = DomainShelf(folder, "slot-0", stall_s=1)
    assert shelf.resolve("good.seg") == str(folder / "good.seg")
    outside = ["../secret.seg", str(tmp_path / "secret.seg"), "../slot-0/good.seg", "..", "", "/"]
    for locator in [*outside, "notes.txt", "folder.seg", "gone.seg", "good.seg\0"]:
        assert shelf.resolve(locator) is None, locator


def test_an_unsealed_segment_is_refused_there_and_here(domain: Domain) -> None:
    write(domain.folder / "torn.seg", sealed=False)
    (copy, buffer), *_ = domain.copies(("b", 0, 5))
    torn = msgspec.structs.replace(copy, source=Source("segment", "slot-0", "torn.seg"))
    with pytest.raises(SegmentDamaged, match=r"'torn\.seg' is not sealed"):
        fetch(domain.server.address, TOKEN, [(torn, buffer)])
    with pytest.raises(SegmentDamaged, match=r"torn\.seg is not sealed"):
        fetch_local(str(domain.folder / "torn.seg"), [(torn, buffer)])
    assert bytes(buffer) == bytes(5)


@pytest.mark.parametrize("remote", [True, False])
def test_a_fragment_with_a_wrong_checksum_is_refused_by_name(domain: Domain, remote: bool) -> None:
    copies = domain.copies(("w", 0, 3000), ("b", 0, 5))
    path = domain.folder / "good.seg"
    damaged = bytearray(path.read_bytes())
    at = damaged.index(DATA["w"][4004:])  # in the third fragment
    damaged[at] ^= 1
    path.write_bytes(damaged)
    where = (domain.server.address, TOKEN) if remote else (str(path),)
    with pytest.raises(SegmentDamaged, match=r"w/param\[\d+:3000\] from good\.seg has a wrong checksum"):
        (fetch if remote else fetch_local)(*where, copies)


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("byte", [4004, 7000, 11999])
def test_a_part_of_a_fragment_with_a_wrong_checksum_is_refused(domain: Domain, remote: bool, byte: int) -> None:
    """Wherever in the third fragment the damage is: in what is asked for, before or behind it."""
    copies = domain.copies(("b", 0, 5), ("w", 1500, 2000))
    path = domain.folder / "good.seg"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(DATA["w"][4004:]) + byte - 4004] ^= 1
    path.write_bytes(damaged)
    where = (domain.server.address, TOKEN) if remote else (str(path),)
    with pytest.raises(SegmentDamaged, match="checksum") as caught:
        (fetch if remote else fetch_local)(*where, copies)
    assert caught.value.locator == "good.seg"


def test_every_whole_fragment_of_a_joined_copy_is_checked() -> None:
    source = Source("segment", "slot-0", "s")
    data = bytes(range(12))
    sums = [xxhash.xxh3_64_intdigest(data[:4]), xxhash.xxh3_64_intdigest(data[4:])]
    for wrong in (0, 1):
        given = [s ^ (number == wrong) for number, s in enumerate(sums)]
        fragments = (Fragment("w", "k", 0, 4, source, 0, given[0]), Fragment("w", "k", 4, 12, source, 4, given[1]))
        copy = Copy("w", "k", 0, 12, source, 0, 12, "me", fragments)
        with pytest.raises(SegmentDamaged):
            module.check(copy, memoryview(data))


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 10**9), (10**18, 1), (0, -1), (2**62, 2**62)])
def test_a_range_outside_the_segment_is_refused(domain: Domain, offset: int, nbytes: int) -> None:
    with _asked(domain, [("good.seg", offset, nbytes)]) as connection:
        assert _rest(connection)[:1] == b"\0"


def test_what_was_good_before_a_bad_range_still_arrives(domain: Domain) -> None:
    with _asked(domain, [("good.seg", 0, 8), ("gone.seg", 0, 8)]) as connection:
        answer = _rest(connection)
    assert answer[:9] == b"\1" + DATA["w"][:8]
    assert answer[9:10] == b"\0"


@pytest.mark.parametrize(
    "request_", [b"", b"\xff" * 9, b"\x91\x93\xa1\xff\x00\x00", b"\x91\x93\xa1a\x00", b"\xdd\xff\xff\xff\xff"]
)
def test_a_request_that_cannot_be_read_ends_its_connection_only(domain: Domain, request_: bytes) -> None:
    with _asked(domain, request_) as connection:
        assert _rest(connection) == b""
    copies = domain.copies(("b", 0, 5))
    fetch(domain.server.address, TOKEN, copies)
    assert_filled(copies)


def test_a_request_of_unbounded_length_is_not_read(domain: Domain) -> None:
    with _asked(domain, b"") as connection, _dial(domain) as other:
        assert _rest(connection) == b""
        nonce = b"n" * NONCE_BYTES
        other.sendall(nonce)
        answer = other.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        given = proof(TOKEN, "client", nonce, answer[:NONCE_BYTES], b"fetch")
        other.sendall(given + struct.pack("<Q", 1 << 60))
        assert _rest(other) == b""


def test_a_manager_that_goes_away_in_the_middle_is_an_os_error(domain: Domain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def half() -> None:
            connection, _ = server.accept()
            with connection:
                theirs = connection.recv(NONCE_BYTES, socket.MSG_WAITALL)
                mine = b"m" * NONCE_BYTES
                connection.sendall(mine + proof(TOKEN, "server", theirs, mine, b"fetch"))
                connection.recv(100)
                connection.sendall(b"\1\2\3")

        thread = threading.Thread(target=half)
        thread.start()
        with pytest.raises(OSError):  # noqa: PT011  # closed, or reset
            fetch(address, TOKEN, domain.copies(("b", 0, 5)))
        thread.join(10)
    with pytest.raises(OSError):  # noqa: PT011
        fetch(address, TOKEN, domain.copies(("b", 0, 5)))


def test_close_ends_the_server_at_once(domain: Domain) -> None:
    began = time.monotonic()
    domain.server.close()
    assert time.monotonic() - began < 1
    with pytest.raises(OSError):  # noqa: PT011
        _dial(domain)

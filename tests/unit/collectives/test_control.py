"""Control streams over real gRPC on loopback."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import msgspec
import pytest

from everstep.collectives import control
from everstep.collectives.control import ControlClient, ControlServer, Peer, call
from everstep.collectives.errors import CoordinatorLost, HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROOF_BYTES, PROTOCOL_VERSION, proof

pytestmark = pytest.mark.usefixtures("leaves_nothing_behind")
TOKEN = "a token"
WAIT_S = 10.0


class Served:
    """A server that keeps what it hears."""

    def __init__(
        self, token: str = TOKEN, on_call: Callable[[bytes], bytes] | None = None, max_peers: int = 8
    ) -> None:
        self.heard: queue.Queue[tuple[Peer, bytes]] = queue.Queue()
        self.closed: queue.Queue[Peer] = queue.Queue()
        self.server = ControlServer("127.0.0.1:0", token, self._hear, self.closed.put, on_call, max_peers)
        self.address = self.server.address

    def _hear(self, peer: Peer, data: bytes) -> None:
        self.heard.put((peer, data))


class Client:
    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.heard: queue.Queue[bytes] = queue.Queue()
        self.closed: queue.Queue[str] = queue.Queue()
        self.stream = ControlClient(address, token, self.heard.put, self.closed.put, timeout_s=5.0)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(on_call=lambda data: data[::-1])
    yield served
    served.server.stop()


@pytest.fixture
def connect(served: Served) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(served.address))
        return clients[-1]

    yield connect
    for client in clients:
        client.stream.close()


def test_both_directions_keep_their_order(served: Served, connect: Callable[[], Client]) -> None:
    client = connect()
    for number in range(500):
        client.stream.send(b"%d" % number)
    heard = [served.heard.get(timeout=WAIT_S) for _ in range(500)]
    assert [data for _, data in heard] == [b"%d" % number for number in range(500)]
    (peer,) = {peer.ident: peer for peer, _ in heard}.values()
    for number in range(500):
        peer.send(b"%d" % number)
    assert [client.heard.get(timeout=WAIT_S) for _ in range(500)] == [b"%d" % number for number in range(500)]


def test_a_message_of_many_megabytes_arrives(served: Served, connect: Callable[[], Client]) -> None:
    data = bytes(range(256)) * (20 << 12)  # 20 MiB; gRPC's own limit is 4
    connect().stream.send(data)
    assert served.heard.get(timeout=WAIT_S)[1] == data


def test_many_peers_are_told_apart(served: Served, connect: Callable[[], Client]) -> None:
    clients = [connect() for _ in range(8)]
    for number, client in enumerate(clients):
        client.stream.send(b"%d" % number)
    peers = {data: peer for peer, data in (served.heard.get(timeout=WAIT_S) for _ in clients)}
    assert len({peer.ident for peer in peers.values()}) == 8
    for data, peer in peers.items():
        peer.send(b"hello " + data)
    for number, client in enumerate(clients):
        assert client.heard.get(timeout=WAIT_S) == b"hello %d" % number
        assert client.heard.empty()


def test_what_was_sent_before_a_client_closes_still_arrives(served: Served, connect: Callable[[], Client]) -> None:
    client = connect()
    for number in range(200):
        client.stream.send(b"%d" % number)
    client.stream.close()
    client.stream.close()
    assert [served.heard.get(timeout=WAIT_S)[1] for _ in range(200)] == [b"%d" % number for number in range(200)]
    served.closed.get(timeout=WAIT_S)
    assert client.closed.empty(), "who closes is not told of it"


def test_a_client_is_told_once_when_the_server_hangs_up(served: Served, connect: Callable[[], Client]) -> None:
    client = connect()
    client.stream.send(b"x")
    peer, _ = served.heard.get(timeout=WAIT_S)
    peer.send(b"last words")
    peer.close()
    assert client.heard.get(timeout=WAIT_S) == b"last words"
    assert client.closed.get(timeout=WAIT_S) == "closed by the other side"
    assert served.closed.get(timeout=WAIT_S).ident == peer.ident
    client.stream.send(b"nobody hears this")
    assert client.closed.empty()
    assert served.closed.empty()


def test_stop_ends_every_stream_and_waits_for_its_threads(connect: Callable[[], Client], served: Served) -> None:
    clients = [connect() for _ in range(3)]
    served.server.stop()
    assert [t.name for t in threading.enumerate() if t.name.startswith("control-read")] == []
    assert served.closed.qsize() == 3
    for client in clients:
        client.closed.get(timeout=WAIT_S)


def test_stop_returns_after_the_last_callback() -> None:
    """Its owner may then give up what the callbacks use."""
    closed: list[Peer] = []

    def slowly(peer: Peer) -> None:
        time.sleep(0.3)
        closed.append(peer)

    server = ControlServer("127.0.0.1:0", TOKEN, lambda peer, data: None, slowly)
    client = Client(server.address)
    server.stop()
    assert len(closed) == 1
    client.stream.close()


def test_a_client_with_another_token_is_refused_with_the_reason(served: Served) -> None:
    with pytest.raises(HandshakeRefused, match="does not know this run's token"):
        Client(served.address, "another token")
    assert served.heard.empty()


def test_a_server_refuses_a_client_that_cannot_prove_the_token(served: Served, monkeypatch) -> None:
    """It does not trust the client to look first."""
    monkeypatch.setattr(control, "proof_matches", _only_on_the_servers_side(control.proof_matches))
    with pytest.raises(HandshakeRefused, match="wrong token"):
        Client(served.address, "another token")
    assert served.heard.empty()
    assert served.closed.empty()


def _only_on_the_servers_side(matches: Callable[..., bool]) -> Callable[..., bool]:
    def look(given: bytes, token: str, role: str, *rest: bytes) -> bool:
        return role == "server" or matches(given, token, role, *rest)

    return look


def test_a_proof_of_an_earlier_stream_is_worth_nothing(served: Served) -> None:
    """What an eavesdropper saw: both nonces and the client's proof."""
    theirs = proof(TOKEN, "client", b"n" * NONCE_BYTES, b"m" * NONCE_BYTES)
    with pytest.raises(grpc.RpcError) as caught:
        _raw_stream(served.address, [_hello(), _answer(theirs)])
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, "wrong token")


def test_another_protocol_version_is_refused_with_both_versions(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _raw_stream(served.address, [_hello(version=PROTOCOL_VERSION + 1)])
    expected = f"protocol version {PROTOCOL_VERSION + 1}, this side speaks {PROTOCOL_VERSION}"
    assert caught.value.details() == expected


def _hello(version: int = PROTOCOL_VERSION) -> bytes:
    return msgspec.msgpack.encode({"version": version, "nonce": b"n" * NONCE_BYTES})


def _answer(given: bytes) -> bytes:
    return msgspec.msgpack.encode({"nonce": b"n" * NONCE_BYTES, "proof": given})


def _raw_stream(address: str, messages: list[bytes]) -> list[bytes]:
    with grpc.insecure_channel(address) as channel:
        return list(channel.stream_stream("/everstep.Control/Stream")(iter(messages), timeout=WAIT_S))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [b""],
        [b"\xff" * 50],
        [b"\x82\xa7version\x01\xa5nonce\xa1\xff"],
        [msgspec.msgpack.encode({"version": 1, "nonce": "\u00e9"})],
        [b"\x81\xa1\xff\x01"],  # a key that is not UTF-8
        [_hello(), b"\xc1"],
        [_hello(), b"\x81\xa1\xff\x01"],
    ],
)
def test_garbage_ends_its_own_stream_only(
    served: Served, connect: Callable[[], Client], messages: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    assert len(_raw_stream(served.address, messages)) <= 1, "an answer to the hello, and never an acceptance"
    client.stream.send(b"still here")
    assert served.heard.get(timeout=WAIT_S)[1] == b"still here"
    assert served.closed.empty()
    assert caplog.records == [], "not an exception in a handler"


def test_silent_callers_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "HANDSHAKE_TIMEOUT_S", 0.3)
    served = Served(max_peers=1)
    try:
        with grpc.insecure_channel(served.address) as channel:
            pause: queue.Queue[bytes | None] = queue.Queue()
            silent = [channel.stream_stream("/everstep.Control/Stream")(iter(pause.get, None)) for _ in range(30)]
            client = Client(served.address)  # as soon as their time is up
            client.stream.send(b"x")
            assert served.heard.get(timeout=WAIT_S)[1] == b"x"
            time.sleep(0.4)
            client.stream.send(b"y")  # its own time is not limited
            assert served.heard.get(timeout=WAIT_S)[1] == b"y"
            client.stream.close()
            for _ in silent:
                pause.put(None)
    finally:
        served.server.stop()


def test_a_server_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlServer, "stream", lambda self, requests, context: time.sleep(1.0) or iter(()))
    served = Served()
    began = time.monotonic()
    with pytest.raises(CoordinatorLost, match=r"no answer from .* within 0\.3 s"):
        ControlClient(served.address, TOKEN, lambda data: None, lambda why: None, timeout_s=0.3)
    assert time.monotonic() - began < 1.0
    served.server.stop()


def test_nobody_there_is_said_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(CoordinatorLost, match=r"no answer from .* within 0\.2 s"):
        ControlClient(f"127.0.0.1:{port}", TOKEN, lambda data: None, lambda why: None, timeout_s=0.2)


def test_calls_need_the_token(served: Served) -> None:
    assert call(served.address, TOKEN, b"abc") == b"cba"
    with pytest.raises(HandshakeRefused, match="wrong token"):
        call(served.address, "another token", b"abc")


def test_a_proof_belongs_to_its_call(served: Served) -> None:
    _, (mine, theirs, given) = _recorded_call(served, b"abc")
    for proof_given in (given, proof(TOKEN, "client", mine, theirs, b"abd"), b"", bytes(PROOF_BYTES)):
        with pytest.raises(grpc.RpcError) as caught:
            _recorded_call(served, b"abd", given=proof_given)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_recorded_call_is_worth_nothing_the_second_time(served: Served) -> None:
    """Every byte that the caller sent, again, while the first call's server still runs."""
    first, (nonce, _, given) = _recorded_call(served, b"abc")
    assert first == b"cba"
    with pytest.raises(grpc.RpcError) as caught:
        _recorded_call(served, b"abc", nonce, given)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def _recorded_call(
    served: Served, data: bytes, nonce: bytes = b"n" * NONCE_BYTES, given: bytes | None = None
) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
    """A call by hand: the reply; both nonces and the proof."""
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    out.put(msgspec.msgpack.encode({"version": PROTOCOL_VERSION, "nonce": nonce}))
    with grpc.insecure_channel(served.address) as channel:
        replies = channel.stream_stream("/everstep.Control/Call")(iter(out.get, None), timeout=WAIT_S)
        theirs = msgspec.msgpack.decode(next(replies))["nonce"]
        made = proof(TOKEN, "call", nonce, theirs, data) if given is None else given
        out.put(msgspec.msgpack.encode({"proof": made, "data": data}))
        try:
            return next(replies), (nonce, theirs, made)
        finally:
            out.put(None)


@pytest.mark.parametrize("messages", [[], [b""], [b"\xc1"], [b"\x91" * 5000], [_hello(), b"\xc1"], [_hello(), b""]])
def test_garbage_calls_harm_nobody(served: Served, messages: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(served.address) as channel:
        said = list(channel.stream_stream("/everstep.Control/Call")(iter(messages), timeout=WAIT_S))
    assert len(said) <= 1, "an answer to the hello, and never a reply"
    assert call(served.address, TOKEN, b"abc") == b"cba"
    assert caplog.records == []


def test_bytes_that_are_not_http_harm_nobody(served: Served, connect: Callable[[], Client]) -> None:
    client = connect()
    host, port = served.address.split(":")
    for garbage in (
        b"",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
    ):
        for _ in range(20):
            with socket.create_connection((host, int(port)), WAIT_S) as stranger:
                stranger.sendall(garbage)
    client.stream.send(b"still here")
    assert served.heard.get(timeout=WAIT_S)[1] == b"still here"
    assert connect().stream is not None


def test_more_callers_than_may_greet_push_each_other_out_and_no_member() -> None:
    """However long their time is, and with every worker but the spare ones taken."""
    served = Served(max_peers=2)
    try:
        with grpc.insecure_channel(served.address) as channel:
            pause: queue.Queue[bytes | None] = queue.Queue()
            first = Client(served.address)
            silent = [channel.stream_stream("/everstep.Control/Stream")(iter(pause.get, None)) for _ in range(60)]
            began = time.monotonic()
            second = Client(served.address)
            assert time.monotonic() - began < control.HANDSHAKE_TIMEOUT_S / 2
            for client, said in ((first, b"1"), (second, b"2")):
                client.stream.send(said)
                assert served.heard.get(timeout=WAIT_S)[1] == said
            for _ in silent:
                pause.put(None)
            for client in (first, second):
                client.stream.close()
    finally:
        served.server.stop()


def test_one_peer_more_than_there_may_be_is_refused_with_the_setting() -> None:
    served = Served(max_peers=2)
    try:
        clients = [Client(served.address) for _ in range(2)]
        with pytest.raises(HandshakeRefused, match=r"all of its 2 peers are there \(max_peers\)"):
            Client(served.address)
        clients.pop().stream.close()
        served.closed.get(timeout=WAIT_S)
        clients.append(Client(served.address))
        clients[-1].stream.send(b"x")
        assert served.heard.get(timeout=WAIT_S)[1] == b"x"
        for client in clients:
            client.stream.close()
    finally:
        served.server.stop()


def test_a_peer_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    monkeypatch.setattr(control, "_MAX_QUEUED", 100)
    stuck = threading.Event()
    stream = ControlClient(served.address, TOKEN, lambda data: stuck.wait(WAIT_S) and None, lambda why: None)
    stream.send(b"x")
    peer, _ = served.heard.get(timeout=WAIT_S)
    for _ in range(400):
        peer.send(bytes(1 << 18))
        if not served.closed.empty():
            break
        time.sleep(0.005)
    assert served.closed.get(timeout=WAIT_S).ident == peer.ident
    stuck.set()
    stream.close()


def test_a_message_above_the_limit_ends_its_stream_only(connect: Callable[[], Client]) -> None:
    heard: queue.Queue[bytes] = queue.Queue()
    closed: queue.Queue[Peer] = queue.Queue()
    server = ControlServer(
        "127.0.0.1:0", TOKEN, lambda peer, data: heard.put(data), closed.put, max_message_bytes=1 << 20
    )
    try:
        large, small = Client(server.address), Client(server.address)
        large.stream.send(bytes((1 << 20) + 1))
        closed.get(timeout=WAIT_S)
        small.stream.send(b"x")
        assert heard.get(timeout=WAIT_S) == b"x"
        for client in (large, small):
            client.stream.close()
    finally:
        server.stop()


def test_a_call_to_nobody_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(CoordinatorLost):
        call(f"127.0.0.1:{port}", TOKEN, b"abc", timeout_s=0.5)

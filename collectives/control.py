"""Control streams: one gRPC bidirectional stream a peer, opened with a mutual proof of the token; and single calls.

    caller                                   server
    version, nonce                           ->
                                             <- nonce, proof
    proof; of a call: proof of its data      ->
                                             <- accepted; of a call: the reply

Both nonces are fresh, so nothing that was recorded is worth anything later. Strangers cost at most MAX_GREETINGS
workers and HANDSHAKE_TIMEOUT_S each; who has been at it longest goes first.

Owns the threads behind each stream. `on_message` is called from one reader thread a stream, in order;
`send` may be called from any thread and never blocks.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import grpc
import msgspec

from everstep.collectives.errors import CoordinatorLost, HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROTOCOL_VERSION, new_nonce, proof, proof_matches
from everstep.collectives.messages import MAX_MESSAGE_BYTES, decoded

_grpc: Any = grpc  # plain bytes go over the wire: no serializers, which the stubs insist on
HANDSHAKE_TIMEOUT_S = 10.0
MAX_GREETINGS = 16  # a caller takes milliseconds
_MAX_QUEUED = 1 << 16  # messages for a peer that does not read
_SPARE_WORKERS = 8  # for who begins while the others are taken
_MAX_WAITING_RPCS = 256  # more are refused by gRPC itself
_METHOD = "/everstep.Control/Stream"
_CALL = "/everstep.Control/Call"
_RECEIVE_LIMIT = "grpc.max_receive_message_length"
_OPTIONS = [
    (_RECEIVE_LIMIT, MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    # A channel of one's own, not one that is shared with, and backs off like, an earlier one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    # Clients may ask every second whether the other side is there.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]


_SERVER_OPTIONS = [
    *(option for option in _OPTIONS if option[0] != _RECEIVE_LIMIT),
    # Strangers' connections: one that never speaks HTTP/2, one that speaks it and asks for nothing, one for many.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.max_concurrent_streams", 64),
]


class _Hello(msgspec.Struct, frozen=True):
    version: int
    nonce: bytes


class _Answer(msgspec.Struct, frozen=True):
    nonce: bytes
    proof: bytes


class _Request(msgspec.Struct, frozen=True):
    proof: bytes
    data: bytes


class _Shaken(NamedTuple):
    """What a greeting has brought: both nonces, and the caller's next message."""

    theirs: bytes
    mine: bytes
    message: bytes


_hello = msgspec.msgpack.Decoder(_Hello)
_answer = msgspec.msgpack.Decoder(_Answer)
_request = msgspec.msgpack.Decoder(_Request)


def _pack(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


class Peer:
    """The server's end of one stream."""

    def __init__(self, ident: int, cancel: Callable[[], object]) -> None:
        self.ident = ident
        self._cancel = cancel
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, data: bytes) -> None:
        """Ends the stream of a peer that has left too many messages unread."""
        if self._out.qsize() >= _MAX_QUEUED:
            self._cancel()
            return
        self._out.put(data)

    def close(self) -> None:
        self._out.put(None)


class ControlServer:
    """Listens for control streams on `bind` (host:port, port 0 = any) and for calls.

    Callbacks: `on_message(peer, data)`, `on_close(peer)`; `on_call(data) -> data` answers calls. Messages of more
    than `max_message_bytes` end their stream.
    """

    def __init__(
        self,
        bind: str,
        token: str,
        on_message: Callable[[Peer, bytes], None],
        on_close: Callable[[Peer], None],
        on_call: Callable[[bytes], bytes] | None = None,
        max_peers: int = 256,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._token = token
        self._on_message = on_message
        self._on_close = on_close
        self._on_call = on_call
        self._max_peers = max_peers
        self._idents = itertools.count(1)
        self._greeting: dict[int, Any] = {}  # contexts, in the order they came
        self._peers: dict[int, Peer] = {}
        self._readers: set[threading.Thread] = set()
        self._lock = threading.Lock()
        workers = max_peers + MAX_GREETINGS + _SPARE_WORKERS
        self._pool = futures.ThreadPoolExecutor(workers, thread_name_prefix="control")
        self._server = grpc.server(
            self._pool,
            handlers=[_Handler(self)],
            options=[*_SERVER_OPTIONS, (_RECEIVE_LIMIT, max_message_bytes)],
            maximum_concurrent_rpcs=workers + _MAX_WAITING_RPCS,
        )
        host = bind.rsplit(":", 1)[0]
        port = self._server.add_insecure_port(bind)
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Ends all streams and waits for their threads."""
        with self._lock:
            peers = list(self._peers.values())
            readers = set(self._readers)  # each takes itself off just before it ends
        for peer in peers:
            peer.close()
        self._server.stop(grace=0.5).wait(5)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            readers |= self._readers
        for reader in readers - {threading.current_thread()}:
            reader.join(5)

    def _greet(self, requests: Iterator[bytes], context: Any) -> Generator[bytes, None, _Shaken | None]:
        """The server's side up to the caller's proof, which is for the caller of this to look at; None: garbage."""
        ident = next(self._idents)
        with self._lock:
            if len(self._greeting) >= MAX_GREETINGS:
                self._greeting.pop(next(iter(self._greeting))).cancel()
            self._greeting[ident] = context
        late = threading.Timer(HANDSHAKE_TIMEOUT_S, context.cancel)  # a silent caller would keep a worker for ever
        late.daemon = True
        late.start()
        try:
            hello = decoded(_hello, next(requests))
            if hello.version != PROTOCOL_VERSION or len(hello.nonce) != NONCE_BYTES:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"protocol version {hello.version}, this side speaks {PROTOCOL_VERSION}",
                )
            mine = new_nonce()
            yield _pack(_Answer(mine, proof(self._token, "server", hello.nonce, mine)))
            return _Shaken(hello.nonce, mine, next(requests))
        except (StopIteration, msgspec.MsgspecError):
            return None
        finally:
            late.cancel()
            with self._lock:
                self._greeting.pop(ident, None)

    def stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One peer's stream: handshake, then its outgoing queue until either side closes."""
        shaken = yield from self._greet(requests, context)
        try:
            given = decoded(_answer, shaken.message).proof if shaken is not None else None
        except msgspec.MsgspecError:
            return
        if shaken is None or given is None:
            return
        if not proof_matches(given, self._token, "client", shaken.theirs, shaken.mine):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        peer = Peer(next(self._idents), context.cancel)
        reader = threading.Thread(
            target=self._read, args=(peer, requests), name=f"control-read-{peer.ident}", daemon=True
        )
        with self._lock:
            full = len(self._peers) >= self._max_peers
            if not full:
                self._peers[peer.ident] = peer
                self._readers.add(reader)
        if full:
            text = f"all of its {self._max_peers} peers are there (max_peers)"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        reader.start()
        try:
            yield b""  # accepted
            while (data := peer._out.get()) is not None:
                yield data
        finally:
            with self._lock:
                self._peers.pop(peer.ident, None)
            peer.close()

    def _read(self, peer: Peer, requests: Iterator[bytes]) -> None:
        try:
            for data in requests:
                self._on_message(peer, data)
        except Exception as error:  # gRPC ends a broken stream with a bare Exception; ours are re-raised below
            if type(error) is not Exception and not isinstance(error, grpc.RpcError):
                peer.close()
                self._on_close(peer)
                raise
        peer.close()
        self._on_close(peer)
        with self._lock:
            self._readers.discard(threading.current_thread())

    def call(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One call: handshake, a request whose proof covers its data, the reply."""
        shaken = yield from self._greet(requests, context)
        if shaken is None:
            return
        try:
            request = decoded(_request, shaken.message)
        except msgspec.MsgspecError:
            return
        if self._on_call is None or not proof_matches(
            request.proof, self._token, "call", shaken.theirs, shaken.mine, request.data
        ):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        assert self._on_call is not None
        yield self._on_call(request.data)


class _Handler(_grpc.GenericRpcHandler):  # type: ignore[misc]  # the stubs know no handler of plain bytes
    def __init__(self, server: ControlServer) -> None:
        self._server = server

    def service(self, details: Any) -> Any:
        if details.method == _METHOD:
            return grpc.stream_stream_rpc_method_handler(self._server.stream)
        if details.method == _CALL:
            return grpc.stream_stream_rpc_method_handler(self._server.call)
        return None


class ControlClient:
    """The client's end of one stream. Raises HandshakeRefused or CoordinatorLost from the constructor."""

    def __init__(
        self,
        address: str,
        token: str,
        on_message: Callable[[bytes], None],
        on_close: Callable[[str], None],
        timeout_s: float = 20.0,
        keepalive_s: float | None = None,
    ) -> None:
        """`keepalive_s`: a stream whose other side does not answer for twice that long ends (a host that vanished
        says no goodbye)."""
        self.address = address
        self._on_message = on_message
        self._on_close = on_close
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._channel: Any = _grpc.insecure_channel(address, options=_OPTIONS + _keepalive(keepalive_s))
        nonce = new_nonce()
        self._out.put(_pack(_Hello(PROTOCOL_VERSION, nonce)))
        # Not channel_ready_future: its thread may outlive the channel, and who frees the channel then waits for ever.
        self._call = self._channel.stream_stream(_METHOD)(iter(self._out.get, None), wait_for_ready=True)
        late = threading.Timer(timeout_s, self._call.cancel)  # nobody is there, or does not answer
        late.daemon = True
        late.start()
        try:
            answer = decoded(_answer, next(self._call))
            if not _is_proof_of_server(answer, token, nonce):
                raise HandshakeRefused(f"{address} does not know this run's token")
            self._out.put(_pack(_Answer(nonce, proof(token, "client", nonce, answer.nonce))))
            next(self._call)
        except (grpc.RpcError, StopIteration, msgspec.MsgspecError) as error:
            self.close()
            if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.CANCELLED:
                raise CoordinatorLost(f"no answer from {address} within {timeout_s:g} s") from None
            detail = error.details() if isinstance(error, grpc.RpcError) else str(error)
            if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE:
                raise CoordinatorLost(f"{address} went away in the middle of a handshake: {detail}") from None
            raise HandshakeRefused(f"{address} refused the control stream: {detail}") from None
        except HandshakeRefused:
            self.close()
            raise
        finally:
            late.cancel()
        self._reader = threading.Thread(target=self._read, name="control-client", daemon=True)
        self._reader.start()

    def send(self, data: bytes) -> None:
        self._out.put(data)

    def close(self) -> None:
        """Ends the stream after what was sent has left; idempotent."""
        if not self._closed:
            self._closed = True
            self._out.put(None)
            reader = getattr(self, "_reader", None)
            if reader is not None and reader is not threading.current_thread():
                reader.join(2)
            self._channel.close()

    def _read(self) -> None:
        reason = "closed by the other side"
        try:
            for data in self._call:
                self._on_message(data)
        except grpc.RpcError as error:
            reason = str(error.details() if hasattr(error, "details") else error)
        except msgspec.MsgspecError as error:
            reason = f"the other side spoke nonsense: {error}"
            self._call.cancel()
        if not self._closed:
            self._on_close(reason)


def _keepalive(period_s: float | None) -> list[tuple[str, int]]:
    if period_s is None:
        return []
    period_ms = int(period_s * 1000)
    return [
        ("grpc.keepalive_time_ms", period_ms),
        ("grpc.keepalive_timeout_ms", period_ms),
        # Whoever wants to know that soon does not want to wait a second between attempts either.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 300),
    ]


def call(address: str, token: str, data: bytes, timeout_s: float = 10.0) -> bytes:
    """One call. Raises HandshakeRefused (wrong token) or CoordinatorLost (nobody there)."""
    nonce = new_nonce()
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    out.put(_pack(_Hello(PROTOCOL_VERSION, nonce)))
    with _grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            replies = channel.stream_stream(_CALL)(iter(out.get, None), timeout=timeout_s)
            answer = decoded(_answer, next(replies))
            if not _is_proof_of_server(answer, token, nonce):
                raise HandshakeRefused(f"{address}: wrong token")
            out.put(_pack(_Request(proof(token, "call", nonce, answer.nonce, data), data)))
            reply: bytes = next(replies)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
                raise HandshakeRefused(f"{address}: {error.details()}") from None
            raise CoordinatorLost(f"{address}: {error.details()}") from None
        except (StopIteration, msgspec.MsgspecError):
            raise CoordinatorLost(f"{address}: what answers there is no coordinator") from None
        finally:
            out.put(None)
    return reply


def _is_proof_of_server(answer: _Answer, token: str, nonce: bytes) -> bool:
    if len(answer.nonce) != NONCE_BYTES:
        return False
    return proof_matches(answer.proof, token, "server", nonce, answer.nonce)

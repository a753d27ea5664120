"""Control streams: one gRPC bidirectional stream a peer, opened with a mutual proof of the token.

Owns the threads behind each stream. `on_message` is called from one reader thread a stream, in order;
`send` may be called from any thread and never blocks.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import msgspec

from everstep.collectives.errors import CoordinatorLost, HandshakeRefused
from everstep.collectives.handshake import NONCE_BYTES, PROTOCOL_VERSION, new_nonce, proof, proof_matches
from everstep.collectives.messages import MAX_MESSAGE_BYTES

_grpc: Any = grpc  # plain bytes go over the wire: no serializers, which the stubs insist on
HANDSHAKE_TIMEOUT_S = 10.0
_METHOD = "/everstep.Control/Stream"
_CALL = "/everstep.Control/Call"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]


class _Hello(msgspec.Struct, frozen=True):
    version: int
    nonce: bytes


class _Answer(msgspec.Struct, frozen=True):
    nonce: bytes
    proof: bytes


def _pack(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


class Peer:
    """The server's end of one stream."""

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, data: bytes) -> None:
        self._out.put(data)

    def close(self) -> None:
        self._out.put(None)


class ControlServer:
    """Listens for control streams on `bind` (host:port, port 0 = any) and for unary calls.

    Callbacks: `on_message(peer, data)`, `on_close(peer)`; `on_call(data) -> data` answers unary calls.
    """

    def __init__(
        self,
        bind: str,
        token: str,
        on_message: Callable[[Peer, bytes], None],
        on_close: Callable[[Peer], None],
        on_call: Callable[[bytes], bytes] | None = None,
        max_peers: int = 256,
    ) -> None:
        self._token = token
        self._on_message = on_message
        self._on_close = on_close
        self._on_call = on_call
        self._idents = itertools.count(1)
        self._peers: dict[int, Peer] = {}
        self._readers: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._pool = futures.ThreadPoolExecutor(max_peers + 8, thread_name_prefix="control")
        self._server = grpc.server(self._pool, handlers=[_Handler(self)], options=_OPTIONS)
        host = bind.rsplit(":", 1)[0]
        port = self._server.add_insecure_port(bind)
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Ends all streams and waits for their threads."""
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.close()
        self._server.stop(grace=0.5).wait(5)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            readers = self._readers - {threading.current_thread()}
        for reader in readers:
            reader.join(5)

    def stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One peer's stream: handshake, then its outgoing queue until either side closes."""
        late = threading.Timer(HANDSHAKE_TIMEOUT_S, context.cancel)  # a silent caller would keep a worker for ever
        late.daemon = True
        late.start()
        try:
            hello = msgspec.msgpack.decode(next(requests), type=_Hello)
            nonce = new_nonce()
            if hello.version != PROTOCOL_VERSION or len(hello.nonce) != NONCE_BYTES:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"protocol version {hello.version}, this side speaks {PROTOCOL_VERSION}",
                )
            yield _pack(_Answer(nonce, proof(self._token, "server", hello.nonce, nonce)))
            answer = msgspec.msgpack.decode(next(requests), type=_Answer)
        except (StopIteration, msgspec.MsgspecError, ValueError):  # ValueError: text that is not UTF-8
            return
        finally:
            late.cancel()
        if not proof_matches(answer.proof, self._token, "client", hello.nonce, nonce):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        peer = Peer(next(self._idents))
        reader = threading.Thread(
            target=self._read, args=(peer, requests), name=f"control-read-{peer.ident}", daemon=True
        )
        with self._lock:
            self._peers[peer.ident] = peer
            self._readers.add(reader)
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

    def call(self, data: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        nonce, given = metadata.get("nonce-bin", b""), metadata.get("proof-bin", b"")
        if self._on_call is None or not proof_matches(given, self._token, "call", nonce, data):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        assert self._on_call is not None
        return self._on_call(data)


class _Handler(_grpc.GenericRpcHandler):  # type: ignore[misc]  # the stubs know no handler of plain bytes
    def __init__(self, server: ControlServer) -> None:
        self._server = server

    def service(self, details: Any) -> Any:
        if details.method == _METHOD:
            return grpc.stream_stream_rpc_method_handler(self._server.stream)
        if details.method == _CALL:
            return grpc.unary_unary_rpc_method_handler(self._server.call)
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
    ) -> None:
        self.address = address
        self._on_message = on_message
        self._on_close = on_close
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._channel: Any = _grpc.insecure_channel(address, options=_OPTIONS)
        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise CoordinatorLost(f"no answer from {address} within {timeout_s:g} s") from None
        nonce = new_nonce()
        self._out.put(_pack(_Hello(PROTOCOL_VERSION, nonce)))
        self._call = self._channel.stream_stream(_METHOD)(iter(self._out.get, None))
        late = threading.Timer(timeout_s, self._call.cancel)  # there is somebody, who does not answer
        late.daemon = True
        late.start()
        try:
            answer = msgspec.msgpack.decode(next(self._call), type=_Answer)
            if not proof_matches(answer.proof, token, "server", nonce, answer.nonce):
                raise HandshakeRefused(f"{address} does not know this run's token")
            self._out.put(_pack(_Answer(nonce, proof(token, "client", nonce, answer.nonce))))
            next(self._call)
        except (grpc.RpcError, StopIteration, msgspec.MsgspecError, ValueError) as error:
            self.close()
            if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.CANCELLED:
                raise CoordinatorLost(f"no answer from {address} within {timeout_s:g} s") from None
            detail = error.details() if isinstance(error, grpc.RpcError) else str(error)
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
        if not self._closed:
            self._on_close(reason)


def call(address: str, token: str, data: bytes, timeout_s: float = 10.0) -> bytes:
    """One unary call. Raises HandshakeRefused (wrong token) or CoordinatorLost (nobody there)."""
    nonce = new_nonce()
    with _grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            reply: bytes = channel.unary_unary(_CALL)(
                data,
                timeout=timeout_s,
                metadata=[("nonce-bin", nonce), ("proof-bin", proof(token, "call", nonce, data))],
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise HandshakeRefused(f"{address}: wrong token") from None
            raise CoordinatorLost(f"{address}: {error.details()}") from None
    return reply

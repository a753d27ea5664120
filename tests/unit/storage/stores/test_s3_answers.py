"""S3Store on answers that the test server never gives: a real HTTP server on loopback, with a script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import everstep
from everstep.storage.errors import (
    StoreDenied,
    StoreError,
    StoreExists,
    StoreFull,
    StoreNotFound,
    StoreUnavailable,
)
from everstep.storage.stores.s3 import S3Store
from s3_server import environment

Answer = tuple[int, dict[str, str], bytes]


class Script:
    """Answers each request with the first rule whose pattern is found in "METHOD PATH?QUERY"; keeps the requests."""

    def __init__(self) -> None:
        self.rules: list[tuple[str, Callable[[], Answer]]] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.ports: list[int] = []  # the client's, so one a connection
        self.keep_alive = False

    def on(self, pattern: str, *answers: Answer) -> None:
        """The answers in turn; the last one goes on."""
        left = list(answers)
        self.rules.append((pattern, lambda: left.pop(0) if len(left) > 1 else left[0]))


def ok(body: bytes = b"", **headers: str) -> Answer:
    return 200, {name.replace("_", "-"): value for name, value in headers.items()}, body


def error(status: int, code: str, message: str = "so it is") -> Answer:
    return status, {}, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # else boto3 waits a second for "100 Continue"

        def answer(self) -> None:
            request = f"{self.command} {self.path}"
            script.requests.append(request)
            script.ports.append(self.client_address[1])
            script.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            for pattern, reply in script.rules:
                if re.search(pattern, request):
                    status, headers, body = reply()
                    break
            else:
                status, headers, body = error(500, "NoRule", request)
            kept = {} if script.keep_alive else {"Connection": "close"}
            self.send_response(status)
            for name, value in {**kept, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in environment(f"http://127.0.0.1:{server.server_address[1]}").items():
        monkeypatch.setenv(name, value)
    yield script
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def store(script: Script) -> S3Store:
    return S3Store("bucket", attempts=3)


def uploads_page(keys: list[str], following: str = "") -> Answer:
    uploads = "".join(f"<Upload><Key>{key}</Key><UploadId>id-{key}</UploadId></Upload>" for key in keys)
    if following:
        uploads += f"<NextKeyMarker>{following}</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>"
    text = f"{uploads}<IsTruncated>{'true' if following else 'false'}</IsTruncated>"
    return ok(f"<ListMultipartUploadsResult>{text}</ListMultipartUploadsResult>".encode())


def objects_page(keys: list[str]) -> Answer:
    contents = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
    return ok(f"<ListBucketResult>{contents}<IsTruncated>false</IsTruncated></ListBucketResult>".encode())


def test_sweep_reads_every_page(script: Script, store: S3Store) -> None:
    script.on(r"GET .*uploads.*key-marker=", uploads_page(["run/c"]))
    script.on(r"GET .*uploads", uploads_page(["run/a", "run/b"], following="run/b"))
    script.on(r"DELETE .*id-run%2Fb", error(404, "NoSuchUpload"))  # its writer has finished since
    script.on(r"DELETE ", ok())
    assert store.sweep("run") == 2
    assert sum(request.startswith("DELETE") for request in script.requests) == 3


@pytest.mark.parametrize(("code", "kind"), [("AccessDenied", StoreDenied), ("InternalError", StoreUnavailable)])
def test_what_was_not_deleted_is_an_error(script: Script, store: S3Store, code: str, kind: type[StoreError]) -> None:
    script.on("GET .*uploads", uploads_page([]))
    script.on("GET .*list-type=2", objects_page(["run/a", "run/b"]))
    failed = f"<Error><Key>run/b</Key><Code>{code}</Code><Message>no</Message></Error>"
    script.on("POST .*delete", ok(f"<DeleteResult>{failed}</DeleteResult>".encode()))
    script.on("DELETE ", ok())
    with pytest.raises(kind, match="s3://bucket/run/b"):
        store.remove_folder("run", "manifest")


def test_a_store_without_deletion_in_batches(script: Script, store: S3Store) -> None:
    script.on("GET .*uploads", uploads_page([]))
    script.on("GET .*list-type=2", objects_page(["run/a", "run/b"]))
    script.on("POST .*delete", error(400, "MissingContentMD5"))
    script.on("DELETE ", ok())
    store.remove_folder("run", "manifest")
    deleted = [request for request in script.requests if request.startswith("DELETE")]
    assert deleted == [f"DELETE /bucket/run/{name}" for name in ("manifest", "a", "b", ".claim")]


def test_the_first_file_goes_before_the_rest_and_the_claim_last(script: Script, store: S3Store) -> None:
    script.on("GET .*uploads", uploads_page([]))
    script.on("GET .*list-type=2", objects_page(["run/.claim", "run/a"]))
    script.on("POST .*delete", ok(b"<DeleteResult/>"))
    script.on("DELETE ", ok())
    store.remove_folder("run", "manifest")
    changing = [request.split("?")[0] for request in script.requests if not request.startswith("GET")]
    assert changing == ["DELETE /bucket/run/manifest", "POST /bucket", "DELETE /bucket/run/.claim"]
    (batch,) = [body for body in script.bodies if b"<Delete" in body]
    assert b"run/a" in batch
    assert b".claim" not in batch


def test_a_first_file_that_cannot_be_removed_saves_the_rest(script: Script, store: S3Store) -> None:
    script.on("DELETE ", error(403, "AccessDenied"))
    with pytest.raises(StoreDenied):
        store.remove_folder("run", "manifest")
    assert script.requests == ["DELETE /bucket/run/manifest"]


def test_a_conflict_of_writers_is_tried_again(script: Script, store: S3Store) -> None:
    script.on("PUT ", error(409, "ConditionalRequestConflict"), error(409, "ConditionalRequestConflict"), ok())
    store.put_new("x", b"1")
    assert len(script.requests) == 3


def test_a_conflict_that_another_won(script: Script, store: S3Store) -> None:
    script.on("PUT ", error(409, "ConditionalRequestConflict"), error(412, "PreconditionFailed"))
    script.on("HEAD ", ok(x_amz_meta_everstep_id="another"))
    with pytest.raises(StoreExists):
        store.put_new("x", b"1")


def test_a_last_request_that_fails_after_its_answer_began(script: Script, store: S3Store) -> None:
    """CompleteMultipartUpload says 200 at once, and what came of it in the body."""
    script.on("POST .*uploads", ok(b"<Result><UploadId>u</UploadId></Result>"))
    script.on("PUT .*partNumber", ok(ETag='"e"'))
    done = b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
    script.on("POST .*uploadId=u", (200, {}, error(200, "InternalError")[2]), ok(done))
    upload = store.upload("x", 17 << 20)
    upload.write(16 << 20, bytes(1 << 20))
    upload.write(0, bytes(16 << 20))
    upload.finish()
    completions = [body for body in script.bodies if b"<CompleteMultipartUpload" in body]
    assert len(completions) == 2
    assert re.findall(rb"<PartNumber>(\d+)", completions[0]) == [b"1", b"2"]


def test_an_upload_that_somebody_swept(script: Script, store: S3Store) -> None:
    script.on("POST .*uploads", ok(b"<Result><UploadId>u</UploadId></Result>"))
    script.on("PUT .*partNumber", error(404, "NoSuchUpload"))
    upload = store.upload("x", 17 << 20)
    with pytest.raises(StoreUnavailable, match="write the file again"):
        upload.write(0, bytes(16 << 20))


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (403, "AccessDenied", StoreDenied, "they may list, read, write and delete in 'bucket'"),
        (403, "InvalidAccessKeyId", StoreDenied, "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", StoreDenied, "AWS_PROFILE"),
        (400, "ExpiredToken", StoreDenied, "expired"),
        (403, "RequestTimeTooSkewed", StoreDenied, "clock"),
        (404, "NoSuchBucket", StoreDenied, "no bucket 'bucket'"),
        (301, "PermanentRedirect", StoreDenied, "AWS_DEFAULT_REGION"),
        (501, "NotImplemented", StoreDenied, "newer version"),
        (400, "SomethingElse", StoreDenied, "SomethingElse"),
        (404, "NoSuchKey", StoreNotFound, "s3://bucket/x"),
        (412, "PreconditionFailed", StoreExists, "s3://bucket/x"),
        (409, "OperationAborted", StoreUnavailable, "s3://bucket/x"),
        (403, "QuotaExceeded", StoreFull, "quota"),
        (507, "XMinioStorageFull", StoreFull, "room"),
        (507, "Whatever", StoreFull, "room"),
        (400, "EntityTooLarge", StoreFull, "large"),
        (429, "TooManyRequests", StoreUnavailable, "TooManyRequests"),
        (503, "SlowDown", StoreUnavailable, "SlowDown"),
        (500, "InternalError", StoreUnavailable, "so it is"),
    ],
)
def test_which_error_an_answer_is(script: Script, status: int, code: str, kind: type[StoreError], text: str) -> None:
    script.on("HEAD ", ok())  # after a 301 boto3 asks where the bucket is
    script.on(".", error(status, code))
    with pytest.raises(StoreError, match=text) as raised:
        S3Store("bucket", attempts=1).read_into("x", 0, memoryview(bytearray(1)))
    assert type(raised.value) is kind


def test_a_server_error_is_tried_again(script: Script, store: S3Store) -> None:
    script.on("GET ", error(503, "SlowDown"), error(500, "InternalError"), objects_page(["x"]))
    assert [entry.name for entry in store.entries("")] == ["x"]


def test_a_server_that_is_not_s3(script: Script, store: S3Store) -> None:
    script.on(".", ok(b"<html><body>Welcome<p></body></html>"))
    with pytest.raises(StoreUnavailable, match="s3://bucket"):
        store.entries("")


def test_a_store_that_ignores_ranges(script: Script, store: S3Store) -> None:
    script.on("GET ", ok(b"0123456789"))
    out = memoryview(bytearray(4))
    assert store.read_into("x", 0, out) == 4
    assert out == b"0123"
    with pytest.raises(StoreDenied, match="ignores ranges"):
        store.read_into("x", 4, out)


def test_a_store_that_sends_another_range(script: Script, store: S3Store) -> None:
    script.on("GET ", (206, {"Content-Range": "bytes 0-3/10"}, b"0123"))
    with pytest.raises(StoreDenied, match="bytes from 4 were wanted"):
        store.read_into("x", 4, memoryview(bytearray(4)))


_FORKED = """
import os
from everstep.storage.stores.s3 import S3Store
store = S3Store("bucket")
store.entries("")
store.entries("")
if os.fork() == 0:
    store.entries("")
    os._exit(0)
assert os.wait()[1] == 0
store.entries("")
"""


def test_a_forked_child_has_connections_of_its_own(script: Script) -> None:
    """Two processes on one connection would get each other's answers."""
    script.keep_alive = True
    script.on("GET ", objects_page([]))
    env = {**os.environ, "PYTHONPATH": str(Path(everstep.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", _FORKED], env=env, check=True, timeout=60)
    parent, again, child, after = script.ports
    assert parent == again == after != child

"""A real S3 server process for tests: moto's, behind three things that S3 does and moto does not.

`with s3_server() as server:` starts it on a free loopback port; `server.env` is what a process needs to reach it by
boto3's default chain. It ends with the block, by its own pid, and by itself when its parent dies.

What is added: conditional writes are exclusive (moto looks and writes in two steps that race), a body that does not
match its x-amz-checksum-crc32 is refused with BadDigest (moto keeps the checksum unread), and `server.deny(True)`
answers every request with 403 AccessDenied.

    python tests/s3_server.py        prints its port, and ends when its standard input does
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import subprocess
import sys
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_BAD_DIGEST = b"<Error><Code>BadDigest</Code><Message>The CRC32 you specified did not match</Message></Error>"


@dataclass(frozen=True)
class Server:
    """A running server with the buckets asked for."""

    url: str
    env: Mapping[str, str]
    pid: int

    def client(self) -> Any:
        """A boto3 client of its own, as somebody else's program has one."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Every object's key under a prefix."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def uploads(self, bucket: str, prefix: str = "") -> list[str]:
        """The key of every unfinished multi-part upload under a prefix."""
        found = self.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return [upload["Key"] for upload in found]

    def deny(self, on: bool) -> None:
        """Answer everything with 403, or no longer."""
        _post(f"{self.url}/-test/deny", b"1" if on else b"")


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[Server]:
    """Start a server with these buckets (default: "bucket")."""
    command = [sys.executable, os.path.abspath(__file__)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the S3 server did not start:\n{process.stderr.read().decode()}")
        url = f"http://127.0.0.1:{int(line)}"
        for bucket in buckets or ("bucket",):
            urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT"), timeout=30).close()
        yield Server(url, environment(url), process.pid)
    finally:
        process.kill()
        process.communicate()


def environment(url: str) -> dict[str, str]:
    """What boto3 needs to know of a server, and nothing of this machine's own."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "AKIATESTKEY000000000",
        "AWS_SECRET_ACCESS_KEY": "test-secret-that-nobody-may-see",
        "AWS_SESSION_TOKEN": "",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }


def _post(url: str, body: bytes) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data=body, method="POST"), timeout=30).close()


class _LikeS3:
    """moto's WSGI application with what it lacks."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._writing = threading.Lock()
        self._denied = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = environ.get("CONTENT_LENGTH")
        body = environ["wsgi.input"].read(int(length)) if length else b""
        if length and len(body) < int(length):
            return []  # the client died
        if environ["PATH_INFO"] == "/-test/deny":
            self._denied = bool(body)
            start_response("200 OK", [("Content-Length", "0")])
            return []
        if self._denied:
            return _answer(environ, start_response, "403 Forbidden", _DENIED)
        checksum = environ.get("HTTP_X_AMZ_CHECKSUM_CRC32")
        if checksum and checksum != base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode():
            return _answer(environ, start_response, "400 Bad Request", _BAD_DIGEST)
        if length:
            environ["wsgi.input"] = io.BytesIO(body)
        if "HTTP_IF_NONE_MATCH" in environ:
            with self._writing:
                return list(self._application(environ, start_response))
        return self._application(environ, start_response)


def _answer(environ: dict[str, Any], start_response: Callable[..., Any], status: str, body: bytes) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log(self, *args: Any) -> None:
            """No line a request."""

    application = _LikeS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main()

"""A bucket of an S3-compatible store.

Owns the client, the retries and what of S3's answers is which error. Endpoint, region and credentials come from
boto3's default chain (AWS_ENDPOINT_URL_S3, AWS_PROFILE, ~/.aws, instance roles, …). Any thread may call; after a fork
the child makes itself a client of its own.

[Note: exclusive on S3] A write that must be exclusive is conditional (If-None-Match: *). When its answer is lost, a
repeated request is told that the object is there, although we wrote it. So every object carries a random id in its
metadata: what bears our id is ours. A store that ignores the condition would let two writers win; `claim_folder`
finds that out, once a client, by writing its object twice.

[Note: checksums on S3] We send each body's CRC32 as a header ourselves. boto3 would do so too, but over TLS in a
trailer of a chunked body, which many compatible stores do not take. The body's SHA-256 is part of the request's
signature. So a damaged body is refused (400 BadDigest and the like), and we send it again; a store that does not know
the CRC32 ignores it. What is read is verified by those who read, block by block.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from everstep.storage.errors import StoreDenied, StoreError, StoreExists, StoreNotFound, StoreUnavailable
from everstep.storage.stores.paths import SamePlace, check_complete, check_part, checked_path
from everstep.storage.stores.port import Entry
from everstep.storage.stores.s3_errors import DAMAGED, code_of, store_error

# Long enough for a stream's full speed at 20 ms a round trip, short enough for some threads' parts in memory.
PART_BYTES: Final = 16 << 20
PART_STEP_BYTES: Final = 4 << 20  # a block of a checkpoint's file
MOST_PARTS: Final = 10_000  # S3's own limits, as the next
_MOST_DELETED: Final = 1000
_ID: Final = "everstep-id"
# boto3's descriptions of the services. Read once a process: a session of its own for each store takes 0.15 s.
_DESCRIPTIONS: Final = create_loader()
# Not shown in listings: on other stores a folder has no file of its own.
CLAIM: Final = ".claim"
_AGAIN: Final = ("ConditionalRequestConflict", *DAMAGED)
_NO_BATCHES: Final = ("MissingContentMD5", "InvalidRequest", "NotImplemented", "MethodNotAllowed", "MalformedXML")
_ERRORS: Final = (BotoCoreError, ClientError, ResponseParserError, OSError, ValueError)


class S3Store(SamePlace):
    """A bucket; paths are keys. Implements `Store`."""

    def __init__(
        self,
        bucket: str,
        *,
        connect_s: float = 5.0,
        read_s: float = 30.0,
        attempts: int = 3,
        connections: int = 64,
    ) -> None:
        """Touches no network. `connect_s` and `read_s` limit one attempt (of a connection; between two bytes), of
        which there are `attempts` with growing pauses of at most seconds; `connections`: threads at once.
        """
        self.url = f"s3://{bucket}"
        self._bucket = bucket
        self._attempts = attempts
        self._config = Config(
            connect_timeout=connect_s,
            read_timeout=read_s,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=connections,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None
        self._conditions_checked = False

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def entries(self, path: str) -> list[Entry]:
        prefix = _prefix(checked_path(self.url, path))
        found = []
        for page in self._pages(path, "list_objects_v2", Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", ()):
                found.append(Entry(folder["Prefix"][len(prefix) : -1], True, 0))
            for file in page.get("Contents", ()):
                found.append(Entry(file["Key"][len(prefix) :], False, file["Size"]))
        # An empty name is the marker object of a folder that some browser made, or of a key with '//'.
        return sorted(entry for entry in found if entry.name not in ("", CLAIM))

    def size(self, path: str) -> int:
        try:
            return int(self.call(path, "head_object", Key=self._key(path))["ContentLength"])
        except StoreNotFound:
            self.call("", "head_bucket")  # the answer to HEAD does not say whether it is the bucket that is missing
            raise

    def read_into(self, path: str, offset: int, out: memoryview) -> int:
        view = out.cast("B")
        if not len(view):
            self.size(path)
            return 0
        wanted = f"bytes={offset}-{offset + len(view) - 1}"
        for attempt in range(1, self._attempts + 1):
            try:
                answer = self.call(path, "get_object", Key=self._key(path), Range=wanted)
            except StoreError as error:
                if code_of(error.__cause__) in ("InvalidRange", "416"):  # behind the end
                    return 0
                raise
            with self._translated(path), contextlib.closing(answer["Body"]) as body:
                try:
                    return _fill(view[: _bytes_due(answer, offset, len(view))], body)
                except (BotoCoreError, OSError):  # boto3 repeats requests, but not what breaks off in an answer
                    if attempt == self._attempts:
                        raise
            _pause(attempt)
        raise AssertionError

    def put_new(self, path: str, data: bytes) -> None:
        self.put(self._key(path), bytes(data), secrets.token_hex(16))

    def claim_folder(self, path: str) -> None:
        key = f"{self._key(path)}/{CLAIM}"
        ident = secrets.token_hex(16)
        if self.call(path, "list_objects_v2", Prefix=f"{self._key(path)}/", MaxKeys=1).get("Contents"):
            raise StoreExists(f"{self._where(path)}: it is there already")
        self.put(key, b"", ident)
        if self._conditions_checked:
            return
        try:
            self._put_once(key, b"", ident)
        except StoreExists:
            self._conditions_checked = True
            return
        why = "this store ignores If-None-Match (conditional writes), so nothing can be committed safely"
        raise StoreDenied(f"{self._where(path)}: {why}; use one that has them, or a newer version of it")

    def part_bytes(self, nbytes: int) -> int:
        needed = -(-nbytes // MOST_PARTS)
        return max(PART_BYTES, -(-needed // PART_STEP_BYTES) * PART_STEP_BYTES)

    def upload(self, path: str, nbytes: int) -> S3Upload:
        return S3Upload(self, self._key(path), nbytes)

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(StoreNotFound):
            self.call(path, "delete_object", Key=self._key(path))

    def remove_folder(self, path: str, first: str) -> None:
        if not path:
            return
        key = self._key(path)
        self.remove_file(f"{path}/{first}")
        self.sweep(path)
        claim = f"{key}/{CLAIM}"  # last: as long as anything is left, the name is taken
        for page in self._pages(path, "list_objects_v2", Prefix=f"{key}/"):
            keys = [file["Key"] for file in page.get("Contents", ()) if file["Key"] != claim]
            for at in range(0, len(keys), _MOST_DELETED):
                self._delete(path, keys[at : at + _MOST_DELETED])
        self.remove_file(f"{path}/{CLAIM}")

    def sweep(self, path: str, spare: Callable[[str], bool] | None = None) -> int:
        removed = 0
        prefix = _prefix(checked_path(self.url, path))
        for page in self._pages(path, "list_multipart_uploads", Prefix=prefix):
            for upload in page.get("Uploads", ()):
                if spare is not None and spare(upload["Key"].removeprefix(prefix).split("/")[0]):
                    continue
                with contextlib.suppress(StoreNotFound):  # finished or aborted since
                    arguments = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self.call(upload["Key"], "abort_multipart_upload", **arguments)
                    removed += 1
        return removed

    def call(self, path: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request, repeated by boto3 while that may help; for `S3Upload` too. Raises StoreError only."""
        for attempt in range(1, self._attempts + 1):
            with self._translated(path):
                try:
                    answer: dict[str, Any] = getattr(self._client(), operation)(Bucket=self._bucket, **arguments)
                    return answer
                except ClientError as error:
                    if code_of(error) not in _AGAIN or attempt == self._attempts:
                        raise
            _pause(attempt)
        raise AssertionError

    def exclusively(self, path: str, ident: str, write: Callable[[], object]) -> None:
        """Do a conditional write of an object with the id `ident`; see [Note: exclusive on S3]."""
        try:
            write()
        except (StoreExists, StoreUnavailable):
            if not self.is_ours(path, ident):
                raise

    def is_ours(self, path: str, ident: str) -> bool:
        """Whether the object is there and bears the id; no where that cannot be found out."""
        try:
            return bool(self.call(path, "head_object", Key=path)["Metadata"].get(_ID) == ident)
        except (StoreError, KeyError):
            return False

    def put(self, key: str, data: bytes, ident: str) -> None:
        """A new object in one request, exclusively."""
        self.exclusively(key, ident, lambda: self._put_once(key, data, ident))

    def _put_once(self, key: str, data: bytes, ident: str) -> None:
        extra = {"IfNoneMatch": "*", "Metadata": {_ID: ident}, "ChecksumCRC32": crc32(data)}
        self.call(key, "put_object", Key=key, Body=data, **extra)

    def _delete(self, path: str, keys: Sequence[str]) -> None:
        """Delete some objects in one request; some stores have none for that, or want an MD5 that AWS does not."""
        if not keys:
            return
        objects = [{"Key": key} for key in keys]
        try:
            answer = self.call(path, "delete_objects", Delete={"Objects": objects, "Quiet": True})
        except StoreError as error:
            if code_of(error.__cause__) not in _NO_BATCHES:
                raise
            for key in keys:
                self.remove_file(key)
            return
        for failed in answer.get("Errors", ()):
            if failed.get("Code") != "NoSuchKey":
                problem = ClientError({"Error": failed}, "DeleteObjects")
                raise store_error(self._where(failed.get("Key", path)), self._bucket, problem) from problem

    def _pages(self, path: str, operation: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Every page of a listing."""
        with self._translated(path):
            pages = iter(self._client().get_paginator(operation).paginate(Bucket=self._bucket, **arguments))
        while True:
            with self._translated(path):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _key(self, path: str) -> str:
        if not path:
            raise StoreDenied(f"{self.url}: a bucket is no file; name something in it")
        return checked_path(self.url, path)

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _client(self) -> Any:
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                session = botocore.session.Session()
                session.register_component("data_loader", _DESCRIPTIONS)
                client = session.create_client("s3", config=self._config)
                if "@" in client.meta.endpoint_url:
                    raise ValueError("the endpoint's URL has a user or a password in it, and would be logged")
                self._made = (os.getpid(), client)
            return self._made[1]

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except _ERRORS as error:
            raise store_error(self._where(path), self._bucket, error) from error


class S3Upload:
    """A multi-part upload, or a single PUT at `finish` where one part is all there is. Implements `Upload`."""

    def __init__(self, store: S3Store, key: str, nbytes: int) -> None:
        self._store = store
        self._key = key
        self._nbytes = nbytes
        self._part_bytes = store.part_bytes(nbytes)
        self._ident = secrets.token_hex(16)
        self._whole = b""
        self._parts: dict[int, dict[str, Any]] = {}
        self._written = 0
        self._writing = 0
        self._open = True
        self._tried_to_finish = False
        self._changed = threading.Condition()
        self._upload_id = ""
        if nbytes > self._part_bytes:
            extra = {"ChecksumAlgorithm": "CRC32", "Metadata": {_ID: self._ident}}
            self._upload_id = store.call(key, "create_multipart_upload", Key=key, **extra)["UploadId"]

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Sends the part; holds a copy of it meanwhile, because boto3 takes no memoryview."""
        body = bytes(data)
        check_part(offset, len(body), self._part_bytes, self._nbytes)
        with self._changed:
            if not self._open:
                raise StoreError(f"{self._store.url}/{self._key}: a part came after the end of its upload")
            self._writing += 1
        try:
            if self._upload_id:
                self._send(offset // self._part_bytes + 1, body)
            else:
                self._whole = body
            with self._changed:
                self._written += len(body)
        finally:
            with self._changed:
                self._writing -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        check_complete(f"{self._store.url}/{self._key}", self._written, self._nbytes)
        self._close()
        self._tried_to_finish = True
        if self._upload_id:
            self._store.exclusively(self._key, self._ident, self._complete)
        else:
            self._store.put(self._key, self._whole, self._ident)

    def abort(self) -> None:
        self._close()
        with contextlib.suppress(StoreError):
            if self._upload_id:
                self._call("abort_multipart_upload")
        # A `finish` that failed may have come through all the same.
        if self._tried_to_finish and self._store.is_ours(self._key, self._ident):
            with contextlib.suppress(StoreError):
                self._store.remove_file(self._key)

    def _send(self, number: int, body: bytes) -> None:
        part = {"PartNumber": number, "ChecksumCRC32": crc32(body)}
        sent = self._call("upload_part", Body=body, **part)
        with self._changed:
            self._parts[number] = {**part, "ETag": sent["ETag"]}

    def _complete(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, IfNoneMatch="*")

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._store.call(self._key, operation, Key=self._key, UploadId=self._upload_id, **arguments)
        except StoreNotFound as error:
            raise StoreUnavailable(f"{error}; somebody has swept this upload: write the file again") from error

    def _close(self) -> None:
        """No part is on its way afterwards: one that arrives after an abort would be kept, and paid for."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._writing == 0)


def crc32(data: bytes) -> str:
    """A body's CRC32 as S3 writes it."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _pause(attempt: int) -> None:
    """Between two attempts; random, so that racing writers part."""
    time.sleep(random.uniform(0.05, 0.2) * 2**attempt)


def _fill(view: memoryview, body: Any) -> int:
    """Read a whole answer; raises where it breaks off."""
    done = 0
    while done < len(view) and (got := body.readinto(view[done:])):
        done += got
    if done < len(view):
        raise IncompleteReadError(actual_bytes=done, expected_bytes=len(view))
    return done


def _prefix(path: str) -> str:
    return f"{path}/" if path else ""


def _bytes_due(answer: dict[str, Any], offset: int, wanted: int) -> int:
    """How many bytes from `offset` the answer has for us; raises ValueError where it is not the range asked for."""
    given = answer.get("ContentRange")
    if given is None:
        if offset:
            raise ValueError("the store ignores ranges (it sends whole objects), so that files cannot be read")
        return min(wanted, int(answer["ContentLength"]))
    first, _, total = given.removeprefix("bytes ").replace("-", "/", 1).partition("/")
    size = int(total.rpartition("/")[2])
    if int(first) != offset:
        raise ValueError(f"the store sent {given} where bytes from {offset} were wanted")
    return min(wanted, size - offset)

"""From a URL to the folder that it names.

Owns the reading of URLs. Nothing is opened and no network is touched: a folder that cannot be reached shows at the
first use. Keeps no state; any thread may call.

    a path, file:///PATH      a folder of this machine (`local.py`)
    s3://BUCKET[/PREFIX]      any S3-compatible store (`s3.py`); endpoint, region and credentials from where boto3
                              finds them: AWS_ENDPOINT_URL(_S3), AWS_PROFILE, ~/.aws, instance roles, …
    anything else             what fsspec reaches (`remote.py`): gs://, abfs://, memory://, …
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote

from everstep.storage.errors import CheckpointUnsupported, StoreDenied
from everstep.storage.stores.local import LocalStore
from everstep.storage.stores.paths import checked_path
from everstep.storage.stores.port import Folder

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# AWS allows [a-z0-9.-]; other stores upper case and '_' too.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_FORMS: Final = "a path, file:///PATH, s3://BUCKET/PREFIX, or another URL that fsspec knows"


def folder_at(url: str | os.PathLike[str], *, links: bool = False) -> Folder:
    """The folder that a path or a URL names; it need not exist.

    `links`: on this machine follow symbolic links to files, for reading what others wrote (Hugging Face's cache
    consists of links). Raises CheckpointUnsupported for a URL that cannot be one, StoreDenied where a password or a
    token is part of it, or a driver is not installed. No message repeats a password.
    """
    text = os.fspath(url)
    if not text or "\0" in text:
        raise CheckpointUnsupported(f"{text!r} is no URL; give {_FORMS}")
    match = _SCHEME.fullmatch(text)
    if match is None:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*::", text):
            raise CheckpointUnsupported(f"{_without_secrets(text)}: chained URLs are not supported; give {_FORMS}")
        return Folder(LocalStore(links=links), os.path.abspath(text).strip("/"))
    scheme, rest = match[1].lower(), match[2]
    _refuse_secrets(scheme, rest)
    host, slash, path = rest.partition("/")
    if scheme in ("file", "local"):
        if host not in ("", "localhost") or not slash:
            raise CheckpointUnsupported(f"{text}: a file URL names no host; give file:///PATH")
        return Folder(LocalStore(links=links), os.path.abspath("/" + unquote(path)).strip("/"))
    path = path.rstrip("/")
    if scheme in ("s3a", "s3n"):
        raise CheckpointUnsupported(f"{text}: {scheme}:// is Hadoop's name for it; give s3://{rest}")
    if scheme == "s3":
        if not _BUCKET.fullmatch(host):
            raise CheckpointUnsupported(f"{text}: {host!r} cannot be a bucket; give s3://BUCKET/PREFIX")
        from everstep.storage.stores.s3 import S3Store  # late: boto3 is imported only where a bucket is used

        store = S3Store(host)
        return Folder(store, checked_path(store.url, path))
    from everstep.storage.stores.remote import remote_folder  # late, like boto3

    return remote_folder(scheme, rest.rstrip("/"))


def _refuse_secrets(scheme: str, rest: str) -> None:
    """Raises StoreDenied for user:password@host and for queries, which are where tokens are put."""
    advice = "a URL is shown and logged; give credentials by the environment or the store's own configuration"
    if scheme in ("file", "local"):
        return
    # A password may itself contain '/': whatever has a ':' before some '@' is taken for one, but for S3's keys.
    authority = rest.partition("/")[0] if scheme == "s3" and ":" not in rest.partition("/")[0] else rest
    if re.match(r"[^@]*:[^@]*@", authority, re.DOTALL) or (scheme == "s3" and "@" in authority):
        raise StoreDenied(f"{scheme}://…@{rest.rpartition('@')[2]}: it has a user or a password in it; {advice}")
    if scheme != "s3" and "?" in rest:
        raise StoreDenied(f"{scheme}://{rest.partition('?')[0]}?…: it has a query; {advice}")


def _without_secrets(text: str) -> str:
    return re.sub(r"://.*@", "://…@", text, flags=re.DOTALL).partition("?")[0]

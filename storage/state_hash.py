"""`state_sha256`: the hash of a whole training state that the promise of equal bits is tested by.

Pure functions, safe in any thread. A state's hash is SHA-256 over the sorted lines of its tensors and its
step:

    NAME KIND DTYPE SHAPE SHA256        one line a tensor, tied tensors once; SHAPE as [4,128], [] for 0-dim
    step N                              the last line

SHA256 is that of the tensor's unpadded row-major bytes, in lower-case hex; every line ends with a newline,
UTF-8.
"""

import hashlib
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

from everstep.storage.index import TensorMeta

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def tensor_line(meta: TensorMeta, sha256_hex: str) -> str:
    """One tensor's line, without the newline; raises ValueError when the digest is not one."""
    if not _SHA256.fullmatch(sha256_hex):
        raise ValueError(f"{sha256_hex!r} is not a SHA-256 in hex")
    if any("\n" in text for text in (meta.name, meta.kind)):
        raise ValueError(f"the tensor {meta.name!r} ({meta.kind!r}) has a line break in its name")
    shape = ",".join(map(str, meta.shape))
    return f"{meta.name} {meta.kind} {meta.dtype} [{shape}] {sha256_hex}"


def combine(lines: Iterable[str], step: int) -> str:
    """The state's hash, in hex; the order of `lines` does not matter. Raises ValueError for a line that is
    twice.
    """
    ordered = sorted(lines)
    for first, second in pairwise(ordered):
        if first.rsplit(" ", 3)[0] == second.rsplit(" ", 3)[0]:
            raise ValueError(f"two tensors are called {first.rsplit(' ', 3)[0]!r}")
    text = "".join(f"{line}\n" for line in (*ordered, f"step {step}"))
    return hashlib.sha256(text.encode()).hexdigest()

"""What is still open when the interpreter ends is closed first: else it would wait for threads that wait for peers.

`concurrent.futures` joins its threads before `atexit` is asked, so a gRPC server that nobody stopped hangs a script
that only forgot to. `threading` has a hook that comes earlier; it is private, the same since Python 3.9.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # registers its hook; later ones are called earlier
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)
_open: list[weakref.WeakMethod[Callable[[], Any]]] = []
_lock = threading.Lock()


def close_at_exit(close: Callable[[], Any]) -> None:
    """`close` is a bound method, idempotent; it is not called for an object that is gone by then."""
    with _lock:
        _open[:] = [known for known in _open if known() is not None]
        _open.append(weakref.WeakMethod(close))


def _close_all() -> None:
    while _open:
        close = _open.pop()()
        if close is not None:
            try:
                close()
            except Exception as error:  # the next one is to be closed, too
                log.warning("closing at exit: %s", error)


getattr(threading, "_register_atexit", atexit.register)(_close_all)

"""The cache keeps to its limit, throws out the oldest, and loads a value once."""

from __future__ import annotations

import pickle
import threading

import pytest

from everstep.storage.datasets.cache import Cache


def test_it_keeps_to_its_limit_and_throws_out_what_was_used_longest_ago():
    cache: Cache[str] = Cache(10)
    for key in "ab":
        cache.get(key, lambda key=key: (key, 5))
    cache.get("a", lambda: pytest.fail("it is held"))
    cache.get("c", lambda: ("c", 5))  # b goes
    cache.get("a", lambda: pytest.fail("it is held"))
    assert cache.get("b", lambda: ("new", 5)) == "new"
    counts = cache.counts()
    assert (counts.hits, counts.loads, counts.bytes, counts.peak_bytes) == (2, 4, 10, 10)


def test_a_value_larger_than_the_limit_is_kept_alone():
    cache: Cache[str] = Cache(10)
    cache.get("small", lambda: ("small", 5))
    cache.get("large", lambda: ("large", 50))
    cache.get("large", lambda: pytest.fail("it is held"))
    assert cache.counts().bytes == 50
    cache.get("small", lambda: ("small", 5))
    assert cache.counts().bytes == 5


def test_threads_that_want_one_value_load_it_once():
    cache: Cache[int] = Cache(100)
    loading, go = threading.Event(), threading.Event()
    loads = []

    def load() -> tuple[int, int]:
        loads.append(1)
        loading.set()
        go.wait()
        return 7, 1

    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(cache.get("key", load))) for _ in range(8)]
    for thread in threads:
        thread.start()
    loading.wait()
    go.set()
    for thread in threads:
        thread.join()
    assert got == [7] * 8
    assert len(loads) == 1


def test_who_waits_for_a_load_that_fails_tries_itself():
    cache: Cache[int] = Cache(100)
    loading, go = threading.Event(), threading.Event()

    def fails() -> tuple[int, int]:
        loading.set()
        go.wait()
        raise OSError("no")

    errors: list[Exception] = []

    def first() -> None:
        try:
            cache.get("key", fails)
        except OSError as error:
            errors.append(error)

    got: list[int] = []
    threads = [
        threading.Thread(target=first),
        threading.Thread(target=lambda: got.append(cache.get("key", lambda: (3, 1)))),
    ]
    threads[0].start()
    loading.wait()
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert got == [3]


def test_it_pickles_as_its_limit():
    cache: Cache[bytes] = Cache(1 << 20)
    cache.get("key", lambda: (bytes(1 << 20), 1 << 20))
    packed = pickle.dumps(cache)
    assert len(packed) < 500
    assert pickle.loads(packed).limit_bytes == 1 << 20
    assert pickle.loads(packed).counts().bytes == 0

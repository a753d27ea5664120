"""What the port `StateStore` promises, in a folder and in Ray's key-value store, and the one controller it makes."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from everstep.actors.controller_state import (
    AnotherController,
    FolderState,
    StateBook,
    StateStore,
    StateUnavailable,
    is_alive,
    this_process,
)
from everstep.platform.cluster.controller_messages import STATE_VERSION, Kept, Owner
from everstep.storage.stores.opening import folder_at

SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    from everstep.actors.ray_cluster import EmbeddedRay

    with EmbeddedRay.start(cpus=1, path=[SOURCE]):
        yield


@pytest.fixture(params=["folder", "memory", pytest.param("ray", marks=pytest.mark.ray)])
def again(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], StateStore]:
    """Opens the same place, as often as it is called."""
    if request.param == "folder":
        return lambda: FolderState(folder_at(tmp_path / "state"))
    if request.param == "memory":
        url = f"memory://host/{secrets.token_hex(4)}"
        return lambda: FolderState(folder_at(url))
    request.getfixturevalue("embedded")
    from everstep.actors.ray_controller_state import RayKvState

    prefix = f"test-{secrets.token_hex(4)}/"
    return lambda: RayKvState(prefix)


def kept(owner: Owner | None, grants: int = 0) -> Kept:
    return Kept(STATE_VERSION, owner, {}, 0, grants, [])


def test_an_empty_place_has_nothing(again: Callable[[], StateStore]):
    assert again().newest() is None


def test_the_highest_number_is_the_newest_and_survives_its_writer(again: Callable[[], StateStore]):
    for number in (1, 2, 9, 10):
        assert again().put_new(number, str(number).encode())
    assert again().newest() == (10, b"10")


def test_a_number_is_written_once(again: Callable[[], StateStore]):
    assert again().put_new(1, b"first")
    assert not again().put_new(1, b"second")
    assert again().newest() == (1, b"first")


def test_of_many_writers_of_a_number_one_wins(again: Callable[[], StateStore]):
    stores = [again() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda pair: pair[1].put_new(1, str(pair[0]).encode()), enumerate(stores)))
    assert won.count(True) == 1
    assert again().newest() == (1, str(won.index(True)).encode())


def test_old_numbers_are_removed(again: Callable[[], StateStore]):
    for number in (1, 2, 3):
        again().put_new(number, b"x")
    again().remove(3)
    assert again().put_new(1, b"free")
    assert again().newest() == (3, b"x")


def test_a_successor_reads_what_was_kept_and_the_one_before_can_write_no_more(again: Callable[[], StateStore]):
    first = StateBook(again(), this_process("one", "here:1"))
    assert first.open() is None
    first.write(kept(this_process("one", "here:1"), grants=7))
    second = StateBook(again(), this_process("two", "here:2"), alive=lambda owner: False)
    found = second.open()
    assert found is not None
    assert found.grants == 7
    for grants in range(3):
        second.write(kept(this_process("two", "here:2"), grants))
    with pytest.raises(AnotherController, match=r"the controller at here:2 .* has taken over the state at "):
        first.check()
    # The number that it would take next is free again: what was before has been removed.
    with pytest.raises(AnotherController, match="here:2"):
        first.write(kept(this_process("one", "here:1")))
    second.write(kept(this_process("two", "here:2"), 3))
    second.check()


def test_a_place_whose_controller_lives_is_refused_naming_both(again: Callable[[], StateStore]):
    owner = this_process("one", "here:1")
    StateBook(again(), owner).write(kept(owner))
    other = StateBook(again(), this_process("two", "here:2"))
    with pytest.raises(AnotherController, match="two controllers on one place are impossible") as error:
        other.open()
    assert f"pid {os.getpid()}" in str(error.value)
    assert again().place in str(error.value)


def test_a_controller_that_signed_off_leaves_the_place_free(again: Callable[[], StateStore]):
    owner = this_process("one", "here:1")
    StateBook(again(), owner).write(kept(None))
    assert StateBook(again(), this_process("two", "here:2")).open() is not None


def test_foreign_files_are_not_taken_for_a_state(again: Callable[[], StateStore]):
    again().put_new(1, b"something else")
    with pytest.raises(StateUnavailable, match="no controller's state"):
        StateBook(again(), this_process("one", "here:1")).open()


def test_a_process_that_ended_is_known_to_be_dead():
    here = this_process("one", "127.0.0.1:1")
    assert is_alive(here)
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = Owner("x", here.host, here.machine, child.pid, 1, "127.0.0.1:1")
    assert not is_alive(dead)
    elsewhere = Owner("x", "other", "another machine", 1, 1, "127.0.0.1:1")
    assert not is_alive(elsewhere)  # nobody listens there

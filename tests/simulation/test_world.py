"""The simulated machine keeps its promises: order, full mailboxes, and losses only with a stream's end."""

from __future__ import annotations

from typing import Any

from simulation.world import Connection, Process, World


class Recorder(Process):
    def __init__(self, world: World, name: str, host: str) -> None:
        super().__init__(world, name, host)
        self.heard: list[Any] = []

    def on_message(self, connection: Connection, message: Any) -> None:
        self.heard.append(message)

    def on_closed(self, connection: Connection) -> None:
        self.heard.append("end")


def pair(seed: int = 0) -> tuple[World, Recorder, Recorder, Connection]:
    world = World(seed)
    a, b = Recorder(world, "a", "host-a"), Recorder(world, "b", "host-b")
    connection = world.connect(a, b)
    assert connection is not None
    return world, a, b, connection


def run(world: World, until_s: float = 100.0) -> None:
    world.run(until_s, lambda: False)


def test_messages_arrive_in_order() -> None:
    world, a, b, connection = pair()
    for i in range(200):
        connection.send(a, i)
    run(world)
    assert b.heard == list(range(200))


def test_a_frozen_process_hears_everything_in_order_when_it_wakes() -> None:
    world, a, b, connection = pair()
    connection.send(a, 1)
    b.freeze()
    world.after(1.0, lambda: connection.send(a, 2))
    b.after(0.5, lambda: b.heard.append("timer"))
    world.after(5.0, lambda: a.heard.extend(b.heard))
    world.after(6.0, b.wake)
    run(world)
    assert a.heard == []
    assert b.heard == [1, "timer", 2]


def test_a_process_that_dies_ends_its_streams_and_does_nothing_more() -> None:
    world, a, b, connection = pair()
    b.after(1.0, lambda: a.heard.append("a ghost"))
    b.die("signal 9")
    connection.send(a, 1)
    run(world)
    assert a.heard == ["end"]
    assert b.heard == []


def test_with_its_host_it_goes_without_a_word() -> None:
    world, a, b, _ = pair()
    b.die("its host is lost", silently=True)
    run(world)
    assert a.heard == []


def test_an_end_of_stream_comes_after_the_messages_or_loses_the_last_of_them() -> None:
    lost = 0
    for seed in range(50):
        world, a, b, connection = pair(seed)
        for i in range(5):
            connection.send(a, i)
        connection.close(a)
        run(world)
        assert b.heard in ([*range(5), "end"], ["end"])
        lost += b.heard == ["end"]
    assert 0 < lost < 50


def test_what_is_sent_into_a_cut_arrives_when_it_heals() -> None:
    world, a, b, connection = pair()
    world.cut("host-a", "host-b")
    for i in range(3):
        connection.send(a, i)
    assert world.connect(a, b) is None
    world.after(2.0, lambda: a.heard.extend(b.heard))
    world.after(3.0, lambda: world.heal("host-a", "host-b"))
    world.after(3.0, lambda: connection.send(a, 3))
    run(world)
    assert a.heard == []
    assert b.heard == [0, 1, 2, 3]


def test_a_stream_that_is_closed_during_a_cut_ends_after_it() -> None:
    world, a, b, connection = pair()
    world.cut("host-a", "host-b")
    connection.close(a)
    world.after(2.0, lambda: a.heard.extend(b.heard))
    world.after(3.0, lambda: world.heal("host-a", "host-b"))
    run(world)
    assert a.heard == []
    assert b.heard == ["end"]

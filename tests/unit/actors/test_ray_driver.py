"""What a driver under a Ray job prints and sends."""

from __future__ import annotations

import io

from everstep.actors.ray_driver import BURST, Prints, beside_the_jobs


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def printed(*batches: dict[str, object], clock: Clock | None = None) -> tuple[list[str], Prints]:
    out, clock = io.StringIO(), clock or Clock()
    prints = Prints(out, clock)
    for batch in batches:
        prints(batch)
    prints.settle(clock.sleep)
    return out.getvalue().splitlines(), prints


def test_ranks_are_heard_and_what_everstep_logs_is_not():
    lines, _ = printed(
        {"actor_name": "rank-1.2", "pid": 7, "lines": ["hello", "2026-01-01 10:00:00,123 everstep.actors.x left"]},
        {"actor_name": "supervisor", "pid": 8, "lines": ["view 1.1"]},
        {"actor_name": "manager-0.1", "pid": 9, "lines": ["beat"]},
        {"actor_name": "rank-0.1", "pid": 6, "lines": [":actor_name:rank-0.1", "2026-01-01 mine"]},
        {"pid": "raylet", "lines": ["a worker died"]},
    )
    assert lines == ["rank-1.2 | hello", "rank-0.1 | 2026-01-01 mine"]


def test_a_flood_is_cut_and_told():
    many = int(BURST) + 500
    lines, _ = printed({"actor_name": "rank-0.1", "pid": 1, "lines": [str(n) for n in range(many)]})
    assert len(lines) == BURST + 1
    assert lines[-2] == f"rank-0.1 | {int(BURST) - 1}"
    assert "500 lines of ranks are left out" in lines[-1]


def test_after_a_flood_there_is_room_again():
    clock, out = Clock(), io.StringIO()
    prints = Prints(out, clock)
    prints({"actor_name": "rank-0.1", "pid": 1, "lines": ["x"] * (int(BURST) + 1)})
    clock.now += 1.0
    prints({"actor_name": "rank-0.1", "pid": 1, "lines": ["again"]})
    assert out.getvalue().splitlines()[-1] == "rank-0.1 | again"


def test_what_the_ray_job_has_is_not_sent_twice():
    job = {"working_dir": "gcs://x.zip", "env_vars": {"A": "1"}, "pip": ["p"]}
    own = {"working_dir": ".", "pip": ["p"], "env_vars": {"A": "2", "B": "3"}, "py_modules": ["m"]}
    assert beside_the_jobs(own, job) == {"env_vars": {"B": "3"}, "py_modules": ["m"]}
    assert beside_the_jobs({"env_vars": {"A": "2"}}, job) == {}
    assert beside_the_jobs(own, {}) == own

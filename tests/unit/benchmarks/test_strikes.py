"""What a peer's ranks wrote, read while they write."""

from __future__ import annotations

from pathlib import Path

from parts.strikes import Step, steps_of


def test_steps_of_all_ranks_come_by_time_and_half_a_line_is_left(tmp_path: Path):
    (tmp_path / "progress-0.jsonl").write_text(
        '{"step": 1, "life": 0, "ranks": 2, "at_s": 10.0}\n{"step": 2, "life": 0, "ranks": 2, "at_s": 12.0}\n{"ste'
    )
    (tmp_path / "progress-1.jsonl").write_text('{"step": 1, "life": 0, "ranks": 2, "at_s": 11.0}\n')
    assert steps_of(tmp_path) == [Step(10.0, 1, 0, 2), Step(11.0, 1, 0, 2), Step(12.0, 2, 0, 2)]


def test_nothing_written_is_no_step(tmp_path: Path):
    assert steps_of(tmp_path) == []

"""A task is found by file or by module, and whatever is wrong with the name or the file is said."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.platform.training.task import Task, TaskContext
from everstep.platform.training.task_loader import TaskImportError, find_task, load_task

TASK = """
import everstep as es
VALUE = {value}
class Good(es.Task):
    value = VALUE
    def model(self): ...
    def dataset(self): return [1, 2]
    def loss(self, model, batch, ctx): ...
class Lacking(es.Task):
    def model(self): ...
class Other: ...
"""


@pytest.fixture(autouse=True)
def _imports_undone() -> Iterator[None]:
    """Tasks stay importable for a process's life; a test process has many."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def _file(folder: Path, name: str = "job.py", text: str = "", value: object = 1) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or TASK.format(value=value))
    return path


def test_a_file_is_relative_to_the_job_file(tmp_path: Path):
    _file(tmp_path, "tasks/job.py")
    task = load_task("tasks/job.py:Good", tmp_path, {"a": 1}, TaskContext(seed=5))
    assert isinstance(task, Task)
    assert (task.args.a, task.seed) == (1, 5)


def test_an_absolute_file(tmp_path: Path):
    assert find_task(f"{_file(tmp_path)}:Good", Path("/")).value == 1


def test_two_files_of_one_name_do_not_meet(tmp_path: Path):
    _file(tmp_path, "one/task.py", value=1)
    _file(tmp_path, "two/task.py", value=2)
    assert [find_task("task.py:Good", tmp_path / name).value for name in ("one", "two")] == [1, 2]


def test_the_same_file_is_imported_once(tmp_path: Path):
    _file(tmp_path)
    assert find_task("job.py:Good", tmp_path) is find_task("job.py:Good", tmp_path)


def test_a_task_imports_what_lies_beside_it(tmp_path: Path):
    _file(tmp_path, "sub/beside_loader_test.py", "VALUE = 42")
    text = TASK.replace("VALUE = {value}", "from beside_loader_test import VALUE")
    _file(tmp_path, "sub/job.py", text)
    assert find_task("sub/job.py:Good", tmp_path).value == 42


def test_dataclasses_of_a_task_file_find_their_module(tmp_path: Path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    _file(tmp_path, "job.py", text + TASK.format(value=1) + "@dataclass\nclass D:\n    x: int = 3\n")
    assert sys.modules[find_task("job.py:Good", tmp_path).__module__].D().x == 3


def test_an_edit_within_the_same_second_is_seen_and_no_bytecode_is_left(tmp_path: Path):
    """A .pyc is trusted by time and size: with one, the second import here would give 1."""
    path = _file(tmp_path, value=1)
    stamp = path.stat()
    name = find_task("job.py:Good", tmp_path).__module__
    del sys.modules[name]
    _file(tmp_path, value=2)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert find_task("job.py:Good", tmp_path).value == 2
    assert not (tmp_path / "__pycache__").exists()


def test_a_module_below_the_job_files_folder(tmp_path: Path):
    _file(tmp_path, "pkg_loader_test/inner.py", value=7)
    assert find_task("pkg_loader_test.inner:Good", tmp_path).value == 7


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("job.py", r"'job\.py' names no class; write file\.py:Class"),
        (":Good", r"':Good' names no class"),
        ("job.py:", r"names no class"),
        ("job.py:not a name", r"names no class"),
        ("jobb.py:Good", r"there is no file .*/jobb\.py; that folder has: broken\.py, .*job\.py"),
        ("none/job.py:Good", r"there is no file .*/none/job\.py; there is no folder .*/none"),
        ("hollow/job.py:Good", r"that folder has no Python file"),
        ("job.py:Best", r"job\.py has no 'Best'; tasks in it: Good"),
        ("plain.py:Best", r"plain\.py has no 'Best'; it defines no subclass of everstep\.Task"),
        ("job.py:Other", r"Other in .*job\.py is not a subclass of everstep\.Task; tasks in it: Good"),
        ("job.py:VALUE", r"VALUE in .*job\.py is not a subclass"),
        ("job.py:Lacking", r"Lacking in .*job\.py lacks dataset\(\), loss\(\)"),
        ("broken.py:Good", r"importing .* failed at .*broken\.py, line 2: SyntaxError"),
        ("raising.py:Good", r"failed at .*raising\.py, line 3: ZeroDivisionError: division by zero"),
        (
            "needing.py:Good",
            r"failed at .*needing\.py, line 1: ModuleNotFoundError: No module named 'not_there'",
        ),
        ("no_such_module:Good", r"no module 'no_such_module' is installed or below .*for a file, write"),
        ("no_such.module:Good", r"no module 'no_such\.module' .*\(nothing is called 'no_such'\)"),
        (
            "needing:Good",
            r"importing needing failed at .*needing\.py, line 1: ModuleNotFoundError.*'not_there'",
        ),
        ("broken:Good", r"importing broken failed at .*broken\.py, line 2: SyntaxError"),
    ],
)
def test_what_is_wrong_is_said(task: str, says: str, tmp_path: Path):
    _file(tmp_path)
    _file(tmp_path, "plain.py", "x = 1")
    _file(tmp_path, "broken.py", "x = 1\ndef (:\n")
    _file(tmp_path, "raising.py", "def f():\n    # fails\n    return 1 / 0\nf()\n")
    _file(tmp_path, "needing.py", "import not_there\n")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(TaskImportError, match=says) as caught:
        find_task(task, tmp_path)
    assert str(caught.value).startswith(f"task: {task!r}")


def test_a_failed_import_can_be_tried_again(tmp_path: Path):
    path = _file(tmp_path, text="1 / 0")
    with pytest.raises(TaskImportError):
        find_task("job.py:Good", tmp_path)
    path.write_text(TASK.format(value=3))
    assert find_task("job.py:Good", tmp_path).value == 3

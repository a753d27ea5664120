"""Finds a task by the name that a job file gives it, and builds it.

Purpose: "file.py:Class" (relative to the job file's folder) or "package.module:Class" becomes a Task.
Owns the entries it adds to sys.modules and sys.path; both stay for the life of the process, because classes
and later imports of the task need them. Thread-safety: call it from one thread, once per process and task.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from everstep.platform.training.task import Task, TaskContext, TaskError


class TaskImportError(TaskError):
    """A task that cannot be found or imported; says what was looked for and what is there."""


def load_task(task: str, base_dir: Path, args: Mapping[str, Any], context: TaskContext) -> Task:
    """Builds the job's task. Raises TaskImportError, or what the task's own constructor raises."""
    return find_task(task, base_dir)(args, context)


def find_task(task: str, base_dir: Path) -> type[Task]:
    """The class that `task` names: "file.py:Class" below `base_dir`, or "package.module:Class".

    Either way the file's folder (or `base_dir`) goes to the front of sys.path, as if the file were run as a
    script. Raises TaskImportError.
    """
    where, separator, name = task.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise TaskImportError(
            f"task: {task!r} names no class; write file.py:Class (relative to the job file) or package.module:Class"
        )
    base_dir = base_dir.resolve()
    if where.endswith(".py") or "/" in where:
        module = _import_file(task, base_dir / where)
    else:
        module = _import_module(task, where, base_dir)
    return _task_class(task, module, name)


class _SourceLoader(SourceFileLoader):
    """Compiles the source each time.

    A .pyc is trusted by time and size, so that an edit within a second, or a copy that kept its time, could
    run old code on one rank and new code on another.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(task: str, path: Path) -> ModuleType:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        there = f"that folder has: {', '.join(beside)}" if beside else "that folder has no Python file"
        if not path.parent.is_dir():
            there = f"there is no folder {path.parent}"
        raise TaskImportError(f"task: {task!r}: there is no file {path}; {there}")
    # The path is part of the name: two jobs' task.py must not meet in sys.modules.
    name = f"everstep_task_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    _put_on_path(path.parent)
    spec = ModuleSpec(name, _SourceLoader(name, str(path)), origin=str(path))
    spec.has_location = True
    module = module_from_spec(spec)
    sys.modules[name] = module
    assert spec.loader is not None
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(task, str(path), error) from error
    return module


def _import_module(task: str, name: str, base_dir: Path) -> ModuleType:
    _put_on_path(base_dir)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The user's own missing import inside the module must not read as "the module is missing".
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TaskImportError(
                f"task: {task!r}: no module {name!r} is installed or below {base_dir}"
                f" (nothing is called {error.name!r}); for a file, write path/to/file.py:Class"
            ) from error
        raise _import_failed(task, name, error) from error
    except Exception as error:
        raise _import_failed(task, name, error) from error


def _import_failed(task: str, where: str, error: Exception) -> TaskImportError:
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else where
    return TaskImportError(f"task: {task!r}: importing {where} failed at {place}: {type(error).__name__}: {error}")


def _task_class(task: str, module: ModuleType, name: str) -> type[Task]:
    origin = getattr(module, "__file__", None) or module.__name__
    found = getattr(module, name, None)
    if found is None:
        raise TaskImportError(f"task: {task!r}: {origin} has no {name!r}; {_offers(module)}")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise TaskImportError(
            f"task: {task!r}: {name} in {origin} is not a subclass of everstep.Task; {_offers(module)}"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise TaskImportError(
            f"task: {task!r}: {name} in {origin} lacks {', '.join(f'{method}()' for method in missing)}"
        )
    return found


def _offers(module: ModuleType) -> str:
    """What a user could have meant: the tasks that the module defines."""
    tasks = sorted(
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value)
    )
    return f"tasks in it: {', '.join(tasks)}" if tasks else "it defines no subclass of everstep.Task"


def _put_on_path(folder: Path) -> None:
    entry = str(folder)
    if entry not in sys.path:
        sys.path.insert(0, entry)

"""The surface that outside programs rely on, and rules of the tree that no other tool checks."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import everstep
import everstep.collectives

ROOT = Path(__file__).parents[2]
FOLDERS = ("platform", "actors", "collectives", "storage", "dashboards")
MAX_LINES = 450

EXPORTS = {
    "CommitEvent",
    "Dataset",
    "Job",
    "JobSpec",
    "JsonLines",
    "LaneContext",
    "Loss",
    "Mixture",
    "Parquet",
    "RunResult",
    "Session",
    "Settings",
    "Task",
    "TextBytes",
    "Tokens",
    "__version__",
    "run",
    "submit",
}


COLLECTIVES = {
    "CollectiveError",
    "CollectiveTimeout",
    "Coordinator",
    "CoordinatorLost",
    "ErrorFeedback",
    "Evicted",
    "Group",
    "GroupView",
    "HandshakeRefused",
    "Mismatch",
    "PeerLost",
    "TransactionAborted",
    "Work",
}

TORCH_BACKEND = {
    "COORDINATOR_VARIABLE",
    "TOKEN_FILE_VARIABLE",
    "EverstepProcessGroup",
    "TorchEvicted",
    "TorchMismatch",
    "TorchPeerLost",
    "TorchTimeout",
    "group",
    "lost",
    "reform",
}

# What the CLI, the supervisor and the snapshot managers start from.
WITHOUT_TORCH_AND_RAY = (
    "everstep",
    "everstep.cli",
    "everstep.actors.client",
    "everstep.actors.launch",
    "everstep.actors.manager_process",
    "everstep.collectives",
    "everstep.collectives.coordinator",
    "everstep.collectives.watcher",
    "everstep.submitting",
)


def _sources() -> list[Path]:
    """Every Python file of the project, each once (rglob does not follow the links in src/everstep)."""
    folders = [ROOT / name for name in (*FOLDERS, "src", "tests", "examples", "benchmarks")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_the_torch_backend_is_registered_by_its_import():
    import torch.distributed as dist

    from everstep.collectives import torch_backend

    assert set(torch_backend.__all__) == TORCH_BACKEND
    assert "everstep" in dist.Backend.backend_list
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"  # which is not ours to take


def test_exports_are_frozen():
    assert set(everstep.__all__) == EXPORTS
    assert set(dir(everstep)) == EXPORTS


def test_the_exports_of_collectives_are_frozen_and_cost_nothing_until_they_are_used():
    assert set(everstep.collectives.__all__) == COLLECTIVES == set(dir(everstep.collectives))
    code = "import sys, everstep.collectives; print(sorted({'torch', 'grpc', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert all(getattr(everstep.collectives, name) for name in COLLECTIVES)


def test_every_export_is_there():
    missing = [name for name in EXPORTS if not hasattr(everstep, name)]
    assert not missing
    assert not hasattr(everstep, "no_such_name")


@pytest.mark.parametrize("module", WITHOUT_TORCH_AND_RAY)
def test_importing_it_imports_neither_torch_nor_ray(module: str):
    """torch costs 1.7 s and 217 MB, which the CLI and the supervisor must not pay, nor for a job's spec."""
    code = (
        f"import sys, {module}, everstep; everstep.JobSpec; everstep.RunResult;"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_only_the_ray_host_and_its_shells_import_ray():
    places = ("actors", "tests", "benchmarks")  # a benchmark's peer may be Ray's own
    imports_ray = re.compile(r"^\s*(import|from) ray\b", re.MULTILINE)
    found = {path.relative_to(ROOT) for path in _sources() if imports_ray.search(path.read_text())}
    allowed = {path for path in found if path.parts[0] in places and "ray" in path.stem}
    assert found == allowed


def test_the_installed_version_is_the_packages():
    assert importlib.metadata.version("everstep") == everstep.__version__


def test_platform_is_no_package():
    """With platform/__init__.py, `import platform` would find ours wherever the root is on sys.path."""
    assert not list((ROOT / "platform").rglob("__init__.py"))


def test_no_file_or_folder_shadows_another_module():
    """`import types` from a file beside types.py, or with its folder on sys.path, would find ours."""
    taken = set(sys.stdlib_module_names) | {
        "torch",
        "ray",
        "numpy",
        "grpc",
        "msgspec",
        "pydantic",
        "typer",
        "rich",
    }
    names = {path.with_suffix("") for path in _sources() if path.name not in ("__init__.py", "__main__.py")}
    names |= {path.parent for path in _sources() if path.name == "__init__.py"}
    assert sorted(str(path.relative_to(ROOT)) for path in names if path.name in taken) == []


def test_files_fit_a_readers_head():
    """Of the product; a test file is a list of cases, and read one case at a time."""
    product = [path for path in _sources() if path.relative_to(ROOT).parts[0] != "tests"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in product}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_the_folders_are_linked_into_the_package():
    for name in FOLDERS:
        link = ROOT / "src" / "everstep" / name
        assert link.is_symlink()
        assert link.readlink() == Path("../..") / name

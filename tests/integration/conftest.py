"""Makes the modules of this folder importable as `integration.<module>` and those of benchmarks/parts as
`parts.<module>`, and gives every test run a registry
of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent.parent
for _folder in (_TESTS, _TESTS.parent / "benchmarks"):  # `parts.churn_run` is the churn of both
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these runs are registered: $EVERSTEP_STATE, for this process and all that it starts."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERSTEP_STATE", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder

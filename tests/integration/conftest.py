"""Makes the modules of this folder importable as `integration.<module>`, and gives every test run a registry
of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.append(_TESTS)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these runs are registered: $EVERSTEP_STATE, for this process and all that it starts."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERSTEP_STATE", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder

"""Makes modules of tests/ importable as `integration.<module>` and those of benchmarks/parts as `parts.<module>`."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
for _folder in (_TESTS, _TESTS.parent / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

"""Which library multiplies: ISA-L where it is there and right, else numpy."""

from typing import Any

import pytest

from everstep.storage import ErasureCode, isal, kernels


def test_isal_is_used_where_its_wheel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyeclib_c")
    assert ErasureCode(2, 1).kernel.name == "isa-l"

    def refuse(path: str) -> None:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(isal.ctypes, "CDLL", refuse)
    isal.load_isal.cache_clear()
    try:
        assert ErasureCode(2, 1).kernel.name == "numpy"
    finally:
        monkeypatch.undo()
        isal.load_isal.cache_clear()
    assert repr(ErasureCode(2, 1)) == "ErasureCode(data=2, parity=1, kernel=isa-l)"


def test_a_library_that_computes_something_else_is_noticed() -> None:
    class Zeroes(kernels.NumpyKernel):
        def combine(self, rows: Any, sources: Any, results: Any) -> None:
            super().combine(tuple(bytes(len(row)) for row in rows), sources, results)

    class LosesTheTail(kernels.NumpyKernel):
        def add(self, factor: int, source: Any, into: Any) -> None:
            whole = len(source) // 64 * 64
            super().add(factor, source[:whole], into[:whole])

    assert isal.agrees(kernels.NumpyKernel())  # type: ignore[arg-type]
    assert not isal.agrees(Zeroes())  # type: ignore[arg-type]
    assert not isal.agrees(LosesTheTail())  # type: ignore[arg-type]

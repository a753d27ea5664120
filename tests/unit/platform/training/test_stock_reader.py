"""Stocks are read so that all versions share one list of tensors, and say what they said."""

from __future__ import annotations

import msgspec
import pytest

from everstep.platform.training.messages import SealedVersion, Stock, StockReader
from everstep.storage.index import Fragment, Source, StateIndex, TensorMeta, merge

METAS = (TensorMeta("w", "param", "float32", (8,)), TensorMeta("b", "param", "float32", (2,)))


def stock(domain: str, start: int, metas: tuple[TensorMeta, ...] = METAS) -> Stock:
    fragment = Fragment("w", "param", start, start + 4, Source("segment", domain, "s"), 0, 7)
    return Stock((SealedVersion((1, 2), "s", StateIndex(5, metas, (fragment,))),))


def test_stocks_say_what_they_said_and_share_their_tensors() -> None:
    said = [stock("d0", 0), stock("d1", 4), stock("d2", 0, METAS[:1]), Stock()]
    reader = StockReader()
    read = [reader.read(msgspec.msgpack.encode(s)) for s in said]
    assert read == said
    first, second, third = (s.versions[0].index for s in read[:3])
    assert first.tensors is second.tensors
    assert third.tensors == METAS[:1]
    assert merge(first, second) == merge(*(s.versions[0].index for s in said[:2]))


def test_what_is_no_stock_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        StockReader().read(msgspec.msgpack.encode({"versions": [{"view": "x"}]}))

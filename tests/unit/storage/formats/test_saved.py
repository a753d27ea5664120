"""What torch.save wrote is read without torch, and nothing in it runs."""

import argparse
import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.storage.errors import CheckpointCorrupt, CheckpointError, CheckpointUnsupported
from everstep.storage.formats.saved import Dtype, StoredTensor, read_plain, read_saved
from everstep.storage.formats.unpickle import StandIn, stand_in, unpickle
from everstep.storage.stores.opening import folder_at

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(value: Any, name: str = "a.pt", **options: Any) -> Path:
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    return save


def read(path: Path, **options: Any) -> Any:
    return read_saved(folder_at(path.parent), path.name, **options)


def tensor_of(path: Path, stored: StoredTensor) -> torch.Tensor:
    """The tensor as its place says, taken by torch from the file's bytes."""
    dtype = getattr(torch, stored.dtype)
    whole = torch.frombuffer(bytearray(path.read_bytes()[stored.offset :]), dtype=torch.uint8)
    flat = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
    return flat.as_strided(stored.shape, stored.strides)


DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def test_every_tensor_is_where_its_place_says(save: Save) -> None:
    values = {dtype: torch.arange(24).reshape(4, 6).to(getattr(torch, dtype)) for dtype in DTYPES}
    values |= {"transposed": values["float32"].t(), "slice": values["int64"][1:3, 2:5], "scalar": torch.tensor(2.5)}
    values |= {"shared": values["float32"][2], "empty": torch.zeros(0, 3)}
    path = save({"nested": [values]})

    stored = read(path)["nested"][0]

    assert list(stored) == list(values)
    for name, value in values.items():
        assert stored[name].shape == tuple(value.shape)
        if value.numel():
            got = tensor_of(path, stored[name])
            assert got.dtype == value.dtype
            assert bytes(got.contiguous().view(-1).view(torch.uint8).numpy().data) == bytes(
                value.contiguous().view(-1).view(torch.uint8).numpy().data
            )
    assert stored["float32"].contiguous
    assert not stored["transposed"].contiguous


def test_an_archive_inside_another_file_is_read_where_it_lies(tmp_path: Path) -> None:
    archive = io.BytesIO()
    torch.save(torch.arange(5), archive)
    path = tmp_path / "many"
    path.write_bytes(b"x" * 999 + archive.getvalue() + b"y" * 77)

    stored = read(path, offset=999, length=len(archive.getvalue()))

    assert tensor_of(path, stored).tolist() == [0, 1, 2, 3, 4]


def test_plain_values_come_back(save: Save) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    values = OrderedDict(
        number=3, real=0.1, big=2**100, negative=-(2**40), none=None, yes=True, text="añ", data=b"\x00\xff",
        empty=b"",
        items=[1, (2, 3)], members={1, 2}, frozen=frozenset({"a"}), array=bytearray(b"ab"), numpy=np.float64(1.5),
        count=np.int64(7), half=np.float16(0.5), flag=np.bool_(True),
    )  # fmt: skip
    path = save({"values": values, "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "p": parameter})

    got = read(path)

    assert got["values"] == values
    assert got["dtype"] == Dtype("bfloat16")
    assert got["device"] == "cuda:1"
    assert got["p"].shape == (2,)


def test_a_module_state_dict_with_its_hidden_metadata(save: Save) -> None:
    state = torch.nn.Linear(3, 2).state_dict()

    assert set(read(save(state))) == {"weight", "bias"}


class Evil:
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("posix.system", lambda path: Evil(os.system, f"touch {path}")),
        ("builtins.eval", lambda path: Evil(eval, f"__import__('pathlib').Path({str(path)!r}).touch()")),
        ("builtins.exec", lambda path: Evil(exec, f"import os; os.mkdir({str(path)!r})")),
        ("posix.mkdir", lambda path: Evil(os.mkdir, str(path))),
        ("builtins.getattr", lambda path: Evil(getattr, os, "system")),
    ],
)
def test_nothing_that_a_file_asks_for_is_run(
    save: Save, tmp_path: Path, named: str, make: Callable[[Path], Evil]
) -> None:
    ran = tmp_path / "ran"
    if named != "builtins.getattr":
        pickle.loads(pickle.dumps(make(ran)))  # the payload is a real one
        assert ran.exists()
        ran.rmdir() if ran.is_dir() else ran.unlink()
        path = save({"weight": torch.ones(2), "x": make(ran)})
    else:
        data = b"\x80\x02c__builtin__\ngetattr\n(X\x02\x00\x00\x00osX\x06\x00\x00\x00systemtR."
        path = archive_with(tmp_path, data)

    with pytest.raises(CheckpointUnsupported, match=rf"refuses to build {named.replace('builtins', '.*')}"):
        read(path)

    assert not ran.exists()


def test_a_bare_pickle_runs_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps(Evil(os.system, f"touch {tmp_path / 'ran'}")))

    with pytest.raises(CheckpointUnsupported, match=r"posix\.system"):
        read_plain(folder_at(tmp_path), "x")

    assert not (tmp_path / "ran").exists()


def test_an_object_needs_the_callers_leave_and_is_a_stand_in_even_then(save: Save) -> None:
    path = save({"args": argparse.Namespace(layers=2), "weight": torch.ones(2)})

    with pytest.raises(CheckpointUnsupported, match=r"refuses to build argparse\.Namespace"):
        read(path)
    got = read(path, allow={"argparse.Namespace": stand_in("argparse.Namespace")})
    wild = read(path, allow={"argparse.*": None})

    assert isinstance(got["args"], StandIn)
    assert not isinstance(got["args"], argparse.Namespace)
    assert got["args"].fields() == wild["args"].fields() == {"layers": 2}
    assert wild["args"].qualified == "argparse.Namespace"


def archive_with(folder: Path, pickled: bytes, storage: bytes = b"\0" * 16, **options: Any) -> Path:
    path = folder / "made.pt"
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", options.pop("order", "little"))
        archive.writestr("archive/data/0", storage)
    return path


def bomb(data: bytes) -> Any:
    return unpickle(b"\x80\x04" + data + b".", "bomb", {"builtins.bytes": bytes})


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"Nr\xff\xff\xff\x7f", None, id="memo of 16 GiB"),
        pytest.param(b"\x8e" + struct.pack("<Q", 1 << 62), CheckpointCorrupt, id="bytes of 4 EiB"),
        pytest.param(b"\x96" + struct.pack("<Q", 1 << 62), CheckpointCorrupt, id="bytearray of 4 EiB"),
        pytest.param(
            b"}(" + b"\x8b" + struct.pack("<I", 9000) + b"\1" * 9000 + b"Nu", CheckpointUnsupported, id="int"
        ),
        pytest.param(b"K\x01\x85" + b"2\x86" * 100 + b"}q\x00" + b"0N", None, id="wide tuple, never looked at"),
        pytest.param(b"}K\x01\x85" + b"2\x86" * 100 + b"Ns", CheckpointUnsupported, id="key that hashes for ever"),
        pytest.param(b"(" * 100000, CheckpointCorrupt, id="marks without end"),
        pytest.param(b"\x85" * 3, CheckpointCorrupt, id="tuple of nothing"),
        pytest.param(b"\x82\x01", CheckpointUnsupported, id="extension code"),
        pytest.param(b"cos\nsystem\n", CheckpointUnsupported, id="name"),
        pytest.param(b"(ios\nsystem\n", CheckpointUnsupported, id="inst"),
        pytest.param(b"K\x01K\x02\x86R", CheckpointCorrupt, id="call with no arguments"),
        pytest.param(b"K\x01)R", CheckpointUnsupported, id="call of a number"),
        pytest.param(b"]]b", CheckpointUnsupported, id="state for a list"),
        pytest.param(b"NQ", CheckpointUnsupported, id="persistent id"),
    ],
)
def test_what_would_take_memory_or_time_is_refused(data: bytes, error: type[Exception] | None) -> None:
    if error is None:
        assert bomb(data) is None
        return
    with pytest.raises(error):
        bomb(data)


def test_a_value_that_calls_copy_again_and_again_is_refused() -> None:
    text = b"\x42" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x00"
    copy = b"cbuiltins\nbytes\nh\x00\x85R"

    assert bomb(text + copy) == b"x" * 100_000
    with pytest.raises(CheckpointUnsupported, match="more than a file of this size"):
        bomb(text + copy * 2000)


def test_deep_nesting_neither_crashes_nor_is_walked() -> None:
    deep = bomb(b"]" + b"]" * 200_000 + b"a" * 200_000)

    assert isinstance(deep, list)


def test_the_text_protocol_is_refused() -> None:
    with pytest.raises(CheckpointUnsupported, match="protocols 2 to 5"):
        unpickle(pickle.dumps([1, {"a": 2.5}], 0), "old", {})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_newer_protocol_gives_what_pickle_gives(protocol: int) -> None:
    value = [{"a": (1, 2, 3, 4), "b": [True, None, 2.5, -1, 300, 70000, 2**70], ("k", 1): "text" * 100}, "text" * 100]

    assert unpickle(pickle.dumps(value, protocol), "new", {}) == value


def test_a_damaged_file_is_an_error_of_ours_whatever_bit_is_wrong(save: Save, tmp_path: Path) -> None:
    path = save({"a": torch.ones(3), "b": [torch.zeros(2), {"c": 1}], "d": np.float64(2)})
    good = path.read_bytes()
    seed = random.randrange(2**32)
    source = random.Random(seed)
    refused = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << source.randrange(8)
        path.write_bytes(bad)
        try:
            read(path)
        except CheckpointError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"bit of byte {at}, seed {seed}: {error!r}") from error
    assert refused > 200  # data.pkl has a checksum, and the directory is looked at


def test_a_file_cut_off_anywhere_is_corrupt(save: Save) -> None:
    path = save({"a": torch.ones(3)})
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointCorrupt):
            read(path)


def test_legacy_files_say_what_to_do(save: Save) -> None:
    path = save({"a": torch.ones(3)}, _use_new_zipfile_serialization=False)

    with pytest.raises(CheckpointUnsupported, match=r"torch\.save it again"):
        read(path)


def test_a_file_without_checksums_is_read(save: Save) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(3)})
    finally:
        torch.serialization.set_crc32_options(True)

    assert tensor_of(path, read(path)["a"]).tolist() == [0, 1, 2]


def rebuilt(numel: int, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    def tuple_of(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + struct.pack("<i", numel) + b"tQJ"
        + struct.pack("<i", first) + tuple_of(shape) + tuple_of(strides) + b"\x89NtR."
    )  # fmt: skip


def test_a_tensor_that_leaves_its_storage_is_corrupt(tmp_path: Path) -> None:
    assert read(archive_with(tmp_path, rebuilt(4, 0, (2, 2), (2, 1)))).shape == (2, 2)
    for bad in (
        rebuilt(5, 0, (2, 2), (2, 1)),
        rebuilt(4, 1, (2, 2), (2, 1)),
        rebuilt(4, 0, (2, 2), (3, 1)),
        rebuilt(4, 0, (2, 2), (1,)),
        rebuilt(4, -1, (2,), (1,)),
        rebuilt(4, 0, (-2,), (1,)),
        rebuilt(-4, 0, (2,), (1,)),
    ):
        with pytest.raises(CheckpointCorrupt):
            read(archive_with(tmp_path, bad))


def test_what_cannot_be_pointed_at_is_refused(tmp_path: Path) -> None:
    data = rebuilt(4, 0, (2, 2), (2, 1))
    with pytest.raises(CheckpointUnsupported, match="compressed"):
        read(archive_with(tmp_path, data, compression=zipfile.ZIP_DEFLATED))
    path = archive_with(tmp_path, data)
    path.write_bytes(path.read_bytes().replace(b"little", b"bigger"))
    with pytest.raises(CheckpointError):
        read(path)
    (tmp_path / "text").write_text("no zip at all")
    with pytest.raises(CheckpointCorrupt, match=r"not a file of torch\.save"):
        read(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme", "text")
    with pytest.raises(CheckpointUnsupported, match=r"without a data\.pkl"):
        read(tmp_path / "zip")


@pytest.mark.filterwarnings("ignore:.*[sS]parse.*")
def test_other_kinds_of_tensors_are_refused_by_name(save: Save) -> None:
    for value in (torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.tensor([1j]).conj()):
        with pytest.raises(CheckpointUnsupported, match=r"sparse|meta|conjugated"):
            read(save({"x": value}))

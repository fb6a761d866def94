"""Archives laid out by ourselves are what `torch.save` would have stored, to torch and to anyone who reads zip."""

from __future__ import annotations

import pickletools
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from spot_core.snapshot import buffers
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import TorchFile, pieces
from spot_core.snapshot.loading import load_inert
from spot_core.snapshot.torch_archive import TorchArchive
from spot_core.snapshot.trees import same_bits

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip

Pair = namedtuple("Pair", "first second")


class Settings:
    """An object that only pickle can look into."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights


def optimizer_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def odd_tree() -> dict[Any, Any]:
    tied = torch.randn(3)
    return {
        "ordered": OrderedDict(a=torch.arange(5), b={"c": tied}),
        "pair": Pair(tied, 1),
        "array": numpy.arange(4.0),
        "plain": (1, -1, 2.5, -0.0, 0.0, float("inf"), "é\n'", True, False, None, 10**30, -(10**10), b"\x00bytes"),
        "equal": [1, True, 1.0, "1"],
        "empty": [torch.empty(0, 3), (), [], {}, ""],
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "set": {1, 2},
        ("a", 1): "a key that is no text",
        3: torch.tensor(3),
        "strided": torch.randn(4, 6).t()[1:, ::2],
        "a part of a large one": torch.arange(1000)[10:12],
        "tied": [tied, tied],
        "parameter": torch.nn.Parameter(torch.randn(2), requires_grad=False),
    }


@pytest.fixture(params=[True, False], ids=["buffered", "streamed"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Takes a snapshot of a tree and writes its file; returns where that is."""
    if not request.param:
        monkeypatch.setattr(buffers, "available_bytes", lambda: 0)
    snapshotter = Snapshotter(torch.device("cpu"))

    def stored(tree: Any) -> Path:
        snapshot = snapshotter.take([TorchFile(path="a.pt", tree=tree)])
        [file] = snapshot.ready.result()
        (tmp_path / "a.pt").write_bytes(b"".join(pieces(file)))
        snapshot.written.set()
        snapshotter.gate()
        return tmp_path / "a.pt"

    yield stored
    snapshotter.close()


Store = Callable[[Any], Path]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert same_bits(found, expected)
    elif isinstance(expected, numpy.ndarray):
        assert found.dtype == expected.dtype and numpy.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected) and type(found) is type(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for each, value in zip(found, expected, strict=True):
            assert_same(each, value)
    else:
        assert type(found) is type(expected) and repr(found) == repr(expected)


@pytest.mark.parametrize("mmap", [False, True])
def test_an_optimizer_is_loaded_as_weights_only(store: Store, mmap: bool) -> None:
    state = optimizer_state()
    assert_same(torch.load(store(state), weights_only=True, mmap=mmap), state)


def test_a_tree_of_everything_is_loaded(store: Store) -> None:
    tree = odd_tree()
    path = store(tree)
    assert_same(torch.load(path, weights_only=False), tree)
    assert_same(torch.load(path, weights_only=False, mmap=True), tree)


@pytest.mark.parametrize("tree", [{}, [], {"epoch": 3}, None, torch.ones(3)], ids=str)
def test_a_tree_of_little_is_loaded(store: Store, tree: Any) -> None:
    assert_same(torch.load(store(tree), weights_only=True), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_loaded(store: Store, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (3, 5)).to(dtype)
    assert_same(
        torch.load(store({"a": tensor, "b": tensor[0, 0]}), weights_only=True), {"a": tensor, "b": tensor[0, 0]}
    )


def test_an_object_with_a_tensor_in_it_is_loaded(store: Store) -> None:
    tree = {"before": torch.ones(2), "settings": [Settings(torch.arange(3))], "after": torch.zeros(2)}
    loaded = torch.load(store(tree), weights_only=False)
    assert_same(
        [loaded["before"], loaded["settings"][0].weights, loaded["after"]],
        [torch.ones(2), torch.arange(3), torch.zeros(2)],
    )


def test_an_object_may_hold_what_is_also_stored_in_part(store: Store) -> None:
    whole = torch.arange(12.0).view(3, 4)
    for part in (whole[0], whole.t(), whole, whole[1], whole.view(torch.int32)):
        loaded = torch.load(store({"part": part, "settings": Settings(whole)}), weights_only=False)
        assert_same([loaded["part"], loaded["settings"].weights], [part, whole])


def test_many_objects_of_other_types_are_loaded(store: Store) -> None:
    tree = {"scalars": [numpy.float64(each) for each in range(3000)], "weights": torch.ones(2)}
    assert_same(torch.load(store(tree), weights_only=False), tree)


def test_a_tensor_that_is_a_key_stays_one(store: Store) -> None:
    [key] = torch.load(store({torch.arange(3): torch.ones(2)}), weights_only=False)
    assert_same(key, torch.arange(3))


def test_such_an_object_is_left_out_where_nothing_may_run(store: Store) -> None:
    path = store({"weights": torch.ones(2), "hyper": Settings(torch.arange(3))})
    assert_same(load_inert(path, inert_keys={"hyper"})["weights"], torch.ones(2))


def test_values_and_shapes_may_change_from_one_file_to_the_next(store: Store) -> None:
    for tree in (
        {"a": torch.ones(2, 3), "step": 1},
        {"a": torch.zeros(2, 3), "step": 1000},
        {"a": torch.ones(3, 2), "step": 1},
        {"a": torch.ones(3, 2, dtype=torch.int32), "b": torch.ones(3, 2)},
        {"b": torch.ones(3, 2), "a": torch.ones(3, 2, dtype=torch.int32)},
    ):
        assert_same(torch.load(store(tree), weights_only=True), tree)


def test_each_tensor_is_stored_once_and_by_itself(store: Store) -> None:
    tree = {
        "part": torch.arange(1000)[:2],
        "again": [torch.ones(4), torch.ones(4)],
        "settings": Settings(torch.ones(7)),
    }
    with zipfile.ZipFile(store(tree)) as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist() if "/data/" in each.filename}
    assert sizes == {"archive/data/0": 16, "archive/data/1": 16, "archive/data/2": 16, "archive/data/3": 28}


def test_containers_of_other_types_share_what_is_stored(tmp_path: Path) -> None:
    snapshotter = Snapshotter(torch.device("cpu"))
    [file] = snapshotter.take([TorchFile(path="a.pt", tree=OrderedDict(a=torch.ones(4)))]).ready.result()
    (tmp_path / "a.pt").write_bytes(b"".join(pieces(file)))
    snapshotter.close()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert [each.filename for each in archive.infolist() if "/data/" in each.filename] == ["archive/data/0"]


def test_the_archive_is_one_for_zip_and_has_torch_s_alignment(store: Store) -> None:
    path = store(optimizer_state())
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        pickletools.genops(archive.read("archive/data.pkl"))
        assert archive.read("archive/version") == b"3\n"
        for each in archive.infolist():
            assert reader.get_record_offset(each.filename.removeprefix("archive/")) % 64 == 0
            with archive.open(each) if each.CRC else open(path, "rb") as content:
                assert len(content.read()) >= each.file_size


@pytest.mark.parametrize("order", ["large first", "large last"])
def test_more_than_four_gigabytes(order: str, tmp_path: Path) -> None:
    """The file has holes instead of the large tensor's content, and the small one's place is beyond 32 bits."""
    count, small = (5 << 30) + 3, torch.arange(5)
    tensors = [torch.empty(count, dtype=torch.uint8, device="meta"), small]
    tree: dict[str, Any] = {"large": tensors[0], "small": small}
    if order == "large last":
        tensors, tree = tensors[::-1], {"small": small, "large": tensors[0]}
    archive = TorchArchive(tensors)
    with open(tmp_path / "a.pt", "wb") as file:
        for before, tensor in zip(archive.before, tensors, strict=True):
            file.write(before)
            if tensor is small:
                file.write(small.numpy().tobytes())
            else:
                file.seek(count - 1, 1)
                file.write(b"\x07")
        file.write(archive.after(tree, tensors))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    assert_same(loaded["small"], small)
    assert loaded["large"].shape == (count,) and loaded["large"][-2:].tolist() == [0, 7]
    with zipfile.ZipFile(tmp_path / "a.pt") as read:
        assert sorted(each.file_size for each in read.infolist() if "/data/" in each.filename) == [40, count]

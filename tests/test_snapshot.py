"""Snapshots are of one moment, whatever training does next, and their files are the formats' own."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from spot_core.snapshot import buffers, fingerprint
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import BytesFile, SafetensorsFile, TorchFile, pieces
from spot_core.snapshot.trees import rebuild
from spot_core.snapshot.writer import CheckpointWriter, Written
from spot_core.store import catalog, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier


def manifest(step: int) -> Manifest:
    return Manifest(
        run="run",
        name=CheckpointName(1, step),
        epoch=0.0,
        useful_s=0.0,
        created=0.0,
        framework="test",
        native="native",
        files=(),
    )


class SlowTier(PosixTier):
    """A local tier whose commits wait until they are let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_stage = threading.Event()

    def stage(self, name: CheckpointName) -> Path:
        assert self.may_stage.wait(30)
        return super().stage(name)


class Replacing(torch.optim.AdamW):
    """Makes new tensors in each step instead of writing to the old ones, and counts in plain numbers."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].clone()
            state["count"] = state.get("count", 0) + 1
        return super().step(*args, **kwargs)


@pytest.fixture(params=[torch.optim.AdamW, Replacing])
def training(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 8))
    return model, request.param(model.parameters(), lr=0.1)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, snapshotter: Snapshotter | None = None) -> None:
    model(torch.randn(16, 64)).square().mean().backward()
    if snapshotter is not None:
        snapshotter.gate()
    optimizer.step()
    optimizer.zero_grad()


def files_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, native: str = "native") -> list[Any]:
    buffered = frozenset(name for name, _ in model.named_buffers())
    return [
        SafetensorsFile(path=f"{native}/model.safetensors", tensors=model.state_dict(), volatile=buffered),
        TorchFile(path=f"{native}/optimizer.pt", tree=optimizer.state_dict(), stable_keys=frozenset({"state"})),
        BytesFile(path="note.json", content=lambda: b"{}"),
    ]


@pytest.mark.parametrize("has_memory", [True, False])
def test_steps_after_the_snapshot_do_not_show_in_it(
    has_memory: bool, training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held back while training goes on; without host memory training waits for the writer instead."""
    if not has_memory:
        monkeypatch.setattr(buffers, "available_bytes", lambda: 0)
    model, optimizer = training
    for _ in range(2):
        step(model, optimizer)
    tier = SlowTier(tmp_path)
    snapshotter = Snapshotter(torch.device("cpu"))
    writer = CheckpointWriter(tier, snapshotter, number=1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_optimizer = rebuild(optimizer.state_dict(), torch.clone)
    done: list[Written] = []
    writer.submit(snapshotter.take(files_of(model, optimizer)), manifest(1), done.append)
    optimizer.param_groups[0]["lr"] = 0.2  # by a schedule, before the next optimizer step
    if has_memory:
        for _ in range(5):
            step(model, optimizer, snapshotter)
        assert writer.is_busy
        tier.may_stage.set()
    else:
        threading.Timer(0.2, tier.may_stage.set).start()
        step(model, optimizer, snapshotter)
        assert not writer.is_busy or writer.wait(5)
    writer.wait()
    assert done[0].error is None
    folder = tmp_path / "checkpoints" / str(done[0].manifest.name)
    stored = load_file(folder / "native/model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())
    loaded = torch.load(folder / "native/optimizer.pt", weights_only=True)
    assert loaded["param_groups"] == expected_optimizer["param_groups"]
    assert loaded["state"].keys() == expected_optimizer["state"].keys()
    for i, state in expected_optimizer["state"].items():
        assert loaded["state"][i].keys() == state.keys()
        assert all(torch.equal(torch.as_tensor(loaded["state"][i][key]), torch.as_tensor(state[key])) for key in state)
    resume.verify(tier, catalog.read_manifest(tier, done[0].manifest.name))
    snapshotter.close()


def test_host_buffers_are_reused_and_the_next_snapshot_has_its_own_content(training: Any, tmp_path: Path) -> None:
    model, optimizer = training
    step(model, optimizer)
    tier = PosixTier(tmp_path)
    snapshotter = Snapshotter(torch.device("cpu"))
    writer = CheckpointWriter(tier, snapshotter, number=1)
    pointers = set()
    for number in range(1, 4):
        snapshot = snapshotter.take(files_of(model, optimizer, f"step-{number}"))
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        writer.submit(snapshot, replace(manifest(number), native=f"step-{number}"), lambda written: None)
        writer.wait()
        weights, state, _ = snapshot.ready.result()
        pointers.add((weights.tensors["0.weight"].data_ptr(), state.tree["state"][0]["exp_avg"].data_ptr()))
        stored = load_file(tmp_path / f"checkpoints/{CheckpointName(1, number)}/step-{number}/model.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
        step(model, optimizer, snapshotter)
    assert len(pointers) == 1
    snapshotter.close()


def test_a_state_that_cannot_be_restored_is_known_at_the_first_checkpoint(tmp_path: Path) -> None:
    tier = PosixTier(tmp_path)
    snapshotter = Snapshotter(torch.device("cpu"))
    writer = CheckpointWriter(tier, snapshotter, number=1)
    done: list[Written] = []
    unloadable = TorchFile(path="native/odd.pt", tree={"value": Path("a class that weights_only refuses")})
    writer.submit(snapshotter.take([unloadable]), manifest(1), done.append)
    writer.wait()
    assert done[0].error is not None
    assert catalog.names(tier) == []
    assert list((tmp_path / "staging").iterdir()) == []
    snapshotter.close()


def test_a_staging_folder_that_cannot_be_made_is_counted_and_the_next_checkpoint_works(
    training: Any, tmp_path: Path
) -> None:
    """A file is where it must be."""
    model, optimizer = training
    tier = PosixTier(tmp_path)
    (tmp_path / "staging").write_text("in the way")
    snapshotter = Snapshotter(torch.device("cpu"))
    writer = CheckpointWriter(tier, snapshotter, number=1)
    done: list[Written] = []
    writer.submit(snapshotter.take(files_of(model, optimizer)), manifest(1), done.append)
    writer.wait()
    assert writer.failures == 1
    (tmp_path / "staging").unlink()
    writer.submit(snapshotter.take(files_of(model, optimizer)), manifest(2), done.append)
    writer.wait()
    assert [written.error is None for written in done] == [False, True]
    assert catalog.names(tier) == [CheckpointName(1, 2)]
    snapshotter.close()


def test_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "f64": torch.randn(2, dtype=torch.float64),
        "i8": torch.arange(7, dtype=torch.int8),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(4, 6).t(),
    }
    (tmp_path / "a.safetensors").write_bytes(b"".join(pieces(SafetensorsFile(path="a.safetensors", tensors=tensors))))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "b.safetensors")
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    header = (tmp_path / "a.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("count", [1, 8190, 8191, 300_000, (1 << 22) + 8191 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_the_one_that_stored_runs_have(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = tensor.view(torch.int32 if dtype is torch.float32 else torch.int16)
    assert fingerprint.of_tensors([("w", tensor)]) == defined_fingerprint(tensor, words)


@pytest.mark.parametrize("extreme", ["min", "max"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_no_sum_of_a_fingerprint_overflows(dtype: torch.dtype, extreme: str) -> None:
    words = torch.full(((1 << 22) + 13,), getattr(torch.iinfo(dtype), extreme), dtype=dtype)
    assert fingerprint.of_tensors([("w", words)]) == defined_fingerprint(words, words)


def defined_fingerprint(tensor: torch.Tensor, words: torch.Tensor) -> str:
    """A word counts for itself, and as often as its place says: 1 to 8191, again and again, and anew after 1 << 22."""
    words, places = words.long(), torch.arange(len(words))
    sums = words.sum().item(), (words * (places % (1 << 22) % 8191 + 1)).sum().item()
    return str(blake3(f"w|{tensor.dtype}|({len(words)},)|{sums}".encode()).hexdigest())[:32]


def test_fingerprint_of_each_is_that_of_it_alone_and_threads_stay_as_they_were() -> None:
    tensors = {
        str(size): torch.randn(size).to(dtype)
        for size, dtype in ((1, torch.half), (9000, torch.half), (300_000, torch.float32))
    }
    before = torch.get_num_threads()
    assert fingerprint.of_each(tensors) == {
        name: fingerprint.of_tensors([(name, tensor)]) for name, tensor in tensors.items()
    }
    with ThreadPoolExecutor(1) as pool:
        assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [before, before]


def test_fingerprint_sees_every_bit_and_every_exchange() -> None:
    base = {"a": torch.randn(300, 40), "b": torch.randn(17).bfloat16()}
    original = fingerprint.of_tensors(base.items())
    assert fingerprint.of_tensors({k: v.clone() for k, v in base.items()}.items()) == original
    flipped = base["a"].clone()
    flipped.view(torch.int32)[299, 39] ^= 1
    assert fingerprint.of_tensors({**base, "a": flipped}.items()) != original
    exchanged = base["a"].clone()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    assert fingerprint.of_tensors({**base, "a": exchanged}.items()) != original
    assert fingerprint.of_tensors({"c": base["a"], "b": base["b"]}.items()) != original
    assert fingerprint.of_tensors({**base, "b": base["b"].half()}.items()) != original

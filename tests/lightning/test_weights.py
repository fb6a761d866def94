"""What checkpoints hold of the weights: everything that training changes, however it does, and no frozen base."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_spot import weights
from lightning_spot.weights import FrozenBase
from spot_core.errors import ConfigError
from spot_core.store import catalog
from spot_core.store.manifest import Manifest
from tests.lightning.job import JobSpec
from tests.lives.lives import assert_same_training, final, live, live_to_the_end, local_of, uninterrupted

EVALUATED = {"limit_val_batches": 1.0, "val_check_interval": 3}
FULL = {"trainable_only": False}

# 10 steps an epoch, 2 epochs where nothing else is said.
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the frozen base in the checkpoint, too": ({"kind": "half_frozen", "options": FULL}, ["step:4", "step:15"]),
    "frozen, but written to in place": ({"kind": "momentum", "trainer": EVALUATED}, ["step:4", "evaluation:12"]),
    "frozen, but written to through .data": ({"kind": "momentum_data"}, ["step:4", "step:15"]),
    "frozen, but written to through .data, later on": ({"kind": "momentum_late"}, ["step:15", "step:18"]),
    "frozen, then unfrozen": ({"kind": "transfer", "others": ["unfreezing"]}, ["step:4", "epoch:1", "step:18"]),
    "average": ({"others": ["average"]}, ["step:4", "step:15"]),
    "average, evaluation": ({"others": ["average"], "trainer": EVALUATED}, ["evaluation:6", "step:14"]),
    "moving average": ({"others": ["moving average"]}, ["step:4", "step:15"]),
    "average beside frozen weights": ({"kind": "half_frozen", "others": ["average"]}, ["step:4", "step:15"]),
    "moving average beside frozen weights, evaluation": (
        {"kind": "half_frozen", "others": ["moving average"], "trainer": EVALUATED},
        ["step:4", "evaluation:12"],
    ),
    "bf16-mixed": ({"trainer": {"precision": "bf16-mixed"}}, ["step:4", "step:15"]),
    "bf16-true": ({"kind": "lora", "trainer": {"precision": "bf16-true"}}, ["step:4", "step:15"]),
    "16-true": ({"kind": "lora_sgd", "trainer": {"precision": "16-true"}}, ["step:4", "step:15"]),
}


@pytest.mark.parametrize("cell", CELLS)
def test_killed_and_relaunched_ends_bit_equal(cell: str, tmp_path: Path) -> None:
    changes, dies = CELLS[cell]
    trainer = {"max_epochs": 2, **changes.get("trainer", {})}
    spec = JobSpec(folder=str(tmp_path / "job"), **{**changes, "trainer": trainer})
    reference = uninterrupted(spec, tmp_path / "reference")
    results = live_to_the_end(spec, dies)
    assert [result.exit_code for result in results[:-1]] == [-signal.SIGKILL] * len(dies)
    assert_same_training(spec, reference)
    assert "resume: step" in results[-1].log


def newest(spec: JobSpec) -> tuple[Manifest, dict[str, Any]]:
    """The newest commit's manifest, and its native checkpoint."""
    tier = local_of(spec)
    name = catalog.names(tier)[0]
    manifest = catalog.read_manifest(tier, name)
    native = Path(spec.folder, "local/job/checkpoints", str(name), manifest.native)
    return manifest, torch.load(native, weights_only=False)


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def test_a_commit_is_hardly_larger_than_what_is_trained(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), kind="lora_large", trainer={"max_steps": 3})
    live_to_the_end(spec)
    manifest, checkpoint = newest(spec)
    assert all("lora_" in key for key in checkpoint["state_dict"])
    states = checkpoint["optimizer_states"][0]["state"].values()
    needed = size(checkpoint["state_dict"].values()) + size(value for state in states for value in state.values())
    assert needed > 6e6
    stored = manifest.total_bytes
    assert needed < stored <= 1.05 * needed


@pytest.mark.parametrize(
    ("trainable_only", "others"),
    [(True, []), (False, []), (True, ["average"])],
)
def test_frozen_weights_are_in_the_checkpoint_only_if_asked_for(
    trainable_only: bool, others: list[str], tmp_path: Path
) -> None:
    options = {"trainable_only": trainable_only}
    changes = {"options": options, "others": others, "trainer": {"max_steps": 2}}
    spec = JobSpec(folder=str(tmp_path / "job"), kind="half_frozen", **changes)
    live_to_the_end(spec)
    checkpoint = newest(spec)[1]
    every = {key for key in final(spec)["tensors"] if key.startswith("network.")}
    places = [place for place in weights.WEIGHTS if place in checkpoint]
    assert len(places) == 1 + len(others)
    for place in places:
        left_out = {"network.1.weight", "network.1.bias"} if trainable_only else set()
        assert checkpoint[place].keys() == every - left_out


def test_with_the_base_in_its_checkpoints_a_run_goes_on_over_any_other(tmp_path: Path) -> None:
    """The base is part of the run's identity only where checkpoints lack it."""
    spec = JobSpec(folder=str(tmp_path / "job"), kind="half_frozen", options=FULL, trainer={"max_epochs": 2})
    reference = uninterrupted(spec, tmp_path / "reference")
    assert live(dataclasses.replace(spec, dies="step:15")).exit_code == -signal.SIGKILL
    last = live_to_the_end(dataclasses.replace(spec, seed=8))[-1]
    assert "resume: step" in last.log
    assert_same_training(spec, reference)


def live_weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(2) for name in ("base.weight", "lora.weight", "head.weight")}


def test_a_checkpoint_is_completed_by_the_live_base() -> None:
    live = live_weights()
    stored = {name: torch.randn(2) for name in ("lora.weight", "head.weight")}
    checkpoint = {"state_dict": dict(stored), "epoch": 1}
    weights.complete(checkpoint, live, {"base.weight"})
    assert checkpoint["state_dict"].keys() == live.keys()
    assert checkpoint["state_dict"]["base.weight"] is live["base.weight"]
    assert all(checkpoint["state_dict"][name] is tensor for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("stored", "absent", "named"),
    [
        (["lora.weight"], ["base.weight"], "head.weight"),  # lost
        (["lora.weight", "head.weight"], ["base.weight", "gone.weight"], "gone.weight"),  # another model now
        (["base.weight", "lora.weight", "head.weight"], ["base.weight"], "base.weight"),  # in both places
        (["lora.weight", "head.weight", "more.weight"], ["base.weight"], "more.weight"),  # has no place
    ],
)
@pytest.mark.parametrize("place", weights.WEIGHTS)
def test_a_checkpoint_that_lacks_anything_else_is_refused_by_name(
    place: str, stored: list[str], absent: list[str], named: str
) -> None:
    checkpoint: dict[str, Any] = {place: {name: torch.zeros(2) for name in stored}}
    before = dict(checkpoint[place])
    with pytest.raises(ConfigError, match=named) as refused:
        weights.complete(checkpoint, live_weights(), set(absent))
    assert str(refused.value).count("weight") - str(refused.value).count("weights") == 1, "only that one is named"
    assert checkpoint[place] == before


# -- a base that a resume has loaded into itself ---------------------------------------------------------------


def frozen_module() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[0].requires_grad_(False)
    return module


def read_at_start(base: FrozenBase, absent: list[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The parameters that are read when training starts."""
    read: set[str] = set()
    present = base._present_digests
    with monkeypatch.context() as patch:
        patch.setattr(base, "_present_digests", lambda parameters: read.update(parameters) or present(parameters))
        base.training_starts(loaded=absent)
    return read


def opened_base(module: torch.nn.Module) -> tuple[FrozenBase, list[str]]:
    base = FrozenBase.of(module, torch.device("cpu"))
    assert base is not None
    return base, ["0.weight", "0.bias"]


def test_a_base_that_was_loaded_into_itself_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = frozen_module()
    base, absent = opened_base(module)
    module.load_state_dict(module.state_dict())
    assert read_at_start(base, absent, monkeypatch) == set()
    assert base.keys(module.state_dict()) == set(absent)
    base.verify()
    assert base.keys(module.state_dict()) == set(absent)


@pytest.mark.parametrize("change", ["written to twice", "moved", "not left out"])
def test_a_base_to_which_more_happened_is_read_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = frozen_module()
    base, absent = opened_base(module)
    module.load_state_dict(module.state_dict())
    if change == "written to twice":
        module.load_state_dict(module.state_dict())
    elif change == "moved":
        module[0].weight.data = module[0].weight.data.clone()
    assert read_at_start(base, [] if change == "not left out" else absent, monkeypatch) >= {"0.weight"}
    assert base.keys(module.state_dict()) == set(absent)


def test_a_base_that_got_other_values_instead_is_found_out_after_the_first_step() -> None:
    module = frozen_module()
    base, absent = opened_base(module)
    module.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()})
    base.training_starts(loaded=absent)
    base.verify()
    assert base.keys(module.state_dict()) == set(), "what changed belongs to the checkpoints"

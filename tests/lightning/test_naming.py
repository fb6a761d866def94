"""What a checkpoint names is taken from the one before, and never written where that turns out to be otherwise."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spot.naming import Naming
from lightning_spot.weights import FrozenBase
from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lightning.runs import assert_trains_nothing_more
from tests.lives.lives import assert_same_training, left_step, live, live_to_the_end, local_of, uninterrupted


class Training:
    """A model of which one part is frozen, its optimizer, and what names them."""

    def __init__(self, *others: nn.Module) -> None:
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), self.blocks, *others)
        self.optimizer = torch.optim.SGD(p for p in self.model.parameters() if p.requires_grad)
        self.parameters = dict(self.model.named_parameters())
        base = FrozenBase.of(self.model, torch.device("cpu"))
        trainer = SimpleNamespace(lightning_module=self.model, optimizers=[self.optimizer])
        self.naming = Naming(trainer, base, self.parameters)

    def assert_named_as_it_is(self) -> None:
        names = self.naming.names()
        stored = self.model.state_dict()
        assert list(names.live) == list(stored)
        assert all(value.data_ptr() == stored[key].data_ptr() for key, value in names.live.items())
        assert names.trained == [name for name, p in self.parameters.items() if p.requires_grad]
        assert not any(self.parameters[key].requires_grad for key in names.frozen)
        of_optimizer = {p.data_ptr() for group in self.optimizer.param_groups for p in group["params"]}
        assert names.stable == of_optimizer
        assert names.volatile == {
            key for key in stored.keys() - names.frozen if stored[key].data_ptr() not in of_optimizer
        }


def moved(training: Training) -> None:
    weight = training.blocks[0].weight
    weight.data = weight.data.clone()


def written_to(training: Training) -> None:
    with torch.no_grad():
        training.model[0].weight.add_(1)


CHANGES: dict[str, Callable[[Training], Any]] = {
    "a trained weight lies elsewhere": moved,
    "a frozen weight is written to": written_to,
    "a layer is frozen": lambda training: training.blocks[0].requires_grad_(False),
    "a layer is unfrozen": lambda training: training.model[0].requires_grad_(True),
    "a layer is exchanged": lambda training: training.blocks.__setitem__(0, nn.Linear(2, 2)),
    "a layer is put between others": lambda training: training.blocks.insert(0, nn.Linear(2, 2)),
    "a layer is taken out": lambda training: training.blocks.__delitem__(1),
    "a buffer is added": lambda training: training.model.register_buffer("scale", torch.ones(1)),
    "the optimizer gets another weight": lambda training: training.optimizer.add_param_group(
        {"params": [training.model[0].weight]}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_before_the_copy_and_nothing_is_assumed_any_more(change: str) -> None:
    training = Training()
    training.assert_named_as_it_is()
    assert not training.naming.is_assumed
    training.naming.names()
    assert training.naming.is_assumed
    is_current = training.naming.check()
    assert is_current()

    CHANGES[change](training)
    assert not is_current()
    training.assert_named_as_it_is()
    moved(training)  # once more: it would not be seen if it were assumed
    training.assert_named_as_it_is()
    assert not training.naming.is_assumed


def test_a_step_of_training_is_no_change() -> None:
    training = Training()
    names = training.naming.names()
    assert training.naming.names() is names
    training.blocks[1](training.blocks[0](torch.ones(3, 2))).sum().backward()
    training.optimizer.step()
    assert training.naming.check()()


def test_what_was_forgotten_is_looked_up() -> None:
    training = Training()
    training.naming.names()
    moved(training)
    training.naming.forget()
    training.assert_named_as_it_is()
    assert not training.naming.is_assumed
    training.naming.names()
    assert training.naming.is_assumed


def test_where_looking_fails_nothing_is_assumed_any_more() -> None:
    training = Training()
    training.naming.names()
    training.naming.names()
    is_current, layer = training.naming.check(), training.blocks[0]
    del layer._parameters["weight"]  # as functional_call has it for a moment
    layer._modules["weight"] = 1
    with pytest.raises(AttributeError):
        is_current()
    del layer._modules["weight"]
    layer.weight = nn.Parameter(torch.ones(2, 2))
    training.assert_named_as_it_is()
    assert not training.naming.is_assumed


class Quantized(nn.Linear):
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}packed"] = self.weight.detach() * 2


def test_nothing_is_assumed_of_a_module_that_makes_its_part_itself() -> None:
    training = Training(Quantized(2, 2))
    for _ in range(2):
        training.naming.names()
        assert not training.naming.is_assumed


# -- in real training, 10 steps an epoch; a callback moves every trained weight at the end of step 7 ----------


@pytest.mark.parametrize(("dies", "newest"), [("step:8", 6), ("step:9", 8), ("step:15", 14)])
def test_a_checkpoint_of_weights_that_were_moved_is_not_written_and_the_next_one_is(
    dies: str, newest: int, tmp_path: Path
) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), others=["moving weights", "patient"], trainer={"max_epochs": 2})
    reference = uninterrupted(spec, tmp_path / "reference")
    killed = live(dataclasses.replace(spec, dies=dies))
    assert killed.exit_code == -signal.SIGKILL
    assert killed.log.count("checkpoint of step 7 not written (ChangedStateError") == 1
    assert killed.log.count("not written") == 1
    resumed = live_to_the_end(spec)[-1]
    assert_same_training(spec, reference)
    assert f"resume: step {newest} from the local tier" in resumed.log


def test_it_is_made_up_for_at_once(tmp_path: Path) -> None:
    spec = JobSpec(
        folder=str(tmp_path / "job"),
        others=["moving weights", "patient"],
        trainer={"max_epochs": 2},
        interval_s=None,
        options={"interval_steps": 4},
    )
    killed = live(dataclasses.replace(spec, dies="step:11"))
    assert "checkpoint of step 8 not written (ChangedStateError" in killed.log
    assert 9 in {name.step for name in catalog.names(local_of(spec))}, killed.log


def test_the_last_checkpoint_before_a_preemption_is_certain(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), others=["moving weights"], trainer={"max_epochs": 2})
    reference = uninterrupted(spec, tmp_path / "reference")
    preempted = live(dataclasses.replace(spec, dies="term_backward:6"))
    assert preempted.exit_code == 75
    assert left_step(preempted.log) == 7
    assert "not written" not in preempted.log
    live_to_the_end(spec)
    assert_same_training(spec, reference)


def test_the_final_checkpoint_is_certain(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), others=["moving weights"], trainer={"max_steps": 7})
    assert "not written" not in live_to_the_end(spec)[-1].log
    assert_trains_nothing_more(spec)


def test_where_an_epoch_begins_a_change_costs_no_checkpoint(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), kind="transfer", others=["unfreezing"], trainer={"max_epochs": 2})
    assert "not written" not in live_to_the_end(spec)[-1].log

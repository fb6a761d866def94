"""Scripts that do not know of us: protected by the environment alone, or by a configuration of LightningCLI."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_spot import SpotCallback, factory
from spot_core.store import catalog, layout
from spot_core.store.posix import PosixTier
from tests.lightning.job import JobSpec
from tests.lives.lives import live, wait_for

pl_cli = importlib.import_module("lightning.pytorch.cli")

STEPS = 40  # 4 epochs of 10 batches

MODEL = """
import time

import torch
import {namespace} as pl
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch, _):
        time.sleep(0.05)  # slow enough to be killed in the middle
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader():
    return DataLoader(TensorDataset(torch.arange(80.0).reshape(20, 4) / 80), batch_size=2, shuffle=True)


def save(trainer, path):
    names = [type(callback).__name__ for callback in trainer.callbacks]
    torch.save({{"weights": trainer.model.state_dict(), "step": trainer.global_step, "callbacks": names}}, path)

"""

SCRIPT = """
pl.seed_everything(7, verbose=False)
quiet = {{"logger": False, "enable_progress_bar": False, "enable_model_summary": False}}
trainer = pl.Trainer(max_epochs=4, accelerator="cpu", enable_checkpointing=False, **quiet)
trainer.fit(Net(), loader())
save(trainer, "final.pt")
"""

FOLDS = """
quiet = {{"logger": False, "enable_progress_bar": False, "enable_model_summary": False}}
for fold in (1, 2):
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(Net(), loader())
    save(trainer, f"fold-{{fold}}.pt")
"""

CLI_SCRIPT = """
from {namespace}.cli import LightningCLI


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


if __name__ == "__main__":
    cli = LightningCLI(Net, Data, save_config_kwargs={{"overwrite": True}})
    save(cli.trainer, "final.pt")
"""

CONFIG = """
seed_everything: 7
trainer:
  accelerator: cpu
  max_epochs: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
CALLBACK = """
  callbacks:
    - class_path: lightning_spot.SpotCallback
      init_args:
        remote: remote/job
        local: local
        interval_s: 0.001
"""


class Script:
    """A user's script, run as a process of its own in the folder in which it lies."""

    def __init__(self, folder: Path, body: str, namespace: str = "lightning.pytorch") -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        (folder / "train.py").write_text((MODEL + body).format(namespace=namespace))

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPOT_")}
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "train.py", *arguments],
                cwd=self.folder,
                env={**inherited, "OMP_NUM_THREADS": "1", **environ},
                stdout=log,
                stderr=log,
            )

    def run(self, *arguments: str, **environ: str) -> None:
        assert self.start(*arguments, **environ).wait(120) == 0, self.log[-3000:]

    def run_and_kill(self, step: int, *arguments: str, run: str = "job", **environ: str) -> None:
        """One life that is killed when a checkpoint of this run after `step` is committed."""
        process = self.start(*arguments, **environ)
        wait_for(lambda: process.poll() is not None or self.newest_step(run) > step, timeout_s=120)
        process.kill()
        assert process.wait() == -signal.SIGKILL, self.log[-3000:]

    def newest_step(self, run: str) -> int:
        return max((name.step for name in catalog.names(PosixTier(self.folder / "local" / run))), default=0)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def final(self, name: str = "final.pt") -> dict[str, Any]:
        body: dict[str, Any] = torch.load(self.folder / name, weights_only=True)
        return body


def assert_same_end(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert all(torch.equal(tensor, ours["weights"][name]) for name, tensor in theirs["weights"].items())


def environ_of(script: Script) -> dict[str, str]:
    return {
        "SPOT_REMOTE": str(script.folder / "remote/job"),
        "SPOT_LOCAL": str(script.folder / "local"),
        "SPOT_INTERVAL_S": "0.001",
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """The untouched script, without anything of ours in its environment."""
    script = Script(tmp_path_factory.mktemp("reference") / "job", SCRIPT)
    script.run()
    return script


# -- the environment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("namespace", "kills"), [("lightning.pytorch", [3, 17]), ("pytorch_lightning", [14])])
def test_untouched_script_survives_kills_when_the_environment_names_a_remote(
    namespace: str, kills: list[int], reference: Script, tmp_path: Path
) -> None:
    script = Script(tmp_path / "job", SCRIPT, namespace)
    for step in kills:
        script.run_and_kill(step, **environ_of(script))
    script.run(**environ_of(script))
    assert script.log.count("spot: resume: step") == len(kills)
    assert script.final()["callbacks"].count("SpotCallback") == 1
    assert_same_end(script.final(), reference.final())


def test_several_trainers_of_one_script_are_runs_of_their_own(reference: Script, tmp_path: Path) -> None:
    script = Script(tmp_path / "job", FOLDS)
    script.run_and_kill(5, run="job-2", **environ_of(script))
    script.run(**environ_of(script))
    assert f"spot: training was complete at step {STEPS} already" in script.log
    for name in ("fold-1.pt", "fold-2.pt"):
        assert_same_end(script.final(name), reference.final())


def test_without_a_remote_in_the_environment_nothing_is_added(
    reference: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "SpotCallback" not in reference.final()["callbacks"]
    assert "spot" not in reference.log
    assert {path.name for path in reference.folder.iterdir()} == {"train.py", "log.txt", "final.pt"}
    monkeypatch.setenv("SPOT_REMOTE", " ")
    assert factory.callbacks() == []


def test_callback_of_the_script_is_the_only_one_although_the_environment_names_a_remote(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), trainer={"max_epochs": 1}, options={"keep_local": 1})
    given = f"{spec.folder}/elsewhere/run"
    result = live(JobSpec(**{**vars(spec), "environ": {"SPOT_REMOTE": given}}))
    assert result.exit_code == 0, result.log[-3000:]
    assert result.log.count("spot: fresh start as incarnation 1") == 1
    assert "fenced" not in result.log
    # The variable wins over the argument as always, the script's other options stay.
    assert PosixTier(given).list(layout.INCARNATIONS) == ["000001.json"]
    assert len(catalog.names(PosixTier(f"{spec.folder}/local/run"))) == 1
    assert not Path(spec.folder, "remote").exists()


# -- LightningCLI ----------------------------------------------------------------------------------------------


def test_callback_in_a_cli_configuration_survives_kills(reference: Script, tmp_path: Path) -> None:
    script = Script(tmp_path / "job", CLI_SCRIPT)
    (script.folder / "lora.yaml").write_text(CONFIG + CALLBACK)
    command = ("fit", "--config", "lora.yaml")
    script.run_and_kill(13, *command)
    script.run(*command)
    assert "spot: resume: step" in script.log
    assert_same_end(script.final(), reference.final())


@pytest.fixture
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CLI made in this process warns if pytest has any."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "200")


def cli(*arguments: str, **keywords: Any) -> Any:
    return pl_cli.LightningCLI(pl_cli.LightningModule, subclass_mode_model=True, args=list(arguments), **keywords)


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's CLI calls jsonargparse in its old ways
def test_callback_can_be_added_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(CONFIG)
    made = cli(
        f"--config={tmp_path}/plain.yaml",
        "--model=lightning.pytorch.demos.boring_classes.BoringModel",
        "--trainer.callbacks+=lightning_spot.SpotCallback",
        "--trainer.callbacks.remote=s3://bucket/added",
        "--trainer.callbacks.storage_options={anon: true}",
        "--trainer.callbacks.keep_remote=5",
        "--trainer.callbacks.keep_every=500",
        run=False,
    )
    (callback,) = [callback for callback in made.trainer.callbacks if isinstance(callback, SpotCallback)]
    config = callback.config(str(tmp_path))
    assert (config.remote, config.keep_remote, config.keep_every) == ("s3://bucket/added", 5, 500)
    assert config.storage_options == {"anon": True}


@pytest.mark.usefixtures("no_arguments")
def test_cli_help_shows_every_option_of_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli("fit", "--trainer.callbacks.help=lightning_spot.SpotCallback")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    entries = dict(re.findall(r"^ +--trainer\.callbacks\.(\w+) (.*?\))$", shown, flags=re.MULTILINE | re.DOTALL))
    options = inspect.signature(SpotCallback).parameters
    assert entries.keys() == options.keys(), shown
    for name, option in options.items():
        default = "null" if option.default is None else option.default
        assert f"default: {default})" in entries[name], entries[name]
        explanation = entries[name].partition("(type:")[0].split()[1:]
        assert len(explanation) >= 4, entries[name]

"""What we wrote loads with stock Lightning, in an environment where this project is not installed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from spot_core.store import catalog, layout
from tests.lightning.job import JobSpec
from tests.lives.lives import live, local_of

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".venv" / "lightning-2.5"

SCRIPT = """
import importlib.metadata, importlib.util, pathlib, sys
assert importlib.util.find_spec("spot_core") is None and importlib.util.find_spec("lightning_spot") is None
assert not list(importlib.metadata.entry_points(group="lightning.pytorch.callbacks_factory"))
import lightning.pytorch as pl
import torch
from tests.lightning.data import data_of
from tests.lightning.modules import Settings, Tuned, TunedLora
from tests.lives.job import SeenLog

_, full, lora, folder, version = sys.argv
assert pl.__version__.startswith(version), pl.__version__
trusted = {"weights_only": False} if version == "2.6" else {}  # hyper-parameters of any type; 2.5 trusts any file
seen = SeenLog(pathlib.Path(folder))
torch.set_num_threads(1)

def trained_on(module, path, **trusted):
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, limit_val_batches=0, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder)
    begun_at = []
    module.on_train_start = lambda: begun_at.append(trainer.global_step)
    trainer.fit(module, **data_of("map", {}), ckpt_path=path, **trusted)
    assert begun_at == [int(pathlib.Path(path).stem.removeprefix("step-"))], begun_at
    assert (trainer.global_step, trainer.current_epoch) == (20, 2)

def assert_very_weights(module, stored):
    live = module.state_dict()
    assert stored and all(torch.equal(tensor, live[name]) for name, tensor in stored.items())
    return live.keys() - stored.keys()

stored = torch.load(full, weights_only=False)["state_dict"]
module = Tuned.load_from_checkpoint(full, seen=seen, **trusted)
assert not assert_very_weights(module, stored), "a full fine-tune is stored in full"
assert module.hparams.settings == Settings(0.03, pathlib.Path("another/corpus"))
trained_on(module, full, **trusted)

stored = torch.load(lora, weights_only=True)["state_dict"]
pl.seed_everything(7, verbose=False)
module = TunedLora.load_from_checkpoint(lora, seen=seen, strict=False)
missing = assert_very_weights(module, stored)
assert missing == {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
assert len(missing) > len(stored)
assert module.hparams.note == "as given"
module.strict_loading = False
trained_on(module, lora)
print("loaded")
"""


@pytest.fixture(scope="module")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A virtual environment with the same libraries and this project's tests, without the project.

    Links, because Lightning looks for what installed projects give it: this one's name must not be there.
    """
    folder = tmp_path_factory.mktemp("stock")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for library in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "spot_callbacks" not in library.name:
            (site / library.name).symlink_to(library)
    (site / "tests").symlink_to(ROOT / "tests")
    return [str(folder / "bin" / "python"), "-c"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The newest native file of a full fine-tune, and of one that trains an adapter.

    Both were written in the middle of an epoch by a life that had resumed.
    """
    natives = []
    for kind in ("tuned", "tuned_lora"):
        spec = JobSpec(folder=str(tmp_path_factory.mktemp(kind)), kind=kind, trainer={"max_epochs": 2})
        for where in ("step:8", "step:15"):
            assert live(dataclasses.replace(spec, dies=where)).exit_code == -signal.SIGKILL
        tier = local_of(spec)
        newest = catalog.names(tier)[0]
        natives.append(str(tier.path(layout.checkpoint(newest)) / catalog.read_manifest(tier, newest).native))
    return natives


@pytest.mark.parametrize("version", ["2.6", "2.5"])
def test_stock_lightning_loads_a_checkpoint_and_trains_on(
    version: str, stock_python: list[str], checkpoints: list[str], tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if version == "2.5":
        environment["PYTHONPATH"] = str(OLDER)
    done = subprocess.run(
        [*stock_python, SCRIPT, *checkpoints, str(tmp_path), version],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded" in done.stdout

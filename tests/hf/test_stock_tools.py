"""What we wrote loads with stock tools, in an environment where this project is not installed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.hf.job import JobSpec
from tests.lives.lives import live

ADAPTER = """
import importlib.util, sys
assert importlib.util.find_spec("spot_core") is None and importlib.util.find_spec("hf_spot") is None
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from safetensors.torch import load_file
folder = sys.argv[1]
torch.manual_seed(7)
config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
model = PeftModel.from_pretrained(LlamaForCausalLM(config), folder, is_trainable=True)
stored = load_file(folder + "/adapter_model.safetensors")
loaded = {k.replace(".default", ""): v for k, v in model.state_dict().items()}
assert stored and all(torch.equal(v, loaded[k]) for k, v in stored.items() if k in loaded), "adapter differs"
assert sum(k in loaded for k in stored) > 4
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(37)]
args = TrainingArguments(output_dir=sys.argv[2], per_device_train_batch_size=4, num_train_epochs=3, report_to="none",
                         use_cpu=True, save_strategy="no", learning_rate=5e-3, disable_tqdm=True)
trainer = Trainer(model=model, args=args, train_dataset=rows)
result = trainer.train(resume_from_checkpoint=folder)
assert result.global_step == 30, result
assert trainer._initial_global_step == int(folder.rpartition("-")[2])
print("loaded")
"""

FULL = """
import importlib.util, sys
assert importlib.util.find_spec("spot_core") is None
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
stored = load_file(sys.argv[1] + "/model.safetensors")
assert "lm_head.weight" not in stored, "tied weights are stored once"
assert all(torch.equal(v, model.state_dict()[k]) for k, v in stored.items())
assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
for name in ("optimizer.pt", "scheduler.pt"):
    torch.load(f"{sys.argv[1]}/{name}", weights_only=True)
print("loaded")
"""


@pytest.fixture(scope="module")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A virtual environment with the same libraries and without this project.

    Its path file names the site-packages folder; path files inside that folder, such as this project's own editable
    install, are not followed.
    """
    folder = tmp_path_factory.mktemp("stock")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return [str(folder / "bin" / "python"), "-c"]


@pytest.mark.parametrize(("kind", "script"), [("lora", ADAPTER), ("full", FULL)])
def test_stock_tools_load_a_checkpoint(kind: str, script: str, stock_python: list[str], tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), kind=kind)
    assert live(dataclasses.replace(spec, dies="step:15")).exit_code == -signal.SIGKILL
    newest = max(Path(spec.folder, "local/job/checkpoints").iterdir())
    native = next(newest.glob("checkpoint-*"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*stock_python, script, str(native), str(tmp_path / "stock-out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded" in done.stdout

"""One YAML line turns it on, the environment overrides, and trials are left alone."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_spot import SpotArguments, SpotCallback
from spot_core.config import SpotConfig

YAML = """
output_dir: out
use_cpu: true
"""


def parsed(tmp_path: Path, more: str = "") -> SpotArguments:
    path = tmp_path / "train.yaml"
    path.write_text(YAML + more)
    _, spot = HfArgumentParser((TrainingArguments, SpotArguments)).parse_yaml_file(str(path))
    return spot


def test_one_yaml_line_turns_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOT_REMOTE", raising=False)
    assert parsed(tmp_path).callbacks() == []
    (callback,) = parsed(tmp_path, "spot_remote: s3://bucket/my-run\n").callbacks()
    config = callback.config(output_dir="out")
    assert (config.remote, config.run) == ("s3://bucket/my-run", "my-run")


def test_every_option_arrives(tmp_path: Path) -> None:
    lines = "spot_remote: s3://b/r\nspot_local: /tmp\nspot_interval_s: 3.5\nspot_keep_local: 4\nspot_keep_remote: 5\n"
    lines += "spot_grace_s: 6\nspot_preempt_exit_code: 99\nspot_keep_every: 500\n"
    (callback,) = parsed(tmp_path, lines).callbacks()
    config = callback.config(output_dir="out")
    assert (config.local, config.interval_s, config.keep_local, config.keep_remote) == ("/tmp", 3.5, 4, 5)
    assert (config.grace_s, config.preempt_exit_code, config.keep_every) == (6.0, 99, 500)


def test_environment_turns_it_on_and_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOT_REMOTE", "s3://other/run-2")
    monkeypatch.setenv("SPOT_KEEP_REMOTE", "7")
    (callback,) = parsed(tmp_path).callbacks()
    assert callback.config(output_dir="out").run == "run-2"
    (callback,) = parsed(tmp_path, "spot_remote: s3://bucket/my-run\nspot_keep_remote: 3\n").callbacks()
    assert callback.config(output_dir="out").remote == "s3://other/run-2"
    assert callback.config(output_dir="out").keep_remote == 7


def test_local_defaults_to_a_folder_under_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOT_LOCAL", raising=False)
    monkeypatch.setattr("spot_core.config.NVME_MOUNTS", ())
    assert SpotCallback("s3://b/r").config(output_dir=str(tmp_path)).local == str(tmp_path / ".spot")


def test_a_known_nvme_mount_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOT_LOCAL", raising=False)
    (tmp_path / "nvme0").mkdir()
    monkeypatch.setattr("spot_core.config.NVME_MOUNTS", (f"{tmp_path}/nvme*",))
    assert SpotCallback("s3://b/r").config(output_dir="out").local == str(tmp_path / "nvme0" / "spot")


def test_callback_options_have_the_defaults_of_the_configuration() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(SpotConfig)}
    for name, parameter in inspect.signature(SpotCallback).parameters.items():
        if name not in {"remote", "storage_options"}:
            assert parameter.default == defaults[name], name


def test_hyper_parameter_trials_are_left_alone(tmp_path: Path) -> None:
    from tests.hf.job import JobSpec, trainer_of

    trainer = trainer_of(JobSpec(folder=str(tmp_path), arguments={"max_steps": 2}))
    with pytest.raises(RuntimeError, match="Unknown type for trial"):  # the Trainer's own: it was reached
        trainer.train(trial=object())
    assert not (tmp_path / "remote").exists()

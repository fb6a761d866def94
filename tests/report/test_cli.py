"""What holds for every command: start-up, help, errors without tracebacks, storage options, object stores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spot_core.config import SpotConfig
from spot_core.environment import STORAGE_OPTIONS
from spot_core.errors import ConfigError
from spot_core.store import catalog
from spot_core.store.tier import open_tier
from tests.report.conftest import Spot, everything_in, spot_process
from tests.report.stored import BuiltRun
from tests.servers import RefusingServer, S3Server, s3_options


@pytest.fixture
def stored_on_s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltRun:
    """A run with two checkpoints in a bucket; `spot` finds the way there in its environment."""
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    remote = open_tier(f"s3://{s3_server.new_bucket()}/team/alpaca", s3_server.options)
    run = BuiltRun(tmp_path / "nvme" / "alpaca", remote)
    run.live(steps=(0, 20))
    run.commit(10)
    run.commit(20, ballast=20 << 20)
    run.drain()
    return run


def test_help_names_every_command_and_the_exit_codes(spot: Spot) -> None:
    result = spot("--help")
    assert result.code == 0
    for word in (
        "ls",
        "status",
        "verify",
        "restore",
        "prune",
        "repair",
        "agent",
        "chaos",
        "imds",
        "doctor",
        "Exit codes: 0 done",
        STORAGE_OPTIONS,
    ):
        assert word in result.out
    for command in ("ls", "status", "verify", "restore", "prune", "repair", "agent", "chaos", "imds", "doctor"):
        assert spot(command, "--help").code == 0


def test_help_loads_neither_torch_nor_a_file_system_library() -> None:
    code = (
        "import sys\nfrom spot_core.report import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('LOADED', {'torch', 'numpy', 'fsspec', 's3fs', 'transformers', 'lightning'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "LOADED set()" in result.stdout, result.stdout + result.stderr


def test_version_is_that_of_the_package(spot: Spot) -> None:
    result = spot("--version")
    assert result.code == 0
    assert result.out.startswith("spot 0.")


def test_a_wrong_option_is_a_wrong_call(spot: Spot, run: BuiltRun) -> None:
    assert spot("ls", run.url, "--colour").code == 2


def test_errors_are_messages_on_standard_error_without_a_traceback(tmp_path: Path) -> None:
    result = spot_process("ls", tmp_path)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("spot: ")
    assert "Traceback" not in result.err


def test_a_message_is_printed_whole_and_without_markup(spot: Spot, tmp_path: Path) -> None:
    place = tmp_path / ("[bold]" + "x" * 150)
    assert str(place) in spot("ls", place).err


def test_a_pipe_gets_whole_rows(tmp_path: Path) -> None:
    name = "a-run-with-a-name-that-is-much-longer-than-the-eighty-columns-of-a-usual-terminal-would-allow"
    BuiltRun(tmp_path / name)
    result = spot_process("ls", tmp_path, COLUMNS="")
    assert any(line.split()[:2] == [name, "transformers"] for line in result.out.splitlines()), result.out


def test_a_terminal_that_knows_only_ascii_gets_its_tables(run: BuiltRun) -> None:
    run.live(steps=(10, 20))
    result = spot_process("status", run.url, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.code == 0, result.err
    assert "10 ? 20" in result.out


def test_an_unknown_scheme_is_a_wrong_call(spot: Spot) -> None:
    result = spot("ls", "s4://bucket/run")
    assert result.code == 2
    assert "cannot open s4://" in result.err


@pytest.mark.parametrize("text", ['{"secret": "hunter2"', '["hunter2"]', '"hunter2"', "hunter2", "null"])
def test_storage_options_that_are_no_object_are_refused_without_repeating_them(
    spot: Spot, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, text)
    result = spot("ls", "s3://bucket/run")
    assert result.code == 2
    assert STORAGE_OPTIONS in result.err
    assert "hunter2" not in result.err + result.out


@pytest.mark.parametrize(
    ("argument", "text", "wanted"),
    [
        (None, '{"key": "a"}', {"key": "a"}),
        ({"key": "mine"}, '{"key": "a", "secret": "b"}', {"key": "mine"}),
        ({"key": "mine"}, None, {"key": "mine"}),
        (None, None, {}),
        (None, " ", {}),
    ],
)
def test_a_training_reads_its_storage_options_from_the_environment_unless_it_is_given_some(
    argument: dict[str, Any] | None, text: str | None, wanted: dict[str, Any]
) -> None:
    environ = {} if text is None else {STORAGE_OPTIONS: text}
    options = {"remote": "s3://bucket/run", "storage_options": argument}
    config = SpotConfig.resolve(options, fallback_local="/nowhere", environ=environ)
    assert config.storage_options == wanted
    assert "'key'" not in repr(config)


def test_a_training_refuses_storage_options_that_are_no_object() -> None:
    with pytest.raises(ConfigError, match=STORAGE_OPTIONS):
        SpotConfig.resolve({"remote": "s3://b/run"}, fallback_local="/nowhere", environ={STORAGE_OPTIONS: "[1]"})


def test_every_command_works_on_an_object_store(stored_on_s3: BuiltRun, spot: Spot, tmp_path: Path) -> None:
    run = stored_on_s3
    root = run.url.rpartition("/")[0]

    (listed,) = spot("ls", root, "--json").json["runs"]
    assert (listed["run"], listed["url"], listed["newest_step"], listed["outcome"]) == (
        "alpaca",
        run.url,
        20,
        "running",
    )
    assert [row["step"] for row in spot("ls", run.url, "--json").json["checkpoints"]] == [20, 10]

    waiting = run.commit(30)
    local = spot("status", run.url, "--local", run.local.root, "--json").json["local"]
    assert local["undrained"] == [str(waiting)]
    assert spot("agent", "--local", run.local.root, "--remote", run.url, "--once").code == 0
    assert catalog.names(run.remote)[0] == waiting

    assert spot("verify", run.url).code == 0
    assert spot("restore", run.url, "--to", tmp_path / "out", "--step", 20).code == 0
    committed = run.local.path("checkpoints/000001-000000000020/checkpoint-20")
    assert everything_in(tmp_path / "out" / "checkpoint-20") == everything_in(committed)


def test_a_bucket_as_a_root_and_the_slash_at_its_end_are_fine(
    s3_server: S3Server, tmp_path: Path, spot: Spot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    bucket = s3_server.new_bucket()
    BuiltRun(tmp_path / "nvme", open_tier(f"s3://{bucket}/alpaca", s3_server.options))
    for url in (f"s3://{bucket}", f"s3://{bucket}/"):
        assert [run["run"] for run in spot("ls", url, "--json").json["runs"]] == ["alpaca"]


def test_a_name_that_no_run_can_have_hides_no_run(spot: Spot, tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}"
    BuiltRun(tmp_path / "nvme", open_tier(f"{root}/alpaca"))
    open_tier(f"{root}").create("run*/notes.txt", b"wildcards are for the shell")
    assert [run["run"] for run in spot("ls", root, "--json").json["runs"]] == ["alpaca"]


def test_damage_on_an_object_store_is_found(stored_on_s3: BuiltRun, spot: Spot) -> None:
    path = "checkpoints/000001-000000000020/checkpoint-20/optimizer.pt"
    content = bytearray(stored_on_s3.remote.read(path))
    content[-1] ^= 1
    stored_on_s3.remote.replace(path, bytes(content))
    result = spot("verify", stored_on_s3.url)
    assert result.code == 1
    assert f"{stored_on_s3.url}/{path} does not have the digest" in result.out


def test_a_bucket_that_does_not_exist_is_an_error_not_an_empty_root(
    s3_server: S3Server, spot: Spot, run: BuiltRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(s3_server.options))
    run.commit(1)
    url = "s3://no-such-bucket-here/run"
    for command in (("ls", url), ("agent", "--local", run.local.root, "--remote", url, "--once")):
        result = spot(*command)
        assert result.code == 1
        assert "bucket does not exist" in result.err


def test_a_store_that_refuses_is_an_error_not_an_empty_root() -> None:
    with RefusingServer(403, "AccessDenied") as server:
        options = {STORAGE_OPTIONS: json.dumps(server.options)}
        result = spot_process("ls", "s3://bucket/run", **options)
    assert result.code == 1
    assert "permission denied" in result.err
    assert "Traceback" not in result.err


def test_a_store_that_does_not_answer_is_an_error_without_a_traceback() -> None:
    options = {STORAGE_OPTIONS: json.dumps(s3_options(1))}
    result = spot_process("status", "s3://bucket/run", **options)
    assert result.code == 1
    assert "cannot list s3://bucket/run" in result.err
    assert "Traceback" not in result.err

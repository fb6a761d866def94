"""Configuration: every field checked, the environment before the argument, and what names a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spot_core import config as configuration
from spot_core.config import SpotConfig, option_names
from spot_core.errors import ConfigError, SpotError, shown
from spot_core.keys import describe_key_file

REMOTE = "s3://bucket/my-run"
KEY = "0123456789abcdef"


# Files in the working folder of each test.
KEY_FILES: dict[str, bytes] = {
    "one.key": KEY.encode(),
    "same.key": KEY.encode(),
    "rotated.key": f"{KEY}-new\n\n  {KEY}-old  \r\n".encode(),
    "empty.key": b"",
    "blank.key": b" \n\n",
    "short.key": b"short-key",
    "one-short.key": f"{KEY}\nshort-key\n".encode(),
    "no-text.key": b"\xff" * 40,
    "huge.key": KEY.encode() * 5000,
}


@pytest.fixture(autouse=True)
def without_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests may have an instance store."""
    monkeypatch.setattr(configuration, "NVME_MOUNTS", ())


@pytest.fixture(autouse=True)
def key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in KEY_FILES.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    monkeypatch.chdir(tmp_path)


def resolve(environ: dict[str, str] | None = None, /, **options: Any) -> SpotConfig:
    return SpotConfig.resolve(options, fallback_local="/fallback", environ=environ or {})


# -- every field -----------------------------------------------------------------------------------------------

BAD: dict[str, list[Any]] = {
    "remote": ["", "   ", None, 7, "s3://", "s3://bucket", "s3://bucket/", "/", "memory://x", "s3://bucket/..", ".."],
    "local": ["", 7, False],
    "interval_s": [0, -1.0, float("nan"), "600", True, [1]],
    "interval_steps": [0, -1, 1.5, 100.0, "100", True],
    "min_interval_s": [0, -1.0, float("nan"), "1", None, True],
    "max_interval_s": [0, -1.0, float("nan"), "1", None, True, 0.5],
    "max_overhead": [0, -0.1, 1.5, float("nan"), "10 %", None, True],
    "prior_per_hour": [0, -1.0, float("nan"), float("inf"), 1e6, "1", True],
    "fleet": ["", "s3://bucket", "/", 7, True],
    "max_runtime_s": [0, -1.0, float("nan"), "24:00:00", True],
    "keep_local": [0, -1, 1.5, 2.0, "2", None, True],
    "keep_remote": [0, -1, 1.5, 2.0, "2", None, True],
    "keep_every": [0, -1, 1.5, 100.0, "100", False, True, [100]],
    "signals": ["", "TERM", "SIGKILL", "SIGTERM,", "sigterm", 15, None],
    "grace_s": [0, -1.0, float("nan"), "25", None, True],
    "notice": ["", "on", "aws;gcp", "auto,aws", None, True],
    "notice_lead_s": [0, -1.0, float("nan"), "30", True],
    "notice_file": ["", 7, True],
    "notice_webhook": ["", "8099", ":8099", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "host:http", 8099],
    "preempt_exit_code": [0, 137, 256, -9, 75.0, "75", None, True],
    "on_preempt": ["", "stop", None, True],
    "resume": [None, "false", 0, 1, ""],
    "start_timeout_s": [0, -1.0, float("nan"), "60", None],
    "drain_timeout_s": [0, -1.0, float("nan"), "600", None],
    "trainable_only": [None, "true", 0],
    "storage_options": [None, "key=1", [("key", 1)], {"session": object()}, {"key": {1, 2}}, {7: "not text"}],
    "signing_key_file": [
        "",
        7,
        "/no/such/file",
        ".",
        "empty.key",
        "blank.key",
        "short.key",
        "one-short.key",
        "no-text.key",
        "huge.key",
    ],
    "signing_keys": [None, KEY, [KEY], (KEY[:-1],), (KEY, ""), (KEY.encode(),)],
}
GOOD: dict[str, list[Any]] = {
    "remote": [REMOTE, "gs://bucket/a/run/", "/data/run", "run", "./run", "file:///data/run", "az://container/run"],
    "local": [None, "/scratch", "relative"],
    "interval_s": [None, 0.001, 600, np.float64(60)],
    "interval_steps": [None, 1, 500],
    "min_interval_s": [0.001, 60, 14400],
    "max_interval_s": [1, 3600.0, float("inf")],
    "max_overhead": [0.001, 0.035, 1],
    "prior_per_hour": [None, 0.001, 3],
    "fleet": [None, "s3://bucket/fleet", "/shared/fleet", "gs://bucket/team/fleet"],
    "max_runtime_s": [None, 86_400, 0.5],
    "keep_local": [1, 100],
    "keep_remote": [1, 100],
    "keep_every": [None, 1, 1000],
    "signals": ["SIGTERM", "SIGTERM,SIGUSR1", "SIGUSR1, SIGINT"],
    "grace_s": [0.5, 120],
    "notice": ["auto", "off", "aws", "aws,gcp, azure"],
    "notice_lead_s": [None, 30, 0.5],
    "notice_file": [None, "/run/preempted"],
    "notice_webhook": [None, "127.0.0.1:8099", "0.0.0.0:80"],
    "preempt_exit_code": [1, 75, 143, 255],
    "on_preempt": ["exit", "return"],
    "resume": [True, False],
    "start_timeout_s": [0.1, 3600],
    "drain_timeout_s": [0.1, float("inf")],
    "trainable_only": [True, False],
    "storage_options": [{}, {"key": "k", "client_kwargs": {"region_name": "eu-west-1"}, "anon": False, "n": [1]}],
    "signing_key_file": [None, "one.key"],
    "signing_keys": [(), (KEY,), (KEY, "a second key of enough bytes")],
}


def test_no_field_is_left_out_of_these_tests() -> None:
    assert {field.name for field in dataclasses.fields(SpotConfig)} == BAD.keys() == GOOD.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}=.* is not valid: it must be ") as caught:
        SpotConfig(**{"remote": REMOTE, name: value})
    if name not in {"storage_options", "signing_keys"}:
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_good_value_is_taken(name: str, value: Any) -> None:
    assert getattr(SpotConfig(**{"remote": REMOTE, name: value}), name) == value


def test_a_config_error_is_also_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, SpotError)


def test_an_unknown_option_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown option intervall.*interval_s"):
        resolve(remote=REMOTE, intervall=3)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpotConfig(remote=REMOTE).remote = "other"  # type: ignore[misc]


def test_storage_options_are_never_shown() -> None:
    secret = {"secret": "hidden-value"}
    assert "hidden-value" not in repr(SpotConfig(remote=REMOTE, storage_options=secret))
    with pytest.raises(ConfigError) as caught:
        SpotConfig(remote=REMOTE, storage_options={**secret, "session": object()})
    assert "hidden-value" not in str(caught.value)


# -- the name of the run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remote", "run"),
    [
        ("s3://bucket/my-run", "my-run"),
        ("s3://bucket/team/my-run/", "my-run"),
        ("s3://bucket/team//my-run", "my-run"),
        ("s3://bucket/team/./my-run/.", "my-run"),
        ("/data/my-run", "my-run"),
        ("/data/my-run///", "my-run"),
        ("my-run", "my-run"),
        ("file:///my-run", "my-run"),
        ("local:///data/my-run", "my-run"),
        ("gs://bucket/run with spaces", "run with spaces"),
        ("/data/run.v2", "run.v2"),
    ],
)
def test_the_last_component_names_the_run(remote: str, run: str) -> None:
    assert SpotConfig(remote=remote).run == run


def test_a_bucket_is_no_run() -> None:
    """Its checkpoints would lie among everything else in the bucket."""
    with pytest.raises(ConfigError, match="last component names the run"):
        SpotConfig(remote="s3://bucket")


def test_the_parent_folder_is_no_run() -> None:
    """The run's local folder would be above the one that was given."""
    with pytest.raises(ConfigError, match="last component names the run"):
        resolve(remote="/data/runs/..")


@pytest.mark.parametrize("remote", ["/data/my-run", "file:///data/my-run", "/data/other/../my-run"])
def test_both_tiers_in_one_folder_are_refused(remote: str) -> None:
    """Every checkpoint would look durable, and nothing would outlive the instance."""
    with pytest.raises(ConfigError, match="both tiers would be one"):
        resolve(remote=remote, local="/data")


def test_both_tiers_on_one_disk_are_allowed() -> None:
    assert resolve(remote="/data/bucket/my-run", local="/data/local").local == "/data/local"


def test_the_message_file_is_found_from_any_working_folder(tmp_path: Path) -> None:
    """The agent that looks for it has another one than the training."""
    assert resolve(remote=REMOTE, notice_file="preempted").notice_file == str(tmp_path / "preempted")


# -- where a value comes from ----------------------------------------------------------------------------------

FROM_ENVIRONMENT: dict[str, tuple[str, Any]] = {
    "remote": ("gs://other/run", "gs://other/run"),
    "local": ("/scratch", "/scratch"),
    "interval_s": ("12.5", 12.5),
    "interval_steps": ("500", 500),
    "min_interval_s": ("0.5", 0.5),
    "max_interval_s": ("3600", 3600.0),
    "max_overhead": ("0.035", 0.035),
    "prior_per_hour": ("2", 2.0),
    "fleet": ("/shared/fleet", "/shared/fleet"),
    "max_runtime_s": ("86400", 86400.0),
    "keep_local": ("7", 7),
    "keep_remote": (" 8 ", 8),
    "keep_every": ("500", 500),
    "signals": ("SIGUSR1", "SIGUSR1"),
    "grace_s": ("30", 30.0),
    "notice": ("off", "off"),
    "notice_lead_s": ("120", 120.0),
    "notice_file": ("/run/preempted", "/run/preempted"),
    "notice_webhook": ("127.0.0.1:8099", "127.0.0.1:8099"),
    "preempt_exit_code": ("99", 99),
    "on_preempt": ("return", "return"),
    "resume": ("false", False),
    "start_timeout_s": ("5", 5.0),
    "drain_timeout_s": ("1e3", 1000.0),
    "trainable_only": ("false", False),
    "signing_key_file": ("one.key", "one.key"),
}
ARGUMENTS: dict[str, Any] = {
    "remote": REMOTE,
    "local": "/argument",
    "interval_s": 1.0,
    "interval_steps": None,
    "min_interval_s": 2.0,
    "max_interval_s": 1000.0,
    "max_overhead": 0.5,
    "prior_per_hour": 1.0,
    "fleet": "/argument/fleet",
    "max_runtime_s": 60.0,
    "keep_local": 1,
    "keep_remote": 1,
    "keep_every": 1,
    "signals": "SIGTERM",
    "grace_s": 1.0,
    "notice": "aws",
    "notice_lead_s": 60.0,
    "notice_file": "/argument/preempted",
    "notice_webhook": "127.0.0.1:8000",
    "preempt_exit_code": 1,
    "on_preempt": "exit",
    "resume": True,
    "start_timeout_s": 1.0,
    "drain_timeout_s": 1.0,
    "trainable_only": True,
    "signing_key_file": "same.key",
}


def test_every_option_can_be_set_by_the_environment() -> None:
    assert FROM_ENVIRONMENT.keys() == ARGUMENTS.keys() == set(option_names())


@pytest.mark.parametrize("name", FROM_ENVIRONMENT)
def test_the_environment_beats_the_argument(name: str) -> None:
    text, value = FROM_ENVIRONMENT[name]
    found = resolve({f"SPOT_{name.upper()}": text}, **ARGUMENTS)
    replaced = {"interval_s": None} if name == "interval_steps" else {}
    assert dataclasses.asdict(found) == {**dataclasses.asdict(resolve(**ARGUMENTS)), **replaced, name: value}
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize("name", FROM_ENVIRONMENT)
def test_an_empty_variable_is_as_good_as_none(name: str) -> None:
    for text in ("", "  "):
        assert resolve({f"SPOT_{name.upper()}": text}, **ARGUMENTS) == resolve(**ARGUMENTS)


def test_an_interval_can_be_pinned_in_one_way_only() -> None:
    with pytest.raises(
        ConfigError, match=r"^interval_steps=500 is not valid: it must be left out, since interval_s=60"
    ):
        resolve(remote=REMOTE, interval_s=60, interval_steps=500)
    with pytest.raises(ConfigError, match=r"^interval_steps=500 is not valid"):
        resolve({"SPOT_INTERVAL_S": "60", "SPOT_INTERVAL_STEPS": "500"}, remote=REMOTE)
    pinned = resolve({"SPOT_INTERVAL_S": "60"}, remote=REMOTE, interval_steps=500)
    assert (pinned.interval_s, pinned.interval_steps) == (60.0, None), "the environment's way replaces the argument's"


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^max_interval_s=10 is not valid: it must be min_interval_s=60 or more"):
        resolve(remote=REMOTE, min_interval_s=60, max_interval_s=10)


def test_the_argument_beats_the_default_and_none_means_the_default() -> None:
    assert resolve(remote=REMOTE, keep_local=5).keep_local == 5
    assert resolve(remote=REMOTE, keep_local=None, resume=None) == resolve(remote=REMOTE)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SPOT_KEEP_LOCAL", "2.5"),
        ("SPOT_KEEP_LOCAL", "many"),
        ("SPOT_KEEP_EVERY", "1e3"),
        ("SPOT_INTERVAL_S", "10 minutes"),
        ("SPOT_GRACE_S", "soon"),
        ("SPOT_RESUME", "maybe"),
        ("SPOT_PREEMPT_EXIT_CODE", "0x4b"),
    ],
)
def test_a_variable_that_cannot_be_read_is_refused_by_its_name(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{variable}='{text}' is not valid"):
        resolve({variable: text}, remote=REMOTE)


def test_a_variable_is_checked_like_an_argument() -> None:
    with pytest.raises(ConfigError, match="preempt_exit_code=137"):
        resolve({"SPOT_PREEMPT_EXIT_CODE": "137"}, remote=REMOTE)
    with pytest.raises(ConfigError, match="interval_s=nan"):
        resolve({"SPOT_INTERVAL_S": "nan"}, remote=REMOTE)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("True", True),
        ("YES", True),
        ("on", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("off", False),
    ],
)
def test_truth_has_the_usual_spellings(text: str, value: bool) -> None:
    assert resolve({"SPOT_RESUME": text}, remote=REMOTE).resume is value


def test_storage_options_come_from_the_argument_or_else_from_json_in_the_environment() -> None:
    environ = {"SPOT_STORAGE_OPTIONS": '{"key": "from-environment"}'}
    assert resolve(environ, remote=REMOTE).storage_options == {"key": "from-environment"}
    assert resolve(environ, remote=REMOTE, storage_options={"key": "argument"}).storage_options == {"key": "argument"}


@pytest.mark.parametrize("text", ["hidden-value", "[1]", '"hidden-value"', '{"key": hidden-value}'])
def test_storage_options_that_are_no_json_object_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(ConfigError, match="SPOT_STORAGE_OPTIONS") as caught:
        resolve({"SPOT_STORAGE_OPTIONS": text}, remote=REMOTE)
    assert "hidden-value" not in str(caught.value)


# -- signing keys ----------------------------------------------------------------------------------------------


def test_the_key_comes_from_its_variable() -> None:
    assert resolve({"SPOT_SIGNING_KEY": f" {KEY}\n"}, remote=REMOTE).signing_keys == (KEY,)
    assert resolve({}, remote=REMOTE).signing_keys == ()


def test_a_key_file_holds_one_key_a_line_and_the_first_one_signs() -> None:
    keys = (f"{KEY}-new", f"{KEY}-old")
    assert resolve(remote=REMOTE, signing_key_file="rotated.key").signing_keys == keys
    assert SpotConfig(remote=REMOTE, signing_key_file="rotated.key").signing_keys == keys


def test_a_variable_that_is_set_but_empty_does_not_turn_signatures_off() -> None:
    """A secret that did not arrive in the container."""
    for text in ("", "  ", "\n"):
        with pytest.raises(ConfigError, match=r"^SPOT_SIGNING_KEY='…' is not valid"):
            resolve({"SPOT_SIGNING_KEY": text}, remote=REMOTE)


def test_a_key_in_two_places_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"both given.*Keep one"):
        resolve({"SPOT_SIGNING_KEY": KEY}, remote=REMOTE, signing_key_file="one.key")


def test_a_key_is_never_shown() -> None:
    config = resolve({"SPOT_SIGNING_KEY": KEY}, remote=REMOTE)
    assert KEY not in repr(config) and KEY[:-1] not in repr(config)
    for environ in ({"SPOT_SIGNING_KEY": "short-key"}, {"SPOT_SIGNING_KEY": f"{KEY}\nshort-key"}):
        with pytest.raises(ConfigError) as caught:
            resolve(environ, remote=REMOTE)
        assert "short-key" not in str(caught.value) and KEY not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        resolve(remote=REMOTE, signing_key_file="one-short.key")
    assert "short-key" not in str(caught.value) and KEY not in str(caught.value)


def test_a_key_file_that_others_can_read_is_told() -> None:
    assert describe_key_file("one.key") is None and describe_key_file(None) is None
    Path("one.key").chmod(0o640)
    assert "chmod 600" in str(describe_key_file("one.key"))


# -- what is shown of a URL ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("sftp://user:pass@host/run", "sftp://…@host/run"),
        ("sftp://user:p@ss:w@host:22/run", "sftp://…@host:22/run"),
        ("cannot read http://:pass@host/a and ftp://u:p@b/c", "cannot read http://…@host/a and ftp://…@b/c"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("s3://bucket/run@2:3", "s3://bucket/run@2:3"),
        ("http://127.0.0.1:9000/bucket/a@b", "http://127.0.0.1:9000/bucket/a@b"),
    ],
)
def test_a_password_in_a_url_is_not_shown(url: str, seen: str) -> None:
    assert shown(url) == seen


def test_a_refused_url_is_shown_without_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(remote="sftp://user:hidden-value@host")
    assert "hidden-value" not in str(caught.value)


def test_a_password_in_the_remote_is_not_in_the_text_of_a_configuration() -> None:
    assert "hidden-value" not in repr(resolve(remote="sftp://user:hidden-value@host/team/run"))


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOT_REMOTE", REMOTE)
    monkeypatch.setenv("SPOT_KEEP_REMOTE", "9")
    found = SpotConfig.resolve({}, fallback_local="/fallback")
    assert (found.remote, found.keep_remote) == (REMOTE, 9)


def test_no_remote_at_all_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"remote=.*SPOT_REMOTE"):
        resolve()


# -- folders ---------------------------------------------------------------------------------------------------


def test_paths_become_absolute_because_the_agent_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve(remote="bucket/run", local="here").remote == str(tmp_path / "bucket/run")
    assert resolve(remote="bucket/run", local="here").local == str(tmp_path / "here")
    assert resolve(remote="~/bucket/run", local="~/x").remote == "/home/someone/bucket/run"
    assert resolve(remote="s3://bucket/run/").remote == "s3://bucket/run"


def test_an_instance_store_is_preferred_to_the_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvme1").mkdir()
    (tmp_path / "nvme0").mkdir()
    (tmp_path / "nvme.txt").write_text("not a folder")
    monkeypatch.setattr(configuration, "NVME_MOUNTS", ("/no/such/mount", f"{tmp_path}/nvme*"))
    assert resolve(remote=REMOTE).local == str(tmp_path / "nvme0" / "spot")
    assert resolve(remote=REMOTE, local="/argument").local == "/argument"
    monkeypatch.setattr(configuration, "NVME_MOUNTS", ("/no/such/mount",))
    assert resolve(remote=REMOTE).local == "/fallback"

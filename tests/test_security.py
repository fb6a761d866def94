"""Nothing is unpickled and no secret is told: in the source, and in a real life of a run with secrets everywhere."""

from __future__ import annotations

import ast
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from spot_core.agent.client import AgentClient
from spot_core.config import SpotConfig
from spot_core.errors import SpotError
from spot_core.store import catalog
from spot_core.store.identity import RunIdentity
from spot_core.store.signing import Signing
from spot_core.store.tier import open_tier
from tests.agent.place import Place
from tests.agent.processes import Refused, eventually, wait_for_end
from tests.servers import OverwritingS3Server, S3Server, s3_options

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path for part in ("spot_core", "hf_spot", "lightning_spot", "examples") for path in (ROOT / part).rglob("*.py")
]

# The one place that unpickles, with a list of what may be made: its tests are tests/test_loading.py.
INERT = ROOT / "spot_core" / "snapshot" / "loading.py"
# The one place that writes pickles.
WRITING = ROOT / "spot_core" / "snapshot" / "pickling.py"

SECRET, TOKEN, KEY, PASSWORD = "hidden-secret-7f3a", "hidden-token-91bc", "hidden-signing-key-5d", "hidden-password-c2"
SECRETS = (SECRET, TOKEN, KEY, PASSWORD)


# -- the source ------------------------------------------------------------------------------------------------


def dangers(source: str) -> Iterator[str]:
    """Calls and imports that run what a file names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (
                name for name in names if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"torch.load", "torch_load"} and options.get("weights_only") != "True":
            yield ast.unparse(node)
        if called.rpartition(".")[2] in {"load_pickle", "read_pickle", "eval", "exec", "unsafe_load", "full_load"}:
            yield ast.unparse(node)
        if options.get("allow_pickle", "False") != "False" or options.get("trust_remote_code", "False") != "False":
            yield ast.unparse(node)
        if called == "yaml.load" and "Safe" not in ast.unparse(node):
            yield ast.unparse(node)
        if called.startswith(("torch.jit.load", "os.system", "os.popen")) or options.get("shell", "False") != "False":
            yield ast.unparse(node)


def test_no_source_unpickles() -> None:
    assert len(SOURCES) > 60
    found = {str(path): list(dangers(path.read_text())) for path in SOURCES if path not in {INERT, WRITING}}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_what_writes_pickles_reads_none() -> None:
    source = WRITING.read_text()
    assert list(dangers(source)) == ["pickle"]
    used = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    from_pickle = {name.removeprefix("pickle.") for name in used if name.startswith("pickle.")}
    assert {name for name in from_pickle if not name.isupper()} == {"Pickler", "dumps"}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pandas.read_pickle(path)",
        "torch.jit.load(path)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(dangers(line))


# -- secrets ---------------------------------------------------------------------------------------------------


def assert_told_nowhere(*texts: str | bytes) -> None:
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        told = [secret for secret in SECRETS if secret.encode() in data]
        assert not told, f"{told} in {data[-3000:]!r}"


def files_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def objects_in(url: str, options: dict[str, Any]) -> list[bytes]:
    fs, root = fsspec.url_to_fs(url, **options)
    return [fs.cat_file(path) for path in fs.find(root)]


class Watched:
    """A script in a process of its own; `commands` are the command lines of it and what it started."""

    def __init__(self, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self._log = log
        self.commands: set[str] = set()
        self.agents: set[int] = set()
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SPOT_", "AWS_"))}
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**plain, "SPOT_LOG_LEVEL": "DEBUG", "SPOT_OVERFLOW": "", "OMP_NUM_THREADS": "1", **environment},
            )

    def run(self, preempted: Callable[[], object] = lambda: False) -> tuple[int, str]:
        """Exit code and output, once the agent has ended too. preempted: gets a SIGTERM as soon as that is true."""
        me = psutil.Process(self._process.pid)
        is_told = False
        while self._process.poll() is None:
            for process in (me, *_children(me)):
                self._look(process)
            if not is_told and preempted():
                self._process.terminate()
                is_told = True
            time.sleep(0.2)
        eventually(lambda: not any(map(psutil.pid_exists, self.agents)), "the agent ends", timeout_s=120)
        return self._process.returncode, self._log.read_text()

    def _look(self, process: psutil.Process) -> None:
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            return
        self.commands.add(command)
        if "spot_core.agent" in command:
            self.agents.add(process.pid)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.Error:
        return []


def secret_options(server: Any) -> str:
    return json.dumps({**server.options, "secret": SECRET, "token": TOKEN})


def test_a_life_with_secrets_tells_none(tmp_path: Path, lenient_server: S3Server) -> None:
    """A real small training, all logs at DEBUG: output, command lines, and every file of both tiers.

    Its secret and token are its own, so its server is always the one that takes any.
    """
    url = f"s3://{lenient_server.new_bucket()}/team/run"
    environment = {
        "SPOT_STORAGE_OPTIONS": secret_options(lenient_server),
        "SPOT_SIGNING_KEY": KEY,
        "SPOT_INTERVAL_S": "0.5",
    }
    life = Watched(
        tmp_path / "log", ["examples/raw_pytorch.py", "--remote", url, "--local", str(tmp_path / "local")], environment
    )
    remote = open_tier(url, lenient_server.options, (KEY,))
    code, out = life.run(preempted=lambda: catalog.names(remote))
    assert code == 75, out[-3000:]
    assert catalog.read_manifest(remote, catalog.names(remote)[0]).is_signed
    stored, local = objects_in(url, lenient_server.options), files_in(tmp_path / "local")
    assert len(stored) > 5 and len(local) > 5 and len(life.agents) == 1
    assert any("spot_core.agent" in command for command in life.commands)
    assert_told_nowhere(out, *life.commands, *stored, *local)


def test_wrong_credentials_are_not_told(tmp_path: Path, overwriting_server: OverwritingS3Server) -> None:
    """A server that checks signatures refuses them."""
    url = f"s3://{overwriting_server.new_bucket()}/run"
    environment = {"SPOT_STORAGE_OPTIONS": secret_options(overwriting_server), "SPOT_START_TIMEOUT_S": "3"}
    life = Watched(
        tmp_path / "log", ["examples/raw_pytorch.py", "--remote", url, "--local", str(tmp_path / "local")], environment
    )
    code, out = life.run()
    assert code == 1 and "TierDeniedError" in out, out[-3000:]
    assert_told_nowhere(out, *life.commands, *files_in(tmp_path / "local"))


URLS = {
    "an endpoint": ("s3://bucket/run", f"http://somebody:{PASSWORD}@127.0.0.1:{{port}}"),
    "a remote": (f"sftp://somebody:{PASSWORD}@127.0.0.1:{{port}}/run", None),
    "an unknown scheme": (f"s4://somebody:{PASSWORD}@127.0.0.1:{{port}}/run", None),
    "a wildcard": (f"memory://somebody:{PASSWORD}@host/run*", None),
}


@pytest.mark.parametrize("which", URLS)
def test_a_password_in_a_url_that_does_not_work_is_not_told(tmp_path: Path, which: str) -> None:
    remote, endpoint = URLS[which]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nothing listens
        port = taken.getsockname()[1]
        options = s3_options(port, secret=SECRET, endpoint_url=endpoint.format(port=port)) if endpoint else {}
        place = Place(tmp_path)
        trainer = place.trainer()
        more = {"remote": remote.format(port=port), "start_timeout_s": 1.0, "storage_options": options}
        try:
            with pytest.raises(Refused) as caught:
                trainer.open(**place.options(**more))
        finally:
            trainer.close()
    assert_told_nowhere(str(caught.value), *files_in(tmp_path))


def test_a_traceback_in_the_agent_tells_no_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = SpotConfig(remote=f"s4://a:{PASSWORD}@host/run", local=str(tmp_path), signing_keys=(KEY,))
    with pytest.raises(SpotError) as caught:
        AgentClient(config, RunIdentity("testing", {})).open()
    captured = capfd.readouterr()
    assert_told_nowhere(str(caught.value), repr(config), captured.out, captured.err)


# -- signed lives ----------------------------------------------------------------------------------------------


def test_the_key_reaches_the_agent_through_its_input_alone(tmp_path: Path) -> None:
    place = Place(tmp_path)
    trainer = place.trainer(SPOT_SIGNING_KEY=KEY, SPOT_STORAGE_OPTIONS='{"auto_mkdir": true}')
    try:
        trainer.open(**place.options())
        agent = psutil.Process(trainer.agent)
        assert_told_nowhere(str(agent.environ()), str(agent.cmdline()))
        assert "SPOT_STORAGE_OPTIONS" not in agent.environ()
        trainer.do("commit", 1)
        trainer.do("complete", 1)
        trainer.do("outcome", "completed")
        wait_for_end(trainer)
        place.remote.signing = Signing("run", (KEY,))
        (name,) = catalog.names(place.remote)
        assert catalog.read_manifest(place.remote, name).is_signed and catalog.completions(place.remote) == {name: 1}
    finally:
        trainer.close()


def test_a_life_without_the_key_says_that_signatures_are_not_checked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    first, second = place.trainer(SPOT_SIGNING_KEY=KEY), place.trainer()
    try:
        first.open(**place.options())
        first.do("commit", 1)
        first.do("outcome", "stopped")
        wait_for_end(first)
        opened = second.open(**place.options())
        assert opened["restored"] == "000001-000000000001"
        second.do("commit", 2)
        second.do("outcome", "stopped")
        wait_for_end(second)
        assert capfd.readouterr().err.count("are signed, and this life has no key") == 1
        third = place.trainer(SPOT_SIGNING_KEY=KEY)
        opened = third.open(**place.options())
        assert opened["restored"] == "000001-000000000001", "what the life without the key committed is refused"
    finally:
        for trainer in place.trainers:
            trainer.close()


def test_a_run_that_a_stranger_took_over_does_not_start_afresh(tmp_path: Path) -> None:
    place = Place(tmp_path)
    stranger = place.trainer()
    try:
        stranger.open(**place.options())
        stranger.do("commit", 1)
        stranger.do("outcome", "stopped")
        wait_for_end(stranger)
        trainer = place.trainer(SPOT_SIGNING_KEY=KEY)
        with pytest.raises(Refused, match="is not signed with this run's key") as caught:
            trainer.open(**place.options())
        assert caught.value.kind == "CorruptCheckpointError"
        assert place.remote.list("incarnations") == ["000001.json"]
    finally:
        for each in place.trainers:
            each.close()


def test_logging_a_tier_does_not_log_its_options(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tier = open_tier("s3://bucket/run", s3_options(1, secret=SECRET), (KEY,))
    logging.getLogger("spot_core").debug("%s %r %r", tier.url, tier, tier.signing)
    assert_told_nowhere(caplog.text)

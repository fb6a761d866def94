"""Damaged and hostile records and files: each is refused or skipped by name, nothing of them loads, nothing crashes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from spot_core.agent import opening
from spot_core.agent.drain import Drain
from spot_core.agent.lives import Life
from spot_core.errors import CommitConflictError, ConfigError, CorruptCheckpointError, SpotError
from spot_core.report import cli, prune
from spot_core.report.places import StoredRun
from spot_core.report.repair import repair
from spot_core.store import catalog, layout
from spot_core.store.identity import read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.signing import UNSIGNED, Signing
from spot_core.testing.checkpoints import RUN, commit_checkpoint
from tests.durability.fuzzed_loads import LOADS, originals
from tests.durability.mutations import damage_bytes, damage_record
from tests.durability.scale import times
from tests.opening import IDENTITY, open_run
from tests.trees import tree

OLD, NEW = CheckpointName(1, 10), CheckpointName(1, 20)
KEY = "the key of this run"
NOW = 1e9

FEW, MANY = times(30, 400), times(15, 200)
LOADED = times(90, 900)
# Commands that only look, on either tier.
LOOKS = [["ls"], ["ls", "--json"], ["status"], ["status", "--json"], ["verify"], ["verify", "--json"]]

pytestmark = [pytest.mark.timeout(3_600), pytest.mark.usefixtures("without_waiting")]
# A seed is a seed: a smaller one is no simpler.
FUZZ = {
    "deadline": None,
    "print_blob": True,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPOT_")]:
        monkeypatch.delenv(name)


@dataclass(frozen=True)
class Fuzzed:
    """A run with two checkpoints on both tiers, of which something is damaged. sound: every file as it was."""

    local: PosixTier
    remote: PosixTier
    sound: dict[str, bytes | None]

    def open(self) -> opening.Opened:
        return open_run(self.local, self.remote, started=NOW)

    def content(self, name: CheckpointName) -> dict[str, bytes | None]:
        """The files of a checkpoint as they are on the local tier."""
        return tree(self.local.path(layout.checkpoint(name)))

    def committed(self, name: CheckpointName) -> dict[str, bytes | None]:
        """The files of a checkpoint as they were committed."""
        prefix = f"bucket/{RUN}/{layout.checkpoint(name)}/"
        return {path.removeprefix(prefix): data for path, data in self.sound.items() if path.startswith(prefix)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run before anything is damaged, unsigned and signed."""
    folder = tmp_path_factory.mktemp("template")
    safetensors, torch_file = (originals(folder, folder / "marker")[load.__name__][0] for load in LOADS[:2])
    for kind, signing in (("unsigned", UNSIGNED), ("signed", Signing(RUN, (KEY,)))):
        local, remote = (PosixTier(folder / kind / part / RUN, signing) for part in ("nvme", "bucket"))
        open_run(local, remote)
        for name, pins in ((OLD, None), (NEW, OLD)):
            native = f"checkpoint-{name.step}"
            files = {f"{native}/model.safetensors": safetensors, f"{native}/optimizer.pt": torch_file, "s.json": b"{}"}
            commit_checkpoint(local, name, files=files, pins=pins)
        catalog.mark_complete(local, OLD, 10)
        _drain(local, remote, 1)
        life = Life(incarnation=1, host="gpu", boot_id="1", started=1.0, heartbeat=2.0, outcome="died")
        for tier in (local, remote):
            tier.replace(layout.life(1), life.to_json())
        shutil.copytree(local.root, folder / kind / "nvme" / f"{RUN}2")
        (folder / kind / "secret").write_bytes(b"not part of any run")
    return folder


def _drain(local: PosixTier, remote: PosixTier, number: int) -> None:
    drain = Drain(local, remote, incarnation=number, keep_local=3, keep_remote=3)
    while drain.step(lambda *_: None) is not None:
        pass


@pytest.fixture
def fuzz(template: Path, memory_path: Path) -> Callable[..., Fuzzed]:
    def copy(kind: str = "unsigned") -> Fuzzed:
        folder = Path(tempfile.mkdtemp(dir=memory_path))
        shutil.copytree(template / kind, folder, dirs_exist_ok=True)
        signing = Signing(RUN, (KEY,)) if kind == "signed" else UNSIGNED
        local, remote = (PosixTier(folder / part / RUN, signing) for part in ("nvme", "bucket"))
        return Fuzzed(local, remote, tree(folder))

    return copy


WHERE = st.sampled_from(["remote", "local", "both", "remote, new instance"])


def _damage(run: Fuzzed, path: str, where: str, change: Callable[[bytes], bytes]) -> None:
    """The same damage on the tiers named."""
    damaged = change(run.remote.path(path).read_bytes())
    if where.endswith("instance"):
        shutil.rmtree(run.local.root)
    for tier in (
        (run.remote,)
        if where.startswith("remote")
        else (run.local,)
        if where == "local"
        else (
            run.local,
            run.remote,
        )
    ):
        tier.path(path).write_bytes(damaged)


def _look(run: Fuzzed, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command that looks may find damage. It does not crash, and what it prints for machines can be parsed."""
    for tier in (run.remote, run.local):
        if not tier.root.exists():
            continue
        try:
            code = cli.main([arguments[0], tier.url, *arguments[1:]])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        assert code in {0, 1, 2}, captured.err
        assert captured.out or captured.err, f"{arguments[0]} ended with {code} and said nothing"
        assert "Traceback" not in captured.err
        if "--json" in arguments and captured.out:
            json.loads(captured.out, parse_constant=_no_number)


def _no_number(text: str) -> float:
    raise AssertionError(f"{text} is no JSON")


def _work_by_hand(run: Fuzzed) -> None:
    """Prune and repair do their work, or say why not."""
    with contextlib.suppress(SpotError):
        found = prune.plan(run.remote, keep=1, keep_every=None, now=NOW, on_progress=lambda *_: None)
        assert found.kept[0] == catalog.names(run.remote)[0]
    if run.local.root.exists():
        for target, source in ((run.remote, run.local), (run.local, run.remote)):
            with contextlib.suppress(SpotError):
                runs = [StoredRun(tier, read_run(tier) or {"run_id": ""}) for tier in (target, source)]
                repair(*runs, now=NOW, on_progress=lambda *_: None)


def _assert_others_untouched(run: Fuzzed) -> None:
    folder = run.remote.root.parents[1]
    inside = (f"bucket/{RUN}", f"nvme/{RUN}")
    others = {
        path: data for path, data in run.sound.items() if not any(path == i or path.startswith(f"{i}/") for i in inside)
    }
    now = tree(folder)
    assert {path: now.get(path) for path in others} == others, "something outside of the run's folders changed"
    strangers = [path for path in now.keys() - run.sound.keys() if not path.startswith(tuple(f"{i}/" for i in inside))]
    assert set(strangers) <= {f"nvme/{RUN}"}, "something appeared outside of the run's folders"


def _goes_on(run: Fuzzed, opened: opening.Opened) -> None:
    """The life that was opened commits and drains."""
    number = opened.incarnation or opening.claim(run.local, run.remote, IDENTITY, started=NOW, timeout_s=1.0)
    name = CheckpointName(number, 30)
    commit_checkpoint(run.local, name)
    with contextlib.suppress(CommitConflictError):  # of what is damaged there
        _drain(run.local, run.remote, number)
    assert name in catalog.names(run.remote)


# -- what decides whether a checkpoint is loaded ---------------------------------------------------------------


@settings(max_examples=FEW, **FUZZ)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 1 << 32), where=WHERE, kind=st.sampled_from(["unsigned", "signed"]), look=st.sampled_from(LOOKS)
)
def test_a_damaged_manifest_is_skipped_by_name_and_loads_nothing_that_was_not_committed(
    fuzz: Callable[..., Fuzzed],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    where: str,
    kind: str,
    look: list[str],
) -> None:
    source = random.Random(seed)
    run = fuzz(kind)
    _damage(run, layout.manifest(NEW), where, lambda data: damage_record(data, source))
    _look(run, look, capsys)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        opened = run.open()
    assert opened.restored is not None
    chosen = opened.restored.manifest.name
    event(f"{kind}, {where}: {chosen}")
    if chosen == OLD:
        assert any(str(NEW) in record.getMessage() for record in caplog.records), "nobody said what is damaged"
        assert not (where == "remote" and kind == "unsigned"), "the local copy was whole"
    else:
        # Only where the manifest still names the very files that were committed, or another tier has them.
        assert {path: data for path, data in run.content(NEW).items() if data is not None}.items() <= run.committed(
            NEW
        ).items()
        assert kind == "unsigned" or where in {"remote", "local"}, "what is not signed was loaded"
    _goes_on(run, opened)
    _work_by_hand(run)
    _look(run, look, capsys)
    _assert_others_untouched(run)
    shutil.rmtree(run.remote.root.parents[1])


@settings(max_examples=FEW, **FUZZ)  # type: ignore[arg-type]
@given(seed=st.integers(0, 1 << 32), where=WHERE, look=st.sampled_from(LOOKS))
def test_a_damaged_file_is_never_loaded(
    fuzz: Callable[..., Fuzzed],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    where: str,
    look: list[str],
) -> None:
    source = random.Random(seed)
    run = fuzz()
    file = source.choice(sorted(path for path, data in run.committed(NEW).items() if data is not None))
    _damage(run, f"{layout.checkpoint(NEW)}/{file}", where, lambda data: damage_bytes(data, source))
    _look(run, look, capsys)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        opened = run.open()
    assert opened.restored is not None
    name = opened.restored.manifest.name
    assert name == (NEW if where in {"remote", "local"} else OLD)
    assert run.content(name) == run.committed(name)
    if where != "remote":
        assert any(str(NEW) in record.getMessage() for record in caplog.records), "nobody said what is damaged"
    _goes_on(run, opened)
    _work_by_hand(run)
    _assert_others_untouched(run)
    shutil.rmtree(run.remote.root.parents[1])


@settings(max_examples=MANY, **FUZZ)  # type: ignore[arg-type]
@given(seed=st.integers(0, 1 << 32), is_new_instance=st.booleans(), look=st.sampled_from(LOOKS))
def test_where_every_checkpoint_is_damaged_there_is_no_fresh_start(
    fuzz: Callable[..., Fuzzed],
    capsys: pytest.CaptureFixture[str],
    seed: int,
    is_new_instance: bool,
    look: list[str],
) -> None:
    source = random.Random(seed)
    run = fuzz("signed")  # unsigned, a manifest that says other things of the same files is a manifest
    where = "remote, new instance" if is_new_instance else "both"
    for name in (OLD, NEW):
        if source.random() < 0.5:
            _damage(run, layout.manifest(name), where, lambda data: damage_record(data, source))
        else:
            file = source.choice(sorted(path for path, data in run.committed(name).items() if data is not None))
            _damage(run, f"{layout.checkpoint(name)}/{file}", where, lambda data: damage_bytes(data, source))
        run.local.root.mkdir(exist_ok=True)
    before = tree(run.remote.root)
    _look(run, look, capsys)
    with pytest.raises(CorruptCheckpointError, match="Nothing was deleted") as caught:
        run.open()
    assert str(OLD) in str(caught.value) and str(NEW) in str(caught.value)
    assert tree(run.remote.root) == before
    _assert_others_untouched(run)
    shutil.rmtree(run.remote.root.parents[1])


# -- what a resume does not depend on --------------------------------------------------------------------------


@settings(max_examples=FEW, **FUZZ)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 1 << 32),
    where=WHERE,
    path=st.sampled_from([layout.completion(OLD), layout.incarnation(1), layout.life(1)]),
    look=st.sampled_from(LOOKS),
)
def test_other_damaged_records_stop_nothing(
    fuzz: Callable[..., Fuzzed],
    capsys: pytest.CaptureFixture[str],
    seed: int,
    where: str,
    path: str,
    look: list[str],
) -> None:
    source = random.Random(seed)
    run = fuzz()
    _damage(run, path, where, lambda data: damage_record(data, source))
    _look(run, look, capsys)
    opened = run.open()
    assert opened.restored is not None and opened.restored.manifest.name == NEW and opened.incarnation == 2
    assert run.content(NEW) == run.committed(NEW)
    _goes_on(run, opened)
    _work_by_hand(run)
    _look(run, look, capsys)
    _assert_others_untouched(run)
    shutil.rmtree(run.remote.root.parents[1])


@settings(max_examples=MANY, **FUZZ)  # type: ignore[arg-type]
@given(seed=st.integers(0, 1 << 32), where=WHERE, look=st.sampled_from(LOOKS))
def test_a_damaged_identity_is_refused_before_anything_is_written(
    fuzz: Callable[..., Fuzzed],
    capsys: pytest.CaptureFixture[str],
    seed: int,
    where: str,
    look: list[str],
) -> None:
    source = random.Random(seed)
    run = fuzz()
    _damage(run, layout.RUN, where, lambda data: damage_record(data, source))
    before = tree(run.remote.root.parents[1])
    _look(run, look, capsys)
    opened: opening.Opened | None = None
    with contextlib.suppress(ConfigError, CorruptCheckpointError):
        opened = run.open()
    if opened is None:
        assert tree(run.remote.root.parents[1]) == before, "it was refused, and something was written"
    else:
        # What was damaged says nothing about which run it is.
        assert opened.restored is not None and opened.restored.manifest.name == NEW
        assert run.content(NEW) == run.committed(NEW)
    _work_by_hand(run)
    _assert_others_untouched(run)
    shutil.rmtree(run.remote.root.parents[1])


# -- files whose digest is right -------------------------------------------------------------------------------


def test_files_that_lie_load_nothing_harmful_and_end_no_process(memory_path: Path) -> None:
    """What somebody wrote who could write the manifest, too: digests match, headers and pickles lie."""
    arguments = (random.randrange(1 << 32), LOADED, memory_path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.durability.fuzzed_loads", *map(str, arguments)],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=1_000,
        text=True,
    )
    ends = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"after {ends[-1:]}: {result.stderr}"
    assert len(ends) == LOADED
    counts = Counter((end["load"], end["error"]) for end in ends)
    # For other errors nobody would know what to do.
    told = {
        "load_all_tensors": "SafetensorError",
        "load_own": "CorruptCheckpointError",
        "load_foreign": "CorruptCheckpointError",
    }
    for load, error in counts:
        assert error in {"", told[load]}, f"{load}: {error}"
    assert counts["load_own", "CorruptCheckpointError"] > LOADED // 10
    assert counts["load_foreign", "CorruptCheckpointError"] > LOADED // 10
    assert counts["load_all_tensors", "SafetensorError"] > LOADED // 10

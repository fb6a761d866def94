"""Two runs in one bucket and one local folder, killed and pruned at once: neither touches what is the other's.

Their names begin alike (`run`, `run-2`), and a third run that has finished lies inside the folder of the first one.
"""

from __future__ import annotations

import dataclasses
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spot_core.store import catalog, layout
from spot_core.store.remote import FsspecTier
from tests.durability.job import JobSpec
from tests.durability.runs import Run, kill_life
from tests.durability.scale import times
from tests.faultproxy import FaultProxy, Request
from tests.lives.lives import Life, live, uninterrupted
from tests.servers import S3Server
from tests.trees import tree

EPOCHS = 12
KILLS = times(2, 12)
INNER = "inner"

Stored = dict[str, bytes | None]


@pytest.fixture
def runs(tmp_path: Path, s3_server: S3Server) -> tuple[Run, Run, Run]:
    """`run`, `run-2` and, finished, `run/inner`; each with a seed of its own."""
    bucket = s3_server.new_bucket()

    def new(name: str, zygote: int, epochs: int) -> Run:
        options = {
            "remote": f"s3://{bucket}/team/{name}",
            "local": str(tmp_path / "local"),
            "storage_options": s3_server.options,
        }
        folder = str(tmp_path / f"script-{zygote}")
        arguments = {"num_train_epochs": epochs}
        return Run(JobSpec(folder, options=options, zygote=zygote, seed=zygote, arguments=arguments), s3_server.options)

    return new("run", 1, EPOCHS), new("run-2", 2, EPOCHS), new(f"run/{INNER}", 1, 1)


def stored(run: Run) -> Stored:
    """Every file of a run on both tiers, and no other run's."""
    assert isinstance(run.remote, FsspecTier)
    fs, root = run.remote._fs, run.remote._root
    found: Stored = {f"remote/{path.removeprefix(root)}": fs.cat_file(path) for path in fs.find(root)}
    found = {path: content for path, content in found.items() if not path.startswith(f"remote//{INNER}/")}
    return found | {f"local/{path}": content for path, content in tree(run.local.root).items()}


@pytest.mark.timeout(1800)
def test_two_runs_in_one_place_leave_each_other_alone(
    runs: tuple[Run, Run, Run], s3_server: S3Server, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    one, two, inner = runs
    references = [
        uninterrupted(dataclasses.replace(run.spec, variables={}), tmp_path / f"reference-{run.spec.zygote}")
        for run in (one, two)
    ]
    assert live(inner.spec).exit_code == 0
    inner.settle()
    untouched = stored(inner)
    with FaultProxy(s3_server.port) as first, FaultProxy(s3_server.port) as second:
        pairs = [(one, first, random.Random(seed)), (two, second, random.Random(seed + 1))]
        for run, proxy, _ in pairs:
            run.spec.options["storage_options"] = proxy.options
        with ThreadPoolExecutor(2) as pool:
            landed = sum(pool.map(lambda pair: die_often(pair[0], pair[2]), pairs))
        print(f"{landed} kills of two runs at once landed")
        assert landed >= KILLS  # a run may finish before it was killed as often
        for run, neighbour, reference in ((two, one, references[1]), (one, two, references[0])):
            before = stored(neighbour)
            run.finish(reference)  # type: ignore[arg-type]
            assert stored(neighbour) == before
        assert_asks_for(first.seen, one)
        assert_asks_for(second.seen, two)
    assert stored(inner) == untouched


def die_often(run: Run, draw: random.Random) -> int:
    """Lives that are killed with their agents, every other time losing the run's local folder; kills that landed."""
    landed = 0
    for number in range(KILLS):
        life = Life(run.spec)
        time.sleep(draw.uniform(0.5, 3.0))
        landed += kill_life(run, life, "both", draw)
        run.settle()
        if number % 2:
            run.lose_instance()
    for agent in run.agents():
        agent.kill()
    run.settle()
    return landed


def assert_asks_for(requests: list[Request], run: Run) -> None:
    """Every object that was read or written, and every prefix that was listed, lies in the run's folder."""
    bucket, _, root = run.remote.url.removeprefix("s3://").partition("/")
    seen = 0
    for request in requests:
        path, _, query = request.path.partition("?")
        key = path.removeprefix(f"/{bucket}").lstrip("/")
        prefixes = [part.partition("=")[2] for part in query.split("&") if part.startswith("prefix=")]
        for name in prefixes or ([key] if key else []):
            assert name == root or name.startswith(f"{root}/"), f"{request.method} {request.path}"
            assert not name.startswith(f"{root}/{INNER}"), f"{request.method} {request.path}"
            seen += 1
    assert seen > len(requests) / 2


def test_commands_on_one_run_leave_its_neighbours_alone(runs: tuple[Run, Run, Run], tmp_path: Path) -> None:
    for each in runs:
        assert live(dataclasses.replace(each.spec, arguments={"num_train_epochs": 1})).exit_code == 0
        each.settle()
    run, *neighbours = runs
    before = [stored(neighbour) for neighbour in neighbours]
    url, newest = run.remote.url, catalog.names(run.remote)[0]
    assert len(catalog.names(run.remote)) > 1
    run.spot("prune", url, "--keep", "1")
    assert catalog.names(run.remote) == [newest]
    path = f"{layout.checkpoint(newest)}/{catalog.read_manifest(run.remote, newest).files[0].path}"
    content = run.remote.read(path)
    run.remote.replace(path, bytes(len(content)))
    run.spot("repair", url, "--from", run.local.root)
    assert run.remote.read(path) == content
    run.spot("restore", url, "--to", tmp_path / "restored")
    assert (tmp_path / "restored" / f"checkpoint-{newest.step}").is_dir()
    run.spot("agent", "--once", "--local", run.local.root, "--remote", url, "--keep-local", "1", "--keep-remote", "1")
    run.spot("verify", url)
    assert [stored(neighbour) for neighbour in neighbours] == before

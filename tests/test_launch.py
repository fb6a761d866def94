"""The launch recipes: the shell ones run, with stand-ins for a cluster; the others say what their README says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[1] / "examples/launch"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a recipe, with a `python` that exits with each of the codes in turn; returns its code and what it called."""
    calls, exits = tmp_path / "calls.txt", tmp_path / "exits.txt"
    bodies = {
        "python": f"""n=$(head -1 {exits}); sed -i 1d {exits}
echo "python $* signals=${{SPOT_SIGNALS:-}}" >> {calls}
exit $n""",
        "srun": 'exec "$@"',
        "scontrol": f'echo "scontrol $*" >> {calls}',
        "aws": f'echo "aws $*" >> {calls}',
        "sleep": "exit 0",
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(recipe: str, *codes: int) -> tuple[int, list[str]]:
        exits.write_text("".join(f"{code}\n" for code in codes))
        text = (RECIPES / recipe).read_text().replace("cd /opt/my-run", f"cd {tmp_path}")
        environ = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", "-c", text], env=environ, cwd=tmp_path, timeout=60, check=False)
        return done.returncode, calls.read_text().splitlines()

    return run


TRAIN = "python train.py signals=SIGTERM,SIGUSR1"


@pytest.mark.parametrize(("code", "after"), [(75, ["scontrol requeue 7"]), (0, []), (1, [])])
def test_the_batch_job_is_requeued_when_it_was_preempted_and_only_then(run: Any, code: int, after: list[str]) -> None:
    assert run("slurm.sbatch", code) == (code, [TRAIN, *after])


@pytest.mark.parametrize(("codes", "is_over"), [([75], False), ([0], True), ([1, 0], True), ([1, 1, 1], True)])
def test_the_group_ends_when_training_is_complete_or_fails_again_and_again(
    run: Any, codes: list[int], is_over: bool
) -> None:
    code, calls = run("aws-user-data.sh", *codes)
    assert code == codes[-1]
    trained = ["python train.py signals="] * len(codes)
    scaled = ["aws autoscaling set-desired-capacity --auto-scaling-group-name my-run --desired-capacity 0"]
    assert calls == trained + (scaled if is_over else [])


def test_the_kubernetes_job_ignores_preemptions_and_outlasts_the_grace_period() -> None:
    job = yaml.safe_load((RECIPES / "kubernetes-job.yaml").read_text())["spec"]
    pod = job["template"]["spec"]
    (train,) = pod["containers"]
    environ = {each["name"]: each["value"] for each in train["env"]}
    exits, disruptions = job["podFailurePolicy"]["rules"]
    assert exits == {
        "action": "Ignore",
        "onExitCodes": {"containerName": train["name"], "operator": "In", "values": [75]},
    }
    assert disruptions == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > float(environ["SPOT_GRACE_S"])
    assert train["command"][0] == "python", "no shell that keeps the signal"
    (drain,) = pod["initContainers"]
    run_name = environ["SPOT_REMOTE"].rpartition("/")[2]
    assert drain["command"][:4] == ["spot", "agent", "--local", f"{environ['SPOT_LOCAL']}/{run_name}"]
    assert drain["command"][4:] == ["--remote", environ["SPOT_REMOTE"]]
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_managed_job_takes_a_preemption_for_no_failure() -> None:
    job = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert job["run"].startswith("exec ")


def test_every_recipe_is_in_the_table() -> None:
    table = (RECIPES / "README.md").read_text()
    assert all(f"]({path.name})" in table for path in RECIPES.iterdir() if path.name != "README.md")

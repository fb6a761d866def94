"""What is published: the built wheel holds the three packages, typed, with the console script, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_works_on_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"spot_core", "hf_spot", "lightning_spot"}
    assert {"spot_core/py.typed", "hf_spot/py.typed", "lightning_spot/py.typed"} <= names
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "spot = spot_core.report.cli:main" in (tmp_path / "installed" / scripts).read_text()
    script = "import spot_core, sys; print(spot_core.__file__); from spot_core.report.cli import main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "installed") in done.stdout.splitlines()[0]
    assert "chaos" in done.stdout

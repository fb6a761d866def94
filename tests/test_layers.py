"""Each layer imports only what lies below it, and what must stay light imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> what it may import of this project, besides itself.
BELOW = {f"spot_core.{module}" for module in ("bounded", "config", "environment", "errors", "keys")}
ALLOWED: dict[str, set[str]] = {
    "spot_core.bounded": set(),
    "spot_core.errors": set(),
    "spot_core.keys": {"spot_core.errors"},
    "spot_core.environment": {"spot_core.errors"},
    "spot_core.config": {"spot_core.environment", "spot_core.errors", "spot_core.keys"},
    "spot_core.store": BELOW,
    "spot_core.cadence": BELOW,
    "spot_core.notice": BELOW,
    "spot_core.snapshot": BELOW | {"spot_core.store"},
    "spot_core.data": BELOW | {"spot_core.snapshot"},
    "spot_core.progress": {"spot_core.store"},
    "spot_core.agent": BELOW | {f"spot_core.{part}" for part in ("store", "cadence", "notice", "progress")},
    "spot_core.report": BELOW
    | {f"spot_core.{part}" for part in ("store", "cadence", "notice", "agent", "chaos", "progress")}
    | {"spot_core"},
    "spot_core.pacing": BELOW | {f"spot_core.{part}" for part in ("cadence", "notice", "agent", "report")},
    "spot_core.chaos": BELOW | {"spot_core.store", "spot_core.agent"},
    "spot_core.testing": BELOW | {"spot_core.store", "spot_core.agent"},
    "spot_core.handover": BELOW | {"spot_core.store", "spot_core.snapshot"},
    "spot_core.emergency": BELOW | {"spot_core.cadence", "spot_core.notice"},
    "spot_core.checkpointing": BELOW
    | {f"spot_core.{part}" for part in ("handover", "store", "snapshot", "agent", "report")},
    "spot_core.session": BELOW
    | {f"spot_core.{part}" for part in ("handover", "store", "notice", "snapshot", "data", "agent", "report")}
    | {f"spot_core.{module}" for module in ("checkpointing", "emergency", "pacing", "ranks", "stand_in")},
    "spot_core.ranks": BELOW
    | {f"spot_core.{part}" for part in ("handover", "emergency", "notice", "snapshot", "store")},
    "spot_core.opening": BELOW
    | {f"spot_core.{part}" for part in ("session", "ranks", "store", "snapshot", "agent", "report")},
    "spot_core.stand_in": BELOW | {"spot_core.handover", "spot_core.notice"},
    "hf_spot": {"spot_core"},
    "lightning_spot": {"spot_core"},
}


def layer_of(module: str) -> str:
    return next((layer for layer in sorted(ALLOWED, key=len, reverse=True) if module.startswith(layer)), module)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "spot_core":
                found |= {f"spot_core.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in {"spot_core", "hf_spot", "lightning_spot"}}


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    place = ROOT / layer.replace(".", "/")
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for file in files:
        for name in imports_of(file):
            allowed = {layer, *ALLOWED[layer]}
            assert any(name == each or name.startswith(f"{each}.") for each in allowed), f"{file} imports {name}"


def test_every_package_has_a_layer() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "spot_core").rglob("*.py")}
    assert {m for m in modules if layer_of(m) == m} <= {
        "spot_core.__init__",
        "spot_core.bounded",
        "spot_core.checkpointing",
        "spot_core.config",
        "spot_core.emergency",
        "spot_core.environment",
        "spot_core.errors",
        "spot_core.handover",
        "spot_core.keys",
        "spot_core.opening",
        "spot_core.pacing",
        "spot_core.progress",
        "spot_core.session",
        "spot_core.stand_in",
    }


@pytest.mark.parametrize(
    "module", ["spot_core", "spot_core.agent.process", "spot_core.report.cli", "spot_core.chaos.command"]
)
def test_what_must_start_fast_imports_no_torch(module: str) -> None:
    script = f"import sys, {module}; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_modules_stay_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in ("spot_core", "hf_spot", "lightning_spot")
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 350
    }
    assert not long

"""What the commands of the benchmarks have in common: where they work, and the file that takes their figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

_SIZES = ("lora", "full")


def parser(about: str | None, *, folder: str) -> argparse.ArgumentParser:
    """Takes `--json` and `--folder`. about: the module's docstring. folder: what happens in that folder."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--folder", type=Path, help=f"{folder} here; default: a temporary folder")
    return made


def sizes_of(chosen: str) -> Sequence[str]:
    """The sizes that `--size` names."""
    return _SIZES if chosen == "all" else (chosen,)


def forget_variables() -> None:
    """Those of this project would move the checkpoints."""
    for name in [name for name in os.environ if name.startswith("SPOT_")]:
        del os.environ[name]


def write_figures(path: Path | None, results: Sequence[Any], **about: object) -> None:
    """Results, which are dataclasses, and what they were measured with; nothing without a path."""
    if path is not None:
        about |= {"python": platform.python_version(), "cpus": os.cpu_count(), "results": list(map(asdict, results))}
        path.write_text(json.dumps(about, indent=1) + "\n")

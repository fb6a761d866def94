"""Loads damaged safetensors and torch files whose digest nobody checks, and says how each attempt ended.

Run as a process of its own, so that a crash is seen: `python -m tests.durability.fuzzed_loads SEED COUNT FOLDER` prints
a JSON line for each file.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spot_core.snapshot.loading import load_inert, load_plain
from tests.durability.mutations import damage_bytes, damage_json

_MOST_BYTES = 16 << 30  # of address space: what a lie about sizes may not reserve


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def load_all_tensors(path: Path) -> None:
    """As the adapters and stock tools read safetensors."""
    with safe_open(path, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            stored.get_tensor(key).sum()


def load_own(path: Path) -> None:
    """As the adapters read their own state."""
    load_plain(path)


def load_foreign(path: Path) -> None:
    """As Lightning's checkpoints are read."""
    load_inert(path, inert_keys={"hyper"})


LOADS: tuple[Callable[[Path], None], ...] = (load_all_tensors, load_own, load_foreign)


def originals(folder: Path, marker: Path) -> dict[str, list[bytes]]:
    """Whole files for each way to load, some of which would run something if they were unpickled."""
    tree = {"weights": torch.arange(96.0).view(8, 12), "step": 20, "rng": [torch.ones(5, dtype=torch.uint8), "text"]}
    path = folder / "original"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int8)}, path, {"format": "pt"})
    safetensors = path.read_bytes()
    files = []
    for more in ({}, {"array": np.arange(4)}, {"hyper": Evil(marker)}, {"state": Evil(marker)}):
        torch.save({**tree, **more}, path)
        files.append(path.read_bytes())
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    legacy = [path.read_bytes(), pickle.dumps(tree), pickle.dumps(Evil(marker))]
    return {
        load_all_tensors.__name__: [safetensors],
        load_own.__name__: [*files, *legacy],
        load_foreign.__name__: [*files, *legacy],
    }


def damage_header(data: bytes, source: random.Random) -> bytes:
    """A safetensors file whose header says something else, with a length that fits it."""
    size = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + size], source)
    return source.choice([len(header), len(header), size, 1 << 40]).to_bytes(8, "little") + header + data[8 + size :]


def main(seed: int, count: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    marker = folder / "marker"
    whole = originals(folder, marker)
    for number in range(count):
        source = random.Random(f"{seed} {number}")
        load = LOADS[number % len(LOADS)]
        data = source.choice(whole[load.__name__])
        is_header = load is load_all_tensors and source.random() < 0.5
        path = folder / "damaged"
        path.write_bytes(damage_header(data, source) if is_header else damage_bytes(data, source))
        print(json.dumps({"load": load.__name__, "number": number, **_outcome(load, path)}), flush=True)
        assert not marker.exists(), f"{load.__name__} ran what file {number} of seed {seed} names"


def _outcome(load: Callable[[Path], None], path: Path) -> dict[str, str]:
    try:
        load(path)
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)[:300]}
    return {"error": ""}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

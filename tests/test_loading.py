"""Files of `torch.save` are loaded without running what they name."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spot_core.errors import CorruptCheckpointError
from spot_core.snapshot.loading import load_inert, load_plain

MAPS = Path("/proc/self/maps")
by_both = pytest.mark.parametrize(
    "load", [load_plain, lambda path: load_inert(path, inert_keys=())], ids=["plain", "inert"]
)


@dataclasses.dataclass
class Settings:
    """A hyper-parameter of a type of the user's own."""

    corpus: Path


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_tensors_arrays_and_plain_values_come_back(tmp_path: Path) -> None:
    tree = {
        "weights": torch.arange(6.0).view(2, 3).bfloat16(),
        "array": np.arange(3),
        "scalar": np.float64(2.5),
        "sets": {1, 2},
        "ordered": collections.OrderedDict(a=1),
        "counts": collections.defaultdict(list, {1: [2]}),
    }
    torch.save(tree, tmp_path / "a.pt")
    loaded = load_inert(tmp_path / "a.pt", inert_keys=())
    assert torch.equal(loaded["weights"], tree["weights"])
    assert np.array_equal(loaded["array"], tree["array"])
    assert {key: loaded[key] for key in ("scalar", "sets", "ordered", "counts")} == {
        key: tree[key] for key in ("scalar", "sets", "ordered", "counts")
    }


def test_nothing_that_the_file_names_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    torch.save({"hyper": Evil(marker), "weights": torch.ones(2)}, tmp_path / "a.pt")
    loaded = load_inert(tmp_path / "a.pt", inert_keys={"hyper"})
    assert torch.equal(loaded["weights"], torch.ones(2))
    assert not marker.exists()


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what is mapped")
@by_both
def test_what_is_loaded_holds_nothing_of_the_file(load: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"moments": torch.ones(1 << 20)}, path)
    loaded = load(path)
    path.unlink()  # pruned: its space must come back while the optimizer still has its state
    assert str(path) not in MAPS.read_text()
    assert torch.equal(loaded["moments"], torch.ones(1 << 20))


def test_other_types_are_left_out_where_they_are_not_needed_and_refused_elsewhere(tmp_path: Path) -> None:
    torch.save({"hyper": {"settings": Settings(Path("a"))}, "w": torch.ones(1)}, tmp_path / "a.pt")
    assert "w" in load_inert(tmp_path / "a.pt", inert_keys={"hyper"})
    with pytest.raises(CorruptCheckpointError, match=r"a\.pt: hyper\.settings is of type .*Settings"):
        load_inert(tmp_path / "a.pt", inert_keys=())


def test_types_that_the_user_trusts_are_loaded(tmp_path: Path) -> None:
    torch.save({"callbacks": Settings("a")}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([Settings]):
        assert load_inert(tmp_path / "a.pt", inert_keys=())["callbacks"] == Settings("a")


def _archive(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _script(_: Path) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


# What somebody wrote who could write the manifest, too: each ends torch in another way.
LIES: dict[str, Callable[[Path], bytes]] = {
    "an archive that names a command": lambda marker: _archive({"x": Evil(marker)}),
    "a pickle that names a command": lambda marker: pickle.dumps(Evil(marker)),
    "nothing": lambda _: b"",
    "text": lambda _: b"no archive at all",
    "half an archive": lambda _: _archive({"x": torch.ones(1000)})[:700],
    "no dictionary": lambda _: _archive([torch.ones(1)]),
    "a program": _script,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("lie", LIES)
@by_both
def test_a_file_that_lies_is_refused_by_name_with_what_to_do(
    load: Callable[[Path], Any], lie: str, tmp_path: Path
) -> None:
    marker, path = tmp_path / "was here", tmp_path / "a.pt"
    path.write_bytes(LIES[lie](marker))
    with pytest.raises(CorruptCheckpointError, match=r"(?is)a\.pt.* nothing was loaded") as caught:
        load(path)
    assert not marker.exists()
    assert "delete that manifest" in str(caught.value) or "add_safe_globals" in str(caught.value)

"""What ranks hand each other, without a trainer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spot_core.emergency import Action
from spot_core.errors import AgentError, ConfigError, Preempted, TierDeniedError, TierError
from spot_core.ranks import team as teams
from spot_core.ranks.notes import notes
from spot_core.ranks.team import Failed, Opened, Team, furnish, named
from spot_core.snapshot.files import BytesFile, TorchFile, torch_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    furnish(tmp_path, 3)
    return tmp_path


@pytest.fixture
def ranks(folder: Path) -> list[Team]:
    return [Team(rank, 3, folder) for rank in range(3)]


@pytest.mark.parametrize("action", [Action.SAVE, Action.COPY, Action.LEAVE, Action.HOLD])
def test_what_is_announced_holds_at_one_boundary_alone(action: Action, ranks: list[Team]) -> None:
    ranks[0].board.announce(7, action)
    for rank in ranks:
        assert [rank.board.announced(boundary) for boundary in (6, 7, 8)] == [Action.NONE, action, Action.NONE]


def test_the_first_signal_to_any_rank_counts(ranks: list[Team]) -> None:
    assert ranks[0].board.first_signal() is None
    ranks[2].board.signalled(2, 20.5)
    ranks[1].board.signalled(1, 10.5)
    assert [rank.board.first_signal() for rank in ranks] == [10.5] * 3


def parts(mark: str) -> list[BytesFile | TorchFile]:
    return [
        BytesFile(path="checkpoint-4/rng_state.pth", content=lambda: mark.encode(), is_part=True),
        TorchFile(path="spot_state.pt", tree={"mark": mark}, is_part=True),
        BytesFile(path="checkpoint-4/trainer_state.json", content=lambda: b"one for all"),
    ]


def test_a_checkpoint_holds_the_parts_of_all_ranks(ranks: list[Team]) -> None:
    whole = ranks[0].complete(4, parts("a"))
    for rank, mark in ((2, "c"), (1, "b")):
        ranks[rank].hand_over(4, parts(mark))
    assert [file.path for file in whole] == [
        *(f"checkpoint-4/rng_state_{rank}.pth" for rank in range(3)),
        *(f"spot_state_{rank}.pt" for rank in range(3)),
        "checkpoint-4/trainer_state.json",
    ]
    read = {file.path: file.content() for file in whole if isinstance(file, BytesFile)}
    assert [read[f"checkpoint-4/rng_state_{rank}.pth"] for rank in range(3)] == [b"a", b"b", b"c"]
    assert read["spot_state_2.pt"] == torch_bytes({"mark": "c"})
    assert not any(path.name.endswith("trainer_state.json") for path in ranks[0].folder.rglob("*"))


def test_a_folder_that_somebody_removed_is_made_again(ranks: list[Team]) -> None:
    shutil.rmtree(ranks[0].folder)
    whole = ranks[0].complete(4, parts("a"))
    for rank in (1, 2):
        ranks[rank].hand_over(4, parts("b"))
    assert whole[1].content() == b"b"  # type: ignore[union-attr]
    ranks[0].board.announce(1, Action.SAVE)
    assert ranks[1].board.announced(1) is Action.SAVE


def test_what_a_killed_rank_0_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_FRESH_S", -1.0)
    left, held = (tmp_path / f"spot-ranks-{name}" for name in ("left", "held"))
    for folder in (left, held):
        folder.mkdir()
        (folder / "leader").touch()
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(held / "leader")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        teams._remove_left(tmp_path)
        assert not left.exists() and held.exists()
        holder.kill()
    teams._remove_left(tmp_path)
    assert not held.exists()


def test_parts_of_earlier_steps_are_removed(ranks: list[Team]) -> None:
    for step in (4, 5):
        ranks[1].hand_over(step, parts("b"))
    ranks[0].complete(5, parts("a"))
    assert not (ranks[0].folder / "4").exists() and (ranks[0].folder / "5").exists()


def test_a_part_that_does_not_come_fails_the_checkpoint(ranks: list[Team], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_PART_WITHIN_S", 0.1)
    missing = ranks[0].complete(4, parts("a"))[1]
    assert isinstance(missing, BytesFile)
    with pytest.raises(TierError, match="rank 1 did not hand over its part"):
        missing.content()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("other data"), ConfigError),
        (TierDeniedError(13, "no such bucket"), TierDeniedError),
        (RuntimeError("broken"), AgentError),
    ],
)
def test_every_rank_is_told_why_the_run_was_not_opened(
    error: Exception, kind: type[Exception], ranks: list[Team]
) -> None:
    ranks[0].tell(Failed.of(error))
    with pytest.raises(kind, match="rank 0 did not open the run"):
        ranks[1].told()


def test_every_rank_leaves_with_the_same_code(ranks: list[Team]) -> None:
    ranks[0].tell(Failed.of(Preempted(85)))
    with pytest.raises(Preempted) as left:
        ranks[1].told()
    assert left.value.code == 85


def test_the_folder_goes_when_all_have_heard(ranks: list[Team]) -> None:
    ranks[0].tell(Opened(None, is_claimed=True, max_steps=None))
    assert [rank.told().is_claimed for rank in ranks[1:]] == [True, True]
    ranks[0].close()
    assert not ranks[0].folder.exists()


def test_names_of_parts() -> None:
    assert named("checkpoint-4/rng_state.pth", 1, size=2) == "checkpoint-4/rng_state_1.pth"
    assert named("spot_state.pt", 0, size=1) == "spot_state.pt"


def test_a_model_that_is_not_shared_has_nothing_to_note() -> None:
    assert notes(torch.nn.Linear(1, 1), 3) == ()

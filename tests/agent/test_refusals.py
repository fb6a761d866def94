"""Places where training must not start: the error says why, and nothing was written."""

from __future__ import annotations

from typing import Any

import pytest

from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.testing.checkpoints import commit_checkpoint
from tests.agent.place import Place
from tests.agent.processes import Refused, TrainerProcess, wait_for_end
from tests.servers import S3Server, free_port, s3_options
from tests.trees import tree


def refusal(trainer: TrainerProcess, facts: dict[str, Any] | None = None, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        trainer.open(facts, **options)
    return caught.value


def test_another_run_in_the_same_place_is_refused_naming_each_difference_and_nothing_is_written(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.kill()
    wait_for_end(first)
    before = tree(place.folder)
    error = refusal(place.trainer(), {"batch": 8, "shapes": "abc", "seed": 1}, **place.options())
    assert error.kind == "ConfigError"
    assert "batch: 4 there, 8 now" in str(error) and "seed: not recorded there, 1 now" in str(error)
    assert "shapes" not in str(error)
    assert tree(place.folder) == before


def test_another_run_is_refused_on_a_new_instance_before_its_local_folder_exists(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.kill()
    wait_for_end(first)
    before = tree(place.folder)
    options = {**place.options(), "local": str(place.folder / "another-instance")}
    assert refusal(place.trainer(), {"batch": 8}, **options).kind == "ConfigError"
    assert tree(place.folder) == before


def test_a_local_folder_of_another_bucket_is_refused_and_nothing_is_written(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.kill()
    wait_for_end(first)
    before = tree(place.folder)
    error = refusal(place.trainer(), **place.options(remote=str(place.folder / "other-bucket" / "run")))
    assert error.kind == "ConfigError" and "another run of the same name" in str(error)
    assert tree(place.folder) == before


def test_checkpoints_without_a_run_are_refused(place: Place) -> None:
    commit_checkpoint(place.remote, CheckpointName(1, 10))
    before = tree(place.folder)
    error = refusal(place.trainer(), **place.options())
    assert error.kind == "ConfigError" and "run.json" in str(error)
    assert tree(place.folder) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format_version": 1}', b"\xff"])
def test_a_damaged_run_record_is_refused_and_left_as_it_is(place: Place, content: bytes) -> None:
    place.remote.create(layout.RUN, content)
    before = tree(place.folder)
    error = refusal(place.trainer(), **place.options())
    assert error.kind == "CorruptCheckpointError" and "run.json" in str(error)
    assert tree(place.folder) == before


def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.kill()
    wait_for_end(first)
    for tier in (place.local, place.remote):
        tier.delete([layout.checkpoint(CheckpointName(1, 10))])
    error = refusal(place.trainer(), **place.options())
    assert error.kind == "CorruptCheckpointError" and str(CheckpointName(1, 10)) in str(error)
    assert place.remote.list(layout.INCARNATIONS) == ["000001.json"]


def test_an_unknown_scheme_is_refused(place: Place) -> None:
    error = refusal(place.trainer(), **place.options(remote="nosuch://bucket/run"))
    assert error.kind == "ConfigError" and "nosuch" in str(error)
    assert tree(place.folder) == {}


def test_a_wildcard_in_the_remote_is_refused(place: Place) -> None:
    error = refusal(place.trainer(), **place.options(remote="s3://bucket/run*"))
    assert error.kind == "ConfigError" and "wildcard" in str(error)
    assert tree(place.folder) == {}


def test_an_unreachable_remote_is_an_error_that_says_so_and_no_fresh_start(place: Place) -> None:
    """Also where structlog is installed, which would print each retry to the agent's standard output."""
    import structlog  # noqa: F401

    port = free_port()
    options = place.options(remote="s3://bucket/run", storage_options=s3_options(port), start_timeout_s=2)
    error = refusal(place.trainer(), **options)
    assert error.kind == "TierError"
    assert (
        "could not be reached for 2 s" in str(error) and str(port) in str(error) and "nothing was deleted" in str(error)
    )
    assert tree(place.folder) == {}


def test_a_missing_bucket_is_denied_at_once(place: Place, s3_server: S3Server) -> None:
    options = place.options(remote="s3://no-such-bucket/run", storage_options=s3_server.options, start_timeout_s=600)
    error = refusal(place.trainer(), **options)
    assert error.kind == "TierDeniedError" and "bucket" in str(error)
    assert tree(place.folder) == {}

"""The contract of a tier. Subclass `TierContract` in a test module and give it the two fixtures; see `Tier`.

class TestMyTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path): return MyTier(tmp_path)

    @pytest.fixture
    def other(self, tier): return MyTier(tier.root)
"""

from __future__ import annotations

import filecmp
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spot_core.errors import CommitConflictError, TierError
from spot_core.store.manifest import FileRecord
from spot_core.store.tier import Tier, digest_file

RACERS = 8
SIZES = (0, 1, (8 << 20) + 3, 40 << 20)


class TierContract:
    """What a tier must do.

    has_atomic_create: False for a store that cannot refuse one of two racing creates; `why_not` says so.
    rounds: how many names are raced for.
    """

    has_atomic_create = True
    why_not = ""
    rounds = 20

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        """An empty run folder."""
        raise NotImplementedError

    @pytest.fixture
    def other(self, tier: Tier) -> Tier:
        """The same folder as another process sees it: nothing shared with `tier`, least of all a cache."""
        raise NotImplementedError

    # -- create --------------------------------------------------------------------------------------------

    def test_a_created_file_holds_what_was_written(self, tier: Tier, other: Tier) -> None:
        tier.create("manifests/one.json", b"content")
        assert tier.read("manifests/one.json") == b"content"
        assert other.read("manifests/one.json") == b"content"

    def test_the_same_content_may_be_created_again(self, tier: Tier, other: Tier) -> None:
        """The reply to the first write may have been lost."""
        tier.create("manifests/one.json", b"content")
        tier.create("manifests/one.json", b"content")
        other.create("manifests/one.json", b"content")
        assert tier.list("manifests") == ["one.json"]

    def test_other_content_conflicts_and_changes_nothing(self, tier: Tier, other: Tier) -> None:
        tier.create("manifests/one.json", b"content")
        for writer in (tier, other):
            with pytest.raises(CommitConflictError):
                writer.create("manifests/one.json", b"CONTENT")
        assert tier.read("manifests/one.json") == b"content"

    def test_an_empty_file_is_content_as_well(self, tier: Tier) -> None:
        tier.create("manifests/empty", b"")
        assert tier.read("manifests/empty") == b""
        with pytest.raises(CommitConflictError):
            tier.create("manifests/empty", b"content")

    def test_of_racing_creates_exactly_one_wins(self, tier: Tier, other: Tier) -> None:
        if not self.has_atomic_create:
            pytest.skip(self.why_not)
        for round_ in range(self.rounds):
            path = f"incarnations/{round_:06d}.json"
            outcomes = self._race(lambda racer: self._create(racer, tier, other, path))  # noqa: B023
            winners = [content for content, error in outcomes if error is None]
            losers = [error for _, error in outcomes if error is not None]
            assert len(winners) == 1, f"{len(winners)} racers created {path}"
            assert tier.read(path) == other.read(path) == winners[0]
            assert [type(error) for error in losers] == [CommitConflictError] * (RACERS - 1)
        assert len(other.list("incarnations")) == self.rounds

    def test_racing_creates_of_the_same_content_all_succeed(self, tier: Tier, other: Tier) -> None:
        for round_ in range(self.rounds):
            path = f"manifests/{round_:06d}.json"
            outcomes = self._race(lambda racer: self._create(racer, tier, other, path, b"same"))  # noqa: B023
            errors = [error for _, error in outcomes if error is not None]
            if not self.has_atomic_create and errors:
                # An overwritten file may be gone for a moment: that is told as what may be tried again.
                assert {type(error) for error in errors} == {TierError}
                tier.create(path, b"same")
                errors.clear()
            assert errors == []
            assert other.read(path) == b"same"

    @staticmethod
    def _create(
        racer: int, tier: Tier, other: Tier, path: str, content: bytes | None = None
    ) -> tuple[bytes, Exception | None]:
        data = content if content is not None else f"racer {racer}".encode() * (1 + racer)
        try:
            (tier if racer % 2 else other).create(path, data)
        except Exception as error:
            return data, error
        return data, None

    @staticmethod
    def _race(run: Callable[[int], tuple[bytes, Exception | None]]) -> list[tuple[bytes, Exception | None]]:
        start = threading.Barrier(RACERS)

        def racer(number: int) -> tuple[bytes, Exception | None]:
            start.wait()
            return run(number)

        with ThreadPoolExecutor(RACERS) as pool:
            return list(pool.map(racer, range(RACERS)))

    # -- list and read -------------------------------------------------------------------------------------

    def test_a_missing_folder_lists_empty(self, tier: Tier) -> None:
        assert tier.list("manifests") == []
        assert tier.list("checkpoints/000001-000000000001") == []

    def test_a_folder_lists_its_direct_entries_once(self, tier: Tier) -> None:
        for path in ("checkpoints/b/x", "checkpoints/b/y/z", "checkpoints/a", "checkpoints-old/c"):
            tier.create(path, b"content")
        assert tier.list("checkpoints") == ["a", "b"]

    def test_a_listing_can_begin_after_a_name_and_end_early(self, tier: Tier) -> None:
        for path in ("manifests/a.json", "manifests/b.complete.json", "manifests/b.json", "manifests/c/d"):
            tier.create(path, b"content")
        whole = ["a.json", "b.complete.json", "b.json", "c"]
        for nth, name in enumerate(whole, 1):
            assert tier.list("manifests", after=name) == whole[nth:]
            assert tier.list("manifests", most=nth) == whole[:nth]
        assert tier.list("manifests", after="b", most=2) == ["b.complete.json", "b.json"]
        assert tier.list("manifests", after="d") == tier.list("nowhere", after="a", most=1) == []

    def test_another_writers_entries_are_seen_at_once(self, tier: Tier, other: Tier) -> None:
        for step in range(3):
            assert len(tier.list("manifests")) == step
            other.create(f"manifests/{step}.json", b"content")
            assert tier.list("manifests") == [f"{number}.json" for number in range(step + 1)]
        other.delete(["manifests/1.json"])
        assert tier.list("manifests") == ["0.json", "2.json"]

    def test_another_writers_new_content_is_read_whole(self, tier: Tier, other: Tier, tmp_path: Path) -> None:
        """A listing that is remembered knows the old size."""
        for content in (b"short", b"much longer than before", b"!"):
            other.replace("lives/000001.json", content)
            assert tier.read("lives/000001.json") == content
            assert tier.record("lives/000001.json").bytes == len(content)
            tier.download("lives/000001.json", tmp_path / "target", lambda _: None)
            assert (tmp_path / "target").read_bytes() == content
            assert tier.list("lives") == ["000001.json"]

    def test_reading_what_is_missing_raises_file_not_found(self, tier: Tier, tmp_path: Path) -> None:
        tier.create("manifests/one.json", b"content")
        target = tmp_path / "target"
        for path in ("manifests/two.json", "nowhere/two.json"):
            with pytest.raises(FileNotFoundError):
                tier.read(path)
            with pytest.raises(FileNotFoundError):
                tier.record(path)
            with pytest.raises(FileNotFoundError):
                tier.download(path, target, lambda _: None)

    # -- large files ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_a_file_comes_back_as_it_went(self, tier: Tier, other: Tier, tmp_path: Path, size: int) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(os.urandom(size))
        uploaded: list[int] = []
        downloaded: list[int] = []
        attested = tier.upload(source, "checkpoints/one/model.bin", uploaded.append)
        found, wanted = other.record("checkpoints/one/model.bin"), digest_file(source)
        assert (found.bytes, found.digest) == (wanted.bytes, wanted.digest)
        assert attested is None or attested == found
        other.download("checkpoints/one/model.bin", target, downloaded.append, size=size)
        assert filecmp.cmp(source, target, shallow=False)
        assert sum(uploaded) == sum(downloaded) == size

    def test_a_download_replaces_what_an_earlier_one_left(self, tier: Tier, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"left by an earlier, longer attempt")
        tier.create("checkpoints/one/model.bin", b"content")
        tier.download("checkpoints/one/model.bin", target, lambda _: None)
        assert target.read_bytes() == b"content"

    def test_a_torn_upload_is_repaired_by_the_next(self, tier: Tier, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"torn and longer")
        tier.upload(source, "checkpoints/one/model.bin", lambda _: None)
        source.write_bytes(b"whole")
        tier.upload(source, "checkpoints/one/model.bin", lambda _: None)
        assert tier.record("checkpoints/one/model.bin").bytes == 5
        assert tier.read("checkpoints/one/model.bin") == b"whole"

    def test_files_of_one_checkpoint_may_be_uploaded_in_parallel(self, tier: Tier, tmp_path: Path) -> None:
        sources = []
        for number in range(12):
            sources.append(tmp_path / f"source-{number}")
            sources[-1].write_bytes(bytes([number]) * (1 + number * 1000))

        def upload(source: Path) -> FileRecord:
            path = f"checkpoints/one/deep/{source.name}"
            tier.upload(source, path, lambda _: None)
            return tier.record(path)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(upload, sources))
        assert [record.digest for record in found] == [digest_file(source).digest for source in sources]
        assert len(tier.list("checkpoints/one/deep")) == 12

    # -- replace and delete --------------------------------------------------------------------------------

    def test_replace_writes_a_new_file_and_over_an_old_one(self, tier: Tier, other: Tier) -> None:
        for content in (b"first", b"second and longer", b"3"):
            tier.replace("lives/000001.json", content)
            assert other.read("lives/000001.json") == content
        assert other.list("lives") == ["000001.json"]

    def test_delete_takes_a_file_and_leaves_its_neighbours(self, tier: Tier, other: Tier) -> None:
        for name in ("one.json", "one.json.bak", "one", "two.json"):
            tier.create(f"manifests/{name}", b"content")
        tier.delete(["manifests/one.json"])
        assert other.list("manifests") == ["one", "one.json.bak", "two.json"]
        with pytest.raises(FileNotFoundError):
            other.read("manifests/one.json")

    def test_delete_takes_a_folder_with_all_it_holds_and_leaves_its_neighbours(self, tier: Tier, other: Tier) -> None:
        for path in ("a/x", "a/deep/er/y", "a/[1]*?", "ab/x", "b/x"):
            tier.create(f"checkpoints/{path}", b"content")
        tier.delete(["checkpoints/a"])
        assert other.list("checkpoints") == ["ab", "b"]
        assert other.list("checkpoints/a") == []
        assert other.list("checkpoints/a/deep/er") == []

    def test_deleting_what_is_missing_is_no_error(self, tier: Tier) -> None:
        tier.create("manifests/one.json", b"content")
        tier.delete(["manifests/two.json", "nowhere", "manifests/one.json", "manifests/one.json"])
        assert tier.list("manifests") == []

    def test_a_deleted_name_can_be_created_again(self, tier: Tier) -> None:
        tier.create("manifests/one.json", b"content")
        tier.delete(["manifests/one.json"])
        tier.create("manifests/one.json", b"other content")
        assert tier.read("manifests/one.json") == b"other content"

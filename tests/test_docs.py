"""The README says what is true: its links exist, its tree is the tree, its options are the options."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from spot_core.config import SpotConfig
from spot_core.store import manifest, signing, tier

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_printed_tree_is_the_tree() -> None:
    tree = README[README.index("spot_core/        knows no trainer") :].split("```")[0]
    for line in tree.splitlines()[1:]:
        names = re.findall(r"^(  )?((?:[\w.]+/|[\w]+\.py)(?:  [\w.]+(?:/|\.py))*)", line)
        for indent, found in names:
            for name in found.split():
                assert (ROOT / ("spot_core" if indent else ".") / name).exists(), name


def test_every_option_is_documented() -> None:
    for field in dataclasses.fields(SpotConfig):
        if field.name != "resume":
            assert f"`{field.name}`" in README, field.name


def test_the_limits_in_the_security_notes_are_those_of_the_code() -> None:
    text = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert f"{signing.JSON_BYTES >> 20} MiB of JSON (other records: {tier.RECORD_BYTES >> 20} MiB" in text
    assert f"{manifest.MOST_FILES:,} files, {manifest.LARGEST_FILE_BYTES >> 40} TiB a file" in text
    assert f"{manifest.LARGEST_TOTAL_BYTES >> 50} PiB a checkpoint, {manifest.LONGEST_PATH_BYTES} bytes a path" in text
    assert f"{manifest.LONGEST_NAME_BYTES} a name" in text


def test_the_policy_in_the_security_notes_is_json() -> None:
    (policy,) = re.findall(r"```json\n(.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    assert len(json.loads(policy)["Statement"]) == 3


def test_python_blocks_parse_and_commands_exist() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
    for language, body in blocks:
        if language == "python":
            ast.parse(body)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_what_the_durability_table_names_is_tried() -> None:
    table = (ROOT / "docs" / "durability.md").read_text()
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    tried = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 30 and named <= tried, named - tried
    for file in re.findall(r"`(tests/[\w/]+\.py)`", table):
        assert (ROOT / file).exists(), file

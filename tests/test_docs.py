"""The README says what is true: its links exist, its tree is the tree, its options are the options."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from spot_core.config import SpotConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


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


def test_python_blocks_parse_and_commands_exist() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
    for language, body in blocks:
        if language == "python":
            ast.parse(body)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile

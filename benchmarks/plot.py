"""Draws what `stall.py` and `storage.py` wrote with `--json`: this project's way beside each other one.

    python benchmarks/plot.py stall.json lightning.json storage.json --plot performance.png

One panel a comparison, one bar a way: the median over the median of this project's way, on a logarithmic scale; a line
from the shortest to the longest. Bars to the right of 1 took longer than this project did.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


@dataclass(frozen=True, slots=True)
class Bar:
    """One way. seconds: shortest, median, longest."""

    way: str
    seconds: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One comparison, quickest first. ours: this project's way, of which all bars are ratios."""

    title: str
    ours: str
    bars: list[Bar]


def panels(found: dict[str, Any]) -> Iterator[Panel]:
    """The comparisons in one file of figures."""
    for result in found["results"]:
        if "ours" not in result:
            continue  # memory, selection
        if "what" in result:
            rows = [(row["way"], row["shortest_s"], row["seconds"], row["longest_s"]) for row in result["rows"]]
            what = result["what"]
        else:
            rows = [(row["saver"], row["shortest_s"], row["stall_s"], row["longest_s"]) for row in result["rows"]]
            what = f"stall, {result['trainer']}"
        bars = [Bar(way, (shortest, median, longest)) for way, shortest, median, longest in rows if median is not None]
        yield Panel(f"{what}: {result['size']}, {result['bytes'] / 1e6:,.0f} MB", result["ours"], bars)


def draw(shown: Sequence[Panel], path: Path) -> None:
    """All panels below each other, as high as their bars need."""
    heights = [len(panel.bars) + 1.5 for panel in shown]
    figure, all_axes = pyplot.subplots(
        len(shown), 1, figsize=(10, 0.3 * sum(heights)), sharex=True, squeeze=False, height_ratios=heights
    )
    for panel, axes in zip(shown, all_axes[:, 0], strict=True):
        ours_s = next(bar.seconds[1] for bar in panel.bars if bar.way == panel.ours)
        for place, bar in enumerate(reversed(panel.bars)):
            low, middle, high = (seconds / ours_s for seconds in bar.seconds)
            axes.barh(place, middle, color="tab:blue" if bar.way == panel.ours else "lightgrey")
            axes.plot([low, high], [place, place], color="dimgrey", linewidth=1)
            axes.annotate(f" {float(f'{middle:.2g}'):,g}", (max(high, middle), place), va="center", fontsize="small")
        axes.axvline(1, color="tab:blue", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.12)
        axes.set_yticks(range(len(panel.bars)), [bar.way for bar in reversed(panel.bars)], fontsize="small")
        axes.set_title(f"{panel.title}; ours {ours_s * 1e3:,.1f} ms", fontsize="medium", loc="left")
    all_axes[-1, 0].set_xlabel("time / ours")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+", help="files that stall.py and storage.py wrote")
    parser.add_argument("--plot", type=Path, required=True, help="the picture that is written")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    shown = [panel for path in options.figures for panel in panels(json.loads(path.read_text()))]
    if not shown:
        raise SystemExit("none of these files holds a comparison of stall.py or storage.py. Nothing was written.")
    draw(shown, options.plot)


if __name__ == "__main__":
    main()

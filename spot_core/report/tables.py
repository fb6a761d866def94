"""The tables that `spot ls` and `spot verify` print, and what all tables are made of. Nothing is read here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from spot_core.agent import lives
from spot_core.report import verify
from spot_core.report.prune import PrunePlan
from spot_core.report.repair import Repair
from spot_core.report.runs import LOST, CheckpointView, RunView
from spot_core.report.units import ago, count, duration, size
from spot_core.report.verify import VerifiedRun
from spot_core.store.layout import CheckpointName

_PIPE_WIDTH = 200

_COLORS = {
    lives.RUNNING: "green",
    lives.COMPLETED: "bold green",
    lives.PREEMPTED: "yellow",
    lives.STOPPED: "yellow",
    lives.FENCED: "yellow",
    LOST: "red",
    lives.DIED: "red",
    lives.FAILED: "red",
    verify.OK: "green",
    verify.DAMAGED: "bold red",
    verify.UNREADABLE: "red",
    verify.NEWER: "yellow",
}


def show(report: RenderableType) -> None:
    """Print to standard output; wide when that is not a terminal, so that a pipe gets whole rows."""
    is_narrow = os.isatty(1) or bool(os.environ.get("COLUMNS"))
    console = Console(highlight=False, width=None if is_narrow else _PIPE_WIDTH)
    console.print(report, crop=False)  # what is too long for the terminal is for the terminal to wrap


def runs_table(views: Iterable[RunView]) -> RenderableType:
    """The runs under a root."""
    table = new_table()
    table.add_column("Run", overflow="fold", style="bold")
    table.add_column("Framework", no_wrap=True)
    add_numbers(table, "Step", "Kept", "Size", "Heartbeat")
    table.add_column("State", no_wrap=True)
    problems = []
    for view in views:
        if view.error:
            problems.append(line("red", f"{view.run}: {view.error}"))
        table.add_row(
            view.run,
            view.framework or "?",
            _number(view.newest_step),
            str(view.checkpoints),
            size(view.size_bytes) if view.checkpoints else "-",
            ago(view.heartbeat_age_s) if view.heartbeat_age_s is not None else "-",
            word(verify.UNREADABLE if view.error and view.framework is None else view.outcome or "no life yet"),
        )
    return Group(table, *_below(problems))


def checkpoints_table(views: Sequence[CheckpointView]) -> RenderableType:
    """The checkpoints of a run."""
    if not views:
        return line("yellow", "no checkpoint yet")
    table = new_table()
    table.add_column("Checkpoint", no_wrap=True, style="bold")
    add_numbers(table, "Step", "Epoch", "Size", "Files", "Age")
    table.add_column("Remarks", overflow="fold")
    pinned = {view.pins for view in views}
    for view in views:
        table.add_row(
            view.name,
            _number(view.step),
            "-" if view.epoch is None else f"{view.epoch:.2f}",
            "-" if view.size_bytes is None else size(view.size_bytes),
            _number(view.files),
            "-" if view.age_s is None else duration(round(view.age_s)),
            _remarks(view, is_pinned=view.name in pinned),
        )
    notes = dict.fromkeys(note for view in views for note in view.notes)
    lines = [line("yellow", f"not bit-exact: {note}") for note in notes]
    lines += [line("red", view.error) for view in views if view.error]
    return Group(table, *_below(lines))


def _remarks(view: CheckpointView, *, is_pinned: bool) -> Text:
    remarks = []
    if view.error:
        remarks.append(Text("newer format" if view.is_newer_format else "damaged manifest", style="red"))
    if view.is_complete:
        remarks.append(Text("training ended", style="green"))
    pin = CheckpointName.parse(view.pins or "")
    if pin is not None:
        remarks.append(Text(f"pins step {pin.step:,}"))
    if is_pinned:
        remarks.append(Text("pinned"))
    if view.notes:
        remarks.append(Text("not bit-exact", style="yellow"))
    return Text(", ").join(remarks)


def verify_report(views: Sequence[VerifiedRun]) -> RenderableType:
    """What `spot verify` found, damage last and in full."""
    parts: list[RenderableType] = []
    for view in views:
        parts.append(line("bold", f"{view.run}  {view.url}"))
        if view.checkpoints:
            table = new_table()
            table.add_column("Checkpoint", no_wrap=True)
            add_numbers(table, "Step", "Files", "Size")
            table.add_column("Result", no_wrap=True)
            for each in view.checkpoints:
                row = (_number(each.step), _number(each.files or None), size(each.size_bytes))
                table.add_row(each.name, *row, word(each.result))
            parts.append(table)
        for folder in view.orphans:
            parts.append(line("dim", f"note: {folder} has no manifest: a crash's leftover or an upload in flight"))
        for entry in view.strangers:
            parts.append(line("dim", f"note: {entry} is not a manifest's name and is ignored"))
        if view.error:
            parts.append(line("red", f"{verify.UNREADABLE}: {view.error}"))
        parts.append("")
    found = [checkpoint for view in views for checkpoint in view.checkpoints]
    bad = [checkpoint for checkpoint in found if checkpoint.result != verify.OK]
    for checkpoint in bad:
        parts.extend(line("red", f"{checkpoint.result}: {problem}") for problem in checkpoint.problems)
    if bad:
        parts.append(line("bold red", f"{len(bad)} of {count(len(found), 'checkpoint')} failed"))
        for view in views:
            if any(checkpoint.result == verify.DAMAGED for checkpoint in view.checkpoints):
                parts.append(line("", f"to mend it from the run's other copy: spot repair {view.url} --from URL"))
    elif found and all(view.is_sound for view in views):
        parts.append(line("green", f"{count(len(found), 'checkpoint')} verified, every file is as committed"))
    elif all(view.is_sound for view in views):
        parts.append(line("yellow", "no checkpoint yet"))
    return Group(*parts)


def prune_report(plan: PrunePlan, *, is_done: bool) -> RenderableType:
    """What `spot prune` deleted, or would delete."""
    names = ", ".join(map(str, plan.unreadable))
    why = "kept and not counted, since the manifest is damaged or not signed with this run's key, see spot verify: "
    besides = [line("yellow", why + names)] if plan.unreadable else []
    if not plan.doomed:
        return Group(line("green", f"nothing to delete: all of {count(len(plan.kept), 'checkpoint')} stay"), *besides)
    table = new_table()
    table.add_column("Deleted" if is_done else "Would be deleted", no_wrap=True)
    add_numbers(table, "Step", "Size")
    for each in plan.doomed:
        table.add_row(str(each.name), _number(each.name.step), size(each.size_bytes))
    freed, stay = size(plan.size_bytes), ", ".join(map(str, plan.kept))
    what = f"{count(len(plan.doomed), 'checkpoint')} deleted, {freed} freed"
    if not is_done:
        what = f"{count(len(plan.doomed), 'checkpoint')} would be deleted, {freed} freed; nothing was deleted"
    return Group(table, "", line("green" if is_done else "yellow", what), line("", f"kept: {stay}"), *besides)


def repair_report(repair: Repair, source: str) -> RenderableType:
    """What `spot repair` mended, and what it could not."""
    parts: list[RenderableType] = []
    mended = [each for each in repair.damaged if each.error is None]
    for each in mended:
        parts.append(line("green", f"repaired {each.name} from {source}: {', '.join(each.files)}"))
        if each.aside is not None:
            parts.append(line("dim", f"  the damaged bytes were set aside in {each.aside}"))
    for each in repair.damaged:
        if each.error is not None:
            parts.append(line("red", f"not repaired: checkpoint {each.name}: {each.error}"))
    left = len(repair.damaged) - len(mended)
    parts.append(
        line(
            "bold red" if left else "green",
            f"{count(len(mended), 'checkpoint')} repaired, {left} not, {repair.sound} had no damage",
        )
    )
    return Group(*parts)


def new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, collapse_padding=True)


def add_numbers(table: Table, *headers: str) -> None:
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def word(word: str) -> Text:
    return Text(word, style=_COLORS.get(word, ""))


def line(style: str, text: str) -> Text:
    """A line that is never broken: paths in it are there to be copied."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _below(lines: Sequence[Text]) -> Sequence[RenderableType]:
    """Lines under a table, set off from it."""
    return ["", *lines] if lines else []

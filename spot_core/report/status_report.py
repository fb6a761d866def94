"""What `spot status` prints. Nothing is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spot_core.report.runs import LifeView
from spot_core.report.status import AgentView, LocalView, StatusView
from spot_core.report.tables import add_numbers, line, new_table, word
from spot_core.report.units import ago, count, duration, moment, share, size

_LIVES_SHOWN = 15


def status_report(view: StatusView) -> RenderableType:
    """Everything `spot status` knows."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("run", Text(view.run, style="bold"))
    facts.add_row("URL", view.url)
    facts.add_row("framework", view.framework)
    if view.created_unix_s is not None:
        facts.add_row("created", moment(view.created_unix_s))
    for name, value in view.facts.items():
        facts.add_row(name, str(value))
    parts: list[RenderableType] = [facts, "", _lives_table(view.lives)]
    if view.remote_error is not None:
        parts.insert(
            0, line("bold red", f"the remote cannot be read, all below is what this host knows: {view.remote_error}")
        )
    hidden = len(view.lives) - _LIVES_SHOWN
    if hidden > 0:
        parts.append(line("dim", f"the newest {_LIVES_SHOWN}; {count(hidden, 'life')} before them: see --json"))
    if view.claims_without_record:
        numbers = ", ".join(map(str, view.claims_without_record))
        parts.append(line("yellow", f"claimed, but left no record: life {numbers}"))
    summary = Table.grid(padding=(0, 2))
    summary.add_column(style="dim", no_wrap=True)
    summary.add_column(overflow="fold")
    summary.add_row("durable", _durable(view))
    if view.local is not None:
        _add_local(summary, view.local)
    if view.useful_s is not None:
        summary.add_row("useful time", duration(view.useful_s))
    if view.goodput is not None:
        summary.add_row(
            "goodput", f"{share(view.goodput)} of {duration(view.lives_duration_s)} in {_ended(view.lives)}"
        )
    return Group(*parts, "", summary, *(line("red", problem) for problem in view.damaged_manifests))


def _lives_table(views: Sequence[LifeView]) -> RenderableType:
    if not views:
        return line("yellow", "no life has reported yet")
    table = new_table()
    add_numbers(table, "Life")
    table.add_column("Host", overflow="fold")
    table.add_column("Started", no_wrap=True)
    add_numbers(table, "Lasted")
    table.add_column("Outcome", no_wrap=True)
    add_numbers(table, "Steps", "Gained")
    for view in views[-_LIVES_SHOWN:]:
        table.add_row(
            str(view.incarnation),
            view.host.partition(".")[0],
            moment(view.started_unix_s),
            duration(view.duration_s),
            word(view.outcome),
            f"{view.resumed_step:,} → {view.step:,}",
            f"+{view.steps:,}",
        )
    return table


def _durable(view: StatusView) -> Text:
    newest = view.newest_durable
    if newest is None:
        return Text("no checkpoint yet" if view.remote_error is None else "none that is known here", style="yellow")
    age = f", {ago(newest.age_s)}" if newest.age_s is not None else ""
    text = Text(f"step {newest.step:,}{age}, checkpoint {newest.name}")
    if view.is_complete:
        text.append("; training ended here", style="green")
    return text


def _add_local(grid: Table, view: LocalView) -> None:
    if view.undrained:
        waiting = f"{count(len(view.undrained), 'checkpoint')}, {size(view.undrained_bytes)}: "
        grid.add_row("not drained", Text(waiting + ", ".join(view.undrained), style="yellow"))
    else:
        grid.add_row("not drained", Text("nothing: all that is committed here is durable", style="green"))
    if view.remote_only is not None:
        why = f"not used: {view.remote_only}\ncheckpoints go to the remote through memory, without it"
        grid.add_row("local disk", Text(why, style="yellow"))
    if view.in_memory:
        grid.add_row("in memory", Text(", ".join(view.in_memory) + ": lost with this machine", style="yellow"))
    if view.gap_steps is not None:
        gap = f", {duration(view.gap_s)} of training" if view.gap_s is not None else ""
        grid.add_row("at risk", f"{count(view.gap_steps, 'step')}{gap} since the durable one")
    if view.agent is not None:
        grid.add_row("agent", _agent(view.agent))


def _agent(view: AgentView) -> Text:
    text = Text(f"running as process {view.pid}" if view.is_alive else "not running")
    if view.draining:
        was = "draining" if view.is_alive else "was draining"
        text.append(f", {was} {view.draining}: {size(view.done_bytes)} of {size(view.total_bytes)}")
    if view.failures:
        text.append(f", {count(view.failures, 'failure')}", style="yellow")
    if view.last_failure:
        text.append(f"\nlast failure: {view.last_failure}", style="red")
    if view.fence:
        text.append(f"\n{view.fence}", style="red")
    return text


def _ended(views: Sequence[LifeView]) -> str:
    """`4 lives: 2 lost, 1 preempted, 1 running`."""
    outcomes = Counter(view.outcome for view in views)
    return f"{count(len(views), 'life')}: " + ", ".join(f"{number} {word}" for word, number in outcomes.items())

"""What a rehearsal found: its lives, what they executed and what was lost, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from spot_core.agent.journal import Progress


@dataclass(frozen=True, slots=True)
class ChaosLife:
    """One life: seconds it lasted, how it ended, and its progress if it claimed a life of the run.

    notice_s: how long before the deadline it was announced; None without a notice. left_s: how long before the deadline
    the command left by itself; None if it did not, or the notice was withdrawn.
    """

    lived_s: float
    ending: str
    exit_code: int
    progress: Progress | None
    notice_s: float | None = None
    left_s: float | None = None
    is_withdrawn: bool = False

    @property
    def executed_steps(self) -> int:
        return self.progress.step - self.progress.resumed_step if self.progress else 0


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """All lives of a rehearsal, oldest first; the last one finished unless `failed_code` is set."""

    lives: tuple[ChaosLife, ...]
    failed_code: int | None = None

    def lost_steps(self, index: int) -> int:
        """Steps that life `index` executed and a later one had to repeat."""
        progress = self.lives[index].progress
        later = next((life.progress for life in self.lives[index + 1 :] if life.progress), None)
        return max(0, progress.step - later.resumed_step) if progress and later else 0

    @property
    def wall_s(self) -> float:
        return sum(life.lived_s for life in self.lives)

    @property
    def executed_steps(self) -> int:
        return sum(life.executed_steps for life in self.lives)

    @property
    def total_lost_steps(self) -> int:
        return sum(self.lost_steps(index) for index in range(len(self.lives)))

    @property
    def goodput(self) -> float:
        """Training time that counted over the time all lives took."""
        last = next((life.progress for life in reversed(self.lives) if life.progress), None)
        return last.useful_s / self.wall_s if last and self.wall_s else 0.0


def as_table(report: ChaosReport) -> Table:
    has_notices = any(life.notice_s is not None for life in report.lives)
    table = Table(title="lives", title_justify="left")
    notices = ("notice s", "left s before") if has_notices else ()
    for column in ("life", "lived s", *notices, "resumed at", "reached", "executed", "lost", "exit"):
        table.add_column(column, justify="right")
    table.add_column("ending")
    for index, life in enumerate(report.lives):
        progress = life.progress
        steps = (progress.resumed_step, progress.step, life.executed_steps) if progress else ("-", "-", "-")
        table.add_row(
            str(index + 1),
            f"{life.lived_s:.1f}",
            *((_seconds(life.notice_s), _seconds(life.left_s)) if has_notices else ()),
            *map(str, steps),
            str(report.lost_steps(index)) if progress else "-",
            str(life.exit_code),
            life.ending,
        )
    return table


def summary(report: ChaosReport) -> str:
    return (
        f"{len(report.lives)} lives, {report.executed_steps} steps executed, {report.total_lost_steps} lost; "
        f"goodput {report.goodput:.0%} of {report.wall_s:.0f} s (start-up of each life included)"
    )


def as_dict(report: ChaosReport) -> dict[str, object]:
    return {
        "lives": [
            {
                "lived_s": round(life.lived_s, 3),
                "ending": life.ending,
                "exit_code": life.exit_code,
                "notice_s": None if life.notice_s is None else round(life.notice_s, 3),
                "left_s": None if life.left_s is None else round(life.left_s, 3),
                "is_withdrawn": life.is_withdrawn,
                "resumed_step": life.progress.resumed_step if life.progress else None,
                "step": life.progress.step if life.progress else None,
                "lost_steps": report.lost_steps(index),
            }
            for index, life in enumerate(report.lives)
        ],
        "executed_steps": report.executed_steps,
        "lost_steps": report.total_lost_steps,
        "wall_s": round(report.wall_s, 3),
        "goodput": round(report.goodput, 4),
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

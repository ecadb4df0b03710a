"""What the verbs show on the terminal: plans, live progress, reports."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlops_ray.metadata.records import RunRecord, StepRecord

_STYLE = {
    "pending": ("·", "dim"),
    "running": ("▶", "bold cyan"),
    "succeeded": ("✓", "green"),
    "cached": ("≡", "blue"),
    "skipped": ("–", "dim"),
    "failed": ("✗", "bold red"),
    "cancelled": ("✗", "yellow"),
    "uncertain": ("?", "bold yellow"),
}


def steps_table(run: RunRecord, steps: list[StepRecord]) -> Group:
    """Return a run's steps as a table: state, rows, time, message."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "step", "state", "rows", "time", ""):
        table.add_column(column, justify="right" if column in ("rows", "time") else "left")
    for step in steps:
        mark, style = _STYLE[step.status]
        rows = f"{step.rows:,}" if step.rows is not None else ""
        message = Text(step.message or "", "dim")
        state = Text(step.status, style)
        table.add_row(Text(mark, style), step.name, state, rows, _duration(step), message)
    elapsed = _seconds(run.started_at, run.ended_at)
    title = f"{run.project} · {run.workflow} · run {run.run_id} · {run.status} · {elapsed}"
    return Group(Text(title, "bold"), table)


class RunDisplay:
    """Live progress of a run: a table on a terminal, a line for each change elsewhere."""

    def __init__(self, project: str, workflow: str) -> None:
        self._title = f"{project} · {workflow}"
        self._console = Console()
        self._live: Live | None = None
        self._seen: dict[str, str] = {}
        self._said: dict[str, tuple[datetime, str]] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show a line before there are any steps."""
        if self._live is not None:
            self._live.update(Text(f"{self._title} · {text} …", "dim"))
        else:
            print(f"{self._title}: {text}", flush=True)

    def update(self, run: RunRecord, steps: list[StepRecord]) -> None:
        """Show the present state of a run."""
        if self._live is not None:
            self._live.update(steps_table(run, steps))
            return
        for step in steps:
            self._print_change(step)

    def _print_change(self, step: StepRecord) -> None:
        now = datetime.now(UTC)
        changed = self._seen.get(step.name) != step.status
        self._seen[step.name] = step.status
        message = step.message or ""
        if changed and step.status != "pending":
            rows = f" {step.rows:,} rows" if step.rows is not None else ""
            print(
                f"{step.name}: {step.status} {_duration(step)}{rows} {message}".rstrip(), flush=True
            )
            self._said[step.name] = (now, message)
            return
        last, text = self._said.get(step.name, (now, ""))
        if step.status == "running" and message != text and (now - last).total_seconds() >= 10:
            self._said[step.name] = (now, message)
            print(f"{step.name}: {message}", flush=True)


def print_report(path: Path) -> None:
    """Print the summary of a ``report.json``."""
    from mlops_ray.loop.report import summary_table

    Console().print(summary_table(json.loads(path.read_text(encoding="utf-8"))))


def _duration(step: StepRecord) -> str:
    return _seconds(step.started_at, step.ended_at) if step.started_at else ""


def _seconds(start: datetime, end: datetime | None) -> str:
    seconds = ((end or datetime.now(UTC)) - start).total_seconds()
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"

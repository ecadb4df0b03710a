"""The report of a replay: two files, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_ray.loop.page import render

if TYPE_CHECKING:
    from rich.table import Table

HTML = "report.html"
JSON = "report.json"


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``report.html`` and ``report.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    (folder / HTML).write_text(render(document), encoding="utf-8")


def summary_table(report: Mapping[str, Any]) -> Table:
    """Return the figures of a ``report.json`` as a table for the terminal, months first."""
    from rich.table import Table

    summary = report["summary"]
    table = Table(title=f"{report.get('project', '')}: the loop against the first model left alone")
    table.add_column("month")
    for head in ("labelled rows", "AUC loop", "AUC first", "log loss loop", "log loss first"):
        table.add_column(head, justify="right")
    for month in report["months"]:
        table.add_row(
            month["period"],
            f"{month['rows']:,}",
            *(_number(month[name]) for name in _COLUMNS),
        )
    table.add_section()
    table.add_row(
        "mean", "", *(_number(summary[f"{name}_mean"]) for name in _COLUMNS), style="bold"
    )
    table.caption = _caption(summary)
    return table


_COLUMNS = ("auc_loop", "auc_static", "log_loss_loop", "log_loss_static")


def _caption(summary: Mapping[str, Any]) -> str:
    requests = summary["requests"] + summary["background_requests"]
    return (
        f"{summary['retrainings']} retrainings, {summary['promotions']} promoted · "
        f"{requests:,} requests, {summary['failed_requests']} failed · "
        f"p50 {_number(summary['p50_ms'], 2)} ms, p99 {_number(summary['p99_ms'], 2)} ms · "
        f"{summary['wall_s']:.0f} s"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"

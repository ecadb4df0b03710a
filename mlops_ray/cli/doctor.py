"""The verb ``doctor``: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

from pathlib import Path

import click

from mlops_ray.cluster.doctor import examine
from mlops_ray.config.locate import default_home
from mlops_ray.metadata.provenance import LOCK_FILE

_MARK = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@click.command(short_help="Find what is wrong with this machine; say how to fix it.")
@click.option("--dashboard-port", default=8265, show_default=True)
@click.option("--serve-port", default=8000, show_default=True)
def doctor(dashboard_port: int, serve_port: int) -> int:
    """Look at versions, token, ports, memory, disk and ingress; say how to fix what is wrong."""
    findings = examine(
        default_home(),
        dashboard_port=dashboard_port,
        serve_port=serve_port,
        lock=Path.cwd() / LOCK_FILE,
    )
    for finding in findings:
        mark, colour = _MARK[finding.level]
        click.secho(mark, fg=colour, nl=False)
        click.echo(f" {finding.topic}: {finding.message}")
        if finding.fix:
            click.echo(f"    fix: {finding.fix}")
    return 1 if any(finding.level == "problem" for finding in findings) else 0

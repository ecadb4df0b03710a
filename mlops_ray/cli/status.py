"""The verb ``status``: what ran, what is running, what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from rich.table import Table

    from mlops_ray.metadata.records import RunRecord


@click.command(short_help="List the latest runs, or show one with its steps.")
@click.argument("run_id", required=False)
@click.option("--project", help="Only runs of this project.")
@click.option("--limit", default=10, show_default=True, help="How many runs to list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run_id: str | None, project: str | None, limit: int, as_json: bool) -> None:
    """List the latest runs, or show one run with its steps and events."""
    from rich.console import Console

    from mlops_ray.cli.display import steps_table
    from mlops_ray.metadata.access import open_ledger

    home = Home(default_home())
    if home.storage.ledger is None and not (home.root / "ledger.db").is_file():
        raise _nothing(home)
    ledger = open_ledger(home)
    if run_id is None:
        runs = ledger.runs(project=project, limit=limit)
        if not runs and project is None:
            raise _nothing(home)
        if as_json:
            click.echo("[" + ",\n".join(run.model_dump_json() for run in runs) + "]")
            return
        Console().print(_runs_table(runs))
        return
    run = ledger.run(run_id)
    if run is None:
        raise MlopsRayError(f"there is no run {run_id!r}", fix="list them: mlops-ray status")
    if as_json:
        steps = ",".join(step.model_dump_json() for step in ledger.steps(run_id))
        click.echo(f'{{"run": {run.model_dump_json()}, "steps": [{steps}]}}')
        return
    Console().print(steps_table(run, ledger.steps(run_id)))
    for event in ledger.events(run_id=run_id):
        if not event.kind.startswith("step_"):
            click.echo(f"{event.at:%Y-%m-%d %H:%M:%S} {event.kind} {event.step or ''} {event.data}")


def _nothing(home: Home) -> MlopsRayError:
    return MlopsRayError(
        "nothing has run here yet",
        where=str(home.root),
        fix="run a workflow first, go to the project's folder, or set MLOPS_RAY_HOME",
    )


def _runs_table(runs: list[RunRecord]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "project", "workflow", "status", "started", "took"):
        table.add_column(column)
    for run in runs:
        took = f"{(run.ended_at - run.started_at).total_seconds():.0f} s" if run.ended_at else ""
        started = f"{run.started_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(run.run_id, run.project, run.workflow, run.status, started, took)
    return table

"""Verbs that run a workflow: run, submit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.config.locate import Workspace, open_workspace
from mlops_ray.errors import ClusterError, StepError

if TYPE_CHECKING:
    from mlops_ray.config.project import Project
    from mlops_ray.metadata.records import RunRecord

_WAKE_UP_S = 0.5
_REPORTS = ("report.html", "report.json")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command(short_help="Run a workflow; an interrupted one goes on.")
@_overrides
@click.option("-m", "--multirun", is_flag=True, help="Run every combination of values a=1,2.")
@click.option(
    "--save-to",
    type=click.Path(file_okay=False, path_type=Path),
    help="Copy the run's report.html and report.json into this folder.",
)
@click.option("--fresh", is_flag=True, help="Begin a new run, also where one could go on.")
@click.option(
    "--defer-mirror", is_flag=True, help="Leave writing this run to MLflow to the next run."
)
def run(
    overrides: tuple[str, ...],
    multirun: bool,
    save_to: Path | None,
    fresh: bool,
    defer_mirror: bool,
) -> None:
    """Run a workflow; an interrupted one goes on from its finished steps.

    KEY=VALUE are Hydra overrides. Ray is joined at cluster.address or $RAY_ADDRESS, or else
    started on this machine.
    """
    from mlops_ray.config.compose import sweep

    combinations = sweep(list(overrides)) if multirun else [list(overrides)]
    loaded = [_load(combination) for combination in combinations]
    for number, (combination, (workspace, project)) in enumerate(
        zip(combinations, loaded, strict=True), 1
    ):
        if multirun:
            click.secho(f"[{number}/{len(loaded)}] {' '.join(combination)}", bold=True)
        try:
            record = _run(workspace, project, combination, fresh)
        except StepError:
            _mirror(project)
            raise
        if not defer_mirror:
            _mirror(project)
        _show_report(project, record, save_to)
    if not multirun:
        _stay(loaded[0][1])


@click.command(short_help="Run a workflow as a Ray job; follow its output.")
@_overrides
@click.option("--address", help="The cluster's dashboard, for example http://127.0.0.1:8265.")
@click.option("--no-wait", is_flag=True, help="Return once the job is accepted.")
def submit(overrides: tuple[str, ...], address: str | None, no_wait: bool) -> None:
    """Run a workflow as a Ray job, with this folder packaged; follow its output."""
    from mlops_ray.cluster.submission import submit as submit_job

    workspace, _ = _load(list(overrides))
    echo = None if no_wait else _echo
    job, status = submit_job(
        list(overrides), address=address, directory=workspace.directory, echo=echo
    )
    click.echo(f"job {job}: {status.lower()}")
    if status in ("FAILED", "STOPPED"):
        raise ClusterError(
            f"job {job} ended as {status.lower()}",
            fix=f"see its log with `ray job logs {job}`",
        )


def run_declared(overrides: list[str], step: str) -> Any:
    """Run a workflow that a verb has put together; return the output of one of its steps.

    Raises:
        ConfigError: The configuration has problems.
        StepError: A step failed.
    """
    from mlops_ray.cli.display import RunDisplay
    from mlops_ray.cluster.running import run_workflow

    workspace, project = _load(overrides)
    with RunDisplay(project.name, project.workflow.name) as display:
        executor, record = run_workflow(
            workspace, project, overrides, listener=display.update, say=display.say
        )
    _mirror(project)
    return executor.output(record.run_id, step)


def _echo(text: str) -> None:
    click.echo(text, nl=False)


def _load(overrides: list[str]) -> tuple[Workspace, Project]:
    from mlops_ray.orchestration.load import load_project

    workspace = open_workspace(Path.cwd())
    return workspace, load_project(workspace, overrides)


def _run(workspace: Workspace, project: Project, overrides: list[str], fresh: bool) -> RunRecord:
    from mlops_ray.cli.display import RunDisplay
    from mlops_ray.cluster.running import run_workflow

    with RunDisplay(project.name, project.workflow.name) as display:
        _, record = run_workflow(
            workspace, project, overrides, fresh=fresh, listener=display.update, say=display.say
        )
    return record


def _stay(project: Project) -> None:
    """Keep what a workflow brought up, where it lives on a Ray that would end with this command."""
    from mlops_ray.cluster.connect import resolve_address
    from mlops_ray.orchestration.graph import build

    graph = build(project.workflow)
    needed = {other for others in graph.after.values() for other in others}
    leaves = [name for name in graph.order if name not in needed]
    kept = [name for name in leaves if graph.step(name).mode == "ensure"]
    if not kept or resolve_address(project.cluster) != "local":
        return
    click.echo(
        f"{', '.join(kept)}: up until Ctrl-C, since Ray was started by this command. "
        "To leave it running, `ray start --head` first."
    )
    while True:
        # Ctrl-C may reach one of Ray's threads first; Python sees it when this one wakes up.
        time.sleep(_WAKE_UP_S)


def _mirror(project: Project) -> None:
    """MLflow is a view of the ledger: when it cannot be written, the run is still good."""
    from mlops_ray.metadata.home import Home
    from mlops_ray.metadata.mirror import mirror
    from mlops_ray.metadata.redaction import redacted

    try:
        mirror(Home(project.home))
    except Exception as error:
        text = redacted(str(error)).partition("\n")[0] or type(error).__name__
        click.secho(f"warning: the run is not in MLflow: {text}", fg="yellow", err=True)


def _show_report(project: Project, record: RunRecord, save_to: Path | None) -> None:
    from mlops_ray.metadata.home import Home

    folder = Home(project.home).run(record.run_id)
    reports = [folder / name for name in _REPORTS if (folder / name).is_file()]
    if save_to is not None:
        save_to.mkdir(parents=True, exist_ok=True)
        reports = [Path(shutil.copy(report, save_to)) for report in reports]
    for report in reports:
        if report.suffix == ".json":
            from mlops_ray.cli.display import print_report

            print_report(report)
    for report in reports:
        click.echo(f"{report.name}: {report}")

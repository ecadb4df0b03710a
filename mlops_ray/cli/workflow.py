"""Verbs that look at a workflow or run it: check, plan, run, submit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import Workspace, open_workspace
from mlops_ray.errors import ClusterError, StepError

if TYPE_CHECKING:
    from mlops_ray.config.project import Project
    from mlops_ray.metadata.ledger import RunRecord

_WAKE_UP_S = 0.5
_REPORTS = ("report.html", "report.json")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command(short_help="Check the configuration; report every problem at once.")
@_overrides
def check(overrides: tuple[str, ...]) -> None:
    """Check the configuration without starting Ray; report every problem at once.

    KEY=VALUE are Hydra overrides, for example: project=flights workflow=train model.dropout=0.2
    """
    from mlops_ray.orchestration.graph import build

    project = _load(list(overrides))[1]
    graph = build(project.workflow)
    click.secho("ok: ", fg="green", nl=False)
    click.echo(
        f"project {project.name}, workflow {project.workflow.name} with {len(graph.order)} steps, "
        f"{len(project.features.views)} feature views"
    )


@click.command(short_help="Show the steps that would run, and which are cached.")
@_overrides
def plan(overrides: tuple[str, ...]) -> None:
    """Show the steps that would run, in order, and which ones are cached."""
    from rich.console import Console

    from mlops_ray.cli.display import plan_table
    from mlops_ray.metadata.artifacts import ArtifactStore
    from mlops_ray.metadata.home import Home
    from mlops_ray.metadata.ledger import Ledger
    from mlops_ray.orchestration.graph import build
    from mlops_ray.orchestration.plan import make_plan

    project = _load(list(overrides))[1]
    home = Home(project.home)
    graph = build(project.workflow)
    made = make_plan(project, graph, Ledger(home.ledger_url), ArtifactStore(home.artifacts))
    Console().print(plan_table(project, graph, made))


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


def _echo(text: str) -> None:
    click.echo(text, nl=False)


def _load(overrides: list[str]) -> tuple[Workspace, Project]:
    from mlops_ray.config.check import load_project

    workspace = open_workspace(Path.cwd())
    return workspace, load_project(workspace, overrides)


def _run(workspace: Workspace, project: Project, overrides: list[str], fresh: bool) -> RunRecord:
    from mlops_ray.cli.display import RunDisplay
    from mlops_ray.cluster.command import run_command
    from mlops_ray.cluster.connect import connect, resolve_address
    from mlops_ray.orchestration.executor import Executor
    from mlops_ray.orchestration.graph import build

    build(project.workflow)
    with RunDisplay(project) as display:
        local = resolve_address(project.cluster) == "local"
        display.say("starting Ray" if local else "joining Ray")
        connect(project.cluster, roots=workspace.projects)
        executor = Executor(
            project,
            directory=workspace.directory,
            roots=tuple(str(root) for root in workspace.projects),
            command=run_command(workspace.directory, project.home, overrides),
            listener=display.update,
        )
        return executor.run(fresh=fresh)


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

    try:
        mirror(Home(project.home))
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
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

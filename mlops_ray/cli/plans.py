"""Verbs that look at a workflow before it runs: check, plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.config.locate import open_workspace

if TYPE_CHECKING:
    from rich.console import Group

    from mlops_ray.orchestration.graph import Graph
    from mlops_ray.orchestration.plan import Plan
    from mlops_ray.orchestration.spec import RunSpec

_STYLE = {
    "cached": ("≡", "blue"),
    "finished": ("✓", "green"),
    "run": ("▶", "cyan"),
    "skipped": ("–", "dim"),
    "depends": ("?", "yellow"),
    "uncertain": ("!", "bold red"),
}
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command(short_help="Check the configuration; report every problem at once.")
@_overrides
def check(overrides: tuple[str, ...]) -> None:
    """Check the configuration without starting Ray; report every problem at once.

    KEY=VALUE are Hydra overrides, for example: project=flights workflow=train model.dropout=0.2
    """
    from mlops_ray.orchestration.graph import build
    from mlops_ray.orchestration.load import load_with_warnings

    project, warnings = load_with_warnings(open_workspace(Path.cwd()), list(overrides))
    graph = build(project.workflow)
    for warning in warnings:
        click.secho("warning: ", fg="yellow", nl=False, err=True)
        click.echo(str(warning), err=True)
    click.secho("ok: ", fg="green", nl=False)
    click.echo(
        f"project {project.name}, workflow {project.workflow.name} with {len(graph.order)} steps, "
        f"{len(project.features.views)} feature views"
    )


@click.command(short_help="Show the steps that would run, and which are cached.")
@_overrides
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the steps that would run, in order, and which ones are cached.

    A step counts as cached only where its output is there with the right bytes.
    """
    import json

    from rich.console import Console

    spec, graph, made = planned(overrides)
    if as_json:
        click.echo(json.dumps(_document(spec, made)))
        return
    Console().print(plan_table(spec, graph, made))


def planned(overrides: tuple[str, ...]) -> tuple[RunSpec, Graph, Plan]:
    """Compose a project and find out what a run of it would do.

    Raises:
        ConfigError: The configuration has problems.
    """
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.artifacts import open_artifacts
    from mlops_ray.orchestration.graph import build
    from mlops_ray.orchestration.load import load_project
    from mlops_ray.orchestration.plan import make_plan
    from mlops_ray.orchestration.spec import RunSpec

    spec = RunSpec.of(load_project(open_workspace(Path.cwd()), list(overrides)))
    graph = build(spec.workflow)
    return spec, graph, make_plan(spec, graph, open_ledger(spec.home), open_artifacts(spec.home))


def plan_table(spec: RunSpec, graph: Graph, plan: Plan) -> Group:
    """Return the plan as a table: step, what it needs, what would happen and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "step", "needs", "would", "because", "key"):
        table.add_column(column, overflow="fold")
    for item in plan.steps:
        mark, style = _STYLE[item.state]
        needs = ", ".join(sorted(graph.after[item.name]))
        key = item.key.key[:10] if item.key is not None else ""
        state = Text(item.state, style)
        table.add_row(Text(mark, style), item.name, needs, state, item.reason, key)
    title = f"{spec.project} · {spec.workflow.name}"
    if plan.resumes is not None:
        title += f" · would go on with run {plan.resumes.run_id} ({plan.resumes.status})"
    return Group(Text(title, "bold"), table)


def _document(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    return {
        "project": spec.project,
        "workflow": spec.workflow.name,
        "resumes": plan.resumes.run_id if plan.resumes is not None else None,
        "steps": [
            {
                "name": item.name,
                "state": item.state,
                "reason": item.reason,
                "key": item.key.key if item.key is not None else None,
                "calls": item.calls,
            }
            for item in plan.steps
        ],
    }

"""The verbs ``triggers …``: what starts workflows by itself."""

from __future__ import annotations

import getpass
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.config.locate import Workspace, open_workspace
from mlops_ray.errors import ClusterError, MlopsRayError

if TYPE_CHECKING:
    from rich.table import Table

    from mlops_ray.config.project import Project
    from mlops_ray.config.triggers import Trigger
    from mlops_ray.metadata.ledger import Ledger
    from mlops_ray.metadata.records import Firing

_WAKE_UP_S = 0.5
_PATIENCE_S = 30.0
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_name = click.argument("name")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(short_help="Schedules and triggers: start them, look at them, fire one.")
def triggers() -> None:
    """Schedules and triggers: what starts workflows by itself.

    They are declared in the project's section `triggers`. KEY=VALUE are Hydra overrides.
    """


@triggers.command(short_help="Watch from now on, and run what is due.")
@_overrides
def start(overrides: tuple[str, ...]) -> None:
    """Watch from now on, and run what is due as Ray jobs.

    On a cluster (cluster.address, $RAY_ADDRESS) the watching goes on without this command, which
    returns. Else Ray is started on this machine, and both end with Ctrl-C. Started again, the
    triggers go on where they stopped; they follow the declarations of the last start.
    """
    from mlops_ray.cluster.connect import connect, resolve_address
    from mlops_ray.cluster.trigger_actor import ensure, spec_of, stop
    from mlops_ray.metadata.home import Home

    workspace, project = _load(overrides)
    if not project.triggers:
        raise MlopsRayError(
            f"project {project.name!r} declares no triggers", fix="add a section `triggers`"
        )
    _check_runs(workspace, project, overrides)
    local = resolve_address(project.cluster) == "local"
    click.echo("starting Ray" if local else "joining Ray")
    connect(project.cluster, roots=workspace.projects)
    handle = ensure(Home(project.home), spec_of(workspace, project, overrides))
    try:
        _show_started(project, _first_look(handle))
        if local:
            click.echo("watching until Ctrl-C, since Ray was started by this command")
            while True:
                # Ctrl-C may reach one of Ray's threads first; Python sees it when this one wakes up.
                time.sleep(_WAKE_UP_S)
    finally:
        if local:
            stop(project.name)


@triggers.command(name="stop", short_help="Watch no more; jobs that run go on.")
@_overrides
def stop_verb(overrides: tuple[str, ...]) -> None:
    """Watch no more; jobs that run go on. What is due is kept for the next start."""
    from mlops_ray.cluster.connect import connect, resolve_address
    from mlops_ray.cluster.trigger_actor import stop

    workspace, project = _load(overrides)
    if resolve_address(project.cluster) == "local":
        raise ClusterError(
            "no cluster is named",
            why="triggers on a Ray of their own end with the command that started them",
            fix="give cluster.address=auto or host:port, or press Ctrl-C where they were started",
        )
    connect(project.cluster, roots=workspace.projects)
    stop(project.name)
    click.echo(f"the triggers of {project.name} are stopped")


@triggers.command(name="list", short_help="Show each trigger: what it waits for, next, last.")
@_overrides
@_as_json
def list_verb(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show each trigger: what it waits for, when it fires next, how it went last."""
    _, project = _load(overrides)
    ledger = _ledger(project)
    rows = [_row(ledger, project, name, trigger) for name, trigger in project.triggers.items()]
    watched = _watched(ledger, project)
    if as_json:
        click.echo(json.dumps({"watched": watched, "triggers": rows}, indent=1))
        return
    from rich.console import Console

    columns = ("trigger", "workflow", "fires on", "next", "last", "status")
    short = [row | {name: _minute(row[name]) for name in ("next", "last")} for row in rows]
    Console().print(_table(columns, short))
    if not watched["watched"]:
        click.secho("nobody watches: `mlops-ray triggers start`", fg="yellow")
    elif watched["url"]:
        click.echo(f"webhooks: {watched['url']}")
    for row in rows:
        if row["trouble"]:
            click.secho(f"{row['trigger']}: {row['trouble']}", fg="yellow")


@triggers.command(short_help="Fire a trigger now.")
@_name
@_overrides
def fire(name: str, overrides: tuple[str, ...]) -> None:
    """Fire a trigger now, by hand: also one that is paused, and before any interval is over."""
    from mlops_ray.orchestration.triggers import by_hand, event_of

    _, project = _load(overrides)
    _known(project, name)
    ledger = _ledger(project)
    firing = by_hand(project.name, name, _person())
    ledger.fire(firing, event=event_of(firing, firing.status))
    click.echo(f"due: {firing.key}")
    if not _watched(ledger, project)["watched"]:
        click.secho("it runs when somebody watches: `mlops-ray triggers start`", fg="yellow")


@triggers.command(short_help="Let a trigger's occasions pass.")
@_name
@_overrides
def pause(name: str, overrides: tuple[str, ...]) -> None:
    """Let a trigger's occasions pass: they are recorded as skipped. Jobs that run go on."""
    from mlops_ray.cluster.cursors import PAUSED

    _say(name, overrides, PAUSED, "paused")


@triggers.command(short_help="End a pause.")
@_name
@_overrides
def resume(name: str, overrides: tuple[str, ...]) -> None:
    """End a pause. What passed meanwhile is not made up for."""
    from mlops_ray.cluster.cursors import RESUMED

    _say(name, overrides, RESUMED, "resumed")


@triggers.command(short_help="Show what fired, and what became of it.")
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--limit", default=20, show_default=True, help="How many firings to show.")
@_as_json
def history(name: str | None, overrides: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Show what fired, newest first, of all triggers or of one: its job, its run, why."""
    if name is not None and "=" in name:
        overrides, name = (name, *overrides), None
    _, project = _load(overrides)
    if name is not None:
        _known(project, name)
    ledger = _ledger(project)
    firings = ledger.firings(project=project.name, trigger=name, limit=limit)
    runs = {
        event.data["firing"]: event.run_id
        for event in ledger.events(project=project.name, kind="triggered")
    }
    if as_json:
        shown = [f.model_dump(mode="json") | {"run": runs.get(f.key)} for f in firings]
        click.echo(json.dumps(shown, indent=1))
        return
    from rich.console import Console

    rows = [
        {
            "at": f"{firing.at.astimezone():%Y-%m-%d %H:%M:%S}",
            "trigger": firing.trigger,
            "status": firing.status,
            "attempt": firing.attempt or "",
            "run": runs.get(firing.key) or firing.job or "",
            "why": _why(firing),
        }
        for firing in firings
    ]
    columns = ("at", "trigger", "status", "attempt", "run", "why")
    Console().print(_table(columns, rows))


def _load(overrides: tuple[str, ...]) -> tuple[Workspace, Project]:
    from mlops_ray.orchestration.load import load_project

    workspace = open_workspace(Path.cwd())
    return workspace, load_project(workspace, list(overrides))


def _ledger(project: Project) -> Ledger:
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.home import Home

    return open_ledger(Home(project.home))


def _check_runs(workspace: Workspace, project: Project, overrides: tuple[str, ...]) -> None:
    """Check what each trigger would run, so that it does not turn out at night."""
    from mlops_ray.config.triggers import MOMENT
    from mlops_ray.orchestration.load import load_project

    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    wanted = {(trigger.workflow, trigger.overrides) for trigger in project.triggers.values()}
    for workflow, more in sorted(wanted):
        given = [text.replace(MOMENT, now) for text in more]
        load_project(workspace, [*overrides, f"workflow={workflow}", *given])


def _first_look(handle: Any) -> dict[str, Any]:
    """Return the actor's status once it acts, or when waiting for that does not help."""
    import ray

    give_up_s = time.monotonic() + _PATIENCE_S
    while True:
        status: dict[str, Any] = ray.get(handle.status.remote())
        if status["acts"] or time.monotonic() > give_up_s:
            return status
        time.sleep(_WAKE_UP_S)


def _show_started(project: Project, status: dict[str, Any]) -> None:
    if status["acts"]:
        click.echo(f"watching {len(project.triggers)} triggers of {project.name}")
    else:
        text = "another process watches this project; this one takes over when that one is gone"
        click.secho(text, fg="yellow")
    if status["url"]:
        click.echo(f"webhooks: {status['url']}")
    for name, trouble in status["troubles"].items():
        click.secho(f"{name}: {trouble}", fg="yellow")


def _row(ledger: Ledger, project: Project, name: str, trigger: Trigger) -> dict[str, Any]:
    from mlops_ray.cluster.cursors import is_paused
    from mlops_ray.orchestration.triggers import next_time

    paused = is_paused(ledger, project.name, name, trigger)
    upcoming = None if paused else next_time(name, trigger, datetime.now(UTC))
    last = next(iter(ledger.firings(project=project.name, trigger=name, limit=1)), None)
    return {
        "trigger": name,
        "workflow": trigger.workflow,
        "fires on": _describe(trigger),
        "next": upcoming.isoformat(timespec="seconds") if upcoming else None,
        "last": last.at.astimezone().isoformat(timespec="seconds") if last else None,
        "status": "paused" if paused else last.status if last else None,
        "trouble": _trouble(ledger, project, name),
    }


def _why(firing: Firing) -> str:
    """Return why it fired, and how it failed."""
    lines = str(firing.data.get("log", "")).strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    failed = firing.status == "failed" and (errors or lines)
    return f"{firing.reason}: {failed[-1]}" if failed else firing.reason


def _minute(moment: str | None) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M %Z}" if moment else ""


def _describe(trigger: Trigger) -> str:
    if trigger.after is not None:
        return f"{trigger.after.workflow} {trigger.after.status}"
    if trigger.cron is not None:
        return f"{trigger.cron} {trigger.timezone}"
    named = trigger.data or trigger.commit or trigger.event
    return f"{trigger.source} {named}" if named else f"{trigger.source}"


def _trouble(ledger: Ledger, project: Project, name: str) -> str:
    """Return what a trigger could not do last, unless it has fired or was started since."""
    from mlops_ray.cluster.trigger_actor import STARTED

    told = [
        event
        for event in ledger.events(project=project.name, kind="trigger_trouble")
        if event.data["trigger"] == name
    ]
    started = ledger.events(project=project.name, kind=STARTED)
    fresh = told and (not started or told[-1].id > started[-1].id)
    return str(told[-1].data["error"]) if fresh else ""


def _watched(ledger: Ledger, project: Project) -> dict[str, Any]:
    """Return whether somebody watches, and the address of the webhooks."""
    from mlops_ray.cluster.trigger_actor import STARTED
    from mlops_ray.cluster.triggers import LEASE

    lease = ledger.lease(LEASE.format(project=project.name))
    watched = lease is not None and lease.expires_at > datetime.now(UTC)
    started = ledger.events(project=project.name, kind=STARTED) if watched else []
    return {"watched": watched, "url": started[-1].data["url"] if started else ""}


def _say(name: str, overrides: tuple[str, ...], kind: str, said: str) -> None:
    _, project = _load(overrides)
    _known(project, name)
    _ledger(project).append(project.name, kind, {"trigger": name, "by": _person()})
    click.echo(f"{name}: {said}")


def _known(project: Project, name: str) -> None:
    if name not in project.triggers:
        raise MlopsRayError(
            f"there is no trigger {name!r}",
            where=f"project {project.name}",
            fix=f"there are: {', '.join(project.triggers) or 'none'}",
        )


def _person() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in ("fires on", "why"))
    for row in rows:
        table.add_row(*("" if row[c] is None else str(row[c]) for c in columns))
    return table

"""The verbs ``reproduce``, which makes a registered version again, and ``rerun``, its other half."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import default_home, open_workspace
from mlops_ray.errors import MlopsRayError, RegistryError
from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from mlops_ray.delivery.environment import Change
    from mlops_ray.delivery.reproduction import Case
    from mlops_ray.delivery.rerun import Answer, Request
    from mlops_ray.delivery.verdict import Mismatch, Verdict

_DIGEST_LETTERS = 12
_MOST_CHANGES = 20


@click.command(short_help="Make a registered version again; compare it bit for bit.")
@click.argument("reference", metavar="MODEL@VERSION")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Make the code and the home of then in this folder, and leave them there.",
)
@click.option(
    "--given", multiple=True, metavar="STEP", help="Take a step's recorded output as it is."
)
@click.option(
    "--allow-environment", is_flag=True, help="Go on where Python, packages or CPU are not as then."
)
@click.pass_context
def reproduce(
    context: click.Context,
    reference: str,
    keep: Path | None,
    given: tuple[str, ...],
    allow_environment: bool,
) -> None:
    """Make a registered version again, with the code, configuration and data of then.

    The steps that lead to it run in a clean home with an empty cache. Exits 0 only where the model's
    weights and its metrics come out with the same digests, and else shows the first step whose output
    is another one.
    """
    from mlops_ray.delivery.reproduction import find_case, prepare, run_again
    from mlops_ray.delivery.verdict import judge, record

    began_s = time.monotonic()
    home = Home(default_home())
    if not tracking.is_there(home):
        raise RegistryError("nothing is registered here yet", where=str(home.root))
    case = find_case(home, reference, given)
    _say_case(case)
    changes = _check_environment(case, home, allow_environment)
    with _folder(home, keep) as work:
        prepared = prepare(case, home, work, Path.cwd())
        answer = run_again(prepared)
        verdict = judge(case, home, prepared, answer)
        _say_steps(case, answer)
        record(case, home, verdict, time.monotonic() - began_s, [str(c) for c in changes])
    _say_verdict(verdict, time.monotonic() - began_s)
    context.exit(0 if verdict.identical else 1)


@click.command(hidden=True)
@click.argument("request", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("answer", type=click.Path(dir_okay=False, path_type=Path))
@click.pass_context
def rerun(context: click.Context, request: Path, answer: Path) -> None:
    """Run what the file REQUEST asks for with the code in this folder; write the file ANSWER."""
    from mlops_ray.cli.display import RunDisplay
    from mlops_ray.cluster.connect import connect
    from mlops_ray.delivery.rerun import read_request
    from mlops_ray.delivery.rerun import rerun as run_request
    from mlops_ray.orchestration.executor import Executor

    asked = read_request(request)

    def run(asked: Request) -> None:
        workspace = open_workspace(Path.cwd())
        workspace.import_roots()
        spec = asked.spec(workspace.directory, tuple(str(root) for root in workspace.projects))
        with RunDisplay(spec.project, spec.workflow.name) as display:
            display.say("starting Ray")
            connect(asked.cluster, roots=workspace.projects)
            Executor(spec, listener=display.update).run(fresh=True)

    context.exit(0 if run_request(asked, answer, run).succeeded else 1)


@contextmanager
def _folder(home: Home, keep: Path | None) -> Iterator[Path]:
    """Give an empty folder: one to keep, or one in the home, so that files can be linked into it."""
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise MlopsRayError(
                "the folder is not empty", where=str(keep), fix="name one that is not there yet"
            )
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    home.reproductions.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=home.reproductions)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_environment(case: Case, home: Home, allowed: bool) -> list[Change]:
    from mlops_ray.delivery.environment import environment_changes
    from mlops_ray.metadata.provenance import collect

    now = collect(Path.cwd(), "", 0)
    changes = environment_changes(case.run.provenance, now)
    for change in changes[:_MOST_CHANGES]:
        click.secho(f"environment: {change}", fg="yellow" if change.matters else None)
    if len(changes) > _MOST_CHANGES:
        click.echo(f"environment: {len(changes) - _MOST_CHANGES} more differences")
    matter = [change for change in changes if change.matters]
    if matter and not allowed:
        raise MlopsRayError(
            f"the environment differs from that of run {case.run.run_id} in {len(matter)} ways",
            why="other versions may compute other bits",
            fix="install what was there then (the lock file of that commit), or try all the same: "
            "--allow-environment",
        )
    if not changes:
        click.echo("environment: as it was then")
    return changes


def _say_case(case: Case) -> None:
    run, version = case.run, case.version
    commit, dirty = (run.provenance.get(name) for name in ("commit", "dirty_digest"))
    code = "no commit"
    if commit:
        told = {"clean": "", None: ", changes not known"}.get(dirty, " with uncommitted changes")
        code = f"{commit[:_DIGEST_LETTERS]}{told}"
    click.secho(f"{version.name}@{version.version}", bold=True, nl=False)
    click.echo(f": registered by run {run.run_id} ({run.workflow}), code {code}")
    given = ", ".join(f"{n} {ref.digest[:_DIGEST_LETTERS]}" for n, ref in case.given.items())
    click.echo(f"as recorded: {given or 'nothing'}")
    click.echo(f"to run again: {', '.join(case.again)}")


def _say_steps(case: Case, answer: Answer) -> None:
    for name in case.again:
        then, result = case.output(name).digest, answer.steps.get(name)
        now = result.output.digest if result and result.output else None
        mark, colour = ("✓", "green") if then == now else ("✗", "red")
        took = f"{result.seconds:.1f} s" if result else ""
        click.secho(f"{mark} ", fg=colour, nl=False)
        click.echo(f"{name}: {_pair(then, now)}  {took}".rstrip())


def _say_verdict(verdict: Verdict, seconds: float) -> None:
    if verdict.identical:
        click.secho("identical: ", fg="green", nl=False)
        told = f"weights {_cut(verdict.weights[0])}, metrics {_cut(verdict.metrics[0])}"
        click.echo(f"{told} ({seconds:.0f} s)")
        return
    click.secho("not identical: ", fg="red", nl=False)
    click.echo(f"weights {_pair(*verdict.weights)}; metrics {_pair(*verdict.metrics)}")
    if verdict.first is not None:
        _say_first(verdict.first)


def _pair(then: str, now: str | None) -> str:
    return f"{_cut(then)} as then" if then == now else f"{_cut(then)} then, {_cut(now)} now"


def _say_first(first: Mismatch) -> None:
    click.echo(
        f"first difference: step {first.step}: {_cut(first.then)} then, {_cut(first.now)} now"
    )
    for line in first.lines:
        click.echo(f"  {line}")
    if first.code:
        click.echo(f"  its code is not that of then: {', '.join(first.code)}")


def _cut(digest: str | None) -> str:
    return digest[:_DIGEST_LETTERS] if digest else "nothing"

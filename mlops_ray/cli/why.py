"""The verb ``why``: what made a step run, or kept it from running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError

if TYPE_CHECKING:
    from mlops_ray.metadata.ledger import Ledger
    from mlops_ray.metadata.records import RunRecord
    from mlops_ray.orchestration.why import Explanation


@click.command(short_help="Say why a step ran: which input, config key or code changed.")
@click.argument("step")
@click.argument("rest", nargs=-1, metavar="[RUN] [KEY=VALUE]...")
@click.option("--next", "ahead", is_flag=True, help="Explain what a run would do now.")
@click.option("--project", help="Only runs of this project.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(step: str, rest: tuple[str, ...], ahead: bool, project: str | None, as_json: bool) -> None:
    """Say why STEP ran, came from the cache or was skipped.

    Its key is compared with that of the run before: each input, config value, function and part of
    the environment that differs is named, and of an input the step that changed it, and why. RUN is
    a run's id, or a unique beginning of it; without it, the newest that had the step.

    With --next it says what a run would do now; KEY=VALUE are Hydra overrides of that run.
    """
    overrides = tuple(word for word in rest if "=" in word)
    runs = [word for word in rest if "=" not in word]
    if len(runs) > 1 or (ahead and runs) or (overrides and not ahead):
        raise click.UsageError("give one RUN; KEY=VALUE go with --next, which takes no RUN")
    found = _ahead(step, overrides) if ahead else _behind(step, runs, project)
    click.echo(json.dumps(_document(found)) if as_json else "\n".join(_lines(found)))


def _ahead(step: str, overrides: tuple[str, ...]) -> Explanation:
    from mlops_ray.cli.plans import planned
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.orchestration.why import explain_plan

    spec, _, plan = planned(overrides)
    ledger = open_ledger(spec.home)
    runs = ledger.runs(project=spec.project, workflow=spec.workflow.name, limit=1)
    runs = runs or ledger.runs(project=spec.project, limit=1)
    return explain_plan(ledger, step, plan, runs[0] if runs else None)


def _behind(step: str, runs: list[str], project: str | None) -> Explanation:
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.home import Home
    from mlops_ray.orchestration.why import explain, last_run

    ledger = open_ledger(Home(default_home()))
    run = _named(ledger, runs[0]) if runs else last_run(ledger, step, project)
    if run is None:
        raise MlopsRayError(
            f"no run has had a step {step!r}",
            where=str(default_home()),
            fix="list the runs with `mlops-ray status`, or ask what would run with --next",
        )
    return explain(ledger, step, run)


def _named(ledger: Ledger, start: str) -> RunRecord:
    exact = ledger.run(start)
    found = [exact] if exact else [r for r in ledger.runs(limit=1000) if r.run_id.startswith(start)]
    if len(found) != 1:
        what = f"{len(found)} runs begin with {start!r}" if found else f"there is no run {start!r}"
        raise MlopsRayError(what, fix="list them with `mlops-ray status`")
    return found[0]


def _lines(found: Explanation) -> Iterator[str]:
    place = "" if found.run == "now" else f" in run {found.run}"
    yield f"{found.step}{place} {found.reason}"
    if found.against is not None and found.changes:
        causes = list(dict.fromkeys(found.causes()))
        yield f"because, compared with run {found.against}:"
        yield from (f"  {cause}" for cause in causes)
        if any(change.cause is not None for change in found.changes):
            yield "by way of:"
            yield from _tree(found, "  ", set())


def _tree(found: Explanation, indent: str, seen: set[str]) -> Iterator[str]:
    from mlops_ray.orchestration.why import describe

    for change in found.changes:
        line = describe(change)
        if change.cause is None:
            yield f"{indent}{line}"
            continue
        again = " (see above)" if change.cause.step in seen else f" {change.cause.reason}"
        yield f"{indent}{line}, from {change.cause.step}, which{again}"
        yield from (f"{indent}  {text}" for text in change.cause.wrote)
        if change.cause.step not in seen:
            seen.add(change.cause.step)
            yield from _tree(change.cause, f"{indent}  ", seen)


def _document(found: Explanation) -> dict[str, object]:
    return asdict(found) | {"causes": list(dict.fromkeys(found.causes()))}

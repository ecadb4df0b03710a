"""The verb ``resolve``: say whether an effect happened of which nobody else knows."""

from __future__ import annotations

import json
from typing import Any

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home


@click.command(short_help="Say whether an uncertain effect has happened.")
@click.argument("run_id", metavar="RUN")
@click.argument("step")
@click.option("--done", "decision", flag_value="done", help="It happened: go on without it.")
@click.option("--rerun", "decision", flag_value="rerun", help="It did not: let it run again.")
@click.option("--output", metavar="JSON", help="With --done: what the step returned.")
@click.option("--item", default=-1, help="Which call of a mapped step, from 0.")
def resolve(run_id: str, step: str, decision: str | None, output: str | None, item: int) -> None:
    """Say whether STEP of RUN has happened, which was cut off and must not run twice.

    Afterwards the command that started the run goes on with it.
    """
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.artifacts import open_artifacts
    from mlops_ray.orchestration.once import resolve as settle
    from mlops_ray.orchestration.ownership import borrowed

    if decision is None or (output is not None and decision != "done"):
        raise click.UsageError("say either --done, where you may give --output, or --rerun")
    home = Home(default_home())
    ledger = open_ledger(home)
    run = ledger.run(run_id)
    if run is None:
        raise MlopsRayError(f"there is no run {run_id!r}", fix="list them: mlops-ray status")
    with borrowed(ledger, run) as lease:
        settle(
            ledger,
            open_artifacts(home),
            run,
            step,
            item,
            "done" if decision == "done" else "rerun",
            output=_parsed(output),
            fence=lease,
        )
    click.echo(f"{step}: {'done' if decision == 'done' else 'will run again'}")


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--output is not JSON: {error}") from error

"""The verb ``cancel``: end a run that is running somewhere."""

from __future__ import annotations

import getpass
import socket
import time

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home

_LOOK_EVERY_S = 0.5


@click.command(short_help="End a running run; what runs is interrupted.")
@click.argument("run_id", metavar="RUN")
@click.option(
    "--wait",
    "wait_s",
    default=60.0,
    show_default=True,
    help="How many seconds to wait for its end.",
)
def cancel(run_id: str, wait_s: float) -> None:
    """End a running run, wherever it runs: its steps are interrupted, and ended if they do not end.

    The same command that started the run goes on with it.
    """
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.orchestration.cancellation import request_cancel

    ledger = open_ledger(Home(default_home()))
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    run = request_cancel(ledger, run_id, by)
    until_s = time.monotonic() + wait_s
    while run.status == "running" and time.monotonic() < until_s:
        time.sleep(_LOOK_EVERY_S)
        run = ledger.run(run_id) or run
    if run.status == "running":
        raise MlopsRayError(
            f"run {run_id} has not ended yet",
            where=run.owner,
            fix=f"it was asked to; see `mlops-ray status {run_id}`",
        )
    click.echo(f"run {run_id}: {run.status}")

"""The verbs ``endpoints``: what is served on a cluster, and taking it down."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlops_ray.errors import ServingError

if TYPE_CHECKING:
    from rich.table import Table

    from mlops_ray.serving.deployment.listing import Listed

_address = click.option(
    "--address", help="The cluster; without it $RAY_ADDRESS, else the one on this machine."
)

_WIDE = 1000


@click.group(
    invoke_without_command=True, short_help="List what is served on a cluster; take it down."
)
@_address
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def endpoints(context: click.Context, address: str | None, as_json: bool) -> None:
    """List the endpoints of a cluster: status, versions, shares, replicas, address."""
    from rich.console import Console

    from mlops_ray.cluster.connect import join
    from mlops_ray.serving.deployment.listing import endpoints as listed

    if context.invoked_subcommand is not None:
        return
    join(address)
    found = listed()
    if as_json:
        click.echo(json.dumps([asdict(endpoint) for endpoint in found]))
    elif not found:
        click.echo("nothing is served here; `mlops-ray run workflow=deploy` deploys an endpoint")
    else:
        # What people copy must be whole, in a narrow terminal too.
        Console(width=_WIDE).print(_table(found))
        for endpoint in found:
            if endpoint.status not in ("RUNNING", "DEPLOYING") and endpoint.message:
                click.echo(f"{endpoint.name}: {endpoint.message.strip()}")


@endpoints.command(short_help="Take an endpoint down.")
@click.argument("name")
@_address
def remove(name: str, address: str | None) -> None:
    """Take an endpoint down, after it has answered what it accepted."""
    from mlops_ray.cluster.connect import join
    from mlops_ray.serving.deployment.deploy import remove as take_down
    from mlops_ray.serving.deployment.listing import endpoints as listed

    join(address)
    known = [endpoint.name for endpoint in listed()]
    if name not in known:
        raise ServingError(
            f"there is no endpoint {name!r}", fix=f"there are: {', '.join(known) or 'none'}"
        )
    take_down(name)
    click.echo(f"{name} is down")


def _table(found: list[Listed]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("endpoint", "status", "versions", "replicas", "address"):
        table.add_column(column)
    for endpoint in found:
        versions = "\n".join(
            f"{alias} {version}: {_share(endpoint.shares[alias])}"
            for alias, version in endpoint.versions.items()
        )
        replicas = "\n".join(f"{name} {count}" for name, count in endpoint.replicas.items())
        table.add_row(endpoint.name, endpoint.status, versions, replicas, endpoint.url)
    return table


def _share(share: float) -> str:
    return f"{share:.4g}" if share else "shadow"

"""The verb ``tokens``: who may call an endpoint."""

from __future__ import annotations

import math
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mlops_ray.config.locate import default_home

_FILE = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file that serving.security.tokens names; by default tokens.json in the home.",
)


@click.group(short_help="Say who may call an endpoint.")
def tokens() -> None:
    """Make, list and remove the bearer tokens of an endpoint.

    Running endpoints take changes over within a second or two.
    """


@tokens.command(short_help="Make a token and print it, once.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["predict", "feedback", "explain", "metadata", "unlogged"]),
    help="What it allows; may be given several times. By default everything but unlogged, "
    "which lets requests be kept out of the log.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1e9, min_open=True),
    help="Requests a second, of each replica.",
)
@click.option(
    "--burst", type=click.IntRange(1), help="Requests at once; by default what a second brings."
)
@_FILE
def add(
    name: str, scopes: tuple[str, ...], rate: float | None, burst: int | None, path: Path | None
) -> None:
    """Make a token for NAME and print it.

    It cannot be shown again: the file keeps a digest.
    """
    from mlops_ray.serving.endpoint import tokens as file

    if rate is not None and math.isnan(rate):
        raise click.BadParameter("give a number", param_hint="--rate")
    if burst is not None and rate is None:
        raise click.UsageError("--burst goes with --rate")
    allowed = tuple(s for s in file.SCOPES if s in scopes) or file.USUAL_SCOPES
    where = _path(path)
    token = file.add(where, name, allowed, rate=rate, burst=burst)
    click.echo(token)
    click.echo(f"kept in {where}; send it as: Authorization: Bearer {token[:6]}…", err=True)
    click.echo(f"endpoints deployed with serving.security.tokens={where} ask for it", err=True)


@tokens.command("list", short_help="List the tokens.")
@_FILE
def list_tokens(path: Path | None) -> None:
    """List the tokens: names, scopes and rates."""
    from mlops_ray.serving.endpoint import tokens as file

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "id", "scopes", "rate", "burst", "made"):
        table.add_column(column)
    for token in file.read(_path(path)):
        table.add_row(
            token.name,
            token.id,
            ", ".join(token.scopes),
            "" if token.rate is None else f"{token.rate:g}/s",
            "" if token.burst is None else str(token.burst),
            f"{token.made:%Y-%m-%d %H:%M}",
        )
    Console().print(table)


@tokens.command(short_help="Take a token's rights away.")
@click.argument("name")
@_FILE
def remove(name: str, path: Path | None) -> None:
    """Remove the token of NAME."""
    from mlops_ray.serving.endpoint import tokens as file

    file.remove(_path(path), name)
    click.echo(f"{name} may no longer call")


def _path(path: Path | None) -> Path:
    return path if path is not None else Path(default_home()) / "tokens.json"

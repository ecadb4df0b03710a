"""The verbs ``features …`` that change the feature store, or take rows out of it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.cli import browse

if TYPE_CHECKING:
    from mlops_ray.features.plan import FeaturePlan

overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_MARKS = {
    "new": ("+", "green"),
    "unchanged": ("=", "dim"),
    "told": ("~", "cyan"),
    "extend": ("+", "cyan"),
    "rebuild": ("±", "yellow"),
    "refuse": ("✗", "bold red"),
    "undeclared": ("-", "dim"),
}


@click.group(short_help="Plan, apply and look at the feature store.")
def features() -> None:
    """Plan and apply the definitions of the feature store; look at what it holds.

    KEY=VALUE are Hydra overrides, as for every verb: project=flights.
    """


for _verb in browse.VERBS:
    features.add_command(_verb)


@features.command(short_help="Show what applying the definitions would do.")
@overrides
@as_json
def plan(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the difference between the definitions and the store, view by view, and why."""
    made = browse.open_store(overrides).plan()
    _show_plan(made, as_json)


@features.command(short_help="Make the store what the definitions say.")
@overrides
@as_json
def apply(overrides: tuple[str, ...], as_json: bool) -> None:
    """Make the store what the definitions say: new rows where they are due, then the switch.

    Rows are made by the workflow features: interrupted, the same command goes on. Until all rows of
    a view that is made anew are there, the old ones are served. A change that cannot be made is
    refused, with the reason, before anything is touched.
    """
    from mlops_ray.api import connect

    session = connect(*overrides, directory=Path.cwd())
    if session.features.plan().rows_due:
        with session:
            made = session.features.apply()
    else:
        made = session.features.apply()
    _show_plan(made, as_json)


@features.command(short_help="Remove the tables that nothing declares or pins.")
@overrides
@click.option("--yes", is_flag=True, help="Remove them; without it they are only listed.")
@as_json
def prune(overrides: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """List, or with --yes remove, tables of views and definitions that are declared no more.

    Their rows in the online store go with them. What a training manifest pins stays.
    """
    from mlops_ray.features.pruning import prune as prune_store

    store = browse.open_store(overrides)
    online = store.online(readonly=False) if yes else None
    found = prune_store(store.features, store.offline, online, dry_run=not yes)
    if as_json:
        click.echo(json.dumps([item.model_dump(mode="json") for item in found], indent=2))
        return
    rows = [(i.view, i.folder, f"{i.bytes / 2**20:,.1f}", i.fate) for i in found]
    browse.print_table(("view", "folder", "MiB", ""), rows)
    if found and not yes:
        click.echo("nothing was removed; do it with --yes")


@features.command(short_help="Merge small files into buckets sorted by entity.")
@click.argument("view", required=False)
@overrides
def compact(view: str | None, overrides: tuple[str, ...]) -> None:
    """Compact the table of VIEW, or of every view; rows and versions stay what they are."""
    view, overrides = browse.optional_view(view, overrides)
    store = browse.open_store(overrides)
    for name in [view] if view else store.features.view_order:
        store.offline.compact(name)
        click.echo(f"{name}: version {store.offline.version(name)}")


@features.command(short_help="Remove files that no version in use needs.")
@click.argument("view", required=False)
@overrides
@click.option(
    "--retention",
    type=browse.duration,
    default="7d",
    show_default=True,
    help="Keep versions this young.",
)
@click.option("--dry-run", is_flag=True, help="Only say how many files would go.")
def vacuum(
    view: str | None, overrides: tuple[str, ...], retention: timedelta, dry_run: bool
) -> None:
    """Remove files that only versions older than the retention need, and no manifest pins."""
    view, overrides = browse.optional_view(view, overrides)
    store = browse.open_store(overrides)
    for name in [view] if view else store.features.view_order:
        removed = store.offline.vacuum(name, retention=retention, dry_run=dry_run)
        click.echo(f"{name}: {len(removed)} files{' would go' if dry_run else ''}")


@features.command(short_help="Write a view's rows to Parquet.")
@click.argument("view")
@overrides
@click.option("--since", type=browse.moment, help="Earliest event time.")
@click.option("--until", type=browse.moment, help="Latest event time.")
@click.option("--version", type=int, help="A version of the view's table.")
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that is not there yet.",
)
def export(
    view: str,
    overrides: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    version: int | None,
    output: Path,
) -> None:
    """Write the rows of VIEW with an event time in a range to a folder of Parquet files."""
    from mlops_ray.errors import FeatureStoreError

    store = browse.open_store(overrides)
    if output.exists():
        raise FeatureStoreError("the output is there already", where=str(output))
    rows = store.export(view, output, version, since, until)
    click.echo(f"{rows:,} rows: {output}")


def _show_plan(made: FeaturePlan, as_json: bool) -> None:
    if as_json:
        click.echo(made.model_dump_json(indent=2))
        return
    from rich.text import Text

    rows: list[tuple[Any, ...]] = []
    for change in made.changes:
        mark, style = _MARKS[change.action]
        reasons = [*change.because, *([f"fix: {change.fix}"] if change.fix else [])]
        rows.append(
            (Text(mark, style), change.view, Text(change.action, style), "\n".join(reasons))
        )
    browse.print_table(("", "view", "would", "because"), rows)

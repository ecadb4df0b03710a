"""The verb ``models``: what is in the registry, and where each version comes from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from mlops_ray.config.locate import default_home
from mlops_ray.errors import RegistryError
from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from mlops_ray.registry.registry import Registry


@click.group(short_help="List registered models; show a version's lineage.")
def models() -> None:
    """List registered models, or show one version with its lineage."""


@models.command("list", short_help="List the versions of a model, or of all.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_versions(name: str | None, as_json: bool) -> None:
    """List the versions of model NAME, or of all models, with their aliases and metrics."""
    registry = _registry()
    names = [name] if name else registry.models()
    described = [
        registry.describe(f"{model}@{version.version}")
        for model in names
        for version in registry.versions(model)
    ]
    if not described:
        what = f"there is no model {name!r}" if name else "no model is registered"
        raise RegistryError(what, fix="run the train workflow first")
    if as_json:
        click.echo(json.dumps(described, default=str, indent=2))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("version", "aliases", "auc", "log loss", "commit", "run"):
        table.add_column(column)
    for item in described:
        report, lineage = item["report"], item["lineage"]
        table.add_row(
            f"{item['name']}@{item['version']}",
            ", ".join(item.get("aliases", [])),
            _number(report["auc"]),
            _number(report["log_loss"]),
            str(lineage.get("code_commit") or "")[:10],
            str(lineage.get("parent_run") or ""),
        )
    Console().print(table)


@models.command(short_help="Show one version with its lineage.")
@click.argument("reference", metavar="NAME@VERSION")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(reference: str, as_json: bool) -> None:
    """Show a version: data version, code, config, environment, metrics, parent run.

    NAME@VERSION is for example flights@3 or flights@champion.
    """
    described = _registry().describe(reference)
    if as_json:
        click.echo(json.dumps(described, default=str, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for path, value in [*_flat(described), *_further(described)]:
        table.add_row(path, value)
    Console().print(table)


def _further(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Return whether a version was made again, and the commands that tell more of it."""
    from mlops_ray.metadata.access import open_ledger

    name = f"{described['name']}@{described['version']}"
    ledger = open_ledger(Home(default_home()))
    try:
        events = ledger.events(kind="reproduced", run_id=described["lineage"]["parent_run"])
    finally:
        ledger.close()
    ours = [
        event
        for event in events
        if (event.data["model"], event.data["version"]) == (described["name"], described["version"])
    ]
    said = "never tried"
    if ours:
        found = "identical" if ours[-1].data["identical"] else "not identical"
        said = f"{found}, {ours[-1].at:%Y-%m-%d %H:%M}"
    return [
        ("reproduced", said),
        ("to make it again", f"mlops-ray reproduce {name}"),
        ("what it came of", f"mlops-ray lineage {name} --up"),
    ]


def _registry() -> Registry:
    """Open the registry of this folder's home, without making one where there is none."""
    home = Home(default_home())
    if not tracking.is_there(home):
        raise RegistryError(
            "nothing is registered here yet",
            where=str(home.root),
            fix="run the train workflow first, go to the project's folder, or set MLOPS_RAY_HOME",
        )
    from mlops_ray.registry.registry import Registry

    return Registry(home)


def _number(value: Any) -> str:
    return f"{float(value):.4f}" if value is not None else ""


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [
            row for key, item in value.items() for row in _flat(item, f"{path}.{key}".strip("."))
        ]
    if isinstance(value, list | tuple):
        return [(path, ", ".join(str(item) for item in value))]
    return [(path, f"{value:.6g}" if isinstance(value, float) else str(value))]

"""The verbs ``features …`` that look at the feature store and change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.config.base import format_duration, parse_duration
from mlops_ray.errors import FeatureStoreError

if TYPE_CHECKING:
    from mlops_ray.features.store import FeatureStore

_EXPECTATIONS_SHOWN = 50
_WHOLE = re.compile(r"-?[0-9]{1,19}")


def moment(text: str) -> datetime:
    """Return a time written as ISO 8601; one without an offset is UTC."""
    value = datetime.fromisoformat(text)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def duration(text: str) -> timedelta:
    """Return a length of time written as in the configuration: 90s, 6h, 28d."""
    try:
        length: timedelta = parse_duration(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(str(error)) from error
    return length


_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_view = click.argument("view")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("list", short_help="List the views and where their tables stand.")
@_overrides
@_json
def list_views(overrides: tuple[str, ...], as_json: bool) -> None:
    """List the views: entity, origin, features, and up to when their rows are stored."""
    from mlops_ray.features.browse import overview

    store = open_store(overrides)
    found = overview(store.features, store.offline)
    if as_json:
        _print_json(found)
        return
    rows = [
        (v.view, v.entity, v.origin, v.features, _length(v.ttl), _moment(v.complete_until))
        for v in found
    ]
    print_table(("view", "entity", "from", "features", "ttl", "complete until"), rows)


@click.command(short_help="Show all that is declared and stored of a view.")
@_view
@_overrides
@_json
def show(view: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show all that is declared of VIEW, and its table."""
    from mlops_ray.features.browse import show as describe

    store = open_store(overrides)
    found = describe(store.features, store.offline, view)
    if as_json:
        _print_json(found)
        return
    print_table(("", ""), [(name, _text(value)) for name, value in found.items()])


@click.command(short_help="Show what a thing comes from and what it feeds.")
@click.argument("thing")
@_overrides
@_json
def lineage(thing: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what THING comes from and what it feeds, up to the model versions.

    THING is a source, an entity, a view, an on-demand view, a service or a model version; where
    several share a name, write its kind before it: source:flights.
    """
    from mlops_ray.features.browse import edges
    from mlops_ray.features.browse import lineage as reach

    store = open_store(overrides)
    kind, found = reach(edges(store.features, _models(store)), thing)
    if as_json:
        _print_json({"kind": kind, "edges": [edge.model_dump() for edge in found]})
        return
    rows = [(f"{e.origin_kind} {e.origin}", "→", f"{e.made_kind} {e.made}") for e in found]
    print_table(("from", "", "to"), rows)


@click.command(short_help="Show statistics of a view's rows.")
@_view
@_overrides
@click.option("--version", type=int, help="A version of the view's table.")
@_json
def stats(view: str, overrides: tuple[str, ...], version: int | None, as_json: bool) -> None:
    """Show how many rows and entities VIEW has, and each feature's nulls, range and quantiles."""
    store = open_store(overrides)
    found = store.statistics(view, version)
    if as_json:
        _print_json(found)
        return
    click.echo(
        f"{view} · version {found.version} · {found.rows:,} rows · {found.entities:,} entities · "
        f"{_moment(found.oldest_event)} to {_moment(found.newest_event)}"
    )
    rows = [
        (
            f.feature,
            f.dtype,
            f.nulls,
            _number(f.minimum),
            _number(f.mean),
            _number(f.maximum),
            " ".join(_number(q) for q in f.quantiles)
            or ", ".join(f"{value} ({count})" for value, count in f.frequent),
        )
        for f in found.features
    ]
    heads = ("feature", "type", "nulls", "min", "mean", "max", "1 25 50 75 99 %, or frequent")
    print_table(heads, rows)


@click.command(short_help="Show how old the newest rows are.")
@_overrides
@click.option("--at", type=moment, help="As of this moment, not now.")
@_json
def freshness(overrides: tuple[str, ...], at: datetime | None, as_json: bool) -> None:
    """Show the age of each view's newest row beside its target; exit 1 where one is stale."""
    from mlops_ray.features.browse import freshness as look

    store = open_store(overrides)
    found = look(store.features, store.offline, at or datetime.now(UTC))
    if as_json:
        _print_json(found)
    else:
        rows = [
            (f.view, _moment(f.newest_event), _age(f.age), _length(f.target), _fresh(f))
            for f in found
        ]
        print_table(("view", "newest event", "age", "target", ""), rows)
    if any(item.stale for item in found):
        raise SystemExit(1)


@click.command(short_help="Look up one entity's features.")
@_view
@click.argument("given", nargs=-1, metavar="KEY=VALUE...")
@click.option("--at", type=moment, help="As of this moment, not now.")
@click.option("--offline", is_flag=True, help="Ask the offline store.")
@_json
def get(
    view: str, given: tuple[str, ...], at: datetime | None, offline: bool, as_json: bool
) -> None:
    """Look up the features of VIEW for one entity: features get weather origin=JFK project=flights.

    KEY=VALUE names the entity's keys. project=… and every name with a dot is an override. The online
    store keeps each entity's newest row only: of a moment in the past ask with --offline.
    """
    overrides = tuple(item for item in given if _is_override(item))
    store = open_store(overrides)
    key = _key(store, view, [item for item in given if item not in overrides])
    found = store.get(view, key, at, offline=offline)
    if as_json:
        _print_json(found)
        return
    print_table(
        ("feature", "value", "status"), [(v.feature, _text(v.value), v.status) for v in found]
    )


@click.command(short_help="List the versions of a view's table.")
@_view
@_overrides
@click.option("--limit", default=20, show_default=True, help="The newest so many.")
@_json
def versions(view: str, overrides: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List the commits of VIEW's table, newest first: when, and how many rows each added."""
    from mlops_ray.features.browse import table_versions

    store = open_store(overrides)
    found = table_versions(store.features, store.offline, view, limit)
    if as_json:
        _print_json(found)
        return
    rows = [(v.version, _moment(v.at), v.added, "all anew" if v.replaced else "") for v in found]
    print_table(("version", "at", "rows added", ""), rows)


@click.command(short_help="List the training manifests, which pin versions.")
@_overrides
@_json
def manifests(overrides: tuple[str, ...], as_json: bool) -> None:
    """List the training manifests: what each training set was made from, and so pins."""
    from mlops_ray.features.manifest import list_manifests

    found = list_manifests(open_store(overrides).offline.root)
    if as_json:
        _print_json(found)
        return
    rows = [
        (name, m.service, m.rows, _moment(m.until), {v: pin.version for v, pin in m.views.items()})
        for name, m in found.items()
    ]
    print_table(("manifest", "service", "rows", "until", "versions"), rows)


@click.command(short_help="Show the recorded results of expectations.")
@_overrides
@click.option("--failed", is_flag=True, help="Only those that did not hold.")
@click.option("--limit", default=_EXPECTATIONS_SHOWN, show_default=True, help="The newest so many.")
@_json
def expectations(overrides: tuple[str, ...], failed: bool, limit: int, as_json: bool) -> None:
    """Show what was expected of each load of each source, and what was seen, newest first."""
    from mlops_ray.metadata.access import open_ledger

    store = open_store(overrides)
    ledger = open_ledger(store.home)
    events = ledger.events(project=store.project, kind="expectation")
    chosen = [e for e in reversed(events) if not (failed and e.data["passed"])][:limit]
    if as_json:
        _print_json([{"at": e.at.isoformat(), "run_id": e.run_id, **e.data} for e in chosen])
        return
    rows = [
        (
            _moment(e.at),
            e.data["source"],
            e.data["column"],
            e.data["check"],
            e.data["expected"],
            e.data["observed"],
            "ok" if e.data["passed"] else e.data["severity"],
        )
        for e in chosen
    ]
    print_table(("at", "source", "column", "check", "expected", "observed", ""), rows)


VERBS = (
    list_views,
    show,
    lineage,
    stats,
    freshness,
    get,
    versions,
    manifests,
    expectations,
)


def open_store(overrides: Sequence[str]) -> FeatureStore:
    """Compose and check the project of this folder; return its feature store."""
    from mlops_ray.config.locate import open_workspace
    from mlops_ray.features.store import FeatureStore
    from mlops_ray.metadata.home import Home
    from mlops_ray.orchestration.load import load_project

    project = load_project(open_workspace(Path.cwd()), list(overrides))
    return FeatureStore(project.features, Home(project.home), project.name)


def optional_view(
    view: str | None, overrides: tuple[str, ...]
) -> tuple[str | None, tuple[str, ...]]:
    """Tell a view's name from an override where the name may be left out."""
    if view is not None and "=" in view:
        return None, (view, *overrides)
    return view, overrides


def print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows below their heads."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(heads))
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*[cell if isinstance(cell, Text) else Text(_text(cell)) for cell in row])
    Console().print(table)


def _models(store: FeatureStore) -> list[tuple[str, str]]:
    """Return the registered versions of the project's model with the services they read."""
    from mlops_ray.metadata import tracking

    if not tracking.is_there(store.home):
        return []
    from mlops_ray.registry.registry import Registry

    registry = Registry(store.home)
    found = []
    for version in registry.versions(store.project):
        reference = f"{version.name}@{version.version}"
        service = registry.describe(reference)["lineage"].get("service")
        if service in store.features.services:
            found.append((str(service), reference))
    return found


def _is_override(item: str) -> bool:
    name = item.partition("=")[0]
    return name in ("project", "home") or "." in name or name.startswith(("+", "~"))


def _key(store: FeatureStore, view: str, given: Sequence[str]) -> dict[str, Any]:
    from mlops_ray.features.definitions import define

    keys = define(store.features, view).keys
    found: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise FeatureStoreError(f"{item!r} is no KEY=VALUE", fix=f"write {item}=…")
        if keys.get(name) == "int" and not _WHOLE.fullmatch(text):
            raise FeatureStoreError(f"key {name!r} is a whole number, not {text!r}")
        found[name] = int(text) if keys.get(name) == "int" else text
    return found


def _print_json(value: Any) -> None:
    from mlops_ray.metadata.digest import canonical_json

    click.echo(json.dumps(json.loads(canonical_json(value)), indent=2, ensure_ascii=False))


def _fresh(item: Any) -> str:
    if item.target is None:
        return ""
    return "stale" if item.stale else "fresh"


def _moment(value: datetime | None) -> str:
    return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def _length(value: Any) -> str:
    return "" if value is None else format_duration(value)


def _age(value: timedelta | None) -> str:
    """Write a length of time in the largest unit of which it has at least two."""
    if value is None:
        return "no row"
    seconds = value.total_seconds()
    for name, unit in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if abs(seconds) >= 2 * unit:
            return f"{seconds / unit:.1f}{name}"
    return f"{seconds:.1f}s"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)

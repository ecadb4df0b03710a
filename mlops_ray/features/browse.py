"""Looking at a feature store: what is declared, what is stored, what comes from what, how fresh."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Literal

from mlops_ray.config.base import Duration, Frozen, Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.columns import from_us
from mlops_ray.features.definitions import define
from mlops_ray.features.delta_log import changed_files
from mlops_ray.features.offline import OfflineStore

Kind = Literal["source", "entity", "view", "on-demand view", "service", "model"]


class ViewOverview(Frozen):
    """One view in a list. ``complete_until``: its rows created up to then are stored."""

    view: str
    entity: str
    origin: str
    features: int
    windows: int
    ttl: Duration | None
    version: int
    complete_until: Instant | None
    owner: str
    tags: tuple[str, ...]
    description: str


class TableVersion(Frozen):
    """One commit of a view's table. ``added`` rows are new; all were ``replaced`` where code changed."""

    version: int
    at: Instant
    added: int
    replaced: bool


class Freshness(Frozen):
    """How old a view's newest row is at a moment, and whether that is within its target."""

    view: str
    newest_event: Instant | None
    newest_created: Instant | None
    age: Duration | None
    target: Duration | None
    stale: bool


class Edge(Frozen):
    """``made`` is computed from ``origin``."""

    origin_kind: Kind
    origin: str
    made_kind: Kind
    made: str


def overview(features: Features, store: OfflineStore) -> list[ViewOverview]:
    """Return all views, those that feed others first, with where their tables stand."""
    return [_overview(features, store, name) for name in features.view_order]


def _overview(features: Features, store: OfflineStore, name: str) -> ViewOverview:
    view = features.views[name]
    watermark_us = store.watermark(name, generation=code_digest_of(features, name))
    return ViewOverview(
        view=name,
        entity=view.entity,
        origin=f"source {view.source}" if view.source else f"view {view.view}",
        features=len(view.features),
        windows=len(view.windows),
        ttl=view.ttl,
        version=store.version(name),
        complete_until=None if watermark_us is None else from_us(watermark_us),
        owner=view.owner,
        tags=view.tags,
        description=view.description,
    )


def show(features: Features, store: OfflineStore, name: str) -> dict[str, Any]:
    """Return everything declared and stored of a view, as a JSON value.

    Raises:
        FeatureStoreError: There is no such view.
    """
    definition = define(features, name)
    view = definition.view
    return {
        **_overview(features, store, name).model_dump(mode="json"),
        "keys": definition.keys,
        "features": view.features,
        "declared": view.model_dump(mode="json", exclude_defaults=True),
        "services": [s for s, service in features.services.items() if name in service.views],
        "digest": definition.digest,
        "table": str(store.path(name)),
        "table_id": store.table_id(name),
    }


def table_versions(
    features: Features, store: OfflineStore, name: str, limit: int = 20
) -> list[TableVersion]:
    """Return the newest ``limit`` commits of a view's table, newest first; none without a table."""
    from deltalake import DeltaTable

    define(features, name)
    if store.version(name) < 0:
        return []
    history = DeltaTable(str(store.path(name))).history(limit)
    return [_table_version(store, name, commit) for commit in history]


def _table_version(store: OfflineStore, name: str, commit: dict[str, Any]) -> TableVersion:
    version = int(commit["version"])
    try:
        files = changed_files(store.path(name), version - 1, version)
        replaced = False
    except FeatureStoreError:
        files, replaced = store.files(name, version), True
    added = sum(file.rows for file in files)
    at = from_us(int(commit["timestamp"]) * 1000)
    return TableVersion(version=version, at=at, added=added, replaced=replaced)


def freshness(features: Features, store: OfflineStore, now: datetime) -> list[Freshness]:
    """Return how old the newest stored row of each view is at ``now``, beside its target.

    A view with a target and without any row is stale.
    """
    return [_freshness(features, store, name, now) for name in features.view_order]


def _freshness(features: Features, store: OfflineStore, name: str, now: datetime) -> Freshness:
    event, created = newest(store, name)
    age: timedelta | None = None if event is None else now - event
    target = features.views[name].freshness
    return Freshness(
        view=name,
        newest_event=event,
        newest_created=created,
        age=age,
        target=target,
        stale=target is not None and (age is None or age > target),
    )


def newest(
    store: OfflineStore, view: str, version: int | None = None
) -> tuple[datetime | None, datetime | None]:
    """Return the newest event time and the newest created time among a view's stored rows."""
    files = store.files(view, version)
    events = [file.event_us[1] for file in files if file.event_us is not None]
    created = [file.created_us[1] for file in files if file.created_us is not None]
    return (
        from_us(max(events)) if events else None,
        from_us(max(created)) if created else None,
    )


def edges(features: Features, models: Iterable[tuple[str, str]] = ()) -> list[Edge]:
    """Return what is made from what; ``models`` are pairs (service, model version)."""
    found = []
    for name, view in features.views.items():
        kind: Kind = "view" if view.view else "source"
        found.append(_edge(kind, view.view or view.source or "", "view", name))
        found.append(_edge("entity", view.entity, "view", name))
    for name, on_demand in features.on_demand.items():
        views = dict.fromkeys(feature.partition("__")[0] for feature in on_demand.features)
        found += [_edge("view", view, "on-demand view", name) for view in views]
    for name, service in features.services.items():
        found += [_edge("view", view, "service", name) for view in service.views]
        found += [_edge("on-demand view", view, "service", name) for view in service.on_demand]
    found += [_edge("service", service, "model", model) for service, model in models]
    return list(dict.fromkeys(found))


def lineage(found: list[Edge], thing: str) -> tuple[Kind, list[Edge]]:
    """Return the kind of a thing and the edges of all that it comes from and all that it feeds.

    ``thing`` is the name of a source, an entity, a view, an on-demand view, a service or a model
    version; where several have it, write the kind before it: ``source:orders``.

    Raises:
        FeatureStoreError: Nothing, or more than one thing, has that name.
    """
    kind, name = _find(found, thing)
    reached = _reach((kind, name), found, upward=True) | _reach((kind, name), found, upward=False)
    return kind, [edge for edge in found if edge in reached]


def _find(found: list[Edge], thing: str) -> tuple[Kind, str]:
    nodes = {(e.origin_kind, e.origin) for e in found} | {(e.made_kind, e.made) for e in found}
    wanted, _, name = thing.rpartition(":")
    matching = sorted(n for n in nodes if n[1] == name and wanted in ("", n[0]))
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise FeatureStoreError(
            f"{thing!r} names several things: {', '.join(kind for kind, _ in matching)}",
            fix=f"write the kind before it, for example {matching[0][0]}:{name}",
        )
    raise FeatureStoreError(
        f"there is nothing called {thing!r}",
        fix=f"known: {', '.join(sorted({node for _, node in nodes}))}",
    )


def _reach(start: tuple[Kind, str], found: list[Edge], *, upward: bool) -> set[Edge]:
    reached: set[Edge] = set()
    done: set[tuple[Kind, str]] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node in done:
            continue
        done.add(node)
        for edge in found:
            origin, made = (edge.origin_kind, edge.origin), (edge.made_kind, edge.made)
            here, there = (made, origin) if upward else (origin, made)
            if here == node:
                reached.add(edge)
                waiting.append(there)
    return reached


def _edge(origin_kind: Kind, origin: str, made_kind: Kind, made: str) -> Edge:
    return Edge(origin_kind=origin_kind, origin=origin, made_kind=made_kind, made=made)

"""What the ledger can be asked to read: each a function that gives a SELECT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from mlops_ray.metadata.records import MIRRORED
from mlops_ray.metadata.schema import EVENTS, FIRINGS, KEYS, LEASES, LINKS, RUNS, STEPS

_DONE = ("succeeded", "cached")


def run(run_id: str) -> Any:
    """Select a run."""
    return sa.select(RUNS).where(RUNS.c.run_id == run_id)


def runs(given: Mapping[str, Any], limit: int | None) -> Any:
    """Select runs, newest first."""
    query = sa.select(RUNS).order_by(RUNS.c.started_at.desc(), RUNS.c.run_id.desc()).limit(limit)
    return _where(query, RUNS, given)


def unmirrored() -> Any:
    """Select the runs that are over and have no ``mirrored`` event that tells the same end."""
    told = (
        sa.select(EVENTS.c.id)
        .where((EVENTS.c.run_id == RUNS.c.run_id) & (EVENTS.c.kind == MIRRORED))
        .where(EVENTS.c.data.contains(RUNS.c.ended_at))
    )
    return (
        sa.select(RUNS)
        .where(RUNS.c.ended_at.is_not(None) & ~told.exists())
        .order_by(RUNS.c.started_at, RUNS.c.run_id)
    )


def steps(run_id: str) -> Any:
    """Select a run's steps in the order of the plan."""
    where = (STEPS.c.run_id == run_id) & (STEPS.c.item == -1)
    return sa.select(STEPS).where(where).order_by(STEPS.c.position, STEPS.c.name)


def steps_of(run_ids: Sequence[str]) -> Any:
    """Select the steps of many runs, without the calls of mapped ones."""
    where = STEPS.c.run_id.in_(run_ids) & (STEPS.c.item == -1)
    return sa.select(STEPS).where(where).order_by(STEPS.c.run_id, STEPS.c.position, STEPS.c.name)


def calls_of(run_ids: Sequence[str]) -> Any:
    """Select the calls of mapped steps, of many runs, that gave something."""
    gave = (STEPS.c.item >= 0) & STEPS.c.output.is_not(None)
    return sa.select(STEPS).where(STEPS.c.run_id.in_(run_ids) & gave)


def items(run_id: str, step: str) -> Any:
    """Select the calls of a mapped step."""
    where = (STEPS.c.run_id == run_id) & (STEPS.c.name == step) & (STEPS.c.item >= 0)
    return sa.select(STEPS).where(where).order_by(STEPS.c.item)


def cached(keys: Sequence[str]) -> Any:
    """Select, for each key, the newest finished step with it."""
    return _cached().params(keys=list(keys))


@cache
def _cached() -> Any:
    # A driver asks once a step: to make this statement takes ten times as long as to run it.
    place = sa.func.row_number().over(partition_by=STEPS.c.key, order_by=_newest())
    wanted = STEPS.c.key.in_(sa.bindparam("keys", expanding=True))
    found = (
        sa.select(STEPS, place.label("place")).where(wanted & STEPS.c.status.in_(_DONE)).subquery()
    )
    return sa.select(*(found.c[column.name] for column in STEPS.c)).where(found.c.place == 1)


def latest(project: str, step: str) -> Any:
    """Select the newest finished step of this name in any run of a project."""
    return (
        sa.select(STEPS)
        .join(RUNS, RUNS.c.run_id == STEPS.c.run_id)
        .where((RUNS.c.project == project) & (STEPS.c.name == step) & (STEPS.c.item == -1))
        .where(STEPS.c.status.in_(_DONE))
        .order_by(*_newest())
        .limit(1)
    )


def parts_of(keys: Sequence[str]) -> Any:
    """Select what cache keys were made of."""
    return sa.select(KEYS).where(KEYS.c.key.in_(keys))


def links(given: Mapping[str, Any]) -> Any:
    """Select what steps have read and written by name."""
    return _where(sa.select(LINKS).order_by(*LINKS.primary_key.columns), LINKS, given)


def lease(name: str) -> Any:
    """Select a lease."""
    return sa.select(LEASES).where(LEASES.c.name == name)


def firings(given: Mapping[str, Any], not_like: str | None, begun: bool, limit: int) -> Any:
    """Select firings, newest first; only begun ones, none whose key begins so."""
    query = sa.select(FIRINGS).order_by(FIRINGS.c.at.desc(), FIRINGS.c.key).limit(limit)
    if not_like is not None:
        query = query.where(~FIRINGS.c.key.startswith(not_like, autoescape=True))
    if begun:
        query = query.where(FIRINGS.c.attempt > 0)
    return _where(query, FIRINGS, given)


def events(given: Mapping[str, Any], after: int, limit: int | None) -> Any:
    """Select events with a greater id, in the order of their ids."""
    query = sa.select(EVENTS).where(EVENTS.c.id > after).order_by(EVENTS.c.id).limit(limit)
    return _where(query, EVENTS, given)


QUERIES: dict[str, Callable[..., Any]] = {
    query.__name__: query
    for query in (
        run,
        runs,
        unmirrored,
        steps,
        steps_of,
        calls_of,
        items,
        cached,
        latest,
        parts_of,
        links,
        lease,
        firings,
        events,
    )
}


def _newest() -> tuple[Any, ...]:
    return (STEPS.c.ended_at.desc().nulls_last(), STEPS.c.run_id.desc(), STEPS.c.item.desc())


def _where(query: Any, table: sa.Table, given: Mapping[str, Any]) -> Any:
    for name, value in given.items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query

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


def runs(given: Mapping[str, Any], limit: int) -> Any:
    """Select runs, newest first."""
    query = sa.select(RUNS).order_by(RUNS.c.started_at.desc(), RUNS.c.run_id.desc()).limit(limit)
    return _where(query, RUNS, given)


def unmirrored() -> Any:
    """Select the runs that are over and have no ``mirrored`` event since they ended."""
    last = (
        sa.select(EVENTS.c.run_id, sa.func.max(EVENTS.c.at).label("at"))
        .where(EVENTS.c.kind == MIRRORED)
        .group_by(EVENTS.c.run_id)
        .subquery()
    )
    return (
        sa.select(RUNS)
        .outerjoin(last, last.c.run_id == RUNS.c.run_id)
        .where(RUNS.c.ended_at.is_not(None))
        .where(last.c.at.is_(None) | (last.c.at < RUNS.c.ended_at))
        .order_by(RUNS.c.started_at, RUNS.c.run_id)
    )


def steps(run_id: str) -> Any:
    """Select a run's steps in the order of the plan."""
    where = (STEPS.c.run_id == run_id) & (STEPS.c.item == -1)
    return sa.select(STEPS).where(where).order_by(STEPS.c.position, STEPS.c.name)


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


def produced(digest: str) -> Any:
    """Select the steps and calls that ran and gave the artifact of this digest, oldest first."""
    where = STEPS.c.output.contains(digest, autoescape=True) & (STEPS.c.status == "succeeded")
    return sa.select(STEPS).where(where).order_by(STEPS.c.ended_at, STEPS.c.run_id, STEPS.c.item)


def key_parts(key: str) -> Any:
    """Select what a cache key was made of."""
    return sa.select(KEYS).where(KEYS.c.key == key)


def links(given: Mapping[str, Any]) -> Any:
    """Select what steps have read and written by name."""
    return _where(sa.select(LINKS).order_by(*LINKS.primary_key.columns), LINKS, given)


def lease(name: str) -> Any:
    """Select a lease."""
    return sa.select(LEASES).where(LEASES.c.name == name)


def firings(given: Mapping[str, Any], limit: int) -> Any:
    """Select firings, newest first."""
    query = sa.select(FIRINGS).order_by(FIRINGS.c.at.desc(), FIRINGS.c.key).limit(limit)
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
        items,
        cached,
        latest,
        produced,
        key_parts,
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

"""What the ledger can be asked to write: each a function of a connection inside a transaction.

Arguments and replies are plain values, so that a request can travel to the process that writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata.records import Lease
from mlops_ray.metadata.rows import Batch, cell, encode, now
from mlops_ray.metadata.schema import EVENTS, FIRINGS, LEASES, METADATA, REQUESTS, RUNS, STEPS

_IDENTITY = ("run_id", "name", "item")
_EVENTS_LOCK = 0x6D6C6F7073
_REMEMBERED = timedelta(minutes=10)

_HELD = (
    sa.select(LEASES.c.owner, LEASES.c.token)
    .where(LEASES.c.name == sa.bindparam("lease"))
    .with_for_update(read=True)
)

Fence = tuple[str, int]
"""Name and token of a lease."""


class Request(NamedTuple):
    """An operation and its arguments.

    ``id`` is remembered with the reply, so that a request that is sent again because its reply was
    lost is answered and not done twice; without one nothing is remembered.
    """

    operation: str
    arguments: tuple[Any, ...]
    id: str = ""
    again: bool = False


def perform(connection: sa.Connection, request: Request) -> Any:
    """Do what a request asks for, unless it has been done; return the reply.

    Raises:
        LedgerError: The operation is refused.
    """
    if request.again:
        query = sa.select(REQUESTS.c.reply).where(REQUESTS.c.id == request.id)
        if done := connection.execute(query).one_or_none():
            return json.loads(done.reply)
    reply = OPERATIONS[request.operation](connection, *request.arguments)
    if request.id:
        values = {"id": request.id, "at": now(), "reply": json.dumps(reply)}
        connection.execute(REQUESTS.insert(), values)
    return reply


def forget_requests(connection: sa.Connection) -> None:
    """Forget requests that nobody will send again."""
    before = cell(datetime.now(UTC) - _REMEMBERED)
    connection.execute(REQUESTS.delete().where(REQUESTS.c.at < before))


def start_run(connection: sa.Connection, run: dict[str, Any], names: Sequence[str]) -> None:
    """Record a new run whose steps are all pending."""
    known = sa.select(RUNS.c.owner).where(RUNS.c.run_id == run["run_id"])
    if connection.execute(known).one_or_none() is not None:
        raise LedgerError("the run is in the ledger already", where=f"run {run['run_id']}")
    connection.execute(RUNS.insert(), run)
    rows = [
        {"run_id": run["run_id"], "name": name, "position": position, "status": "pending"}
        for position, name in enumerate(names)
    ]
    if rows:
        connection.execute(STEPS.insert(), rows)


def resume_run(
    connection: sa.Connection, run_id: str, owner: str, provenance: str, fence: Fence | None
) -> None:
    """Make a run ``owner``'s: running again."""
    _enforce(connection, fence)
    values = {"status": "running", "owner": owner, "ended_at": None, "provenance": provenance}
    connection.execute(RUNS.update().where(RUNS.c.run_id == run_id).values(**values))


def finish_run(connection: sa.Connection, run_id: str, status: str, fence: Fence | None) -> None:
    """Set a run's status and its end."""
    _enforce(connection, fence)
    values = {"status": status, "ended_at": now()}
    connection.execute(RUNS.update().where(RUNS.c.run_id == run_id).values(**values))


def apply(connection: sa.Connection, batches: Sequence[Batch], fence: Fence | None) -> None:
    """Write a batch of rows under a fence."""
    _enforce(connection, fence)
    dialect = connection.dialect.name
    for table, columns, rows in batches:
        if table == "steps":
            _write_steps(connection, columns, rows)
        elif table == "events":
            _write_events(connection, rows)
        else:
            connection.execute(_insert_new(dialect, table), rows)


def _write_steps(
    connection: sa.Connection, columns: tuple[str, ...], rows: list[dict[str, Any]]
) -> None:
    if "status" not in columns:
        rows = [{**row, "status": "pending"} for row in rows]
    connection.execute(_upsert_steps(connection.dialect.name, columns), rows)


def _write_events(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    if connection.dialect.name == "postgresql":
        # Ids are given before the commit. Whoever holds this lock until then commits them in their
        # order, so that one who reads on from the last id has not missed a smaller one.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_EVENTS_LOCK)))
    moment = now()
    connection.execute(EVENTS.insert(), [{**row, "at": moment} for row in rows])


def acquire(
    connection: sa.Connection, name: str, owner: str, ttl_s: float, dead: int | None
) -> dict[str, Any]:
    """Take a lease, also one that is held with the token ``dead``; return its row."""
    moment = _clock(connection)
    lease = Lease(name=name, owner=owner, token=1, expires_at=moment + timedelta(seconds=ttl_s))
    if _add(connection, "leases", encode(lease)):
        return encode(lease)
    held = Lease(**_lock_lease(connection, name))
    if held.token != dead and held.owner != owner and held.expires_at > moment:
        raise LeaseError(
            f"{name} belongs to another process",
            where=held.owner,
            why=f"its lease runs until {held.expires_at:%H:%M:%S} UTC unless renewed",
            fix="wait for it to end, or stop that process",
            lease=held,
        )
    row = encode(lease.model_copy(update={"token": held.token + 1}))
    connection.execute(LEASES.update().where(LEASES.c.name == name).values(row))
    return row


def renew(connection: sa.Connection, fence: Fence, ttl_s: float) -> str:
    """Hold a lease for longer; return until when."""
    _lock_lease(connection, fence[0])
    _enforce(connection, fence)
    expires = str(cell(_clock(connection) + timedelta(seconds=ttl_s)))
    connection.execute(LEASES.update().where(LEASES.c.name == fence[0]).values(expires_at=expires))
    return expires


def release(connection: sa.Connection, fence: Fence) -> None:
    """Give a lease back, if it is still ours."""
    where = (LEASES.c.name == fence[0]) & (LEASES.c.token == fence[1])
    expires = cell(_clock(connection))
    connection.execute(LEASES.update().where(where).values(expires_at=expires))


def fire(
    connection: sa.Connection,
    firing: dict[str, Any],
    events: list[dict[str, Any]],
    fence: Fence | None,
) -> bool:
    """Record a firing, and the events where it is new; say whether it is."""
    _enforce(connection, fence)
    new = _add(connection, "firings", firing)
    if new and events:
        _write_events(connection, events)
    return new


def update_firing(
    connection: sa.Connection,
    key: str,
    values: dict[str, Any],
    events: list[dict[str, Any]],
    fence: Fence | None,
) -> None:
    """Change columns of a firing, and append events."""
    _enforce(connection, fence)
    connection.execute(FIRINGS.update().where(FIRINGS.c.key == key).values(**values))
    if events:
        _write_events(connection, events)


OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        start_run,
        resume_run,
        finish_run,
        apply,
        acquire,
        renew,
        release,
        fire,
        update_firing,
    )
}


def _enforce(connection: sa.Connection, fence: Fence | None) -> None:
    """Refuse to write under a lease that has another owner; keep it from changing hands."""
    if fence is None:
        return
    name, token = fence
    row = connection.execute(_HELD, {"lease": name}).one_or_none()
    if row is None or row.token != token:
        raise LeaseError(
            f"{name} was taken over by another process",
            where=row.owner if row else "",
            why="this process did not renew its lease in time",
            fix="nothing: the other process carries on",
        )


def _lock_lease(connection: sa.Connection, name: str) -> dict[str, Any]:
    query = sa.select(LEASES).where(LEASES.c.name == name).with_for_update()
    row = connection.execute(query).mappings().one_or_none()
    return dict(row) if row is not None else {}


def _clock(connection: sa.Connection) -> datetime:
    """Return the moment by the one clock that all who write to this database go by."""
    if connection.dialect.name != "postgresql":
        return datetime.now(UTC)
    moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(UTC)


def _add(connection: sa.Connection, table: str, row: dict[str, Any]) -> bool:
    """Insert a row, unless its key is there; say whether it was not."""
    insert = _insert_new(connection.dialect.name, table)
    done = connection.execute(insert, row, execution_options={"preserve_rowcount": True})
    return bool(done.rowcount == 1)


@cache
def _insert_new(dialect: str, table: str) -> Any:
    return _insert(dialect, METADATA.tables[table]).on_conflict_do_nothing()


@cache
def _upsert_steps(dialect: str, columns: tuple[str, ...]) -> Any:
    insert = _insert(dialect, STEPS)
    if not columns:
        return insert.on_conflict_do_nothing()
    changed = {name: insert.excluded[name] for name in columns}
    return insert.on_conflict_do_update(index_elements=_IDENTITY, set_=changed)


def _insert(dialect: str, table: sa.Table) -> Any:
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)

"""The ledger: runs, their steps, and an append-only list of events, in SQL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mlops_ray.config.base import Frozen
from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata.records import (
    MIRRORED,
    Event,
    Firing,
    Lease,
    Link,
    NewEvent,
    NewKey,
    RunRecord,
    RunStatus,
    StepChange,
    StepRecord,
    Write,
)
from mlops_ray.metadata.schema import (
    EVENTS,
    FIRINGS,
    KEYS,
    LEASES,
    LINKS,
    METADATA,
    RUNS,
    STEPS,
)

_DONE = ("succeeded", "cached")
_KEYS_PER_QUERY = 500


class Ledger:
    """The ledger at a SQLAlchemy URL: SQLite (WAL mode, waits for other writers) or PostgreSQL.

    Every method is one transaction: it happens whole or not at all, and on return it is durable.

    Args:
        url: For example ``sqlite:////home/me/project/.mlops-ray/ledger.db``.
    """

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)
        try:
            self._open()
        except (OSError, sa.exc.DatabaseError) as error:
            cause = getattr(error, "orig", None) or error
            raise LedgerError(
                "the ledger cannot be opened",
                where=str(self._engine.url),
                why=str(cause),
                fix="check that its folder can be written and that the file is a ledger; to begin "
                "anew, set MLOPS_RAY_HOME to another folder",
            ) from error

    def _open(self) -> None:
        if self._engine.dialect.name == "sqlite":
            if self._engine.url.database:
                Path(self._engine.url.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        try:
            METADATA.create_all(self._engine)
        except sa.exc.OperationalError:
            # Another process made the tables between our look and our statement.
            METADATA.create_all(self._engine)

    # Writing

    def start_run(self, record: RunRecord, steps: Sequence[str]) -> None:
        """Record a new run whose steps are all pending."""
        rows = [
            {"run_id": record.run_id, "name": name, "position": position, "status": "pending"}
            for position, name in enumerate(steps)
        ]
        with self._writing() as connection:
            connection.execute(RUNS.insert().values(_encode(record)))
            if rows:
                connection.execute(STEPS.insert(), rows)

    def resume_run(self, run_id: str, owner: str, provenance: dict[str, Any]) -> None:
        """Make a run that is over, or whose owner is gone, ``owner``'s: running again."""
        values = {"status": "running", "owner": owner, "ended_at": None}
        with self._writing() as connection:
            statement = RUNS.update().where(RUNS.c.run_id == run_id)
            connection.execute(statement.values(**values, provenance=_cell(provenance)))

    def finish_run(self, run_id: str, status: RunStatus, *, fence: Lease | None = None) -> None:
        """Set a run's status and its end.

        Raises:
            LeaseError: The fence is no longer ours.
        """
        values = {"status": status, "ended_at": now()}
        with self._writing() as connection:
            _enforce(connection, fence)
            connection.execute(RUNS.update().where(RUNS.c.run_id == run_id).values(**values))

    def apply(self, writes: Iterable[Write], *, fence: Lease | None = None) -> None:
        """Write a batch in one transaction, in order.

        Raises:
            LeaseError: The fence is no longer ours: nothing was written.
        """
        with self._writing() as connection:
            _enforce(connection, fence)
            for kind, group in _runs_of_one_kind(writes):
                _WRITERS[kind](connection, group)

    def append(
        self,
        project: str,
        kind: str,
        data: dict[str, Any],
        *,
        run_id: str | None = None,
        step: str | None = None,
    ) -> None:
        """Append an event. Events are never changed or removed."""
        self.apply([NewEvent(project=project, kind=kind, data=data, run_id=run_id, step=step)])

    # Leases

    def acquire(self, name: str, owner: str, ttl_s: float, *, force: bool = False) -> Lease:
        """Take the lease of that name, if it is free, has expired, or ``force`` says that its owner
        is known to be dead. The token is greater than every earlier one.

        Raises:
            LeaseError: Another owner holds it; ``lease`` in the error says who, until when.
        """
        moment = datetime.now(UTC)
        lease = Lease(name=name, owner=owner, token=1, expires_at=moment + timedelta(seconds=ttl_s))
        with self._writing() as connection:
            inserted = connection.execute(self._insert_new(LEASES, _encode(lease))).rowcount
            if inserted == 1:
                return lease
            query = sa.select(LEASES).where(LEASES.c.name == name).with_for_update()
            held = Lease(**dict(connection.execute(query).mappings().one()))
            if not force and held.owner != owner and held.expires_at > moment:
                raise LeaseError(
                    f"{name} belongs to another process",
                    where=held.owner,
                    why=f"its lease runs until {held.expires_at:%H:%M:%S} UTC unless renewed",
                    fix="wait for it to end, or stop that process",
                    lease=held,
                )
            lease = lease.model_copy(update={"token": held.token + 1})
            connection.execute(LEASES.update().where(LEASES.c.name == name).values(_encode(lease)))
        return lease

    def renew(self, lease: Lease, ttl_s: float) -> Lease:
        """Hold a lease for another ``ttl_s`` seconds from now.

        Raises:
            LeaseError: Another owner has taken it.
        """
        expires = datetime.now(UTC) + timedelta(seconds=ttl_s)
        with self._writing() as connection:
            _enforce(connection, lease)
            statement = LEASES.update().where(LEASES.c.name == lease.name)
            connection.execute(statement.values(expires_at=_cell(expires)))
        return lease.model_copy(update={"expires_at": expires})

    def release(self, lease: Lease) -> None:
        """Give a lease back, if it is still ours. Its token is remembered."""
        where = (LEASES.c.name == lease.name) & (LEASES.c.token == lease.token)
        with self._writing() as connection:
            connection.execute(LEASES.update().where(where).values(expires_at=now()))

    def lease(self, name: str) -> Lease | None:
        """Return a lease as it is, expired or not; None where nobody ever took it."""
        rows = self._rows(sa.select(LEASES).where(LEASES.c.name == name))
        return Lease(**rows[0]) if rows else None

    # Firings

    def fire(self, firing: Firing) -> bool:
        """Record that a trigger has fired; False where this occasion has been recorded already."""
        with self._writing() as connection:
            done = connection.execute(self._insert_new(FIRINGS, _encode(firing)))
            return bool(done.rowcount == 1)

    def update_firing(self, key: str, **values: Any) -> None:
        """Change fields of a firing."""
        encoded = {name: _cell(value) for name, value in values.items()}
        with self._writing() as connection:
            connection.execute(FIRINGS.update().where(FIRINGS.c.key == key).values(**encoded))

    def firings(
        self,
        *,
        project: str | None = None,
        trigger: str | None = None,
        status: str | None = None,
        limit: int = 100,
    ) -> list[Firing]:
        """Return firings, newest first."""
        query = sa.select(FIRINGS).order_by(FIRINGS.c.at.desc(), FIRINGS.c.key).limit(limit)
        given = {"project": project, "trigger": trigger, "status": status}
        return [Firing(**_decode(row)) for row in self._rows(_where(query, FIRINGS, given))]

    # Reading

    def run(self, run_id: str) -> RunRecord | None:
        """Return a run, or None."""
        rows = self._rows(sa.select(RUNS).where(RUNS.c.run_id == run_id))
        return RunRecord(**_decode(rows[0])) if rows else None

    def runs(
        self,
        *,
        project: str | None = None,
        workflow: str | None = None,
        config_digest: str | None = None,
        limit: int = 20,
    ) -> list[RunRecord]:
        """Return runs, newest first."""
        query = sa.select(RUNS).order_by(RUNS.c.started_at.desc()).limit(limit)
        given = {"project": project, "workflow": workflow, "config_digest": config_digest}
        return [RunRecord(**_decode(row)) for row in self._rows(_where(query, RUNS, given))]

    def unmirrored(self) -> list[RunRecord]:
        """Return the runs that are over and have no ``mirrored`` event since they ended."""
        last = (
            sa.select(EVENTS.c.run_id, sa.func.max(EVENTS.c.at).label("at"))
            .where(EVENTS.c.kind == MIRRORED)
            .group_by(EVENTS.c.run_id)
            .subquery()
        )
        query = (
            sa.select(RUNS)
            .outerjoin(last, last.c.run_id == RUNS.c.run_id)
            .where(RUNS.c.ended_at.is_not(None))
            .where(last.c.at.is_(None) | (last.c.at < RUNS.c.ended_at))
            .order_by(RUNS.c.started_at)
        )
        return [RunRecord(**_decode(row)) for row in self._rows(query)]

    def steps(self, run_id: str) -> list[StepRecord]:
        """Return a run's steps in the order of the plan, without the calls of mapped ones."""
        where = (STEPS.c.run_id == run_id) & (STEPS.c.item == -1)
        query = sa.select(STEPS).where(where).order_by(STEPS.c.position)
        return [StepRecord(**_decode(row)) for row in self._rows(query)]

    def items(self, run_id: str, step: str) -> list[StepRecord]:
        """Return the calls of a mapped step, in the order of its list."""
        where = (STEPS.c.run_id == run_id) & (STEPS.c.name == step) & (STEPS.c.item >= 0)
        query = sa.select(STEPS).where(where).order_by(STEPS.c.item)
        return [StepRecord(**_decode(row)) for row in self._rows(query)]

    def cached(self, keys: Iterable[str]) -> dict[str, StepRecord]:
        """Return, for each of the keys that has one, the newest finished step with it."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, StepRecord] = {}
        for start in range(0, len(wanted), _KEYS_PER_QUERY):
            some = wanted[start : start + _KEYS_PER_QUERY]
            where = STEPS.c.key.in_(some) & STEPS.c.status.in_(_DONE)
            query = sa.select(STEPS).where(where).order_by(STEPS.c.ended_at)
            for row in self._rows(query):
                found[row["key"]] = StepRecord(**_decode(row))
        return found

    def latest(self, project: str, step: str) -> StepRecord | None:
        """Return the newest finished step of this name in any run of a project, or None."""
        query = (
            sa.select(STEPS)
            .join(RUNS, RUNS.c.run_id == STEPS.c.run_id)
            .where((RUNS.c.project == project) & (STEPS.c.name == step) & (STEPS.c.item == -1))
            .where(STEPS.c.status.in_(_DONE))
            .order_by(STEPS.c.ended_at.desc())
            .limit(1)
        )
        rows = self._rows(query)
        return StepRecord(**_decode(rows[0])) if rows else None

    def key_parts(self, key: str) -> dict[str, Any] | None:
        """Return what a cache key was made of, or None."""
        rows = self._rows(sa.select(KEYS).where(KEYS.c.key == key))
        return json.loads(rows[0]["parts"]) if rows else None

    def links(
        self,
        *,
        run_id: str | None = None,
        kind: str | None = None,
        name: str | None = None,
        direction: str | None = None,
    ) -> list[Link]:
        """Return what steps have read and written by name."""
        given = {"run_id": run_id, "kind": kind, "name": name, "direction": direction}
        return [Link(**row) for row in self._rows(_where(sa.select(LINKS), LINKS, given))]

    def produced(self, digest: str) -> list[StepRecord]:
        """Return the steps and calls that ran and gave the artifact of this digest, oldest first."""
        text = sa.func.instr if self._engine.dialect.name == "sqlite" else sa.func.strpos
        where = (text(STEPS.c.output, digest) > 0) & (STEPS.c.status == "succeeded")
        query = sa.select(STEPS).where(where).order_by(STEPS.c.ended_at)
        return [StepRecord(**_decode(row)) for row in self._rows(query)]

    def events(
        self,
        *,
        project: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Event]:
        """Return events with an id greater than ``after``, in the order of their ids.

        On PostgreSQL ids are given before the commit: an event may show up after one of a greater id.
        """
        query = sa.select(EVENTS).where(EVENTS.c.id > after).order_by(EVENTS.c.id).limit(limit)
        given = {"project": project, "run_id": run_id, "kind": kind}
        return [Event(**_decode(row)) for row in self._rows(_where(query, EVENTS, given))]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _rows(self, query: Any) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _writing(self) -> AbstractContextManager[sa.Connection]:
        return self._engine.execution_options(writes=True).begin()

    def _insert_new(self, table: sa.Table, values: dict[str, Any]) -> Any:
        return _insert_of(self._engine.dialect.name, table).values(values).on_conflict_do_nothing()


def now() -> str:
    """Return this moment as ISO 8601 in UTC, to the microsecond; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _enforce(connection: sa.Connection, fence: Lease | None) -> None:
    """Refuse to write under a lease that has another owner by now; keep it from changing hands."""
    if fence is None:
        return
    query = sa.select(LEASES.c.owner, LEASES.c.token).where(LEASES.c.name == fence.name)
    row = connection.execute(query.with_for_update(read=True)).one_or_none()
    if row is None or row.token != fence.token:
        raise LeaseError(
            f"{fence.name} was taken over by another process",
            where=row.owner if row else "",
            why="this process did not renew its lease in time",
            fix="nothing: the other process carries on",
        )


def _runs_of_one_kind(writes: Iterable[Write]) -> Iterable[tuple[type, list[Any]]]:
    group: list[Any] = []
    for write in writes:
        if group and type(write) is not type(group[0]):
            yield type(group[0]), group
            group = []
        group.append(write)
    if group:
        yield type(group[0]), group


def _write_events(connection: sa.Connection, events: list[NewEvent]) -> None:
    moment = now()
    rows = [{**_encode(event), "at": moment} for event in events]
    connection.execute(EVENTS.insert(), rows)


def _write_steps(connection: sa.Connection, changes: list[StepChange]) -> None:
    key = ("run_id", "name", "item")
    for change in changes:
        values = {name: _cell(value) for name, value in change.values.items()}
        identity = {"run_id": change.run_id, "name": change.name, "item": change.item}
        insert = _insert_of(connection.dialect.name, STEPS).values(
            **({"status": "pending"} | identity | values)
        )
        connection.execute(insert.on_conflict_do_update(index_elements=key, set_=values))


def _write_keys(connection: sa.Connection, keys: list[NewKey]) -> None:
    insert = _insert_of(connection.dialect.name, KEYS).on_conflict_do_nothing()
    connection.execute(insert, [_encode(key) for key in keys])


def _write_links(connection: sa.Connection, links: list[Link]) -> None:
    insert = _insert_of(connection.dialect.name, LINKS).on_conflict_do_nothing()
    connection.execute(insert, [_encode(link) for link in links])


_WRITERS: dict[type, Any] = {
    NewEvent: _write_events,
    StepChange: _write_steps,
    NewKey: _write_keys,
    Link: _write_links,
}


def _insert_of(dialect: str, table: sa.Table) -> Any:
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)


def _where(query: Any, table: sa.Table, given: dict[str, Any]) -> Any:
    for name, value in given.items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads before it writes must have the write lock from the start: taking it
    # later fails at once, without waiting, where another process has written in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


_JSON = ("config", "provenance", "metrics", "params", "data", "output")


def _cell(value: Any) -> Any:
    if isinstance(value, Frozen):
        return value.model_dump_json()
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    return json.dumps(value, default=str) if isinstance(value, dict | list) else value


def _encode(record: Frozen) -> dict[str, Any]:
    return {name: _cell(getattr(record, name)) for name in type(record).model_fields}


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.loads(value) if name in _JSON and isinstance(value, str) else value
        for name, value in row.items()
    }

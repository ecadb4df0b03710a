"""The ledger: runs, their steps, and an append-only list of events, in SQL."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.artifacts import ArtifactRef

RunStatus = Literal["running", "succeeded", "failed", "interrupted"]
MIRRORED = "mirrored"
"""The kind of event that says that a run is in MLflow."""

StepStatus = Literal["pending", "running", "succeeded", "cached", "skipped", "failed"]

_METADATA = sa.MetaData()

_RUNS = sa.Table(
    "runs",
    _METADATA,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("project", sa.String, nullable=False, index=True),
    sa.Column("workflow", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("config_digest", sa.String, nullable=False),
    sa.Column("started_at", sa.String, nullable=False),
    sa.Column("ended_at", sa.String),
    sa.Column("owner", sa.String, nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("provenance", sa.Text, nullable=False),
)

_STEPS = sa.Table(
    "steps",
    _METADATA,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("key", sa.String, index=True),
    sa.Column("output", sa.Text),
    sa.Column("started_at", sa.String),
    sa.Column("ended_at", sa.String),
    sa.Column("rows", sa.Integer),
    sa.Column("message", sa.Text),
    sa.Column("metrics", sa.Text, nullable=False, default="{}"),
    sa.Column("params", sa.Text, nullable=False, default="{}"),
)

_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("project", sa.String, nullable=False, index=True),
    sa.Column("run_id", sa.String, index=True),
    sa.Column("step", sa.String),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
)


class RunRecord(Frozen):
    """One run of a workflow."""

    run_id: str
    project: str
    workflow: str
    status: RunStatus
    config_digest: str
    started_at: Instant
    ended_at: Instant | None
    owner: str
    config: dict[str, Any]
    provenance: dict[str, Any]


class StepRecord(Frozen):
    """One step of a run: its state, its cache key, and the address of its output."""

    run_id: str
    name: str
    position: int
    status: StepStatus
    key: str | None
    output: ArtifactRef | None
    started_at: Instant | None
    ended_at: Instant | None
    rows: int | None
    message: str | None
    metrics: dict[str, float]
    params: dict[str, Any]


class Event(Frozen):
    """One fact: when, about what, and its data."""

    id: int
    at: Instant
    project: str
    run_id: str | None
    step: str | None
    kind: str
    data: dict[str, Any]


class Ledger:
    """The ledger at a SQLAlchemy URL. SQLite is opened in WAL mode and waits for other writers.

    Args:
        url: For example ``sqlite:////home/me/project/.mlops-ray/ledger.db``.
    """

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)
        try:
            self._open()
        except (OSError, sa.exc.DatabaseError) as error:
            cause = getattr(error, "orig", None) or error
            raise MlopsRayError(
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
        try:
            _METADATA.create_all(self._engine)
        except sa.exc.OperationalError:
            # Another process made the tables between our look and our statement.
            _METADATA.create_all(self._engine)

    def start_run(self, record: RunRecord, steps: list[str]) -> None:
        """Record a new run whose steps are all pending."""
        with self._engine.begin() as connection:
            connection.execute(_RUNS.insert().values(_encode(record)))
            for position, name in enumerate(steps):
                values = {"run_id": record.run_id, "name": name, "position": position}
                connection.execute(_STEPS.insert().values(**values, status="pending"))

    def finish_run(self, run_id: str, status: RunStatus) -> None:
        """Set a run's status and, unless it is running again, its end."""
        ended = None if status == "running" else now()
        self._update(_RUNS, _RUNS.c.run_id == run_id, {"status": status, "ended_at": ended})

    def take_run(self, seen: RunRecord, owner: str, provenance: dict[str, Any]) -> bool:
        """Make ``owner`` the process that carries a run on, with what it runs on now.

        False where the run is no longer as it was ``seen``: another process was faster.
        """
        values = {"status": "running", "owner": owner, "ended_at": None}
        unchanged = (
            (_RUNS.c.run_id == seen.run_id)
            & (_RUNS.c.owner == seen.owner)
            & (_RUNS.c.status == seen.status)
        )
        statement = _RUNS.update().where(unchanged).values(**values, provenance=_cell(provenance))
        with self._engine.begin() as connection:
            return bool(connection.execute(statement).rowcount == 1)

    def update_step(self, run_id: str, name: str, **values: Any) -> None:
        """Change columns of a step; ``output`` takes an ``ArtifactRef``."""
        where = (_STEPS.c.run_id == run_id) & (_STEPS.c.name == name)
        self._update(_STEPS, where, {key: _cell(value) for key, value in values.items()})

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
        values = {"at": now(), "project": project, "run_id": run_id, "step": step, "kind": kind}
        with self._engine.begin() as connection:
            connection.execute(_EVENTS.insert().values(**values, data=_cell(data)))

    def run(self, run_id: str) -> RunRecord | None:
        """Return a run, or None."""
        found = self._runs(_RUNS.c.run_id == run_id, 1)
        return found[0] if found else None

    def runs(
        self, *, project: str | None = None, workflow: str | None = None, limit: int = 20
    ) -> list[RunRecord]:
        """Return runs, newest first."""
        where: sa.ColumnElement[bool] = sa.true()
        if project is not None:
            where = where & (_RUNS.c.project == project)
        if workflow is not None:
            where = where & (_RUNS.c.workflow == workflow)
        return self._runs(where, limit)

    def unmirrored(self) -> list[RunRecord]:
        """Return the runs that are over and have no ``mirrored`` event since they ended."""
        last = (
            sa.select(_EVENTS.c.run_id, sa.func.max(_EVENTS.c.at).label("at"))
            .where(_EVENTS.c.kind == MIRRORED)
            .group_by(_EVENTS.c.run_id)
            .subquery()
        )
        query = (
            sa.select(_RUNS)
            .outerjoin(last, last.c.run_id == _RUNS.c.run_id)
            .where(_RUNS.c.ended_at.is_not(None))
            .where(last.c.at.is_(None) | (last.c.at < _RUNS.c.ended_at))
            .order_by(_RUNS.c.started_at)
        )
        return [RunRecord(**_decode(row)) for row in self._rows(query)]

    def steps(self, run_id: str) -> list[StepRecord]:
        """Return a run's steps in the order of the plan."""
        query = sa.select(_STEPS).where(_STEPS.c.run_id == run_id).order_by(_STEPS.c.position)
        return [StepRecord(**_decode(row)) for row in self._rows(query)]

    def cached(self, key: str) -> StepRecord | None:
        """Return the newest finished step with this key, or None."""
        query = (
            sa.select(_STEPS)
            .where((_STEPS.c.key == key) & _STEPS.c.status.in_(["succeeded", "cached"]))
            .order_by(_STEPS.c.ended_at.desc())
            .limit(1)
        )
        rows = self._rows(query)
        return StepRecord(**_decode(rows[0])) if rows else None

    def latest(self, project: str, step: str) -> StepRecord | None:
        """Return the newest finished step of this name in any run of a project, or None."""
        query = (
            sa.select(_STEPS)
            .join(_RUNS, _RUNS.c.run_id == _STEPS.c.run_id)
            .where((_RUNS.c.project == project) & (_STEPS.c.name == step))
            .where(_STEPS.c.status.in_(["succeeded", "cached"]))
            .order_by(_STEPS.c.ended_at.desc())
            .limit(1)
        )
        rows = self._rows(query)
        return StepRecord(**_decode(rows[0])) if rows else None

    def events(
        self, *, project: str | None = None, run_id: str | None = None, kind: str | None = None
    ) -> list[Event]:
        """Return events in the order in which they were appended."""
        query = sa.select(_EVENTS).order_by(_EVENTS.c.id)
        for column, value in (
            (_EVENTS.c.project, project),
            (_EVENTS.c.run_id, run_id),
            (_EVENTS.c.kind, kind),
        ):
            if value is not None:
                query = query.where(column == value)
        return [Event(**_decode(row)) for row in self._rows(query)]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _runs(self, where: Any, limit: int) -> list[RunRecord]:
        query = sa.select(_RUNS).where(where).order_by(_RUNS.c.started_at.desc()).limit(limit)
        return [RunRecord(**_decode(row)) for row in self._rows(query)]

    def _rows(self, query: Any) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _update(self, table: sa.Table, where: Any, values: dict[str, Any]) -> None:
        with self._engine.begin() as connection:
            connection.execute(table.update().where(where).values(**values))


def now() -> str:
    """Return this moment as ISO 8601 in UTC, to the microsecond; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _configure_sqlite(connection: Any, _record: Any) -> None:
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

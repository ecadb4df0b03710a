"""A ledger of an earlier version keeps its rows; one of a later version is left alone."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_server import PostgresServer

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.migration import revision_of, upgrade
from mlops_ray.metadata.schema import METADATA, REVISION

# What version 0.1 wrote, as SQLite's own .schema showed it.
FIRST = """
CREATE TABLE runs (
    run_id VARCHAR NOT NULL, project VARCHAR NOT NULL, workflow VARCHAR NOT NULL,
    status VARCHAR NOT NULL, config_digest VARCHAR NOT NULL, started_at VARCHAR NOT NULL,
    ended_at VARCHAR, owner VARCHAR NOT NULL, config TEXT NOT NULL, provenance TEXT NOT NULL,
    PRIMARY KEY (run_id)
);
CREATE INDEX ix_runs_project ON runs (project);
CREATE TABLE steps (
    run_id VARCHAR NOT NULL, name VARCHAR NOT NULL, position INTEGER NOT NULL,
    status VARCHAR NOT NULL, "key" VARCHAR, output TEXT, started_at VARCHAR, ended_at VARCHAR,
    rows INTEGER, message TEXT, metrics TEXT NOT NULL, params TEXT NOT NULL,
    PRIMARY KEY (run_id, name)
);
CREATE INDEX ix_steps_key ON steps ("key");
CREATE TABLE events (
    id INTEGER NOT NULL, at VARCHAR NOT NULL, project VARCHAR NOT NULL, run_id VARCHAR,
    step VARCHAR, kind VARCHAR NOT NULL, data TEXT NOT NULL, PRIMARY KEY (id)
);
CREATE INDEX ix_events_run_id ON events (run_id);
CREATE INDEX ix_events_project ON events (project);
INSERT INTO runs VALUES ('r1', 'shop', 'train', 'failed', 'c', '2026-01-01T00:00:00.000000+00:00',
    '2026-01-01T01:00:00.000000+00:00', 'host:1:2', '{"a": 1}', '{"commit": "abc"}');
INSERT INTO steps VALUES ('r1', 'fit', 1, 'succeeded', 'k',
    '{"digest": "d", "kind": "tree", "size": 3, "rows": null}',
    '2026-01-01T00:00:00.000000+00:00', '2026-01-01T00:30:00.000000+00:00', 7, NULL,
    '{"auc": 0.7}', '{}');
INSERT INTO steps VALUES ('r1', 'split', 0, 'cached', NULL, NULL, NULL, NULL, NULL, NULL, '{}', '{}');
INSERT INTO events VALUES (41, '2026-01-01T00:00:00.000000+00:00', 'shop', 'r1', 'fit', 'drift', '{}');
"""


@pytest.fixture
def old(tmp_path: Path) -> str:
    connection = sqlite3.connect(tmp_path / "ledger.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(FIRST)
    connection.close()
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def check_kept(ledger: Ledger) -> None:
    (run,) = ledger.runs()
    assert (run.run_id, run.reason, run.provenance) == ("r1", "by hand", {"commit": "abc"})
    split, fit = ledger.steps("r1")
    assert (split.name, split.status, split.item, split.attempt) == ("split", "cached", -1, 0)
    assert fit.output is not None
    assert (fit.rows, fit.metrics, fit.output.digest) == (7, {"auc": 0.7}, "d")
    assert ledger.cached(["k"])["k"] == fit
    assert [event.id for event in ledger.events()] == [41]


def test_a_ledger_of_the_first_version_keeps_its_rows_and_a_copy(old: str, tmp_path: Path) -> None:
    ledger = Ledger(old)
    check_kept(ledger)
    ledger.append("shop", "more", {})
    check = [event.id for event in ledger.events()]
    assert check == [41, 42]
    copy = sqlite3.connect(tmp_path / f"ledger.db.before-{REVISION}")
    assert copy.execute("SELECT name FROM steps ORDER BY position").fetchall() == [
        ("split",),
        ("fit",),
    ]
    assert "item" not in [row[1] for row in copy.execute("PRAGMA table_info(steps)")]
    copy.close()
    check_kept_again = Ledger(old)
    assert len(check_kept_again.events()) == 2


_OPEN = """
import sys
from mlops_ray.metadata.ledger import Ledger
Ledger(sys.argv[1]).append("shop", "opened", {})
"""


@pytest.mark.parametrize("kind", ["old", "new"])
def test_processes_that_open_it_at_once_upgrade_or_make_it_once(
    kind: str, old: str, tmp_path: Path
) -> None:
    url = old if kind == "old" else f"sqlite:///{tmp_path / 'other' / 'ledger.db'}"
    openers = [subprocess.Popen([sys.executable, "-c", _OPEN, url]) for _ in range(5)]
    assert [opener.wait(60) for opener in openers] == [0] * 5
    assert len(Ledger(url).events(kind="opened")) == 5


def test_a_later_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    Ledger(url).append("shop", "kept", {})
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerError, match="later version") as refused:
        Ledger(url)
    assert "9999" in refused.value.why
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        assert connection.execute("SELECT kind FROM events").fetchall() == [("kept",)]


def differences(engine: sa.Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        return list(compare_metadata(context, METADATA))


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
@pytest.mark.parametrize("way", ["made", "migrated"])
def test_the_tables_are_the_models(
    backend: str, way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    if backend == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.new_database()
    engine = sa.create_engine(url)
    if way == "migrated":
        with engine.begin() as connection:
            upgrade(connection)
    Database(url).close()
    with engine.connect() as connection:
        assert revision_of(connection) == REVISION
    assert differences(engine) == []
    engine.dispose()


def test_the_newest_migration_is_the_revision_of_the_models() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    import mlops_ray.metadata.migration as module

    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION

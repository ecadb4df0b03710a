"""Every store and every join engine, behind one interface each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from contract import world
from contract.ledgers import Ledgers, await_writer, empty
from redis_server import serve

from mlops_ray.config.features import Features
from mlops_ray.config.features import Online as Settings
from mlops_ray.features.columns import to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.join import join_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import EXPIRED, NOT_FOUND, NULL, PRESENT, OnlineStore, open_online
from mlops_ray.metadata.home import Home, Storage

STATUS = {PRESENT: "present", NULL: "null", NOT_FOUND: "not found", EXPIRED: "expired"}


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server of this session's own."""
    for server in serve(tmp_path_factory.mktemp("redis")):
        yield server.url


@dataclass(frozen=True)
class Online:
    """An online store that is looked up like the oracle."""

    features: Features
    store: OnlineStore

    def write(self, view: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, all in one call."""
        self.store.write(view, world.table(self.features, view, rows))

    def materialize(self, offline: OfflineStore, view: str) -> int:
        """Bring the view up to the offline store's newest version; return the rows written."""
        from mlops_ray.features.materialize import materialize_view

        return materialize_view(offline, self.store, view)

    def look_up(self, view: str, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """(value, status) of each feature for each key at its moment; timestamps in µs.

        All ways of reading have to agree, for all keys together and for each alone.
        """
        together = self._read(view, asked)
        alone = [self._read(view, [item])[0] for item in asked]
        for one, other in zip(together, alone, strict=True):
            assert all(_same(one[name], other[name]) for name in one), (one, other)
        return together

    def _read(self, view: str, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        definition = define(self.features, view)
        keys = [[_objects([item[key] for item in asked]) for key in definition.keys]]
        at_us = np.array([item["at"] for item in asked], np.int64)
        reader = self.store.reader([view])
        table, statuses = reader.read_table(keys, at_us)
        assert table.select(list(reader.names)).schema.types == [
            definition.schema.field(name).type for name in definition.feature_names
        ]
        _check_columns(table, reader.read_columns(keys, at_us))
        _check_matrix(table, reader.numeric_names, reader.read_values(keys, at_us))
        matrix, numeric = reader.read(keys, at_us)
        _check_matrix(table, reader.numeric_names, matrix)
        chosen = [reader.names.index(name) for name in reader.numeric_names]
        assert (statuses[:, chosen] == numeric).all()
        rows = [_plain(item) for item in table.to_pylist()]
        return [
            {
                name: (row[f"{view}__{name}"], STATUS[int(status)])
                for name, status in zip(definition.feature_names, told, strict=True)
            }
            for row, told in zip(rows, statuses, strict=True)
        ]


def _check_columns(table: pa.Table, columns: Mapping[str, Any]) -> None:
    for name, values in columns.items():
        due = table[name]
        if pa.types.is_string(due.type):
            assert values.tolist() == due.to_pylist()
        elif pa.types.is_timestamp(due.type):
            assert (values.view(np.int64) == _instants(due)).all()
        else:
            _check_matrix(table, [name], values[:, None])


def _check_matrix(table: pa.Table, names: Sequence[str], matrix: Any) -> None:
    for place, name in enumerate(names):
        due = table[name].cast(pa.float64(), safe=False).to_numpy()
        np.testing.assert_array_equal(matrix[:, place], due, err_msg=name)


def _instants(values: pa.ChunkedArray) -> Any:
    whole = values.cast(pa.int64()).to_pylist()
    return np.array([np.iinfo(np.int64).min if item is None else item for item in whole])


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: to_us(value) if isinstance(value, datetime) else value for name, value in row.items()
    }


def _same(one: tuple[Any, str], other: tuple[Any, str]) -> bool:
    return one[1] == other[1] and world.equal(one[0], other[0])


def _objects(values: list[Any]) -> Any:
    """Key values as serving gives them: whole numbers as int64, all else as objects."""
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.fixture(params=["lmdb", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Online]:
    """Open an empty online store of each kind; the same ``name`` is the same store."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    base = f"{request.node.name}-{time.time_ns()}"

    def open_named(features: Features, name: str = "one") -> Online:
        settings = {"store": request.param} | ({"url": url} if url else {})
        configured = features.model_copy(update={"online": Settings.model_validate(settings)})
        store = open_online(configured, tmp_path / "online" / name, f"{base}-{name}")
        return Online(configured, store)

    return open_named


Engine = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=["process", "ray"])
def on_ray(request: pytest.FixtureRequest) -> bool:
    """Where joins run: in process, and by tasks on Ray."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return bool(request.param == "ray")


@pytest.fixture
def engine(on_ray: bool) -> Engine:
    """The as-of join of a view with labels."""

    def join(
        features: Features,
        view: str,
        store: OfflineStore,
        labels: pa.Table,
        known_only: bool = True,
        version: int | None = None,
    ) -> list[dict[str, Any]]:
        offline = features.offline.model_copy(update={"known_only": known_only})
        changed = features.model_copy(update={"offline": offline})
        columns = join_view(changed, view, labels, "at", store, version, on_ray=on_ray)
        return world.plain(features, columns, view)

    return join


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut row groups, batches and jobs so small that few rows fill several of them."""
    monkeypatch.setattr("mlops_ray.features.files.GROUP_ROWS", 4)
    monkeypatch.setattr("mlops_ray.features.files.BATCH_ROWS", 3)
    monkeypatch.setattr("mlops_ray.features.join._JOB_LABELS", 3)


@pytest.fixture(scope="session")
def written_home(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose ledger has a writer that answers."""
    home = Home(tmp_path_factory.mktemp("written") / "home", Storage())
    await_writer(home)
    return home


@pytest.fixture(params=["sqlite", "postgresql", "writer"])
def ledgers(request: pytest.FixtureRequest, tmp_path: Path) -> Ledgers:
    """An empty ledger of each kind: opened directly, or through the writer of a Ray cluster."""
    if request.param == "writer":
        home = request.getfixturevalue("written_home")
        empty(home)
        return Ledgers(home, through_ray=True)
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    return Ledgers(Home(tmp_path / "home", Storage(ledger=url)), through_ray=False)

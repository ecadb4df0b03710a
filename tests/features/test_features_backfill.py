"""Backfill on disk gives the rows, to the bit, that a stream in memory would have made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.features import backfill, course
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.tables import write_tables

VIEWS = ("price", "shop_visits", "shelf_visits", "spent_by_shop")
MORE = {
    "price": {
        "entity": "shelf",
        "source": "prices",
        "event_time": "valid_from",
        "columns": {
            "price": "float",
            "stock": "int",
            "shop_again": "string",
            "known_at": "timestamp",
        },
    },
    # A view of a view that is itself backfilled.
    "spent_by_shop": {
        "entity": "shop",
        "view": "shelf_visits",
        "every": "2h",
        "windows": ["12h"],
        "aggregates": {
            "rows": {"by": "count"},
            "most": {"by": "max", "of": "visits_2h"},
            "shelves": {"by": "approx_distinct", "of": "shelf"},
        },
    },
}


@pytest.fixture
def big_shop(shop: SimpleNamespace) -> SimpleNamespace:
    features = shop.declare()
    views = features.model_dump(mode="json", exclude_unset=True)["views"] | MORE
    shop.features = shop.declare(views=views, offline={"buckets": 4})
    prices = shop.prices(2000, seed=5)
    shop.tables = {
        "visits": shop.visits(3000, seed=3),
        "prices": prices.append_column("shop_again", prices["shop"]),
    }
    return shop


def rows_of(
    root: Path, shop: SimpleNamespace, tables: Any, spread_rows: int, hours: list[float]
) -> dict[str, pa.Table]:
    offline = OfflineStore(root / "offline", shop.features)
    online = open_online(shop.features, root / "online", "shop")
    for hour in hours:
        pipeline = FeaturePipeline(shop.features, tables, offline, online, spread_rows=spread_rows)
        pipeline.advance(shop.hour(hour))
    found = {}
    for view in VIEWS:
        table = offline.read(view)
        keys = [name for name in ("shop", "shelf") if name in table.column_names]
        order = [(name, "ascending") for name in ("created_time", "event_time", *keys)]
        found[view] = table.sort_by(order).combine_chunks()
    return found


def agree(first: dict[str, pa.Table], second: dict[str, pa.Table]) -> None:
    for view in VIEWS:
        assert first[view].num_rows == second[view].num_rows > 20
        assert first[view].equals(second[view]), view


@pytest.fixture(autouse=True)
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without Ray, which an earlier test may have started, but in the test that asks for it."""
    if "ray_cluster" not in request.fixturenames:
        monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the views that were backfilled."""
    runs: list[str] = []
    compute = backfill.backfill

    def count(offline: Any, origin: Any, *rest: Any) -> Any:
        runs.append(origin.definition.name)
        return compute(offline, origin, *rest)

    monkeypatch.setattr(course, "backfill", count)
    return runs


@pytest.mark.parametrize("hours", [[120.0], [30.0, 80.5, 81.0, 120.0]])
def test_disk_and_memory_agree(
    tmp_path: Path, big_shop: SimpleNamespace, counted: list[str], hours: list[float]
) -> None:
    memory = rows_of(tmp_path / "memory", big_shop, big_shop.tables, 10**9, [120])
    assert counted == []
    disk = rows_of(tmp_path / "disk", big_shop, big_shop.tables, 300, hours)
    assert set(counted) == set(VIEWS)
    agree(memory, disk)
    assert not list((tmp_path / "disk/offline/.backfill").glob("*/plan.json"))


def test_online_follows_a_backfill(tmp_path: Path, big_shop: SimpleNamespace) -> None:
    matrices = []
    for name, spread_rows in (("memory", 10**9), ("disk", 300)):
        rows_of(tmp_path / name, big_shop, big_shop.tables, spread_rows, [70])
        online = open_online(big_shop.features, tmp_path / name / "online", "shop")
        keys = [np.array(["north", "süd", "ost", "west"], object)]
        now = np.full(4, int(big_shop.hour(70).timestamp()) * 1_000_000)
        matrices.append(online.read_matrix("shop_visits", keys, now))
    assert (matrices[0][1] == 0).any()
    np.testing.assert_array_equal(matrices[0][0], matrices[1][0])
    np.testing.assert_array_equal(matrices[0][1], matrices[1][1])


def test_more_parts_than_buckets(
    tmp_path: Path, big_shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = rows_of(tmp_path / "memory", big_shop, big_shop.tables, 10**9, [120])
    monkeypatch.setattr(backfill, "PART_ROWS", 50)
    monkeypatch.setattr("mlops_ray.features.pieces.PIECE_ROWS", 500)
    agree(memory, rows_of(tmp_path / "disk", big_shop, big_shop.tables, 300, [120]))


def test_ray_and_process_agree(
    ray_cluster: Any, tmp_path: Path, big_shop: SimpleNamespace, counted: list[str]
) -> None:
    folder = write_tables(tmp_path / "tables", big_shop.tables)
    memory = rows_of(tmp_path / "memory", big_shop, folder, 10**9, [120])
    spread = rows_of(tmp_path / "ray", big_shop, folder, 300, [50, 120])
    assert set(counted) == set(VIEWS)
    agree(memory, spread)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("after", [0, 1, 3, 5, 8])
@pytest.mark.parametrize("until", [120.0, 90.0])
def test_a_backfill_that_was_cut_short_goes_on(
    tmp_path: Path,
    big_shop: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    until: float,
) -> None:
    memory = rows_of(tmp_path / "memory", big_shop, big_shop.tables, 10**9, [120])
    calls: list[str] = []

    def cut(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if len(calls) == after:
                raise Killed
            calls.append(function.__name__)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(backfill, "spill", cut(backfill.spill))
        patch.setattr(backfill, "make_part", cut(backfill.make_part))
        with pytest.raises(Killed):
            rows_of(tmp_path / "disk", big_shop, big_shop.tables, 300, [until])
    done: list[str] = []
    make_part = backfill.make_part
    monkeypatch.setattr(
        backfill,
        "make_part",
        lambda *given: (done.append(given[1].definition.name), make_part(*given)),
    )
    again = rows_of(tmp_path / "disk", big_shop, big_shop.tables, 300, [120])
    agree(memory, again)
    if after > 1 and until == 120.0:
        # What the first attempt had made was not made again.
        parts = OfflineStore(tmp_path / "disk/offline", big_shop.features).buckets("price")
        assert done.count("price") < parts


def test_two_at_once_are_refused(tmp_path: Path, big_shop: SimpleNamespace) -> None:
    from mlops_ray.errors import FeatureStoreError
    from mlops_ray.features.arrivals import origin_of
    from mlops_ray.features.streams import START_US

    offline = OfflineStore(tmp_path, big_shop.features)
    origin = origin_of(big_shop.features, "price")
    with (
        backfill._workplace(offline, origin),
        pytest.raises(FeatureStoreError, match="another backfill of this view"),
    ):
        backfill.backfill(offline, origin, [], START_US, 0)

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.offline import OfflineStore


@pytest.fixture
def store(tmp_path: Path, shop: SimpleNamespace) -> OfflineStore:
    return OfflineStore(tmp_path / "offline", shop.features)


def price_rows(shop: SimpleNamespace, hours: list[int], price: float = 1.0) -> pa.Table:
    moments = [shop.hour(hour) for hour in hours]
    return pa.table(
        {
            "shop": ["north"] * len(hours),
            "shelf": [1] * len(hours),
            "event_time": moments,
            "created_time": moments,
            "price": [price] * len(hours),
            "stock": pa.array([None] * len(hours), pa.float64()),
        },
        schema=define(shop.features, "price").schema,
    )


def append(store: OfflineStore, shop: SimpleNamespace, hours: list[int], until: int) -> int:
    return store.append("price", price_rows(shop, hours), to_us(shop.hour(until)))


def test_a_version_reads_the_same_rows_later(store: OfflineStore, shop: SimpleNamespace) -> None:
    first = append(store, shop, [1, 2], 2)
    before = store.read("price", first)
    for hour in range(3, 9):
        append(store, shop, [hour], hour)
    assert store.read("price", first).equals(before)
    assert store.read("price").num_rows == 8
    assert store.watermark("price", first) == to_us(shop.hour(2))
    assert store.watermark("price") == to_us(shop.hour(8))


def test_rows_up_to_the_watermark_are_not_stored_twice(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    version = append(store, shop, [1, 2], 2)
    assert append(store, shop, [1, 2], 2) == version
    append(store, shop, [1, 2, 3], 3)
    assert sorted(store.read("price")["created_time"].to_pylist()) == [
        shop.hour(1),
        shop.hour(2),
        shop.hour(3),
    ]


def test_two_writers_store_each_row_once(store: OfflineStore, shop: SimpleNamespace) -> None:
    other = OfflineStore(store.path("price").parent.parent, shop.features)
    append(store, shop, [1], 1)
    append(other, shop, [2], 2)
    append(store, shop, [2, 3], 3)
    append(other, shop, [3, 4], 4)
    assert store.read("price").num_rows == 4


def test_a_commit_between_reading_the_watermark_and_writing_is_noticed(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    other = OfflineStore(store.path("price").parent.parent, shop.features)
    append(store, shop, [1], 1)

    def elsewhere(hours: list[int], until: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(append, other, shop, hours, until).result()

    class Interrupted(list):
        """Lets the other writer commit while this one's rows are being written."""

        calls = 0

        def __iter__(self):
            Interrupted.calls += 1
            if Interrupted.calls == 1:
                elsewhere([2], 2)
            return super().__iter__()

    store.append("price", Interrupted([price_rows(shop, [2, 3])]), to_us(shop.hour(3)))
    assert Interrupted.calls == 2
    times = store.read("price")["created_time"].to_pylist()
    assert sorted(times) == [shop.hour(1), shop.hour(2), shop.hour(3)]

    def stream():
        elsewhere([4], 4)
        yield price_rows(shop, [4, 5])

    with pytest.raises(FeatureStoreError, match="another writer"):
        store.append("price", stream(), to_us(shop.hour(5)))
    assert store.watermark("price") == to_us(shop.hour(4))


def test_event_times_and_columns_can_be_chosen(store: OfflineStore, shop: SimpleNamespace) -> None:
    append(store, shop, [1, 2, 3, 4], 4)
    found = store.read(
        "price", since=shop.hour(2), until=shop.hour(3), columns=["event_time", "price"]
    )
    assert found.column_names == ["event_time", "price"]
    assert sorted(found["event_time"].to_pylist()) == [shop.hour(2), shop.hour(3)]


def test_before_any_commit(store: OfflineStore) -> None:
    assert store.version("price") == -1
    assert store.watermark("price") is None
    assert store.read("price").num_rows == 0
    assert store.read("price", -1).schema.names[:2] == ["shop", "shelf"]
    with pytest.raises(FeatureStoreError, match="no version 3"):
        store.read("price", 3)


def test_an_empty_commit_makes_the_table(store: OfflineStore, shop: SimpleNamespace) -> None:
    assert store.append("price", [], to_us(shop.hour(1))) == 0
    assert store.watermark("price") == to_us(shop.hour(1))


def test_a_version_that_is_not_there(store: OfflineStore, shop: SimpleNamespace) -> None:
    append(store, shop, [1], 1)
    with pytest.raises(FeatureStoreError, match="version 9 of view 'price'"):
        store.read("price", 9)


def test_another_definition_has_a_table_of_its_own(
    store: OfflineStore, tmp_path: Path, shop: SimpleNamespace
) -> None:
    append(store, shop, [1], 1)
    price = shop.features.views["price"]
    for update, same in (
        ({"ttl": None, "description": "what it costs"}, True),
        ({"columns": ("price",)}, False),
        ({"event_time": "known_at"}, False),
    ):
        views = shop.features.views | {"price": price.model_copy(update=update)}
        changed = shop.features.model_copy(update={"views": views})
        other = OfflineStore(tmp_path / "offline", changed)
        assert (other.watermark("price") is not None) == same

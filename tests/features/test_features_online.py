from __future__ import annotations

import itertools
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online import EXPIRED, NOT_FOUND, NULL, PRESENT, LmdbStore

TTL_US = 12 * 3_600_000_000


@pytest.fixture
def store(tmp_path: Path, shop: SimpleNamespace) -> LmdbStore:
    return LmdbStore(tmp_path / "online", shop.features)


def keys(*pairs: tuple[str | None, int]) -> list[np.ndarray]:
    return [np.array([p[0] for p in pairs], object), np.array([p[1] for p in pairs])]


def put(store: LmdbStore, key, event: int, created: int, values, null=None) -> int:
    nulls = None if null is None else np.array([null])
    times = np.array([event]), np.array([created])
    return store.write("price", keys(key), *times, np.array([values], float), nulls)


def get(store: LmdbStore, key, at: int) -> tuple[list[float], list[int]]:
    matrix, status = store.read_matrix("price", keys(key), np.array([at]))
    return matrix[0].tolist(), status[0].tolist()


def test_statuses(store: LmdbStore) -> None:
    put(store, ("north", 1), 100, 100, [1.5, 7.0], [False, True])
    values, status = get(store, ("north", 1), 100)
    assert values[0] == 1.5
    assert np.isnan(values[1])
    assert status == [PRESENT, NULL]
    for key in (("north", 2), ("süd", 1), (None, 1)):
        values, status = get(store, key, 100)
        assert np.isnan(values).all()
        assert status == [NOT_FOUND, NOT_FOUND]


def test_ttl_edges(store: LmdbStore) -> None:
    put(store, ("north", 1), 100, 100, [1.0, 2.0])
    assert get(store, ("north", 1), 100 + TTL_US)[1] == [PRESENT, PRESENT]
    values, status = get(store, ("north", 1), 100 + TTL_US + 1)
    assert status == [EXPIRED, EXPIRED]
    assert np.isnan(values).all()


def test_what_lies_after_the_moment_is_not_used(store: LmdbStore) -> None:
    put(store, ("north", 1), 100, 150, [1.0, 2.0])
    assert get(store, ("north", 1), 150)[1] == [PRESENT, PRESENT]
    assert get(store, ("north", 1), 149)[1] == [NOT_FOUND, NOT_FOUND]
    assert get(store, ("north", 1), 99)[1] == [NOT_FOUND, NOT_FOUND]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_newest_wins_in_any_order_of_arrival(store: LmdbStore, order: tuple[int, ...]) -> None:
    rows = [(100, 100, 1.0), (200, 210, 2.0), (200, 220, 3.0), (150, 900, 4.0)]
    for number in order:
        event, created, value = rows[number]
        put(store, ("north", 1), event, created, [value, 0.0])
    assert get(store, ("north", 1), 1000)[0] == [3.0, 0.0]


def test_an_older_row_is_not_kept_and_an_equal_one_is(store: LmdbStore) -> None:
    assert put(store, ("north", 1), 200, 200, [1.0, 0.0]) == 1
    assert put(store, ("north", 1), 199, 999, [2.0, 0.0]) == 0
    assert put(store, ("north", 1), 200, 200, [3.0, 0.0]) == 1
    assert get(store, ("north", 1), 1000)[0] == [3.0, 0.0]


def test_rows_without_a_key_are_skipped(store: LmdbStore) -> None:
    assert put(store, (None, 1), 1, 1, [1.0, 2.0]) == 0


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["north", "süd", None]),
            st.integers(1, 2),
            st.integers(0, 50),
            st.integers(0, 50),
            st.floats(allow_nan=True),
            st.booleans(),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(-10, 80),
)
def test_a_reader_of_many_views_sees_what_single_reads_see(
    shop: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, rows: list, at: int
) -> None:
    store = LmdbStore(tmp_path_factory.mktemp("online"), shop.features)
    column = lambda place, dtype: np.array([row[place] for row in rows], dtype)  # noqa: E731
    shops, shelves = column(0, object), column(1, np.int64)
    times = column(2, np.int64), column(3, np.int64)
    for view, key in (("price", [shops, shelves]), ("shop_visits", [shops])):
        width = len(shop.features.views[view].feature_names)
        values = np.repeat(column(4, float)[:, None], width, 1) + np.arange(width)
        null = np.repeat(column(5, bool)[:, None], width, 1)
        store.write(view, key, *times, values, null)
    moments = np.full(len(rows), at)
    reader = store.reader(["shop_visits", "price"])
    matrix, status = reader.read([[shops], [shops, shelves]], moments)
    ours = [store.read_matrix("shop_visits", [shops], moments)]
    ours.append(store.read_matrix("price", [shops, shelves], moments))
    np.testing.assert_array_equal(matrix, np.hstack([m for m, _ in ours]))
    np.testing.assert_array_equal(status, np.hstack([s for _, s in ours]))
    values = reader.read_values([[shops], [shops, shelves]], moments)
    np.testing.assert_array_equal(values, matrix)


def test_another_process_reads_what_this_one_writes(
    store: LmdbStore, tmp_path: Path, shop: SimpleNamespace
) -> None:
    (tmp_path / "features.pkl").write_bytes(pickle.dumps(shop.features))
    code = f"""
import pickle, sys, numpy as np
from pathlib import Path
from mlops_ray.features.online import LmdbStore
features = pickle.loads(Path({str(tmp_path / "features.pkl")!r}).read_bytes())
store = LmdbStore(Path({str(tmp_path / "online")!r}), features, readonly=True)
for line in sys.stdin:
    key = [np.array(["süd"], object), np.array([3])]
    print(store.read_matrix("price", key, np.array([500]))[0][0, 0], flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    for value in (1.0, 2.0):
        put(store, ("süd", 3), int(value), 2, [value, 0.0])
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert float(reader.stdout.readline()) == value
    reader.stdin.close()
    assert reader.wait(timeout=30) == 0


def test_rows_of_another_definition_are_not_read(
    store: LmdbStore, tmp_path: Path, shop: SimpleNamespace
) -> None:
    put(store, ("north", 1), 100, 100, [1.0, 2.0])
    changed = shop.features.views["price"].model_copy(update={"columns": ("stock", "price")})
    views = shop.features.views | {"price": changed}
    other = LmdbStore(tmp_path / "online", shop.features.model_copy(update={"views": views}))
    assert get(other, ("north", 1), 100)[1] == [NOT_FOUND, NOT_FOUND]
    put(other, ("north", 1), 50, 50, [9.0, 8.0])
    assert get(other, ("north", 1), 100)[0] == [9.0, 8.0]


def test_a_batch_that_fails_leaves_nothing(store: LmdbStore) -> None:
    def fail() -> None:
        with store.batch():
            put(store, ("north", 1), 100, 100, [1.0, 2.0])
            store.move_watermark("price", 100)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert get(store, ("north", 1), 100)[1] == [NOT_FOUND, NOT_FOUND]
    assert store.watermark("price") is None


def test_the_watermark_never_moves_back(store: LmdbStore) -> None:
    for moment, expected in ((-5, -5), (7, 7), (3, 7)):
        store.move_watermark("price", moment)
        assert store.watermark("price") == expected


def test_a_folder_that_was_removed_is_opened_anew(
    store: LmdbStore, tmp_path: Path, shop: SimpleNamespace
) -> None:
    put(store, ("north", 1), 100, 100, [1.0, 2.0])
    shutil.rmtree(tmp_path / "online")
    with pytest.raises(FeatureStoreError, match="no online store yet"):
        LmdbStore(tmp_path / "online", shop.features, readonly=True)
    again = LmdbStore(tmp_path / "online", shop.features)
    assert get(again, ("north", 1), 100)[1] == [NOT_FOUND, NOT_FOUND]
    put(again, ("north", 1), 100, 100, [3.0, 4.0])
    assert (tmp_path / "online" / "data.mdb").exists()
    assert get(LmdbStore(tmp_path / "online", shop.features), ("north", 1), 100)[0] == [3.0, 4.0]


def test_errors(store: LmdbStore, tmp_path: Path, shop: SimpleNamespace) -> None:
    with pytest.raises(FeatureStoreError, match="no feature view 'prise'"):
        store.read_matrix("prise", keys(("a", 1)), np.array([1]))
    with pytest.raises(FeatureStoreError, match="no online store yet"):
        LmdbStore(tmp_path / "nowhere", shop.features, readonly=True)
    reader = LmdbStore(tmp_path / "online", shop.features, readonly=True)
    with pytest.raises(FeatureStoreError, match="open for reading"):
        put(reader, ("north", 1), 1, 1, [1.0, 2.0])
    with pytest.raises(FeatureStoreError, match="features are due"):
        put(store, ("north", 1), 1, 1, [1.0])


def test_cleared_in_place_readers_see_it_empty(
    store: LmdbStore, tmp_path: Path, shop: SimpleNamespace
) -> None:
    put(store, ("north", 1), 100, 100, [1.0, 2.0])
    store.move_watermark("price", 100)
    reader = LmdbStore(tmp_path / "online", shop.features, readonly=True)
    assert get(reader, ("north", 1), 100)[1] == [PRESENT, PRESENT]
    store.clear()
    assert get(reader, ("north", 1), 100)[1] == [NOT_FOUND, NOT_FOUND]
    assert store.watermark("price") is None
    put(store, ("north", 1), 50, 50, [3.0, 4.0])
    assert get(reader, ("north", 1), 100)[0] == [3.0, 4.0]

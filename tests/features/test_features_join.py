"""The join of labels with stored history, against a plain oracle, DuckDB and polars."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import Features
from mlops_ray.errors import SchemaError
from mlops_ray.features import files, intake, join
from mlops_ray.features.definitions import define
from mlops_ray.features.files import by_bucket
from mlops_ray.features.join import HeldView, join_view
from mlops_ray.features.offline import OfflineStore

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COLUMNS = {"n": "int", "x": "float", "text": "string", "yes": "bool", "when": "timestamp"}


def declare(ttl: str | None = None, known_only: bool = True, **keys: str) -> Features:
    keys = keys or {"shop": "string", "shelf": "int"}
    return Features.model_validate(
        {
            "sources": {"rows": {"path": "rows.parquet", "available_at": "created"}},
            "entities": {"thing": {"keys": keys}},
            "views": {
                "facts": {
                    "entity": "thing",
                    "source": "rows",
                    "event_time": "at",
                    "columns": COLUMNS,
                    "ttl": ttl,
                }
            },
            "services": {},
            "labels": dict.fromkeys(("id", "time", "label", "known_at"), "x") | {"source": "rows"},
            "offline": {"buckets": 4, "known_only": known_only},
        }
    )


def us(moment: int) -> datetime:
    return EPOCH + timedelta(microseconds=moment)


keys = st.tuples(
    st.sampled_from(["", "1", "11", "ü", None]), st.sampled_from([1, 11, -1, 2**62, None])
)
moments = st.integers(-6, 6)
facts = st.lists(st.tuples(keys, moments, moments, st.integers(-1, 99)), max_size=25)
asked = st.lists(st.tuples(keys, moments), max_size=12)
few: Any = {"max_examples": 60, "deadline": None}


def value(kind: str, seed: int) -> Any:
    """A value of a type made from a number; −1 stands for null."""
    if seed < 0:
        return None
    return {
        "n": 2**53 + seed,
        "x": float("nan") if seed % 7 == 0 else seed / 3,
        "text": f"{seed}ß" * (seed % 3),
        "yes": seed % 2 == 0,
        "when": us(-(10**16) + seed),
    }[kind]


def rows_of(features: Features, items: list[Any]) -> pa.Table:
    schema = define(features, "facts").schema
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for (shop, shelf), event, created, seed in items:
        row = {"shop": shop, "shelf": shelf, "event_time": us(event), "created_time": us(created)}
        for name in schema.names:
            columns[name].append(row[name] if name in row else value(name, seed))
    return pa.table(columns, schema=schema)


def labels_of(items: list[Any]) -> pa.Table:
    return pa.table(
        {
            "shop": pa.array([key[0] for key, _ in items], pa.string()),
            "shelf": pa.array([key[1] for key, _ in items], pa.int64()),
            "at": pa.array([at for _, at in items], pa.int64()).cast(pa.timestamp("us", "UTC")),
        }
    )


def oracle(items: list[Any], labels: list[Any], ttl: int | None, known_only: bool) -> list[Any]:
    found = []
    for key, at in labels:
        best = None
        for number, (other, event, created, seed) in enumerate(items):
            if None in key or other != key or event > at or (known_only and created > at):
                continue
            if ttl is not None and at - event > ttl:
                continue
            if best is None or (event, created, number) > best[0]:
                best = ((event, created, number), seed)
        found.append(-1 if best is None else best[1])
    return found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROUP_ROWS", 3)
    monkeypatch.setattr(files, "BATCH_ROWS", 4)
    monkeypatch.setattr(join, "_JOB_LABELS", 5)
    monkeypatch.setattr("mlops_ray.features.compaction.TAIL_ROWS", 0)


def fill(store: OfflineStore, rows: pa.Table, how: str) -> None:
    """Store rows: in the tail, in buckets, or in both, one commit after the other."""
    if how == "tail":
        store.append("facts", rows, 100)
    elif how == "compacted":
        store.append("facts", rows, 100)
        store.compact("facts")
    elif how == "buckets":
        written = [
            store.write_bucket("facts", bucket, piece)
            for bucket, part in by_bucket(rows, ["shop", "shelf"], 4).items()
            for piece in (part.slice(0, 2), part.slice(2))
        ]
        store.commit("facts", written, 100)
    else:
        created = rows["created_time"].cast(pa.int64())
        for moment in range(-6, 7):
            store.append("facts", rows.filter(pa.compute.equal(created, moment)), moment)
            if moment in (-3, 2):
                store.compact("facts")


@settings(**few)
@given(
    facts,
    asked,
    st.one_of(st.none(), st.integers(0, 5)),
    st.booleans(),
    st.sampled_from(["tail", "compacted", "buckets", "mixed"]),
)
def test_join_is_the_oracle_however_the_rows_are_stored(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[Any],
    labels: list[Any],
    ttl: int | None,
    known_only: bool,
    how: str,
) -> None:
    features = declare(known_only=known_only)
    if ttl is not None:
        view = features.views["facts"].model_copy(update={"ttl": timedelta(microseconds=ttl)})
        features = features.model_copy(update={"views": {"facts": view}})
    # Rows that are equal in key and times, and in nothing else, may come out in any order.
    items = list(
        {
            (key, event, created): (key, event, created, seed)
            for key, event, created, seed in items
        }.values()
    )
    store = OfflineStore(tmp_path_factory.mktemp("join"), features)
    fill(store, rows_of(features, items), how)
    joined = join_view(features, "facts", labels_of(labels), "at", store)
    seeds = oracle(items, labels, ttl, known_only)
    assert list(joined) == [f"facts__{name}" for name in COLUMNS]
    for name in COLUMNS:
        column = joined[f"facts__{name}"]
        assert column.type == define(features, "facts").schema.field(name).type
        assert plain(column) == [repr(value(name, seed)) for seed in seeds]
    held = HeldView(features, "facts", store).join(labels_of(labels), "at")
    assert all(plain(held[name]) == plain(joined[name]) for name in joined)


def plain(column: pa.Array) -> list[str]:
    """The values, NaN equal to NaN and every zone to UTC."""
    found = column.to_pylist()
    moments = [v.astimezone(UTC) if isinstance(v, datetime) else v for v in found]
    return [repr(value) for value in moments]


def test_the_bytes_do_not_depend_on_how_the_work_is_divided(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    features = declare(ttl="30s")
    names, shelves = ["a", "b", "ü", None], [1, 2, 3, None]
    items = [
        ((names[a], shelves[b]), int(e), int(e + d), int(s))
        for a, b, e, d, s in zip(
            random.integers(0, 4, 900),
            random.integers(0, 4, 900),
            random.integers(0, 10**8, 900),
            random.integers(0, 10**7, 900),
            random.integers(-1, 99, 900),
            strict=True,
        )
    ]
    labels = labels_of(
        [
            ((names[a], shelves[b]), int(at))
            for a, b, at in zip(
                random.integers(0, 4, 300),
                random.integers(0, 4, 300),
                random.integers(0, 10**8, 300),
                strict=True,
            )
        ]
    )
    store = OfflineStore(tmp_path, features)
    store.append("facts", rows_of(features, items), 10**9)
    results = [join_view(features, "facts", labels, "at", store)]
    store.compact("facts")
    for job_labels, workers in ((5, 1), (1000, 3), (40, 2)):
        monkeypatch.setattr(join, "_JOB_LABELS", job_labels)
        monkeypatch.setattr(join, "_cores", lambda count=workers: count)
        results.append(join_view(features, "facts", labels, "at", store))
    results.append(join_view(features, "facts", labels, "at", store, on_ray=True))
    first = bytes_of(results[0])
    assert [bytes_of(result) == first for result in results] == [True] * len(results)
    found = results[0]["facts__n"]
    assert 50 < len(found.drop_null()) < 300


def bytes_of(columns: dict[str, pa.Array]) -> bytes:
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def many(random: np.random.Generator, rows: int, labels: int) -> tuple[pa.Table, pa.Table]:
    features = declare(shelf="int")
    event = random.integers(0, 10**9, rows)
    columns = {
        "shelf": random.integers(0, 40, rows),
        "event_time": event,
        "created_time": event,
        "n": np.arange(rows),
        "x": random.random(rows),
        "text": [f"t{number}" for number in range(rows)],
        "yes": random.random(rows) < 0.5,
        "when": event,
    }
    schema = define(features, "facts").schema
    table = pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)
    asked = pa.table(
        {
            "shelf": random.integers(0, 50, labels),
            "at": pa.array(random.integers(0, 10**9, labels)).cast(pa.timestamp("us", "UTC")),
        }
    )
    return table, asked


def test_duckdb_and_polars_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROUP_ROWS", 500)
    monkeypatch.setattr(files, "BATCH_ROWS", 700)
    monkeypatch.setattr(join, "_JOB_LABELS", 400)
    monkeypatch.setattr(intake, "TAIL_ROWS", 1000)
    table, asked = many(np.random.default_rng(3), 20_000, 3_000)
    features = declare(shelf="int", ttl="20s")
    store = OfflineStore(tmp_path, features)
    store.append("facts", table.slice(0, 15_000), 2 * 10**9)
    late = table.slice(15_000).set_column(
        table.column_names.index("created_time"),
        "created_time",
        pa.array([3 * 10**9] * 5_000).cast(pa.timestamp("us", "UTC")),
    )
    store.append("facts", late, 3 * 10**9)
    without = features.model_copy(
        update={"offline": features.offline.model_copy(update={"known_only": False})}
    )
    ours = join_view(without, "facts", asked, "at", store)["facts__n"].to_pylist()
    connection = duckdb.connect()
    connection.register("r", table)
    connection.register("l", asked.append_column("i", pa.array(range(asked.num_rows))))
    theirs = connection.execute(
        "select case when l.at - r.event_time <= interval 20 seconds then r.n end "
        "from l asof left join r on l.shelf = r.shelf and l.at >= r.event_time order by l.i"
    ).fetchall()
    assert ours == [row[0] for row in theirs]
    left = pl.from_arrow(asked).with_row_index("i").sort("at")
    right = pl.from_arrow(table.select(["shelf", "event_time", "n"])).sort("event_time")
    joined = left.join_asof(
        right, left_on="at", right_on="event_time", by="shelf", tolerance="20s"
    ).sort("i")
    assert ours == joined["n"].to_list()
    assert 500 < sum(number is not None for number in ours) < 3_000
    known = join_view(features, "facts", asked, "at", store)["facts__n"].to_pylist()
    assert known != ours
    assert all(number is None or number < 15_000 for number in known)


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")]
    + [pa.timestamp("ms", "Europe/Berlin"), pa.timestamp("ns", "UTC"), pa.date32()],
)
def test_label_times_of_any_kind_are_instants(tmp_path: Path, kind: pa.DataType) -> None:
    features = declare(shelf="int")
    store = OfflineStore(tmp_path, features)
    day = -86_400_000_000
    rows = rows_of_shelf(features, [(1, day), (1, day + 1), (1, 0)])
    store.append("facts", rows, 10**15)
    times = pa.array([day, 0, None], pa.int64()).cast(pa.timestamp("us", "UTC")).cast(kind)
    asked = pa.table({"shelf": [1, 1, 1], "at": times})
    assert join_view(features, "facts", asked, "at", store)["facts__n"].to_pylist() == [0, 2, None]


def rows_of_shelf(features: Features, items: list[tuple[int, int]]) -> pa.Table:
    schema = define(features, "facts").schema
    columns = {
        "shelf": [shelf for shelf, _ in items],
        "event_time": [us(at) for _, at in items],
        "created_time": [us(at) for _, at in items],
        "n": list(range(len(items))),
    }
    nulls = [None] * len(items)
    return pa.table({f.name: columns.get(f.name, nulls) for f in schema}, schema=schema)


def test_a_nanosecond_before_an_event_is_before_it(tmp_path: Path) -> None:
    features = declare(shelf="int")
    store = OfflineStore(tmp_path, features)
    store.append("facts", rows_of_shelf(features, [(1, 0), (1, 5)]), 10**15)
    times = pa.array([-1, 0, 4_999, 5_000], pa.timestamp("ns"))
    asked = pa.table({"shelf": [1] * 4, "at": times})
    joined = join_view(features, "facts", asked, "at", store)
    assert joined["facts__n"].to_pylist() == [None, 0, 0, 1]


def test_the_hour_that_comes_twice(tmp_path: Path) -> None:
    """02:30 in Berlin on the last Sunday of October 2023 is two moments."""
    features = declare(shelf="int", ttl="0s")
    store = OfflineStore(tmp_path, features)
    first = int(datetime(2023, 10, 29, 0, 30, tzinfo=UTC).timestamp()) * 10**6
    second = first + 3_600_000_000
    store.append("facts", rows_of_shelf(features, [(1, first), (1, second)]), 10**17)
    at = pa.array([first, second]).cast(pa.timestamp("us", "Europe/Berlin"))
    asked = pa.table({"shelf": [1, 1], "at": at})
    assert join_view(features, "facts", asked, "at", store)["facts__n"].to_pylist() == [0, 1]


def test_one_hot_entity_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels are cut by time; each piece reads only the row groups of its own time."""
    monkeypatch.setattr(files, "GROUP_ROWS", 50)
    monkeypatch.setattr(join, "_JOB_LABELS", 100)
    features = declare(shelf="int", ttl="10s")
    store = OfflineStore(tmp_path, features)
    hot = [(1, at * 10**6) for at in range(2_000)]
    rows = rows_of_shelf(features, hot + [(shelf, 0) for shelf in range(2, 12)])
    store.append("facts", rows, 10**15)
    store.compact("facts")
    at = np.random.default_rng(0).permutation(np.arange(1_000) * 2 * 10**6 + 500_000)
    asked = pa.table({"shelf": [1] * 1_000, "at": pa.array(at).cast(pa.timestamp("us", "UTC"))})
    read: list[int] = []
    original = join.FilePart.index

    def index(part: Any) -> pa.Table:
        table = original(part)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(join.FilePart, "index", index)
    found = join_view(features, "facts", asked, "at", store)["facts__n"].to_pylist()
    assert found == (at // 10**6).tolist()
    assert len(read) == 10
    assert max(read) < 400


def test_wrong_labels_are_named(tmp_path: Path) -> None:
    features = declare(shelf="int")
    store = OfflineStore(tmp_path, features)
    times = pa.array([0]).cast(pa.timestamp("us"))
    with pytest.raises(SchemaError, match="'shelf' has the wrong type: expected int"):
        join_view(features, "facts", pa.table({"shelf": ["1"], "at": times}), "at", store)
    with pytest.raises(SchemaError, match="no column 'at'"):
        join_view(features, "facts", pa.table({"shelf": [1]}), "at", store)
    with pytest.raises(SchemaError, match="'at' has the wrong type: expected timestamp"):
        join_view(features, "facts", pa.table({"shelf": [1], "at": [1]}), "at", store)


def test_without_rows_or_labels(tmp_path: Path) -> None:
    features = declare(shelf="int")
    store = OfflineStore(tmp_path, features)
    asked = pa.table({"shelf": [1], "at": pa.array([0]).cast(pa.timestamp("us"))})
    for filled in (False, True):
        joined = join_view(features, "facts", asked, "at", store)
        assert {name: column.to_pylist() for name, column in joined.items()} == {
            f"facts__{name}": [None] for name in COLUMNS
        }
        assert len(join_view(features, "facts", asked.slice(1), "at", store)["facts__text"]) == 0
        if not filled:
            store.append("facts", rows_of_shelf(features, [(2, 0)]), 10)

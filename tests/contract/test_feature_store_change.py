"""The contract, point 10: schemas, versions, backfills, manifests; and online = offline."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contract import world
from contract.checks import (
    FEATURES,
    LABELS,
    ROWS,
    WAYS,
    examples,
    label_source,
    many,
    stored,
)
from contract.world import KEYS, NAMES, TTLS, label, row
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.features import Features
from mlops_ray.errors import MlopsRayError
from mlops_ray.features.columns import from_us
from mlops_ray.features.definitions import define
from mlops_ray.features.lookup import OnlineLookup
from mlops_ray.features.manifest import read_manifest
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.reproduction import digest_table, make_training_set, training_set_of
from mlops_ray.features.service import feature_columns, inputs_of
from mlops_ray.features.training_set import build_training_set
from mlops_ray.metadata.types import FeatureVersions


def with_columns(columns: Mapping[str, str], **more: Any) -> Features:
    views = {"item": FEATURES.views["item"].model_dump(mode="json") | {"columns": columns} | more}
    return world.declare(views=views)


_BEFORE = {"price": "float", "stock": "int"}
_AFTER = {"note": "string", "price": "float", "stock": "int", "open": "bool"}


def test_10_an_added_column_is_null_in_old_rows(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    old, new = with_columns(_BEFORE), with_columns(_AFTER)
    first = world.open_offline(tmp_path, old)
    world.fill(first, old, "item", [row(10), row(10, shelf=2)])
    online = open_store(old)
    online.materialize(first, "item")
    second = world.open_offline(tmp_path, new)
    asked = [label(99), label(99, shelf=2)]
    after = [
        {"note": None, "price": 10.0, "stock": 10, "open": None},
        {"note": None, "price": 10.0, "stock": 10, "open": None},
    ]
    world.assert_equal(engine(new, "item", second, world.label_table(asked)), after)
    second.append("item", world.table(new, "item", [row(20)]), 20)
    after[0] = {"note": "n20", "price": 20.0, "stock": 20, "open": True}
    world.assert_equal(engine(new, "item", second, world.label_table(asked)), after)
    again = open_store(new)
    again.materialize(second, "item")
    fresh, old_row = again.look_up("item", asked)
    assert fresh == {name: (value, "present") for name, value in after[0].items()}
    assert old_row == {
        "note": (None, "null"),
        "price": (10.0, "present"),
        "stock": (10, "present"),
        "open": (None, "null"),
    }


def test_10_a_changed_type_is_refused_with_reason_and_fix(engine: Any, tmp_path: Path) -> None:
    old, new = with_columns(_BEFORE), with_columns({"price": "float", "stock": "string"})
    store = world.open_offline(tmp_path, old)
    world.fill(store, old, "item", [row(10)])
    changed = world.open_offline(tmp_path, new)
    rows = world.table(new, "item", [row(20, stock="20")])
    with pytest.raises(MlopsRayError, match="stock") as refused:
        changed.append("item", rows, 20)
    assert "version" in refused.value.fix
    with pytest.raises(MlopsRayError, match="stock"):
        engine(new, "item", changed, world.label_table([label(99)]))
    world.assert_equal(
        engine(old, "item", world.open_offline(tmp_path, old), world.label_table([label(99)])),
        [{"price": 10.0, "stock": 10}],
    )


def test_10_a_raised_version_has_rows_of_its_own(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    old, new = with_columns(_BEFORE), with_columns({"price": "string"}, version=2)
    before, after = world.open_offline(tmp_path, old), world.open_offline(tmp_path, new)
    online = open_store(old)
    world.fill(before, old, "item", [row(10)])
    online.materialize(before, "item")
    asked = world.label_table([label(99)])
    assert engine(new, "item", after, asked) == [{"price": None}]
    switched = open_store(new)
    assert switched.look_up("item", [label(99)]) == [{"price": (None, "not found")}]
    world.fill(after, new, "item", [row(10, price="ten")])
    switched.materialize(after, "item")
    assert switched.look_up("item", [label(99)]) == [{"price": ("ten", "present")}]
    (found,) = open_store(old).look_up("item", [label(99)])
    assert found["price"] == (10.0, "present")
    assert engine(old, "item", before, asked)[0]["price"] == 10.0


def test_10_a_version_stays_what_it_was(engine: Any, tmp_path: Path) -> None:
    store = stored(tmp_path, "item", [row(10)])
    version = store.version("item")
    store.append("item", world.table(FEATURES, "item", [row(20)]), 20)
    world.compact(store, "item")
    asked = world.label_table([label(99)])
    assert engine(FEATURES, "item", store, asked)[0]["stock"] == 20
    assert engine(FEATURES, "item", store, asked, version=version)[0]["stock"] == 10


def test_10_online_is_offline_at_the_same_instant(
    engine: Any, open_store: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = itertools.count()

    @many(examples(request, 10, 2))
    @given(ROWS, LABELS, st.sampled_from(list(TTLS)), st.sampled_from(WAYS))
    def check(rows: Any, labels: Any, view: str, how: str) -> None:
        after = [item | {"at": 31 + abs(item["at"]) % 12} for item in labels]
        store = stored(tmp_path, view, rows, how)
        online = open_store(FEATURES, str(next(count)))
        online.materialize(store, view)
        offline = engine(FEATURES, view, store, world.label_table(after))
        found = online.look_up(view, after)
        values = [{name: value for name, (value, _) in item.items()} for item in found]
        world.assert_equal(values, offline)

    check()


def test_10_a_pinned_manifest_gives_the_same_bytes_for_ever(on_ray: bool, tmp_path: Path) -> None:
    features = world.declare(offline={"buckets": 3})
    store = world.open_offline(tmp_path, features)
    rows = [row(event, shelf=event % 4, note=f"ü{event}") for event in range(40)]
    world.fill(store, features, "item", rows, "many")
    labels = label_source([label(at, shelf=at % 5) for at in range(0, 60, 3)])
    until = from_us(50)
    versions = FeatureVersions(
        versions={"item": store.version("item")}, tables={"item": store.table_id("item")}
    )
    made = make_training_set(features, "all", labels, store, versions, until, on_ray=on_ray)
    later = [row(event, 60, shelf=event % 4, note="later") for event in range(0, 40, 2)]
    early = [row(39, 40, shelf=shelf, note="corrected") for shelf in range(4)]
    store.append("item", world.table(features, "item", early), 40)
    store.append("item", world.table(features, "item", later), 60)
    world.compact(store, "item")
    store.append("item", world.table(features, "item", [row(70, note="newest")]), 70)
    world.compact(store, "item")
    assert store.vacuum("item", retention=timedelta(0))
    raised = FEATURES.views["item"].model_dump(mode="json") | {"version": 2}
    new = world.declare(views={"item": raised})
    world.fill(world.open_offline(tmp_path, new), new, "item", rows[:5])
    manifest = read_manifest(store.root, made.manifest.id)
    assert manifest == made.manifest
    again = world.open_offline(tmp_path, features)
    grown = pa.concat_tables([labels, label_source([label(51), label(52)])])
    same = training_set_of(manifest, features, grown, again, on_ray=on_ray)
    assert same.equals(made.table)
    assert digest_table(same) == digest_table(made.table) == manifest.result
    now, _ = build_training_set(features, "all", labels, again, {}, until, on_ray=on_ray)
    assert not now.equals(made.table)
    with pytest.raises(MlopsRayError, match="labels"):
        training_set_of(manifest, features, labels.slice(2), again, on_ray=on_ray)


def test_10_other_code_replaces_all_rows_at_once(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    store = stored(tmp_path, "item", [row(10, note="old"), row(10, shelf=2, note="old")])
    before = store.version("item")
    online = open_store(FEATURES)
    online.materialize(store, "item")
    store.append("item", world.table(FEATURES, "item", [row(10, note="new")]), 20, "other code")
    asked = [label(99), label(99, shelf=2)]
    found = engine(FEATURES, "item", store, world.label_table(asked))
    assert [item["note"] for item in found] == ["new", None]
    old = engine(FEATURES, "item", store, world.label_table(asked), version=before)
    assert [item["note"] for item in old] == ["old", "old"]
    online.materialize(store, "item")
    assert [item["note"] for item in online.look_up("item", asked)] == [
        ("new", "present"),
        (None, "not found"),
    ]


def test_10_appending_again_after_a_kill_stores_nothing_twice(engine: Any, tmp_path: Path) -> None:
    """A writer that died after its commit, and does all of it once more."""
    store = stored(tmp_path, "item", [row(10), row(20)])
    version = store.version("item")
    again = OfflineStore(store.root, FEATURES)
    rows = [row(10), row(20), row(30)]
    assert again.append("item", world.table(FEATURES, "item", rows[:2]), 20) == version
    again.append("item", world.table(FEATURES, "item", rows), 30)
    assert sorted(again.read("item")["stock"].to_pylist()) == [10, 20, 30]


def on_demand(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the function was given: the types of the stored features, and their values."""
    stored_ = [inputs[f"item__{name}"] for name in NAMES]
    told = " ".join(str(values.dtype) for values in stored_)
    count = len(inputs["at"])
    return {
        "doubled": np.asarray(stored_[1], np.float64) * 2,
        "told": np.array([told] * count, object),
        "shown": np.array([str([values[n] for values in stored_]) for n in range(count)], object),
    }


@pytest.mark.parametrize("nulls", [False, True])
def test_10_a_request_gets_what_training_got(
    on_ray: bool, open_store: Any, tmp_path: Path, nulls: bool
) -> None:
    """A service with an on-demand view over stored features of all types."""
    service = FEATURES.services["all"].model_dump(mode="json") | {"on_demand": ["shown"]}
    view = {
        "function": "contract.test_feature_store_change.on_demand",
        "features": [f"item__{name}" for name in NAMES],
        "numeric": ["doubled"],
        "categorical": ["told", "shown"],
    }
    features = world.declare(services={"all": service}, on_demand={"shown": view})
    rows = [row(5, stock=2**40), row(6, shelf=2, open=False)]
    rows += [row(7, shelf=3, **dict.fromkeys(NAMES))] if nulls else []
    shelves = [1, 2, 3, 4] if nulls else [1, 2]
    store = stored(tmp_path, "item", rows)
    labels = label_source([label(50, shelf=shelf) for shelf in shelves])
    table, _ = build_training_set(features, "all", labels, store, {}, None, on_ray=on_ray)
    online = open_store(features)
    online.materialize(store, "item")
    requests = inputs_of(table.select(["shop", "shelf", "at"]), features.services["all"])
    served = OnlineLookup(online.features, "all", online.store)(requests)
    for name in feature_columns(features, "all")[0]:
        trained = table[name].cast(pa.float64()).to_numpy()
        np.testing.assert_array_equal(served[name], trained, err_msg=name)
    for name in feature_columns(features, "all")[1]:
        assert served[name].tolist() == table[name].to_pylist(), name


KILLED = """
import os, sys, pyarrow.parquet as pq
from pathlib import Path
from contract import world
from mlops_ray.features.online import open_online
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline

root, rows = Path(sys.argv[1]), pq.read_table(sys.argv[2])
features = world.declare()
pipeline = FeaturePipeline(
    features, {"rows": rows}, OfflineStore(root / "offline", features),
    open_online(features, root / "online", "killed"), views=["item", "place"], spread_rows=100,
)
print("begin", flush=True)
pipeline.advance(pipeline.newest)
print("end", flush=True)
"""


def test_10_a_killed_backfill_and_its_rerun_change_nothing(tmp_path: Path) -> None:
    """A backfill on disk, killed at three moments, ends where an undisturbed one does."""
    count = 8_000
    random_ = np.random.default_rng(3)
    events = random_.integers(0, 10**9, count)
    source = pa.table(
        {
            "shop": [f"s{number}" for number in random_.integers(0, 50, count)],
            "city": [f"c{number}" for number in random_.integers(0, 50, count)],
            "shelf": random_.integers(0, 50, count),
            "event": pa.array(events).cast(pa.timestamp("us")),
            "created": pa.array(events + random_.integers(0, 10**6, count)).cast(
                pa.timestamp("us")
            ),
            "price": random_.normal(size=count),
            "stock": random_.integers(0, 9, count),
            "open": random_.random(count) < 0.5,
            "note": [f"n{number % 100}" for number in range(count)],
            "since": pa.array(events).cast(pa.timestamp("us")),
        }
    )
    pq.write_table(source, tmp_path / "rows.parquet")
    undisturbed = run_backfill(tmp_path / "whole", tmp_path)
    for share in (0.2, 0.5, 0.8):
        run_backfill(tmp_path / "killed", tmp_path, undisturbed * share)
    run_backfill(tmp_path / "killed", tmp_path)
    whole, killed = (world.open_offline(tmp_path / name, FEATURES) for name in ("whole", "killed"))
    for view in ("item", "place"):
        keys = [(name, "ascending") for name in define(FEATURES, view).schema.names]
        one, other = (store.read(view).sort_by(keys) for store in (whole, killed))
        assert one.num_rows > 0.99 * count
        assert one.equals(other)
        stores = [
            open_online(FEATURES, tmp_path / name / "online", "killed", readonly=True)
            for name in ("whole", "killed")
        ]
        asked = [one[name].slice(0, 500).to_numpy() for name in KEYS[view]]
        tables = [s.reader([view]).read_table([asked], np.full(500, 10**12))[0] for s in stores]
        assert tables[0].equals(tables[1])
        assert tables[0][f"{view}__stock"].null_count == 0


def run_backfill(root: Path, folder: Path, seconds: float | None = None) -> float:
    """Run a backfill to its end, or kill it so many seconds after it began; return how long it ran."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", KILLED, str(root), str(folder / "rows.parquet")]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        begun = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return time.monotonic() - begun
        assert process.stdout.readline() == "end\n"
        return time.monotonic() - begun

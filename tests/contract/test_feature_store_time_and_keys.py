"""The contract, points 8 and 9: time, and keys."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from contract import oracle, world
from contract.checks import (
    FEATURES,
    check_join,
    stored,
)
from contract.world import KEYS, NAMES, label, row

from mlops_ray.errors import MlopsRayError, SchemaError
from mlops_ray.features.columns import to_us
from mlops_ray.features.keys import key_hash

HASHES_OF_TEXTS = [
    17696951074988357315,
    3515587182635193913,
    2527596039950405718,
    10964835192106221055,
    1428859969844257644,
]
HASHES_OF_NUMBERS = [
    2975641494991520406,
    10127858673864917041,
    5573041611216156032,
    4383298617594777939,
    2245636829201459325,
]
HASHES_OF_BOTH = [
    18321465060116962114,
    17552203868894644371,
    13937982007555310150,
    133632810953555699,
    3641560530134056045,
]


# 8. Time.


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "+05:30"])
def test_08_labels_of_any_unit_and_zone_are_the_same_moments(
    engine: Any, unit: str, zone: str | None, tmp_path: Path
) -> None:
    second = 1_000_000
    rows = [row(at * second) for at in (-86_400, -1, 0, 1, 1_700_000_000)]
    moments = [-86_401, -86_400, -2, -1, 0, 1, 2, 1_699_999_999, 1_700_000_000]
    store = stored(tmp_path, "item", rows)
    exact = [label(at * second) for at in moments]
    asked = world.label_table(exact)
    times = asked["at"].cast(pa.int64()).cast(pa.timestamp("us")).cast(pa.timestamp(unit))
    typed = times.cast(pa.int64()).cast(pa.timestamp(unit, tz=zone))
    changed = asked.set_column(asked.column_names.index("at"), "at", typed)
    due = oracle.join(exact, rows, KEYS["item"], NAMES)
    world.assert_equal(engine(FEATURES, "item", store, changed), due)


def test_08_parts_of_a_microsecond_never_see_the_future(engine: Any, tmp_path: Path) -> None:
    rows = [row(-1, price=1.0), row(0, price=2.0), row(1, price=3.0)]
    store = stored(tmp_path, "item", rows)
    asked = world.label_table([label(0)] * 6)
    nanoseconds = pa.array([-1001, -1000, -1, 0, 999, 1000], pa.int64()).cast(pa.timestamp("ns"))
    changed = asked.set_column(asked.column_names.index("at"), "at", nanoseconds)
    found = engine(FEATURES, "item", store, changed)
    assert [item["price"] for item in found] == [None, 1.0, 1.0, 2.0, 2.0, 3.0]


def test_08_the_hour_that_comes_twice_and_mixed_zones(engine: Any, tmp_path: Path) -> None:
    new_york = ZoneInfo("America/New_York")
    first = datetime(2013, 11, 3, 1, 30, tzinfo=new_york)
    again = first.replace(fold=1)
    rows = [
        row(to_us(first.astimezone(UTC)), price=1.0),
        row(to_us(again.astimezone(UTC)), price=2.0),
    ]
    moments = [
        first - timedelta(microseconds=1),
        first,
        again,
        first.astimezone(timezone(timedelta(hours=9))),
        again.astimezone(ZoneInfo("Asia/Kolkata")),
    ]
    store = stored(tmp_path, "item", rows)
    asked = world.label_table([label(0)] * len(moments))
    utc = [moment.astimezone(UTC) for moment in moments]
    local = pa.array(utc, pa.timestamp("us", tz="America/New_York"))
    changed = asked.set_column(asked.column_names.index("at"), "at", local)
    found = engine(FEATURES, "item", store, changed)
    assert [item["price"] for item in found] == [None, 1.0, 2.0, 1.0, 2.0]


def test_08_before_1970_online(open_store: Any) -> None:
    online = open_store(FEATURES)
    old = to_us(datetime(1901, 12, 13, tzinfo=UTC))
    online.write("item", [row(old, price=1.0), row(old - 1, old + 5, price=2.0), row(-1, shelf=2)])
    asked = [label(old), label(0), label(-1, shelf=2), label(-2, shelf=2)]
    assert [item["price"] for item in online.look_up("item", asked)] == [
        (1.0, "present"),
        (1.0, "present"),
        (-1.0, "present"),
        (None, "not found"),
    ]


# 9. Keys.

_PAIRS = [("1", "11"), ("11", "1"), ("", "111"), ("111", ""), ("1", "1\x001"), ("é", "e\u0301")]


def test_09_composite_keys_offline(engine: Any, tmp_path: Path) -> None:
    rows = [row(number, shop=shop, city=city) for number, (shop, city) in enumerate(_PAIRS)] + [
        row(50, shop=None, city="1"),
        row(51, shop="1", city=None),
    ]
    labels = [{"shop": shop, "city": city, "at": 99} for shop, city in _PAIRS]
    labels += [
        {"shop": None, "city": "1", "at": 99},
        {"shop": "1", "city": None, "at": 99},
        {"shop": None, "city": None, "at": 99},
        {"shop": "x" * 600, "city": "y", "at": 99},
    ]
    check_join(engine, tmp_path, "place", rows, labels, "buckets")
    store = stored(tmp_path, "place", rows, "compacted")
    found = engine(FEATURES, "place", store, world.label_table(labels))
    assert [item["stock"] for item in found] == [0, 1, 2, 3, 4, 5, None, None, None, None]


def test_09_composite_keys_online(open_store: Any) -> None:
    online = open_store(FEATURES)
    rows = [row(number, shop=shop, city=city) for number, (shop, city) in enumerate(_PAIRS)]
    rows += [row(50, shop=None, city="1"), row(7, shop="x" * 600, city="y")]
    online.write("place", rows)
    asked = [{"shop": shop, "city": city, "at": 99} for shop, city in _PAIRS]
    asked += [{"shop": None, "city": "1", "at": 99}, {"shop": "x" * 600, "city": "y", "at": 99}]
    found = [item["stock"] for item in online.look_up("place", asked)]
    due = [(number, "present") for number in range(len(_PAIRS))]
    assert found == [*due, (None, "not found"), (7, "present")]


def test_09_a_number_is_not_a_text(engine: Any, open_store: Any, tmp_path: Path) -> None:
    rows = {"number": [row(1, code=1)], "word": [row(2, code="1")]}
    labels = {"number": [{"code": 1, "at": 9}], "word": [{"code": "1", "at": 9}]}
    online = open_store(FEATURES)
    for view in rows:
        online.write(view, rows[view])
    for view, other in (("number", "word"), ("word", "number")):
        store = stored(tmp_path, view, rows[view])
        (found,) = engine(FEATURES, view, store, world.label_table(labels[view]))
        assert found["stock"] == rows[view][0]["event"]
        with pytest.raises(SchemaError, match="code"):
            engine(FEATURES, view, store, world.label_table(labels[other]))
        (found,) = online.look_up(view, labels[view])
        assert found["stock"] == (rows[view][0]["event"], "present")
        try:
            (wrong,) = online.look_up(view, labels[other])
        except MlopsRayError:
            continue
        assert wrong["stock"] == (None, "not found")


def test_09_hashes_tell_keys_apart() -> None:
    one, eleven = pa.array(["1"]), pa.array(["11"])
    assert key_hash([one, eleven])[0] != key_hash([eleven, one])[0]
    assert key_hash([pa.array([1])])[0] != key_hash([one])[0]
    assert key_hash([pa.array([None], pa.string())])[0] != key_hash([pa.array([""])])[0]
    texts = pa.array([f"entity {number}" for number in range(20_000)])
    assert len(np.unique(key_hash([texts]))) == 20_000
    share = np.bincount((key_hash([texts]) % np.uint64(16)).astype(int), minlength=16) / 20_000
    assert share.min() > 0.05
    assert share.max() < 0.075


def test_09_hashes_are_the_same_in_every_process_and_layout() -> None:
    code = """
import pyarrow as pa
from mlops_ray.features.definitions import define
from mlops_ray.features.keys import key_hash
from mlops_ray.features.lookup import OnlineLookup
texts = pa.array(["1", "11", "ünï", "", None, "long " * 50])
print(key_hash([texts, pa.array([1, -1, 2**62, 0, 5, None])]).tolist())
"""
    outputs = set()
    for seed in ("0", "1", "random"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    texts = pa.chunked_array([["x", "a"], ["b", "a"]])
    laid_out = [texts, texts.combine_chunks().dictionary_encode(), texts.cast(pa.large_string())]
    first, *others = [key_hash([values]).tolist() for values in laid_out]
    assert all(other == first for other in others)
    assert key_hash([texts.slice(1)]).tolist() == first[1:]


def test_09_a_hash_lies_on_disk_and_never_changes() -> None:
    texts = pa.array(["", "1", "north", "süd", "a text of more than eight bytes"])
    numbers = pa.array([0, 1, -1, 2**62, 5])
    assert key_hash([texts]).tolist() == HASHES_OF_TEXTS
    assert key_hash([numbers]).tolist() == HASHES_OF_NUMBERS
    assert key_hash([texts, numbers]).tolist() == HASHES_OF_BOTH

"""A small shop: visits and prices, with every kind of row that a feature store has to get right."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.config.features import Features

INSTANT = pa.timestamp("us", tz="UTC")
START = datetime(2024, 3, 1, tzinfo=UTC)
HOUR_US = 3_600_000_000

PROJECT = """
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def read_two(rows):
    return pa.table({"n": list(range(rows)), "at": pa.array([0] * rows, pa.timestamp("s"))})


def read_frame():
    import pandas

    at = pandas.to_datetime(["2024-01-01", "2024-01-02"])
    return pandas.DataFrame({"n": [1, 2], "kind": pandas.Categorical(["x", "y"]), "at": at})


def read_dataset():
    import ray.data

    return ray.data.range(1000, override_num_blocks=8).rename_columns({"id": "n"})


def keep_even(table):
    return table.filter(pc.equal(pc.bit_wise_and(table["n"], 1), 0))


def positive(table):
    if pc.max(table["amount"]).as_py() == 99:
        raise ValueError("amount 99")
    return table.filter(pc.greater(table["amount"], 0))


def no_more_than_three(table):
    return True if table.num_rows <= 3 else f"there are {table.num_rows} rows"


def judges_oddly(table):
    return [1, 2]


def drop_first(table):
    return table.slice(1)


def no_table():
    return [1, 2]


def fails(table):
    raise KeyError("price")


def moment(inputs):
    hours = inputs["at"].astype("datetime64[h]").astype("int64") % 24
    shop = np.array([f"shop-{s}" for s in inputs["shop"]], dtype=object)
    return {"hour": hours, "shop_name": shop, "not_asked_for": hours}


def too_short(inputs):
    return {"hour": np.zeros(1), "shop_name": np.array(["x"], dtype=object)}


def leaves_out(inputs):
    return {"hour": np.zeros(len(inputs["at"]))}
"""


@pytest.fixture
def shop_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the module ``shop_project`` importable."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "shop_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(str(folder))
    yield
    import sys

    sys.modules.pop("shop_project", None)


def declare(**changes: Any) -> Features:
    content: dict[str, Any] = {
        "sources": {
            "visits": {"path": "visits.parquet", "available_at": "seen_at"},
            "prices": {"path": "prices.parquet", "available_at": "known_at"},
        },
        "entities": {
            "shop": {"keys": {"shop": "string"}},
            "shelf": {"keys": {"shop": "string", "shelf": "int"}},
        },
        "views": {
            "price": {
                "entity": "shelf",
                "source": "prices",
                "event_time": "valid_from",
                "columns": ["price", "stock"],
                "ttl": "12h",
            },
            "shop_visits": {
                "entity": "shop",
                "source": "visits",
                "event_time": "seen_at",
                "every": "1h",
                "windows": ["3h", "1d"],
                "aggregates": {
                    "visits": {"by": "count"},
                    "spent": {"by": "sum", "of": "spent"},
                    "mean_spent": {"by": "mean", "of": "spent"},
                    "most": {"by": "max", "of": "spent"},
                    "least": {"by": "min", "of": "spent"},
                    "last": {"by": "last", "of": "spent"},
                },
                "ttl": "2d",
            },
            "shelf_visits": {
                "entity": "shelf",
                "source": "visits",
                "event_time": "entered_at",
                "every": "1h",
                "windows": ["2h", "6h"],
                "aggregates": {
                    "visits": {"by": "count"},
                    "mean_spent": {"by": "mean", "of": "spent"},
                    "last": {"by": "last", "of": "spent"},
                },
            },
        },
        "services": {
            "buys": {
                "views": ["price", "shop_visits", "shelf_visits"],
                "inputs": {
                    "shop": {"dtype": "string", "nullable": True},
                    "shelf": {"dtype": "int"},
                    "at": {"dtype": "timestamp"},
                    "weight": {"dtype": "float", "nullable": True},
                },
                "time": "at",
                "on_demand": ["moment"],
            }
        },
        "on_demand": {
            "moment": {
                "function": "shop_project.moment",
                "numeric": ["hour"],
                "categorical": ["shop_name"],
            }
        },
        "labels": {
            "source": "visits",
            "id": "visit",
            "time": "at",
            "label": "bought",
            "known_at": "label_known_at",
        },
    }
    return Features.model_validate(content | changes)


def visits(count: int = 600, seed: int = 0) -> pa.Table:
    """Visits over four days: some without a shop, some seen hours after they began."""
    random = np.random.default_rng(seed)
    seen = np.sort(random.integers(0, 96 * HOUR_US, count)) + int(START.timestamp()) * 1_000_000
    entered = seen - random.choice([0, 0, 0, HOUR_US // 3, 5 * HOUR_US], count)
    spent = np.round(random.lognormal(2, 1, count), 2)
    bought = random.random(count) < 0.4
    labelled = random.random(count) < 0.9
    known = seen + random.integers(HOUR_US, 9 * HOUR_US, count)
    return pa.table(
        {
            "visit": [f"v{number:05d}" for number in random.permutation(count)],
            "shop": pa.array(
                random.choice(["north", "süd", "ost", "west"], count),
                mask=random.random(count) < 0.05,
            ),
            "shelf": random.integers(1, 4, count),
            "entered_at": pa.array(entered).cast(INSTANT),
            "seen_at": pa.array(seen).cast(INSTANT),
            "at": pa.array(seen).cast(INSTANT),
            "spent": pa.array(spent, mask=random.random(count) < 0.2),
            "weight": pa.array(random.random(count), mask=random.random(count) < 0.1),
            "bought": pa.array(bought.astype(np.int8), mask=~labelled),
            "label_known_at": pa.array(known, mask=~labelled).cast(INSTANT),
        }
    )


def prices(count: int = 300, seed: int = 1) -> pa.Table:
    """Prices of shelves; some are known before they hold, some after."""
    random = np.random.default_rng(seed)
    valid = random.integers(0, 96, count) * HOUR_US + int(START.timestamp()) * 1_000_000
    known = valid + random.choice([-HOUR_US, 0, 0, 3 * HOUR_US], count)
    return pa.table(
        {
            "shop": random.choice(["north", "süd", "ost", "west"], count),
            "shelf": random.integers(1, 4, count),
            "valid_from": pa.array(valid).cast(INSTANT),
            "known_at": pa.array(known).cast(INSTANT),
            "price": np.round(random.random(count) * 10, 2),
            "stock": pa.array(random.integers(0, 50, count), mask=random.random(count) < 0.3),
        }
    )


@pytest.fixture
def shop() -> SimpleNamespace:
    """The declarations, the tables of the sources, and moments: ``hour(5)``."""
    return SimpleNamespace(
        declare=declare,
        features=declare(),
        tables={"visits": visits(), "prices": prices()},
        visits=visits,
        prices=prices,
        start=START,
        hour=lambda hours: START + timedelta(hours=hours),
    )

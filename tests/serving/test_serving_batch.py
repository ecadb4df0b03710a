"""Batch scoring by Ray Data."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving import shop

from mlops_ray.config.project import BatchPredict
from mlops_ray.errors import DataError, SchemaError, ServingError, SourceError
from mlops_ray.features.columns import to_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.orchestration.context import Context
from mlops_ray.serving.batch.scoring import BatchResult, score_batch
from mlops_ray.training.inference import Predictor

HOURS = 4


@pytest.fixture(scope="module")
def batch_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose offline store has hourly rows of two shops, growing by the hour."""
    home = Home(tmp_path_factory.mktemp("batch") / "home")
    store = OfflineStore(home.offline("shop"), shop.features())
    times = [shop.NOW - timedelta(hours=hour) for hour in range(HOURS, 0, -1)]
    names = ("visits_1d", "visits_7d", "mean_1d", "mean_7d")
    for number, time in enumerate(times):
        rows = pa.table(
            {
                "shop": pa.array([1, 2], pa.int64()),
                "event_time": pa.array([time] * 2, pa.timestamp("us", tz="UTC")),
                "created_time": pa.array([time] * 2, pa.timestamp("us", tz="UTC")),
                **{name: [10.0 * number + 1, 10.0 * number + 2] for name in names},
            }
        )
        store.append("shop_day", rows, to_us(time))
    return home


def inputs(rows: int) -> pa.Table:
    """Rows of shops 1, 2 and (unknown) 3, one each quarter of an hour backwards from now."""
    at = [shop.NOW - timedelta(minutes=15 * row) for row in range(rows)]
    return pa.table(
        {
            "number": pa.array(range(rows), pa.int32()),
            "customer": ["anna"] * rows,
            "shop": pa.array([1 + row % 3 for row in range(rows)], pa.int64()),
            "amount": [float(row) for row in range(rows)],
            "coupon": pa.array([None, "spring"] * (rows // 2), pa.string()),
            "member": [True] * rows,
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
        }
    )


def score(home: Home, packages: list[Path], source: Path, output: Path) -> BatchResult:
    model = ModelVersion(name="shop", version=1, package=str(packages[0]), digest="")
    batch = BatchPredict(model="shop@1", input=source, output=output, batch_rows=7)
    return score_batch(Context("shop", home), "shop", shop.features(), "buys", model, batch, 0.5)


def by_hand(table: pa.Table, folder: Path) -> Any:
    """Scores with the newest row of each shop at each time, found by looking at every one."""
    rows = table.to_pylist()
    found = []
    for row in rows:
        usable = [
            number
            for number in range(HOURS)
            if shop.NOW - timedelta(hours=HOURS - number) <= row["at"]
        ]
        known = usable and row["shop"] in (1, 2)
        found.append(10.0 * usable[-1] + row["shop"] if known else np.nan)
    columns: dict[str, Any] = {
        f"shop_day__{name}": np.array(found)
        for name in ("visits_1d", "visits_7d", "mean_1d", "mean_7d")
    }
    columns["customer_last__amount"] = np.full(len(rows), np.nan)
    columns["amount"] = np.array([row["amount"] for row in rows])
    columns["hour"] = np.array([float(row["at"].hour) for row in rows])
    columns["coupon"] = np.array([row["coupon"] or "none" for row in rows], dtype=object)
    return Predictor(package.read(folder)).predict(columns)


def test_rows_are_scored_as_of_their_time(
    ray_cluster: Any, batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = inputs(24)
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(table.slice(0, 10), source / "a.parquet")
    pq.write_table(table.slice(10), source / "b.parquet")
    output.mkdir()
    (output / "of-yesterday.parquet").write_bytes(b"")
    result = score(batch_home, packages, source, output)
    scored = pq.read_table(output).sort_by("number")
    assert result.rows == 24
    assert scored.select(table.column_names).equals(table)
    expected = by_hand(table, packages[0])
    np.testing.assert_allclose(scored["score"].to_numpy(), expected, atol=1e-6)
    assert scored["predicted_label"].to_pylist() == [int(value >= 0.5) for value in expected]
    assert set(scored["model_version"].to_pylist()) == {1}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"amount": None}, SchemaError, "amount"),
        ({"amount": ["much"] * 24}, SchemaError, "amount"),
        ({"at": list(range(24))}, SchemaError, "at"),
        ({"score": [0.0] * 24}, SchemaError, "score"),
    ],
)
def test_wrong_column_is_named_before_anything_runs(
    batch_home: Home,
    packages: list[Path],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    columns = dict(zip(inputs(24).column_names, inputs(24).columns, strict=True)) | change
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(error, match=text):
        score(batch_home, packages, tmp_path / "in.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_where_none_may_be_leaves_the_old_output(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = inputs(24)
    nulls = pa.array([None] + [1.0] * 23)
    table = table.set_column(table.column_names.index("amount"), "amount", nulls)
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.parquet").write_bytes(b"old")
    with pytest.raises(DataError, match="amount"):
        score(batch_home, packages, tmp_path / "in.parquet", tmp_path / "out")
    assert (tmp_path / "out" / "old.parquet").read_bytes() == b"old"


def test_worker_that_fails_is_quoted_and_leaves_nothing(
    ray_cluster: Any, batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    pq.write_table(inputs(24), tmp_path / "in.parquet")
    with pytest.raises(ServingError, match="could not be scored") as caught:
        score(batch_home, packages[3:], tmp_path / "in.parquet", tmp_path / "out")
    assert "no readable model package" in caught.value.why
    assert "Traceback" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_missing_input(batch_home: Home, packages: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        score(batch_home, packages, tmp_path / "nowhere", tmp_path / "out")

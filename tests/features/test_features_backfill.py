"""Backfill on Ray Data gives the rows, to the bit, that the process itself would have made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from mlops_ray.features import backfill
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import LmdbStore
from mlops_ray.features.pipeline import FeaturePipeline


def rows_of(root: Path, shop: SimpleNamespace, ray_rows: int, hours: list[float]) -> list[pa.Table]:
    offline = OfflineStore(root / "offline", shop.features)
    online = LmdbStore(root / "online", shop.features)
    pipeline = FeaturePipeline(shop.features, shop.tables, offline, online, ray_rows=ray_rows)
    for hour in hours:
        pipeline.advance(shop.hour(hour))
    order = [("event_time", "ascending"), ("shop", "ascending"), ("shelf", "ascending")]
    views = {"shop_visits": order[:2], "shelf_visits": order}
    return [offline.read(view).sort_by(keys).combine_chunks() for view, keys in views.items()]


def test_ray_and_process_agree(
    ray_cluster: Any, tmp_path: Path, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.tables["visits"] = shop.visits(3000, seed=3)
    runs = []
    compute = backfill.backfill

    def counted(stream: Any, until_us: int) -> Any:
        runs.append(stream.definition.name)
        return compute(stream, until_us)

    monkeypatch.setattr(backfill, "backfill", counted)
    alone = rows_of(tmp_path / "alone", shop, 10**9, [120])
    assert runs == []
    # The second advance starts from stored state; the third is small and stays in process.
    spread = rows_of(tmp_path / "ray", shop, 500, [30, 80, 81, 120])
    assert sorted(set(runs)) == ["shelf_visits", "shop_visits"]
    assert [t.num_rows for t in spread] == [t.num_rows for t in alone]
    assert all(a.equals(b) for a, b in zip(spread, alone, strict=True))

"""A shop's visits to score: with views and without, and what each row's score is by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from serving import shop

from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.serving import Serving
from mlops_ray.features.columns import to_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.orchestration.context import Context
from mlops_ray.serving.batch.folder import Done
from mlops_ray.serving.batch.pieces import Piece
from mlops_ray.serving.batch.report import BatchResult
from mlops_ray.serving.batch.scoring import score_batch
from mlops_ray.serving.batch.worker import PieceScorer, ScoringPlan
from mlops_ray.training.inference import Predictor

HOURS = 4


def fill_offline(home: Home) -> None:
    """Store hourly rows of two shops, growing by the hour."""
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


def visits(rows: int) -> pa.Table:
    """Rows of shops 1, 2 and (unknown) 3, one each quarter of an hour backwards from now."""
    at = [shop.NOW - timedelta(minutes=15 * row) for row in range(rows)]
    return pa.table(
        {
            "number": pa.array(range(rows), pa.int32()),
            "customer": ["anna"] * rows,
            "shop": pa.array([1 + row % 3 for row in range(rows)], pa.int64()),
            "amount": [float(row) for row in range(rows)],
            "coupon": pa.array([None if row % 2 else "spring" for row in range(rows)], pa.string()),
            "member": [True] * rows,
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
        }
    )


def score(home: Home, folder: Path, source: Any, output: Any, **more: Any) -> BatchResult:
    """Score with the package in ``folder`` as version 1."""
    features = more.pop("features", None) or shop.features()
    serving, members = more.pop("serving", Serving()), more.pop("members", ())
    context = Context("shop", home, run_id=more.pop("run", Context.run_id))
    model = ModelVersion(name="shop", version=1, package=str(folder), digest="")
    settings = {"model": "shop@1", "input": source, "output": output, "batch_rows": 7} | more
    batch = BatchPredict.model_validate(settings)
    return score_batch(context, "shop", features, serving, model, batch, members)


def broken_facts(inputs: dict[str, Any]) -> dict[str, Any]:
    """Request features that cannot be computed."""
    raise ZeroDivisionError("no shop is open")


def inline(plan: ScoringPlan, pieces: Sequence[Piece]) -> Iterator[Done]:
    """Score pieces in this process: what the pool does, without Ray."""
    scorer = PieceScorer(plan)
    for piece in pieces:
        given = pa.table({"piece": [piece.model_dump_json()]})
        yield Done.model_validate_json(scorer(given)["done"][0].as_py())


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

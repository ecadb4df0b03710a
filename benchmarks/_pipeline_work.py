"""One run of the pipeline benchmark in a process of its own: ours, or polars on one core.

python -m benchmarks._pipeline_work ours|polars FOLDER CORES
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

DAY_US = 86_400_000_000
HOUR_US = DAY_US // 24
WINDOWS = {"1d": DAY_US, "7d": 7 * DAY_US}


def clean(table: Any) -> Any:
    """Keep sales, and derive what is left of each."""
    import pyarrow.compute as pc

    sales = table.filter(pc.greater(table["amount"], 0.0))
    return sales.append_column("net", pc.subtract(sales["amount"], sales["fee"]))


def declare(folder: Path) -> Any:
    from mlops_ray.config.features import Features

    return Features.model_validate(
        {
            "sources": {
                "sales": {
                    "path": str(folder / "raw"),
                    "available_at": "at",
                    "clean": "benchmarks._pipeline_work.clean",
                    "clean_by": "batch",
                }
            },
            "entities": {"shop": {"keys": {"shop": "int"}}},
            "views": {
                "sold": {
                    "entity": "shop",
                    "source": "sales",
                    "event_time": "at",
                    "every": "1h",
                    "windows": list(WINDOWS),
                    "aggregates": {
                        "number": {"by": "count"},
                        "total": {"by": "sum", "of": "net"},
                        "mean": {"by": "mean", "of": "net"},
                        "most": {"by": "max", "of": "net"},
                    },
                }
            },
            "services": {},
            "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "sales"),
        }
    )


def ours(folder: Path, cores: int) -> dict[str, Any]:
    import logging

    from mlops_ray.cluster.connect import prepare_environment

    prepare_environment()
    import pyarrow as pa
    import ray

    from mlops_ray.features.arrivals import origin_of
    from mlops_ray.features.backfill import backfill, run_all
    from mlops_ray.features.offline import OfflineStore
    from mlops_ray.features.pieces import pieces_of_file
    from mlops_ray.features.sources import clean_source, extract_source
    from mlops_ray.features.streams import START_US
    from mlops_ray.features.tables import table_path

    pa.set_cpu_count(cores)
    features = declare(folder)
    store = folder / "ours"
    shutil.rmtree(store, ignore_errors=True)
    offline = OfflineStore(store, features)
    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    run_all(warm, [(cores,)] * cores)
    marks = [time.perf_counter()]
    rows = extract_source(features, "sales", folder / "extracted", folder)
    marks.append(time.perf_counter())
    clean_source(features, "sales", folder / "extracted", folder / "cleaned")
    marks.append(time.perf_counter())
    pieces = pieces_of_file(table_path(folder / "cleaned", "sales"))
    done = backfill(offline, origin_of(features, "sold"), pieces, START_US, 100 * 365 * DAY_US)
    marks.append(time.perf_counter())
    spent = [after - before for before, after in itertools.pairwise(marks)]
    ray.shutdown()
    return {"seconds": marks[-1] - marks[0], "rows": rows, "made": done.rows, "stages": spent}


def warm(cores: int) -> None:
    """Have a worker import what the tasks need, as those of a cluster that is up have."""
    import pyarrow as pa

    import mlops_ray.features.backfill  # noqa: F401

    pa.set_cpu_count(1)
    time.sleep(0.5 if cores > 1 else 0.0)


def polars(folder: Path) -> dict[str, Any]:
    import polars as pl

    began = time.perf_counter()
    tile = (pl.col("at").cast(pl.Int64) + (HOUR_US - 1)) // HOUR_US * HOUR_US
    tiles = (
        pl.scan_parquet(folder / "raw/*.parquet")
        .filter(pl.col("amount") > 0)
        .with_columns(net=pl.col("amount") - pl.col("fee"), tile=tile)
        .group_by("shop", "tile")
        .agg(
            rows=pl.len().cast(pl.Int64),
            values=pl.col("net").count().cast(pl.Int64),
            total=pl.col("net").sum(),
            most=pl.col("net").max(),
        )
        .sort("shop", "tile")
        .collect()
    )
    found = {"shop": tiles["shop"], "event_time": tiles["tile"]}
    for name, length_us in WINDOWS.items():
        window = tiles.rolling("tile", period=f"{length_us}i", group_by="shop").agg(
            pl.col("rows").sum(),
            pl.col("values").sum(),
            pl.col("total").sum(),
            pl.col("most").max(),
        )
        some = window["values"] > 0
        total = window["total"].set(~some, None)
        found |= {
            f"number_{name}": window["rows"],
            f"total_{name}": total,
            f"mean_{name}": total / window["values"],
            f"most_{name}": window["most"],
        }
    frame = pl.DataFrame(found).with_columns(
        pl.col("event_time").cast(pl.Datetime("us", "UTC")).alias("created_time"),
        pl.col("event_time").cast(pl.Datetime("us", "UTC")),
    )
    frame.write_parquet(folder / "polars.parquet", compression="lz4")
    return {"seconds": time.perf_counter() - began, "made": frame.height}


def compare(folder: Path) -> dict[str, Any]:
    """Check that both made the same rows."""
    import polars as pl

    from mlops_ray.features.offline import OfflineStore

    stored = OfflineStore(folder / "ours", declare(folder)).read("sold")
    mine = pl.DataFrame(stored).sort("shop", "event_time")
    theirs = pl.read_parquet(folder / "polars.parquet").select(mine.columns)
    for name in mine.columns:
        if mine[name].dtype == pl.Float64:
            assert (mine[name].is_null() == theirs[name].is_null()).all(), name
            difference = ((mine[name] - theirs[name]).abs() / (1 + theirs[name].abs())).max()
            assert difference is None or difference < 1e-9, (name, difference)
        else:
            assert mine[name].equals(theirs[name]), name
    return {"rows": mine.height}


def main() -> None:
    what, folder, cores = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Whatever a library starts, it has these cores and no others.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if what == "ours":
        told = ours(folder, cores)
    else:
        told = polars(folder) if what == "polars" else compare(folder)
    print(json.dumps(told))


if __name__ == "__main__":
    main()

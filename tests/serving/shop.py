"""A small project to serve: visits of shops by customers, with two views and request features."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.config.training import Model
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.definitions import define
from mlops_ray.features.online import open_online
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.profile import Reference
from mlops_ray.training.encoder import Encoder
from mlops_ray.training.loop import build

NOW = datetime(2024, 3, 1, 12, tzinfo=UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000
HOUR_US = 3_600_000_000
ROW: dict[str, Any] = {
    "customer": "anna",
    "shop": 7,
    "amount": 12.5,
    "coupon": None,
    "member": True,
    "at": "2024-03-01T12:00:00Z",
}
SHOPS = 20


def facts(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The request features: the amount, the hour of the day, the coupon."""
    hours = inputs["at"].astype("datetime64[h]").astype(np.int64) % 24
    coupons = [c if c is not None else "none" for c in inputs["coupon"]]
    return {
        "amount": inputs["amount"].astype(np.float64),
        "hour": hours.astype(np.float64),
        "coupon": np.array(coupons, dtype=object),
    }


def features() -> Features:
    return Features.model_validate(
        {
            "sources": {"visits": {"path": "visits.parquet", "available_at": "at"}},
            "entities": {
                "shop": {"keys": {"shop": "int"}},
                "customer": {"keys": {"customer": "string"}},
            },
            "views": {
                "shop_day": {
                    "entity": "shop",
                    "source": "visits",
                    "event_time": "at",
                    "every": "1h",
                    "windows": ["1d", "7d"],
                    "aggregates": {
                        "visits": {"by": "count"},
                        "mean": {"by": "mean", "of": "amount"},
                    },
                    "ttl": "30d",
                },
                "customer_last": {
                    "entity": "customer",
                    "source": "visits",
                    "event_time": "at",
                    "columns": ["amount"],
                },
            },
            "services": {
                "buys": {
                    "views": ["shop_day", "customer_last"],
                    "inputs": {
                        "customer": {"dtype": "string"},
                        "shop": {"dtype": "int", "minimum": 0},
                        "amount": {"dtype": "float", "minimum": 0, "maximum": 1e6},
                        "coupon": {"dtype": "string", "nullable": True},
                        "member": {"dtype": "bool"},
                        "at": {"dtype": "timestamp"},
                    },
                    "time": "at",
                    "on_demand": ["facts"],
                }
            },
            "on_demand": {
                "facts": {
                    "function": "serving.shop.facts",
                    "numeric": ["amount", "hour"],
                    "categorical": ["coupon"],
                }
            },
            "labels": {
                "source": "visits",
                "id": "id",
                "time": "at",
                "label": "label",
                "known_at": "known_at",
            },
        }
    )


def fill_store(home: Home, project: str) -> None:
    """Write an hour-old row for each shop and for two customers."""
    store = open_online(features(), home.online(project), project)
    then = np.full(SHOPS, NOW_US - HOUR_US)
    values = np.arange(SHOPS * 4, dtype=np.float64).reshape(SHOPS, 4)
    store.write("shop_day", rows("shop_day", np.arange(SHOPS), then, values))
    people = np.array(["anna", "bert"], dtype=object)
    store.write("customer_last", rows("customer_last", people, then[:2], np.array([[3.0], [4.0]])))
    store.flush()


def rows(view: str, keys: Any, times: NDArray[Any], values: NDArray[np.float64]) -> pa.Table:
    """Feature rows, known when they happen; NaN stays NaN."""
    schema = define(features(), view).schema
    instants = pa.array(times).cast(INSTANT)
    columns = [pa.array(keys), instants, instants, *(pa.array(column) for column in values.T)]
    typed = [column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.table(typed, schema=schema)


def write_package(
    folder: Path,
    seed: int,
    *,
    extra: tuple[str, ...] = (),
    target: str = "mlops_ray.training.models.TabularNet",
) -> Path:
    """Write a package with random weights (another seed, other scores) that reads ``extra`` too.

    ``target`` is the class of the network, which takes the arguments of ``TabularNet``.
    """
    import torch

    numeric, categorical = feature_columns(features(), "buys")
    numeric += extra
    random = np.random.default_rng(seed)
    columns: dict[str, NDArray[Any]] = {n: random.normal(10, 5, 500) for n in numeric}
    columns |= {
        n: random.choice(np.array(["none", "spring"], dtype=object), 500) for n in categorical
    }
    encoder = Encoder.fit({n: columns[n] for n in numeric}, {n: columns[n] for n in categorical})
    torch.manual_seed(seed)
    arguments = {
        "num_numeric": encoder.spec.num_numeric,
        "cardinalities": list(encoder.spec.cardinalities),
        "hidden_sizes": [64, 32],
    }
    model = Model.model_validate({"_target_": target, **arguments})
    weights = {name: tensor.numpy() for name, tensor in build(model).state_dict().items()}
    manifest = package.Manifest(
        model=model,
        encoder=encoder.spec,
        service_name="buys",
        service=features().services["buys"],
        label="label",
        time="at",
    )
    package.write(folder, manifest, weights, Reference.fit(columns, 10))
    return folder

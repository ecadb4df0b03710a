"""What the serving benchmark serves: a shop's returns, by three views and what a request says.

Every server has the same model. Ours looks the features up and encodes them; the others are sent
them as numbers and have all the rest of it, from the numbers to the score, as one TorchScript.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlops_ray.config.features import Features
from mlops_ray.config.training import Model
from mlops_ray.features.definitions import define
from mlops_ray.features.lookup import OnlineLookup
from mlops_ray.features.online import open_online
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.profile import Reference
from mlops_ray.serving.models.served import ModelSpec
from mlops_ray.training.encoder import Encoder
from mlops_ray.training.loop import build

PROJECT = "returns"
SERVICE = "returned"
AT = datetime(2024, 3, 1, 12, tzinfo=UTC)
AT_US = int(AT.timestamp()) * 1_000_000
HOUR_US = 3_600_000_000
BODIES = 1_000
WIDTH = 27
CATEGORIES = ("books", "food", "games", "music", "sport", "tools")

VIEWS = {
    "customer_stats": ("customer", [f"c{i}" for i in range(10)]),
    "shop_stats": ("shop", [f"s{i}" for i in range(8)]),
    "article_stats": ("article", [f"a{i}" for i in range(6)]),
}

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class World:
    """A folder with the home and its filled online store, two models, and the bodies to send."""

    folder: Path

    @property
    def home(self) -> Home:
        return Home(self.folder / "home")

    def package(self, version: int) -> Path:
        return self.folder / f"model{version}"

    def script(self, version: int) -> Path:
        """The whole model as one TorchScript, for servers that are not ours."""
        return self.folder / f"model{version}.pt"

    def models(self, champion: int = 1) -> list[ModelSpec]:
        """The one version as champion, the other as challenger."""
        versions = {"champion": champion, "challenger": 3 - champion}
        return [
            ModelSpec(alias=alias, version=version, path=str(self.package(version)))
            for alias, version in versions.items()
        ]

    def bodies(self, kind: str, rows: int) -> Path:
        """The requests of one kind, ``ours`` or ``features``, with so many rows; one to a line."""
        return self.folder / f"{kind}_{rows}.jsonl"


def request_facts(inputs: Columns) -> Columns:
    """Features that only the request knows."""
    hours = inputs["at"].astype("datetime64[h]").astype(np.int64) % 24
    return {"amount": inputs["amount"], "hour": hours.astype(np.float64), "kind": inputs["kind"]}


def declare() -> Features:
    return Features.model_validate(
        {
            "sources": {"orders": {"path": "orders.parquet", "available_at": "created_time"}},
            "entities": {
                entity: {"keys": {entity: "string" if entity == "customer" else "int"}}
                for entity, _ in VIEWS.values()
            },
            "views": {
                view: {
                    "entity": entity,
                    "source": "orders",
                    "event_time": "event_time",
                    "columns": names,
                    "ttl": "30d",
                }
                for view, (entity, names) in VIEWS.items()
            },
            "services": {
                SERVICE: {
                    "views": list(VIEWS),
                    "inputs": {
                        "customer": {"dtype": "string"},
                        "shop": {"dtype": "int", "minimum": 0},
                        "article": {"dtype": "int", "minimum": 0},
                        "amount": {"dtype": "float", "minimum": 0, "maximum": 1e6},
                        "kind": {"dtype": "string", "nullable": True},
                        "at": {"dtype": "timestamp"},
                    },
                    "time": "at",
                    "on_demand": ["facts"],
                }
            },
            "on_demand": {
                "facts": {
                    "function": "benchmarks._serving_world.request_facts",
                    "numeric": ["amount", "hour"],
                    "categorical": ["kind"],
                }
            },
            "labels": {
                "source": "orders",
                "id": "id",
                "time": "at",
                "label": "label",
                "known_at": "known_at",
            },
        }
    )


def make(folder: Path, entities: int, sizes: Sequence[int]) -> World:
    """Write all that the servers and the load need; ``sizes`` are the rows of a request."""
    world = World(folder)
    _fill(world.home, entities)
    for version in (1, 2):
        _write_model(world, version)
    _write_bodies(world, entities, sizes)
    return world


def _fill(home: Home, entities: int) -> None:
    random = np.random.default_rng(0)
    features = declare()
    store = open_online(features, home.online(PROJECT), PROJECT)
    for view, (entity, names) in VIEWS.items():
        times = pa.array(AT_US - random.integers(HOUR_US, 24 * HOUR_US, entities))
        numbers = range(entities)
        keys = [_customer(n) for n in numbers] if entity == "customer" else list(numbers)
        values = [random.normal(size=entities) for _ in names]
        schema = define(features, view).schema
        columns = [pa.array(keys), times, times, *map(pa.array, values)]
        typed = [column.cast(field.type) for column, field in zip(columns, schema, strict=True)]
        store.write(view, pa.table(typed, schema=schema))
    store.flush()


def _write_model(world: World, version: int) -> None:
    """Write a package of a small network with random weights, and its TorchScript."""
    numeric, categorical = feature_columns(declare(), SERVICE)
    random = np.random.default_rng(1)
    columns: Columns = {name: random.normal(size=1000) for name in numeric}
    columns |= {"amount": random.uniform(0, 200, 1000), "hour": random.uniform(0, 24, 1000)}
    columns |= {name: np.array(random.choice(CATEGORIES, 1000), object) for name in categorical}
    encoder = Encoder.fit({n: columns[n] for n in numeric}, {n: columns[n] for n in categorical})
    torch.manual_seed(version)
    model = Model.model_validate(
        {
            "_target_": "mlops_ray.training.models.TabularNet",
            "num_numeric": encoder.spec.num_numeric,
            "cardinalities": list(encoder.spec.cardinalities),
            "hidden_sizes": [128, 64],
        }
    )
    network = build(model).eval()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    manifest = package.Manifest(
        model=model,
        encoder=encoder.spec,
        service_name=SERVICE,
        service=declare().services[SERVICE],
        label="label",
        time="at",
    )
    package.write(world.package(version), manifest, weights, Reference.fit(columns, 10))
    whole = torch.jit.freeze(torch.jit.script(_Whole(network, encoder.spec).eval()))
    torch.jit.save(whole, str(world.script(version)))


class _Whole(nn.Module):
    """From features as numbers (NaN where one is missing, categories as codes) to scores."""

    def __init__(self, network: nn.Module, spec: package.EncoderSpec) -> None:
        super().__init__()
        self.network = network
        self.width = len(spec.numeric)
        self.clip = spec.clip
        self.register_buffer("means", torch.tensor(spec.means))
        self.register_buffer("stds", torch.tensor(spec.stds))

    def forward(self, features: Tensor) -> Tensor:
        numeric = (features[:, : self.width] - self.means) / self.stds
        numeric = torch.nan_to_num(numeric.clamp(-self.clip, self.clip))
        codes = features[:, self.width :].long()
        return torch.sigmoid(self.network(numeric, codes))


def _write_bodies(world: World, entities: int, sizes: Sequence[int]) -> None:
    features = declare()
    store = open_online(features, world.home.online(PROJECT), PROJECT, readonly=True)
    lookup = OnlineLookup(features, SERVICE, store)
    random = np.random.default_rng(2)
    for rows in sizes:
        lines: dict[str, list[str]] = {"ours": [], "features": []}
        for _ in range(BODIES):
            asked = _rows(random, entities, rows)
            matrix = _matrix(lookup(_columns(asked)))
            lines["ours"].append(json.dumps({"rows": asked}, separators=(",", ":")))
            lines["features"].append(json.dumps({"inputs": matrix}, separators=(",", ":")))
        for kind, texts in lines.items():
            world.bodies(kind, rows).write_text("\n".join(texts))


def _rows(random: np.random.Generator, entities: int, rows: int) -> list[dict[str, Any]]:
    return [
        {
            "customer": _customer(int(random.integers(entities))),
            "shop": int(random.integers(entities)),
            "article": int(random.integers(entities)),
            "amount": round(float(random.uniform(0, 200)), 2),
            "kind": str(random.choice(CATEGORIES)),
            "at": AT.isoformat(),
        }
        for _ in range(rows)
    ]


def _columns(rows: list[dict[str, Any]]) -> Columns:
    columns: Columns = {
        name: np.array([row[name] for row in rows]) for name in ("shop", "article", "amount")
    }
    columns |= {
        name: np.array([row[name] for row in rows], dtype=object) for name in ("customer", "kind")
    }
    return columns | {"at": np.full(len(rows), AT_US).view("datetime64[us]")}


def _matrix(columns: Columns) -> list[list[float]]:
    codes = {category: code for code, category in enumerate(sorted(CATEGORIES), start=1)}
    arrays = [
        np.array([codes[value] for value in column], np.float64)
        if column.dtype == object
        else column
        for column in columns.values()
    ]
    rows: list[list[float]] = np.round(np.stack(arrays, axis=1), 6).tolist()
    return rows


def _customer(number: int) -> str:
    return f"customer-{number:06d}"

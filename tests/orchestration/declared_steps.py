"""Step functions and workflows for the tests of declarations in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from mlops_ray.config.workflow import Workflow
from mlops_ray.orchestration.declare import workflow

NOTHING = 3


class Loaded(BaseModel):
    rows: int
    parts: list[int]


class Model(BaseModel):
    auc: float


def load(path: str) -> Loaded:
    return Loaded(rows=len(path), parts=[1, 2])


def fit(data: int) -> Model:
    return Model(auc=data)


def score(part: int, mode: str = "full") -> float:
    return part * len(mode)


with workflow("nightly") as nightly:
    nightly.step("load", load, path="a.csv", mode="effect")


def of_config(config: Mapping[str, Any]) -> Workflow:
    with workflow("made") as made:
        made.step("load", load, path=f"{config['seed']}.csv", mode="effect")
    return made.workflow

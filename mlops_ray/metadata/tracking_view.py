"""What MLflow shows of a run and of its steps. Pure: nothing here talks to MLflow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.records import Link, RunRecord, StepRecord

if TYPE_CHECKING:
    import pyarrow as pa

RUN_TAG = "mlops_ray.run_id"
STEP_TAG = "mlops_ray.step"
STATE_TAG = "mlops_ray.state"
DONE_TAG = "mlops_ray.mirrored"

_LONGEST_NAME = 250
_LONGEST_TAG = 8000
_LONGEST_PARAM = 6000
_LONGEST_DATASET_DIGEST = 36
_MOST_PARAMS_OF_ONE_INPUT = 60
_RUN_STATUS = {"succeeded": "FINISHED", "interrupted": "KILLED", "cancelled": "KILLED"}
_STEP_STATUS = {
    "succeeded": "FINISHED",
    "cached": "FINISHED",
    "skipped": "KILLED",
    "cancelled": "KILLED",
    "failed": "FAILED",
    "uncertain": "FAILED",
}
_UNFIT = re.compile(r"[^\w\-. /:]")


@dataclass(frozen=True)
class Dataset:
    """A table that a step read or made. ``use`` is ``input`` or ``output``."""

    name: str
    use: str
    ref: ArtifactRef
    where: str
    schema: str = ""

    @property
    def digest(self) -> str:
        """As much of the digest as MLflow takes."""
        return self.ref.digest[:_LONGEST_DATASET_DIGEST]


@dataclass(frozen=True)
class Shown:
    """One MLflow run to be. ``state`` differs where anything that is shown differs.

    Times are milliseconds since 1970; parameters and tags are as short as MLflow demands.
    """

    name: str
    status: str
    started_ms: int
    ended_ms: int
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()

    @property
    def state(self) -> str:
        """A digest of what is shown."""
        datasets = [(d.name, d.use, d.ref.digest) for d in self.datasets]
        shown = (self.status, self.ended_ms, self.tags, self.params, self.metrics, datasets)
        return digest_json(shown)[:16]


def show_run(run: RunRecord, steps: Sequence[StepRecord], folder: str) -> Shown:
    """Return what MLflow shows of a run; ``folder`` is where its logs lie."""
    told = run.provenance
    tags = {
        RUN_TAG: run.run_id,
        STEP_TAG: "",
        "mlflow.source.name": run.workflow,
        "mlflow.source.type": "JOB",
        "mlops_ray.status": run.status,
        "mlops_ray.reason": run.reason,
        "mlops_ray.project": run.project,
        "mlops_ray.workflow": run.workflow,
        "mlops_ray.owner": run.owner,
        "mlops_ray.folder": folder,
        "mlops_ray.config_digest": run.config_digest,
    }
    tags |= {f"mlops_ray.{name}": _text(value) for name, value in told.items() if value is not None}
    if told.get("commit"):
        tags["mlflow.source.git.commit"] = str(told["commit"])
    if told.get("user"):
        tags["mlflow.user"] = str(told["user"])
    counts: dict[str, float] = {}
    for step in steps:
        counts[f"steps_{step.status}"] = counts.get(f"steps_{step.status}", 0.0) + 1
    return _shown(
        f"{run.workflow} {run.run_id}",
        _RUN_STATUS.get(run.status, "FAILED"),
        (run.started_at, run.ended_at or run.started_at),
        tags,
        {"workflow": run.workflow, "config_digest": run.config_digest, "seed": told.get("seed")},
        counts | {"steps": float(len(steps))},
    )


def show_step(
    run: RunRecord,
    step: StepRecord,
    parts: Mapping[str, Any] | None,
    links: Sequence[Link],
    items: Sequence[StepRecord],
    datasets: tuple[Dataset, ...] = (),
    log: str = "",
) -> Shown | None:
    """Return what MLflow shows of a step; None for one that has not come to an end.

    Args:
        run: The run.
        step: Its record.
        parts: What its key was made of, if it has one.
        links: What it read and wrote by name.
        items: The calls of a mapped step.
        datasets: Tables among its inputs and its output.
        log: The file that its output went to.
    """
    if step.status not in _STEP_STATUS:
        return None
    tags = {
        RUN_TAG: run.run_id,
        STEP_TAG: step.name,
        "mlops_ray.status": step.status,
        "mlops_ray.key": step.key,
        "mlops_ray.output": step.output.digest if step.output else None,
        "mlops_ray.output_kind": step.output.kind if step.output else None,
        "mlops_ray.error": step.error,
        "mlops_ray.reason": step.message,
        "mlops_ray.node": step.node,
        "mlops_ray.target": (parts or {}).get("target"),
        "mlops_ray.log": log,
    }
    for direction in ("reads", "writes"):
        names = [f"{link.kind}:{link.name}" for link in links if link.direction == direction]
        tags[f"mlops_ray.{direction}"] = ", ".join(sorted(names))
    end = step.ended_at or run.ended_at or run.started_at
    params = dict(_inputs((parts or {}).get("inputs") or {})) | step.params
    metrics = step.metrics | _measures(step, items)
    moments = (step.started_at or end, end)
    return _shown(step.name, _STEP_STATUS[step.status], moments, tags, params, metrics, datasets)


def arrow_schema(schema: pa.Schema) -> str:
    """Write an Arrow schema as MLflow writes those of its datasets."""
    columns = [
        {"name": column.name, "type": _column_type(column.type), "required": not column.nullable}
        for column in schema
    ]
    return json.dumps({"mlflow_colspec": columns})


def _column_type(arrow: pa.DataType) -> str:
    import pyarrow.types as kinds

    tests = {
        "boolean": kinds.is_boolean,
        "double": kinds.is_float64,
        "float": kinds.is_floating,
        "long": lambda t: kinds.is_int64(t) or kinds.is_uint32(t) or kinds.is_uint64(t),
        "integer": kinds.is_integer,
        "datetime": kinds.is_temporal,
        "binary": lambda t: kinds.is_binary(t) or kinds.is_large_binary(t),
    }
    return next((name for name, holds in tests.items() if holds(arrow)), "string")


def _measures(step: StepRecord, items: Sequence[StepRecord]) -> dict[str, float]:
    found = {"attempts": float(step.attempt), "cache_hit": float(step.status == "cached")}
    if step.rows is not None:
        found["rows"] = float(step.rows)
    if step.output is not None:
        found["output_bytes"] = float(step.output.size)
    if step.started_at and step.ended_at:
        found["duration_s"] = (step.ended_at - step.started_at).total_seconds()
    if items:
        found["items"] = float(len(items))
        for item in items:
            name = f"items_{item.status}"
            found[name] = found.get(name, 0.0) + 1
    return found


def _inputs(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give the configured inputs of a step by dotted name, and of other steps' outputs the digest."""
    for name, part in inputs.items():
        if not isinstance(part, Mapping):
            yield name, part
        elif "config" in part:
            leaves = list(_leaves(name, part["config"]))
            yield from (
                leaves if len(leaves) <= _MOST_PARAMS_OF_ONE_INPUT else [(name, part["config"])]
            )
        elif "step" in part:
            yield name, part.get("value", f"${part['step']} {str(part.get('digest'))[:12]}")
        else:
            yield name, dict(part)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(f"{path}.{name}", item)
    else:
        yield path, value


def _shown(
    name: str,
    status: str,
    moments: tuple[datetime, datetime],
    tags: Mapping[str, str | None],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    datasets: tuple[Dataset, ...] = (),
) -> Shown:
    started_ms, ended_ms = (int(moment.timestamp() * 1000) for moment in moments)
    return Shown(
        name=name,
        status=status,
        started_ms=started_ms,
        ended_ms=ended_ms,
        tags={key: _cut(value, _LONGEST_TAG) for key, value in tags.items() if value is not None},
        params={_fit(key): _cut(_text(value), _LONGEST_PARAM) for key, value in params.items()},
        metrics={
            _fit(key): float(value) for key, value in metrics.items() if not math.isnan(value)
        },
        datasets=datasets,
    )


def _fit(name: str) -> str:
    """Make a name that MLflow takes, which may use it as a path: ``loss//train`` is ``loss/train``."""
    parts = _UNFIT.sub("_", name)[:_LONGEST_NAME].split("/")
    kept = [re.sub(r"^\.\.", "__", part) for part in parts if part not in ("", ".")]
    return "/".join(kept) or "_"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

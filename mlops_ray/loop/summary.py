"""The report's numbers: the loop against the first model left alone, from a replay's parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.loop.recording import Recording, percentile_ms
from mlops_ray.loop.results import ReplayResult
from mlops_ray.monitoring.labels import SHADOW
from mlops_ray.training.evaluation import auc, calibration, log_loss

STATIC = "first"
CALIBRATION_BINS = 10
MOST_NOISE = 0.02

Values = NDArray[Any]


def summarise(result: ReplayResult, versions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole report as a JSON value.

    Means are means of the monthly values. The static model's score of a row is its shadow score, or
    the answer's own where it was the static model that answered. A month in which labelled rows of
    either are of one class only has no AUC, and does not count.

    Args:
        result: A finished replay.
        versions: What the registry knows of each version, as ``Registry.describe`` gives it.
    """
    recording = Recording(Path(result.folder))
    history = json.loads((recording.folder / "history.json").read_text())
    rows = recording.rows()
    scored = scored_rows(rows, result.versions.get(STATIC))
    months = [_metrics(part, label) for label, part in _by_month(scored)]
    weeks = [_metrics(part, label) for label, part in _by_week(scored, result.start)]
    retrainings = [entry for entry in history if entry["kind"] == "retraining"]
    triggers = [_trigger(entry, retrainings) for entry in history if entry["kind"] == "trigger"]
    requests = recording.requests()
    return {
        "summary": _summary(result, months, triggers),
        "period": {"start": result.start.isoformat(), "end": result.end.isoformat()},
        "months": months,
        "weeks": weeks,
        "triggers": triggers,
        "served": [entry for entry in history if entry["kind"] == "served"],
        "versions": [_version(version, rows) for version in versions],
        "drift": _drift(history),
        "calibration": _calibration(scored),
        "latency_ms": {f"p{p}": percentile_ms(requests, p) for p in (50, 90, 99, 99.9, 100)},
        "failures": _failures(requests),
        "rows": {
            "answered": len(rows),
            "labelled": len(rows) - rows["label"].null_count,
            "without_outcome": rows["label"].null_count,
            "unlogged": result.unlogged_rows,
        },
    }


def scored_rows(rows: pa.Table, static_version: int | None) -> pa.Table:
    """Return time, label, loop and static scores of the labelled rows; static may be null."""
    rows = rows.filter(pc.is_valid(rows["label"]))
    column = SHADOW + STATIC
    static = rows[column] if column in rows.column_names else pa.nulls(len(rows), pa.float64())
    if static_version is not None:
        own = pc.equal(rows["version"], static_version)
        static = pc.if_else(own, rows["score"], static)
    columns = {"time": rows["time"], "label": rows["label"], "loop": rows["score"]}
    return pa.table(columns | {"static": static})


def _summary(
    result: ReplayResult, months: list[dict[str, Any]], triggers: list[dict[str, Any]]
) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"{metric}_{who}_mean": _mean(month[f"{metric}_{who}"] for month in months)
        for metric in ("auc", "log_loss")
        for who in ("loop", "static")
    }
    loop, static = values["auc_loop_mean"], values["auc_static_mean"]
    values["auc_gain_mean"] = None if loop is None or static is None else loop - static
    return values | {
        "retrainings": len(triggers),
        "promotions": sum(bool(trigger["promoted"]) for trigger in triggers),
        "failed_retrainings": sum(trigger["outcome"] == "failed" for trigger in triggers),
        "requests": result.requests,
        "background_requests": result.background_requests,
        "failed_requests": result.failed_requests,
        "rows": result.rows,
        "p50_ms": result.p50_ms,
        "p99_ms": result.p99_ms,
        "wall_s": result.wall_s,
    }


def _by_month(scored: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    keys = pc.strftime(scored["time"], "%Y-%m")
    for key in sorted(pc.unique(keys).to_pylist()):
        yield key, scored.filter(pc.equal(keys, key))


def _by_week(scored: pa.Table, start: datetime) -> Iterator[tuple[str, pa.Table]]:
    """Weeks of seven days from the replay's start on, named by their first day."""
    week_us = timedelta(days=7) // timedelta(microseconds=1)
    time_us = scored["time"].cast(pa.int64()).to_numpy()
    start_us = int(pa.scalar(start, pa.timestamp("us", tz="UTC")).value)
    weeks = (time_us - start_us) // week_us
    for week in np.unique(weeks):
        first = (start + timedelta(days=7 * int(week))).astimezone(UTC)
        yield first.date().isoformat(), scored.filter(pa.array(weeks == week))


def _metrics(part: pa.Table, label: str) -> dict[str, Any]:
    """Metrics of loop and static model on the same rows: those that both have scored."""
    both = part.filter(pc.is_valid(part["static"]))
    used = both if len(both) else part
    labels, loop = used["label"].to_numpy(), used["loop"].to_numpy()
    values = {
        "period": label,
        "rows": len(used),
        "positive_share": float(labels.mean()) if len(labels) else None,
        "auc_loop": _finite(auc(labels, loop)),
        "log_loss_loop": _finite(log_loss(labels, loop)),
        "auc_static": None,
        "log_loss_static": None,
    }
    if len(both):
        static = both["static"].to_numpy()
        values["auc_static"] = _finite(auc(labels, static))
        values["log_loss_static"] = _finite(log_loss(labels, static))
    return values


def _trigger(entry: Mapping[str, Any], retrainings: list[dict[str, Any]]) -> dict[str, Any]:
    ended = next((r for r in retrainings if r["number"] == entry["number"]), {})
    return {
        "number": entry["number"],
        "at": entry["at"],
        "reason": entry["reason"],
        "evidence": entry["evidence"],
        "job": entry["submission_id"],
        "outcome": ended.get("outcome", "unfinished"),
        "promoted": ended.get("promoted", False),
        "ended_at": ended.get("at"),
        "from_version": entry["version"],
        "to_version": ended.get("version"),
        "wall_s": ended.get("wall_s"),
        "message": ended.get("message", ""),
    }


def _version(described: Mapping[str, Any], rows: pa.Table) -> dict[str, Any]:
    number = described["version"]
    answered = rows.filter(pc.equal(rows["version"], number))
    bounds = pc.min_max(answered["time"]).as_py() if len(answered) else {}
    report = described.get("report") or {}
    return {
        "version": number,
        "aliases": described.get("aliases", []),
        "digest": described.get("digest"),
        "auc": report.get("auc"),
        "log_loss": report.get("log_loss"),
        "judged_until": report.get("until"),
        "rows_answered": len(answered),
        "served_from": _iso(bounds.get("min")),
        "served_to": _iso(bounds.get("max")),
        "lineage": described.get("lineage", {}),
    }


def _drift(history: list[dict[str, Any]]) -> dict[str, Any]:
    """PSI of every feature over time, [features][times], null where not measured.

    Without the judgements on so few rows that sampling alone gives more than ``MOST_NOISE``.
    """
    measured = [
        entry
        for entry in history
        if entry["kind"] == "measured" and (entry["drift"]["noise"] or 1.0) <= MOST_NOISE
    ]
    features = sorted({name for entry in measured for name in entry["drift"]["psi"]})
    return {
        "times": [entry["at"] for entry in measured],
        "versions": [entry["version"] for entry in measured],
        "features": features,
        "psi": [[e["drift"]["psi"].get(name) for e in measured] for name in features],
    }


def _calibration(scored: pa.Table) -> list[dict[str, float]]:
    if not len(scored):
        return []
    bins = calibration(scored["label"].to_numpy(), scored["loop"].to_numpy(), CALIBRATION_BINS)
    return [{"score": score, "share": share, "rows": rows} for score, share, rows in bins]


def _failures(requests: pa.Table, most: int = 20) -> list[dict[str, Any]]:
    failed = requests.filter(pc.is_valid(requests["error"]))
    return [
        {"time": entry["time"].isoformat(), "kind": entry["kind"], "error": entry["error"]}
        for entry in failed.slice(0, most).to_pylist()
    ]


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None

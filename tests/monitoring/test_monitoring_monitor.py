from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mlops_ray.config.monitoring import Monitoring
from mlops_ray.errors import MonitoringError
from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.profile import Reference
from mlops_ray.metadata.stability import psi
from mlops_ray.monitoring.measurement import ServedVersion
from mlops_ray.monitoring.monitor import Monitor, reference_counts

START = datetime(2013, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MONITORING = Monitoring.model_validate(
    {
        "every": "1d",
        "drift": {"window": "7d", "bins": 5},
        "performance": {"window": "7d"},
        "label_horizon": "3d",
    }
)
REFERENCE = Reference.fit({"x": np.random.default_rng(0).normal(size=5000)}, 5)
SERVED = ServedVersion(version=1, reference_digest=REFERENCE.digest, auc=0.8, log_loss=0.5)


def deltas(days: int, rows: int = 200, version: int = 1, seed: int = 1) -> list[Delta]:
    """One delta a day; x wanders off by .1 a day; labels come with the next day's delta."""
    chance = np.random.default_rng(seed)
    made, late = [], LABEL_SCHEMA.empty_table()
    for number in range(days):
        values = chance.normal(0.1 * number, 1, rows)
        ids = [f"v{version}-{number}-{row}" for row in range(rows)]
        times = [START + number * DAY + timedelta(minutes=row) for row in range(rows)]
        scores = chance.random(rows)
        columns = [ids, times, scores, [version] * rows, scores / 2]
        schema = prediction_schema(("first",))
        arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        day = (START + number * DAY).date().isoformat()
        made.append(
            Delta(
                buckets={REFERENCE.digest: {day: REFERENCE.bin({"x": values})}},
                predictions=pa.Table.from_arrays(arrays, schema=schema),
                labels=late,
                positions={f"v{version}-{number}": 1},
            )
        )
        outcomes = (chance.random(rows) < scores).astype(np.int8)
        known = [time + timedelta(hours=30) for time in times]
        label_columns = [ids, outcomes, known, known]
        late = pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(label_columns, LABEL_SCHEMA, strict=True)],
            schema=LABEL_SCHEMA,
        )
    return made


def test_measures_what_direct_computation_gives() -> None:
    stream = deltas(12)
    monitor = Monitor(MONITORING)
    for delta in stream:
        monitor.observe(delta)
    now = START + 12 * DAY
    found = monitor.measure(now, SERVED, REFERENCE.profile.counts)

    window = [stream[number] for number in range(5, 12)]
    days = [profile for delta in window for profile in delta.buckets[REFERENCE.digest].values()]
    live = sum(profile.counts["x"] for profile in days)
    assert found.drift.rows == 7 * 200
    assert found.drift.psi == {"x": pytest.approx(psi(REFERENCE.profile.counts["x"], live))}
    assert found.drift.psi["x"] > 0.2

    scores = pa.concat_tables([delta.predictions for delta in window])
    labels = {entry["id"]: entry["label"] for delta in stream for entry in delta.labels.to_pylist()}
    pairs = [
        (labels[key], score)
        for key, score in zip(scores["id"].to_pylist(), scores["score"].to_pylist(), strict=True)
        if key in labels
    ]
    truth, said = zip(*pairs, strict=True)
    assert found.performance.rows == len(pairs) == 6 * 200
    assert found.performance.positives == sum(truth)
    assert found.performance.auc == pytest.approx(roc_auc_score(truth, said))
    assert found.performance.log_loss == pytest.approx(log_loss(truth, said))
    assert found.performance.reference_auc == 0.8


def test_order_repetition_and_other_versions_change_nothing() -> None:
    stream = deltas(9)
    straight, shuffled = Monitor(MONITORING), Monitor(MONITORING)
    for delta in stream:
        assert straight.observe(delta)
    mixed = stream * 2 + deltas(9, version=2)
    random.Random(3).shuffle(mixed)
    for delta in mixed:
        shuffled.observe(delta)
    now = START + 9 * DAY
    expected = straight.measure(now, SERVED, REFERENCE.profile.counts)
    found = shuffled.measure(now, SERVED, REFERENCE.profile.counts)
    assert found.performance == expected.performance
    assert found.drift.rows == 2 * expected.drift.rows  # version 2 has the same reference


def test_nothing_observed() -> None:
    found = Monitor(MONITORING).measure(START, SERVED, REFERENCE.profile.counts)
    assert found.drift.rows == found.performance.rows == 0
    assert found.performance.auc is None


def test_one_class_has_no_auc() -> None:
    stream = deltas(3)
    monitor = Monitor(MONITORING)
    for delta in stream:
        ones = pa.array([1] * len(delta.labels), pa.int8())
        labels = delta.labels.set_column(1, "label", ones)
        monitor.observe(Delta({}, delta.predictions, labels, delta.positions))
    found = monitor.measure(START + 3 * DAY, SERVED, {}).performance
    assert (found.rows, found.positives, found.auc) == (400, 400, None)
    assert found.log_loss is not None


def test_saved_and_loaded_measures_the_same(tmp_path: Path) -> None:
    stream = deltas(9)
    monitor = Monitor(MONITORING)
    for delta in stream[:6]:
        monitor.observe(delta)
    monitor.save(tmp_path)
    again = Monitor(MONITORING)
    again.load(tmp_path)
    for delta in stream[5:]:  # the sixth was seen already
        monitor.observe(delta)
        again.observe(delta)
    now = START + 9 * DAY
    counts = REFERENCE.profile.counts
    assert again.measure(now, SERVED, counts) == monitor.measure(now, SERVED, counts)
    assert again.rows(START, now).equals(monitor.rows(START, now))
    assert again.rows_observed == 9 * 200


def test_a_broken_save_is_refused(tmp_path: Path) -> None:
    monitor = Monitor(MONITORING)
    monitor.save(tmp_path)
    (tmp_path / "labels.arrow").write_bytes(b"nonsense")
    with pytest.raises(MonitoringError, match="cannot be read"):
        Monitor(MONITORING).load(tmp_path)


def test_reference_counts(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(REFERENCE.to_json()))
    digest, counts = reference_counts(path)
    assert digest == REFERENCE.digest
    assert counts["x"].tolist() == REFERENCE.profile.counts["x"].tolist()
    path.write_text("{}")
    with pytest.raises(MonitoringError, match="reference"):
        reference_counts(path)

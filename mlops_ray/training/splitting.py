"""Splitting labelled rows by time."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pyarrow as pa

from mlops_ray.config.base import format_duration
from mlops_ray.config.features import Labels
from mlops_ray.config.training import Split
from mlops_ray.errors import SchemaError, TrainingError

PARTS = ("train", "validation", "test", "excluded")
MIN_ROWS = 20
"""Fewer rows than this in a part are a mistake in the durations, not a training."""


def split_rows(data: pa.Table, split: Split, labels: Labels, until: datetime | None) -> pa.Table:
    """Return ``data`` with a string column ``split``; rows and their order stay.

    With U = ``until``, or else the newest prediction time: test is (U − test, U], validation the
    ``validation`` before it, train all that is older. Excluded are rows without a label, rows whose
    label is not known by ``until``, rows after U, and rows of train or validation whose label
    became known only inside the test part.

    Raises:
        SchemaError: A label column is missing.
        TrainingError: A part has too few rows or only one class.
    """
    for name in (labels.time, labels.known_at, labels.label):
        if name not in data.column_names:
            raise SchemaError(f"the training set lacks the label column {name!r}")
    times_us = _instants_us(data, labels.time)
    known_us = _instants_us(data, labels.known_at)
    has_label = np.asarray(data[labels.label].is_valid(), dtype=bool)
    if len(times_us) == 0:
        raise _too_few({}, split, until)
    end_us = _microseconds(until) if until else int(times_us.max())
    test_us = end_us - _length_us(split.test)
    validation_us = test_us - _length_us(split.validation)
    usable = has_label & (times_us <= end_us)
    if until:
        usable &= known_us <= end_us
    in_test = usable & (times_us > test_us)
    before = usable & (times_us <= test_us) & (known_us <= test_us)
    parts = np.full(len(times_us), "excluded", dtype=object)
    parts[before & (times_us <= validation_us)] = "train"
    parts[before & (times_us > validation_us)] = "validation"
    parts[in_test] = "test"
    _check(parts, data[labels.label], split, until)
    if "split" in data.column_names:
        data = data.drop_columns(["split"])
    return data.append_column("split", pa.array(parts, pa.string()))


def counts(data: pa.Table) -> dict[str, int]:
    """Return the number of rows of each part."""
    found = {item["values"]: item["counts"] for item in data["split"].value_counts().to_pylist()}
    return {part: found.get(part, 0) for part in PARTS}


def _check(parts: np.ndarray, label: pa.ChunkedArray, split: Split, until: datetime | None) -> None:
    positive = np.asarray(label.cast(pa.float64()).to_numpy()) > 0.5
    found = {part: int((parts == part).sum()) for part in PARTS}
    positives = {part: int(positive[parts == part].sum()) for part in PARTS[:3]}
    if any(found[part] < MIN_ROWS for part in PARTS[:3]):
        raise _too_few(found, split, until)
    for part, count in positives.items():
        if count in (0, found[part]):
            raise TrainingError(
                f"all {found[part]} rows of the {part} part have the same label",
                why="a classifier needs rows of both classes in every part",
                fix="widen training.split, or look at the label",
            )


def _too_few(found: dict[str, int], split: Split, until: datetime | None) -> TrainingError:
    rows = ", ".join(f"{part} {found.get(part, 0)}" for part in PARTS)
    return TrainingError(
        f"too few rows to train and judge a model: {rows}",
        why=f"each part needs at least {MIN_ROWS}; test is {format_duration(split.test)}, "
        f"validation {format_duration(split.validation)} before "
        f"{until.isoformat() if until else 'the newest row'}",
        fix="shorten training.split.test and training.split.validation, or take more data",
    )


def _instants_us(data: pa.Table, name: str) -> np.ndarray:
    instants = data[name].cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return np.asarray(instants.fill_null(np.iinfo(np.int64).max).to_numpy())


def _microseconds(moment: datetime) -> int:
    value = pa.scalar(moment, pa.timestamp("us", "UTC")).cast(pa.int64()).as_py()
    assert isinstance(value, int)
    return value


def _length_us(length: object) -> int:
    value = pa.scalar(length, pa.duration("us")).cast(pa.int64()).as_py()
    assert isinstance(value, int)
    return value

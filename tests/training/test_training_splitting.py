from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training.training_samples import features

from mlops_ray.config.training import Split
from mlops_ray.errors import SchemaError, TrainingError
from mlops_ray.training import splitting
from mlops_ray.training.splitting import counts, split_rows

START = datetime(2013, 1, 1, tzinfo=UTC)
SPLIT = Split(test="10h", validation="5h")
LABELS = features().labels
INSTANT = pa.timestamp("us", "UTC")

HOURS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 20), st.sampled_from([0, 1, None])), max_size=60
)


def table(rows: list[tuple[int, int, int | None]]) -> pa.Table:
    """Each row is (hour of the prediction, hours until the label is known, label)."""
    return pa.table(
        {
            "id": pa.array([str(i) for i in range(len(rows))], pa.string()),
            "at": pa.array([START + timedelta(hours=h) for h, _, _ in rows], INSTANT),
            "known_at": pa.array([START + timedelta(hours=h + d) for h, d, _ in rows], INSTANT),
            "label": pa.array([label for _, _, label in rows], pa.int8()),
        }
    )


def expected(hour: int, delay: int, label: int | None, end: int, known_by: int | None) -> str:
    if label is None or hour > end or (known_by is not None and hour + delay > known_by):
        return "excluded"
    if hour > end - 10:
        return "test"
    if hour + delay > end - 10:
        return "excluded"
    return "validation" if hour > end - 15 else "train"


@given(HOURS, st.one_of(st.none(), st.integers(10, 45)))
def test_each_row_is_where_the_definition_puts_it(rows, until_hour):
    until = None if until_hour is None else START + timedelta(hours=until_hour)
    end = until_hour if until_hour is not None else max((h for h, _, _ in rows), default=0)
    parts = [expected(h, d, label, end, until_hour) for h, d, label in rows]
    usable = all(
        {label for (_, _, label), p in zip(rows, parts, strict=True) if p == part} == {0, 1}
        for part in ("train", "validation", "test")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "MIN_ROWS", 1)
        if not usable:
            with pytest.raises(TrainingError):
                split_rows(table(rows), SPLIT, LABELS, until)
            return
        found = split_rows(table(rows), SPLIT, LABELS, until)
    assert found["split"].to_pylist() == parts
    assert found["id"].to_pylist() == [str(i) for i in range(len(rows))]
    assert sum(counts(found).values()) == len(rows)


def test_too_few_rows_says_how_many():
    with pytest.raises(TrainingError, match="train 1, validation 0, test 2") as caught:
        split_rows(table([(0, 0, 1), (30, 0, 0), (31, 0, 1)]), SPLIT, LABELS, None)
    assert "training.split" in caught.value.fix


def test_no_rows_is_too_few():
    with pytest.raises(TrainingError, match="too few"):
        split_rows(table([]), SPLIT, LABELS, None)


def test_splitting_again_replaces_the_column():
    rows = [(h, 0, h % 2) for h in range(60)] * 6
    once = split_rows(table(rows), SPLIT, LABELS, None)
    assert split_rows(once, SPLIT, LABELS, None).equals(once)


def test_a_missing_label_column_is_named():
    with pytest.raises(SchemaError, match="known_at"):
        split_rows(table([(0, 0, 1)]).drop_columns(["known_at"]), SPLIT, LABELS, None)

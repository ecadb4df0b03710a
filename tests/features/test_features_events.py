"""Events: exactly typed, durable once acknowledged, whatever happens to the process."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError, RequestError, SourceError
from mlops_ray.features.sources.events import check_events, event_schema
from mlops_ray.features.sources.log import EventLog, read_log

COLUMNS: dict[str, Any] = {
    "word": "string",
    "count": "int",
    "share": "float",
    "flag": "bool",
    "at": "timestamp",
}
INSTANT = pa.timestamp("us", tz="UTC")


def test_times_finer_than_a_microsecond_and_times_too_far_away() -> None:
    fine = pa.table({"at": pa.array([-1, 1_999], pa.timestamp("ns"))})
    taken = check_events(COLUMNS, fine)["at"].cast(pa.int64())
    assert taken.to_pylist() == [-1, 1]
    far = pa.table({"at": pa.array([2**62], pa.timestamp("s"))})
    with pytest.raises(RequestError, match="out of range"):
        check_events(COLUMNS, far)


def test_values_keep_their_types() -> None:
    east = timezone(timedelta(hours=2))
    table = check_events(
        COLUMNS,
        [
            {
                "word": "ü",
                "count": 2**62 + 1,
                "share": 2,
                "flag": True,
                "at": "1969-12-31T23:59:59Z",
            },
            {
                "count": np.int64(7),
                "share": float("nan"),
                "at": datetime(2024, 1, 1, 2, tzinfo=east),
            },
            {"at": datetime(2024, 1, 1)},
        ],
    )
    assert table.schema == pa.schema(list(event_schema(COLUMNS))[:-1])
    assert table["count"].to_pylist() == [2**62 + 1, 7, None]
    assert table["share"].to_pylist()[0] == 2.0
    assert np.isnan(table["share"].to_pylist()[1])
    assert table["share"].null_count == 1
    moments = [datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)] + [
        datetime(2024, 1, 1, tzinfo=UTC)
    ] * 2
    assert table["at"].to_pylist() == moments


@pytest.mark.parametrize(
    ("event", "field", "message"),
    [
        ({"count": True}, "count", "must be a whole number, is bool"),
        ({"count": 1.0}, "count", "must be a whole number, is float"),
        ({"count": "1"}, "count", "must be a whole number, is str"),
        ({"count": 2**64}, "count", "too large"),
        ({"share": False}, "share", "must be a number, is bool"),
        ({"word": 1}, "word", "must be a string, is int"),
        ({"flag": 1}, "flag", "must be true or false, is int"),
        ({"at": "yesterday"}, "at", "must be a timestamp in ISO 8601, is 'yesterday'"),
        ({"at": 12}, "at", "must be a timestamp in ISO 8601, is int"),
        ({"wrod": "x"}, "wrod", r"did you mean 'word'\?"),
    ],
)
def test_what_does_not_fit_is_refused_by_row_and_field(
    event: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_events(COLUMNS, [{}, {"word": "fine"}, event])
    assert (caught.value.row, caught.value.field, caught.value.status) == (2, field, 422)


def test_a_table_is_checked_by_its_types() -> None:
    table = pa.table({"count": pa.array([1, None], pa.int16()), "word": pa.array(["a", "b"])})
    assert check_events(COLUMNS, table)["count"].type == pa.int64()
    with pytest.raises(RequestError, match="share: must be a number, is string"):
        check_events(COLUMNS, pa.table({"share": ["1"]}))
    with pytest.raises(RequestError, match="is no declared field"):
        check_events(COLUMNS, pa.table({"other": [1]}))


def events(numbers: list[int]) -> pa.Table:
    schema = event_schema(COLUMNS)
    columns = {name: pa.nulls(len(numbers), schema.field(name).type) for name in COLUMNS}
    columns["count"] = pa.array(numbers, pa.int64())
    return pa.table(columns | {"received_at": pa.array(numbers, pa.int64()).cast(INSTANT)})


def stored(folder: Path) -> list[int]:
    return read_log(folder, event_schema(COLUMNS)).read_all()["count"].to_pylist()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    lost=st.integers(0, 4000),
    seal_after=st.integers(0, 8),
)
def test_a_log_that_was_cut_anywhere_holds_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], lost: int, seal_after: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = EventLog(folder, event_schema(COLUMNS))
    ends, start = [0], 0
    for number, size in enumerate(sizes):
        log.append(events(list(range(start, start + size))))
        start += size
        ends.append(start)
        if number + 1 == seal_after:
            log.close_segment()
    assert stored(folder) == list(range(start))
    log._lock.close()  # as the end of a killed process does
    for file in folder.glob("*.log"):
        content = file.read_bytes()
        file.write_bytes(content[: max(0, len(content) - lost)])
    kept = stored(folder)
    assert kept == list(range(len(kept)))
    assert len(kept) in ends
    assert len(kept) >= (ends[seal_after] if seal_after <= len(sizes) else 0)
    again = EventLog(folder, event_schema(COLUMNS))
    again.append(events([-1]))
    again.close()
    assert stored(folder) == [*kept, -1]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path, event_schema(COLUMNS))
    with pytest.raises(FeatureStoreError, match="another process writes"):
        EventLog(tmp_path, event_schema(COLUMNS))
    log.close()
    EventLog(tmp_path, event_schema(COLUMNS)).close()


def test_columns_may_be_added_and_not_change_their_type(tmp_path: Path) -> None:
    log = EventLog(tmp_path, event_schema({"count": "int"}))
    log.append(events([1]).select(["count", "received_at"]))
    log.close()
    wider = event_schema({"count": "int", "word": "string"})
    log = EventLog(tmp_path, wider)
    log.append(events([2]).select(["count", "word", "received_at"]))
    assert read_log(tmp_path, wider).read_all()["word"].to_pylist() == [None, None]
    with pytest.raises(SourceError, match="'count' stored as int64"):
        read_log(tmp_path, event_schema({"count": "string"})).read_all()


def test_many_small_appends_are_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_ray.features.sources.log._FULL_RECORDS", 10)
    log = EventLog(tmp_path, event_schema(COLUMNS))
    for number in range(35):
        log.append(events([number]))
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    assert stored(tmp_path) == list(range(35))


def test_an_append_holds_though_its_segment_cannot_be_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError("no space left")

    log = EventLog(tmp_path, event_schema(COLUMNS))
    with monkeypatch.context() as patch:
        patch.setattr("mlops_ray.features.sources.log._FULL_RECORDS", 2)
        patch.setattr("mlops_ray.features.sources.log.write_segment", full)
        log.append(events([1]))
        log.append(events([2]))
    log.close()
    EventLog(tmp_path, event_schema(COLUMNS)).close()
    assert stored(tmp_path) == [1, 2]

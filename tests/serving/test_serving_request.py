"""Bodies in, columns or one clear refusal out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import RequestField
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.feedback import parse_feedback
from mlops_ray.serving.formats.instants import instant, instants
from mlops_ray.serving.formats.request import PredictRequest, RequestSchema

NOW = datetime(2024, 3, 1, tzinfo=UTC)
INPUTS = {
    "origin": RequestField(dtype="string"),
    "tail": RequestField(dtype="string", nullable=True),
    "flight": RequestField(dtype="int", minimum=0),
    "gate": RequestField(dtype="int", nullable=True),
    "distance": RequestField(dtype="float", minimum=0, maximum=10_000),
    "wind": RequestField(dtype="float", nullable=True),
    "late": RequestField(dtype="bool"),
    "at": RequestField(dtype="timestamp"),
    "seen": RequestField(dtype="timestamp", nullable=True),
}
ROW: dict[str, Any] = {
    "origin": "EWR",
    "tail": None,
    "flight": 12,
    "gate": 4,
    "distance": 2500.5,
    "wind": None,
    "late": False,
    "at": "2013-03-01T13:15:00Z",
    "seen": None,
}
SCHEMA = RequestSchema(INPUTS, max_rows=4)


def refuse(content: Any) -> RequestError:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(RequestError) as caught:
        SCHEMA.parse(body)
    return caught.value


def test_columns_have_declared_types() -> None:
    request = SCHEMA.parse(orjson.dumps({"rows": [ROW, ROW], "ids": ["a", "b"]}))
    assert request.rows == 2
    assert request.ids == ["a", "b"]
    kinds = {name: column.dtype for name, column in request.columns.items()}
    assert kinds == {
        "origin": np.dtype(object),
        "tail": np.dtype(object),
        "flight": np.dtype(np.int64),
        "gate": np.dtype(np.int64),
        "distance": np.dtype(np.float64),
        "wind": np.dtype(np.float64),
        "late": np.dtype(np.bool_),
        "at": np.dtype("datetime64[us]"),
        "seen": np.dtype("datetime64[us]"),
    }
    assert request.columns["tail"].tolist() == [None, None]
    assert np.isnan(request.columns["wind"]).all()
    assert np.isnat(request.columns["seen"]).all()
    assert request.columns["at"][0] == np.datetime64("2013-03-01T13:15:00")


def test_rows_and_columns_say_the_same() -> None:
    rows = [ROW, {**ROW, "flight": 13, "tail": "N1", "gate": None}]
    columns = {name: [row[name] for row in rows] for name in ROW}
    by_rows = SCHEMA.parse(orjson.dumps({"rows": rows})).columns
    by_columns = SCHEMA.parse(orjson.dumps({"columns": columns})).columns
    for name in INPUTS:
        np.testing.assert_array_equal(by_rows[name], by_columns[name])
    assert by_rows["gate"].tolist() == [4, None]


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"distance": math.nan}, "distance", "finite"),
        ({"distance": math.inf}, "distance", "finite"),
        ({"wind": -math.inf}, "wind", "finite"),
        ({"distance": "far"}, "distance", "a number, not a string"),
        ({"distance": True}, "distance", "a number, not true or false"),
        ({"distance": -1}, "distance", "at least 0"),
        ({"distance": 10_001.0}, "distance", "at most 10000"),
        ({"distance": 10**400}, "distance", "too large"),
        ({"wind": 10**400}, "wind", "too large"),
        ({"distance": None}, "distance", "null"),
        ({"flight": 1.0}, "flight", "whole number"),
        ({"flight": 2**63}, "flight", "64 bits"),
        ({"flight": True}, "flight", "whole number"),
        ({"flight": -1}, "flight", "at least 0"),
        ({"origin": 7}, "origin", "a string"),
        ({"origin": None}, "origin", "null"),
        ({"origin": ["EWR"]}, "origin", "not a list"),
        ({"late": 1}, "late", "true or false"),
        ({"at": 1362143700}, "at", "ISO 8601"),
        ({"at": "yesterday"}, "at", "ISO 8601"),
        ({"at": "2013-02-30T00:00:00Z"}, "at", "ISO 8601"),
        ({"at": None}, "at", "null"),
        ({"extra": 1}, "extra", "unknown field 'extra'"),
        ({"distnce": 1}, "distnce", "did you mean distance"),
    ],
)
def test_bad_value_is_named(change: dict[str, Any], field: str, text: str) -> None:
    error = refuse({"rows": [ROW, {**ROW, **change}]})
    assert (error.status, error.field, error.row) == (422, field, 1)
    assert text in error.what


def test_missing_field_is_named() -> None:
    error = refuse({"rows": [{k: v for k, v in ROW.items() if k != "at"}]})
    assert (error.status, error.field, error.row) == (422, "at", 0)


def test_typo_is_reported_rather_than_the_missing_field() -> None:
    row = {("distanc" if name == "distance" else name): value for name, value in ROW.items()}
    error = refuse({"rows": [row]})
    assert error.field == "distanc"
    assert "did you mean distance?" in error.what


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"rows": ' + b"[" * 2_000 + b"]" * 2_000 + b"}", 400, None),
        (b"NaN", 422, None),
        ([], 422, None),
        ({}, 422, "rows"),
        ({"rows": [ROW], "columns": {}}, 422, "rows"),
        ({"row": [ROW]}, 422, "row"),
        ({"rows": []}, 422, "rows"),
        ({"rows": {}}, 422, "rows"),
        ({"rows": [1]}, 422, "rows"),
        ({"rows": [ROW] * 5}, 413, "rows"),
        ({"columns": []}, 422, "columns"),
        ({"columns": {k: [v] * 5 for k, v in ROW.items()}}, 413, "origin"),
        ({"columns": {k: [] for k in ROW}}, 422, "origin"),
        ({"columns": {k: [v] * (2 if k == "at" else 1) for k, v in ROW.items()}}, 422, "at"),
        ({"columns": {**{k: [v] for k, v in ROW.items()}, "late": True}}, 422, "late"),
        ({"rows": [ROW], "ids": "a"}, 422, "ids"),
        ({"rows": [ROW], "ids": ["a", "b"]}, 422, "ids"),
        ({"rows": [ROW], "ids": [1]}, 422, "ids"),
        ({"rows": [ROW], "ids": [""]}, 422, "ids"),
        ({"rows": [ROW], "ids": ["x" * 257]}, 422, "ids"),
        ({"rows": [ROW] * 2, "ids": ["a", "a"]}, 422, "ids"),
    ],
)
def test_bad_body_is_refused(content: Any, status: int, field: str | None) -> None:
    error = refuse(content)
    assert (error.status, error.field) == (status, field)


def test_what_only_python_reads_as_json_is_refused() -> None:
    # A lone surrogate cannot be written as UTF-8 later: it must not come through.
    body = json.dumps({"rows": [{**ROW, "origin": "\ud800"}]}).encode()
    assert refuse(body).status == 400


moments = st.datetimes(
    timezones=st.sampled_from(
        [None, UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-5))]
    )
)


FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def test_rows_of_one_time() -> None:
    text = "2024-02-29T23:59:59.999999+02:00"
    for rows in (1, 2, 63, 200):
        found = instants([text] * rows, "at")
        assert found.dtype == "datetime64[us]"
        assert found.tolist() == [datetime(2024, 2, 29, 21, 59, 59, 999_999)] * rows
        assert np.isnat(instants([None] * rows, "at")).all()
        with pytest.raises(RequestError) as refused:
            instants(["yesterday"] * rows, "at")
        assert refused.value.row == 0


@given(moments)
@example(datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))
@example(datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))))
@example(datetime.min.replace(tzinfo=UTC))
@example(datetime.max.replace(tzinfo=UTC))
def test_instants_are_exact(moment: datetime) -> None:
    body = orjson.dumps({"rows": [{**ROW, "at": moment.isoformat()}]})
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if not FIRST <= aware <= LAST:
        assert (refuse(body).status, refuse(body).field, refuse(body).row) == (422, "at", 0)
        return
    expected = (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    column = SCHEMA.parse(body).columns["at"]
    assert column.astype(np.int64).tolist() == [expected]


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_an_offset_does_not_lead_out_of_the_years(text: str, rows: int) -> None:
    with pytest.raises(RequestError, match="years 1 to 9999") as caught:
        instants(["2024-01-01T00:00:00Z"] * (rows - 1) + [text], "at")
    assert caught.value.row == rows - 1


def test_bounds_are_said_with_all_their_digits() -> None:
    schema = RequestSchema({"m": RequestField(dtype="float", minimum=1234567.0, maximum=1e7)}, 4)
    for value, bound in ((1234566.5, "at least 1234567"), (1e8, "at most 10000000")):
        with pytest.raises(RequestError, match=f"{bound}$"):
            schema.parse(orjson.dumps({"rows": [{"m": value}]}))


def test_a_long_name_is_not_sent_back_whole() -> None:
    name = "x" * 100_000
    schema = RequestSchema({name: RequestField(dtype="int")}, 4)
    with pytest.raises(RequestError) as caught:
        schema.parse(orjson.dumps({"rows": [{name: "text"}]}))
    assert len(str(caught.value)) < 300
    assert caught.value.field == "x" * 80


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(list(ROW.values())),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ROW, "rows", "x"]), inner, max_size=9)
    ),
    max_leaves=12,
)
rows = st.lists(st.fixed_dictionaries(dict.fromkeys(ROW, json_values)) | json_values, max_size=5)
bodies = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"rows": rows}).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"columns": st.fixed_dictionaries(dict.fromkeys(ROW, json_values))}).map(
        lambda value: json.dumps(value).encode()
    ),
    st.fixed_dictionaries({"rows": st.just([ROW]), "ids": json_values}).map(
        lambda value: json.dumps(value).encode()
    ),
)


# Bodies that are sound, or wrong in one place: both ways of reading must say the same of them.
texts = st.text(max_size=6) | st.sampled_from(["EWR", "", "\x00", "ä", "2013-03-01"])
numbers = st.integers() | st.floats() | st.sampled_from([0, -0.0, 2**63 - 1, 2**63, 10**400, 1e4])
times = st.one_of(
    st.datetimes().map(datetime.isoformat),
    st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.isoformat(" ")),
    st.sampled_from(
        [
            "2013-03-01T13:15:00Z",
            "0000-01-01T00:00:00Z",
            "2013-03-01",
            "20130301T131500Z",
            "2013-03-01T24:00:00Z",
            "2013-03-01T13:15:60Z",
            "2013-03-01T13:15:00.1234567Z",
            "2013-03-01t13:15:00z",
            "2013-03-01T13:15Z",
            "2013-W09-5T13",
            "-0001-01-01T00:00:00Z",
            "10000-01-01T00:00:00Z",
            "2013-03-01T13:15:00+14:00",
            "NaT",
            "2013-03-01T13:15:00,5Z",
            " 2013-03-01T13:15:00Z",
            "0001-01-01T00:00:00+14:00",
            "2013-03-01T13:15:00+24:00",
        ]
    ),
)
some_rows = st.builds(
    lambda changes: {**ROW, **changes},
    st.fixed_dictionaries(
        {},
        optional={
            "origin": texts,
            "tail": texts | st.none(),
            "flight": numbers,
            "gate": numbers | st.none(),
            "distance": numbers,
            "wind": numbers | st.none(),
            "late": st.booleans(),
            "at": times,
            "seen": times | st.none(),
        },
    ),
)


def as_list(request: Any) -> Any:
    """What two requests are compared by; NaN equals NaN."""
    if isinstance(request, RequestError):
        return request.status, request.field, request.row, request.what
    columns = {name: (c.dtype.str, c.tolist()) for name, c in request.columns.items()}
    return request.rows, request.ids, repr(columns)


def careful(body: bytes) -> Any:
    """Read with the slow checks alone."""
    quick = SCHEMA._json.read
    SCHEMA._json.read = SCHEMA._json.read_carefully  # type: ignore[method-assign]
    try:
        return outcome(lambda: SCHEMA.parse(body))
    finally:
        SCHEMA._json.read = quick  # type: ignore[method-assign]


@settings(deadline=None)
@given(st.lists(some_rows, min_size=1, max_size=4), st.booleans())
def test_quick_and_careful_reading_agree(rows: list[dict[str, Any]], by_columns: bool) -> None:
    content: Any = {"rows": rows, "ids": None}
    if by_columns:
        content = {"columns": {name: [row[name] for row in rows] for name in ROW}}
    body = json.dumps(content).encode()
    assert as_list(outcome(lambda: SCHEMA.parse(body))) == as_list(careful(body))


@settings(deadline=None)
@given(bodies)
def test_quick_and_careful_reading_agree_on_anything(body: bytes) -> None:
    assert as_list(outcome(lambda: SCHEMA.parse(body))) == as_list(careful(body))


@settings(deadline=None)
@given(st.lists(times | st.none(), min_size=1, max_size=3))
def test_many_times_are_read_as_one_is(values: list[str | None]) -> None:
    schema = RequestSchema({"seen": INPUTS["seen"]}, max_rows=10_000)
    for many in (values, values * 64):
        request = outcome(lambda m=many: schema.parse(orjson.dumps({"columns": {"seen": m}})))
        expected = outcome(lambda m=many: [one_time(v, row) for row, v in enumerate(m)])
        if isinstance(expected, RequestError):
            assert as_list(request) == as_list(expected)
        else:
            assert isinstance(request, PredictRequest)
            assert request.columns["seen"].astype(np.int64).tolist() == expected


def one_time(value: str | None, row: int) -> int:
    return -(2**63) if value is None else instant(value, "seen", row)


def test_a_sound_body_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = RequestSchema(INPUTS, max_rows=4)
    monkeypatch.setattr(schema._json, "read_carefully", lambda body: pytest.fail("read twice"))
    rows = [ROW, {**ROW, "wind": 3, "gate": None, "tail": "N1", "seen": ROW["at"]}]
    schema.parse(orjson.dumps({"rows": rows, "ids": ["a", "b"]}))
    schema.parse(orjson.dumps({"columns": {name: [ROW[name]] * 4 for name in ROW}}))


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        (RequestField(dtype="int", minimum=0.5, maximum=2.5), 0, False),
        (RequestField(dtype="int", minimum=0.5, maximum=2.5), 1, True),
        (RequestField(dtype="int", minimum=0.5, maximum=2.5), 2, True),
        (RequestField(dtype="int", minimum=0.5, maximum=2.5), 3, False),
        (RequestField(dtype="int", minimum=-math.inf, maximum=math.inf), 2**63 - 1, True),
        (RequestField(dtype="int", minimum=1e30), 5, False),
        (RequestField(dtype="int", maximum=-1e30), 5, False),
        (RequestField(dtype="float", minimum=-math.inf, maximum=math.inf), 1e300, True),
        (RequestField(dtype="float", minimum=0.1, maximum=0.1), 0.1, True),
    ],
)
def test_bounds_of_any_kind(field: RequestField, value: float, fits: bool) -> None:
    schema = RequestSchema({"x": field}, max_rows=1)
    by_json = outcome(lambda: schema.parse(orjson.dumps({"rows": [{"x": value}]})))
    by_array = outcome(lambda: schema.parse_arrays({"x": np.array([value])}))
    assert isinstance(by_json, PredictRequest) == isinstance(by_array, PredictRequest) == fits


def test_inputs_may_have_any_name() -> None:
    names = ["class", "a b", "", "ids", "f1", "ä.valid"]
    schema = RequestSchema({name: RequestField(dtype="int") for name in names}, max_rows=1)
    row = {name: number for number, name in enumerate(names)}
    request = schema.parse(orjson.dumps({"rows": [row]}))
    assert {name: column.tolist() for name, column in request.columns.items()} == {
        name: [number] for name, number in row.items()
    }


T = TypeVar("T")


def outcome(call: Callable[[], T]) -> T | RequestError:
    try:
        return call()
    except RequestError as error:
        return error


@given(bodies)
def test_any_bytes_give_columns_or_a_refusal(body: bytes) -> None:
    request = outcome(lambda: SCHEMA.parse(body))
    if isinstance(request, RequestError):
        assert request.status in (400, 413, 422)
        return
    assert 1 <= request.rows <= 4
    assert list(request.columns) == list(INPUTS)
    assert all(len(column) == request.rows for column in request.columns.values())
    assert np.isfinite(request.columns["distance"]).all()


@given(
    st.one_of(
        bodies, st.fixed_dictionaries({"labels": json_values}).map(lambda v: json.dumps(v).encode())
    )
)
def test_any_bytes_give_labels_or_a_refusal(body: bytes) -> None:
    feedback = outcome(lambda: parse_feedback(body, 4, NOW))
    if isinstance(feedback, RequestError):
        assert feedback.status in (400, 413, 422)
        return
    assert len(feedback.ids) == len(feedback.labels) == len(feedback.known_at_us)


def test_feedback() -> None:
    labels = [
        {"id": "a", "label": 1, "known_at": "2024-02-01T00:00:00Z"},
        {"id": "b", "label": False},
    ]
    feedback = parse_feedback(orjson.dumps({"labels": labels}), 4, NOW)
    assert feedback.ids == ["a", "b"]
    assert feedback.labels == [1, 0]
    assert feedback.known_at_us == [1_706_745_600_000_000, 1_709_251_200_000_000]


@pytest.mark.parametrize(
    ("label", "field"),
    [
        ({"id": "a", "label": 2}, "label"),
        ({"id": "a", "label": 1.0}, "label"),
        ({"id": "a"}, "label"),
        ({"label": 1}, "id"),
        ({"id": 3, "label": 1}, "id"),
        ({"id": "a", "label": 1, "known_at": "soon"}, "known_at"),
        ({"id": "a", "label": 1, "known_at": "2024-03-02T00:00:01Z"}, "known_at"),
        ({"id": "a", "label": 1, "knownat": None}, "knownat"),
        ("a", "labels"),
    ],
)
def test_bad_label_is_named(label: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_feedback(orjson.dumps({"labels": [{"id": "z", "label": 0}, label]}), 4, NOW)
    assert (caught.value.status, caught.value.field, caught.value.row) == (422, field, 1)

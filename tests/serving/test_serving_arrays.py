"""Bodies of typed arrays: Arrow streams and safetensors, sound, wrong and hostile."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from serving.test_serving_request import INPUTS, ROW, as_list, outcome

from mlops_ray.config.features import RequestField
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.arrow_body import read_stream
from mlops_ray.serving.formats.request import PredictRequest, RequestSchema

SCHEMA = RequestSchema(INPUTS, max_rows=4)
TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
MICROS = pa.timestamp("us", tz="UTC")


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_table(rows: list[dict[str, Any]], ids: list[str] | None = None) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name, field in INPUTS.items():
        values = [row[name] for row in rows]
        if field.dtype == "timestamp":
            columns[name] = pa.array(values, pa.string()).cast(MICROS)
        else:
            columns[name] = pa.array(values, TYPES[field.dtype])
    return pa.table(columns if ids is None else {**columns, "id": ids})


def refused(call: Any) -> tuple[int, str | None, int | None]:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value.status, caught.value.field, caught.value.row


sound_rows = st.lists(
    st.fixed_dictionaries(
        {
            "origin": st.text(max_size=5),
            "tail": st.none() | st.text(max_size=5),
            "flight": st.integers(0, 2**63 - 1),
            "gate": st.none() | st.integers(-(2**63), 2**63 - 1),
            "distance": st.floats(0, 10_000),
            "wind": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "late": st.booleans(),
            "at": st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
            "seen": st.none() | st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(sound_rows)
def test_arrow_says_what_json_says(rows: list[dict[str, Any]]) -> None:
    ids = [f"p{number}" for number in range(len(rows))]
    by_json = SCHEMA.parse(orjson.dumps({"rows": rows, "ids": ids}))
    table = as_table(rows, ids)
    assert as_list(SCHEMA.parse_table(read_stream(stream(table)))) == as_list(by_json)
    pieces = stream(table, unify_dictionaries=False) if len(rows) < 2 else stream(in_pieces(table))
    assert as_list(SCHEMA.parse_table(read_stream(pieces))) == as_list(by_json)


def in_pieces(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 1), table.slice(1)])


@pytest.mark.parametrize(
    ("name", "values", "field", "row"),
    [
        ("distance", pa.array([1.0, -1.0]), "distance", 1),
        ("distance", pa.array([1.0, float("nan")]), "distance", 1),
        ("distance", pa.array([float("inf"), 1.0]), "distance", 0),
        ("distance", pa.array([1.0, None]), "distance", 1),
        ("distance", pa.array([1, 10_001], pa.uint16()), "distance", 1),
        ("distance", pa.array(["1", "2"]), "distance", None),
        ("flight", pa.array([1, 2**63], pa.uint64()), "flight", 1),
        ("gate", pa.array([1, 2**63], pa.uint64()), "gate", 1),
        ("flight", pa.array([1, -1], pa.int8()), "flight", 1),
        ("flight", pa.array([1.0, 2.0]), "flight", None),
        ("flight", pa.array([True, False]), "flight", None),
        ("late", pa.array([1, 0], pa.int8()), "late", None),
        ("late", pa.array([True, None]), "late", 1),
        ("origin", pa.array([1, 2]), "origin", None),
        ("origin", pa.array(["a", None]), "origin", 1),
        ("at", pa.array([0, 2**62], pa.timestamp("us")), "at", 1),
        ("at", pa.array([0, 2**62], pa.timestamp("s")), "at", None),
        ("at", pa.array([0, None], pa.timestamp("ns")), "at", 1),
        ("at", pa.array([1.5, 2.5]), "at", None),
        ("id", pa.array(["a", "a"]), "ids", 1),
        ("id", pa.array(["a", None]), "id", 1),
        ("id", pa.array(["a", ""]), "ids", 1),
        ("id", pa.array([1, 2]), "id", None),
        ("distnce", pa.array([1, 2]), "distnce", None),
    ],
)
def test_a_wrong_arrow_column_is_named(
    name: str, values: pa.Array, field: str, row: int | None
) -> None:
    table = as_table([ROW, ROW])
    place = table.column_names.index(name) if name in table.column_names else -1
    changed = (
        table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
    )
    assert refused(lambda: SCHEMA.parse_table(changed)) == (422, field, row)


def test_other_arrow_types_of_the_same_meaning_are_taken() -> None:
    table = as_table([ROW, ROW])
    kinds = {"origin": pa.large_string(), "flight": pa.uint8(), "gate": pa.int16()}
    kinds |= {"distance": pa.float32(), "wind": pa.float16(), "at": pa.timestamp("s")}
    for name, kind in kinds.items():
        column = table[name].cast(MICROS).cast(pa.timestamp("s", "UTC")) if name == "at" else None
        cast = table[name].cast(kind) if column is None else column.cast(pa.int64()).cast(kind)
        table = table.set_column(table.column_names.index(name), name, cast)
    expected = SCHEMA.parse(orjson.dumps({"rows": [ROW, ROW]}))
    assert as_list(SCHEMA.parse_table(read_stream(stream(table)))) == as_list(expected)


def test_a_missing_or_double_column_and_too_many_rows() -> None:
    table = as_table([ROW])
    assert refused(lambda: SCHEMA.parse_table(table.drop_columns("at"))) == (422, "at", None)
    double = pa.Table.from_arrays([*table.columns, table["at"]], [*table.column_names, "at"])
    assert refused(lambda: SCHEMA.parse_table(double)) == (422, "at", None)
    assert refused(lambda: SCHEMA.parse_table(as_table([ROW] * 5)))[0] == 413
    assert refused(lambda: SCHEMA.parse_table(as_table([])))[0] == 422


def test_columns_can_be_written_to() -> None:
    rows = as_table([ROW, ROW])
    numbers = {n: f for n, f in INPUTS.items() if f.dtype in ("int", "float")}
    tensors = {
        n: np.ones(2, np.float64 if f.dtype == "float" else np.int64) for n, f in numbers.items()
    }
    by_tensors = RequestSchema(numbers, max_rows=4).parse_tensors(save(tensors))
    for request in (SCHEMA.parse_table(read_stream(stream(rows))), by_tensors):
        assert all(
            column.flags.writeable and column.flags.aligned for column in request.columns.values()
        )


@pytest.mark.parametrize(
    "kind",
    [
        pa.run_end_encoded(pa.int32(), pa.int64()),
        pa.dictionary(pa.int8(), pa.string()),
        pa.binary(4),
        pa.list_(pa.int64()),
        pa.null(),
        pa.string_view(),
        pa.uuid(),
        pa.decimal128(5),
    ],
)
def test_types_that_grow_are_refused(kind: pa.DataType) -> None:
    table = pa.Table.from_arrays([pa.array([], kind)], ["flight"])
    assert refused(lambda: read_stream(stream(table))) == (422, "flight", None)


FUZZ = """
import random, sys
from serving.test_serving_arrays import SCHEMA, ROW, as_table, outcome, stream
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.arrow_body import read_stream
sound = stream(as_table([ROW, {**ROW, "origin": "ä" * 40, "tail": "x"}], ["a", "b"]))
chance = random.Random(int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    body = bytearray(sound)
    for _ in range(chance.choice([1, 1, 2, 4])):
        body[chance.randrange(len(body))] = chance.choice([0, 127, 128, 255, chance.randrange(256)])
    outcome(lambda: SCHEMA.parse_table(read_stream(bytes(body))))
print("alive")
"""


def test_damaged_arrow_streams_are_refused_and_never_crash() -> None:
    folder = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", FUZZ, "3", "8000"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{folder}:{folder.parent}", "PATH": ""},
        check=False,
    )
    assert found.stdout == "alive\n", found.stderr[-2000:]


def as_tensors(request: PredictRequest) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors that say the same as a request, with a null as the format has it."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, column in request.columns.items():
        valid = np.array([v is not None for v in column.tolist()])
        kind = INPUTS[name].dtype
        if kind == "string":
            texts = np.array([(v or "").encode() for v in column.tolist()])
            width = max(texts.itemsize, 1)
            tensors[name] = texts.astype(f"S{width}").view(np.uint8).reshape(len(texts), width)
        elif kind == "timestamp":
            tensors[name] = column.astype(np.int64).reshape(-1, 1)
            valid = ~np.isnat(column)
        else:
            fill = {"int": 7, "float": np.nan, "bool": True}[kind]
            values = [fill if v is None else v for v in column.tolist()]
            tensors[name] = np.array(values)
        if INPUTS[name].nullable:
            tensors[name + ".valid"] = valid
    return tensors


@settings(deadline=None)
@given(sound_rows)
def test_safetensors_say_what_json_says(rows: list[dict[str, Any]]) -> None:
    for row in rows:  # a text in fixed width cannot end in zeros
        row["origin"] = row["origin"].rstrip("\x00")
        row["tail"] = None if row["tail"] is None else row["tail"].rstrip("\x00")
    ids = [f"p{number}" for number in range(len(rows))]
    by_json = SCHEMA.parse(orjson.dumps({"rows": rows, "ids": ids}))
    tensors = {**as_tensors(by_json), "id": np.array(ids, "S2").view(np.uint8).reshape(-1, 2)}
    assert as_list(SCHEMA.parse_tensors(save(tensors))) == as_list(by_json)


NUMBERS = RequestSchema(
    {"x": RequestField(dtype="float"), "n": RequestField(dtype="int", nullable=True)}, max_rows=4
)


def body(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


X = entry("F64", [2], 0, 16)
DATA = struct.pack("<2d2q", 1.5, 2.5, 3, 4)


def test_a_body_written_by_hand_is_read() -> None:
    header = {"__metadata__": {"a": "b"}, "x": X, "n": entry("I64", [2, 1], 16, 32)}
    request = NUMBERS.parse_tensors(body(header, DATA))
    assert request.columns["x"].tolist() == [1.5, 2.5]
    assert request.columns["n"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("hostile", "status"),
    [
        (b"", 400),
        (b"1234567", 400),
        (struct.pack("<Q", 2**63) + b"{}", 400),
        (body(b"{", b""), 400),
        (body(b"[]", b""), 400),
        (body(b"[" * 100_000, b""), 400),
        (body({"x": 1}, b""), 400),
        (body({"x": X, "n": entry("I64", [2], 8, 24)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2], 16, 32)}, DATA + b"1"), 400),
        (body({"x": X, "n": entry("I64", [2], 16, 40)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2], 24, 40)}, DATA + bytes(8)), 400),
        (body({"x": X, "n": entry("I64", [2], 32, 16)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2], -16, 16)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2], 16, 2**70)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2.0], 16, 32)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [-2], 16, 32)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [], 16, 32)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2, 1, 1], 16, 32)}, DATA), 400),
        (body({"x": X, "n": entry("I64", [2**40, 2**40], 16, 32)}, DATA), 422),
        (body({"x": X, "n": entry("I64", [2**47], 16, 32)}, DATA), 422),
        (body({"x": X, "n": entry("I64", [0, 2**47], 16, 16)}, DATA[:16]), 422),
        (body({"x": X, "n": entry("BF16", [8], 16, 32)}, DATA), 422),
        (body({"x": X, "n": entry("I32", [4], 16, 32)}, DATA), 422),
        (body({"x": X, "n": entry("F64", [2], 16, 32)}, DATA), 422),
        (body({"x": X}, DATA[:16]), 422),
        (body({"x": entry("F64", [0], 0, 0), "n": entry("I64", [0], 0, 0)}, b""), 422),
        (save({"x": np.ones(5), "n": np.ones(5, np.int64)}), 413),
    ],
)
def test_hostile_safetensors_are_refused(hostile: bytes, status: int) -> None:
    assert refused(lambda: NUMBERS.parse_tensors(hostile))[0] == status


def test_texts_without_width_have_no_rows_for_free() -> None:
    texts = RequestSchema({"s": RequestField(dtype="string")}, max_rows=4)
    header = {"s": entry("U8", [2**47, 0], 0, 0)}
    assert refused(lambda: texts.parse_tensors(body(header, b"")))[0] == 422


@settings(deadline=None)
@given(st.binary(max_size=80) | st.integers(0, 2**32).map(lambda seed: damaged(seed)))
def test_any_bytes_give_tensors_or_a_refusal(content: bytes) -> None:
    request = outcome(lambda: NUMBERS.parse_tensors(content))
    if isinstance(request, RequestError):
        assert request.status in (400, 413, 422)
    else:
        assert all(len(column) == request.rows for column in request.columns.values())


def damaged(seed: int) -> bytes:
    chance = random.Random(seed)
    content = bytearray(
        save({"x": np.ones(3), "n": np.ones(3, np.int64), "n.valid": np.ones(3, bool)})
    )
    for _ in range(chance.randint(1, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


class Names:
    """A table of which nothing but the names may be asked, and those only once."""

    def __init__(self, names: list[str]) -> None:
        self._names = [names]

    @property
    def column_names(self) -> list[str]:
        return self._names.pop()


@pytest.mark.parametrize(
    ("names", "field"),
    [([*INPUTS, "9"], "9"), ([*INPUTS, "flight"], "flight"), ([*INPUTS][1:], next(iter(INPUTS)))],
)
def test_names_are_checked_once_and_before_anything_is_converted(
    names: list[str], field: str
) -> None:
    table: Any = Names(names)
    assert refused(lambda: SCHEMA.parse_table(table)) == (422, field, None)


def in_common(columns: int, size: int) -> bytes:
    """A stream whose text columns all lie on the bytes of the first one."""
    table = pa.table({f"c{place}": ["x" * size] for place in range(columns)})
    message = pa.ipc.read_message(table.to_batches()[0].serialize())
    head, data = bytearray(message.metadata.to_pybytes()), message.body.to_pybytes()
    text = data.find(b"xxxx")
    places = head.find(struct.pack("<4q", 0, 0, 0, 8))
    for place in range(columns):
        head[places + 48 * place :][:48] = b""
        struct.pack_into("<6q", head, places + 48 * place, 0, 0, 0, 8, text, size)
    data = data[: text + (size + 63) // 64 * 64]
    at = head.find(struct.pack("<q", len(message.body)))
    struct.pack_into("<q", head, at, len(data))
    batch = struct.pack("<Ii", 0xFFFFFFFF, len(head)) + bytes(head) + data
    return table.schema.serialize().to_pybytes() + batch + struct.pack("<Ii", 0xFFFFFFFF, 0)


def test_columns_on_the_same_bytes_are_refused() -> None:
    assert read_stream(in_common(1, 4096))["c0"].to_pylist() == ["x" * 4096]
    with pytest.raises(RequestError, match="bytes in common") as caught:
        read_stream(in_common(20, 4096))
    assert caught.value.status == 400


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 1000])
def test_no_sound_table_counts_as_one_with_bytes_in_common(rows: int) -> None:
    table = pa.table(
        {
            "text": pa.array(["ä" * (n % 5) for n in range(rows)], pa.large_string()),
            "empty": pa.array([""] * rows, pa.string()),
            "bool": pa.array([None if n % 3 == 0 else True for n in range(rows)], pa.bool_()),
            "int": pa.array([n % 100 for n in range(rows)], pa.int8()),
        }
    )
    for found in (table, table.slice(rows // 2), pa.concat_tables([table.slice(rows // 3), table])):
        assert read_stream(stream(found)).equals(found)


@pytest.mark.parametrize("order", [["n", "n.valid"], ["n.valid", "n"]])
def test_arrows_nulls_stay_null_whatever_column_is_beside_them(order: list[str]) -> None:
    inputs = {"n": RequestField(dtype="int", nullable=True)}
    table = pa.table({"n": pa.array([None, 5]), "n.valid": [True, True]}).select(order)
    assert refused(lambda: RequestSchema(inputs, 4).parse_table(table)) == (422, "n.valid", None)
    both = RequestSchema({**inputs, "n.valid": RequestField(dtype="bool")}, 4).parse_table(table)
    assert both.columns["n"].tolist() == [None, 5]
    assert both.columns["n.valid"].tolist() == [True, True]


def test_bounds_of_whole_numbers_are_exact() -> None:
    inputs = {"n": RequestField(dtype="int", minimum=-(2.0**53), maximum=2.0**53)}
    schema = RequestSchema(inputs, max_rows=4)
    assert schema.parse_table(pa.table({"n": [2**53, -(2**53)]})).rows == 2
    for wrong in (2**53 + 1, -(2**53) - 1):
        assert refused(lambda w=wrong: schema.parse_table(pa.table({"n": [0, w]})))[2] == 1


def test_nanoseconds_are_cut_towards_the_past_like_the_digits_of_a_text() -> None:
    schema = RequestSchema({"t": RequestField(dtype="timestamp", nullable=True)}, max_rows=4)
    column = pa.array([-500, 1999, None], pa.timestamp("ns", "UTC"))
    found = schema.parse_table(pa.table({"t": column})).columns["t"]
    assert found.astype(object).tolist()[2] is None
    assert found[:2].astype(np.int64).tolist() == [-1, 1]


@pytest.mark.parametrize("width", [2**31, 2**40, 2**48])
def test_texts_that_are_wider_than_any_type_are_refused(width: int) -> None:
    texts = RequestSchema({"s": RequestField(dtype="string")}, max_rows=4)
    header = {"s": entry("U8", [0, width], 0, 0)}
    assert refused(lambda: texts.parse_tensors(body(header, b"")))[:2] == (422, "s")

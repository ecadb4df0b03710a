"""Where records end, what texts stand for, which ids come twice: against readers of other hands."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import fs
from serving import shop
from serving.batch_world import visits

from mlops_ray.features.columns import INSTANT
from mlops_ray.features.service import inputs_of, objects
from mlops_ray.serving.batch import duplicates, records
from mlops_ray.serving.batch.columnar import ColumnarReader, pieces_of, read_schema
from mlops_ray.serving.batch.conversion import from_objects, from_texts
from mlops_ray.serving.batch.duplicates import repeated_rows
from mlops_ray.serving.batch.pieces import Piece, cut
from mlops_ray.serving.batch.records import spans
from mlops_ray.serving.batch.texts import CsvReader

cells = st.text(st.sampled_from('ab,"\n\r ') | st.characters(codec="utf-8"), max_size=6)
LOCAL = fs.LocalFileSystem()


def no_break(text: str) -> str:
    """Without a lone carriage return, which some take for the end of a line."""
    return text.replace("\r", "")


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(cells, cells) | st.tuples(cells, cells, cells), min_size=1, max_size=25
    ),
    piece_rows=st.integers(1, 9),
    block=st.integers(1, 40),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_read_in_pieces_is_what_the_standard_library_reads(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, ...]],
    piece_rows: int,
    block: int,
    ending: str,
) -> None:
    file = tmp_path_factory.mktemp("csv") / "in.csv"
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ending).writerows([map(no_break, row) for row in rows])
    file.write_bytes(text.getvalue().encode())
    expected = list(csv.reader(io.StringIO(text.getvalue(), newline="")))
    with pytest.MonkeyPatch.context() as patch, LOCAL.open_input_file(str(file)) as opened:
        patch.setattr(records, "_BLOCK_BYTES", block)
        found = spans(opened, 0, piece_rows, quoted=True)
    reader = CsvReader(LOCAL, pa.schema([("a", pa.binary()), ("b", pa.binary())]))
    read: dict[int, list[str]] = {}
    refused: list[int] = []
    for number, span in enumerate(found):
        piece = Piece(number=number, first=span.start, rows=span.records, file=str(file),
                      offset=span.offset, length=span.length)  # fmt: skip
        for chunk in reader.read(piece, 4):
            values = [[r["a"].decode(), r["b"].decode()] for r in chunk.table.to_pylist()]
            read |= dict(zip(chunk.rows.tolist(), values, strict=True))
            refused += [row.row for row in chunk.refused]
    assert read == {place: row for place, row in enumerate(expected) if len(row) == 2}
    assert sorted(refused) == [place for place, row in enumerate(expected) if len(row) == 3]
    assert all(span.records <= piece_rows for span in found)


def test_quotes_at_odd_places_make_one_piece(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text('5" pipe,1\nx,2\n"a\nb",3\n')
    with LOCAL.open_input_file(str(file)) as opened:
        assert len(spans(opened, 0, 1, quoted=True)) == 1


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"))))
def test_lines_are_cut_where_python_cuts_them(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    file = tmp_path_factory.mktemp("lines") / "in.jsonl"
    data = "\n".join(lines).encode()
    file.write_bytes(data)
    with LOCAL.open_input_file(str(file)) as opened:
        found = spans(opened, 0, 3, quoted=False)
    pieces = [data[s.offset : s.offset + s.length].split(b"\n") for s in found]
    read = [line.decode() for piece in pieces for line in piece if line]
    assert read == [line for line in lines if line]
    assert [s.start for s in found] == list(range(0, len(read), 3))


@given(groups=st.lists(st.integers(0, 50), max_size=12), piece_rows=st.integers(1, 40))
def test_cuts_cover_every_row_once(groups: list[int], piece_rows: int) -> None:
    found = cut(groups, piece_rows)
    assert [row for start, rows in found for row in range(start, start + rows)] == list(
        range(sum(groups))
    )
    assert all(0 < rows <= piece_rows for _, rows in found)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    group=st.integers(1, 30),
    piece=st.integers(1, 40),
    batch=st.integers(1, 9),
)
def test_parquet_pieces_are_the_rows_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, piece: int, batch: int
) -> None:
    file = str(tmp_path_factory.mktemp("parquet") / "in.parquet")
    pq.write_table(pa.table({"n": range(rows)}), file, row_group_size=group)
    reader = ColumnarReader(LOCAL, read_schema(LOCAL, [file]))
    chunks = [
        chunk
        for found in pieces_of(LOCAL, [(file, {})], piece)
        for chunk in reader.read(found, batch)
    ]
    assert [n for chunk in chunks for n in chunk.table["n"].to_pylist()] == list(range(rows))
    assert [n for chunk in chunks for n in chunk.rows.tolist()] == list(range(rows))


@settings(max_examples=40, deadline=None)
@given(
    distinct=st.integers(0, 300),
    group=st.integers(50, 3000),
    batch=st.integers(50, 3000),
    encoding=st.sampled_from([None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]),
)
@example(distinct=3, group=300, batch=3000, encoding=None)
@example(distinct=3, group=3000, batch=3000, encoding="DELTA_BYTE_ARRAY")
def test_texts_are_the_same_whether_they_repeat_or_not(
    tmp_path_factory: pytest.TempPathFactory,
    distinct: int,
    group: int,
    batch: int,
    encoding: str | None,
) -> None:
    file = str(tmp_path_factory.mktemp("parquet") / "in.parquet")
    drawn = np.random.default_rng(distinct).integers(0, distinct + 1, 3000).tolist()
    texts = [None if n == distinct else f"text {n}" for n in drawn]
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string())}),
        file,
        row_group_size=group,
        use_dictionary=encoding is None,
        column_encoding=encoding and {"text": encoding},
    )
    reader = ColumnarReader(LOCAL, read_schema(LOCAL, [file]))
    (piece,) = pieces_of(LOCAL, [(file, {})], 3000)
    columns = [chunk.table["text"] for chunk in reader.read(piece, batch)]
    assert len(columns) <= 2 * 3000 / batch
    assert [text for column in columns for text in column.to_pylist()] == texts
    assert [text for column in columns for text in objects(column).tolist()] == texts
    assert reader.schema.field("text").type == pa.string()


@pytest.mark.parametrize(("distinct", "repeats"), [(3, True), (3000, False)])
def test_only_texts_that_repeat_are_read_as_dictionaries(
    tmp_path: Path, distinct: int, repeats: bool
) -> None:
    file = str(tmp_path / "in.parquet")
    texts = [f"text {n % distinct}" for n in range(3000)]
    pq.write_table(pa.table({"text": texts, "n": range(3000)}), file)
    reader = ColumnarReader(LOCAL, read_schema(LOCAL, [file]))
    (piece,) = pieces_of(LOCAL, [(file, {})], 3000)
    (chunk,) = reader.read(piece, 3000)
    assert pa.types.is_dictionary(chunk.table.schema.field("text").type) == repeats
    assert chunk.table.schema.field("n").type == pa.int64()


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1).map(str) | st.text(max_size=4)))
def test_whole_numbers_are_those_that_python_reads(texts: list[str | None]) -> None:
    values, flaws = from_texts(pa.array(texts, pa.string()), pa.int64(), empty_is_null=True)
    for place, text in enumerate(texts):
        found = values[place].as_py()
        if found is not None:
            base = 16 if text.strip().lower().lstrip("-").startswith("0x") else 10
            assert found == int(text, base)
        else:
            assert text in (None, "") or place in flaws


@pytest.mark.parametrize(
    ("texts", "moments"),
    [
        (["2024-03-01T12:00:00Z", None], [datetime(2024, 3, 1, 12, tzinfo=UTC), None]),
        (["2024-03-01 12:00:00"], [datetime(2024, 3, 1, 12, tzinfo=UTC)]),
        (
            ["2024-03-01T12:00:00", "2024-03-01T12:00:00+02:00"],
            [datetime(2024, 3, 1, 12, tzinfo=UTC), datetime(2024, 3, 1, 10, tzinfo=UTC)],
        ),
    ],
)
def test_a_time_without_offset_is_utc(texts: list[str], moments: list[datetime]) -> None:
    values, flaws = from_texts(pa.array(texts), INSTANT, empty_is_null=True)
    assert values.to_pylist() == moments
    assert not flaws


def test_bytes_that_are_no_text_are_named() -> None:
    values, flaws = from_texts(pa.array([b"a", b"\xff"]), pa.string(), empty_is_null=True)
    assert (values[0].as_py(), flaws) == ("a", {1: "must be UTF-8"})


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, pa.int64()), (True, pa.float64()), ("1", pa.int64()), (1, pa.string()), (1, pa.bool_()),
     (1.5, pa.int64()), (2**63, pa.int64()), (5, INSTANT), ([1], pa.float64())],
)  # fmt: skip
def test_json_values_of_another_type_have_a_flaw(value: object, kind: pa.DataType) -> None:
    values, flaws = from_objects([None, value], kind)
    assert list(flaws) == [1], json.dumps(value)
    assert values.null_count == 2


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=60), bucket=st.integers(1, 20)
)
def test_repeated_ids_are_all_but_the_first(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | None], bucket: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    file = str(folder / "in.parquet")
    pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), file, row_group_size=7)
    reader = ColumnarReader(LOCAL, read_schema(LOCAL, [file]))
    pieces = pieces_of(LOCAL, [(file, {})], 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BUCKET_ROWS", bucket)
        found = repeated_rows(reader, pieces, "id", 4, folder / "scratch")
    seen: Counter[str] = Counter()
    expected = []
    for row, value in enumerate(ids):
        if value is not None:
            if seen[value]:
                expected.append(row)
            seen[value] += 1
    assert found.tolist() == expected
    assert not (folder / "scratch").exists()


@pytest.mark.parametrize("distinct", [1, 7, 129, 5000])
def test_objects_are_the_same_however_they_are_made(distinct: int) -> None:
    random = np.random.default_rng(0)
    texts = [None if n == 0 else f"t{n}" for n in random.integers(0, distinct, 5000).tolist()]
    chunked = pa.chunked_array([texts[:3000], texts[3000:]], pa.string())
    encoded = chunked.dictionary_encode()
    narrow = pa.dictionary(pa.int8(), pa.string())
    more = [encoded.cast(narrow)] if distinct < 130 else []
    for values in (chunked, encoded, *more):
        assert objects(values).tolist() == texts
        assert objects(values).dtype == object


def test_texts_in_dictionaries_that_no_narrow_index_joins() -> None:
    narrow = pa.dictionary(pa.int8(), pa.string())
    texts = [f"t{n}" for n in range(200) for _ in range(10)]
    halves = [pa.array(half, pa.string()).cast(narrow) for half in (texts[:1000], texts[1000:])]
    table = visits(2000)
    place = table.column_names.index("coupon")
    table = table.set_column(place, "coupon", pa.chunked_array(halves))
    found = inputs_of(table, shop.features().services["buys"])
    assert found["coupon"].tolist() == texts

"""Reading pieces of text files, CSV and JSON lines, in which any row may be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from pyarrow import csv

from mlops_ray.serving.batch.columnar import unreadable
from mlops_ray.serving.batch.conversion import as_text, from_objects, from_texts
from mlops_ray.serving.batch.pieces import Chunk, Piece, Refused, Rows

_BLOCK_BYTES = 1 << 22
_SAMPLE_BYTES = 1 << 24
_SAMPLE_ROWS = 10_000


@dataclass(frozen=True)
class CsvReader:
    """Reads CSV files with a header. All columns come as bytes, as they stand there."""

    filesystem: Any
    schema: pa.Schema

    def read(
        self, piece: Piece, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Yield the rows of a piece in order, at most ``batch_rows`` at a time.

        A row with more or fewer values than the header is refused.

        Raises:
            SourceError: The file cannot be read.
        """
        wrong: list[Any] = []

        def note(row: Any) -> str:
            wrong.append(row)
            return "skip"

        try:
            count = told = 0
            for table in self._tables(piece, note, columns):
                for start in range(0, table.num_rows, batch_rows):
                    part = table.slice(start, batch_rows)
                    places = _places(count, part.num_rows, [row.number - 1 for row in wrong])
                    refused = [_miscounted(row, piece.first) for row in wrong[told:]]
                    yield Chunk(part, places + piece.first, refused)
                    count, told = count + part.num_rows, len(wrong)
            if told < len(wrong):
                refused = [_miscounted(row, piece.first) for row in wrong[told:]]
                yield Chunk(self.schema.empty_table(), np.empty(0, np.int64), refused)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(piece.file, error) from error

    def _tables(self, piece: Piece, note: Any, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        if not piece.length:
            return
        with self.filesystem.open_input_file(piece.file) as file:
            reader = csv.open_csv(
                file.get_stream(piece.offset, piece.length),
                read_options=csv.ReadOptions(
                    column_names=self.schema.names, block_size=_BLOCK_BYTES, use_threads=False
                ),
                parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
                convert_options=csv.ConvertOptions(
                    column_types=self.schema, include_columns=columns
                ),
            )
            for batch in reader:
                yield pa.Table.from_batches([batch])


@dataclass(frozen=True)
class TypedReader:
    """Reads what another reader does, texts of the service's ``inputs`` made what they stand for."""

    inner: Any
    schema: pa.Schema
    inputs: frozenset[str]
    empty_is_null: bool

    def read(
        self, piece: Piece, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Yield the rows of a piece in order; those with a value that does not fit are refused."""
        for chunk in self.inner.read(piece, batch_rows, columns):
            flaws: dict[int, tuple[str, str]] = {}
            typed = {}
            for name in chunk.table.column_names:
                values, kind = chunk.table[name], self.schema.field(name).type
                if pa.types.is_dictionary(values.type):
                    values = values.cast(values.type.value_type)
                if _is_text(values.type):
                    empty = self.empty_is_null and name in self.inputs
                    values, found = from_texts(values, kind, empty_is_null=empty)
                    for place, reason in found.items():
                        flaws.setdefault(place, (name, reason))
                elif values.type != kind:
                    values = values.cast(kind, safe=False)
                typed[name] = values
            yield without(Chunk(pa.table(typed), chunk.rows, chunk.refused), flaws, chunk.table)


@dataclass(frozen=True)
class JsonReader:
    """Reads files of JSON objects, one on each line. A row has every one of the ``inputs``, and no
    field that is not in the schema."""

    filesystem: Any
    schema: pa.Schema
    inputs: frozenset[str]

    def read(
        self, piece: Piece, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Yield the rows of a piece in order, at most ``batch_rows`` at a time.

        Raises:
            SourceError: The file cannot be read.
        """
        place = piece.first
        for lines in self._lines(piece, batch_rows):
            rows, places, refused = self._objects(lines, place)
            yield self._chunk(rows, np.array(places, np.int64), refused, columns)
            place += len(lines)

    def _objects(
        self, lines: list[bytes], place: int
    ) -> tuple[list[dict[str, Any]], list[int], list[Refused]]:
        rows, places, refused = [], [], []
        known = frozenset(self.schema.names)
        for number, line in enumerate(lines, start=place):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                text = line.decode(errors="replace")
                refused.append(Refused(number, "", "must be a JSON object", text))
            elif not (row.keys() <= known and self.inputs <= row.keys()):
                refused.append(_misnamed(number, row, known, self.inputs))
            else:
                rows.append(row)
                places.append(number)
        return rows, places, refused

    def _chunk(
        self,
        rows: list[dict[str, Any]],
        places: Rows,
        refused: list[Refused],
        columns: Sequence[str] | None,
    ) -> Chunk:
        flaws: dict[int, tuple[str, str]] = {}
        typed, fields = {}, [self.schema.field(n) for n in columns or self.schema.names]
        for field in fields:
            given = [row.get(field.name) for row in rows]
            if field.name not in self.inputs and field.type == pa.string():
                given = [v if v is None or type(v) is str else as_text(v) for v in given]
            typed[field.name], found = from_objects(given, field.type)
            for place, reason in found.items():
                flaws.setdefault(place, (field.name, reason))
        table = pa.table(typed, schema=pa.schema(fields))
        return without(Chunk(table, places, refused), flaws, rows)

    def _lines(self, piece: Piece, batch_rows: int) -> Iterator[list[bytes]]:
        try:
            with self.filesystem.open_input_file(piece.file) as file:
                stream = file.get_stream(piece.offset, piece.length)
                lines: list[bytes] = []
                rest = b""
                while block := stream.read(_BLOCK_BYTES):
                    *whole, rest = (rest + block).split(b"\n")
                    lines += [line for line in whole if line not in (b"", b"\r")]
                    while len(lines) >= batch_rows:
                        yield lines[:batch_rows]
                        lines = lines[batch_rows:]
                if lines or rest:
                    yield [*lines, rest] if rest else lines
        except (pa.ArrowException, OSError) as error:
            raise unreadable(piece.file, error) from error


def csv_header(filesystem: Any, file: str) -> tuple[list[str], int]:
    """Return the columns that a CSV file's first line names, and where its rows begin.

    Raises:
        SourceError: The file has no header, or cannot be read.
    """
    try:
        with filesystem.open_input_file(file) as opened:
            head = opened.read(_SAMPLE_BYTES)
        line, _, _ = head.partition(b"\n")
        names = csv.read_csv(pa.BufferReader(line + b"\n")).column_names
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    return names, min(len(line) + 1, len(head))


def json_fields(filesystem: Any, file: str) -> dict[str, pa.DataType]:
    """Return the fields of the first 10,000 objects of a file, and the types that they seem to have."""
    try:
        with filesystem.open_input_file(file) as opened:
            lines = opened.read(_SAMPLE_BYTES).split(b"\n")[:_SAMPLE_ROWS]
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    values: dict[str, list[Any]] = {}
    for line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            for name, value in row.items():
                values.setdefault(name, []).append(value)
    return {name: _seeming(found) for name, found in values.items()}


def without(chunk: Chunk, flaws: dict[int, tuple[str, str]], raw: Any) -> Chunk:
    """Return a chunk without the rows that have a flaw (field and reason), which are refused.

    ``raw`` are all rows as they came: a table or a list.
    """
    if not flaws:
        return chunk
    bad = sorted(flaws)
    found = raw.take(bad).to_pylist() if isinstance(raw, pa.Table) else [raw[n] for n in bad]
    refused = [
        Refused(int(chunk.rows[place]), *flaws[place], as_text(values))
        for place, values in zip(bad, found, strict=True)
    ]
    kept = np.ones(len(chunk.rows), np.bool_)
    kept[bad] = False
    return Chunk(
        chunk.table.filter(pa.array(kept)), chunk.rows[kept], sorted([*chunk.refused, *refused])
    )


def _seeming(values: list[Any]) -> pa.DataType:
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, OverflowError, TypeError):
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.binary())


def _misnamed(
    number: int, row: dict[str, Any], known: frozenset[str], inputs: frozenset[str]
) -> Refused:
    missing = sorted(inputs - row.keys())
    if missing:
        return Refused(number, missing[0], "is missing", as_text(row))
    unknown = min(row.keys() - known)
    return Refused(number, unknown, "is a field that the first rows have not", as_text(row))


def _miscounted(row: Any, first: int) -> Refused:
    reason = f"has {row.actual_columns} values for {row.expected_columns} columns"
    return Refused(first + row.number - 1, "", reason, row.text)


def _places(done: int, count: int, wrong: list[int]) -> Rows:
    """Return the places of rows that come after ``done`` others, places in ``wrong`` skipped."""
    order = np.arange(done, done + count)
    good_before = np.array(wrong, np.int64) - np.arange(len(wrong))
    return order + np.searchsorted(good_before, order, side="right")

"""What a batch reads: files, a Delta table or the rows of a query, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mlops_ray.config.batch import BatchPredict, Format, told_by
from mlops_ray.config.features import RequestField
from mlops_ray.errors import SourceError
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.sources.files import is_delta, list_files
from mlops_ray.serving.batch.columnar import ColumnarReader, pieces_of, read_schema, unreadable
from mlops_ray.serving.batch.pieces import Chunk, Piece
from mlops_ray.serving.batch.records import spans
from mlops_ray.serving.batch.texts import (
    CsvReader,
    JsonReader,
    TypedReader,
    csv_header,
    json_fields,
)

Fields = Mapping[str, RequestField]

_SAMPLED_FILES = 16


class Reader(Protocol):
    """Reads pieces; can be sent to a worker."""

    @property
    def schema(self) -> pa.Schema:
        """The columns that a chunk has."""

    def read(
        self, piece: Piece, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Yield the rows of a piece in order, at most ``batch_rows`` at a time; all columns, or
        some."""


@dataclass(frozen=True)
class Input:
    """What there is to score. ``identity`` is a JSON value: another one for other rows."""

    kind: Format
    reader: Reader
    pieces: tuple[Piece, ...]
    identity: Any

    @property
    def rows(self) -> int:
        """How many rows there are; at most, where quotes stand at odd places of a CSV file."""
        return sum(piece.rows for piece in self.pieces)


def open_input(batch: BatchPredict, fields: Fields, staging: Path) -> Input:
    """Find out what there is to score, and cut it.

    Args:
        batch: The declaration.
        fields: The inputs of the model's service: what the texts of CSV and JSON stand for.
        staging: A folder for rows that cannot be read again in the same order: those of a query.

    Raises:
        SourceError: There is nothing, or it cannot be read.
    """
    if batch.reads == "sql":
        from mlops_ray.serving.batch.staging import staged_query

        return staged_query(batch, fields, staging)
    filesystem, place = _locate(batch.input)
    if batch.reads == "delta" or (batch.reads is None and is_delta(filesystem, place)):
        return _delta(batch, filesystem, place)
    files = list_files(filesystem, place)
    if not files:
        raise SourceError(
            "there is no such file or folder",
            where=batch.input,
            why="" if "://" in batch.input else f"seen from the working directory {Path.cwd()}",
            fix="correct the path; a folder must hold Parquet, CSV or JSON lines",
        )
    kind = batch.reads or _told_by_files(files, batch.input)
    found = {"parquet": _parquet, "csv": _csv, "json": _json}[kind](
        filesystem, files, fields, batch.piece_rows
    )
    infos = filesystem.get_file_info(files)
    told = [[info.path, info.size, info.mtime_ns] for info in infos]
    return Input(kind, *found, identity={"kind": kind, "files": told})


def of_parquet(filesystem: Any, files: Sequence[str], piece_rows: int) -> tuple[Reader, Any]:
    """Return what reads Parquet files, and their pieces."""
    reader = ColumnarReader(filesystem, read_schema(filesystem, files))
    return reader, tuple(pieces_of(filesystem, [(file, {}) for file in files], piece_rows))


def _parquet(
    filesystem: Any, files: list[str], fields: Fields, piece_rows: int
) -> tuple[Reader, Any]:
    return of_parquet(filesystem, files, piece_rows)


def _csv(filesystem: Any, files: list[str], fields: Fields, piece_rows: int) -> tuple[Reader, Any]:
    heads = [csv_header(filesystem, file) for file in files]
    names = heads[0][0]
    for file, (others, _) in zip(files, heads, strict=True):
        if others != names:
            raise unreadable(file, ValueError(f"its columns are not those of {files[0]}"))
    raw = CsvReader(filesystem, pa.schema([(name, pa.binary()) for name in names]))
    typed = pa.schema([(name, _kind(fields, name)) for name in names])
    reader = TypedReader(raw, typed, frozenset(fields), empty_is_null=True)
    begins = [begin for _, begin in heads]
    return reader, _text_pieces(filesystem, files, begins, piece_rows, quoted=True)


def _json(filesystem: Any, files: list[str], fields: Fields, piece_rows: int) -> tuple[Reader, Any]:
    found: dict[str, pa.DataType] = {}
    for file in files[:_SAMPLED_FILES]:
        found = json_fields(filesystem, file) | found
    declared = {name: _kind(fields, name) for name in fields}
    schema = pa.schema(list((found | declared).items()))
    reader = JsonReader(filesystem, schema, frozenset(fields))
    pieces = _text_pieces(filesystem, files, [0] * len(files), piece_rows, quoted=False)
    return reader, pieces


def _delta(batch: BatchPredict, filesystem: Any, place: str) -> Input:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError
    from pyarrow import dataset as datasets
    from pyarrow.fs import SubTreeFileSystem

    try:
        table = DeltaTable(batch.input)
        inside = SubTreeFileSystem(place, filesystem)
        dataset = table.to_pyarrow_dataset(filesystem=inside)
    except (DeltaError, OSError) as error:
        raise unreadable(batch.input, error) from error
    files = [
        (fragment.path, datasets.get_partition_keys(fragment.partition_expression))
        for fragment in dataset.get_fragments()
    ]
    pieces = pieces_of(inside, files, batch.piece_rows)
    identity = {"kind": "delta", "id": str(table.metadata().id), "version": table.version()}
    return Input("delta", ColumnarReader(inside, dataset.schema), tuple(pieces), identity)


def _text_pieces(
    filesystem: Any, files: list[str], begins: list[int], piece_rows: int, *, quoted: bool
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    first = 0
    for file, begin in zip(files, begins, strict=True):
        with filesystem.open_input_file(file) as opened:
            found = spans(opened, begin, piece_rows, quoted=quoted)
        for span in found:
            pieces.append(
                Piece(
                    number=len(pieces),
                    first=first + span.start,
                    rows=span.records,
                    file=file,
                    start=span.start,
                    offset=span.offset,
                    length=span.length,
                )
            )
        first += sum(span.records for span in found)
    return tuple(pieces)


def _kind(fields: Fields, name: str) -> pa.DataType:
    return ARROW_TYPES[fields[name].dtype] if name in fields else pa.string()


def _locate(place: str) -> tuple[Any, str]:
    from pyarrow import fs

    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).absolute())
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(place)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(place, error) from error
    return found


def _told_by_files(files: list[str], place: str) -> Format:
    kinds = {told_by(file) for file in files}
    kind = kinds.pop()
    if kinds or kind is None:
        raise SourceError(
            "cannot tell the format of the input",
            where=place,
            why=f"its files are {', '.join(Path(file).name for file in files[:5])}",
            fix="declare it: --input-format, or input_format in the configuration",
        )
    return kind

"""Files: Parquet, CSV, JSON lines and Arrow, here or in an object store; Delta and Iceberg tables."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import Source
from mlops_ray.errors import SourceError
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.sources.batches import Batches

_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
}
_AHEAD_BATCHES = 4
_AHEAD_FILES = 2
_WILD = ("*", "?", "[")


def read_path(source: Source, where: str) -> Batches:
    """Return the rows that a path means, file by file in order of their names.

    Args:
        source: With ``path``: a file, a folder or a glob; a URI of an object store; of an Iceberg
            table its name in the catalog that ``options`` describe.
        where: How errors name the source.

    Raises:
        SourceError: There is nothing, or it cannot be read.
    """
    path = str(source.path)
    if source.format == "iceberg":
        from mlops_ray.features.sources.lakes import read_iceberg

        return read_iceberg(path, source.options, where)
    filesystem, place = _locate(path, source, where)
    if source.format == "delta" or is_delta(filesystem, place):
        from mlops_ray.features.sources.lakes import read_delta

        return read_delta(path, filesystem, place, source.options, where)
    files = list_files(filesystem, place)
    if not files:
        raise SourceError(
            f"there is no file at {path}",
            where=f"{where}.path",
            why=f"seen from the working directory {Path.cwd()}" if "://" not in path else "",
            fix="correct the path; a folder must hold Parquet, CSV, JSON or Arrow files",
        )
    return scan(_dataset(filesystem, files, source, where), f"the files at {path}", where)


def scan(dataset: Any, subject: str, where: str) -> Batches:
    """Return the rows of a dataset in its order, with a few batches read ahead."""

    def failed(error: Exception) -> SourceError:
        return SourceError(
            f"{subject} cannot be read as {dataset.format.default_extname}"
            if hasattr(dataset, "format")
            else f"{subject} cannot be read",
            where=f"{where}.path",
            why=str(error).strip(),
            fix="check that the files are whole and share one schema",
        )

    def flow() -> Any:
        try:
            yield from dataset.to_batches(
                batch_readahead=_AHEAD_BATCHES, fragment_readahead=_AHEAD_FILES
            )
        except (pa.ArrowException, OSError) as error:
            raise failed(error) from error

    return Batches(dataset.schema, flow())


def _dataset(filesystem: Any, files: Sequence[str], source: Source, where: str) -> Any:
    import pyarrow.dataset as ds

    kind = source.format or _format(files, str(source.path), where)
    try:
        shape = _csv(source.options) if kind == "csv" else "ipc" if kind == "arrow" else kind
        dataset = ds.dataset(list(files), format=shape, filesystem=filesystem)
        if len(files) > 1:
            schemas = [fragment.physical_schema for fragment in dataset.get_fragments()]
            unify = pa.unify_schemas if kind in ("parquet", "arrow") else _first_types
            dataset = dataset.replace_schema(unify(schemas))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"the files at {source.path} cannot be read as {kind}",
            where=f"{where}.path",
            why=str(error).strip(),
            fix="check that the files are whole and share one schema",
        ) from error
    return dataset


def _first_types(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return every column with the type that the first file with values in it seems to give it."""
    fields: dict[str, pa.Field] = {}
    for field in chain.from_iterable(schemas):
        if field.name not in fields or pa.types.is_null(fields[field.name].type):
            fields[field.name] = field
    return pa.schema(fields.values())


def _csv(options: dict[str, Any]) -> Any:
    """Return the format of CSV files; options are delimiter, null_values and types by column."""
    import pyarrow.dataset as ds
    from pyarrow import csv

    types = {name: ARROW_TYPES[dtype] for name, dtype in options.get("types", {}).items()}
    convert = csv.ConvertOptions(column_types=types)
    if "null_values" in options:
        convert.null_values = list(options["null_values"])
        convert.strings_can_be_null = True
    parse = csv.ParseOptions(delimiter=options.get("delimiter", ","))
    return ds.CsvFileFormat(parse_options=parse, convert_options=convert)


def _format(files: Sequence[str], path: str, where: str) -> str:
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    kinds = sorted({_FORMATS.get(suffix, "") for suffix in suffixes})
    if len(kinds) > 1 or not kinds[0]:
        raise SourceError(
            f"cannot tell the format of the files at {path}",
            where=f"{where}.path",
            why=f"their suffixes are {', '.join(sorted(suffixes))}",
            fix=f"use one of {', '.join(_FORMATS)} for all of them, or declare the format",
        )
    return kinds[0]


def _locate(path: str, source: Source, where: str) -> tuple[Any, str]:
    """Return the filesystem that a path is in, and the path within it."""
    from pyarrow import fs

    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    scheme, _, rest = path.partition("://")
    settings = {} if source.format in ("delta", "csv") else source.options
    try:
        if settings and scheme == "s3":
            return fs.S3FileSystem(**settings), rest
        if settings and scheme in ("gs", "gcs"):
            return fs.GcsFileSystem(**settings), rest
        if settings and scheme in ("abfs", "abfss"):
            return fs.AzureFileSystem(**settings), rest
        base, wild = _fixed_part(path)
        filesystem, place = fs.FileSystem.from_uri(base)
        return filesystem, f"{place}{wild}"
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise SourceError(
            f"there is no filesystem for {scheme}://",
            where=f"{where}.path",
            why=str(error),
            fix="use a local path or s3://, gs://, abfss://, hdfs://, with options as "
            "pyarrow.fs names them",
        ) from error


def _fixed_part(path: str) -> tuple[str, str]:
    """Cut a URI where its first wildcard's path component begins."""
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if _is_wild(part)), len(parts))
    wild = "/".join(parts[at:])
    return "/".join(parts[:at]), f"/{wild}" if wild else ""


def _is_wild(path: str) -> bool:
    return any(sign in path for sign in _WILD)


def is_delta(filesystem: Any, place: str) -> bool:
    """Say whether a path is that of a Delta table."""
    from pyarrow import fs

    if _is_wild(place):
        return False
    found = filesystem.get_file_info(f"{place.rstrip('/')}/_delta_log")
    return bool(found.type == fs.FileType.Directory)


def list_files(filesystem: Any, place: str) -> list[str]:
    """Return the files that a path means, in order of their names; hidden ones are left out."""
    from pyarrow import fs

    if _is_wild(place) and isinstance(filesystem, fs.LocalFileSystem):
        return sorted(name for name in glob.glob(place, recursive=True) if Path(name).is_file())
    base = _fixed_part(place)[0] if _is_wild(place) else place
    found = filesystem.get_file_info(base)
    if found.type == fs.FileType.File:
        return [str(base)]
    if found.type == fs.FileType.NotFound:
        return []
    infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    names = [info.path for info in infos if info.type == fs.FileType.File]
    if _is_wild(place):
        return sorted(name for name in names if PurePosixPath(name).match(place))
    return sorted(name for name in names if not _hidden(name[len(base) :]))


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)

"""Reading a source: a function of the project's, or files."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import Features, Source
from mlops_ray.config.targets import load
from mlops_ray.errors import FeatureStoreError, MlopsRayError, SourceError
from mlops_ray.features.columns import instants, normalise_instants

_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "ipc",
}


def find_source(features: Features, name: str) -> Source:
    """Return the declared source.

    Raises:
        FeatureStoreError: There is none of that name.
    """
    if name not in features.sources:
        raise FeatureStoreError(
            f"there is no source {name!r}", fix=f"known sources: {', '.join(features.sources)}"
        )
    return features.sources[name]


def read_source(source: Source, where: str = "source") -> pa.Table:
    """Return all rows of a source; every timestamp is ``timestamp[us, UTC]``, naive ones were UTC.

    Args:
        source: A function and its arguments, or a path: one file, a folder or a glob of Parquet,
            CSV, JSON lines or Arrow files.
        where: How errors name the source.

    Raises:
        SourceError: It cannot be read, or the function returned no table.
    """
    if source.read is not None:
        table = _call(source.read, source.args, where)
    else:
        table = _read_files(str(source.path), where)
    return normalise_instants(table)


def clean_source(source: Source, raw: pa.Table, where: str = "source") -> pa.Table:
    """Return ``raw`` after the source's clean function, or ``raw`` itself where it has none.

    Raises:
        SourceError: The clean function failed or returned no table.
        SchemaError: The result lacks the column ``available_at``, or it holds no timestamps.
    """
    table = raw
    if source.clean is not None:
        table = normalise_instants(_call(source.clean, {}, where, raw))
    instants(table, source.available_at, f"{where}.available_at")
    return table


def _call(target: str, arguments: dict[str, Any], where: str, *positional: Any) -> pa.Table:
    function = load(target)
    try:
        result = function(*positional, **arguments)
    except MlopsRayError:
        raise
    except Exception as error:
        raise SourceError(
            f"{target} failed",
            where=where,
            why=f"{type(error).__name__}: {error}",
            fix="call the function in a Python shell to see the whole error",
        ) from error
    if not isinstance(result, pa.Table):
        raise SourceError(
            f"{target} returned {type(result).__name__}, not a pyarrow.Table",
            where=where,
            fix="return a table, for example pyarrow.Table.from_pandas(frame)",
        )
    return result


def _read_files(path: str, where: str) -> pa.Table:
    import pyarrow.dataset as ds

    files = _files(path)
    if not files:
        raise SourceError(
            f"there is no file at {path}",
            where=f"{where}.path",
            why=f"seen from the working directory {Path.cwd()}",
            fix="correct the path; a folder must hold Parquet, CSV, JSON or Arrow files",
        )
    kinds = sorted({_FORMATS.get(file.suffix.lower(), "") for file in files})
    if len(kinds) > 1 or not kinds[0]:
        raise SourceError(
            f"cannot tell the format of the files at {path}",
            where=f"{where}.path",
            why=f"their suffixes are {', '.join(sorted({file.suffix for file in files}))}",
            fix=f"use one of {', '.join(_FORMATS)} for all of them",
        )
    try:
        return ds.dataset([str(file) for file in files], format=kinds[0]).to_table()
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"the files at {path} cannot be read as {kinds[0]}",
            where=f"{where}.path",
            why=str(error).strip(),
            fix="check that the files are whole and share one schema",
        ) from error


def _files(path: str) -> list[Path]:
    """Return the files that a path means, in order of their names; hidden ones are left out."""
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [file for file in Path(path).rglob("*") if file.is_file()]
        return sorted(file for file in found if not file.name.startswith((".", "_")))
    return sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())

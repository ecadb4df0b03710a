"""Where a batch goes: a job's parts are put in place at once, and only once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from mlops_ray.config.batch import BatchPredict, Format, told_by
from mlops_ray.errors import ServingError
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.files import sync
from mlops_ray.metadata.home import Home
from mlops_ray.serving.batch.folder import settle


class Output(Protocol):
    """A place for the parts of a job."""

    @property
    def kind(self) -> str:
        """In what format parts are to be written: parquet, csv or json."""

    @property
    def headers(self) -> bool:
        """Whether each part of CSV begins with a header; else only the first."""

    @property
    def work(self) -> Path:
        """A folder for what is not finished, from which parts can be moved to the output."""

    @property
    def rejected(self) -> Path:
        """The file for refused rows."""

    @property
    def epoch(self) -> int:
        """How often the content has been replaced, where that is known: what had been added before is
        not there any more."""

    def check(self, schema: pa.Schema) -> pa.Schema:
        """Return the types in which rows of a schema are to be written.

        Raises:
            ServingError: They cannot be put there.
        """

    def holds(self, job: str) -> bool:
        """Say whether a job has been put there, where that can be known."""

    def commit(self, job: str, schema: pa.Schema, parts: Path) -> None:
        """Put the parts in place, whole or not at all. To do so again does nothing."""


class FolderOutput:
    """A folder of Parquet, CSV or JSON lines, one file for each piece."""

    headers = True
    epoch = 0

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        self._path = path
        self.work, self.rejected = beside(path)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """Return the types in which rows are to be written: their own."""
        return schema

    def holds(self, job: str) -> bool:
        """Say nothing of jobs before: what they wrote is replaced."""
        return False

    def commit(self, job: str, schema: pa.Schema, parts: Path) -> None:
        """Put the folder of parts in the output's place.

        A reader sees the old rows, the new ones, or for a moment none; never a mixture.
        """
        old = self.work / "old"
        if parts.is_dir():
            _remove(old)
            if self._path.exists():
                self._path.rename(old)
            parts.rename(self._path)
            sync(self._path.parent)
        _remove(old)


class FileOutput:
    """One file of CSV or JSON lines."""

    headers = False
    epoch = 0

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        self._path = path
        self.work, self.rejected = beside(path)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """Return the types in which rows are to be written: their own.

        Raises:
            ServingError: There is a folder in the file's place.
        """
        if self._path.is_dir():
            raise ServingError(
                "the output is a folder that is there already",
                where=str(self._path),
                fix="remove it, or choose a name without a suffix for a folder of files",
            )
        return schema

    def holds(self, job: str) -> bool:
        """Say nothing of jobs before: what they wrote is replaced."""
        return False

    def commit(self, job: str, schema: pa.Schema, parts: Path) -> None:
        """Chain the parts into one file, and put it in the output's place."""
        draft = self.work / "whole"
        with draft.open("wb") as whole:
            for part in part_files(parts):
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 22)
        settle(draft, self._path)


def open_output(batch: BatchPredict, reads: Format, home: Home) -> Output:
    """Return the output of a batch whose input has the format ``reads``."""
    kind = batch.writes or ("parquet" if reads in ("sql", "delta") else reads)
    if kind == "sql":
        from mlops_ray.serving.batch.databases import SqlOutput

        return SqlOutput(batch.output, batch.table, batch.append, job_home(batch, home))
    path = Path(batch.output).absolute()
    if kind == "delta" or (batch.writes is None and (path / "_delta_log").is_dir()):
        from mlops_ray.serving.batch.lake import DeltaOutput

        return DeltaOutput(path, batch.append)
    if kind != "parquet" and told_by(batch.output) == kind:
        return FileOutput(path, kind)
    return FolderOutput(path, kind)


def job_home(batch: BatchPredict, home: Home) -> Path:
    """Return the folder of the home in which the jobs of an output keep what is theirs."""
    place = batch.output if "://" in batch.output else str(Path(batch.output).absolute())
    return home.root / "batch" / digest_json([place, batch.table])[:16]


def beside(path: Path) -> tuple[Path, Path]:
    """Return the working folder of an output, and its file of refused rows: both beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.batch"), path.with_name(f"{path.name}.rejected.parquet")


def part_files(parts: Path) -> Sequence[Path]:
    """Return the files of finished parts in the order of the input's rows."""
    return sorted(path for path in parts.iterdir() if not path.name.startswith("."))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

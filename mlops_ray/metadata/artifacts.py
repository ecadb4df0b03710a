"""Content-addressed artifacts: what steps hand to each other, kept by digest in a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.digest import canonical_json, digest_tree
from mlops_ray.metadata.files import sync

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["table", "tree", "json"]


class ArtifactRef(Frozen):
    """The address of an artifact: its digest, how it is encoded, and its size in bytes."""

    digest: str
    kind: Kind
    size: int
    rows: int | None = None


class ArtifactStore:
    """Artifacts below one folder. Writing is atomic and durable; equal content is kept once.

    Args:
        root: The folder. It is made when the first artifact is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, value: Any) -> ArtifactRef:
        """Store a table, a file or folder, a pydantic model or a JSON value; return its address.

        Raises:
            ArtifactError: The value is of no kind that can be stored, or the disk refuses it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".incoming-") as folder:
                staged = Path(folder) / "blob"
                kind, rows = _write(value, staged)
                _sync(staged)
                return self._keep(staged, kind, rows)
        except OSError as error:
            raise ArtifactError(
                "cannot write an artifact",
                where=str(self.root),
                why=str(error),
                fix="free some space or make the folder writable, then run the same command again",
            ) from error

    def get(self, ref: ArtifactRef) -> Any:
        """Return the value at ``ref``: a memory-mapped table, a path to read from, or JSON."""
        path = self.path(ref.digest)
        if not path.exists():
            raise ArtifactError("the artifact is missing", where=str(path))
        if ref.kind == "table":
            return _read_table(path)
        return path if ref.kind == "tree" else json.loads(path.read_bytes())

    def verify(self, ref: ArtifactRef) -> bool:
        """Say whether the artifact is there and its bytes still have its digest."""
        path = self.path(ref.digest)
        return path.exists() and digest_tree(path) == ref.digest

    def discard(self, digest: str) -> None:
        """Remove an artifact, for instance a corrupt one; nothing happens when it is not there."""
        path = self.path(digest)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Return where the artifact with this digest is, or would be."""
        return self.root / digest[:2] / digest

    def _keep(self, staged: Path, kind: Kind, rows: int | None) -> ArtifactRef:
        digest = digest_tree(staged)
        size = _size(staged)
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            try:
                os.rename(staged, target)
            except OSError:
                if not target.exists():
                    raise
            sync(target.parent)
        return ArtifactRef(digest=digest, kind=kind, size=size, rows=rows)


def _write(value: Any, staged: Path) -> tuple[Kind, int | None]:
    import pyarrow as pa

    if isinstance(value, pa.Table):
        _write_table(value, staged)
        return "table", value.num_rows
    if isinstance(value, Path):
        shutil.copytree(value, staged) if value.is_dir() else shutil.copyfile(value, staged)
        return "tree", None
    if isinstance(value, BaseModel | dict | list | tuple | str | int | float | bool | None):
        staged.write_bytes(canonical_json(value))
        return "json", None
    raise ArtifactError(
        f"a value of type {type(value).__name__} cannot be stored",
        fix="return a pyarrow.Table, a Path, a pydantic model or a JSON value from the step",
    )


def _write_table(table: pa.Table, path: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=1 << 17)


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    for file in files:
        sync(file)

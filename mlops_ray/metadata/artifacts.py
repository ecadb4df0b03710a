"""Content-addressed artifacts: what steps hand to each other, kept by digest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ArtifactError, StorageError
from mlops_ray.metadata.blobs import Blob, Blobs, corrupt
from mlops_ray.metadata.codecs import (
    Encoded,
    Kind,
    copy_file,
    decode,
    encode,
    is_collection,
    read_table,
)
from mlops_ray.metadata.digest import (
    digest_bytes,
    digest_file,
    digest_files,
    new_digest,
    tree_files,
)
from mlops_ray.metadata.files import sync
from mlops_ray.metadata.folder import FolderBlobs
from mlops_ray.metadata.home import Home

_THREADS = 8


class ArtifactRef(Frozen):
    """The address of an artifact: its digest, how it is encoded, and its size in bytes.

    ``rows`` are those of a table, or of all tables of a list.
    """

    digest: str
    kind: Kind
    size: int
    rows: int | None = None


def open_artifacts(home: Home) -> ArtifactStore:
    """Return the artifacts of a home: in its folder, or in the bucket that the home names.

    Raises:
        StorageError: The bucket's address cannot be used.
    """
    address = home.storage.artifacts
    if address is None:
        return ArtifactStore(FolderBlobs(home.artifacts))
    if address.startswith("file://"):
        # A folder that machines share; as a bucket it would show files that are half written.
        return ArtifactStore(FolderBlobs(Path(unquote(urlsplit(address).path))))
    return ArtifactStore(_bucket(address, home.root / "cache"))


@lru_cache(maxsize=8)
def _bucket(address: str, cache: Path) -> Blobs:
    from mlops_ray.metadata.bucket import BucketBlobs

    return BucketBlobs.at(address, cache)


class ArtifactStore:
    """Artifacts. Writing is atomic and durable; equal content is kept once."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def put(self, value: Any, *, pickle: bool = False) -> ArtifactRef:
        """Store a value and return its address.

        Stored are: a ``pyarrow.Table``; a ``Path`` to a file or folder; a tensor, an array, or a
        dict of them by name; a pydantic model, dataclass or JSON value; a list of any of these. Only
        with ``pickle`` is anything else stored, by pickle.

        Raises:
            ArtifactError: The value is of no kind that can be stored.
            StorageError: The store cannot be written.
        """
        with self.writing():
            if isinstance(value, Path):
                return self._put_path(value)
            if is_collection(value):
                return self.put_list([self.put(item, pickle=pickle) for item in value])
            return self._put_encoded(encode(value, allow_pickle=pickle))

    def put_list(self, refs: Sequence[ArtifactRef]) -> ArtifactRef:
        """Store a list of artifacts as one.

        Raises:
            StorageError: The store cannot be written.
        """
        entries = [[ref.digest, ref.kind, ref.size, ref.rows] for ref in refs]
        counts = [ref.rows for ref in refs if ref.rows is not None]
        rows = sum(counts) if counts and len(counts) == len(refs) else None
        data = json.dumps(entries, separators=(",", ":")).encode()
        with self.writing():
            return self._put_encoded(Encoded("list", data, rows=rows))

    def elements(self, ref: ArtifactRef) -> list[ArtifactRef]:
        """Return the addresses of a list's elements.

        Raises:
            ArtifactError: The list is missing or corrupt.
        """
        entries = json.loads(self._read(ref))
        names = ("digest", "kind", "size", "rows")
        return [ArtifactRef(**dict(zip(names, e, strict=True))) for e in entries]

    def get(self, ref: ArtifactRef) -> Any:
        """Return the value: a memory-mapped table, a path to read from, a list, or what was put.

        A pydantic model, a dataclass and a tuple come back as JSON values. What is read whole is
        checked against its digest; of tables and trees only ``verify`` reads every byte.

        Raises:
            ArtifactError: It is missing or corrupt; ``digest`` of the error says which.
            StorageError: The store cannot be read.
        """
        if ref.kind == "list":
            return [self.get(element) for element in self.elements(ref)]
        if ref.kind in ("table", "tree"):
            return self._open(ref)
        return decode(ref.kind, self._read(ref))

    def verify(self, ref: ArtifactRef) -> bool:
        """Say whether the artifact is there and its bytes have its digest; so for all elements.

        Raises:
            StorageError: The store cannot be read.
        """
        with self._reading(ref.digest):
            if not self.blobs.verify(ref.digest):
                return False
            if ref.kind != "list":
                return True
            elements = self.elements(ref)
            nested = [element for element in elements if element.kind == "list"]
            return self.blobs.verify_all(
                element.digest for element in elements if element.kind != "list"
            ) and all(self.verify(element) for element in nested)

    def discard(self, digest: str) -> None:
        """Remove an artifact, for instance a corrupt one; nothing happens when it is not there."""
        with self.writing():
            self.blobs.discard(digest)

    def path(self, digest: str) -> Path:
        """Return where on this machine the artifact is, or would be once it is read."""
        return self.blobs.path(digest)

    def stored(self) -> list[Blob]:
        """Return all that is stored.

        Raises:
            StorageError: The store cannot be read.
        """
        try:
            return list(self.blobs.blobs())
        except OSError as error:
            raise StorageError(
                "the store of artifacts cannot be read",
                where=self.blobs.where,
                why=str(error),
                fix="check that it can be reached, then run the same command again",
            ) from error

    def needs(self, ref: ArtifactRef) -> set[str]:
        """Return the digests of all blobs that an artifact is made of, its own included.

        What is missing is left out.

        Raises:
            ArtifactError: What says which they are is corrupt.
            StorageError: The store cannot be read.
        """
        found = {ref.digest}
        if ref.kind == "tree":
            with self._reading(ref.digest):
                found.update(self.blobs.members(ref.digest))
        elif ref.kind == "list":
            try:
                elements = self.elements(ref)
            except ArtifactError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return found
                raise
            for element in elements:
                found |= self.needs(element)
        return found

    def copy(self, ref: ArtifactRef, source: ArtifactStore) -> None:
        """Store an artifact of another store here as well, with all that belongs to it.

        Raises:
            ArtifactError: It is missing there, or corrupt.
            StorageError: One of the stores fails.
        """
        if ref.kind == "list":
            elements = source.elements(ref)
            for element in elements:
                self.copy(element, source)
            self.put_list(elements)
            return
        with source._reading(ref.digest):
            path = source.blobs.fetch(ref.digest)
        with self.writing():
            copied = self._put_path(path)
        if copied.digest != ref.digest:
            self.discard(copied.digest)
            raise corrupt(ref.digest, str(path))

    def _put_encoded(self, encoded: Encoded) -> ArtifactRef:
        if encoded.data is not None:
            digest, size = digest_bytes(encoded.data), len(encoded.data)
            self.blobs.keep(digest, encoded.data)
        else:
            assert encoded.write is not None
            with self.blobs.staging() as folder:
                draft = folder / "blob"
                encoded.write(draft)
                sync(draft)
                digest, size = digest_file(draft), draft.stat().st_size
                self.blobs.keep_file(digest, draft)
        return ArtifactRef(digest=digest, kind=encoded.kind, size=size, rows=encoded.rows)

    def _put_path(self, path: Path) -> ArtifactRef:
        if not path.is_file() and not path.is_dir():
            raise ArtifactError("there is no such file or folder to store", where=str(path))
        with self.blobs.staging() as folder:
            draft = folder / "blob"
            if path.is_file():
                digest = _copy(path, draft)
                size = draft.stat().st_size
                self.blobs.keep_file(digest, draft)
            else:
                files, size = _copy_tree(path, draft)
                digest = digest_files(files)
                self.blobs.keep_tree(digest, draft, files)
        return ArtifactRef(digest=digest, kind="tree", size=size)

    def _open(self, ref: ArtifactRef) -> Any:
        import pyarrow as pa

        with self._reading(ref.digest):
            path = self.blobs.fetch(ref.digest)
            if ref.kind == "tree":
                return path
            if path.stat().st_size != ref.size:
                raise corrupt(ref.digest, str(path))
            try:
                return read_table(path)
            except pa.ArrowInvalid as error:
                raise corrupt(ref.digest, str(path)) from error

    def _read(self, ref: ArtifactRef) -> bytes:
        with self._reading(ref.digest):
            data = self.blobs.read(ref.digest)
        if digest_bytes(data) != ref.digest:
            raise corrupt(ref.digest, str(self.path(ref.digest)))
        return data

    @contextmanager
    def _reading(self, digest: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            where = str(self.path(digest))
            raise ArtifactError(
                "the artifact is missing",
                digest=digest,
                where=where,
                fix="run the workflow again: the step that made it runs anew",
            ) from error
        except OSError as error:
            raise StorageError(
                "an artifact cannot be read",
                digest=digest,
                where=str(self.path(digest)),
                why=str(error),
                fix="check that the store can be reached and read, then run the same command again",
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the store refuses into a ``StorageError``."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                "an artifact cannot be written",
                where=str(error.filename or self.blobs.where),
                why=os.strerror(error.errno) if error.errno else str(error),
                fix="free some space or make the store writable, then run the same command again",
            ) from error


def _copy(source: Path, target: Path) -> str:
    digest = new_digest()
    copy_file(source, target, digest)
    return str(digest.hexdigest())


def _copy_tree(source: Path, target: Path) -> tuple[dict[str, str], int]:
    """Copy a folder's files durably; return their digests by name, and the sum of their sizes."""
    names = tree_files(source)
    for name in names:
        if not (source / name).is_file():
            raise ArtifactError(
                "a folder cannot be stored: what lies in it is no file, or a link to nothing",
                where=str(source / name),
                fix="remove it",
            )
    target.mkdir()
    for parent in {(target / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _copy(source / name, target / name), names))
    size = sum((target / name).stat().st_size for name in names)
    return dict(zip(names, digests, strict=True)), size

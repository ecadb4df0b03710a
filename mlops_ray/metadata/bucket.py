"""Blobs in a bucket of an object store, read through a cache folder on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_ray.errors import ArtifactError, StorageError
from mlops_ray.metadata.blobs import DIGEST, GRACE, OWNER, Blob, corrupt
from mlops_ray.metadata.digest import canonical_json, digest_bytes, digest_listing, digest_tree
from mlops_ray.metadata.folder import FolderBlobs
from mlops_ray.metadata.redaction import redacted

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_TREE = ".tree"
_ONE_REQUEST = "allow_delayed_open"
_THREADS = 16
_CACHE_BYTES = 50 << 30
_IN_USE = timedelta(hours=6)


class BucketBlobs:
    """Blobs below a prefix of a bucket: S3, Google Cloud Storage, Azure, HDFS.

    A file is one object. A tree is one object for each of its files, and one more that lists their
    names and digests: its own digest is the tree's. A put is atomic by the nature of object stores.

    Args:
        files: The file system, of pyarrow.
        prefix: Bucket and prefix.
        cache: Folder for what was read or written on this machine. What was not used for six
            hours is removed where there is more than ``cache_bytes`` of it.
    """

    def __init__(
        self, files: FileSystem, prefix: str, cache: Path, *, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        self._files = files
        self._prefix = prefix.rstrip("/")
        self._cache = FolderBlobs(cache, durable=False)
        self._cache_bytes = cache_bytes
        self._cached_bytes: int | None = None

    @classmethod
    def at(cls, address: str, cache: Path) -> BucketBlobs:
        """Open ``s3://bucket/prefix?region=…`` or another address that pyarrow knows.

        Raises:
            StorageError: pyarrow cannot use the address.
        """
        import pyarrow as pa
        from pyarrow import fs

        try:
            files, prefix = fs.FileSystem.from_uri(_with_one_request(address))
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise StorageError(
                "the store of artifacts cannot be opened",
                where=redacted(address.partition("?")[0], address),
                why=redacted(str(error), address),
                fix="write for example s3://bucket/prefix?region=eu-central-1 into "
                "MLOPS_RAY_ARTIFACTS",
            ) from error
        name = digest_bytes(address.partition("?")[0].encode())[:16]
        return cls(files, prefix, cache / name)

    @property
    def where(self) -> str:
        """Kind of store, bucket and prefix."""
        return f"{self._files.type_name}://{self._prefix}"

    def staging(self) -> AbstractContextManager[Path]:
        """Give a folder for drafts in the cache."""
        return self._cache.staging()

    def keep(self, digest: str, data: bytes) -> None:
        """Upload bytes that are not there yet."""
        self._upload(self._key(digest), data)
        self._remember(len(data))
        self._cache.keep(digest, data)

    def keep_file(self, digest: str, draft: Path) -> None:
        """Upload a file that is not there yet; the draft goes to the cache."""
        size = draft.stat().st_size
        self._upload_file(digest, draft)
        self._remember(size)
        self._cache.keep_file(digest, draft)

    def keep_tree(self, digest: str, draft: Path, files: Mapping[str, str]) -> None:
        """Upload the files that are not there yet, then the list of them."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: self._upload_file(files[name], draft / name), files))
        self._upload(self._key(digest) + _TREE, canonical_json(files))
        self._remember(sum((draft / name).stat().st_size for name in files))
        self._cache.keep_tree(digest, draft, files)

    def read(self, digest: str) -> bytes:
        """Return a file's bytes."""
        return self.fetch(digest).read_bytes()

    def fetch(self, digest: str) -> Path:
        """Return a blob's path in the cache, downloaded and checked if it is not there yet.

        Raises:
            ArtifactError: What was downloaded does not have the digest.
        """
        if not self._cache.verify(digest):
            file, tree = self._heads(digest)
            if file is None and tree is None:
                raise FileNotFoundError(self._key(digest))
            with self.staging() as folder:
                draft = folder / "blob"
                listing = self._download_tree(digest, draft) if tree else {}
                if not tree:
                    self._download(self._key(digest), draft)
                size = sum((draft / name).stat().st_size for name in listing or ("",))
                if digest_tree(draft) != digest:
                    raise corrupt(digest, self._key(digest))
                self._cache.keep_tree(digest, draft, listing)
            self._remember(size)
        return self._cache.path(digest)

    def path(self, digest: str) -> Path:
        """Return where in the cache a blob is, or would be."""
        return self._cache.path(digest)

    def verify(self, digest: str) -> bool:
        """Say whether a blob is there and has its digest, which may mean to download it."""
        file, tree = self._heads(digest)
        if file is None and tree is None:
            self._cache.discard(digest)
            return False
        try:
            path = self.fetch(digest)
        except (FileNotFoundError, ArtifactError):
            return False
        if tree is not None:
            return self._refresh_tree(digest, tree)
        assert file is not None
        if file.size != path.stat().st_size:
            return False
        return self._refresh(file, path)

    def verify_all(self, digests: Iterable[str]) -> bool:
        """Say whether all are there and have their digests."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return all(pool.map(self.verify, dict.fromkeys(digests)))

    def members(self, digest: str) -> list[str]:
        """Return the digests of a tree's files; [] for a file, and for what is not there."""
        try:
            return sorted(set(self._listing(digest).values()))
        except FileNotFoundError:
            return []

    def discard(self, digest: str) -> None:
        """Remove a blob, from the cache too; a tree with all of its files that are corrupt."""
        file, tree = self._heads(digest)
        if tree is not None:
            with suppress(FileNotFoundError, ArtifactError):
                for member in set(self._listing(digest).values()):
                    if not self.verify(member):
                        self._delete(self._key(member))
            self._delete(self._key(digest) + _TREE)
        if file is not None:
            self._delete(self._key(digest))
        self._cache.discard(digest)

    def blobs(self) -> Iterator[Blob]:
        """Return all objects; files of trees too."""
        from pyarrow import fs

        selector = fs.FileSelector(self._prefix, recursive=True, allow_not_found=True)
        for info in self._files.get_file_info(selector):
            digest = info.base_name.removesuffix(_TREE)
            # Whatever else lies below the prefix is not ours.
            is_ours = DIGEST.fullmatch(digest) and info.path.startswith(self._key(digest))
            if info.is_file and is_ours:
                yield Blob(digest, info.size, _moment(info))

    def collect(self, digest: str, before: datetime) -> bool:
        """Delete a blob that was not written since ``before``; from the cache in any case."""
        found = [info for info in self._heads(digest) if info is not None]
        if any(_moment(info) >= before for info in found):
            return False
        for info in found:
            self._delete(info.path)
        self._cache.discard(digest)
        return True

    def sweep(self, before: datetime) -> int:
        """Remove old drafts from the cache; object stores show no halves."""
        return self._cache.sweep(before)

    def owner(self) -> str | None:
        """Return the run that the store is marked with."""
        try:
            with self._files.open_input_stream(f"{self._prefix}/{OWNER}") as stream:
                return bytes(stream.read()).decode()
        except FileNotFoundError:
            return None

    def mark(self, run_id: str) -> None:
        """Mark the store as that of the ledger that has this run."""
        self._upload(f"{self._prefix}/{OWNER}", run_id.encode(), anew=True)

    def _key(self, digest: str) -> str:
        return f"{self._prefix}/{digest[:2]}/{digest}"

    def _heads(self, digest: str) -> tuple[Any, Any]:
        """Look for the file and for the list of a tree; None for what is not there."""
        found = self._files.get_file_info([self._key(digest), self._key(digest) + _TREE])
        file, tree = (info if info.is_file else None for info in found)
        return file, tree

    def _upload_file(self, digest: str, path: Path) -> None:
        import pyarrow as pa

        if path.stat().st_size == 0:
            self._upload(self._key(digest), b"")
            return
        with pa.memory_map(str(path)) as source:
            self._upload(self._key(digest), source.read_buffer())

    def _upload(self, key: str, data: Any, *, anew: bool = False) -> None:
        """Put an object, unless it is there, of the same size, and not about to be collected."""
        info = self._files.get_file_info([key])[0]
        if not anew and info.is_file and info.size == len(data) and not _ageing(info):
            return
        # One write: a second one that failed would leave a half object once the stream is closed.
        with self._files.open_output_stream(key) as sink:
            sink.write(data)

    def _refresh(self, info: Any, path: Path) -> bool:
        """Put an ageing object anew, so that it counts as used."""
        import pyarrow as pa

        if _ageing(info):
            data = b"" if info.size == 0 else pa.memory_map(str(path)).read_buffer()
            self._upload(info.path, data, anew=True)
        return True

    def _refresh_tree(self, digest: str, tree: Any) -> bool:
        """Check that all files of a tree are there, and put them anew where they are ageing."""
        try:
            listing = self._listing(digest)
        except (FileNotFoundError, ArtifactError):
            return False
        keys = {self._key(member): name for name, member in listing.items()}
        infos = self._files.get_file_info(list(keys)) if keys else []
        root = self._cache.path(digest)
        for info in infos:
            path = root / keys[info.path]
            if not info.is_file or info.size != path.stat().st_size:
                return False
            self._refresh(info, path)
        if _ageing(tree):
            self._upload(tree.path, canonical_json(listing), anew=True)
        return True

    def _listing(self, digest: str) -> dict[str, str]:
        key = self._key(digest) + _TREE
        with self._files.open_input_stream(key) as stream:
            data = stream.read()
        if digest_listing(data) != digest:
            raise corrupt(digest, key)
        return json.loads(data)

    def _download_tree(self, digest: str, draft: Path) -> dict[str, str]:
        listing = self._listing(digest)
        draft.mkdir()
        for parent in {(draft / name).parent for name in listing}:
            parent.mkdir(parents=True, exist_ok=True)

        def download(name: str) -> None:
            self._download(self._key(listing[name]), draft / name)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(download, listing))
        return listing

    def _download(self, key: str, target: Path) -> None:
        with (
            self._files.open_input_stream(key) as source,
            target.open("wb", buffering=0) as sink,
        ):
            shutil.copyfileobj(source, sink, 4 << 20)

    def _delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._files.delete_file(key)

    def _remember(self, added: int) -> None:
        """Count what came into the cache; make room when it is too much."""
        if self._cached_bytes is None:
            self._cached_bytes = sum(blob.size for blob in self._cache.blobs())
        self._cached_bytes += added
        if self._cached_bytes <= self._cache_bytes:
            return
        unused = datetime.now(UTC) - _IN_USE
        for blob in sorted(self._cache.blobs(), key=lambda blob: blob.used_at):
            if self._cached_bytes <= self._cache_bytes * 3 // 4:
                break
            if self._cache.collect(blob.digest, unused):
                self._cached_bytes -= blob.size


def _with_one_request(address: str) -> str:
    """Let small objects go up in one request, not as uploads of several parts."""
    if not address.startswith("s3:") or _ONE_REQUEST in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}{_ONE_REQUEST}=true"


def _moment(info: Any) -> datetime:
    return info.mtime if info.mtime.tzinfo else info.mtime.replace(tzinfo=UTC)


def _ageing(info: Any) -> bool:
    return datetime.now(UTC) - _moment(info) > GRACE / 2

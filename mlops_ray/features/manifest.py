"""Training manifests: what a training set was made from, so that it can be made again."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.errors import FeatureStoreError
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.files import write_whole

_FOLDER = "manifests"
_ID_LETTERS = 16


class ViewPin(Frozen):
    """One version of a view's rows: digest of its definition, id and version of its Delta table.

    ``generation`` stands for the code that made the rows. Version −1 stands for no table yet.
    ``ttl_us`` and ``features``, types by name, are what of the declaration the digest may leave out.
    """

    definition: str
    table: str
    version: int
    generation: str
    ttl_us: int | None
    features: dict[str, str]


class TrainingManifest(Frozen):
    """All that decides a training set, and the digest of what came out.

    ``labels`` is the digest of the labelled rows known by ``until``; ``on_demand`` that of the code
    of the functions computed on demand; ``result`` that of the training set.
    """

    service: str
    labels: str
    views: dict[str, ViewPin]
    until: Instant | None
    known_only: bool
    on_demand: str
    rows: int
    result: str

    @property
    def id(self) -> str:
        """The manifest's name: the beginning of its digest."""
        return digest_json(self)[:_ID_LETTERS]


@contextmanager
def pinning(root: Path) -> Iterator[None]:
    """Let no other process write a manifest, or delete what none pins, at the same time."""
    folder = root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_manifest(root: Path, manifest: TrainingManifest) -> str:
    """Store a manifest with an offline store; return its id. It pins the versions that it names."""
    path = root / _FOLDER / f"{manifest.id}.json"
    write_whole(path, manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest.id


def read_manifest(root: Path, manifest_id: str) -> TrainingManifest:
    """Return a stored manifest.

    Raises:
        FeatureStoreError: There is none of that id, or it cannot be read.
    """
    path = root / _FOLDER / f"{manifest_id}.json"
    try:
        return _read(path)
    except FileNotFoundError as error:
        known = sorted(path.stem for path in path.parent.glob("*.json"))
        raise FeatureStoreError(
            f"there is no training manifest {manifest_id!r}",
            where=str(path.parent),
            fix=f"known manifests: {', '.join(known)}" if known else "make a training set first",
        ) from error


def _read(path: Path) -> TrainingManifest:
    try:
        return TrainingManifest.model_validate_json(path.read_text())
    except ValidationError as error:
        raise FeatureStoreError(
            "a training manifest cannot be read", where=str(path), why=str(error)
        ) from error


def list_manifests(root: Path) -> dict[str, TrainingManifest]:
    """Return all stored manifests by id, in the order in which they were written."""
    found = []
    for path in (root / _FOLDER).glob("*.json"):
        # Another process may forget one meanwhile.
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path.stem, _read(path)))
    return {name: manifest for _, name, manifest in sorted(found, key=lambda item: item[:2])}


def unpin(root: Path, manifest_id: str) -> None:
    """Forget a manifest: its versions may be vacuumed, unless another one pins them.

    Raises:
        FeatureStoreError: There is none of that id.
    """
    read_manifest(root, manifest_id)
    (root / _FOLDER / f"{manifest_id}.json").unlink(missing_ok=True)


def pinned_versions(root: Path, view: str, table: str) -> set[int]:
    """Return the versions of a view's Delta table of that id that manifests pin."""
    pins = (manifest.views.get(view) for manifest in list_manifests(root).values())
    return {
        pin.version for pin in pins if pin is not None and pin.table == table and pin.version >= 0
    }

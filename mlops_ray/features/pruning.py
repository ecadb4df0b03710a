"""Removing tables that no definition names and no training manifest pins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mlops_ray.config.base import Frozen
from mlops_ray.config.features import Features
from mlops_ray.features.late import seen_file
from mlops_ray.features.manifest import list_manifests
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import OnlineStore

Fate = Literal["removed", "would be removed", "pinned by a manifest"]


class Leftover(Frozen):
    """A table that is declared no more. ``folder`` is relative to the offline store."""

    view: str
    folder: str
    bytes: int
    fate: Fate


def prune(
    features: Features,
    store: OfflineStore,
    online: OnlineStore | None = None,
    *,
    dry_run: bool,
) -> list[Leftover]:
    """Remove the tables of views and definitions that are not declared any more; return them.

    What a training manifest pins stays. So do the tables of a view whose present definition has no
    table yet: they are what is served. Where ``online`` is given, its rows of such definitions go
    with them; no manifest needs those.
    """
    if online is not None and not dry_run:
        online.drop_undeclared()
    found = [_leftover(store.root, folder, dry_run) for folder in _undeclared(features, store)]
    for item in found:
        if item.fate == "removed":
            shutil.rmtree(store.root / item.folder)
            seen_file(store.root / item.folder).unlink(missing_ok=True)
            _forget(store.root / item.view)
    return found


def _undeclared(features: Features, store: OfflineStore) -> Iterator[Path]:
    for folder in sorted(store.root.glob("*/*/_delta_log")):
        table = folder.parent
        view = table.parent.name
        if view not in features.views or (table != store.path(view) and store.version(view) >= 0):
            yield table


def _leftover(root: Path, table: Path, dry_run: bool) -> Leftover:
    view = table.parent.name
    fate: Fate = "would be removed" if dry_run else "removed"
    if any(digest.startswith(table.name) for digest in _pinned(root, view)):
        fate = "pinned by a manifest"
    size = sum(file.stat().st_size for file in table.rglob("*") if file.is_file())
    return Leftover(view=view, folder=str(table.relative_to(root)), bytes=size, fate=fate)


def _pinned(root: Path, view: str) -> set[str]:
    """Return the digests of the definitions of a view that manifests pin."""
    pins = (manifest.views.get(view) for manifest in list_manifests(root).values())
    return {pin.definition for pin in pins if pin is not None and pin.version >= 0}


def _forget(folder: Path) -> None:
    """Remove the folder of a view that has no table any more."""
    if not any(path.is_dir() for path in folder.iterdir()):
        shutil.rmtree(folder)

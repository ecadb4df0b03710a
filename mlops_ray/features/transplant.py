"""Copying what a training set was made from to another store: only the versions that it pins."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.delta_log import files_of, open_table
from mlops_ray.features.files import check_files
from mlops_ray.features.manifest import TrainingManifest, ViewPin

_LOG = "_delta_log"
_NUMBER_LETTERS = 20


def transplant(manifest: TrainingManifest, source: Path, target: Path) -> dict[str, int]:
    """Make a store that stands where the manifest's views stood; return the versions by view.

    Data files are hard links where both stores are on one file system, which is safe since they never
    change; the logs are copies that end at those versions.

    Args:
        manifest: What to copy.
        source: The root of the offline store that has it.
        target: The root of another one, which has no such views yet.

    Raises:
        FeatureStoreError: A view's table, or files of its version, are gone.
    """
    for view, pin in manifest.views.items():
        if pin.version >= 0:
            folder = _folder(source, view, pin)
            _copy(folder, target / folder.relative_to(source), pin.version)
    return {view: pin.version for view, pin in manifest.views.items()}


def _folder(root: Path, view: str, pin: ViewPin) -> Path:
    """Return where the pinned table lies, whatever the view's declaration is by now."""
    for log in sorted((root / view).glob(f"*/{_LOG}")):
        table = open_table(log.parent)
        if table is not None and str(table.metadata().id) == pin.table:
            return log.parent
    raise FeatureStoreError(
        f"the table of view {view!r} from which the training set was made is gone",
        where=str(root / view),
        why="the project was rewound, or the folder removed",
        fix="restore it; or take the training set as it was recorded: --given training_set",
    )


def _copy(source: Path, target: Path, version: int) -> None:
    files = files_of(open_table(source, version))
    check_files(source, files)
    for file in files:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        _link(source / file.path, target / file.path)
    (target / _LOG).mkdir(parents=True, exist_ok=True)
    for entry in sorted((source / _LOG).iterdir()):
        number = entry.name[:_NUMBER_LETTERS]
        if number.isdecimal() and int(number) <= version and entry.is_file():
            shutil.copy2(entry, target / _LOG / entry.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

"""The source of then: a folder as it was when a run began."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.changes import PATCH, SKIPPED, SPECIAL, UNTRACKED, git


def make_source(
    provenance: Mapping[str, Any], artifacts: ArtifactStore, repository: Path, destination: Path
) -> Path:
    """Make the source of a run: the commit's files, its uncommitted changes, its untracked files.

    Neither the repository's working tree nor its index are touched.

    Args:
        provenance: That of the run.
        artifacts: Where the uncommitted changes are kept.
        repository: A folder of a git repository that has the commit.
        destination: A folder to make; it must not exist or be empty.

    Returns:
        The folder inside ``destination`` in which the run was started.

    Raises:
        MlopsRayError: The commit or the changes are not known, or the changes were not kept.
        ArtifactError: The changes are missing or corrupt.
    """
    commit = provenance.get("commit")
    if not commit:
        raise MlopsRayError(
            "the source of this run is not known",
            why="it was started outside a git repository",
            fix="run in a git repository to be able to go back",
        )
    _require_commit(repository, commit)
    dirty = provenance.get("dirty_digest")
    if dirty is None:
        raise MlopsRayError(
            "nobody knows whether this run's source had uncommitted changes",
            why="git could not say when it began",
            fix="make `git diff HEAD` work there before a run whose code has to come back",
        )
    changes = _changes(provenance, artifacts) if dirty != "clean" else None
    destination.mkdir(parents=True, exist_ok=True)
    _check_out(repository, commit, destination)
    if changes is not None:
        _apply_changes(changes, repository, destination)
    return destination / str(provenance.get("folder") or ".")


def _require_commit(repository: Path, commit: str) -> None:
    if git(repository, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise MlopsRayError(
            f"commit {commit[:12]} is not in this repository",
            where=str(repository),
            fix="fetch it: git fetch --all, and --unshallow in a shallow clone",
        )


def _check_out(repository: Path, commit: str, destination: Path) -> None:
    top = git(repository, "rev-parse", "--show-toplevel") or b""
    root = Path(top.decode().rstrip("\n"))
    with tempfile.TemporaryDirectory(prefix="mlops-ray-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        prefix = f"--prefix={destination.resolve()}/"
        read = git(root, "read-tree", commit, variables=index)
        if read is None or git(root, "checkout-index", "-a", prefix, variables=index) is None:
            raise MlopsRayError(
                f"the files of commit {commit[:12]} cannot be written",
                where=str(destination),
                fix="check that the folder is empty and the disk has room",
            )


def _changes(provenance: Mapping[str, Any], artifacts: ArtifactStore) -> Path:
    kept = provenance.get("changes")
    if not kept:
        raise MlopsRayError(
            "the uncommitted changes of this run were not kept",
            fix="commit before a run whose code has to come back",
        )
    ref = ArtifactRef.model_validate(kept)
    if not artifacts.verify(ref):
        raise MlopsRayError(
            "the uncommitted changes of this run are missing or corrupt",
            where=str(artifacts.path(ref.digest)),
            fix="restore them from a backup of the store",
        )
    path: Path = artifacts.get(ref)
    return path


def _apply_changes(changes: Path, repository: Path, destination: Path) -> None:
    if (changes / PATCH).is_file():
        # Where the destination lies inside another repository, git would look at that one.
        limit = {"GIT_CEILING_DIRECTORIES": str(destination.resolve().parent)}
        patch = str((changes / PATCH).resolve())
        if git(destination, "apply", "--whitespace=nowarn", patch, variables=limit) is None:
            raise MlopsRayError(
                "the uncommitted changes of this run do not apply to its commit", where=patch
            )
    if (changes / UNTRACKED).is_dir():
        shutil.copytree(changes / UNTRACKED, destination, dirs_exist_ok=True)
    if (changes / SKIPPED).is_file():
        _take_skipped(json.loads((changes / SKIPPED).read_text()), repository, destination)
    if (changes / SPECIAL).is_file():
        _make_special(json.loads((changes / SPECIAL).read_text()), destination)


def _make_special(special: dict[str, Any], destination: Path) -> None:
    for name in special["executable"]:
        file = destination / name
        file.chmod(file.stat().st_mode | 0o111)
    for name, target in special["links"].items():
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        (destination / name).symlink_to(target)


def _take_skipped(skipped: dict[str, dict[str, int]], repository: Path, destination: Path) -> None:
    """Take files that were too large to keep from the working tree, if they have not changed."""
    top = git(repository, "rev-parse", "--show-toplevel") or b""
    for name, then in skipped.items():
        file = Path(top.decode().rstrip("\n")) / name
        same = file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (
            then["size"],
            then["changed_ns"],
        )
        if not same:
            raise MlopsRayError(
                "a file that the run may have used was too large to keep and has changed since",
                where=name,
                fix="put it back as it was, or ignore it in git if it is not source",
            )
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, destination / name)

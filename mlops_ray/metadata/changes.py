"""The source that a run runs: commit, and what is not committed, as a tree that can be kept.

changes.patch   `git diff --binary` against the commit
untracked/…     files that git neither tracks nor ignores
skipped.json    those that are too large to keep: size in bytes and time of change in ns
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlops_ray.metadata.digest import digest_tree, tree_files

if TYPE_CHECKING:
    from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore

SOURCE_VARIABLE = "MLOPS_RAY_SOURCE"
SHIPPED = "mlops-ray-source.zip"
PATCH = "changes.patch"
UNTRACKED = "untracked"
SKIPPED = "skipped.json"

_CLEAN = "clean"
_LARGEST_FILE_BYTES = 10_000_000
_MOST_BYTES = 100_000_000
_NOT_SOURCE = (".mlops-ray*", "__pycache__", SHIPPED)
_PLAIN_DIFF = ("--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--no-renames")
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass(frozen=True)
class SourceState:
    """Which source a folder holds.

    Args:
        commit: The commit; None where there is no git.
        dirty_digest: ``clean``, or the digest of the uncommitted changes; None: not known.
        folder: The folder's path inside the repository, ``.`` at its top.
    """

    commit: str | None
    dirty_digest: str | None
    folder: str = "."


def source_state(folder: Path) -> SourceState:
    """Return what a folder holds. One that was shipped to a cluster knows it from its submission."""
    with _changes(folder) as (state, _):
        return state


def keep_source(
    folder: Path, artifacts: ArtifactStore | None
) -> tuple[SourceState, ArtifactRef | None]:
    """Return what a folder holds, and store its uncommitted changes where there are any.

    Raises:
        StorageError: The store cannot be written.
    """
    with _changes(folder) as (state, tree):
        ref = artifacts.put(tree) if artifacts is not None and tree is not None else None
        return state, ref


@contextmanager
def shipped(folder: Path) -> Iterator[dict[str, str]]:
    """Give the environment variables that tell a job which source ``folder`` holds.

    While the context is open, the uncommitted changes lie in the folder as a file, to be packaged
    with it.
    """
    archive = folder / SHIPPED
    with _changes(folder) as (state, tree):
        variables = {SOURCE_VARIABLE: json.dumps(asdict(state))} if state.commit else {}
        ours = tree is not None and not archive.exists()
        if ours:
            assert tree is not None
            _pack(tree, archive)
    try:
        yield variables
    finally:
        if ours:
            archive.unlink(missing_ok=True)


@contextmanager
def _changes(folder: Path) -> Iterator[tuple[SourceState, Path | None]]:
    """Give the state and a folder with the changes, None where there are none."""
    with tempfile.TemporaryDirectory(prefix="mlops-ray-") as drafts:
        tree = Path(drafts) / "changes"
        tree.mkdir()
        found = git(folder, "rev-parse", "--show-toplevel", "--show-prefix", "HEAD")
        if found is None:
            yield _told(folder, tree)
            return
        top, prefix, commit = found.decode().split("\n")[:3]
        _collect(Path(top), tree)
        inside = prefix.rstrip("/") or "."
        if not tree_files(tree):
            yield SourceState(commit, _CLEAN, inside), None
        else:
            yield SourceState(commit, digest_tree(tree), inside), tree


def _told(folder: Path, tree: Path) -> tuple[SourceState, Path | None]:
    told = json.loads(os.environ.get(SOURCE_VARIABLE) or "{}")
    state = SourceState(told.get("commit"), told.get("dirty_digest"), told.get("folder", "."))
    if not (folder / SHIPPED).is_file():
        return state, None
    with zipfile.ZipFile(folder / SHIPPED) as archive:
        archive.extractall(tree)
    # The archive of another submission would be worse than none.
    return state, tree if digest_tree(tree) == state.dirty_digest else None


def _collect(top: Path, tree: Path) -> None:
    excluded = [f"--exclude={pattern}" for pattern in _NOT_SOURCE]
    others = ("ls-files", "-z", "--others", "--exclude-standard", *excluded)
    with ThreadPoolExecutor(2) as pool:
        diff = pool.submit(git, top, "diff", *_PLAIN_DIFF, *_PREFIXES, "HEAD")
        untracked = pool.submit(git, top, *others)
    if diff.result():
        (tree / PATCH).write_bytes(diff.result() or b"")
    names = [os.fsdecode(name) for name in (untracked.result() or b"").split(b"\0") if name]
    skipped: dict[str, dict[str, int]] = {}
    total = 0
    for name in names:
        file = top / name
        if not file.is_file():
            continue
        found = file.stat()
        total += found.st_size
        if found.st_size > _LARGEST_FILE_BYTES or total > _MOST_BYTES:
            total -= found.st_size
            skipped[name] = {"size": found.st_size, "changed_ns": found.st_mtime_ns}
            continue
        target = tree / UNTRACKED / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if skipped:
        (tree / SKIPPED).write_text(json.dumps(skipped, indent=1, sort_keys=True))


def _pack(tree: Path, archive: Path) -> None:
    draft = archive.with_name(f".{archive.name}.{os.getpid()}")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in tree_files(tree):
            # With the time of a file, equal changes would make packages that differ.
            packed.writestr(zipfile.ZipInfo(name), (tree / name).read_bytes())
    draft.replace(archive)


def git(folder: Path, *arguments: str, variables: dict[str, str] | None = None) -> bytes | None:
    """Return what git prints; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.quotepath=off", *arguments],
            cwd=folder,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"} | (variables or {}),
            capture_output=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

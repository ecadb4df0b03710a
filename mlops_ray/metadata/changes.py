"""The source that a run runs: commit, and what is not committed, as a tree that can be kept.

changes.patch   `git diff --binary` against the commit
untracked/…     files that git neither tracks nor ignores
skipped.json    those that are too large to keep: size in bytes and time of change in ns
special.json    which of them are executable, and those that are links to folders or to nothing
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.digest import digest_bytes, digest_file, digest_files

SOURCE_VARIABLE = "MLOPS_RAY_SOURCE"
SHIPPED = "mlops-ray-source.zip"
PATCH = "changes.patch"
UNTRACKED = "untracked"
SKIPPED = "skipped.json"
SPECIAL = "special.json"

_logger = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class Changes:
    """What is not committed: files by their names in the tree, as bytes or where they lie."""

    written: dict[str, bytes]
    copied: dict[str, Path]

    @property
    def digest(self) -> str:
        """The digest of the tree, found without making it."""
        digests = {name: digest_bytes(data) for name, data in self.written.items()}
        digests |= {name: digest_file(path) for name, path in self.copied.items()}
        return digest_files(digests)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        copied = sum(path.stat().st_size for path in self.copied.values())
        return copied + sum(map(len, self.written.values()))

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Return the files of the tree, sorted by name."""
        for name in sorted([*self.written, *self.copied]):
            yield (
                name,
                (self.written[name] if name in self.written else self.copied[name].read_bytes()),
            )


def keep_source(
    folder: Path, artifacts: ArtifactStore | None
) -> tuple[SourceState, ArtifactRef | None]:
    """Return what a folder holds, and store its uncommitted changes where there are any.

    A folder that was shipped to a cluster knows it from its submission.

    Raises:
        StorageError: The store cannot be written.
    """
    state, changes = _look(folder)
    if artifacts is None or changes is None:
        return state, None
    ref = ArtifactRef(digest=changes.digest, kind="tree", size=changes.size)
    if artifacts.verify(ref):
        return state, ref
    with tempfile.TemporaryDirectory(prefix="mlops-ray-") as drafts:
        for name, data in changes.read():
            target = Path(drafts) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        ref = artifacts.put(Path(drafts))
    # A file may have been saved since we looked.
    return replace(state, dirty_digest=ref.digest), ref


@contextmanager
def shipped(folder: Path) -> Iterator[dict[str, str]]:
    """Give the environment variables that tell a job which source ``folder`` holds.

    While the context is open, the uncommitted changes lie in the folder as a file, to be packaged
    with it.
    """
    archive = folder / SHIPPED
    state, changes = _look(folder)
    ours = changes is not None and not archive.exists()
    if ours and changes is not None:
        _pack(changes, archive)
    try:
        yield {SOURCE_VARIABLE: json.dumps(asdict(state))} if state.commit else {}
    finally:
        if ours:
            archive.unlink(missing_ok=True)


def _look(folder: Path) -> tuple[SourceState, Changes | None]:
    found = git(folder, "rev-parse", "--show-toplevel", "--show-prefix", "HEAD")
    if found is None:
        return _told(folder)
    top, prefix, commit = found.decode().split("\n")[:3]
    changes = _changes(Path(top))
    inside = prefix.rstrip("/") or "."
    if changes is None:
        _logger.warning(
            "%s: git cannot say what is not committed, so this run's code will not be known; see "
            "why with `git diff HEAD` and `git ls-files --others`",
            top,
        )
        return SourceState(commit, None, inside), None
    if not (changes.written or changes.copied):
        return SourceState(commit, _CLEAN, inside), None
    return SourceState(commit, changes.digest, inside), changes


def _told(folder: Path) -> tuple[SourceState, Changes | None]:
    told = json.loads(os.environ.get(SOURCE_VARIABLE) or "{}")
    state = SourceState(told.get("commit"), told.get("dirty_digest"), told.get("folder", "."))
    if not (folder / SHIPPED).is_file():
        return state, None
    with zipfile.ZipFile(folder / SHIPPED) as archive:
        changes = Changes({name: archive.read(name) for name in archive.namelist()}, {})
    # The archive of another submission would be worse than none.
    return state, changes if changes.digest == state.dirty_digest else None


def _changes(top: Path) -> Changes | None:
    """Return what is not committed; None where git cannot say."""
    excluded = [f"--exclude={pattern}" for pattern in _NOT_SOURCE]
    others = ("ls-files", "-z", "--others", "--exclude-standard", *excluded)
    with ThreadPoolExecutor(2) as pool:
        diff = pool.submit(git, top, "diff", *_PLAIN_DIFF, *_PREFIXES, "HEAD")
        untracked = pool.submit(git, top, *others)
    patch, listed = diff.result(), untracked.result()
    if patch is None or listed is None:
        return None
    written = {PATCH: patch}
    copied: dict[str, Path] = {}
    skipped: dict[str, dict[str, int]] = {}
    executable: list[str] = []
    links: dict[str, str] = {}
    total = 0
    for name in (os.fsdecode(name) for name in listed.split(b"\0") if name):
        file = top / name
        if not file.is_file():
            links |= {name: os.readlink(file)} if file.is_symlink() else {}
            continue
        found = file.stat()
        executable += [name] if found.st_mode & 0o100 else []
        if found.st_size > _LARGEST_FILE_BYTES or total + found.st_size > _MOST_BYTES:
            skipped[name] = {"size": found.st_size, "changed_ns": found.st_mtime_ns}
        else:
            copied[f"{UNTRACKED}/{name}"] = file
            total += found.st_size
    if skipped:
        written[SKIPPED] = json.dumps(skipped, indent=1, sort_keys=True).encode()
    if executable or links:
        special = {"executable": executable, "links": links}
        written[SPECIAL] = json.dumps(special, indent=1, sort_keys=True).encode()
    return Changes({name: data for name, data in written.items() if data}, copied)


def _pack(changes: Changes, archive: Path) -> None:
    draft = archive.with_name(f".{archive.name}.{os.getpid()}")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in changes.read():
            # With the time of a file, equal changes would make packages that differ.
            packed.writestr(zipfile.ZipInfo(name), data)
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

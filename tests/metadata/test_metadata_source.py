"""Provenance: what a run ran with is recorded, and its source can be made again."""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.artifacts import ArtifactStore, open_artifacts
from mlops_ray.metadata.changes import SHIPPED, SOURCE_VARIABLE, keep_source, shipped
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.provenance import collect, installed_packages
from mlops_ray.metadata.source import make_source


@pytest.fixture
def artifacts(home: Home) -> ArtifactStore:
    return open_artifacts(home)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with text, bytes and a project in a folder, all committed."""
    root = tmp_path / "repository"
    (root / "flights").mkdir(parents=True)
    (root / ".gitignore").write_text("ignored\n")
    (root / "text é.py").write_text("".join(f"line {n}\n" for n in range(50)))
    (root / "bytes.bin").write_bytes(random.Random(1).randbytes(5000))
    (root / "flights/model.py").write_text("x = 1\n")
    (root / "flights/windows.txt").write_bytes(b"a\r\nb \r\n")
    _git(root, "init", "-q")
    _commit(root)
    return root


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


def _commit(root: Path) -> None:
    _git(root, "add", "-A")
    _git(root, "commit", "-q", "-m", "work")


def _content(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and ".git" not in file.parts and file.name != "ignored"
    }


def _work(root: Path, seed: int) -> None:
    """Change files as a person does who has not committed yet."""
    chance = random.Random(seed)
    lines = (root / "text é.py").read_text().splitlines()
    lines[chance.randrange(50)] = "changed"
    (root / "text é.py").write_text("\n".join(lines))
    blob = bytearray((root / "bytes.bin").read_bytes())
    blob[chance.randrange(len(blob))] ^= 255
    (root / "bytes.bin").write_bytes(bytes(blob) + chance.randbytes(10))
    (root / "ignored").write_text("not source")
    if chance.random() < 0.5:
        (root / "flights/model.py").rename(root / "flights/renamed.py")
    (root / "new folder").mkdir()
    (root / "new folder/ü \t.bin").write_bytes(chance.randbytes(100))
    (root / "flights/empty").write_bytes(b"")
    if chance.random() < 0.5:
        _git(root, "add", "-A")


@pytest.mark.parametrize("seed", range(4))
def test_the_source_of_then_comes_back(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path, seed: int
) -> None:
    _work(repository, seed)
    then = _content(repository)
    recorded = collect(repository / "flights", "c", 7, artifacts)
    shutil.rmtree(repository / "new folder")
    (repository / "bytes.bin").write_bytes(b"moved on")
    _commit(repository)
    made = make_source(recorded, artifacts, repository, tmp_path / "then")
    assert made == tmp_path / "then/flights"
    assert _content(tmp_path / "then") == then
    assert _git(repository, "status", "--porcelain") == ""


def test_a_committed_state_needs_no_changes(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    recorded = collect(repository, "c", 7, artifacts)
    assert (recorded["dirty_digest"], recorded["changes"]) == ("clean", None)
    assert recorded["commit"] == _git(repository, "rev-parse", "HEAD")
    then = _content(repository)
    (repository / "flights/model.py").write_text("x = 2\n")
    inside = repository / "inside another repository"
    make_source(recorded, artifacts, repository, inside)
    assert _content(inside) == then


def test_a_patch_applies_inside_another_repository(
    repository: Path, artifacts: ArtifactStore
) -> None:
    _work(repository, 0)
    then = _content(repository)
    recorded = collect(repository, "c", 7, artifacts)
    make_source(recorded, artifacts, repository, repository / "deep/then")
    assert _content(repository / "deep/then") == then


def test_equal_changes_have_one_digest(repository: Path) -> None:
    _work(repository, 0)
    before = keep_source(repository, None)[0]
    os.utime(repository / "new folder/ü \t.bin", (1, 1))
    assert keep_source(repository / "flights", None)[0].dirty_digest == before.dirty_digest
    (repository / "flights/empty").write_bytes(b"1")
    assert keep_source(repository, None)[0].dirty_digest not in (before.dirty_digest, "clean")


def test_a_job_knows_the_source_that_it_was_shipped_from(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _work(repository, 0)
    then = _content(repository)
    folder = repository / "flights"
    job = tmp_path / "job"
    with shipped(folder) as variables:
        shutil.copytree(folder, job)
    assert not (folder / SHIPPED).exists()
    before = collect(folder, "c", 7, artifacts)
    monkeypatch.setenv(SOURCE_VARIABLE, variables[SOURCE_VARIABLE])
    recorded = collect(job, "c", 7, artifacts)
    for name in ("commit", "dirty_digest", "folder", "changes"):
        assert recorded[name] == before[name]
    make_source(recorded, artifacts, repository, tmp_path / "then")
    assert _content(tmp_path / "then") == then
    with shipped(job):
        assert (job / SHIPPED).is_file()
    assert (job / SHIPPED).is_file()


def test_another_submissions_changes_are_not_taken_for_ours(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _work(repository, 0)
    with shipped(repository) as variables:
        shutil.copy(repository / SHIPPED, tmp_path)
    told = variables[SOURCE_VARIABLE].replace('"dirty_digest": "', '"dirty_digest": "0')
    monkeypatch.setenv(SOURCE_VARIABLE, told)
    assert collect(tmp_path, "c", 7, artifacts)["changes"] is None


def test_without_git_the_source_is_not_known(artifacts: ArtifactStore, tmp_path: Path) -> None:
    recorded = collect(tmp_path, "c", 7, artifacts)
    assert (recorded["commit"], recorded["dirty_digest"], recorded["changes"]) == (None,) * 3
    with pytest.raises(MlopsRayError, match="not known"):
        make_source(recorded, artifacts, tmp_path, tmp_path / "then")


def test_what_is_missing_is_said(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    _work(repository, 0)
    recorded = collect(repository, "c", 7, artifacts)

    def make(**changes: Any) -> None:
        make_source(recorded | changes, artifacts, repository, tmp_path / "then")

    with pytest.raises(MlopsRayError, match=r"0123[\s\S]*not in this repository[\s\S]*fetch"):
        make(commit="0123" * 10)
    with pytest.raises(MlopsRayError, match="were not kept"):
        make(changes=None)
    artifacts.discard(recorded["changes"]["digest"])
    with pytest.raises(MlopsRayError, match="missing or corrupt"):
        make()


def test_large_files_are_not_kept_but_taken_where_they_are_unchanged(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    large = repository / "large"
    large.write_bytes(b"1" * 10_000_001)
    recorded = collect(repository, "c", 7, artifacts)
    assert recorded["changes"]["size"] < 1000
    make_source(recorded, artifacts, repository, tmp_path / "then")
    assert (tmp_path / "then/large").read_bytes() == large.read_bytes()
    large.write_bytes(b"2" * 10_000_001)
    with pytest.raises(MlopsRayError, match="large: a file"):
        make_source(recorded, artifacts, repository, tmp_path / "again")


def test_what_git_cannot_say_is_not_called_clean(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (repository / "flights/model.py").write_text("x = 2\n")
    (repository / ".gitattributes").write_text("*.bin filter=gone\n")
    _git(repository, "config", "filter.gone.required", "true")
    _git(repository, "config", "filter.gone.clean", "no-such-program")
    (repository / "bytes.bin").write_bytes(b"other")
    recorded = collect(repository, "c", 7, artifacts)
    assert (recorded["dirty_digest"], recorded["changes"]) == (None, None)
    assert "git cannot say what is not committed" in caplog.text
    with pytest.raises(MlopsRayError, match="nobody knows whether"):
        make_source(recorded, artifacts, repository, tmp_path / "then")


def test_untracked_programs_and_links_come_back(
    repository: Path, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (repository / "tool.sh").write_text("#!/bin/sh\n")
    (repository / "tool.sh").chmod(0o755)
    (repository / "plain.txt").write_text("")
    (repository / "flights/data").symlink_to(tmp_path / "elsewhere")
    (repository / "nowhere").symlink_to("nothing")
    recorded = collect(repository, "c", 7, artifacts)
    then = make_source(recorded, artifacts, repository, tmp_path / "then")
    assert os.access(then / "tool.sh", os.X_OK)
    assert not (then / "plain.txt").stat().st_mode & 0o111
    assert (then / "flights/data").readlink() == tmp_path / "elsewhere"
    assert (then / "nowhere").readlink() == Path("nothing")


def test_packages_are_those_that_python_knows() -> None:
    known: dict[str, str] = {}
    # Where Ray is imported, packages that lie inside its own are on the path as well.
    paths = [path for path in sys.path if f"{os.sep}ray{os.sep}" not in path]
    for found in importlib.metadata.distributions(path=paths):
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        known.setdefault(name, found.version)
    assert installed_packages() == dict(sorted(known.items()))


def test_the_machine_is_described(tmp_path: Path) -> None:
    machine = collect(tmp_path, "c", 7)["machine"]
    assert machine["cpus"] == os.cpu_count()
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert total is not None
    assert machine["memory"] == int(total[1]) * 1024
    assert machine["cpu"]

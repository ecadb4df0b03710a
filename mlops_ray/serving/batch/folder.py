"""The files of a job between its first row and its last: what a job that is killed goes on from.

job.json            what is scored with what, in which pieces
parts/              the output of each finished piece
done/               what came of each finished piece: it is there after all else of the piece
refused/            the rows that a piece refused
report.json         what came of the job; from then on only the output is put in its place
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import sync, write_whole
from mlops_ray.metadata.profile import Profile
from mlops_ray.serving.batch.pieces import Piece
from mlops_ray.serving.batch.writers import SUFFIXES

_GONE = "gone-"


class Job(Frozen):
    """What was decided when a job began. ``id`` names it among all jobs."""

    id: str
    pieces: tuple[Piece, ...]
    feature_versions: dict[str, int]


class Done(Frozen):
    """What came of a piece. ``reasons`` count refused rows by field and reason, ``scores`` the scored
    ones by score, in bins of equal width; ``profile`` is that of the rows counted for drift."""

    number: int
    rows: int
    refused: int
    reasons: dict[str, int]
    scores: tuple[int, ...]
    score_sum: float
    profile: dict[str, object]

    def counted(self) -> Profile:
        """Return the profile."""
        return Profile.from_json(self.profile)


@dataclass(frozen=True)
class JobFolder:
    """The paths of a job, and of its pieces.

    Args:
        root: Beside the output, in the same file system.
        log: For parts of the prediction log, in the file system of the home.
        kind: The format of the parts.
    """

    root: Path
    log: Path
    kind: str

    @property
    def parts(self) -> Path:
        """Folder of the finished parts."""
        return self.root / "parts"

    def part(self, number: int) -> Path:
        """Return the file of a piece's output."""
        return self.parts / f"part-{number:06d}{SUFFIXES[self.kind]}"

    def refused(self, number: int) -> Path:
        """Return the file of the rows that a piece refused."""
        return self.root / "refused" / f"{number:06d}.parquet"

    def done(self, number: int) -> Path:
        """Return the file that says that a piece is finished."""
        return self.root / "done" / f"{number:06d}.json"

    def attempt(self, number: int) -> int:
        """Note that a worker begins a piece; return how many have since the call."""
        with (self._begun / f"{number:06d}").open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    @property
    def _begun(self) -> Path:
        return self.root / "begun"

    @property
    def job(self) -> Path:
        """The file that says what the job is."""
        return self.root / "job.json"

    @property
    def report(self) -> Path:
        """The file of the result."""
        return self.root / "report.json"

    @property
    def repeated(self) -> Path:
        """The file of the rows whose ids came before."""
        return self.root / "repeated.npy"

    def logged(self, number: int) -> Path:
        """Return the file of what the prediction log is to have of a piece."""
        return self.log / f"{number:06d}.log"

    def begin(self, job: Job) -> None:
        """Make the folders, and write down what the job is: at the begin of each call."""
        shutil.rmtree(self._begun, ignore_errors=True)
        folders = (self.parts, self.root / "refused", self.root / "done", self._begun, self.log)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.job, job.model_dump_json().encode())

    def finished(self) -> dict[int, Done]:
        """Return what came of the pieces that are finished."""
        files = (self.root / "done").glob("*.json")
        found = [Done.model_validate_json(file.read_bytes()) for file in files]
        return {done.number: done for done in found}


def settle(draft: Path, place: Path) -> None:
    """Put a finished file in its place, so that it is there whole even after a power cut."""
    sync(draft)
    draft.replace(place)
    sync(place.parent)


def only(work: Path, kept: set[str]) -> None:
    """Remove from a working folder what other jobs have left."""
    if work.is_dir():
        for other in work.iterdir():
            if other.name not in kept:
                discard(other)


def discard(folder: Path) -> None:
    """Remove a folder so that it is there as it was, or not at all, whenever this is interrupted."""
    gone = folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def exclusive(lock: Path, output: str) -> Iterator[None]:
    """Hold the right to write an output; the system gives it back when a process dies.

    Raises:
        ServingError: Another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ServingError(
            "another process is scoring into this output",
            where=output,
            fix="wait for it to end, or choose another output",
        ) from error
    try:
        yield
    finally:
        os.close(handle)

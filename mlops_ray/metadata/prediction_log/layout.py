"""What lies where in a project's prediction log, and the columns of its tables.

replicas/<replica>/<sequence>.log   frames from that sequence number on; locked while it is written to
tables/predictions, tables/labels   Delta tables, partitioned by ``day``
tables/positions/<kind>-<n>.json    up to where each replica is in a table whose app transaction is n
readers/<name>.json                 up to where somebody has read: nothing beyond is removed
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa

from mlops_ray.metadata.prediction_log.frames import Frame, read_frames

Kind = Literal["predictions", "labels"]
KINDS: tuple[Kind, ...] = ("predictions", "labels")

INSTANT = pa.timestamp("us", tz="UTC")
PREDICTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("time", INSTANT),
        ("received", INSTANT),
        ("score", pa.float64()),
        ("version", pa.int64()),
        ("route", pa.string()),
        ("latency_us", pa.int64()),
        ("sample", pa.float64()),
        ("model", pa.string()),
    ]
)
"""``time`` is the request's own, ``received`` the server's; ``sample`` is the share that was kept when
this row was; ``model`` is the registered name of who answered, null for the endpoint's own. Each model
in shadow adds ``shadow_<alias>``; ``features`` and ``inputs`` are structs."""

LABELS = pa.schema(
    [("id", pa.string()), ("label", pa.int8()), ("known_at", INSTANT), ("received", INSTANT)]
)
"""Labels as they came. One id may come more than once: the last one counts."""

DAY = pa.field("day", pa.date32())
"""The UTC day of ``received``, which no client chooses."""

BATCH = "batch-"
"""What the name of a replica begins with that is a piece of a batch, and no live traffic."""

BATCH_ROUTE = "batch"
"""The ``route`` of rows that a batch has scored."""

SHADOW = "shadow_"
"""What the name of a column begins with that holds the scores of the model of an alias in shadow."""

REDACTED = "redacted:"
"""What a redacted value begins with; its keyed digest in hexadecimal follows."""

DRAFT = ".draft"
"""A replica's next file, before it is locked."""

_SUFFIX = ".log"


@dataclass(frozen=True)
class Segment:
    """One file of a replica. Its first frame has the sequence number ``first``."""

    path: Path
    replica: str
    first: int


def table_folder(folder: Path, kind: Kind) -> Path:
    """Return the folder of a Delta table of the log."""
    return folder / "tables" / kind


def replica_folder(folder: Path, replica: str) -> Path:
    """Return the folder of a replica's files."""
    return folder / "replicas" / replica


def readers_folder(folder: Path) -> Path:
    """Return the folder of the readers' positions."""
    return folder / "readers"


def segment_name(first: int) -> str:
    """Return the name of the file that begins with a sequence number."""
    return f"{first:016d}{_SUFFIX}"


def segments(folder: Path) -> dict[str, list[Segment]]:
    """Return the files of each replica, in order."""
    found: dict[str, list[Segment]] = {}
    for replica in sorted(_names(folder / "replicas")):
        names = sorted(n for n in _names(folder / "replicas" / replica) if _is_segment(n))
        found[replica] = [
            Segment(folder / "replicas" / replica / name, replica, int(name[: -len(_SUFFIX)]))
            for name in names
        ]
    return found


@contextmanager
def kept_segments(folder: Path) -> Iterator[dict[str, list[Segment]]]:
    """Yield the files of each replica, in order; until the end, none of them is removed.

    So there is no need to have more than one of them open, however many there are.
    """
    with _locked(folder, fcntl.LOCK_SH):
        yield segments(folder)


@contextmanager
def unread_segments(folder: Path) -> Iterator[bool]:
    """Yield whether nobody reads files now; until the end, whoever wants to waits."""
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        yield alone


def frames_after(files: Sequence[Segment], after: int) -> Iterator[Frame]:
    """Yield the frames of one replica's files beyond a sequence number, each once, in order."""
    for place, segment in enumerate(files):
        following = files[place + 1].first if place + 1 < len(files) else None
        if following is None or following > after + 1:
            # Where locks do not reach, a compaction may have removed what is in the table.
            with suppress(FileNotFoundError), segment.path.open("rb") as file:
                for frame in read_frames(file, after):
                    yield frame
                    after = frame.sequence


def try_lock(file: IO[bytes] | int) -> bool:
    """Lock a file until it is closed. False where another process, or another opening, has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Lock the folder of all replicas; yield whether that was possible."""
    try:
        handle = os.open(folder / "replicas", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, how)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_segment(name: str) -> bool:
    return name.endswith(_SUFFIX) and name[: -len(_SUFFIX)].isdigit()

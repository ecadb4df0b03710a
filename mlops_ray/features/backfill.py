"""Backfill of many rows in bounded memory: by entity, on all of the cluster, and resumable.

1. Each piece of what the view is made from is parted by entity into a spill file.
2. Each part goes through the view's stream, as in process, into sorted files of the view's table.
3. One commit puts all those files into the table and moves the watermark.

What each task has done is on disk, so a backfill that was killed goes on from there when it is run
again on the same rows. Until the commit no reader sees anything of it. The feature rows are those,
to the bit, that a stream in process makes: every row of an entity passes through one part, in order.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.arrivals import Origin
from mlops_ray.features.files import WrittenFile
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.pieces import ArrowPiece, Piece
from mlops_ray.features.spill import read_part, spill
from mlops_ray.features.streams import open_stream
from mlops_ray.metadata.digest import digest_json

PART_ROWS = 1_000_000
_DIGEST_LETTERS = 16


@dataclass(frozen=True)
class Plan:
    """What a backfill makes, as told on disk to whoever takes it up after a kill.

    ``parts`` is a multiple of the table's number of buckets, so that each part lies in one of them.
    """

    definition: str
    generation: str
    pieces: str
    after_us: int
    until_us: int
    parts: int


@dataclass(frozen=True)
class Backfilled:
    """The version of the view's table, up to where it is complete now, and how many rows were made."""

    version: int
    until_us: int
    rows: int


def backfill(
    offline: OfflineStore,
    origin: Origin,
    pieces: Sequence[Piece],
    after_us: int,
    until_us: int,
    generation: str = "",
) -> Backfilled:
    """Store the feature rows of a view for the arrivals in (after, until].

    Where an earlier backfill of the same rows was cut short, that one is finished instead, which may
    have been to go less far.

    Args:
        offline: The store.
        origin: What the view is made from.
        pieces: All rows of that.
        after_us: The view's watermark, or before everything.
        until_us: Up to where to go.
        generation: Of the code that makes the rows.

    Raises:
        FeatureStoreError: Another backfill of this view is under way.
    """
    definition = origin.definition
    buckets = offline.buckets(definition.name)
    rows = sum(piece.rows for piece in pieces)
    parts = buckets * max(1, -(-rows // (buckets * PART_ROWS)))
    identity = _identity(pieces)
    wanted = Plan(definition.digest, generation, identity, after_us, until_us, parts)
    with _workplace(offline, origin) as folder:
        plan = _agree(folder, wanted)
        spilled = _spill_all(folder, origin, pieces, plan)
        files = _make_all(folder, offline, origin, spilled, plan)
        version = offline.commit(definition.name, files, plan.until_us, generation)
        shutil.rmtree(folder)
    return Backfilled(version, plan.until_us, sum(file.rows for file in files))


def make_part(
    offline: OfflineStore,
    origin: Origin,
    spilled: Sequence[Path],
    part: int,
    plan: Plan,
    done: Path,
) -> list[WrittenFile]:
    """Make the feature rows of one part, write them, and tell so in the file ``done``."""
    stream = open_stream(origin, plan.after_us)
    stream.extend([pa.concat_tables(read_part(spilled, part))])
    rows = stream.advance(plan.until_us)
    view = origin.definition.name
    bucket = part % offline.buckets(view)
    files = [offline.write_bucket(view, bucket, rows)] if rows.num_rows else []
    staged = done.with_suffix(".staged")
    staged.write_bytes(pickle.dumps(files))
    os.replace(staged, done)
    return files


def _spill_all(folder: Path, origin: Origin, pieces: Sequence[Piece], plan: Plan) -> list[Path]:
    targets = [folder / f"piece-{number:06d}.arrow" for number in range(len(pieces))]
    due = [
        (origin, piece, plan.after_us, plan.until_us, plan.parts, target)
        for piece, target in zip(pieces, targets, strict=True)
        if not target.exists()
    ]
    run_all(spill, due)
    return targets


def _make_all(
    folder: Path, offline: OfflineStore, origin: Origin, spilled: Sequence[Path], plan: Plan
) -> list[WrittenFile]:
    table = offline.path(origin.definition.name)
    records = [folder / f"part-{part:06d}.done" for part in range(plan.parts)]
    due = [
        (offline, origin, spilled, part, plan, record)
        for part, record in enumerate(records)
        if _made(record, table) is None
    ]
    run_all(make_part, due)
    made = [_made(record, table) for record in records]
    return [file for files in made for file in files or []]


def _made(record: Path, table: Path) -> list[WrittenFile] | None:
    """Return the files of a part, None where they are not made or are no longer there."""
    if not record.exists():
        return None
    files: list[WrittenFile] = pickle.loads(record.read_bytes())
    return files if all((table / file.path).exists() for file in files) else None


def run_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
    """Make all calls: where Ray is up as tasks, a bounded number at a time, else one by one."""
    import ray

    if not ray.is_initialized():
        for arguments in calls:
            function(*arguments)
        return
    remote = ray.remote(max_retries=3)(function)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: list[Any] = []
    for arguments in calls:
        if len(running) >= most:
            done, running = ray.wait(running)
            ray.get(done)
        running.append(remote.remote(*arguments))
    ray.get(running)


@contextmanager
def _workplace(offline: OfflineStore, origin: Origin) -> Iterator[Path]:
    """Return the folder of a view's backfill, for this process alone."""
    definition = origin.definition
    name = f"{definition.name}-{definition.digest[:_DIGEST_LETTERS]}"
    folder = offline.root / ".backfill" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FeatureStoreError(
                "another backfill of this view is under way",
                where=str(folder),
                fix="wait for its end: it makes the same rows",
            ) from error
        folder.mkdir(exist_ok=True)
        yield folder


def _agree(folder: Path, wanted: Plan) -> Plan:
    """Return the plan that was left here where it makes what is wanted, or else begin anew."""
    path = folder / "plan.json"
    if path.exists():
        left = Plan(**json.loads(path.read_bytes()))
        if left.until_us <= wanted.until_us and left == replace(wanted, until_us=left.until_us):
            return left
    _start(folder, wanted)
    return wanted


def _start(folder: Path, plan: Plan) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    staged = folder / "plan.staged"
    staged.write_text(json.dumps(asdict(plan)))
    os.replace(staged, folder / "plan.json")


def _identity(pieces: Sequence[Piece]) -> str:
    """Return what stands for the rows of all pieces."""
    told = []
    for piece in pieces:
        if isinstance(piece, ArrowPiece):
            status = piece.path.stat()
            told.append(
                [str(piece.path), piece.start, piece.stop, status.st_size, status.st_mtime_ns]
            )
        else:
            told.append([str(piece.folder), piece.file.path])
    return digest_json(told)

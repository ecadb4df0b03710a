"""Frames appended to a replica's files, so that they survive a crash of the machine."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from mlops_ray.metadata.files import make_folder, sync
from mlops_ray.metadata.prediction_log.frames import file_head, sealed
from mlops_ray.metadata.prediction_log.layout import (
    DRAFT,
    replica_folder,
    segment_name,
    try_lock,
)

FULL_BYTES = 32 << 20
"""At this size a file is closed and another one begun."""


class SegmentWriter:
    """Appends frames for one replica; one thread at a time.

    A file is locked as long as it is written to: one without a lock is complete, also when its writer
    was killed. After a failure the next frame begins a new file.

    Args:
        folder: The project's prediction log.
        replica: A name that no other has or had.
        full_s: After this time a file is closed at the next frame, so that it can be removed.
    """

    def __init__(self, folder: Path, replica: str, full_s: float) -> None:
        self._folder = replica_folder(folder, replica)
        self._full_s = full_s
        self._file: int | None = None
        self._path = self._folder
        self._head = b""
        self._bytes = 0
        self._opened_s = 0.0

    def append(self, sequence: int, frame: bytes) -> None:
        """Append a frame; it is on disk when this returns.

        Raises:
            OSError: The disk refuses. Nothing of the frame is read later, if the disk lets that be
                known; the same frame may be appended again.
        """
        try:
            self._file = self._current(sequence)
            data = sealed(frame, self._head)
            # The head goes with the first frame: no file has a head alone.
            view = memoryview(data if self._bytes else self._head + data)
            written = len(view)
            while view:
                view = view[os.write(self._file, view) :]
            os.fdatasync(self._file)
        except OSError:
            self._abandon()
            raise
        self._bytes += written

    def close(self) -> None:
        """Close the file that is written to."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _current(self, sequence: int) -> int:
        age_s = time.monotonic() - self._opened_s
        if self._file is not None and (self._bytes >= FULL_BYTES or age_s >= self._full_s):
            self.close()
        return self._begin(sequence) if self._file is None else self._file

    def _begin(self, sequence: int) -> int:
        make_folder(self._folder)
        # It gets its name when it is locked: nobody may take it for complete before.
        draft = self._folder / DRAFT
        draft.unlink(missing_ok=True)
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try_lock(file)
            self._path = draft.rename(self._folder / segment_name(sequence))
            sync(self._folder)
        except OSError:
            os.close(file)
            raise
        self._head, self._bytes, self._opened_s = file_head(), 0, time.monotonic()
        return file

    def _abandon(self) -> None:
        """Cut off what a failed write has left, and write to this file no more."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._bytes)
                if not self._bytes:
                    self._path.unlink()
            with contextlib.suppress(OSError):
                self.close()
            self._file = None

"""What the controller remembers, on disk: whole generations, a journal between them, a history.

CURRENT            name of the generation that counts
generations/N/     state.json and the monitor's tables
checkpoints/NAME/  the same, kept by name
journal/N          deltas observed since generation N began, in order
history.jsonl      everything measured, triggered, retrained; cut back to the state's length
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.errors import MonitoringError
from mlops_ray.loop.policy import Evidence
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.files import make_folder, sync, write_whole
from mlops_ray.monitoring.measurement import ServedVersion
from mlops_ray.monitoring.monitor import Monitor

Phase = Literal["watching", "triggered", "retraining"]


class Trigger(Frozen):
    """A retraining: when and why it was triggered, while which version answered, and its job.

    ``submitted_s`` is the wall time of the first submission, in seconds since 1970.
    """

    at: Instant
    number: int
    submission_id: str
    version: int
    reason: str
    evidence: Evidence = Field(default_factory=dict)
    submissions: int = 0
    submitted_s: float = 0.0


class ControllerState(Frozen):
    """The controller's state beside the monitor's tables. ``now`` is the last tick's time."""

    session: str = ""
    phase: Phase = "watching"
    now: Instant | None = None
    served: ServedVersion | None = None
    trigger: Trigger | None = None
    last_retraining_at: Instant | None = None
    retrainings: int = 0
    promotions: int = 0
    failures: int = 0
    history_bytes: int = 0


class StateStore:
    """The controller's memory in one folder. Not thread-safe: its owner holds a lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._generation = 0
        self._journalled = 0
        for name in ("generations", "checkpoints", "journal"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def load(self, monitor: Monitor) -> ControllerState:
        """Fill ``monitor`` with what was saved and journalled; return the state beside it.

        Raises:
            MonitoringError: What was saved cannot be read.
        """
        state = ControllerState()
        current = self._folder / "CURRENT"
        if current.exists():
            self._generation = int(current.read_text())
            state = self._read(self._generation_folder(), monitor)
        self._cut_history(state.history_bytes)
        entries = sorted(self._journal_folder().glob("*.delta"))
        for entry in entries:
            monitor.observe(pickle.loads(entry.read_bytes()))
        self._journalled = len(entries)
        return state

    def save(self, state: ControllerState, monitor: Monitor) -> None:
        """Make this the state that ``load`` returns, all of it or nothing."""
        old_folder, old_journal = self._generation_folder(), self._journal_folder()
        self._generation += 1
        shutil.rmtree(self._journal_folder(), ignore_errors=True)
        self._write(self._generation_folder(), state, monitor)
        write_whole(self._folder / "CURRENT", str(self._generation).encode())
        self._journalled = 0
        shutil.rmtree(old_folder, ignore_errors=True)
        shutil.rmtree(old_journal, ignore_errors=True)

    def journal(self, delta: Delta) -> None:
        """Keep a delta until the next ``save``."""
        folder = self._journal_folder()
        make_folder(folder)
        write_whole(folder / f"{self._journalled:08d}.delta", pickle.dumps(delta))
        self._journalled += 1

    def save_checkpoint(self, name: str, state: ControllerState, monitor: Monitor) -> None:
        """Keep a state by name, and of the older ones only the newest."""
        folder = self._folder / "checkpoints"
        older = sorted(folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
        self._write(folder / name, state, monitor)
        for path in [path for path in older if path.name != name][:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def load_checkpoint(self, name: str, monitor: Monitor) -> ControllerState:
        """Fill ``monitor`` from a checkpoint, cut the history back to it; return its state.

        Raises:
            MonitoringError: There is no such checkpoint, or it cannot be read.
        """
        folder = self._folder / "checkpoints" / name
        if not folder.exists():
            raise MonitoringError(
                f"the monitor has no checkpoint {name!r}",
                where=str(folder),
                fix="start the replay from the beginning, in a new run",
            )
        state = self._read(folder, monitor)
        self._cut_history(state.history_bytes)
        return state

    def clear(self) -> None:
        """Forget the history, the checkpoints and the journal; the next ``save`` does the rest."""
        self._cut_history(0)
        for path in (self._folder / "checkpoints").iterdir():
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self._journal_folder(), ignore_errors=True)
        self._journalled = 0

    def append_history(self, entry: Mapping[str, Any]) -> int:
        """Append an entry; return the length of the history in bytes."""
        with self._history_path().open("ab") as file:
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            return file.tell()

    def history(self) -> list[dict[str, Any]]:
        """Return all entries in order."""
        path = self._history_path()
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def _read(self, folder: Path, monitor: Monitor) -> ControllerState:
        try:
            state = ControllerState.model_validate_json((folder / "state.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise MonitoringError(
                "the controller's saved state cannot be read",
                where=str(folder / "state.json"),
                why=str(error),
                fix="move the monitor's folder away: it then starts with an empty memory",
            ) from error
        monitor.load(folder)
        return state

    def _write(self, folder: Path, state: ControllerState, monitor: Monitor) -> None:
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        monitor.save(draft)
        (draft / "state.json").write_text(state.model_dump_json())
        for path in (*draft.iterdir(), draft):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        sync(folder.parent)

    def _cut_history(self, size: int) -> None:
        """Drop entries that were appended after the state that counts, such as half a line."""
        path = self._history_path()
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)

    def _generation_folder(self) -> Path:
        return self._folder / "generations" / str(self._generation)

    def _journal_folder(self) -> Path:
        return self._folder / "journal" / str(self._generation)

    def _history_path(self) -> Path:
        return self._folder / "history.jsonl"

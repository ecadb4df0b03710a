"""Rows of a batch put into the prediction log: written aside piece by piece, shown when the batch is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.metadata.files import make_folder, sync
from mlops_ray.metadata.prediction_log.frames import file_head, sealed
from mlops_ray.metadata.prediction_log.layout import BATCH, replica_folder, segment_name
from mlops_ray.serving.log.encoding import Answered, Encoding
from mlops_ray.serving.log.redaction import open_redaction


def write_piece(
    path: Path,
    answered: Iterable[Answered],
    folder: Path,
    inputs: Mapping[str, RequestField],
    settings: Settings,
) -> None:
    """Write a piece of a batch to ``path``, in place of what is there; it is on disk on return.

    Args:
        path: On the file system of ``folder``.
        answered: The rows; each item becomes a frame, and should have some 100,000 rows at most.
        folder: The project's prediction log.
        inputs: The fields of a row and their types.
        settings: What is kept, and how.
    """
    encoding = Encoding(inputs, settings, open_redaction(folder, settings.redact))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        head = file_head()
        file.write(head)
        for number, item in enumerate(answered, 1):
            file.write(sealed(encoding.frame(number, [(time.time_ns(), item)], []), head))
        file.flush()
        os.fsync(file.fileno())


def publish_piece(path: Path, folder: Path, job: str, piece: int) -> None:
    """Show a piece in the log. In any order, and again after a crash: it counts once.

    Args:
        path: Of the written piece; nothing is done where it is gone, because it was shown before.
        folder: The project's prediction log.
        job: A name that no other batch has or had.
        piece: Its number in the batch.
    """
    target = replica_folder(folder, f"{BATCH}{job}-{piece}") / segment_name(1)
    make_folder(target.parent)
    try:
        path.rename(target)
    except FileNotFoundError:
        return
    sync(target.parent)

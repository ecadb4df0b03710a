"""The loop on Ray Train: workers that share the encoded rows, and new ones for those that die."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlops_ray.errors import TrainingError
from mlops_ray.training.loop import Settings

Listener = Callable[[dict[str, Any]], None]

_MAX_FAILURES = 2
_STATE_FILE = "state.pt"
_PROGRESS_FILE = "progress.jsonl"
_POLL_S = 0.5


@dataclass(frozen=True)
class Trained:
    """The best weights by validation log loss, and the metrics of all epochs."""

    weights: dict[str, npt.NDArray[Any]]
    best_epoch: int
    history: list[dict[str, float]]


def train_on_ray(
    settings: Settings, rows: Path, *, storage: Path, name: str, listener: Listener
) -> Trained:
    """Train with ``settings.training.workers`` Ray Train workers on the rows in ``rows``.

    ``rows`` holds the folders train and validation that ``dataset.write_rows`` made. Checkpoints go
    to ``storage/name`` and are removed at the end; the same call goes on from those of one that was
    cut off. ``listener`` gets the metrics of each epoch, from another thread.

    Raises:
        TrainingError: The training failed, after new attempts for workers that died.
    """
    # The controller asks its workers for news this often, at the end of a training too.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    training = settings.training
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = gpus >= training.workers if training.use_gpu == "auto" else training.use_gpu
    progress = storage / name / _PROGRESS_FILE
    progress.parent.mkdir(parents=True, exist_ok=True)
    # The annotations are those of Train V1, whose loops return nothing.
    loop: Any = _work
    trainer: Any = TorchTrainer(
        loop,
        train_loop_config={
            "settings": settings,
            "rows": str(rows),
            "progress": str(progress),
        },
        scaling_config=ScalingConfig(num_workers=training.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        with _followed(progress, listener):
            trained = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _failure(error) from error
    assert isinstance(trained, Trained)
    shutil.rmtree(storage / name, ignore_errors=True)
    return trained


def _work(config: dict[str, Any]) -> Trained | None:
    """Run in each worker: train, report each epoch, and return the result from rank 0."""
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from mlops_ray.training.dataset import open_rows
    from mlops_ray.training.loop import train

    settings: Settings = config["settings"]
    torch.set_num_threads(1)
    context = ray.train.get_context()
    collective = _Workers(context.get_world_rank(), context.get_world_size())
    rows = Path(config["rows"])
    state = _resume_state()
    epochs = train(
        settings,
        open_rows(rows / "train"),
        open_rows(rows / "validation"),
        collective=collective,
        device=str(get_device()),
        resume=state,
    )
    for epoch, new_state in epochs:
        if collective.rank != 0:
            ray.train.report({})
            continue
        state = new_state
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / _STATE_FILE)
            ray.train.report(epoch.metrics(), checkpoint=Checkpoint.from_directory(folder))
        with Path(config["progress"]).open("a") as file:
            file.write(json.dumps(epoch.metrics() | {"rows": epoch.rows}) + "\n")
    return trained_from(state) if collective.rank == 0 and state else None


def trained_from(state: dict[str, Any]) -> Trained:
    """Return the best weights and the history that a loop's state holds."""
    weights = {name: np.array(tensor.numpy()) for name, tensor in state["best"].items()}
    return Trained(weights, state["best_epoch"], state["history"])


@dataclass
class _Workers:
    """The process group that Ray Train set up: gloo on CPUs, NCCL on GPUs."""

    rank: int
    size: int

    def sum_(self, values: Any) -> None:
        import torch.distributed

        torch.distributed.all_reduce(values)


def _resume_state() -> dict[str, Any] | None:
    import ray.train
    import torch

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder) / _STATE_FILE, weights_only=True)
    return state


@contextmanager
def _followed(progress: Path, listener: Listener) -> Iterator[None]:
    """Call ``listener`` for each line that rank 0 appends to ``progress``, while the block runs."""
    over = threading.Event()

    def follow() -> None:
        seen = 0
        while True:
            last = over.wait(_POLL_S)
            lines = progress.read_text().splitlines() if progress.exists() else []
            for line in lines[seen:]:
                listener(json.loads(line))
            seen = len(lines)
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _failure(error: Any) -> TrainingError:
    for cause in getattr(error, "worker_failures", {}).values():
        own = getattr(cause, "cause", cause)
        if isinstance(own, TrainingError):
            return own
    return TrainingError(
        "the training failed",
        why=str(error).strip().splitlines()[-1],
        fix="look at the workers' logs with `ray logs`; free memory or CPUs if workers died",
    )

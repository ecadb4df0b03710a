"""A search over training and model settings by Ray Tune: random proposals, stopped early by ASHA.

Each trial runs the training loop alone in its own process, so a trial needs one CPU and nothing
that another trial could hold. All trials map the same encoded rows.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlops_ray.config.training import SearchDimension, Training, Tuning
from mlops_ray.errors import TrainingError
from mlops_ray.training.loop import Settings
from mlops_ray.training.trainer import Trained, trained_from

SEARCHABLE = ("epochs", "batch_size", "learning_rate", "weight_decay", "half_life", "clip")
"""Fields of training that a search may vary: the others decide which rows there are, or where."""

_STATE_FILE = "state.pt"
_METRICS = {"auc": ("validation_auc", "max"), "log_loss": ("validation_log_loss", "min")}


def search(
    settings: Settings, rows: Path, tuning: Tuning, *, storage: Path, name: str
) -> tuple[Settings, Trained, list[dict[str, Any]]]:
    """Run the trials; return the best one's settings and weights, and what every trial gave.

    The same call with the same ``name`` goes on with a search that was cut off. Its files in
    ``storage/name`` are removed at the end.

    Raises:
        TrainingError: The space is wrong, or no trial finished an epoch.
    """
    from ray import tune

    _check(settings, tuning)
    metric, mode = _METRICS[tuning.metric]
    trainable = tune.with_parameters(_trial, settings=settings, rows=str(rows))
    path = str(storage / name)
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True)
    else:
        tuner = _tuner(trainable, settings, tuning, storage, name)
    grid = tuner.fit()
    results = [grid[place] for place in range(len(grid))]
    trials = [_summary(result) for result in results if result.metrics]
    finished = [r for r in results if r.checkpoint is not None and r.metrics]
    if not finished:
        raise TrainingError(
            f"none of {len(results)} trials finished an epoch",
            why=str(grid.errors[0]).strip().splitlines()[-1] if grid.errors else "",
            fix="try one of them with the train workflow",
        )
    sign = 1 if mode == "max" else -1
    best = max(finished, key=lambda result: sign * (result.metrics or {})["best_" + metric])
    chosen = apply(settings, best.config or {})
    trained = trained_from(_load(best.checkpoint))
    shutil.rmtree(storage / name, ignore_errors=True)
    return chosen, trained, trials


def apply(settings: Settings, proposal: dict[str, Any]) -> Settings:
    """Return the settings with a proposal's ``training.X`` and ``model.X`` in their places.

    Raises:
        TrainingError: A value does not fit its field.
    """
    training = {k.removeprefix("training."): v for k, v in proposal.items() if "training." in k}
    model = {k.removeprefix("model."): v for k, v in proposal.items() if k.startswith("model.")}
    try:
        merged = Training.model_validate(settings.training.model_dump() | training)
    except ValidationError as error:
        raise TrainingError(
            "a value of the search space does not fit", where="tuning.space", why=str(error)
        ) from error
    return replace(settings, training=merged, model=settings.model.with_arguments(**model))


def _trial(config: dict[str, Any], *, settings: Settings, rows: str) -> None:
    import torch
    from ray import tune

    from mlops_ray.training.dataset import open_rows
    from mlops_ray.training.loop import train

    torch.set_num_threads(1)
    checkpoint = tune.get_checkpoint()
    train_rows, validation_rows = (open_rows(Path(rows) / p) for p in ("train", "validation"))
    epochs = train(
        apply(settings, config),
        train_rows,
        validation_rows,
        device="cuda" if settings.training.use_gpu is True else "cpu",
        resume=None if checkpoint is None else _load(checkpoint),
    )
    for epoch, state in epochs:
        best = state["history"][state["best_epoch"] - 1]
        metrics = epoch.metrics() | {f"best_{name}": value for name, value in best.items()}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / _STATE_FILE)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def _tuner(trainable: Any, settings: Settings, tuning: Tuning, storage: Path, name: str) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    metric, mode = _METRICS[tuning.metric]
    epochs = _most_epochs(settings, tuning)
    gpus = 1 if settings.training.use_gpu is True else 0
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": gpus}),
        param_space={key: _dimension(d) for key, d in tuning.space.items()},
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            num_samples=tuning.trials,
            max_concurrent_trials=tuning.concurrent,
            search_alg=BasicVariantGenerator(random_state=settings.seed),
            scheduler=ASHAScheduler(
                max_t=epochs,
                grace_period=min(tuning.grace_epochs, epochs),
                reduction_factor=tuning.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )


def _dimension(dimension: SearchDimension) -> Any:
    from ray import tune

    if dimension.kind == "choice":
        return tune.choice(list(dimension.values))
    low, high = dimension.low, dimension.high
    if dimension.kind == "randint":
        return tune.randint(int(low or 0), int(high or 0))
    return getattr(tune, dimension.kind)(low, high)


def _check(settings: Settings, tuning: Tuning) -> None:
    for key, dimension in tuning.space.items():
        where = f"tuning.space.{key}"
        room, _, field = key.partition(".")
        if room == "training" and field not in SEARCHABLE:
            raise TrainingError(
                f"{key} cannot be searched over",
                where=where,
                fix=f"one of: {', '.join(SEARCHABLE)}",
            )
        if dimension.kind == "choice":
            if not dimension.values:
                raise TrainingError("a choice needs values", where=where)
        elif dimension.low is None or dimension.high is None or dimension.low >= dimension.high:
            raise TrainingError(f"{dimension.kind} needs low < high", where=where)
        elif dimension.kind == "loguniform" and dimension.low <= 0:
            raise TrainingError("loguniform needs low > 0", where=where)


def _most_epochs(settings: Settings, tuning: Tuning) -> int:
    dimension = tuning.space.get("training.epochs")
    if dimension is None:
        return settings.training.epochs
    candidates = [int(value) for value in dimension.values] or [int(dimension.high or 1)]
    return max(candidates)


def _load(checkpoint: Any) -> dict[str, Any]:
    import torch

    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder) / _STATE_FILE, weights_only=True)
    return state


def _summary(result: Any) -> dict[str, Any]:
    metrics = {k: v for k, v in result.metrics.items() if "validation_" in k or k == "epoch"}
    return {"config": result.config, **metrics}

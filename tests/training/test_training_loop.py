from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training.training_samples import CATEGORICAL, NUMERIC, features, model, rows, training

from mlops_ray.errors import TrainingError
from mlops_ray.training.dataset import Rows, open_rows
from mlops_ray.training.evaluation import auc, log_loss
from mlops_ray.training.fitting import Prepared, prepare
from mlops_ray.training.loop import Settings, State, build, predict, train
from mlops_ray.training.optimizer import AdamW, one_cycle
from mlops_ray.training.splitting import split_rows


@pytest.fixture(scope="module", autouse=True)
def torch_as_before():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    return make(tmp_path_factory.mktemp("rows"))


def make(folder: Path, **changes) -> Prepared:
    settings = training(**changes)
    data = split_rows(rows(), settings.split, features().labels, None)
    names = (NUMERIC, CATEGORICAL)
    return prepare(
        data, features(), names, settings, model(), seed=5, drift_bins=10, folder=folder / "rows"
    )


def run(prepared: Prepared, settings: Settings | None = None, **options) -> list[State]:
    parts = [open_rows(prepared.folder / name) for name in ("train", "validation")]
    return [state for _, state in train(settings or prepared.settings, *parts, **options)]


def same(one: State, other: State) -> bool:
    return all(torch.equal(one["module"][k], other["module"][k]) for k in one["module"])


def test_learns_what_there_is_to_learn(prepared):
    history = run(prepared)[-1]["history"]
    assert history[-1]["validation_auc"] > 0.80
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_same_inputs_give_the_same_weights_bit_for_bit(prepared):
    first, again = run(prepared)[-1], run(prepared)[-1]
    assert same(first, again)
    other = run(prepared, replace(prepared.settings, seed=6))[-1]
    assert not same(first, other)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(prepared, done, tmp_path):
    whole = run(prepared)
    torch.save(whole[done - 1], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = run(prepared, resume=saved)
    assert len(rest) == 3 - done
    if rest:
        assert same(rest[-1], whole[-1])
        assert rest[-1]["history"] == whole[-1]["history"]
        assert rest[-1]["best_epoch"] == whole[-1]["best_epoch"]


def test_the_best_epoch_is_the_one_with_the_least_validation_loss(prepared):
    settings = replace(prepared.settings, training=training(epochs=6, learning_rate=0.5))
    states = run(prepared, settings)
    losses = [epoch["validation_log_loss"] for epoch in states[-1]["history"]]
    best = int(np.argmin(losses))
    assert states[-1]["best_epoch"] == best + 1
    assert all(
        torch.equal(states[-1]["best"][k], states[best]["module"][k]) for k in states[0]["best"]
    )


def test_validation_metrics_are_those_of_the_scores(prepared):
    state = run(prepared)[-1]
    module = build(prepared.settings.model)
    module.load_state_dict(state["module"])
    validation = open_rows(prepared.folder / "validation")
    scores = predict(module, validation, prepared.settings)
    last = state["history"][-1]
    assert last["validation_auc"] == auc(validation.labels, scores)
    assert last["validation_log_loss"] == log_loss(validation.labels, scores)


class Pretend:
    """A collective whose other ranks are this one again: gradients come back ``size`` fold."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sums = 0

    def sum_(self, values: torch.Tensor) -> None:
        self.sums += 1


def test_every_rank_steps_equally_often_and_sees_each_row_once(prepared):
    part = open_rows(prepared.folder / "train")
    seen: list[np.ndarray] = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, np.ndarray):
                seen.append(key)
            return np.asarray(super().__getitem__(key))

    watched = Rows(part.numeric, part.categorical, part.labels.view(Watched), part.ages_s)
    settings = replace(prepared.settings, training=training(epochs=1, batch_size=333))
    steps = []
    for rank in range(3):
        collective = Pretend(rank, 3)
        list(train(settings, watched, watched, collective=collective))
        steps.append(collective.sums)
    assert len(set(steps)) == 1
    assert sorted(np.concatenate(seen).tolist()) == list(range(len(part)))


def test_recency_weights_halve_with_each_half_life():
    ages = np.array([0.0, 3600.0, 7200.0], dtype=np.float32)
    empty = np.empty((3, 0))
    part = Rows(empty, empty, ages, ages)
    assert part.weights(3600.0).tolist() == [1.0, 0.5, 0.25]
    assert part.weights(None).tolist() == [1.0, 1.0, 1.0]


def test_recency_changes_the_weights(prepared):
    recent = replace(prepared.settings, training=training(half_life="6h"))
    assert not same(run(prepared)[-1], run(prepared, recent)[-1])


def test_batches_too_small_for_the_workers_are_refused(prepared):
    settings = replace(prepared.settings, training=training(batch_size=2))
    with pytest.raises(TrainingError, match="cannot be shared by 4 workers"):
        run(prepared, settings, collective=Pretend(0, 4))


def test_divergence_is_said(prepared):
    class Broken(Pretend):
        def sum_(self, values: torch.Tensor) -> None:
            values.fill_(math.nan)

    with pytest.raises(TrainingError, match="diverged in epoch 1"):
        run(prepared, collective=Broken(0, 2))


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("mlops_ray.training.models.TabularNet", {"hidden": [3]}, "refuses its arguments"),
        ("mlops_ray.training.encoder.Encoder", {}, "not a torch module class"),
    ],
)
def test_a_wrong_model_is_said_before_training(tmp_path, target, arguments, message):
    data = split_rows(rows(), training().split, features().labels, None)
    with pytest.raises(TrainingError, match=message):
        prepare(
            data,
            features(),
            (NUMERIC, CATEGORICAL),
            training(),
            model(target, **arguments),
            seed=0,
            drift_bins=10,
            folder=tmp_path,
        )


def test_adamw_is_torchs():
    torch.manual_seed(0)
    mine, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(mine.state_dict())
    own = AdamW(list(mine.parameters()), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, weight_decay=0.1)
    for step in range(20):
        x = torch.randn(7, 5)
        mine(x).square().sum().backward()
        theirs(x).square().sum().backward()
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        own.step(0.01 * (step + 1))
        reference.step()
        reference.zero_grad()
    assert torch.allclose(mine.weight, theirs.weight, atol=1e-7)


def test_the_learning_rate_is_torchs_one_cycle():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=1001, pct_start=0.1, cycle_momentum=False
    )
    for step in range(1000):
        assert one_cycle(step / 1000) == pytest.approx(schedule.get_last_lr()[0], abs=0.02)
        optimizer.step()
        schedule.step()

from __future__ import annotations

import pytest
from training.training_samples import model, training

from mlops_ray.config.training import Tuning
from mlops_ray.errors import TrainingError
from mlops_ray.training.loop import Settings
from mlops_ray.training.tuning import apply, search

SETTINGS = Settings(model=model(), training=training(), seed=0, numeric_features=3)


def test_a_proposal_changes_only_what_it_names():
    changed = apply(SETTINGS, {"training.learning_rate": 0.1, "model.dropout": 0.3})
    assert changed.training == training(learning_rate=0.1)
    assert changed.model.arguments == {"hidden_sizes": [16], "dropout": 0.3}
    assert SETTINGS.model.arguments == {"hidden_sizes": [16]}


def test_durations_may_be_proposed_as_words():
    changed = apply(SETTINGS, {"training.half_life": "28d"}).training
    assert changed.half_life is not None
    assert changed.half_life.days == 28


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(TrainingError, match="does not fit"):
        apply(SETTINGS, {"training.epochs": "many"})


@pytest.mark.parametrize(
    ("key", "dimension", "message"),
    [
        ("training.workers", {"kind": "choice", "values": [1, 2]}, "cannot be searched"),
        ("training.epoch", {"kind": "choice", "values": [1, 2]}, "cannot be searched"),
        ("model.dropout", {"kind": "uniform", "low": 1, "high": 0}, "low < high"),
        ("model.dropout", {"kind": "uniform", "low": 1}, "low < high"),
        ("model.dropout", {"kind": "loguniform", "low": 0, "high": 1}, "low > 0"),
        ("model.dropout", {"kind": "choice"}, "needs values"),
    ],
)
def test_a_wrong_space_is_refused_before_any_trial(tmp_path, key, dimension, message):
    tuning = Tuning.model_validate({"space": {key: dimension}})
    with pytest.raises(TrainingError, match=message):
        search(SETTINGS, tmp_path, tuning, storage=tmp_path, name="none")

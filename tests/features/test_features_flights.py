"""The flights project: no feature of a prediction knows anything from after it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mlops_ray.config.compose import compose
from mlops_ray.config.features import Features
from mlops_ray.config.locate import open_workspace
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources import clean_table, open_source
from mlops_ray.features.training_set import build_training_set

ROOT = Path(__file__).parents[2]
MIDDLE = datetime(2013, 1, 12, 15, 30, tzinfo=UTC)
END = datetime(2013, 1, 24, tzinfo=UTC)
AFTERWARDS = ("known_at", "dep_delay", "arr_delay", "cancelled", "diverted", "late", "arr_log")


@pytest.fixture(scope="module")
def features() -> Features:
    composed = compose(
        open_workspace(ROOT), ["project=flights", "features.sources.flights.args.airports=[LGA]"]
    )
    return Features.model_validate(composed.values["features"])


@pytest.fixture(scope="module")
def tables(features: Features) -> dict[str, pa.Table]:
    cleaned = {
        name: clean_table(source, open_source(source, Path("no events")).read_all()).read_all()
        for name, source in features.sources.items()
    }
    flights = cleaned["flights"]
    early = pc.less(flights["sched_dep"], pa.scalar(END))
    return cleaned | {"flights": flights.filter(early)}


def training_set(
    root: Path, features: Features, tables: dict[str, pa.Table], known: dict[str, pa.Table]
) -> pa.Table:
    offline = OfflineStore(root / "offline", features)
    pipeline = FeaturePipeline(
        features, known, offline, open_online(features, root / "online", "flights")
    )
    pipeline.advance(END)
    return build_training_set(
        features, "delays", tables["flights"], offline, pipeline.versions, None
    )[0]


def test_what_happens_later_changes_no_feature(
    tmp_path: Path, features: Features, tables: dict[str, pa.Table]
) -> None:
    poisoned = {}
    for name, table in tables.items():
        available = table[features.sources[name].available_at]
        later = pc.fill_null(pc.greater(available, pa.scalar(MIDDLE)), True)
        for at, field in enumerate(table.schema):
            if pa.types.is_floating(field.type):
                wrong = pc.if_else(later, pa.scalar(12345.0, field.type), table[field.name])
                table = table.set_column(at, field, wrong.cast(field.type))
        poisoned[name] = table
    true = training_set(tmp_path / "true", features, tables, tables)
    false = training_set(tmp_path / "false", features, tables, poisoned)
    names = [name for name in true.column_names if "__" in name]
    early = pc.less_equal(true["sched_dep"], pa.scalar(MIDDLE))
    assert pc.sum(early).as_py() > 2000
    assert true.filter(early).select(names).equals(false.filter(early).select(names))
    changed = [
        name
        for name in names
        if not true.filter(pc.invert(early))[name].equals(false.filter(pc.invert(early))[name])
    ]
    assert changed == names


def test_what_is_known_only_afterwards_is_no_input(features: Features) -> None:
    assert not set(AFTERWARDS) & set(features.services["delays"].inputs)


def test_a_request_feature_needs_nothing_but_the_request(
    tmp_path: Path, features: Features, tables: dict[str, pa.Table]
) -> None:
    """The service's inputs exist for every flight before it leaves, those cancelled among them."""
    flights = tables["flights"]
    labelled = training_set(tmp_path, features, tables, tables)
    cancelled = int(pc.sum(flights["cancelled"]).as_py())
    assert cancelled > 0
    assert labelled.num_rows + cancelled <= flights.num_rows
    for name, field in features.services["delays"].inputs.items():
        if not field.nullable:
            assert flights[name].null_count == 0
    shares = [n for n in labelled.column_names if "__late_share" in n]
    values = np.concatenate([labelled[name].drop_null().to_numpy() for name in shares])
    assert ((values >= 0) & (values <= 1)).all()

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.lookup import OnlineLookup
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.service import feature_columns, inputs_of
from mlops_ray.features.training_set import build_training_set

pytestmark = pytest.mark.usefixtures("shop_project")


def test_a_request_gets_what_the_training_set_has(tmp_path: Path, shop: SimpleNamespace) -> None:
    """Requests are answered hour by hour while the pipeline goes on: training sees the same."""
    offline = OfflineStore(tmp_path / "offline", shop.features)
    online = open_online(shop.features, tmp_path / "online", "shop")
    pipeline = FeaturePipeline(shop.features, shop.tables, offline, online)
    lookup = OnlineLookup(shop.features, "buys", online)
    visits = shop.tables["visits"].sort_by("at")
    at = visits["at"].to_pylist()
    answers: dict[str, dict[str, object]] = {}
    for number, moment in enumerate(at):
        pipeline.advance(moment, commit=False)
        row = visits.slice(number, 1)
        columns = lookup(inputs_of(row, shop.features.services["buys"]))
        answers[row["visit"][0].as_py()] = {name: v[0] for name, v in columns.items()}
    pipeline.commit()
    table, _ = build_training_set(shop.features, "buys", visits, offline, pipeline.versions, None)
    numeric, categorical = feature_columns(shop.features, "buys")
    present = 0
    for row in table.to_pylist():
        answer = answers[row["visit"]]
        assert list(answer) == [*numeric, *categorical]
        ours = np.array([answer[name] for name in numeric])
        theirs = np.array([np.nan if row[n] is None else row[n] for n in numeric])
        np.testing.assert_array_equal(ours, theirs)
        assert [answer[name] for name in categorical] == [row[name] for name in categorical]
        present += int(np.isfinite(ours).sum())
    assert present > 10 * table.num_rows


def test_types_of_the_columns(tmp_path: Path, shop: SimpleNamespace) -> None:
    store = open_online(shop.features, tmp_path / "online", "shop")
    inputs = {
        "shop": np.array(["north", None], object),
        "shelf": np.array([1, 2]),
        "at": np.array(["2024-03-01T05:00", "2024-03-01T06:00"], "datetime64[us]"),
        "weight": np.array([0.5, np.nan]),
    }
    columns = OnlineLookup(shop.features, "buys", store)(inputs)
    numeric, categorical = feature_columns(shop.features, "buys")
    assert list(columns) == [*numeric, *categorical]
    assert all(columns[n].dtype == np.float64 and columns[n].shape == (2,) for n in numeric)
    assert columns["hour"].tolist() == [5.0, 6.0]
    assert columns["shop_name"].tolist() == ["shop-north", "shop-None"]
    assert np.isnan(columns["shop_visits__visits_3h"]).all()


def test_inputs_have_the_types_that_requests_have(shop: SimpleNamespace) -> None:
    table = pa.table(
        {
            "shop": ["a", None],
            "shelf": pa.array([1, 2], pa.int32()),
            "at": pa.array([0, None], pa.timestamp("s")),
            "weight": pa.array([1, None], pa.int64()),
        }
    )
    inputs = inputs_of(table, shop.features.services["buys"])
    assert [v.dtype for v in inputs.values()] == [object, np.int64, "datetime64[us]", np.float64]
    assert inputs["shop"].tolist() == ["a", None]
    assert np.isnat(inputs["at"]).tolist() == [False, True]
    assert np.isnan(inputs["weight"]).tolist() == [False, True]


def test_a_key_of_another_type_than_the_input_is_refused(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    entities = {"shelf": {"keys": {"shop": "string", "shelf": "string"}}}
    features = shop.declare(entities={"shop": {"keys": {"shop": "string"}}, **entities})
    with pytest.raises(
        FeatureStoreError, match="input 'shelf' is int, view 'price' has it as string"
    ):
        OnlineLookup(features, "buys", open_online(features, tmp_path / "online", "shop"))

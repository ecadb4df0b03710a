"""The flights project: its data, its cleaning, its request features, its configuration."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mlops_ray.config.locate import open_workspace
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.load import load_project

pytest.importorskip("flights.data", reason="the example project is not on the path")

from flights.cleaning import clean_flights, clean_weather, soft_log
from flights.data import read_flights, read_weather
from flights.request import CATEGORICAL, NUMERIC, request_features

ROOT = Path(__file__).parents[2]
LATER = {"dep_delay", "arr_delay", "cancelled", "diverted", "known_at", "late", "arr_log"}


@pytest.fixture(scope="module")
def flights() -> pa.Table:
    return clean_flights(read_flights())


def test_all_flights_are_there_once_and_outcomes_come_after_departure(flights: pa.Table) -> None:
    assert flights.num_rows == 336_776
    assert len(pc.unique(flights["flight_id"])) == flights.num_rows
    after = pc.greater(flights["known_at"], flights["sched_dep"])
    assert pc.all(after).as_py()


def test_flights_that_did_not_arrive_have_no_label(flights: pa.Table) -> None:
    arrived = pc.invert(pc.or_(flights["cancelled"], flights["diverted"]))
    assert pc.is_valid(flights["late"]).equals(arrived)
    assert pc.is_valid(flights["known_at"]).equals(arrived)
    assert pc.sum(pc.invert(arrived)).as_py() == 9_430


def test_the_label_is_more_than_fifteen_minutes_late(flights: pa.Table) -> None:
    delay = flights["arr_delay"].to_numpy()
    known = ~np.isnan(delay)
    expected = (delay > 15).astype(float)[known]
    assert np.array_equal(flights["late"].drop_null().to_numpy(), expected)


def test_soft_log_is_odd_monotone_and_keeps_nulls() -> None:
    values = pa.chunked_array([[-30.0, 0.0, 5.0, 1400.0, None]])
    out = soft_log(values).to_pylist()
    assert out[1] == 0
    assert out[4] is None
    assert out[0] == pytest.approx(-np.log(4))
    assert out[0] < out[1] < out[2] < out[3]


def test_impossible_winds_become_null() -> None:
    weather = clean_weather(read_weather())
    for name in ("wind_speed", "wind_gust"):
        assert pc.max(weather[name]).as_py() < 200
    assert weather["wind_speed"].null_count > read_weather()["wind_speed"].null_count


def inputs(*departures: datetime) -> dict[str, np.ndarray]:
    times = np.array([d.replace(tzinfo=None) for d in departures], dtype="datetime64[us]")
    n = len(departures)
    return {
        "carrier": np.array(["UA"] * n, dtype=object),
        "origin": np.array(["EWR"] * n, dtype=object),
        "dest": np.array(["IAH"] * n, dtype=object),
        "distance": np.full(n, 1400.0),
        "sched_dep": times,
        "sched_arr": times + np.timedelta64(4, "h"),
    }


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2013, 1, 1, 10, 15, tzinfo=UTC),
        datetime(2013, 3, 10, 6, 59, tzinfo=UTC),
        datetime(2013, 3, 10, 7, 0, tzinfo=UTC),
        datetime(2013, 11, 3, 5, 30, tzinfo=UTC),
        datetime(2013, 11, 3, 6, 30, tzinfo=UTC),
        datetime(2026, 7, 4, 3, 59, tzinfo=UTC),
    ],
)
def test_the_clock_is_new_yorks_also_when_it_changes(moment: datetime) -> None:
    out = request_features(inputs(moment))
    local = moment.astimezone(ZoneInfo("America/New_York"))
    assert out["minute_of_day"][0] == local.hour * 60 + local.minute
    assert out["hour"][0] == str(local.hour)
    assert out["weekday"][0] == local.strftime("%a").lower()
    assert out["block_min"][0] == 240
    assert out["pad_min"][0] == 240 - 1400 / 8


def test_many_rows_give_what_single_rows_give_and_none_give_none() -> None:
    moments = [datetime(2013, m, 15, 3 * m % 24, 7, tzinfo=UTC) for m in range(1, 13)]
    together = request_features(inputs(*moments))
    for index, moment in enumerate(moments):
        alone = request_features(inputs(moment))
        assert {k: v[0] for k, v in alone.items()} == {k: v[index] for k, v in together.items()}
    assert set(together) == {*NUMERIC, *CATEGORICAL}
    assert all(len(values) == 0 for values in request_features(inputs()).values())


@pytest.mark.parametrize(
    "workflow",
    ["batch_predict", "deploy", "features", "loop", "monitor", "retrain", "train", "tune"],
)
@pytest.mark.parametrize("name", ["flights", "flights_quick"])
def test_every_workflow_of_the_project_checks(name: str, workflow: str) -> None:
    project = load_project(open_workspace(ROOT), [f"project={name}", f"workflow={workflow}"])
    assert build(project.workflow).order
    service = project.features.services[project.training.service]
    (on_demand,) = service.on_demand
    itinerary = project.features.on_demand[on_demand]
    assert itinerary.numeric == NUMERIC
    assert itinerary.categorical == CATEGORICAL
    assert not LATER & set(service.inputs)

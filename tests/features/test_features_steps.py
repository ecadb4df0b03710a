"""The steps from raw files to a training set, as a workflow calls them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mlops_ray.errors import ExpectationError, FeatureStoreError
from mlops_ray.features import steps
from mlops_ray.features.manifest import read_manifest
from mlops_ray.features.reproduction import training_set_of
from mlops_ray.features.sources.events import event_schema
from mlops_ray.features.tables import read_tables, write_tables
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.context import Context, Silent

pytestmark = pytest.mark.usefixtures("shop_project")


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.metrics: dict[str, float] = {}
        self.links: list[tuple[str, str, str]] = []

    def reads(self, kind: str, name: str) -> None:
        self.links.append(("reads", kind, name))

    def writes(self, kind: str, name: str) -> None:
        self.links.append(("writes", kind, name))

    def event(self, kind: str, **data: Any) -> None:
        self.events.append((kind, data))

    def metric(self, name: str, value: float) -> None:
        self.metrics[name] = value


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def context(home: Home, recorder: Recorder) -> Context:
    return Context(project="shop", home=home, reporter=recorder)


@pytest.fixture
def files(tmp_path: Path, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, table in shop.tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("files")
def test_from_files_to_a_training_set(
    context: Context, recorder: Recorder, shop: SimpleNamespace
) -> None:
    raw = steps.extract(context, shop.features)
    assert {n: t.num_rows for n, t in read_tables(raw).items()} == {
        name: table.num_rows for name, table in shop.tables.items()
    }
    cleaned = steps.clean(replace(context, step="clean"), shop.features, raw)
    visits = read_tables(cleaned)["visits"]
    versions = steps.materialize(context, shop.features, cleaned, shop.hour(60))
    assert isinstance(versions, FeatureVersions)
    assert versions.until == shop.hour(60)
    assert versions.rows_written == recorder.metrics["rows_written"] > 100
    assert set(versions.versions) == set(shop.features.views)
    result = steps.training_set(context, shop.features, "buys", cleaned, versions, shop.hour(60))
    assert result.num_rows > 100
    assert recorder.metrics["rows_without_label"] == visits["bought"].null_count
    again = steps.materialize(context, shop.features, cleaned, shop.hour(60))
    assert again.versions == versions.versions
    assert again.rows_written == 0
    everything = steps.materialize(context, shop.features, cleaned, None)
    assert everything.rows_written > 0
    idle = steps.materialize(context, shop.features, cleaned, shop.hour(70), advance=False)
    assert idle.versions == everything.versions
    same = steps.training_set(context, shop.features, "buys", cleaned, versions, shop.hour(60))
    assert same.equals(result)


@pytest.mark.usefixtures("files")
def test_a_training_set_is_pinned_and_survives_upkeep(
    context: Context, recorder: Recorder, shop: SimpleNamespace
) -> None:
    raw = steps.extract(context, shop.features)
    cleaned = steps.clean(replace(context, step="clean"), shop.features, raw)
    versions = steps.materialize(context, shop.features, cleaned, shop.hour(40))
    assert versions.tables == {
        name: steps.open_offline(context, shop.features).table_id(name)
        for name in shop.features.views
    }
    made = steps.training_set(context, shop.features, "buys", cleaned, versions, shop.hour(40))
    applied = [data["view"] for kind, data in recorder.events if kind == "feature_view_applied"]
    assert sorted(applied) == sorted(shop.features.views)
    (event,) = [data for kind, data in recorder.events if kind == "training_manifest"]
    store = steps.open_offline(context, shop.features)
    manifest = read_manifest(store.root, event["id"])
    assert manifest.rows == made.num_rows
    for hours in (50, 60, 70):
        steps.materialize(context, shop.features, cleaned, shop.hour(hours))
    compacted = steps.compact(context, shop.features)
    assert compacted == {name: store.version(name) for name in shop.features.views}
    removed = steps.vacuum(context, shop.features, retention=timedelta(0))
    assert set(removed) == set(shop.features.views)
    assert recorder.metrics["files_removed"] == sum(removed.values()) > 0
    labels = read_tables(cleaned)["visits"]
    assert training_set_of(manifest, shop.features, labels, store).equals(made)


@pytest.mark.usefixtures("files")
def test_steps_tell_what_they_read_and_made(
    context: Context, recorder: Recorder, shop: SimpleNamespace
) -> None:
    def told(direction: str, kind: str) -> dict[str, int]:
        found = [name for way, what, name in recorder.links if (way, what) == (direction, kind)]
        recorder.links = [link for link in recorder.links if link[:2] != (direction, kind)]
        return {name: int(version) for name, _, version in (n.partition("@") for n in found)}

    raw = steps.extract(context, shop.features)
    assert [n for _, _, n in recorder.links] == list(shop.features.sources)
    recorder.links.clear()
    cleaned = steps.clean(replace(context, step="clean"), shop.features, raw)
    first = steps.materialize(context, shop.features, cleaned, shop.hour(40))
    assert told("writes", "view") == first.versions
    assert told("reads", "view") == {}
    second = steps.materialize(context, shop.features, cleaned, shop.hour(60))
    assert told("reads", "view") == first.versions
    assert told("writes", "view") == second.versions
    steps.training_set(context, shop.features, "buys", cleaned, first, shop.hour(40))
    views = shop.features.services["buys"].views
    assert told("reads", "view") == {view: first.versions[view] for view in views}
    steps.materialize(context, shop.features, cleaned, shop.hour(60), advance=False)
    assert told("reads", "view") == second.versions
    compacted = steps.compact(context, shop.features)
    assert told("reads", "view") == second.versions
    changed = {view for view in compacted if compacted[view] != second.versions[view]}
    assert told("writes", "view") == {view: compacted[view] for view in changed}
    assert changed


@pytest.mark.usefixtures("files")
def test_upkeep_of_an_empty_store(context: Context, shop: SimpleNamespace) -> None:
    assert steps.compact(context, shop.features) == {}
    assert steps.vacuum(context, shop.features) == {}


def test_expectations_are_recorded_even_when_they_fail(
    context: Context, recorder: Recorder, shop: SimpleNamespace, tmp_path: Path
) -> None:
    expectations = [
        {"column": "spent", "nulls": 0.0},
        {"column": "shelf", "minimum": 1, "maximum": 3},
    ]
    visits = {"path": "x", "available_at": "seen_at", "expectations": expectations}
    prices = {"path": "y", "available_at": "known_at"}
    features = shop.declare(sources={"visits": visits, "prices": prices})
    raw = write_tables(tmp_path / "raw", {"visits": shop.tables["visits"]})
    with pytest.raises(ExpectationError, match="spent"):
        steps.clean(context, features, raw)
    assert [(kind, e["column"], e["passed"]) for kind, e in recorder.events] == [
        ("expectation", "spent", False),
        ("expectation", "shelf", True),
        ("expectation", "shelf", True),
    ]


def test_a_source_that_is_not_there(context: Context, shop: SimpleNamespace) -> None:
    raw = write_tables(context.scratch(), {"visit": shop.tables["visits"]})
    with pytest.raises(FeatureStoreError, match="no source 'visit'"):
        steps.clean(replace(context, step="clean"), shop.features, raw)


def test_sources_without_any_row(context: Context, shop: SimpleNamespace) -> None:
    empty = {name: table.slice(0, 0) for name, table in shop.tables.items()}
    folder = write_tables(context.scratch(), empty)
    with pytest.raises(FeatureStoreError, match="no source has a row"):
        steps.materialize(context, shop.features, folder, None)


def test_late_rows_are_reported(
    context: Context, recorder: Recorder, shop: SimpleNamespace
) -> None:
    prices = shop.tables["prices"].sort_by("known_at")
    for number, table in enumerate((pa.concat_tables([prices[:150], prices[152:]]), prices)):
        folder = write_tables(context.scratch() / str(number), shop.tables | {"prices": table})
        steps.materialize(context, shop.features, folder, None)
        assert recorder.metrics["late_source_rows"] == 2 * number
    late = [data for kind, data in recorder.events if kind == "late_source_rows"]
    assert late == [{"view": "price", "rows": 2}]


def test_the_versions_tell_up_to_where_every_view_is_complete(
    context: Context, shop: SimpleNamespace
) -> None:
    prices = shop.tables["prices"]
    early = prices.filter(pc.less(prices["known_at"], pa.scalar(shop.hour(20))))
    folder = write_tables(context.scratch(), shop.tables | {"prices": early})
    versions = steps.materialize(context, shop.features, folder, None)
    moments = early.select(["valid_from", "known_at"])
    assert versions.until == max(max(row.values()) for row in moments.to_pylist())


def test_events_that_have_not_come_yet_are_no_error(
    context: Context, shop: SimpleNamespace
) -> None:
    columns = dict.fromkeys(("visit", "shop"), "string") | {"shelf": "int", "spent": "float"}
    columns |= dict.fromkeys(("entered_at", "seen_at", "at", "label_known_at"), "timestamp")
    prices = {"shop": "string", "shelf": "int", "valid_from": "timestamp"}
    sources = {"visits": {"push": columns}}
    sources["prices"] = {"push": prices | {"price": "float", "stock": "float"}}
    features = shop.declare(sources=sources)
    empty = {n: event_schema(s.push).empty_table() for n, s in features.sources.items()}
    folder = write_tables(context.scratch(), empty)
    versions = steps.materialize(context, features, folder, None)
    assert set(versions.versions.values()) == {-1}
    assert versions.until is None

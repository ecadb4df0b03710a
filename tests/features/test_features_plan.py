"""Plan and apply: what changed between the definitions and the store, why, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import steps
from mlops_ray.features.applied import read_applied
from mlops_ray.features.definitions import define
from mlops_ray.features.plan import FeaturePlan, make_plan, record
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context

CLEANING = """
import pyarrow.compute as pc


def clean(table):
    return table.filter(pc.greater_equal(table["spent"], {least}))
"""


@pytest.fixture
def files(tmp_path: Path, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, table in shop.tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def context(home: Home, files: Path) -> Context:
    return Context(project="shop", home=home)


@pytest.fixture
def project_code(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write the project's module ``shop_cleaning`` anew."""
    monkeypatch.syspath_prepend(str(files))

    def write(least: float) -> None:
        file = files / "shop_cleaning.py"
        file.write_text(CLEANING.format(least=least))
        sys.modules.pop("shop_cleaning", None)

    write(0)
    yield write
    sys.modules.pop("shop_cleaning", None)


def materialize(context: Context, features: Features) -> Any:
    raw = steps.extract(context, features)
    cleaned = steps.clean(Context(context.project, context.home, step="clean"), features, raw)
    return steps.materialize(context, features, cleaned)


def plan(context: Context, features: Features) -> FeaturePlan:
    return make_plan(features, steps.open_offline(context, features))


def changed(shop: SimpleNamespace, view: str, **changes: Any) -> Features:
    views = {n: v.model_dump(mode="json") for n, v in shop.features.views.items()}
    return shop.declare(views=views | {view: views[view] | changes})


@pytest.mark.usefixtures("shop_project")
def test_a_new_store_then_an_equal_one(context: Context, shop: SimpleNamespace) -> None:
    before = plan(context, shop.features)
    assert {c.action for c in before.changes} == {"new"}
    assert before.rows_due
    materialize(context, shop.features)
    after = plan(context, shop.features)
    assert {c.action for c in after.changes} == {"unchanged"}
    assert after.empty
    assert not after.rows_due
    applied = read_applied(context.home.offline("shop"))
    assert set(applied) == set(shop.features.views)
    assert applied["price"].digest == define(shop.features, "price").digest
    assert applied["price"].declared["view"]["ttl"] == "12h"


@pytest.mark.usefixtures("shop_project")
def test_what_is_only_told_needs_no_rows(context: Context, shop: SimpleNamespace) -> None:
    materialize(context, shop.features)
    told = {
        "description": "Prices now",
        "owner": "anna",
        "tags": ["a"],
        "ttl": "6h",
        "freshness": "1h",
    }
    features = changed(shop, "price", **told)
    change = plan(context, features).of("price")
    assert change.action == "told"
    assert "view.owner: none → anna" in change.because
    assert "view.ttl: 12h → 6h" in change.because
    record(features, steps.open_offline(context, features))
    assert plan(context, features).empty
    declared = read_applied(context.home.offline("shop"))["price"].declared["view"]
    assert (declared["owner"], declared["freshness"], declared["tags"]) == ("anna", "1h", ["a"])


@pytest.mark.usefixtures("shop_project")
def test_an_added_column_extends_and_a_changed_type_is_refused(
    context: Context, shop: SimpleNamespace
) -> None:
    narrow = changed(shop, "price", columns={"price": "float"})
    materialize(context, narrow)
    change = plan(context, shop.features).of("price")
    assert change.action == "extend"
    assert change.because == ("view.columns.stock: none → float",)
    retyped = changed(shop, "price", columns={"price": "string"})
    refused = plan(context, retyped)
    assert refused.of("price").action == "refuse"
    assert refused.of("price").because == ("column price is stored as double, declared as string",)
    with pytest.raises(FeatureStoreError, match="cannot be changed") as error:
        refused.enforce()
    assert "features.views.price.version" in error.value.fix
    version = steps.open_offline(context, narrow).version("price")
    with pytest.raises(FeatureStoreError, match="cannot be changed"):
        materialize(context, retyped)
    assert steps.open_offline(context, narrow).version("price") == version
    raised = changed(shop, "price", columns={"price": "string"}, version=2)
    assert plan(context, raised).of("price").action == "rebuild"


@pytest.mark.usefixtures("shop_project")
def test_an_added_column_is_there_after_an_apply_without_new_rows(
    context: Context, shop: SimpleNamespace
) -> None:
    materialize(context, changed(shop, "price", columns={"price": "float"}))
    versions = materialize(context, shop.features)
    assert versions.rows_written == 0
    assert plan(context, shop.features).empty
    store = steps.open_offline(context, shop.features)
    assert "stock" in store.stored_schema("price").names
    assert versions.versions["price"] == store.version("price")
    more = {"price": "float", "stock": "float", "known_at": "timestamp"}
    wider = changed(shop, "price", columns=more)
    record(wider, steps.open_offline(context, wider))
    assert plan(context, wider).empty


@pytest.mark.usefixtures("shop_project")
def test_a_definition_that_comes_back_has_its_rows(context: Context, shop: SimpleNamespace) -> None:
    materialize(context, shop.features)
    raised = changed(shop, "price", version=2)
    materialize(context, raised)
    change = plan(context, shop.features).of("price")
    assert (change.action, change.because[0]) == ("told", "view.version: 2 → 1")
    assert materialize(context, shop.features).rows_written == 0
    assert plan(context, shop.features).empty


@pytest.mark.usefixtures("shop_project")
def test_a_column_that_went_and_comes_back_with_another_type_is_refused(
    context: Context, shop: SimpleNamespace
) -> None:
    materialize(context, shop.features)
    without = changed(shop, "price", columns={"price": "float"})
    assert plan(context, without).of("price").action == "told"
    record(without, steps.open_offline(context, without))
    back = changed(shop, "price", columns={"price": "float", "stock": "string"})
    assert plan(context, back).of("price").action == "refuse"


@pytest.mark.usefixtures("shop_project")
def test_a_rebuild_says_which_field_changed(context: Context, shop: SimpleNamespace) -> None:
    materialize(context, shop.features)
    features = changed(shop, "shop_visits", windows=["3h", "2d"])
    change = plan(context, features).of("shop_visits")
    assert change.action == "rebuild"
    assert change.because == ("view.windows: [3h, 1d] → [3h, 2d]",)
    materialize(context, features)
    assert plan(context, features).empty
    store = steps.open_offline(context, features)
    assert store.read("shop_visits").num_rows > 0
    assert steps.open_offline(context, shop.features).read("shop_visits").num_rows > 0


@pytest.mark.usefixtures("shop_project")
def test_a_view_of_a_view_is_made_anew_with_it(context: Context, shop: SimpleNamespace) -> None:
    views = {n: v.model_dump(mode="json") for n, v in shop.features.views.items()}
    daily = {
        "entity": "shop",
        "view": "price",
        "every": "1d",
        "windows": ["1d"],
        "aggregates": {"mean": {"by": "mean", "of": "price"}},
    }
    base = shop.declare(views=views | {"price_day": daily})
    materialize(context, base)
    raised = shop.declare(
        views=views | {"price_day": daily, "price": views["price"] | {"version": 2}}
    )
    made = plan(context, raised)
    assert made.of("price").because == ("view.version: 1 → 2",)
    assert made.of("price_day").action == "rebuild"
    assert made.of("price_day").because == ("the view it is made from, price, is made anew",)


@pytest.mark.usefixtures("shop_project")
def test_changed_code_of_the_project_is_a_rebuild(
    context: Context, shop: SimpleNamespace, project_code: Any
) -> None:
    sources = {n: s.model_dump(mode="json") for n, s in shop.features.sources.items()}
    features = shop.declare(
        sources=sources | {"visits": sources["visits"] | {"clean": "shop_cleaning.clean"}}
    )
    materialize(context, features)
    before = steps.open_offline(context, features).read("shelf_visits").num_rows
    assert plan(context, features).empty
    project_code(10)
    made = plan(context, features)
    assert made.of("price").action == "unchanged"
    assert made.of("shop_visits").action == "rebuild"
    (reason,) = made.of("shop_visits").because
    assert reason.startswith("the code of shop_cleaning.clean changed: ")
    materialize(context, features)
    assert plan(context, features).empty
    assert 0 < steps.open_offline(context, features).read("shelf_visits").num_rows < before


@pytest.mark.usefixtures("shop_project")
def test_a_view_that_nothing_declares_any_more(context: Context, shop: SimpleNamespace) -> None:
    materialize(context, shop.features)
    views = {n: v for n, v in shop.features.views.items() if n != "price"}
    service = shop.features.services["buys"].model_dump(mode="json")
    features = shop.declare(
        views={n: v.model_dump(mode="json") for n, v in views.items()},
        services={"buys": service | {"views": ["shop_visits", "shelf_visits"]}},
    )
    change = plan(context, features).of("price")
    assert change.action == "undeclared"
    assert "features prune" in change.because[0]
    assert plan(context, features).empty


def test_no_secret_is_recorded_and_a_new_password_makes_no_new_rows(shop: SimpleNamespace) -> None:
    def with_password(password: str) -> Features:
        sql = {"url": f"postgresql://anna:{password}@db.example/shop", "query": "select 1"}
        options = {"catalog": "x", "s3.secret-access-key": password, "token": password}
        lake = {
            "path": "s3://x/y",
            "format": "iceberg",
            "options": options,
            "available_at": "known_at",
        }
        return shop.declare(
            sources={"visits": {"sql": sql, "available_at": "seen_at"}, "prices": lake}
        )

    from mlops_ray.features.applied import describe

    one, other = with_password("sesame-1"), with_password("sesame-2")
    for view in one.views:
        assert define(one, view).digest == define(other, view).digest
        text = json.dumps(describe(one, view).model_dump(mode="json"))
        assert "sesame" not in text
        assert "db.example" in text or "s3://x/y" in text


@pytest.mark.usefixtures("shop_project")
def test_a_broken_record_is_named(context: Context, shop: SimpleNamespace) -> None:
    materialize(context, shop.features)
    file = context.home.offline("shop") / "price" / "applied.json"
    file.write_text("{")
    with pytest.raises(FeatureStoreError, match="cannot be read") as error:
        plan(context, shop.features)
    assert error.value.where == str(file)

"""Parity: what requests saw online, joined once more from the offline store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from serving import shop
from serving.harness import LocalShop, open_local

from mlops_ray.config.serving import PredictionLog, Serving
from mlops_ray.features import parity, steps
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.parity import ParityReport, check_parity
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.prediction_log.frames import encode, file_head, sealed
from mlops_ray.metadata.prediction_log.layout import segments
from mlops_ray.metadata.prediction_log.reading import read_predictions
from mlops_ray.orchestration.context import Context, Silent
from mlops_ray.serving.log.compaction import compact

COMPLETE_US = shop.NOW_US + 10 * shop.HOUR_US


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **data: Any) -> None:
        self.events.append((kind, data))


@pytest.fixture
def offline(tmp_path: Path) -> OfflineStore:
    """The shop's offline store, and its online store filled from it."""
    home = Home(tmp_path / "home")
    store = OfflineStore(home.offline("shop"), shop.features())
    then = np.full(shop.SHOPS, shop.NOW_US - shop.HOUR_US)
    values = np.arange(shop.SHOPS * 4, dtype=np.float64).reshape(shop.SHOPS, 4)
    store.append(
        "shop_day", shop.rows("shop_day", np.arange(shop.SHOPS), then, values), COMPLETE_US
    )
    people = np.array(["anna", "bert"], dtype=object)
    amounts = np.array([[3.0], [np.nan]])
    store.append(
        "customer_last", shop.rows("customer_last", people, then[:2], amounts), COMPLETE_US
    )
    online = open_online(shop.features(), home.online("shop"), "shop")
    for view in shop.features().views:
        materialize_view(store, online, view)
    return store


@pytest.fixture
def asked(offline: OfflineStore, packages: list[Path], tmp_path: Path) -> LocalShop:
    """An endpoint that has answered three requests."""
    home = Home(tmp_path / "home")
    local = open_local(home, packages, home, Serving())

    async def ask() -> None:
        await local.endpoint.reconfigure(local.config(1))
        bert = shop.ROW | {"customer": "bert", "coupon": "spring", "shop": 3}
        early = shop.ROW | {"at": "2024-03-01T10:59:59Z"}
        await local.predict([shop.ROW, bert], ids=["a", "b"])
        await local.predict([early], ids=["c"])
        await local.endpoint.flush()

    asyncio.run(ask())
    return local


def check(asked: LocalShop, store: OfflineStore, **more: Any) -> ParityReport:
    log = asked.home.predictions("shop")
    return check_parity(shop.features(), "buys", store, log, **more)


def rewritten(asked: LocalShop, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change what was logged; it then lies in a table."""
    log = asked.home.predictions("shop")
    rows = change(read_predictions(log))
    (segment,) = next(iter(segments(log).values()))
    head = file_head()
    frame = encode(segment.first, rows, None, None, {})
    segment.path.write_bytes(head + sealed(frame, head))
    assert compact(log) is not None


def test_equal_stores_agree_to_the_bit(asked: LocalShop, offline: OfflineStore) -> None:
    report = check(asked, offline)
    assert (report.rows, report.waiting, report.without_inputs) == (3, 0, 0)
    assert not report.breached
    assert {item.feature for item in report.features} == {
        "shop_day__visits_1d", "shop_day__visits_7d", "shop_day__mean_1d", "shop_day__mean_7d",
        "customer_last__amount", "amount", "hour", "coupon",
    }  # fmt: skip
    assert all(item.different == 0 and item.rows == 3 for item in report.features)


def test_a_row_that_online_never_got_is_found(
    asked: LocalShop, offline: OfflineStore, tmp_path: Path
) -> None:
    other = OfflineStore(tmp_path / "other", shop.features())
    when = np.array([shop.NOW_US - 1000])
    missed = shop.rows("customer_last", np.array(["anna"], object), when, np.array([[5.0]]))
    for view in shop.features().views:
        tables = [offline.read(view), *([missed] if view == "customer_last" else [])]
        other.append(view, tables, COMPLETE_US)
    report = check(asked, other, threshold=0.3)
    by_name = {item.feature: item for item in report.features}
    assert by_name["customer_last__amount"].different == 1
    assert by_name["customer_last__amount"].largest == 2.0
    (example,) = by_name["customer_last__amount"].examples
    assert (example.id, example.online, example.offline) == ("a", 3.0, 5.0)
    assert report.breached
    assert not check(asked, other, threshold=0.34).breached
    assert not check(asked, other, tolerance=0.4).breached
    assert check(asked, other, tolerance=0.39).breached
    assert sum(item.different for item in report.features) == 1


def test_rows_wait_until_the_offline_store_is_complete(
    asked: LocalShop, offline: OfflineStore, tmp_path: Path
) -> None:
    early = OfflineStore(tmp_path / "early", shop.features())
    assert check(asked, early).waiting == 3
    for view in shop.features().views:
        early.append(view, offline.read(view), shop.NOW_US - shop.HOUR_US)
    report = check(asked, early)
    assert (report.rows, report.waiting) == (1, 2)


def test_a_span_of_time_compacted_or_not(asked: LocalShop, offline: OfflineStore) -> None:
    for _ in range(2):
        assert check(asked, offline, since=shop.NOW).rows == 2
        assert check(asked, offline, until=shop.NOW - timedelta(seconds=1)).rows == 1
        assert compact(asked.home.predictions("shop")) is not None


def test_a_run_looks_at_the_newest_window_that_can_be_compared(
    asked: LocalShop, offline: OfflineStore, tmp_path: Path
) -> None:
    short = timedelta(minutes=1)
    last = check(asked, offline, window=short)
    assert (last.rows, last.since) == (2, shop.NOW - short)
    assert check(asked, offline, window=timedelta(hours=2)).rows == 3
    assert check(asked, offline).rows == 3
    for whole in (None, timedelta(0)):
        report = check(asked, offline, window=whole)
        assert (report.rows, report.since) == (3, None)
    early = OfflineStore(tmp_path / "early", shop.features())
    for view in shop.features().views:
        early.append(view, offline.read(view), shop.NOW_US - shop.HOUR_US)
    known = check(asked, early, window=short)
    assert (known.rows, known.waiting) == (1, 2)
    assert check(asked, offline, until=shop.NOW - short, window=short).rows == 1
    assert check(asked, offline, since=shop.NOW - timedelta(hours=2), window=short).rows == 3


def test_a_feature_that_was_never_logged_does_not_pass_for_equal(
    asked: LocalShop, offline: OfflineStore
) -> None:
    names = []

    def without_amount(rows: pa.Table) -> pa.Table:
        logged = rows["features"].combine_chunks()
        names.extend(field.name for field in logged.type if field.name != "amount")
        fewer = pa.StructArray.from_arrays([logged.field(name) for name in names], names)
        return rows.set_column(rows.column_names.index("features"), "features", fewer)

    rewritten(asked, without_amount)
    report = check(asked, offline)
    assert report.not_logged == ("amount",)
    assert {item.feature: item.rows for item in report.features} == {
        name: 3 * (name != "amount") for name in [*names, "amount"]
    }


def test_rows_logged_before_inputs_were_are_counted(
    asked: LocalShop, offline: OfflineStore
) -> None:
    rewritten(asked, lambda rows: rows.drop_columns(["inputs"]))
    report = check(asked, offline)
    assert (report.rows, report.without_inputs) == (0, 3)
    assert not report.breached


@pytest.mark.parametrize("field", ["customer", "shop"])
def test_rows_with_redacted_inputs_are_counted(
    offline: OfflineStore, packages: list[Path], tmp_path: Path, field: str
) -> None:
    home = Home(tmp_path / "home")
    local = open_local(home, packages, home, Serving(log=PredictionLog(redact=(field, "hour"))))

    async def ask() -> None:
        await local.endpoint.reconfigure(local.config(1))
        await local.predict([shop.ROW, shop.ROW | {"coupon": "spring"}])
        await local.endpoint.flush()

    asyncio.run(ask())
    report = check(local, offline)
    assert (report.rows, report.without_inputs) == (0, 2)


def test_redacted_features_are_not_compared(
    offline: OfflineStore, packages: list[Path], tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    settings = PredictionLog(redact=("hour", "shop_day__mean_1d"))
    local = open_local(home, packages, home, Serving(log=settings))

    async def ask() -> None:
        await local.endpoint.reconfigure(local.config(1))
        await local.predict([shop.ROW])
        await local.endpoint.flush()

    asyncio.run(ask())
    report = check(local, offline)
    assert (report.rows, report.breached) == (1, False)
    assert set(report.not_logged) == {"hour", "shop_day__mean_1d"}


def test_what_batches_scored_is_not_compared(asked: LocalShop, offline: OfflineStore) -> None:
    def by_batch(rows: pa.Table) -> pa.Table:
        """The newest two of the three rows."""
        route = pa.array(["champion", "batch", "batch"])
        return rows.sort_by("time").set_column(rows.column_names.index("route"), "route", route)

    rewritten(asked, by_batch)
    report = check(asked, offline, window=timedelta(minutes=1))
    assert (report.rows, report.waiting, report.without_inputs) == (1, 0, 0)
    assert report.since == shop.NOW - timedelta(hours=1, seconds=1) - timedelta(minutes=1)


def test_what_was_logged_in_several_types_is_one(asked: LocalShop, offline: OfflineStore) -> None:
    """A row as text, one as it is declared, and one redacted; two types of a feature likewise."""

    def typed(rows: pa.Table) -> pa.Table:
        rows = rows.sort_by("id")
        for name, column, kind in (
            ("inputs", "shop", pa.int64()),
            ("features", "hour", pa.float64()),
        ):
            logged = rows[name].combine_chunks()
            values = logged.field(column).cast(kind).to_pylist()
            hidden = "redacted:0123" if name == "inputs" else None
            texts = pa.array([str(values[0]), None, hidden])
            rest = pa.array([None, values[1], values[2] if hidden is None else None], kind)
            fields = {field.name: logged.field(field.name) for field in logged.type}
            fields |= {column: texts, f"{column}__{kind}": rest}
            struct = pa.StructArray.from_arrays(list(fields.values()), list(fields))
            rows = rows.set_column(rows.column_names.index(name), name, struct)
        return rows

    rewritten(asked, typed)
    report = check(asked, offline)
    assert (report.rows, report.without_inputs, report.breached) == (2, 1, False)
    assert all(item.rows == 2 for item in report.features)


def test_a_redacted_feature_is_left_out_row_by_row(asked: LocalShop, offline: OfflineStore) -> None:
    def redacted(rows: pa.Table) -> pa.Table:
        logged = rows["features"].combine_chunks()
        fields = {field.name: logged.field(field.name) for field in logged.type}
        fields["coupon"] = pa.array([*fields["coupon"].to_pylist()[:2], "redacted:0123"])
        struct = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        return rows.set_column(rows.column_names.index("features"), "features", struct)

    rewritten(asked, redacted)
    report = check(asked, offline)
    assert not report.breached
    assert {item.feature: item.rows for item in report.features}["coupon"] == 2
    assert report.rows == 3


@pytest.mark.parametrize(
    ("online", "offline", "different"),
    [
        ([1.0, np.nan, 0.0], [1.0, np.nan, -0.0], [False, False, True]),
        ([1.0, np.nan], [np.nextafter(1, 2), 1.0], [True, True]),
    ],
)
def test_equal_is_equal_to_the_bit(online: Any, offline: Any, different: Any) -> None:
    found = parity.differ(np.array(online), np.array(offline), 0.0)
    assert found.tolist() == different


def test_no_tolerance_reaches_infinity() -> None:
    inf = np.inf
    one, other = np.array([inf, 5.0, -inf, inf, 5.0]), np.array([5.0, inf, inf, inf, 5.000001])
    assert parity.differ(one, other, 1e-6).tolist() == [True, True, True, False, False]


def test_texts_and_nulls() -> None:
    one = np.array(["a", None, "b", None], object)
    other = np.array(["a", None, "c", "d"], object)
    assert parity.differ(one, other, 0.0).tolist() == [False, False, True, True]


def test_the_step_reports_and_shows_metrics(
    asked: LocalShop, offline: OfflineStore, ray_cluster: Any
) -> None:
    recorder = Recorder()
    context = Context("shop", asked.home, reporter=recorder)
    report = steps.check_parity(context, shop.features(), "buys")
    assert report.rows == 3
    ((kind, data),) = recorder.events
    assert kind == "parity"
    assert (data["rows"], data["breached"]) == (3, False)
    assert steps.rebuild_online(context, shop.features()) == {"shop_day": 20, "customer_last": 2}

"""The endpoint as an ASGI application, without a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc
from serving import shop
from serving.harness import LocalShop, same

from mlops_ray.errors import ServingError
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.serving.log.prediction_log import MAX_PENDING_ROWS, PredictionLog
from mlops_ray.training.inference import Predictor

PREDICT = "/v1/models/shop/predict"
FEEDBACK = "/v1/models/shop/feedback"


def asynchronous(test: Callable[[LocalShop], Awaitable[None]]) -> Callable[[LocalShop], None]:
    def body(local: LocalShop) -> None:
        asyncio.run(test(local))  # type: ignore[arg-type]

    body.__name__, body.__doc__ = test.__name__, test.__doc__
    return body


def parts(home: Home, kind: str) -> list[pa.Table]:
    return [
        ipc.open_file(path).read_all()
        for path in sorted((home.predictions("shop") / kind).glob("*.arrow"))
    ]


def expected_scores(folder: Path, rows: list[dict[str, Any]]) -> Any:
    """What the package says of these rows, with the features put together by hand."""
    columns: dict[str, Any] = {}
    for place, name in enumerate(["visits_1d", "visits_7d", "mean_1d", "mean_7d"]):
        values = [r["shop"] * 4.0 + place if r["shop"] < shop.SHOPS else np.nan for r in rows]
        columns[f"shop_day__{name}"] = np.array(values)
    last = {"anna": 3.0, "bert": 4.0}
    columns["customer_last__amount"] = np.array([last.get(r["customer"], np.nan) for r in rows])
    columns["amount"] = np.array([float(r["amount"]) for r in rows])
    columns["hour"] = np.array([12.0] * len(rows))
    columns["coupon"] = np.array([r["coupon"] or "none" for r in rows], dtype=object)
    return Predictor(package.read(folder)).predict(columns)


@asynchronous
async def test_answer_is_the_models(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    rows = [
        shop.ROW,
        {**shop.ROW, "customer": "nobody", "shop": 999, "coupon": "spring"},
        {**shop.ROW, "customer": "ü" * 2_000, "amount": 1},
    ]
    answer = await local.predict(rows, ids=["a", "b", "c"])
    assert same(answer["scores"], expected_scores(local.packages[0], rows))
    assert answer["labels"] == [int(score >= 0.5) for score in answer["scores"]]
    assert (answer["model"], answer["version"], answer["ids"]) == ("shop", 1, ["a", "b", "c"])


@asynchronous
async def test_ids_are_made_up_and_never_twice(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    answers = [await local.predict([shop.ROW] * 3) for _ in range(5)]
    assert len({identifier for answer in answers for identifier in answer["ids"]}) == 15


@asynchronous
async def test_routes(local: LocalShop) -> None:
    assert await local.call("GET", "/healthz") == (200, {"status": "alive"})
    for path in ("/readyz", "/v1/models/shop/readyz"):
        assert (await local.call("GET", path))[0] == 503
    assert (await local.call("POST", PREDICT, {"rows": [shop.ROW]}))[0] == 503
    await local.endpoint.reconfigure(local.config(1, 2))
    assert await local.call("GET", "/readyz") == (200, {"status": "ready"})
    status, described = await local.call("GET", "/v1/models/shop/metadata")
    assert status == 200
    assert described["versions"] == {"champion": 1, "first": 2}
    assert described["inputs"]["amount"]["maximum"] == 1e6
    for method, path, expected, text in [
        ("GET", PREDICT, 405, "POST"),
        ("POST", "/healthz", 405, "GET"),
        ("GET", "/", 404, "predict"),
        ("GET", "/v1/models/shop/metadatas", 404, "did you mean /v1/models/shop/metadata?"),
        ("POST", "/v1/models/other/predict", 404, "only shop"),
    ]:
        status, content = await local.call(method, path)
        assert status == expected
        assert content["error"].keys() == {"message", "field", "row"}
        assert text in content["error"]["message"]


@asynchronous
async def test_refusal_names_field_and_row(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    rows = [shop.ROW, {**shop.ROW, "amount": "dear"}]
    status, content = await local.call("POST", PREDICT, {"rows": rows})
    assert status == 422
    assert content["error"]["field"] == "amount"
    assert content["error"]["row"] == 1
    status, content = await local.call("POST", PREDICT, b'{"rows": [{"\\ud800": 1}]}')
    assert status in (400, 422)
    assert local.endpoint.describe()["pending_rows"] == 0


@asynchronous
async def test_large_body_is_refused_announced_or_not(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    body = b" " * 300_000
    assert (await local.call("POST", PREDICT, body))[0] == 413
    status, content = await local.call("POST", PREDICT, body, {"content-length": ""})
    assert status == 413
    assert "200000" in content["error"]["message"]


@asynchronous
async def test_internal_error_shows_no_trace(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))

    def fail(columns: Any) -> Any:
        raise RuntimeError("secret of the house")

    local.endpoint._lookup = fail
    logging.disable(logging.CRITICAL)
    try:
        status, content = await local.call("POST", PREDICT, {"rows": [shop.ROW]})
    finally:
        logging.disable(logging.NOTSET)
    assert status == 500
    assert "secret" not in json.dumps(content)
    assert "Traceback" not in json.dumps(content)


@asynchronous
async def test_swap_and_shadows(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1, 2))
    before = await local.predict([shop.ROW])
    await local.endpoint.reconfigure(local.config(2, 1, 2))
    after = await local.predict([shop.ROW])
    assert (before["version"], after["version"]) == (1, 2)
    assert not same(before["scores"], after["scores"])
    await local.endpoint.flush()
    first, second = parts(local.home, "predictions")
    assert same(first["score"], before["scores"])
    assert same(first["shadow_first"], after["scores"])
    assert second["score"].equals(second["shadow_second"])
    assert same(second["shadow_first"], before["scores"])
    assert [delta.version for delta in local.deltas] == [1, 2]


@asynchronous
async def test_reconfigure_is_idempotent(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1, 2))
    models = local.endpoint._models
    await local.endpoint.reconfigure(local.config(1, 2))
    assert local.endpoint._models is models


@asynchronous
async def test_broken_package_keeps_the_old(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    logging.disable(logging.CRITICAL)
    try:
        for version, why in ((4, "version 4 (champion)"), (5, "moon_phase")):
            await local.endpoint.reconfigure(local.config(version))
            described = local.endpoint.describe()
            assert described["versions"] == {"champion": 1}
            assert described["refused"]["epoch"] == version
            assert why in described["refused"]["why"]
            assert (await local.predict([shop.ROW]))["version"] == 1
    finally:
        logging.disable(logging.NOTSET)
    await local.endpoint.reconfigure(local.config(2))
    assert local.endpoint.describe()["refused"] is None
    assert (await local.predict([shop.ROW]))["version"] == 2


@asynchronous
async def test_first_package_broken_is_an_error(local: LocalShop) -> None:
    with pytest.raises(ServingError, match="version 4"):
        await local.endpoint.reconfigure(local.config(4))
    with pytest.raises(ServingError, match="user_config"):
        await local.endpoint.reconfigure({"answer": "champion"})


@asynchronous
async def test_log_holds_what_was_answered(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1, 2))
    late = {**shop.ROW, "at": "2024-03-02T00:00:00+01:00"}
    early = {**shop.ROW, "at": "2024-03-02T00:00:00Z", "customer": "nobody"}
    await local.predict([shop.ROW, early], ids=["a", "b"])
    await local.predict([late], ids=["c"])
    quiet = {"x-mlops-ray-log": "off"}
    assert (await local.call("POST", PREDICT, {"rows": [shop.ROW]}, quiet))[0] == 200
    assert await local.endpoint.flush() == 3
    assert await local.endpoint.flush() == 0
    (table,) = parts(local.home, "predictions")
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert [t.isoformat() for t in table["time"].to_pylist()] == [
        "2024-03-01T12:00:00+00:00",
        "2024-03-02T00:00:00+00:00",
        "2024-03-01T23:00:00+00:00",
    ]
    features = table["features"].to_pylist()
    assert features[0]["customer_last__amount"] == 3.0
    assert features[1]["customer_last__amount"] is None
    inputs = table["inputs"].to_pylist()
    assert inputs[1] == early | {"at": datetime(2024, 3, 2, tzinfo=UTC)}
    kinds = [str(field.type) for field in table.schema.field("inputs").type]
    assert kinds == ["string", "int64", "double", "string", "bool", "timestamp[us, tz=UTC]"]
    (delta,) = local.deltas
    assert {day: profile.rows for day, profile in delta.buckets.items()} == {
        "2024-03-01": 2,
        "2024-03-02": 1,
    }
    reference = package.read(local.packages[0]).reference
    assert delta.reference_digest == reference.digest
    amounts = reference.bin({"amount": np.array([12.5, 12.5])}).counts["amount"]
    np.testing.assert_array_equal(delta.buckets["2024-03-01"].counts["amount"], amounts)
    assert delta.predictions.column_names == ["id", "time", "score", "version", "shadow_first"]


@asynchronous
async def test_feedback(local: LocalShop) -> None:
    labels = [{"id": "a", "label": 1, "known_at": "2024-03-05T00:00:00Z"}]
    for _ in range(2):
        assert await local.call("POST", FEEDBACK, {"labels": labels}) == (200, {"accepted": 1})
    status, content = await local.call("POST", FEEDBACK, {"labels": [{"id": "a", "label": 3}]})
    assert (status, content["error"]["field"]) == (422, "label")
    assert await local.endpoint.flush() == 2
    (table,) = parts(local.home, "labels")
    assert table["id"].to_pylist() == ["a", "a"]
    assert local.deltas[0].labels.equals(table)
    assert (local.deltas[0].version, len(local.deltas[0].predictions)) == (0, 0)


@asynchronous
async def test_nothing_is_lost_while_the_disk_refuses(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    blocked = local.home.predictions("shop")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder should be")
    await local.predict([shop.ROW], ids=["a"])
    with pytest.raises(NotADirectoryError):
        await local.endpoint.flush()
    await local.predict([shop.ROW], ids=["b"])
    assert local.endpoint.describe()["pending_rows"] == 2
    assert local.deltas == []
    blocked.unlink()
    assert await local.endpoint.flush() == 2
    (table,) = parts(local.home, "predictions")
    assert table["id"].to_pylist() == ["a", "b"]


@asynchronous
async def test_monitor_that_fails_costs_no_row(local: LocalShop) -> None:
    def fail(delta: Any, confirm: bool) -> None:
        raise RuntimeError("the monitor is gone")

    await local.endpoint.reconfigure(local.config(1))
    local.endpoint._log._sink = fail
    await local.predict([shop.ROW], ids=["a"])
    logging.disable(logging.CRITICAL)
    try:
        assert await local.endpoint.flush() == 1
    finally:
        logging.disable(logging.NOTSET)
    assert len(parts(local.home, "predictions")) == 1


@asynchronous
async def test_the_last_rows_are_written_at_the_end(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    messages = asyncio.Queue[dict[str, Any]]()
    answers = asyncio.Queue[dict[str, Any]]()
    life = asyncio.create_task(local.endpoint({"type": "lifespan"}, messages.get, answers.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await answers.get())["type"] == "lifespan.startup.complete"
    await local.predict([shop.ROW], ids=["a"])
    await messages.put({"type": "lifespan.shutdown"})
    assert (await answers.get())["type"] == "lifespan.shutdown.complete"
    await life
    assert len(parts(local.home, "predictions")) == 1


def test_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PENDING_ROWS >= 100_000
    monkeypatch.setattr("mlops_ray.serving.log.prediction_log.MAX_PENDING_ROWS", 3)
    (tmp_path / "predictions").write_text("no folder")

    async def fill() -> PredictionLog:
        from types import SimpleNamespace

        log = PredictionLog(tmp_path, "r", {})
        for number in range(5):
            item: Any = SimpleNamespace(ids=[str(number)], models=None)
            log.add(item)
        monkeypatch.setattr(log, "_write", lambda *a: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            await log.flush()
        return log

    log = asyncio.run(fill())
    assert (log.pending_rows, log.dropped_rows) == (3, 2)

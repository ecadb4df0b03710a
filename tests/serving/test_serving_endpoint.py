"""The endpoint as an ASGI application, without a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from serving import shop
from serving.harness import LocalShop, same

from mlops_ray.errors import ServingError
from mlops_ray.metadata import package
from mlops_ray.serving.log.encoding import Answered
from mlops_ray.training.inference import Predictor

PREDICT = "/v1/models/shop/predict"
FEEDBACK = "/v1/models/shop/feedback"


def asynchronous(test: Callable[[LocalShop], Awaitable[None]]) -> Callable[[LocalShop], None]:
    def body(local: LocalShop) -> None:
        asyncio.run(test(local))  # type: ignore[arg-type]

    body.__name__, body.__doc__ = test.__name__, test.__doc__
    return body


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

    fail_with(local, RuntimeError("secret of the house"))
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
    kept = spy(local)
    await local.endpoint.reconfigure(local.config(1, 2))
    before = await local.predict([shop.ROW])
    await local.endpoint.reconfigure(local.config(2, 1, 2))
    after = await local.predict([shop.ROW])
    assert (before["version"], after["version"]) == (1, 2)
    assert not same(before["scores"], after["scores"])
    first, second = kept
    (shadow,) = first.models.shadows
    assert same(shadow.scorer.predict(first.columns), after["scores"])
    told = [(p.route, p.model.spec.version, p.rows) for p in (*first.parts, *second.parts)]
    assert told == [("champion", 1, None), ("champion", 2, None)]


@asynchronous
async def test_reconfigure_is_idempotent(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1, 2))
    models = local.endpoint.models.now
    await local.endpoint.reconfigure(local.config(1, 2))
    assert local.endpoint.models.now is models


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
            _, told = await local.call("GET", "/v1/models/shop/metadata")
            assert told["refused"] == {"epoch": version}
            assert str(local.packages[0].parent) not in json.dumps(told)
            assert described["packages"] == {"champion": str(local.packages[0])}
            assert (await local.predict([shop.ROW]))["version"] == 1
    finally:
        logging.disable(logging.NOTSET)
    await local.endpoint.reconfigure(local.config(2))
    assert local.endpoint.describe()["refused"] is None
    assert (await local.predict([shop.ROW]))["version"] == 2


@asynchronous
async def test_a_fault_of_the_loader_keeps_the_old(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    loader = local.endpoint.models._loader
    real = loader.load
    loader.load = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    logging.disable(logging.CRITICAL)
    try:
        await local.endpoint.reconfigure(local.config(2))
    finally:
        logging.disable(logging.NOTSET)
    assert "division" in local.endpoint.describe()["refused"]["why"]
    assert (await local.predict([shop.ROW]))["version"] == 1
    loader.load = real  # type: ignore[method-assign]
    await local.endpoint.reconfigure(local.config(2))
    assert (await local.predict([shop.ROW]))["version"] == 2


@asynchronous
async def test_first_package_broken_is_an_error(local: LocalShop) -> None:
    with pytest.raises(ServingError, match="version 4"):
        await local.endpoint.reconfigure(local.config(4))
    with pytest.raises(ServingError, match="user_config"):
        await local.endpoint.reconfigure({"answer": "champion"})


@asynchronous
async def test_log_is_told_what_was_answered(local: LocalShop) -> None:
    kept = spy(local)
    await local.endpoint.reconfigure(local.config(1, 2))
    early = {**shop.ROW, "at": "2024-03-02T00:00:00Z", "customer": "nobody"}
    answer = await local.predict([shop.ROW, early], ids=["a", "b"])
    quiet = {"x-mlops-ray-log": "off"}
    assert (await local.call("POST", PREDICT, {"rows": [shop.ROW]}, quiet))[0] == 200
    (answered,) = kept
    assert answered.ids == ["a", "b"]
    assert [str(t) for t in answered.times] == [
        "2024-03-01T12:00:00.000000",
        "2024-03-02T00:00:00.000000",
    ]
    assert answered.scores.tolist() == answer["scores"]
    assert answered.columns["customer_last__amount"][0] == 3.0
    assert np.isnan(answered.columns["customer_last__amount"][1])
    assert answered.inputs["customer"].tolist() == ["anna", "nobody"]
    assert answered.latency_us.shape == (2,)
    assert (answered.latency_us > 0).all()


@asynchronous
async def test_requests_at_once_are_one_batch_and_each_has_its_own_answer(local: LocalShop) -> None:
    kept = spy(local)
    await local.endpoint.reconfigure(local.config(1))
    bodies = [
        [{**shop.ROW, "shop": number, "coupon": ["spring", None][number % 2]}] * (1 + number % 3)
        for number in range(9)
    ]
    alone = [await local.predict(rows) for rows in bodies]
    kept.clear()
    together = await asyncio.gather(*(local.predict(rows) for rows in bodies))
    assert len(kept) == 1
    assert kept[0].ids == [i for answer in together for i in answer["ids"]]
    for one, other in zip(alone, together, strict=True):
        assert same(one["scores"], other["scores"])
        assert one["labels"] == other["labels"]


@asynchronous
async def test_a_poisoned_request_fails_alone(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    real = local.endpoint.scoring._lookup

    def poisoned(inputs: Any) -> Any:
        if (inputs["shop"] == 13).any():
            raise ZeroDivisionError("poison")
        return real(inputs)

    fail_with(local, poisoned)
    logging.disable(logging.CRITICAL)
    try:
        answers = await asyncio.gather(
            *(
                local.call("POST", PREDICT, {"rows": [{**shop.ROW, "shop": number}]})
                for number in (1, 13, 2, 3)
            )
        )
    finally:
        logging.disable(logging.NOTSET)
    assert [status for status, _ in answers] == [200, 500, 200, 200]


@asynchronous
async def test_time_of_a_prediction_may_not_be_far_ahead(local: LocalShop) -> None:
    await local.endpoint.reconfigure(local.config(1))
    soon, late = (datetime.now(UTC) + timedelta(hours=hours) for hours in (23, 25))
    rows = [{**shop.ROW, "at": moment.isoformat()} for moment in (soon, late)]
    assert (await local.call("POST", PREDICT, {"rows": rows[:1]}))[0] == 200
    status, content = await local.call("POST", PREDICT, {"rows": rows})
    assert (status, content["error"]["field"], content["error"]["row"]) == (422, "at", 1)


@asynchronous
async def test_feedback(local: LocalShop) -> None:
    labels = [{"id": "a", "label": 1, "known_at": "2024-03-05T00:00:00Z"}]
    for _ in range(2):
        assert await local.call("POST", FEEDBACK, {"labels": labels}) == (200, {"accepted": 1})
    status, content = await local.call("POST", FEEDBACK, {"labels": [{"id": "a", "label": 3}]})
    assert (status, content["error"]["field"]) == (422, "label")
    assert await local.endpoint.flush() == 2


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
    assert local.endpoint.describe()["pending_rows"] == 0
    await local.endpoint.stop()


def spy(local: LocalShop) -> list[Answered]:
    """Keep what the log is told, instead of the log."""
    kept: list[Answered] = []
    local.endpoint.log.add = kept.append  # type: ignore[method-assign]
    return kept


def fail_with(local: LocalShop, failure: Any) -> None:
    """Put a look-up that raises, or a function, in the place of the endpoint's."""

    class Lookup:
        degraded = ""
        is_gone = False
        reads: ClassVar[dict[str, Any]] = {}
        keys = ("customer", "shop")

        def __call__(self, inputs: Any) -> Any:
            if isinstance(failure, Exception):
                raise failure
            return failure(inputs)

    local.endpoint.scoring._lookup = Lookup()

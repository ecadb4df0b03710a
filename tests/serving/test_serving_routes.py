"""The routes of an endpoint and the forms of what is sent, without a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from serving import shop
from serving.harness import LocalShop, open_local, same
from serving.test_serving_metrics import Kept

from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError
from mlops_ray.features.online.failures import ServerGoneError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.log import prediction_log
from mlops_ray.serving.models.loading import ModelSet
from mlops_ray.serving.models.served import ModelSpec, ServedModels

PREDICT = "/v1/models/shop/predict"
ARROW = "application/vnd.apache.arrow.stream"
BODY = {"rows": [shop.ROW, {**shop.ROW, "customer": "bert"}]}


@pytest.fixture
def run(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> Callable[[Callable[[LocalShop], Awaitable[None]]], None]:
    """Run a test with an endpoint that serves version 1, a canary 2 and a shadow 3."""

    def run_with(
        test: Callable[[LocalShop], Awaitable[None]], share: float = 0.0, **more: Any
    ) -> None:
        async def serve() -> None:
            serving = Serving.model_validate(more.pop("serving", {}))
            local = open_local(shop_home, packages, Home(tmp_path / "log"), serving, **more)
            config = local.config(1, 3)
            if share:
                canary = {"alias": "canary", "version": 2, "path": str(packages[1])}
                config["challengers"] = [{"spec": canary, "share": share}]
            await local.endpoint.reconfigure(config)
            await test(local)

        logging.disable(logging.CRITICAL)
        try:
            asyncio.run(serve())
        finally:
            logging.disable(logging.NOTSET)

    return run_with  # type: ignore[return-value]


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def table(rows: list[dict[str, Any]]) -> pa.Table:
    from datetime import datetime

    found = pa.Table.from_pylist([{**row, "at": datetime.fromisoformat(row["at"])} for row in rows])
    return found.set_column(
        found.schema.get_field_index("coupon"), "coupon", pa.array([None] * len(rows), pa.string())
    )


def test_forms_of_body_and_answer(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        expected = (await local.call("POST", PREDICT, BODY))[1]["scores"]
        body = stream(table(BODY["rows"]))
        kind = {"content-type": ARROW + "; x=1", "accept": f"{ARROW}, */*"}
        status, headers, content = await local.send("POST", PREDICT, body, kind)
        assert (status, headers["content-type"]) == (200, ARROW)
        answer = pa.ipc.open_stream(content).read_all()
        assert same(answer["score"].to_numpy(), expected)
        assert answer["version"].to_pylist() == [1, 1]
        assert answer["route"].to_pylist() == ["champion", "champion"]
        said = ("application/json; charset=utf-8", "APPLICATION/JSON")
        for given in (*said, "application/x-www-form-urlencoded", ""):
            status, content = await local.call("POST", PREDICT, BODY, {"content-type": given})
            assert same(content["scores"], expected)
        for given in ("text/csv", "multipart/form-data"):
            status, content = await local.call("POST", PREDICT, BODY, {"content-type": given})
            assert status == 415
            assert given in content["error"]["message"]
        labels = {"labels": [{"id": "a", "label": 1}]}
        feedback = ("POST", "/v1/models/shop/feedback", labels, {"content-type": "text/csv"})
        assert (await local.call(*feedback))[0] == 415
        plain = {"content-type": "application/x-www-form-urlencoded"}
        assert (await local.call("POST", "/v1/models/shop/feedback", labels, plain))[0] == 200

    run(test)


def tensors(rows: int = 2) -> dict[str, Any]:
    row = {**shop.ROW, "coupon": "spring"}
    kinds = {"customer": "BYTES", "shop": "INT64", "amount": "FP64", "coupon": "BYTES"}
    kinds |= {"member": "BOOL", "at": "BYTES"}
    return {
        "id": "call-1",
        "inputs": [
            {"name": name, "shape": [rows], "datatype": kind, "data": [row[name]] * rows}
            for name, kind in kinds.items()
        ],
    }


def test_the_inference_protocol(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        row = {**shop.ROW, "coupon": "spring"}
        expected = (await local.call("POST", PREDICT, {"rows": [row] * 2}))[1]["scores"]
        status, content = await local.call("POST", "/v2/models/shop/infer", tensors())
        assert status == 200, content
        assert content["id"] == "call-1"
        assert content["model_version"] == "1"
        outputs = {output["name"]: output["data"] for output in content["outputs"]}
        assert same(outputs["score"], expected)
        for prefix in ("", "/v1/models/shop"):
            route = f"{prefix}/v2/models/shop/versions/3/infer"
            status, content = await local.call("POST", route, tensors())
            assert (status, content["model_version"]) == (200, "3")
        for path, wanted in {
            "/v2": 200,
            "/v2/health/live": 200,
            "/v2/health/ready": 200,
            "/v2/models/shop": 200,
            "/v2/models/shop/ready": 200,
            "/v2/models/shop/versions/1": 200,
            "/v2/models/shop/versions/1/ready": 200,
            "/v2/models/shop/versions/9/ready": 404,
            "/v2/models/shop/versions/x/ready": 404,
            "/v2/models/other": 404,
            "/v2/models/shop/nothing": 404,
            "/v2/": 404,
        }.items():
            status, content = await local.call("GET", path)
            assert status == wanted, path
            assert isinstance(content.get("error", ""), str)
        described = (await local.call("GET", "/v2/models/shop"))[1]
        assert described["versions"] == ["1", "3"]
        broken = tensors()
        broken["inputs"][2]["data"] = [1.0, -5.0]
        status, content = await local.call("POST", "/v2/models/shop/infer", broken)
        assert status == 422
        assert "amount" in content["error"]
        bad = {"inference-header-content-length": "many"}
        assert (await local.call("POST", "/v2/models/shop/infer", tensors(), bad))[0] == 400

    run(test)


def test_the_second_endpoint_of_a_cluster_has_all_routes_behind_its_prefix(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        for path in ("healthz", "readyz", "openapi.json", "v2/models/shop", "v2/health/ready"):
            assert (await local.call("GET", f"/v1/models/shop/{path}"))[0] == 200, path
        _, content = await local.call("GET", "/openapi.json")
        assert content["openapi"].startswith("3.1")

    run(test)


def test_explanations_add_up(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        expected = (await local.call("POST", PREDICT, BODY))[1]["scores"]
        status, content = await local.call("POST", "/v1/models/shop/explain", BODY)
        assert status == 200, content
        assert (content["version"], len(content["ids"])) == (1, 2)
        assert same(content["scores"], expected)
        logit = np.log(np.array(content["scores"]) / (1 - np.array(content["scores"])))
        total = content["base"] + sum(np.array(v) for v in content["contributions"].values())
        np.testing.assert_allclose(total, logit, rtol=0, atol=1e-6)

    run(test)

    async def closed(local: LocalShop) -> None:
        assert (await local.call("POST", "/v1/models/shop/explain", BODY))[0] == 404

    run(closed, serving={"explain": False})


def test_rows_of_one_request_may_be_answered_by_two_versions(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        rows = [{**shop.ROW, "customer": f"c{n}"} for n in range(40)]
        kept: list[Any] = []
        local.endpoint.log.add = kept.append  # type: ignore[method-assign]
        content = (await local.call("POST", PREDICT, {"rows": rows}))[1]
        assert content["version"] is None
        assert set(content["versions"]) == {1, 2}
        names = {1: "champion", 2: "canary"}
        assert content["routes"] == [names[version] for version in content["versions"]]
        (answered,) = kept
        assert answered.ids == content["ids"]
        versions = np.array(content["versions"])
        assert {part.model.spec.version: part.rows.tolist() for part in answered.parts} == {
            version: np.flatnonzero(versions == version).tolist() for version in (1, 2)
        }
        calls = [local.call("POST", PREDICT, {"rows": [row]}) for row in rows]
        alone = [content for _, content in await asyncio.gather(*calls)]
        assert [one["version"] for one in alone] == content["versions"]
        assert same([one["scores"][0] for one in alone], content["scores"])
        wanted = [("POST", f"/v2/models/shop/versions/{n}/infer", tensors()) for n in (1, 2, 3)]
        plain = [local.call("POST", PREDICT, {"rows": rows[:3]}) for _ in range(2)]
        answers = await asyncio.gather(*(local.call(*call) for call in wanted), *plain)
        assert [c["model_version"] for _, c in answers[:3]] == ["1", "2", "3"]
        for _, one in answers[3:]:
            versions = one.get("versions") or [one["version"]] * 3
            assert versions == content["versions"][:3]
            assert same(one["scores"], content["scores"][:3])

    run(test, share=0.5, serving={"routing": {"sticky_by": ["customer"]}})


def test_who_answers_does_not_change_where_a_neighbour_fails(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        rows = [{**shop.ROW, "customer": f"c{n}"} for n in range(20)]
        alone = (await local.call("POST", PREDICT, {"rows": rows}))[1]
        real = local.endpoint.scoring._lookup

        class Poisoned(Store):
            def __call__(self, inputs: Any) -> Any:
                if (inputs["shop"] == 13).any():
                    raise ZeroDivisionError
                return self.real(inputs)

        local.endpoint.scoring._lookup = Poisoned(real)
        poison = local.call("POST", PREDICT, {"rows": [{**shop.ROW, "shop": 13}]})
        (status, _), (_, found) = await asyncio.gather(
            poison, local.call("POST", PREDICT, {"rows": rows})
        )
        assert status == 500
        assert found["versions"] == alone["versions"]
        assert same(found["scores"], alone["scores"])

    run(test, share=0.5, serving={"routing": {"sticky_by": ["customer"]}})


def test_requests_of_one_batch_draw_for_themselves(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        calls = [local.call("POST", PREDICT, BODY) for _ in range(60)]
        answers = [content for _, content in await asyncio.gather(*calls)]
        by_version = {a["version"]: a["scores"] for a in answers}
        assert set(by_version) == {1, 2}
        assert not same(by_version[1], by_version[2])
        assert all(same(a["scores"], by_version[a["version"]]) for a in answers)

    run(test, share=0.5)


def test_other_models_by_name(run: Any) -> None:
    asked: list[str] = []
    kept = Kept()

    async def test(local: LocalShop) -> None:
        loader = local.endpoint.models._loader
        spec = ModelSpec(alias="champion", version=2, path=str(local.packages[1]))
        cafe.append(replace(loader.load(ServedModels(answer=spec), None), name="cafe"))
        by_name = {}
        for name in ("cafe", "shop"):
            content = (await local.call("POST", f"/v1/models/{name}/predict", BODY))[1]
            assert content["model"] == name
            by_name[name] = (content["version"], content["scores"])
        assert (by_name["cafe"][0], by_name["shop"][0]) == (2, 1)
        assert not same(by_name["cafe"][1], by_name["shop"][1])
        _, content = await local.call("POST", "/v2/models/cafe/infer", tensors())
        assert (content["model_name"], content["model_version"]) == ("cafe", "2")
        assert (await local.call("POST", "/v1/models/house/predict", BODY))[0] == 404
        assert asked == ["cafe", "cafe", "house"]
        local.endpoint.recorder.publish({}, {})
        for name, rows in (("cafe", 4), ("shop", 2), ("house", 0)):
            assert kept.of("mlops_ray_rows", model=name) == rows
            assert kept.of("mlops_ray_requests", model=name) == rows / 2
        assert kept.of("mlops_ray_stage_seconds_count", stage="model", model="cafe") == 2

    async def many(name: str) -> ModelSet:
        asked.append(name)
        if name != "cafe":
            raise RequestError("no such model", status=404)
        return cafe[0]

    cafe: list[ModelSet] = []
    run(test, many=many, series=kept)


def test_a_request_that_is_sent_again_is_answered_by_the_same_version(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        versions = set()
        for number in range(30):
            ids = [f"call-{number}", "second"]
            calls = [local.call("POST", PREDICT, BODY | {"ids": ids}) for _ in range(4)]
            found = {content["version"] for _, content in await asyncio.gather(*calls)}
            assert len(found) == 1
            versions |= found
        assert versions == {1, 2}

    run(test, share=0.5)


def test_what_is_not_to_be_logged_is_not_by_any_protocol(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        for path, body in ((PREDICT, BODY), ("/v2/models/shop/infer", tensors())):
            assert (await local.call("POST", path, body, {"x-mlops-ray-log": "off"}))[0] == 200
            assert local.endpoint.log.pending_rows == 0
        await local.call("POST", "/v2/models/shop/infer", tensors())
        assert local.endpoint.log.pending_rows == 2

    run(test)


def test_where_there_is_get_there_is_head(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        for path in ("/healthz", "/v2/models/shop", "/openapi.json"):
            got = await local.send("GET", path)
            assert await local.send("HEAD", path) == (got[0], got[1], b"")
        status, headers, content = await local.send("HEAD", PREDICT)
        assert (status, headers["allow"], content) == (405, "POST", b"")
        assert (await local.send("POST", "/healthz"))[1]["allow"] == "GET, HEAD"

    run(test)


def test_a_length_of_thousands_of_digits_is_refused(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        status, content = await local.call("POST", PREDICT, BODY, {"content-length": "1" * 5000})
        assert status == 400
        assert "Content-Length" in content["error"]["message"]

    run(test)


def test_labels_that_a_full_log_has_no_room_for_are_not_accepted(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(local: LocalShop) -> None:
        monkeypatch.setattr(prediction_log, "MAX_PENDING_ROWS", 0)
        labels = {"labels": [{"id": "a", "label": 1}]}
        feedback = "/v1/models/shop/feedback"
        status, headers, _ = await local.send("POST", feedback, labels)
        assert (status, headers["retry-after"]) == (503, "1")
        assert (await local.call("POST", PREDICT, BODY))[0] == 200

    run(test)


class Store:
    """A look-up whose store can go; ``degraded`` is what it then does."""

    def __init__(self, real: Any) -> None:
        self.real, self.keys, self.reads = real, real.keys, real.reads
        self.degraded = ""
        self.is_gone = self.gone = False

    def __call__(self, inputs: Any) -> Any:
        if self.gone:
            raise ServerGoneError("the online store does not answer", where="redis://secret@host")
        return self.real(inputs)


def test_an_online_store_that_is_gone(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        store = Store(local.endpoint._lookup)
        local.endpoint.scoring._lookup = store
        store.degraded = "stale"
        status, headers, content = await local.send("POST", PREDICT, BODY)
        assert (status, headers["x-mlops-ray-features"]) == (200, "stale")
        store.degraded, store.gone = "", True
        calls = [local.send("POST", PREDICT, BODY) for _ in range(3)]
        for status, headers, content in await asyncio.gather(*calls):
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(content)["error"]["field"] == "shop, customer"
            assert b"secret" not in content
        assert (await local.call("POST", "/v1/models/shop/explain", BODY))[0] == 503
        store.gone = False
        status, headers, _ = await local.send("POST", PREDICT, BODY)
        assert status == 200
        assert "x-mlops-ray-features" not in headers

    run(test)


def test_answers_wait_for_the_disk_where_they_shall(run: Any) -> None:
    async def test(local: LocalShop) -> None:
        from mlops_ray.errors import ServingError

        waited = []

        async def written(_: Any) -> None:
            waited.append(len(waited))
            if len(waited) == 2:
                raise ServingError("the disk is full", where="/secret/place")

        local.endpoint.log.written = written  # type: ignore[method-assign]
        assert (await local.call("POST", PREDICT, BODY))[0] == 200
        status, headers, content = await local.send("POST", PREDICT, BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"secret" not in content
        assert len(waited) == 2

    run(test, serving={"log": {"durability": "answered"}})

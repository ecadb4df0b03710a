"""What an endpoint counts of itself."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import shop
from serving.harness import LocalShop, open_local

from mlops_ray.config.serving import Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.metrics import HELP, SECONDS, Histogram, RaySeries, Recorder

PREDICT = "/v1/models/shop/predict"


class Kept:
    """Series that are kept here, as Prometheus would: counters add up."""

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[Any, ...], float] = defaultdict(float)
        self.gauges: dict[tuple[Any, ...], float] = {}

    def add(self, name: str, tags: dict[str, str], amount: float) -> None:
        assert amount > 0
        assert name in HELP
        self.counters[name, *sorted(tags.items())] += amount

    def set(self, name: str, tags: dict[str, str], value: float) -> None:
        assert name in HELP
        self.gauges[name, *sorted(tags.items())] = value

    def of(self, name: str, **tags: str) -> float:
        """The sum of the series of a name that have these tags."""
        wanted = set(tags.items())
        return sum(v for k, v in self.counters.items() if k[0] == name and wanted <= set(k[1:]))


def test_a_histogram_is_prometheus_own() -> None:
    values = np.random.default_rng(5).exponential(0.01, 500)
    histogram, kept = Histogram(SECONDS), Kept()
    for chunk in np.split(values, 5):
        for value in chunk:
            histogram.add(float(value))
        histogram.publish(kept, "mlops_ray_stage_seconds", {})
    for bound in SECONDS:
        found = kept.of("mlops_ray_stage_seconds_bucket", le=str(bound))
        assert found == (values <= bound).sum()
    assert kept.of("mlops_ray_stage_seconds_bucket", le="+Inf") == 500
    assert kept.of("mlops_ray_stage_seconds_count") == 500
    assert kept.of("mlops_ray_stage_seconds_sum") == pytest.approx(values.sum())


def test_nothing_is_sent_twice() -> None:
    kept = Kept()
    recorder = Recorder("shop", kept)
    for _ in range(3):
        recorder.request("predict", 422, seconds=0.01)
        recorder.publish({"mlops_ray_queued": 4}, {})
    recorder.publish({}, {})
    assert kept.of("mlops_ray_requests", status="422", action="predict", endpoint="shop") == 3
    assert kept.of("mlops_ray_errors", kind="invalid") == 3
    assert kept.of("mlops_ray_request_seconds_count") == 3
    assert kept.gauges == {("mlops_ray_queued", ("endpoint", "shop")): 4}


def test_the_latency_for_scaling_is_that_since_the_last_call() -> None:
    recorder = Recorder("shop", None)
    assert recorder.latency_p95_s() == 0
    for milliseconds in range(1, 101):
        recorder.request("predict", 200, seconds=milliseconds / 1000)
    assert recorder.latency_p95_s() == pytest.approx(0.095)
    assert recorder.latency_p95_s() == 0


def test_scaling_goes_by_predictions_and_not_by_what_is_refused_or_asked_about_health() -> None:
    recorder = Recorder("shop", None)
    for action, status in {("health", 200), ("metadata", 200), ("predict", 401), ("infer", 404)}:
        for _ in range(100):
            recorder.request(action, status, seconds=0.0001)
    assert recorder.latency_p95_s() == 0
    for action, status in {("predict", 200), ("infer", 200), ("grpc_infer", 200), ("infer", 504)}:
        recorder.request("health", 200, seconds=0.0001)
        recorder.request(action, status, seconds=2.0)
        assert recorder.latency_p95_s() == 2


def test_models_of_other_names_are_told_apart() -> None:
    kept = Kept()
    recorder = Recorder("shop", kept)
    for model, rows in ((None, 1), ("cafe", 2)):
        recorder.request("predict", 200, "champion", 1, 0.01, model)
        recorder.scored("champion", 1, rows, model)
        recorder.stage("model", 0.01, "champion", 1, model)
    recorder.publish({}, {})
    for model, rows in (("shop", 1), ("cafe", 2)):
        assert kept.of("mlops_ray_requests", model=model) == 1
        assert kept.of("mlops_ray_rows", model=model) == rows
        assert kept.of("mlops_ray_stage_seconds_count", model=model) == 1
        assert kept.of("mlops_ray_request_seconds_count", model=model) == 1


def test_an_endpoint_counts_what_it_did(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    kept = Kept()

    async def serve() -> None:
        local = open_local(shop_home, packages, Home(tmp_path / "log"), Serving(), series=kept)
        config = local.config(1)
        canary = {"alias": "canary", "version": 2, "path": str(packages[1])}
        config["challengers"] = [{"spec": canary, "share": 1.0}]
        await local.endpoint.reconfigure(local.config(1))
        known = {"customer": "anna", "shop": 1}
        rows = [{**shop.ROW, **known}, {**shop.ROW, "customer": "nobody", "shop": 999}]
        before = reads(local)
        await local.predict(rows)
        await local.endpoint.reconfigure(config | {"epoch": 5})
        middle = reads(local)
        await asyncio.gather(*(local.predict(rows) for _ in range(4)))
        after = reads(local)
        await local.call("POST", PREDICT, {"rows": []})
        await local.call("GET", "/nowhere")
        local.endpoint.recorder.publish(local.endpoint._gauges(), local.endpoint._lookup.reads)
        assert before["customer_last"][:2] == (before["customer_last"][0],) * 2
        assert after["shop_day"][0] - middle["shop_day"][0] == 8
        assert after["shop_day"][1] - middle["shop_day"][1] == 4

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(serve())
    finally:
        logging.disable(logging.NOTSET)
    champion = {"route": "champion", "version": "1"}
    canary = {"route": "canary", "version": "2"}
    assert kept.of("mlops_ray_requests", action="predict", status="200", **champion) == 1
    assert kept.of("mlops_ray_requests", action="predict", status="200", **canary) == 4
    assert kept.of("mlops_ray_rows", **champion) == 2
    assert kept.of("mlops_ray_rows", **canary) == 8
    assert kept.of("mlops_ray_stage_seconds_count", stage="model", **canary) == 1
    assert kept.of("mlops_ray_stage_seconds_count", stage="features") == 2
    assert kept.of("mlops_ray_stage_seconds_count", stage="parse") == 5
    assert kept.of("mlops_ray_stage_seconds_count", stage="reply") == 5
    assert kept.of("mlops_ray_batch_rows_bucket", le="8") == 2
    assert kept.of("mlops_ray_batch_rows_bucket", le="4") == 1
    assert kept.of("mlops_ray_batch_requests") == 5
    assert kept.of("mlops_ray_errors", kind="invalid", action="predict") == 1
    assert kept.of("mlops_ray_errors", kind="unknown", action="unknown") == 1
    assert kept.gauges["mlops_ray_in_flight", ("endpoint", "shop")] == 0
    ages = {dict(k[1:])["view"]: v for k, v in kept.gauges.items() if "age" in k[0]}
    assert ages["shop_day"] == 3600


def reads(local: LocalShop) -> dict[str, tuple[int, int]]:
    return {v: (r.rows, r.missing) for v, r in local.endpoint._lookup.reads.items()}


def test_ray_exports_them(ray_cluster: Any) -> None:
    import re
    import time
    import urllib.request

    import ray

    @ray.remote(num_cpus=0)
    class Replica:
        def work(self) -> None:
            recorder = Recorder("exported", RaySeries())
            recorder.request("predict", 200, "champion", 7, 0.003)
            recorder.batch(2, 64)
            recorder.publish({"mlops_ray_in_flight": 3}, {})

    replica: Any = Replica.remote()  # type: ignore[attr-defined]
    ray.get(replica.work.remote())
    ports = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    wanted = [
        r'ray_mlops_ray_requests_total\{[^}]*Status="200".*? 1\.0',
        r'ray_mlops_ray_request_seconds_bucket_total\{[^}]*le="0.005".*? 1\.0',
        r'ray_mlops_ray_in_flight\{[^}]*endpoint="exported".*? 3\.0',
    ]
    deadline_s = time.monotonic() + 60
    text = ""
    while time.monotonic() < deadline_s:
        text = "".join(
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            for port in ports
        )
        if all(re.search(pattern, text, re.IGNORECASE) for pattern in wanted):
            return
        time.sleep(1)
    found = "\n".join(line for line in text.splitlines() if "mlops_ray" in line)
    pytest.fail(f"not all were exported:\n{found}")

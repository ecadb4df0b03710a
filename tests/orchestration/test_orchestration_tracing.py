"""Spans of runs and steps: what they hold, where they go, and that they cost nothing when off."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from mlops_ray.config.workflow import Workflow
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import RunRecord
from mlops_ray.orchestration.capture import log_path
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.tracing import Trace, exporter_names, open_trace, settings, trace_id

RUN = RunRecord(
    run_id="20260101-000000-abcd",
    project="tiny",
    workflow="nightly",
    status="running",
    config_digest="c0ffee",
    started_at=datetime(2026, 1, 1, tzinfo=UTC),
    ended_at=None,
    owner="here:1:1",
    config={},
    provenance={},
)


class Collector(http.server.ThreadingHTTPServer):
    """An OTLP/HTTP receiver that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[ExportTraceServiceRequest] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> dict[str, Any]:
        return {
            span.name: span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def resources(self) -> set[str]:
        return {
            attribute.value.string_value
            for request in self.requests
            for spans in request.resource_spans
            for attribute in spans.resource.attributes
            if attribute.key == "service.name"
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        self.server.requests.append(request)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("OTEL_")]:
        monkeypatch.delenv(key)


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ()),
        ({"OTEL_TRACES_EXPORTER": "none"}, ()),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, ()),
        ({"OTEL_TRACES_EXPORTER": "console, otlp,console"}, ("console", "otlp")),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "TRUE"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ()),
    ],
)
def test_the_standard_variables_say_whether_and_where_to(
    environment: dict[str, str], names: tuple[str, ...]
) -> None:
    assert exporter_names(environment) == names


def test_off_means_that_nothing_is_imported() -> None:
    code = (
        "import sys; from mlops_ray.orchestration import tracing;"
        "import datetime; from mlops_ray.metadata.records import RunRecord;"
        f"run = RunRecord.model_validate_json({RUN.model_dump_json()!r});"
        "assert tracing.open_trace(run) is None\n"
        "with tracing.nested('', {}): pass\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_one_trace_of_nested_and_linked_spans() -> None:
    kept = InMemorySpanExporter()
    trace = Trace(RUN, [kept])
    trace.started("load")
    trace.ended("load", "succeeded", rows=7, node="here:1")
    trace.started("fit", upstream=["load", "finished_before_we_came"])
    trace.noted("fit", "retry", cause="infrastructure", delay_s=1.5, nothing=None)
    trace.started("fit", attempt=2, upstream=["load"])
    trace.started("fit", item=3)
    trace.ended("fit", "succeeded", item=3)
    trace.ended("fit", "failed", error="ValueError: no")
    trace.ended("tell", "skipped", reason="needs fit")
    trace.started("never_over")
    trace.close("failed", "step fit failed")
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert list(spans) == ["load", "fit[3]", "fit", "tell", "never_over", "nightly"]
    root = spans["nightly"]
    assert root.parent is None
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "step fit failed"
    assert {span.context.trace_id for span in spans.values()} == {trace_id(RUN.run_id)}
    assert spans["load"].parent.span_id == root.context.span_id
    assert spans["load"].attributes["mlops_ray.rows"] == 7
    assert spans["load"].status.status_code is StatusCode.OK
    fit = spans["fit"]
    assert [link.context.span_id for link in fit.links] == [spans["load"].context.span_id]
    assert [(event.name, dict(event.attributes)) for event in fit.events] == [
        ("attempt", {"attempt": 1}),
        ("retry", {"cause": "infrastructure", "delay_s": 1.5}),
        ("attempt", {"attempt": 2}),
    ]
    assert (fit.status.status_code, fit.status.description) == (StatusCode.ERROR, "ValueError: no")
    assert spans["fit[3]"].parent.span_id == fit.context.span_id
    assert spans["fit[3]"].attributes["mlops_ray.item"] == 3
    assert spans["tell"].attributes["mlops_ray.status"] == "skipped"
    assert spans["never_over"].attributes["mlops_ray.status"] == "cancelled"


_STEP = """
import json, sys
from mlops_ray.orchestration.tracing import nested
with nested(*json.loads(sys.argv[1])):
    from opentelemetry import trace
    with trace.get_tracer("user").start_as_current_span("inside the step"):
        pass
"""


def test_spans_go_to_a_collector_and_those_of_a_worker_nest(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    trace = open_trace(RUN)
    assert trace is not None
    trace.started("fit")
    carrier = [trace.traceparent("fit"), settings()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", _STEP, json.dumps(carrier)], check=True, env=environment)
    trace.ended("fit", "succeeded")
    trace.close("succeeded")
    spans = collector.spans()
    assert set(spans) == {"nightly", "fit", "inside the step"}
    assert spans["fit"].parent_span_id == spans["nightly"].span_id
    assert spans["inside the step"].parent_span_id == spans["fit"].span_id
    wanted = trace_id(RUN.run_id).to_bytes(16)
    assert {span.trace_id for span in spans.values()} == {wanted}
    assert collector.resources() == {"mlops-ray"}


def test_a_service_name_of_the_environment_stays(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    trace = open_trace(RUN)
    assert trace is not None
    trace.close("succeeded")
    assert collector.resources() == {"mine"}


def test_an_exporter_that_is_not_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nowhere")
    assert open_trace(RUN) is None
    assert "nowhere" in caplog.text
    assert "mlops-ray[otel]" in caplog.text


def test_without_a_collector_a_run_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mlops_ray.orchestration.tracing._RUN_PATIENCE_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    trace = open_trace(RUN)
    assert trace is not None
    trace.started("fit")
    trace.close("succeeded")


STEPS = "orchestration.traced_steps"
TESTS = Path(__file__).parents[1]


def spec_of(home: Home, **steps: dict[str, Any]) -> RunSpec:
    return RunSpec(
        project="tiny",
        workflow=Workflow.model_validate({"name": "traced", "steps": steps}),
        home=home,
        packages=("orchestration",),
        directory=home.root.parent,
        roots=(str(TESTS),),
    )


def test_a_workflow_on_ray_is_one_trace_down_to_the_code_of_its_steps(
    ray_cluster: Any,
    home: Home,
    tmp_path: Path,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    quickly = {"user": 1, "backoff": {"first": "10ms"}}
    spec = spec_of(
        home,
        numbers={"uses": f"{STEPS}.numbers", "with": {"count": 3}},
        one={"uses": f"{STEPS}.traced", "with": {"value": 7}, "after": ["numbers"]},
        each={"uses": f"{STEPS}.traced", "map": {"value": "$numbers"}},
        fail={
            "uses": f"{STEPS}.fail_once",
            "with": {"marks": str(tmp_path), "values": "$each"},
            "retries": quickly,
        },
    )
    run = Executor(spec).run()
    spans = collector.spans()
    calls = {f"each[{item}]" for item in range(3)} | {f"inside {item}" for item in range(3)}
    assert set(spans) == {"traced", "numbers", "one", "inside 7", "each", "fail"} | calls
    wanted = trace_id(run.run_id).to_bytes(16)
    assert {span.trace_id for span in spans.values()} == {wanted}
    for child, parent in {
        "numbers": "traced",
        "inside 7": "one",
        "each[2]": "each",
        "inside 2": "each[2]",
    }.items():
        assert spans[child].parent_span_id == spans[parent].span_id, child
    assert [link.span_id for link in spans["each"].links] == [spans["numbers"].span_id]
    assert [event.name for event in spans["fail"].events] == ["attempt", "retry", "attempt"]
    collector.requests.clear()
    Executor(spec).run(fresh=True)
    cached = collector.spans()
    assert set(cached) == {"traced", "numbers", "one", "each", "fail"}


def test_all_that_a_step_prints_on_ray_is_in_its_log(ray_cluster: Any, home: Home) -> None:
    run = Executor(spec_of(home, prints={"uses": f"{STEPS}.prints"})).run()
    kept = log_path(home, run.run_id, "prints").read_text().splitlines()
    wanted = ["print", "stderr", "logging", "descriptor", "subprocess", "C library"]
    assert sorted(line for line in kept if line in wanted) == sorted(wanted)

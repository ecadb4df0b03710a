"""OpenTelemetry spans of a run and its steps, where an exporter is configured.

The standard environment variables say whether and where to: ``OTEL_EXPORTER_OTLP_ENDPOINT`` or
``OTEL_TRACES_EXPORTER``. Where they are not set nothing is imported and nothing is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlops_ray.metadata.records import RunRecord, RunStatus, StepStatus

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanContext, Tracer

_NAME = "mlops_ray"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_ENTRY_POINTS = "opentelemetry_traces_exporter"
_GOOD = ("succeeded", "cached", "skipped")
_RUN_PATIENCE_S = 5.0
_STEP_PATIENCE_S = 0.5
_log = logging.getLogger(__name__)


def exporter_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the exporters that the environment asks for; none where tracing is off."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    named = environment.get(_EXPORTERS, "")
    if not named and any(environment.get(key) for key in _ENDPOINTS):
        named = "otlp"
    names = dict.fromkeys(name.strip() for name in named.split(","))
    return tuple(name for name in names if name not in ("", "none"))


def open_trace(run: RunRecord) -> Trace | None:
    """Begin the trace of a run, or of its resumption; None where tracing is off."""
    if not exporter_names(os.environ):
        return None
    exporters = _exporters(os.environ)
    return Trace(run, exporters) if exporters else None


class Trace:
    """The spans of one attempt at a run: one for the run, one for each step and mapped call.

    The trace id is the run id's digest (``trace_id``): all attempts at a run are one trace, and who
    knows the run finds it. No method raises: what cannot be exported is lost, not the run.

    Args:
        run: The run.
        exporters: Where ended spans go.
    """

    def __init__(self, run: RunRecord, exporters: Iterable[SpanExporter]) -> None:
        from opentelemetry import trace

        self._otel = trace
        self._run_id = run.run_id
        self._provider = _provider(exporters, run.run_id)
        self._tracer: Tracer = self._provider.get_tracer(_NAME)
        about = {
            "mlops_ray.run_id": run.run_id,
            "mlops_ray.project": run.project,
            "mlops_ray.workflow": run.workflow,
            "mlops_ray.config_digest": run.config_digest,
            "mlops_ray.reason": run.reason,
        }
        # An empty context: the run's span is a root whatever the caller has open.
        root = self._tracer.start_span(run.workflow, _no_context(), attributes=about)
        self._root = root
        self._spans: dict[tuple[str, int], Span] = {}
        self._over: dict[str, SpanContext] = {}

    def started(
        self, step: str, item: int = -1, attempt: int = 1, upstream: Iterable[str] = ()
    ) -> None:
        """Begin the span of a step or call, linked to the steps that it needs; on a further attempt
        note that instead."""
        span = self._spans.get((step, item))
        if span is None:
            links = [self._otel.Link(self._over[name]) for name in upstream if name in self._over]
            span = self._begin(step, item, links)
        span.add_event("attempt", {"attempt": attempt})

    def noted(self, step: str, kind: str, item: int = -1, **data: Any) -> None:
        """Add an event to the span of a step that runs: a retry with its cause, a timeout."""
        span = self._spans.get((step, item))
        if span is not None:
            span.add_event(kind, _attributes(data))

    def traceparent(self, step: str, item: int = -1) -> str:
        """Return the address of a span in W3C's form: what ``nested`` needs in the worker."""
        span = self._spans.get((step, item))
        if span is None:
            return ""
        context = span.get_span_context()
        flags = int(context.trace_flags)
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"

    def ended(
        self,
        step: str,
        status: StepStatus,
        item: int = -1,
        error: str | None = None,
        **attributes: Any,
    ) -> None:
        """End the span of a step or call; one that never began (cached, skipped) is an instant."""
        span = self._spans.pop((step, item), None) or self._begin(step, item, [])
        self._spans.pop((step, item), None)
        span.set_attributes({"mlops_ray.status": status, **_attributes(attributes, "mlops_ray.")})
        self._end(span, status, error)
        if item < 0:
            self._over[step] = span.get_span_context()

    def close(self, status: RunStatus, error: str | None = None) -> None:
        """End what has not ended and the run's span; send all. Waits some seconds at most."""
        for step, item in list(self._spans):
            self.ended(step, "cancelled", item, error="the run was over before")
        self._root.set_attribute("mlops_ray.status", status)
        self._end(self._root, status, error)
        _within(_RUN_PATIENCE_S, self._provider.shutdown)

    def _begin(self, step: str, item: int, links: list[Any]) -> Span:
        parent = self._spans.get((step, -1)) if item >= 0 else None
        context = self._otel.set_span_in_context(parent or self._root, _no_context())
        about: dict[str, Any] = {"mlops_ray.run_id": self._run_id, "mlops_ray.step": step}
        if item >= 0:
            about["mlops_ray.item"] = item
        name = step if item < 0 else f"{step}[{item}]"
        span = self._tracer.start_span(name, context, attributes=about, links=links)
        self._spans[step, item] = span
        return span

    def _end(self, span: Span, status: str, error: str | None) -> None:
        code = self._otel.StatusCode
        bad = error is not None or status not in _GOOD
        span.set_status(code.ERROR if bad else code.OK, error if bad else None)
        span.end()


def trace_id(run_id: str) -> int:
    """Return the id of a run's trace: the first 128 bits of its id's BLAKE2b digest."""
    return int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=16).digest())


@contextlib.contextmanager
def nested(traceparent: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Make spans that are opened meanwhile children of the span with that address; "" does nothing.

    Where this process has no tracer provider of its own yet it gets one, with the exporters that the
    ``settings`` of the driver name. What has ended is sent on return: a worker may be killed at any
    time.
    """
    if not traceparent:
        yield
        return
    from opentelemetry import context, trace

    provider = _workers_provider(settings)
    token = context.attach(_context_of(traceparent))
    try:
        yield
    finally:
        context.detach(token)
        if provider is not None and trace.get_tracer_provider() is provider:
            _within(_STEP_PATIENCE_S, provider.force_flush)


def _within(patience_s: float, send: Callable[[], Any]) -> None:
    """Send, but do not wait longer: the SDK knows no limit, and a collector may be away."""
    sender = threading.Thread(target=send, name="tracing", daemon=True)
    sender.start()
    sender.join(patience_s)


_made: list[TracerProvider] = []
_making = threading.Lock()


def _workers_provider(settings: Mapping[str, str]) -> TracerProvider | None:
    """Return the provider that we have given to this process, if it has none of its own."""
    from opentelemetry import trace

    with _making:
        unset = isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        if not _made and unset:
            os.environ.update(settings)
            _made.append(_provider(_exporters(os.environ), None))
            trace.set_tracer_provider(_made[0])
    return _made[0] if _made else None


def _context_of(traceparent: str) -> Context:
    from opentelemetry import trace

    _, trace_part, span_part, flags = traceparent.split("-")
    address = trace.SpanContext(
        int(trace_part, 16), int(span_part, 16), True, trace.TraceFlags(int(flags, 16))
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(address))


def _no_context() -> Context:
    from opentelemetry.context import Context

    return Context()


def _provider(exporters: Iterable[SpanExporter], run_id: str | None) -> TracerProvider:
    """Make a provider; with a run id, one whose every trace is that run's."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class OfTheRun(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return trace_id(run_id) if run_id else super().generate_trace_id()

    named = os.environ.get("OTEL_SERVICE_NAME")
    resource = Resource.create({} if named else {SERVICE_NAME: "mlops-ray"})
    # At exit the SDK would wait half a minute for a collector that is away.
    provider = TracerProvider(resource=resource, id_generator=OfTheRun(), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporters(settings: Mapping[str, str]) -> tuple[SpanExporter, ...]:
    """Make the exporters; one that cannot be made is left out with a warning."""
    made = []
    for name in exporter_names(settings):
        try:
            made.append(_exporter(name, settings))
        except Exception as error:
            _log.warning(
                "no spans go to the exporter %r: %s. Install it with: pip install 'mlops-ray[otel]'",
                name,
                error,
            )
    return tuple(made)


def _exporter(name: str, settings: Mapping[str, str]) -> SpanExporter:
    from importlib.metadata import entry_points

    if name == "otlp":
        protocols = (settings[key] for key in _PROTOCOLS if settings.get(key))
        over_grpc = next(protocols, "http/protobuf") == "grpc"
        name = "otlp_proto_grpc" if over_grpc else "otlp_proto_http"
    found = entry_points(group=_ENTRY_POINTS, name=name)
    if not found:
        raise ModuleNotFoundError(f"no installed package has an exporter of that name ({name})")
    exporter: SpanExporter = next(iter(found)).load()()
    return exporter


def settings() -> dict[str, str]:
    """Return what the environment of this process says of tracing: for ``nested`` elsewhere."""
    return {key: value for key, value in os.environ.items() if key.startswith("OTEL_")}


def _attributes(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in data.items() if value is not None}
    return {
        prefix + key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in kept.items()
    }
